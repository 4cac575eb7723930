import ast
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

from launch import report_routing
from launch.report import THEMES, report, summarise, thin
from launch.report_routing import load_maps
from moe.config import ConfigError, ModelConfig, MoEConfig, RunConfig, TrackingConfig, TrainConfig
from moe.files import write_whole
from moe.workdir.tracking import MetricWriter, write_environment

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
    config = RunConfig(
        model=ModelConfig(num_layers=8, moe=moe or MoEConfig()),
        train=TrainConfig(steps=2000, batch_size=32),
    )
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
    return re.sub(
        r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.read_text(), flags=re.DOTALL)
    )


def test_a_whole_run_is_drawn_for_light_and_dark(tmp_path: Path) -> None:
    validation = {"validation/loss": 2.25, "validation/bits_per_byte": 3.25}
    page = report(make_run(tmp_path, [(10, WHOLE), (20, WHOLE), (20, validation)]))
    assert page == tmp_path / "report" / "index.html"
    stems = (
        "bits_per_byte",
        "data_wait",
        "gradient_norm",
        "learning_rate",
        "loss",
        "mfu",
        "throughput",
    )
    assert images(tmp_path) == {
        f"{stem}-{theme}.png" for stem in stems for theme in ("dark", "light")
    }
    for theme, other in (("light", "dark"), ("dark", "light")):
        seen = colours(tmp_path / "report" / f"loss-{theme}.png")
        assert {THEMES[theme][role] for role in ("card", "first", "second")} <= seen
        assert THEMES[other]["card"] not in seen and THEMES[theme]["alarm"] not in seen


def test_the_page_says_where_the_run_stands(tmp_path: Path) -> None:
    validation = {"validation/loss": 2.25, "validation/bits_per_byte": 3.25}
    seen = text(
        report(make_run(tmp_path, [(10, WHOLE | {"train/loss": 3}), (20, WHOLE), (20, validation)]))
    )
    assert (
        "step 20 of 2,000 · 163,840 tokens · 8 × cpu · started " in seen
    )  # 20 steps of 32 rows of 256 tokens
    assert "validation loss 2.2500 nats per token" in seen
    assert "bits per byte 3.2500 of text" in seen
    assert "throughput 41,234 tokens per second" in seen
    assert "MFU 83.1% of peak FLOP/s" in seen
    assert "metric last at step lowest highest" in seen
    assert " train/loss 2.5 20 2.5 3 " in seen
    assert f"numpy {np.__version__}" in seen


def test_changed_config_values_stand_out_beside_their_defaults(tmp_path: Path) -> None:
    page = report(
        make_run(tmp_path, [(10, {"train/loss": 2.5})], MoEConfig(num_experts=4))
    ).read_text()
    assert re.findall(
        r"<tr class=changed><td>([\w.]+)</td><td>(\w+) <small>default (\w+)</small></td>", page
    ) == [
        ("num_layers", "8", "4"),
        ("moe.num_experts", "4", "0"),
        ("steps", "2000", "1000"),
        ("batch_size", "32", "16"),
    ]


def test_every_config_field_has_a_row_in_the_card_of_its_section(tmp_path: Path) -> None:
    page = report(make_run(tmp_path, [(10, {"train/loss": 2.5})])).read_text()
    cards = dict(re.findall(r"<div class=card><h3>([\w.]+)</h3><table>(.*?)</table></div>", page))
    rows = {name: re.findall(r"<tr[^>]*><td>([\w.]+)</td>", card) for name, card in cards.items()}

    def fields(config: dict[str, Any], prefix: str) -> list[str]:
        return [f"{prefix}{name}" for name, value in config.items() if not isinstance(value, dict)]

    config = RunConfig().to_dict()
    assert rows == {
        "run": fields(config, ""),
        "model": fields(config["model"], ""),
        "model.attention": fields(config["model"]["attention"], "attention."),
        "model.moe": fields(config["model"]["moe"], "moe."),
        **{
            name: fields(config[name], "")
            for name in ("data", "optimizer", "mesh", "train", "tracking")
        },
    }


def test_a_card_has_room_for_its_number(tmp_path: Path) -> None:
    large = {
        "train/loss": 1e30,
        "train/tokens_per_second": 1234567890123.0,
        "train/mfu": 1e9,
        "train/skipped_steps": 123456789,
    }
    page = report(make_run(tmp_path, [(10, large)])).read_text()
    assert re.findall(r"<dd>([^<]*)<small>", page) == ["1e+30", "1.2 T", "100.0 G%", "123.5 M"]


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
    bad = {"train/loss": math.nan, "train/learning_rate": -math.inf, "train/gradient_norm": 1.0}
    seen = text(report(make_run(tmp_path, [(10, bad), (20, bad)])))
    assert "training loss nan" in seen and " train/loss nan 20 nan nan " in seen
    for stem, marked in (("loss", True), ("learning_rate", True), ("gradient_norm", False)):
        assert (
            THEMES["light"]["alarm"] in colours(tmp_path / "report" / f"{stem}-light.png")
        ) == marked


