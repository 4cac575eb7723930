"""Reads every way in which a program writes the groups of its collectives."""

import pytest

from moe.scaling.programs.groups import axes_along, read_groups

NEIGHBOURS = [[0, 1], [2, 3], [4, 5], [6, 7]]
EVEN_ODD = [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true", NEIGHBOURS),
        ("{}, dimensions={0}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[4,2]<=[8], dimensions={0}", NEIGHBOURS),
        ("[2,4]<=[4,2]T(1,0)", EVEN_ODD),
        ("[4,2]<=[2,2,2]T(1,0,2)", [[0, 1], [4, 5], [2, 3], [6, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}", NEIGHBOURS),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", EVEN_ODD),
        ("mesh[x=4,y=2] {y}", NEIGHBOURS),
        ("mesh['x'=2,'y'=1,'z'=4] {'x','z'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['x'=8] {'x':(4)2}", NEIGHBOURS),
        ("mesh['x'=8] {'x':(1)4}", EVEN_ODD),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", EVEN_ODD),
        ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'y'}", EVEN_ODD),
    ],
)
def test_forms(text: str, groups: list[list[int]]) -> None:
    assert read_groups(text, 8).tolist() == groups


@pytest.mark.parametrize("text", ["[2,2]<=[4]", "[4,4]<=[16]", "{{0,1},{1,2}}", "[a]", "mesh[]"])
def test_other_groups_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="groups"):
        read_groups(text, 8)


def test_1024_devices_in_transposed_groups() -> None:
    """Device number = 64 fsdp + expert, so members of a group along fsdp are 64 apart."""
    mesh = {"data": 1, "fsdp": 16, "expert": 64}
    groups = read_groups("[64,16]<=[16,64]T(1,0), use_global_device_ids=true", 1024)
    assert groups[3].tolist() == list(range(3, 1024, 64))
    assert axes_along(groups, mesh) == ("fsdp",)
    # Groups of 8 experts are a part of the expert axis.
    assert axes_along(read_groups("[128,8]<=[1024]", 1024), mesh) == ("expert",)
    # Rows of 128 devices span two places along fsdp and all experts.
    assert axes_along(read_groups("[8,128]<=[1024]", 1024), mesh) == ("fsdp", "expert")
    assert axes_along(read_groups("[128,8]<=[8,128]T(1,0)", 1024), mesh) == ("fsdp",)
