"""Reads which devices a collective of a compiled program joins, and along which mesh axes they lie.

XLA numbers a program's devices in the order of its mesh, and writes groups of them in four ways.
Each of these stands for 4 groups of 2 neighbours among 8 devices:

    {{0,1},{2,3},{4,5},{6,7}}                   the groups one by one; {} is one group of all
    [4,2]<=[8]                                  the numbers 0 to 7 in rows of 2; a T(1,0) after
                                                [4,2] would transpose them first
    mesh['x'=4,'y'=2] {'y'}                     the devices of a mesh that differ along y alone
    mesh['x'=8] {'x':(4)2}                      the same, where y is the second of x's factors 4, 2
"""

import math
import re
from collections.abc import Mapping

import numpy as np

_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_AXIS_IN_GROUP = re.compile(r"'?(\w+)'?(?::\((\d+)\)(\d+))?")  # 'x', or 'x':(4)2


def read_groups(text: str, num_devices: int) -> np.ndarray:
    """Returns the groups that follow `replica_groups=` in a program's text, one in each row.

    Raises ValueError if they cannot be read, or are not all devices in groups of one size.
    """
    if text.startswith("mesh["):
        groups = _read_mesh_groups(text)
    elif text.startswith("["):
        groups = _read_iota(_match(_IOTA, text))
    else:
        groups = read_lists(text)
        groups = groups if groups.size else np.arange(num_devices)[None]
    if sorted(groups.flat) != list(range(num_devices)):
        raise ValueError(f"its groups are not all of {num_devices} devices, each in one group")
    return groups


def read_lists(text: str) -> np.ndarray:
    """Returns a table from text such as {{0,1},{2,3}}. Raises ValueError if rows differ in length.

    One pair of braces without numbers gives a table without rows.
    """
    if not (found := re.match(r"\{((?:\{[\d,]+\},?)*)\}", text)):
        raise ValueError(f"{text[:40]!r} is no list of devices")
    rows = [_numbers(row) for row in re.findall(r"\{([\d,]+)\}", found[1])]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("its groups have different sizes")
    return np.array(rows, int)


def axes_along(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ, in the mesh's order."""
    places = np.unravel_index(groups, tuple(mesh_shape.values()))  # for each axis, [group, member]
    return tuple(
        axis
        for axis, place in zip(mesh_shape, places, strict=True)
        if (place != place[:, :1]).any()
    )


def _read_iota(found: re.Match[str]) -> np.ndarray:
    """Returns the table of [shape]<=[dims]T(order): 0, 1, ... in `dims`, transposed, reshaped."""
    shape = _numbers(found[1])
    dims = _numbers(found[2]) if found[2] else shape
    order = _numbers(found[3]) if found[3] else range(len(dims))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)


def _read_mesh_groups(text: str) -> np.ndarray:
    """Returns the groups of a mesh's devices that differ along the named axes alone."""
    found = _match(_MESH, text)
    axes = dict(_read_axis(axis) for axis in found[1].split(","))
    devices = np.arange(math.prod(axes.values())) if found[2] is None else _device_ids(found[2])
    # Devices of a group have the same place once the digits of the named axes are taken away.
    places = dict(zip(axes, np.indices(tuple(axes.values())).reshape(len(axes), -1), strict=True))
    for name, before, size in _AXIS_IN_GROUP.findall(found[3]):
        digits = int(size or axes[name])
        stride = axes[name] // (int(before or 1) * digits)
        places[name] = places[name] - places[name] // stride % digits * stride
    _, group = np.unique(np.stack(list(places.values())), axis=1, return_inverse=True)
    return devices[np.argsort(group, kind="stable")].reshape(group.max() + 1, -1)


def _read_axis(text: str) -> tuple[str, int]:
    """Returns name and size of a mesh axis from text such as 'x'=4."""
    name, size = text.split("=")
    return name.strip("'"), int(size)


def _device_ids(text: str) -> np.ndarray:
    """Returns a mesh's devices, in row-major order, from text such as [2,4]T(1,0) or 0,2,1,3."""
    found = _IOTA.match(text)
    return (_read_iota(found) if found else np.array(_numbers(text))).reshape(-1)


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    """Returns the match at the text's beginning. Raises ValueError if there is none."""
    if not (found := pattern.match(text)):
        raise ValueError(f"{text[:60]!r} is no form of groups that is known")
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
