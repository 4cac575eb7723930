"""What a report shows of the experts' load, from router.jsonl."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch import report_load
from launch.plotting import THEMES
from launch.report import report
from launch.report_load import RouterLine, load_maps, read_router_lines
from moe.config import ConfigError, ModelConfig, MoEConfig, RunConfig
from tests.launch.report_runs import colours, images, make_run, text

SPARSE = MoEConfig(num_experts=4, layer_period=4)  # of 8 layers, numbers 3 and 7 are sparse
EVEN = [0.25, 0.25, 0.25, 0.25]
DEAD = [0.0, 0.26, 0.26, 0.48]  # in multiples of the even share: 0, 1.04, 1.04, 1.92
FULL = [0.2, 0.15, 0.15, 0.5]  # the last expert has twice the even share


def router_line(step: int, load: list[list[float]]) -> tuple[Any, ...]:
    metrics = {
        "router/max_vio": 0.5,
        "router/worst_max_vio": 1.25,
        "router/load_entropy": 0.9,
        "router/dropped_fraction": 0.031,
    }
    layers = {
        "load": np.array(load),
        "load_entropy": np.array([0.95, 0.85]),
        "dropped_fraction": np.array([0.0, 0.062]),
    }
    return step, metrics, layers


def test_the_load_of_every_sparse_layer_is_a_heat_map_centred_on_the_even_share(
    tmp_path: Path,
) -> None:
    lines = [
        router_line(10, [EVEN, DEAD]),
        router_line(20, [EVEN, FULL]),
        router_line(30, [EVEN, EVEN]),
    ]
    page = report(make_run(tmp_path, lines, SPARSE))
    stems = ("dropped", "load_3", "load_7", "load_entropy", "max_vio")
    assert images(tmp_path) == {f"{stem}-{theme}.png" for stem in stems for theme in THEMES}
    assert re.findall("<h2>(.*?)</h2>", page.read_text())[:2] == ["Routing", "Load of the experts"]
    assert 'alt="Load of the experts in layer 3"' in page.read_text()
    for theme, roles in THEMES.items():
        pixels = {
            layer: np.asarray(
                Image.open(tmp_path / "report" / f"load_{layer}-{theme}.png").convert("RGB")
            )
            for layer in (3, 7)
        }
        left = {
            layer: shown[110:500, 140:840].reshape(-1, 3) for layer, shown in pixels.items()
        }  # within the axes
        found = {
            layer: {"#" + bytes(pixel).hex() for pixel in np.unique(shown, axis=0)}
            for layer, shown in left.items()
        }
        assert found[3] == {roles["card"]}
        assert {roles["first"], roles["second"], roles["card"]} <= found[7]


def test_the_page_has_the_routers_headlines_and_the_worst_layer(tmp_path: Path) -> None:
    seen = text(report(make_run(tmp_path, [router_line(10, [EVEN, DEAD])], SPARSE)))
    assert "worst MaxVio 1.25 largest load / mean − 1" in seen
    assert "dropped 3.1% of assignments" in seen
    assert " router/worst_load_entropy 0.85 10 0.85 0.85 " in seen
    assert " router/worst_dropped_fraction 0.062 10 0.062 0.062 " in seen
    found = colours(tmp_path / "report" / "load_entropy-light.png")
    assert {THEMES["light"]["first"], THEMES["light"]["second"]} <= found and THEMES["light"][
        "third"
    ] not in found


def test_validation_is_the_third_line_of_the_routers_plots(tmp_path: Path) -> None:
    report(
        make_run(
            tmp_path,
            [
                (
                    10,
                    {
                        "router/max_vio": 0.5,
                        "router/worst_max_vio": 0.75,
                        "validation/max_vio": 0.25,
                    },
                )
            ],
            SPARSE,
        )
    )
    assert {THEMES["light"][role] for role in ("first", "second", "third")} <= colours(
        tmp_path / "report" / "max_vio-light.png"
    )


def test_eight_of_many_sparse_layers_are_drawn_at_even_distances() -> None:
    model = ModelConfig(
        num_layers=31, moe=MoEConfig(num_experts=2, layer_period=2)
    )  # 15 sparse layers: 1, 3, ..., 29
    maps = load_maps(
        [RouterLine(10, {"load": np.tile([0.25, 0.75], (15, 1))})], RunConfig(model=model)
    )
    assert [load_map.stem for load_map in maps] == [
        "load_1",
        "load_5",
        "load_9",
        "load_13",
        "load_17",
        "load_21",
        "load_25",
        "load_29",
    ]
    np.testing.assert_array_equal(maps[0].load, [[0.5, 1.5]])


def test_a_heat_map_of_many_steps_has_means_of_neighbouring_ones() -> None:
    model = ModelConfig(num_layers=1, moe=MoEConfig(num_experts=2))
    lines = [
        RouterLine(step, {"load": np.array([[step % 2, 1 - step % 2]])}) for step in range(1, 801)
    ]
    (load_map,) = load_maps(lines, RunConfig(model=model))
    np.testing.assert_array_equal(load_map.steps, np.arange(2, 801, 2))
    np.testing.assert_array_equal(load_map.load, np.ones((400, 2)))


def test_every_nth_line_of_a_large_router_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, [router_line(step, [EVEN, DEAD]) for step in range(1, 41)], SPARSE)
    size = (tmp_path / "router.jsonl").stat().st_size
    monkeypatch.setattr(report_load, "MAX_BYTES", size // 3)
    model = ModelConfig(num_layers=8, moe=SPARSE)
    lines, every = read_router_lines(tmp_path, RunConfig(model=model))
    assert every == 4 and [line.step for line in lines] == list(range(1, 41, 4))
    assert "one of every 4 lines is shown" in text(report(tmp_path))


def test_a_load_that_is_not_finite_has_a_colour_of_its_own(tmp_path: Path) -> None:
    report(make_run(tmp_path, [router_line(10, [EVEN, [math.nan] * 4])], SPARSE))
    assert THEMES["light"]["muted"] in colours(tmp_path / "report" / "load_7-light.png")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            '{"step": 10, "load": [[1, 2], [3]]}',
            ", line 2 is not a JSON object of a step and numbers: delete that line",
        ),
        (
            '{"step": 10, "load": [["x"]]}',
            ", line 2 is not a JSON object of a step and numbers: delete that line",
        ),
        (
            '{"step": 10, "load": [[1, 2]]}',
            r": load of step 10 has the shape (1, 2) instead of the shape (2, 4): delete that line",
        ),
        (
            '{"step": 10}',
            ": load of step 10 has no values instead of the shape (2, 4): delete that line",
        ),
    ],
)
def test_a_damaged_router_line_gets_one_line(tmp_path: Path, line: str, problem: str) -> None:
    make_run(tmp_path, [router_line(5, [EVEN, DEAD])], SPARSE)
    with (tmp_path / "router.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ConfigError) as caught:
        report(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'router.jsonl'}{problem}"
