import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.report import THEMES, report, summarise
from launch.report_routing import load_maps
from moe.config import ModelConfig, MoEConfig, RunConfig, TrackingConfig, TrainConfig
from moe.tracking import MetricWriter, write_environment

ROOT = Path(__file__).parents[2]
WHOLE = {
    "train/loss": 2.5,
    "train/gradient_norm": 0.5,
    "train/learning_rate": 1e-3,
    "train/tokens_per_second": 41234.4,
    "train/mfu": 0.831,
    "train/data_wait_fraction": 0.004,
    "train/skipped_steps": 0,
}


def make_run(workdir: Path, lines: list[tuple[Any, ...]], moe: MoEConfig | None = None) -> Path:
    config = RunConfig(model=ModelConfig(num_layers=8, moe=moe or MoEConfig()), train=TrainConfig(steps=2000, batch_size=32))
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    write_environment(workdir, "blockwise")
    with MetricWriter(workdir, TrackingConfig(tensorboard=False), step=0) as writer:
        for line in lines:
            writer.write(*line)
    return workdir


def images(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "report").glob("*.png")}


def colours(path: Path) -> set[str]:
    """The colours of an image's pixels, as #rrggbb."""
    pixels = np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0)
    return {"#" + bytes(pixel).hex() for pixel in pixels}