def test_a_metric_that_is_always_0_is_named_and_not_drawn(tmp_path: Path) -> None:
    zeros = {
        "router/dropped_fraction": 0.0,
        "validation/dropped_fraction": 0.0,
        "router/dead_experts": 0.0,
        "router/z_loss": 1.5,
    }
    page = report(make_run(tmp_path, [(10, zeros), (20, zeros)]))
    assert images(tmp_path) == {"z_loss-dark.png", "z_loss-light.png"}
    assert "Always 0, and not drawn: Dropped assignments, Experts without a token." in text(page)
    assert " router/dropped_fraction 0 20 0 0 " in text(page)


@pytest.mark.parametrize("skipped", [0, 2])
def test_skipped_updates_are_marked_under_the_gradient_norm(tmp_path: Path, skipped: int) -> None:
    totals = ((10, 0), (20, skipped), (30, skipped))
    report(
        make_run(
            tmp_path,
            [
                (step, {"train/gradient_norm": 0.5, "train/skipped_steps": total})
                for step, total in totals
            ],
        )
    )
    assert (
        THEMES["light"]["alarm"] in colours(tmp_path / "report" / "gradient_norm-light.png")
    ) == (skipped > 0)


def test_metrics_nobody_foresaw_are_grouped_by_prefix_and_escaped(tmp_path: Path) -> None:
    extra = {
        "router/load": 1.0,
        "router/layer_0/load": 2.0,
        "router/layer-0/load": 3.0,
        "router/<b>": 4.0,
        "alone": 5.0,
    }
    page = report(make_run(tmp_path, [(10, extra)])).read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["other", "router", "Numbers", "Config", "Environment"]
    assert len(images(tmp_path)) == 2 * len(extra)
    assert "router/&lt;b&gt;" in page and "<b>" not in page


NASTY = "<script>alert('$x^2$')</script>中" + "y" * 300


def test_what_comes_from_files_is_escaped_and_may_be_long(tmp_path: Path) -> None:
    workdir = tmp_path / "<img src=x onerror=alert(1)>"
    workdir.mkdir()
    make_run(workdir, [(10, {NASTY: 1.0, f"router/{NASTY}": 2.0})])
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["directory"] = NASTY
    (workdir / "config.json").write_text(json.dumps(config))
    start = {
        "time": NASTY,
        "command": [NASTY],
        "git": {"commit": NASTY, NASTY: True},
        "devices": {"kinds": [NASTY], "count": NASTY},
    }
    with (workdir / "environment.jsonl").open("a") as file:
        file.writelines(
            json.dumps(line) + "\n" for line in (start, [1], {"time": None}, "text", {NASTY: 1})
        )
    page = report(workdir).read_text()
    assert not re.search(r"<(script|img src=x)", page)
    assert page.count("&lt;script&gt;alert(&#x27;$x^2$&#x27;)&lt;/script&gt;") > 8
    assert len(images(workdir)) == 4


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


def test_a_line_of_many_values_keeps_its_extremes() -> None:
    steps, values = np.arange(100_000), np.random.default_rng(0).normal(size=100_000)
    values[[7, 70_000]], values[90_000:95_000] = [9.0, -9.0], math.nan
    chosen, thinned = thin(steps, values)
    assert len(chosen) <= 2000 and np.all(np.diff(chosen) > 0)
    np.testing.assert_array_equal(thinned, values[chosen])
    assert {7, 70_000} <= set(chosen) and np.isnan(thinned).any()
    assert thin(steps[:9], values[:9])[0] is not None and len(thin(steps[:9], values[:9])[0]) == 9


def test_a_long_run_keeps_a_faint_line_of_every_value(tmp_path: Path) -> None:
    report(make_run(tmp_path, [(step, {"train/loss": 2 + step % 2}) for step in range(1, 101)]))
    with Image.open(tmp_path / "report" / "loss-light.png") as image:
        assert image.size == (1120, 660)
    assert THEMES["light"]["first"] in colours(tmp_path / "report" / "loss-light.png")


SPARSE = MoEConfig(
    num_experts=4, layer_period=4
)  # of 8 layers the fourth and the last, numbers 3 and 7
EVEN, DEAD = (
    [0.25, 0.25, 0.25, 0.25],
    [0.0, 0.26, 0.26, 0.48],
)  # in multiples of the even share: 0, 1.04, 1.04, 1.92
FULL = [0.2, 0.15, 0.15, 0.5]  # the last one has twice the even share


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


