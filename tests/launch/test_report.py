"""The page that `launch.report` draws of a run, and its figures."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.plotting import THEMES
from launch.report import report
from moe.config import ConfigError, MoEConfig, RunConfig
from tests.jobs import answers_within
from tests.launch.report_runs import colours, images, make_run, text

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


def test_unknown_metrics_are_grouped_by_prefix_and_escaped(tmp_path: Path) -> None:
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


NASTY = "<script>alert('$x^2$')</script>中" + "y" * 200


def test_text_from_files_is_escaped_and_may_be_long(tmp_path: Path) -> None:
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


def test_a_long_run_keeps_a_faint_line_of_every_value(tmp_path: Path) -> None:
    report(make_run(tmp_path, [(step, {"train/loss": 2 + step % 2}) for step in range(1, 101)]))
    with Image.open(tmp_path / "report" / "loss-light.png") as image:
        assert image.size == (1120, 660)
    assert THEMES["light"]["first"] in colours(tmp_path / "report" / "loss-light.png")


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
def test_a_damaged_metrics_line_gets_one_line(tmp_path: Path, line: str) -> None:
    make_run(tmp_path, [(10, {"train/loss": 2.5})])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    problem = "line 2 is not a JSON object of a step and numbers: delete that line"
    with pytest.raises(ConfigError, match=rf"metrics\.jsonl, {problem}$"):
        report(tmp_path)


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
    assert run(f"--workdir={tmp_path / 'nowhere'}").returncode == 2
    assert answers_within(2.0, lambda: run(f"--workdir={tmp_path / 'nowhere'}"))


def test_help_says_what_the_page_has() -> None:
    result = run("--help")
    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout.startswith("Draws a run: ")
    assert result.stdout.endswith(
        "Flags:\n  --workdir=...\n      The run directory, as given to launch.train. Required.\n"
        "  --card=...\n      Whether to write MODEL_CARD.md instead of the page. (default: False)\n"
    )