def text(page: Path) -> str:
    """What a reader sees of a page, tags left out."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.read_text(), flags=re.DOTALL))


def test_a_whole_run_is_drawn_for_light_and_dark(tmp_path: Path) -> None:
    validation = {"validation/loss": 2.25, "validation/bits_per_byte": 3.25}
    page = report(make_run(tmp_path, [(10, WHOLE), (20, WHOLE), (20, validation)]))
    assert page == tmp_path / "report" / "index.html"
    stems = ("bits_per_byte", "data_wait", "gradient_norm", "learning_rate", "loss", "mfu", "throughput")
    assert images(tmp_path) == {f"{stem}-{theme}.png" for stem in stems for theme in ("dark", "light")}
    for theme, other in (("light", "dark"), ("dark", "light")):
        seen = colours(tmp_path / "report" / f"loss-{theme}.png")
        assert {THEMES[theme][role] for role in ("card", "first", "second")} <= seen
        assert THEMES[other]["card"] not in seen and THEMES[theme]["alarm"] not in seen


def test_the_page_says_where_the_run_stands(tmp_path: Path) -> None:
    validation = {"validation/loss": 2.25, "validation/bits_per_byte": 3.25}
    seen = text(report(make_run(tmp_path, [(10, WHOLE | {"train/loss": 3}), (20, WHOLE), (20, validation)])))
    assert "step 20 of 2,000 · 163,840 tokens · 8 × cpu · started " in seen  # 20 steps of 32 rows of 256 tokens
    assert "validation loss 2.2500 nats per token" in seen
    assert "bits per byte 3.2500 of text" in seen
    assert "throughput 41,234 tokens per second" in seen
    assert "MFU 83.1% of peak FLOP/s" in seen
    assert "metric last at step lowest highest" in seen
    assert " train/loss 2.5 20 2.5 3 " in seen
    assert f"numpy {np.__version__}" in seen


def test_changed_config_values_stand_out(tmp_path: Path) -> None:
    page = report(make_run(tmp_path, [(10, {"train/loss": 2.5})])).read_text()
    assert re.findall(r"<tr class=changed><td>(\w+)</td><td>(\w+)</td>", page) == [
        ("num_layers", "8"),
        ("steps", "2000"),
        ("batch_size", "32"),
    ]


def test_the_page_needs_nothing_but_its_directory(tmp_path: Path) -> None:
    page = report(make_run(tmp_path, [(10, {"train/loss": 2.5, "router/load": 1.0})])).read_text()
    assert set(re.findall(r'(?:src|srcset|href)="([^"]*)"', page)) == images(tmp_path)
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)


def test_a_run_without_validation_shows_what_there_is(tmp_path: Path) -> None:
    page = report(make_run(tmp_path, [(10, {"train/loss": 2.5})]))
    assert images(tmp_path) == {"loss-dark.png", "loss-light.png"}
    assert THEMES["light"]["second"] not in colours(tmp_path / "report" / "loss-light.png")
    assert "validation loss" not in text(page)


def test_validation_before_the_first_step_is_drawn(tmp_path: Path) -> None:
    report(make_run(tmp_path, [(0, {"validation/loss": 5.5})]))
    assert THEMES["light"]["second"] in colours(tmp_path / "report" / "loss-light.png")


def test_values_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    bad = {"train/loss": math.nan, "train/learning_rate": -math.inf, "train/tokens_per_second": 0.0}
    seen = text(report(make_run(tmp_path, [(10, bad), (20, bad)])))
    assert "training loss nan" in seen and " train/loss nan 20 nan nan " in seen
    for stem, marked in (("loss", True), ("learning_rate", True), ("throughput", False)):
        assert (THEMES["light"]["alarm"] in colours(tmp_path / "report" / f"{stem}-light.png")) == marked


@pytest.mark.parametrize("skipped", [0, 2])
def test_skipped_updates_are_marked_under_the_gradient_norm(tmp_path: Path, skipped: int) -> None:
    totals = ((10, 0), (20, skipped), (30, skipped))
    report(make_run(tmp_path, [(step, {"train/gradient_norm": 0.5, "train/skipped_steps": total}) for step, total in totals]))
    assert (THEMES["light"]["alarm"] in colours(tmp_path / "report" / "gradient_norm-light.png")) == (skipped > 0)


def test_metrics_nobody_foresaw_are_grouped_by_prefix_and_escaped(tmp_path: Path) -> None:
    extra = {"router/load": 1.0, "router/layer_0/load": 2.0, "router/layer-0/load": 3.0, "router/<b>": 4.0, "alone": 5.0}
    page = report(make_run(tmp_path, [(10, extra)])).read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["other", "router", "Numbers", "Config", "Environment"]
    assert len(images(tmp_path)) == 2 * len(extra)
    assert "router/&lt;b&gt;" in page and "<b>" not in page


def test_a_run_that_is_still_writing_can_be_drawn(tmp_path: Path) -> None:
    make_run(tmp_path, [(10, {"train/loss": 2.5})])
    for name in ("metrics.jsonl", "environment.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 20, "trai')
    assert "step 10 of 2,000" in text(report(tmp_path))


def test_a_long_run_is_summarised_by_medians_with_gaps() -> None:
    values = np.array([1, 3, math.nan, math.inf, 5, math.nan, 8, 9])
    steps, medians = summarise(np.arange(0, 80, 10), values, points=4)
    np.testing.assert_array_equal(steps, [5, 25, 45, 65])
    np.testing.assert_array_equal(medians, [2, math.nan, 5, 8.5])


def test_a_long_run_keeps_a_faint_line_of_every_value(tmp_path: Path) -> None:
    report(make_run(tmp_path, [(step, {"train/loss": 2 + step % 2}) for step in range(1, 101)]))
    with Image.open(tmp_path / "report" / "loss-light.png") as image:
        assert image.size == (1120, 660)
    assert THEMES["light"]["first"] in colours(tmp_path / "report" / "loss-light.png")


SPARSE = MoEConfig(num_experts=4, layer_period=4)  # of 8 layers the fourth and the last, numbers 3 and 7
EVEN, DEAD = [0.25, 0.25, 0.25, 0.25], [0.0, 0.26, 0.26, 0.48]  # in multiples of the even share: 0, 1.04, 1.04, 1.92
FULL = [0.2, 0.15, 0.15, 0.5]  # the last one has twice the even share


def router_line(step: int, load: list[list[float]]) -> tuple[Any, ...]:
    metrics = {"router/max_vio": 0.5, "router/worst_max_vio": 1.25, "router/load_entropy": 0.9, "router/dropped_fraction": 0.031}
    layers = {"load": np.array(load), "load_entropy": np.array([0.95, 0.85]), "dropped_fraction": np.array([0.0, 0.062])}
    return step, metrics, layers


def test_the_load_of_every_sparse_layer_is_a_heat_map_centred_on_the_even_share(tmp_path: Path) -> None:
    lines = [router_line(10, [EVEN, DEAD]), router_line(20, [EVEN, FULL]), router_line(30, [EVEN, EVEN])]
    page = report(make_run(tmp_path, lines, SPARSE))
    stems = ("dropped", "load_3", "load_7", "load_entropy", "max_vio")
    assert images(tmp_path) == {f"{stem}-{theme}.png" for stem in stems for theme in THEMES}
    assert re.findall("<h2>(.*?)</h2>", page.read_text())[:2] == ["Routing", "Load of the experts"]
    assert 'alt="Load of the experts in layer 3 over steps"' in page.read_text()
    for theme, roles in THEMES.items():
        pixels = {layer: np.asarray(Image.open(tmp_path / "report" / f"load_{layer}-{theme}.png").convert("RGB")) for layer in (3, 7)}
        left = {layer: shown[80:550, 80:880].reshape(-1, 3) for layer, shown in pixels.items()}  # within the axes
        found = {layer: {"#" + bytes(pixel).hex() for pixel in np.unique(shown, axis=0)} for layer, shown in left.items()}
        assert found[3] == {roles["card"]}
        assert {roles["first"], roles["second"], roles["card"]} <= found[7]


def test_the_routers_headlines_and_the_worst_layer_are_told(tmp_path: Path) -> None:
    seen = text(report(make_run(tmp_path, [router_line(10, [EVEN, DEAD])], SPARSE)))
    assert "worst MaxVio 1.25 largest load / mean − 1" in seen
    assert "dropped 3.1% of assignments" in seen
    assert " router/worst_load_entropy 0.85 10 0.85 0.85 " in seen
    assert " router/worst_dropped_fraction 0.062 10 0.062 0.062 " in seen
    found = colours(tmp_path / "report" / "load_entropy-light.png")
    assert {THEMES["light"]["first"], THEMES["light"]["second"]} <= found and THEMES["light"]["third"] not in found


def test_validation_is_the_third_line_of_the_routers_plots(tmp_path: Path) -> None:
    report(make_run(tmp_path, [(10, {"router/max_vio": 0.5, "router/worst_max_vio": 0.75, "validation/max_vio": 0.25})], SPARSE))
    assert {THEMES["light"][role] for role in ("first", "second", "third")} <= colours(tmp_path / "report" / "max_vio-light.png")


def test_of_many_sparse_layers_eight_at_even_distances_are_drawn() -> None:
    model = ModelConfig(num_layers=31, moe=MoEConfig(num_experts=2, layer_period=2))  # 15 sparse layers: 1, 3, ..., 29
    maps = load_maps([(10, {"load": np.tile([0.25, 0.75], (15, 1))})], model)
    assert [load_map.stem for load_map in maps] == ["load_1", "load_5", "load_9", "load_13", "load_17", "load_21", "load_25", "load_29"]
    np.testing.assert_array_equal(maps[0].load, [[0.5, 1.5]])


def test_a_heat_map_of_many_steps_has_means_of_neighbouring_ones() -> None:
    model = ModelConfig(num_layers=1, moe=MoEConfig(num_experts=2))
    (load_map,) = load_maps([(step, {"load": np.array([[step % 2, 1 - step % 2]])}) for step in range(1, 801)], model)
    np.testing.assert_array_equal(load_map.steps, np.arange(2, 801, 2))
    np.testing.assert_array_equal(load_map.load, np.ones((400, 2)))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.report", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True, timeout=60)


def test_the_command_prints_the_path_of_the_page(tmp_path: Path) -> None:
    make_run(tmp_path, [(10, {"train/loss": 2.5})])
    result = run(f"--workdir={tmp_path}")
    assert (result.stdout, result.returncode) == (f"{tmp_path}/report/index.html\n", 0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist: set --workdir to the directory of a run"),
        ("", "is empty: wait for the run's first metrics, after train.log_every steps"),
        ("{}\n", ", line 1 is not a JSON object of a step and numbers: delete that line"),
    ],
)
def test_a_directory_that_is_no_run_gets_one_line(tmp_path: Path, content: Any, problem: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    result = run(f"--workdir={tmp_path}")
    space = "" if problem.startswith(",") else " "
    assert (result.stderr, result.returncode) == (f"error: {path}{space}{problem}\n", 2)


def test_a_mistyped_directory_is_answered_in_two_seconds(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):  # the quickest, for other tests may run beside this one
        start = time.perf_counter()
        assert run(f"--workdir={tmp_path / 'nowhere'}").returncode == 2
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2


def test_help_is_short() -> None:
    result = run("--help")
    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout.startswith("Draws a run: ")
    assert result.stdout.endswith("Flags:\n  --workdir=...\n      The run directory, as given to launch.train. Required.\n")