def test_the_routers_headlines_and_the_worst_layer_are_told(tmp_path: Path) -> None:
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


def test_of_many_sparse_layers_eight_at_even_distances_are_drawn() -> None:
    model = ModelConfig(
        num_layers=31, moe=MoEConfig(num_experts=2, layer_period=2)
    )  # 15 sparse layers: 1, 3, ..., 29
    maps = load_maps([(10, {"load": np.tile([0.25, 0.75], (15, 1))})], model)
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
    (load_map,) = load_maps(
        [(step, {"load": np.array([[step % 2, 1 - step % 2]])}) for step in range(1, 801)], model
    )
    np.testing.assert_array_equal(load_map.steps, np.arange(2, 801, 2))
    np.testing.assert_array_equal(load_map.load, np.ones((400, 2)))


def test_of_a_large_router_file_every_nth_line_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, [router_line(step, [EVEN, DEAD]) for step in range(1, 41)], SPARSE)
    size = (tmp_path / "router.jsonl").stat().st_size
    monkeypatch.setattr(report_routing, "MAX_BYTES", size // 3)
    model = ModelConfig(num_layers=8, moe=SPARSE)
    lines, every = report_routing.read_lines(tmp_path, model)
    assert every == 4 and [step for step, _ in lines] == list(range(1, 41, 4))
    assert "of every 4 of its lines, one is shown" in text(report(tmp_path))


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
def test_a_damaged_router_line_is_told_in_one_line(tmp_path: Path, line: str, problem: str) -> None:
    make_run(tmp_path, [router_line(5, [EVEN, DEAD])], SPARSE)
    with (tmp_path / "router.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ConfigError) as caught:
        report(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'router.jsonl'}{problem}"


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "x"}',
        '{"step": null, "a": 1}',
        '{"step": 1, "a": [1]}',
        '{"step": 1, "a": "x"}',
        "[1]",
        "{",
    ],
)
def test_a_damaged_metrics_line_is_told_in_one_line(tmp_path: Path, line: str) -> None:
    make_run(tmp_path, [(10, {"train/loss": 2.5})])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(
        ConfigError,
        match=r"metrics\.jsonl, line 2 is not a JSON object of a step and numbers: delete that line$",
    ):
        report(tmp_path)


class Killed(BaseException):
    """Ends a command as a signal does, at a place that a test chooses."""


def test_a_report_that_is_killed_leaves_the_earlier_files_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(make_run(tmp_path, [(10, {"train/loss": 2.5})]))
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(before) == {"index.html", "loss-dark.png", "loss-light.png"}

    def killed(descriptor: int) -> None:
        os.ftruncate(descriptor, 10)
        raise Killed

    make_run(tmp_path, [(20, {"train/loss": 1.5})])
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(Killed):
        report(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_a_file_is_written_whole_and_readable_as_others_are(tmp_path: Path) -> None:
    path, other = tmp_path / "a.md", tmp_path / "b.md"
    other.write_text("ä")
    write_whole(path, "ä")
    assert path.read_bytes() == "ä".encode() and path.stat().st_mode == other.stat().st_mode
    write_whole(path, b"\x00")
    assert path.read_bytes() == b"\x00" and {item.name for item in tmp_path.iterdir()} == {
        "a.md",
        "b.md",
    }


def test_a_link_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "fifo", "text")
    assert (tmp_path / "fifo").is_fifo() and os.read(reader, 9) == b"text"
    os.close(reader)


def test_commands_write_files_by_that_helper_alone() -> None:
    direct = {"write_text", "write_bytes", "savefig", "dump"}
    wrong = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}"
        for path in (ROOT / "launch").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in direct
        if not (
            node.func.attr == "savefig" and ast.unparse(node.args[0]) == "image"
        )  # a picture in memory
    ]
    assert not wrong, "\n".join(wrong)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.report", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_prints_the_path_of_the_page(tmp_path: Path) -> None:
    make_run(tmp_path, [(10, {"train/loss": 2.5})])
    result = run(f"--workdir={tmp_path}")
    assert (result.stdout, result.returncode) == (
        f"wrote {tmp_path}/report/index.html, and its plots beside it\n",
        0,
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist: set --workdir to the directory of a run"),
        ("", "is empty: wait for the run's first metrics, after train.log_every steps"),
        ("{}\n", ", line 1 is not a JSON object of a step and numbers: delete that line"),
    ],
)
def test_a_directory_that_is_no_run_gets_one_line(
    tmp_path: Path, content: Any, problem: str
) -> None:
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


def test_help_says_what_the_page_has() -> None:
    result = run("--help")
    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout.startswith("Draws a run: ")
    assert result.stdout.endswith(
        "Flags:\n  --workdir=...\n      The run directory, as given to launch.train. Required.\n"
    )
