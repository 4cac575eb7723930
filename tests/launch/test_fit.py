"""The command that fits a law to a table: what it prints, writes, predicts and refuses."""

import ast
import contextlib
import csv
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from matplotlib.figure import Figure

from configs import dense_tiny
from launch import sweep_table
from launch.fit.__main__ import define_flags, find, main, read_emit
from launch.fit.emit import config_file, docstring
from launch.fit.prediction import isoflop_model, spend
from launch.fit.results import as_json, as_text
from launch.fit.study import fit_curves
from launch.plotting import THEMES, write_drawing
from moe.config import ConfigError, RunConfig
from moe.scaling.experiments.candidates import list_candidates
from moe.scaling.experiments.ladders import iso_flop_ladder, with_experts
from moe.scaling.experiments.runs import make_runs
from moe.scaling.experiments.shapes import scale_model, scale_run
from moe.scaling.experiments.sweep import expand
from moe.scaling.flops import (
    active_parameters,
    planned_flops,
    planned_tokens,
    total_parameters,
    training_flops_per_token,
)
from moe.scaling.laws.isoflop import fit_isoflop
from moe.workdir.tracking import read_metrics

ROOT = Path(__file__).parents[2]
# Hoffmann et al.'s law as Besiroglu et al. 2024 (arXiv 2404.10102) refitted it.
LAW = {"E": 1.817, "A": 482.0, "alpha": 0.348, "B": 2085.0, "beta": 0.366}


def true_loss(parameters: float, tokens: float) -> float:
    return LAW["E"] + LAW["A"] / parameters ** LAW["alpha"] + LAW["B"] / tokens ** LAW["beta"]


def grid(noise: float = 1e-3) -> list[dict[str, Any]]:
    """Returns runs of 5 budgets and 7 sizes, whose losses follow the law but for some noise."""
    generator = np.random.default_rng(0)
    rows = []
    for budget in np.geomspace(1e18, 1e20, 5):
        for size in np.sqrt(budget / 120) * np.geomspace(0.2, 5, 7):
            tokens = budget / (6 * size)
            loss = true_loss(size, tokens) * np.exp(noise * generator.standard_normal())
            rows.append({"parameters": size, "tokens": tokens, "loss": loss})
    return rows


def swept(directory: Path) -> Path:
    """Writes the table of a sweep as launch.sweep does, under the same law, and returns its path.

    One run has diverged, and one has not begun.
    """
    base = RunConfig.from_config_dict(dense_tiny.get_config())
    widths = (128, 192, 256, 384, 512)
    budgets = dict.fromkeys((1e15, 3e15, 1e16, 3e16), widths) | {6e16: (128, 256)}
    rows = []
    for run in expand(base, iso_flop_ladder(base, budgets)):
        row = sweep_table.planned_row(run) | {"code": "v1"}
        row["config"] = json.dumps(run.config.to_dict())
        # Half of the loss, which for these sizes is above that of a guess among all bytes.
        row |= {"status": "finished", "loss": true_loss(row["parameters"], row["tokens"]) / 2}
        rows.append(row)
    rows[-2] |= {"status": "diverged", "reason": "not finite", "loss": None}
    rows[-1] |= {"status": "waiting", "loss": None}
    sweep_table.write_table(rows, directory)
    return directory / "runs.parquet"


def mixed(expansions: Iterable[int] = (1, 4, 16)) -> list[dict[str, Any]]:
    """Returns rows with configs of dense and sparse models, whose loss falls with the experts."""
    base = RunConfig.from_config_dict(dense_tiny.get_config())
    rows = []
    for budget in (1e15, 1e16, 1e17):
        for width in (128, 192, 256, 384):
            for expansion in expansions:
                model = with_experts(scale_model(base.model, width), expansion, 1)
                per_token = training_flops_per_token(model, base.data.sequence_length)
                run = scale_run(base, model, budget / per_token)
                tokens, active = planned_tokens(run), active_parameters(model)
                loss = 1.8 + (true_loss(active, tokens) - 1.8) * expansion**-0.1
                rows.append(
                    {
                        "parameters": total_parameters(model),
                        "active_parameters": active,
                        "tokens": tokens,
                        "flops": planned_flops(run),
                        "loss": loss,
                        "experts": expansion,
                        "experts_per_token": 1,
                        "config": json.dumps(run.to_dict()),
                    }
                )
    return rows


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def flag_values(path: Path, *arguments: str) -> flags.FlagValues:
    """Returns the command's flags, with a small bootstrap."""
    values = flags.FlagValues()
    define_flags(values)
    output = path.parent / "fit"
    defaults = (f"--runs={path}", "--law=chinchilla", f"--output={output}", "--bootstraps=100")
    values(["fit", *defaults, *arguments])
    return values


def fit(path: Path, *arguments: str) -> dict[str, Any]:
    """Fits as the command does, without drawing, and returns the numbers."""
    return json.loads(as_json(find(flag_values(path, *arguments)).results))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the whole command on a grid of runs, and returns the directory that it wrote."""
    path = write_table(tmp_path_factory.mktemp("grid") / "runs.csv", grid())
    values = flag_values(path, "--budget=1e21,1e22")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(values)
    path.with_name("printed").write_text(printed.getvalue())
    return path.parent / "fit"


def test_a_law_is_found_and_predicts(written: Path) -> None:
    results = json.loads((written / "fit.json").read_text())
    found = {line["name"]: line for line in results["coefficients"]}
    for name, value in LAW.items():
        assert found[name]["low"] < value < found[name]["high"]
    assert results["num_runs"] == results["num_rows"] == 35
    for optimum in results["optima"]:
        power = 1 / (LAW["alpha"] + LAW["beta"])
        best = (LAW["alpha"] * LAW["A"] / (LAW["beta"] * LAW["B"])) ** power * (
            optimum["budget"] / 6
        ) ** (LAW["beta"] * power)
        low, high = optimum["intervals"]["parameters"]
        assert low < best < high and high < 4 * low
        assert optimum["best"]["parameters"] == pytest.approx(best, rel=0.2)
    errors = [
        abs(predicted / measured - 1)
        for predicted, measured in zip(
            results["held_out"]["predicted"], results["held_out"]["measured"], strict=True
        )
    ]
    assert max(errors) < 0.01
    printed = (written.parent / "printed").read_text()
    for words in ("coefficient", "95 % interval", "Warnings", "Best models", "10²²", "wrote"):
        assert words in printed


def test_the_page_holds_everything(written: Path) -> None:
    page = (written / "index.html").read_text()
    # Only the figures' bytes are in it: no other file, no script, no address.
    assert page.count("data:image/png;base64,") == len(list(written.glob("*.png"))) == 14
    without_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", page)
    assert not re.search(r"https?://|<script|src=[^\"]|\.png", without_images)
    assert len(list(written.glob("*.pdf"))) == 7
    for words in ("prefers-color-scheme: dark", "Best models", "alpha", "Warnings"):
        assert words in page


def test_the_same_input_gives_the_same_bytes(written: Path) -> None:
    read = lambda: {file.name: file.read_bytes() for file in written.iterdir()}
    first, path = read(), written.parent / "runs.csv"
    main(flag_values(path, "--budget=1e21,1e22"))
    assert read() == first
    assert fit(path, "--budget=1e21,1e22", "--seed=1") != json.loads(first["fit.json"])


def test_columns_units_and_rows_are_chosen_by_flags(tmp_path: Path) -> None:
    plain = write_table(tmp_path / "runs.csv", [row | {"flops": 0} for row in grid()])
    theirs = tmp_path / "theirs.csv"
    ours = grid()
    for row in ours:
        row["flops"] = 6 * row["parameters"] * row["tokens"]
    write_table(plain, ours)
    foreign = [
        {
            "data": "c4",
            "N": row["parameters"] / 1e6,
            "D": row["tokens"] / 1e9,
            "C": row["flops"] / 8.64e19,
            "bits": row["loss"] / np.log(2),
        }
        for row in ours
    ]
    others = [row | {"data": "books", "bits": 7.0} for row in foreign]
    write_table(theirs, [pair for both in zip(others, foreign, strict=True) for pair in both])
    expected = fit(plain)["coefficients"]
    found = fit(
        theirs, "--where=data=c4", "--column_parameters=N", "--parameters_unit=millions",
        "--column_tokens=D", "--tokens_unit=billions", "--column_flops=C", "--flops_unit=PF-days",
        "--column_loss=bits", "--loss_unit=bits", "--column_dataset=data",
    )["coefficients"]  # fmt: skip
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs["value"] == pytest.approx(ours["value"], rel=1e-4)


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emits the best config for 1e17 FLOP of a table with configs, and returns its file."""
    directory = tmp_path_factory.mktemp("swept")
    main(flag_values(swept(directory), "--budget=1e16,1e17", f"--emit={directory / 'best.py'}"))
    return directory / "best.py"


def test_the_best_config_spends_the_budget(emitted: Path) -> None:
    config = load(emitted)
    assert planned_flops(config) == pytest.approx(1e17, rel=1e-3)
    results = json.loads((emitted.parent / "fit/fit.json").read_text())
    optimum = results["optima"][-1]["best"]
    assert total_parameters(config.model) == optimum["parameters"]
    # No other width of the same proportions is predicted to be better.
    losses = {}
    for width in range(64, 2048, 8):
        model = scale_model(config.model, width)
        tokens = 1e17 / training_flops_per_token(model, config.data.sequence_length)
        losses[width] = true_loss(total_parameters(model), tokens)
    best = min(losses.values())
    assert losses[config.model.model_dim] < best * 1.001


def test_the_law_over_budgets_has_no_steps(tmp_path: Path) -> None:
    """The best of the models that exist would change from one width to the next."""
    solution = find(flag_values(swept(tmp_path), "--budget=1e17"))
    drawings = [
        drawing for drawing in solution.drawings if drawing.stem.startswith(("best", "con"))
    ]
    assert len(drawings) == 4
    for drawing in drawings:
        axes = Figure().subplots()
        drawing.paint(axes, THEMES["light"])
        labels = ("the law", "best for its budget")
        (line,) = (line for line in axes.lines if line.get_label() in labels)
        x, y = np.log([line.get_xdata(), line.get_ydata()])
        slope = np.diff(y) / np.diff(x)
        # The slope of a power law is constant, and a floor or attention bends it slowly.
        assert np.abs(np.diff(slope)).max() < 0.05 * np.abs(np.median(slope)), drawing.stem


def load(path: Path) -> RunConfig:
    """Returns the config of a file that was emitted."""
    names: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return RunConfig.from_config_dict(names["get_config"]())


@pytest.mark.parametrize("name", ['a""" + exit() + """', "a\\x", "\\N{x}", "a\\", '"', "{x}"])
def test_names_of_files_stay_text_in_an_emitted_file(name: str) -> None:
    module = ast.parse(config_file(RunConfig(), f"Fitted to {name}" + "\n"))
    assert ast.get_docstring(module) == f"Fitted to {name}"
    assert len(module.body) == 4  # the docstring, two imports and the function


def test_an_emitted_file_is_in_the_manner_of_configs(emitted: Path) -> None:
    text = emitted.read_text()
    _, docstring, code = text.split('"""')
    assert f"python -m launch.train --config={emitted}" in docstring
    assert max(map(len, code.splitlines())) <= 100
    assert "directory" not in code  # where the data lie is no part of a config


def test_both_files_of_a_sweep_are_read_and_unfinished_runs_are_left_out(tmp_path: Path) -> None:
    path = swept(tmp_path)
    results = fit(path)
    assert (results["num_runs"], results["num_rows"]) == (20, 22)
    reasons = [reason for _, reason in results["left_out"]]
    assert reasons == ["it is diverged (not finite)", "it is waiting"]
    from_csv = fit(path.with_suffix(".csv"))
    assert from_csv["coefficients"] == results["coefficients"]


def sparse(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row | {"experts": 8 if number % 2 else 1, "active_parameters": row["parameters"] / 2}
        for number, row in enumerate(rows)
    ]


def test_a_config_that_cannot_be_written_is_told_before_the_fit(tmp_path: Path) -> None:
    (tmp_path / "best.py").mkdir()
    with pytest.raises(ConfigError, match=r"best\.py is a directory: set --emit to a file"):
        read_emit(str(tmp_path / "best.py"), ["1e15"])


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        (grid(), ["--law=none"], "--law=none is no law: set --law to one of chinchilla, "),
        (grid(), ["--budget=lots"], "--budget=lots is no number of FLOPs"),
        (grid(), ["--budget=1e300"], "--budget=1e300 is no number of FLOPs from 1 to 1e+40"),
        (grid(), ["--emit=best.py"], "--emit=best.py needs a budget"),
        (grid(), ["--budget=1e20", "--emit=/nowhere/best.py"], "--emit=/nowhere/best.py is no"),
        (grid(), ["--budget=1e20", "--emit=best.py"], "there is no column config"),
        (grid(), ["--bootstraps=5"], "--bootstraps=5 are too few"),
        (grid(), ["--where=x"], "--where=x names no column and value"),
        (grid(), ["--where=dataset=rw"], "no column 'dataset'"),
        (grid(), ["--column_loss=nll"], "no column 'nll' for loss"),
        (sparse(grid()), [], "runs.csv: --law=chinchilla describes dense models, and rows 2, 4, 6"),
        (
            sparse(grid()),
            ["--law=clark", "--budget=1e20"],
            "--law=clark does not weigh size against tokens",
        ),
        (sparse(grid()), ["--law=joint", "--budget=1e20"], "there is no column config"),
    ],
)
def test_bad_input_is_told_in_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], arguments: list[str], words: str
) -> None:
    path = write_table(tmp_path / "runs.csv", rows)
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        main(flag_values(path, *arguments))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or str(error.value).startswith("--")
    assert not (tmp_path / "fit").exists()


def test_an_output_that_cannot_be_written_is_told_before_the_fit(tmp_path: Path) -> None:
    path = write_table(tmp_path / "runs.csv", grid())
    with pytest.raises(ConfigError, match=r"^--output=.*cannot be written \(.*is no directory\)"):
        fit(path, f"--output={path}")


@pytest.mark.parametrize("arguments", [("--law=none",), ("--where=dataset=rw",)])
def test_a_command_says_so_with_exit_code_2_before_it_loads_much(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    path = write_table(tmp_path / "runs.csv", grid())
    flags = ("--law=chinchilla", f"--runs={path}", *arguments)
    command = [sys.executable, "-X", "importtime", "-m", "launch.fit", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert not {"jax", "scipy.optimize", "matplotlib", "flax"} & imported
    (line,) = (line for line in lines if not line.startswith("import time:"))
    assert done.returncode == 2 and line.startswith("error: ")


@pytest.mark.parametrize("budget", ["1", "1e30"])
def test_a_budget_that_no_model_can_spend_is_told_before_the_fit(
    tmp_path: Path, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = swept(tmp_path)
    monkeypatch.setattr("launch.fit.__main__.solve_with_bar", pytest.fail)
    number = re.escape(f"{float(budget):g}")
    with pytest.raises(
        ConfigError,
        match=rf"^--budget={number} is no budget for all \d+ models \([^:]*\): "
        r"set --budget between 1e\+\d+ and 1e\+\d+$",
    ):
        find(flag_values(path, f"--budget={budget}"))


def test_a_budget_that_only_other_models_can_spend_is_told() -> None:
    """The models' limits differ, so the best one may be beyond its own."""
    run = RunConfig.from_config_dict(dense_tiny.get_config())
    with pytest.raises(ConfigError, match=r"^--budget=1 is no budget for the best model \(.*: set"):
        spend(list_candidates([run])[:1], 1.0)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.csv does not exist"):
        fit(tmp_path / "none.csv")


def test_a_law_of_experts_chooses_experts(tmp_path: Path) -> None:
    path = write_table(tmp_path / "runs.csv", mixed())
    solution = find(flag_values(path, "--law=joint", "--budget=1e17"))
    (optimum,), config = solution.results.optima, solution.config
    assert optimum.best["experts"] == 16 and optimum.best["sparsity"] == 15 / 16
    assert optimum.best["parameters"] > 4 * optimum.best["active_parameters"]
    assert config.model.moe.num_experts == 16
    assert planned_flops(config) == pytest.approx(1e17, rel=1e-3)


@pytest.mark.slow
def test_an_emitted_sparse_config_trains(tmp_path: Path, data_directory: str) -> None:
    path = write_table(tmp_path / "runs.csv", mixed())
    emitted, workdir = tmp_path / "best.py", tmp_path / "run"
    main(flag_values(path, "--law=joint", "--budget=1e15", f"--emit={emitted}"))
    few_steps = {
        "train.steps": 3,
        "train.batch_size": 4,
        "train.log_every": 1,
        "train.eval_batches": 1,
        "optimizer.learning_rate": 0.001,  # there is no time for a warm-up
        "data.directory": data_directory,
    }
    words = [f"--config.{name}={value}" for name, value in few_steps.items()]
    command = [sys.executable, "-m", "launch.train", f"--config={emitted}", f"--workdir={workdir}"]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(workdir)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert any(name.startswith("router/") for name in lines[0])


def test_parabolas_find_the_exponent_and_the_nearest_config(tmp_path: Path) -> None:
    path = write_table(tmp_path / "runs.csv", grid(noise=0))
    results = fit(path, "--law=isoflop", "--budget=1e21")
    found = {line["name"]: line for line in results["coefficients"]}
    exact = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
    assert found["N_exponent"]["value"] == pytest.approx(exact, abs=0.02)
    (optimum,) = results["optima"]
    assert "loss" not in optimum["best"]
    size, tokens = optimum["best"]["parameters"], optimum["best"]["tokens"]
    assert 6 * size * tokens == pytest.approx(1e21, rel=1e-2)
    path = swept(tmp_path)
    (optimum,) = fit(path, "--law=isoflop", "--budget=1e17")["optima"]
    wanted = fit(path, "--law=isoflop")["coefficients"]
    size = wanted[0]["value"] * 1e17 ** wanted[1]["value"]
    assert optimum["best"]["parameters"] == pytest.approx(size, rel=0.06)
    solution = find(flag_values(path, "--law=isoflop", "--budget=1e17"))
    assert solution.config is not None
    # It says no loss, neither as a number nor in the file that --emit writes.
    assert "loss" not in optimum["intervals"]
    text = docstring(tmp_path / "best.py", solution.results)
    assert "\nparameters  " in text and "\ntokens " in text and "\nloss" not in text


def test_curves_are_over_the_sizes_that_the_law_counts() -> None:
    rows = grid(noise=0)
    runs = make_runs(**{name: [row[name] for row in rows] for name in rows[0]})
    (curve, *_) = fit_curves(runs, 0.9 * runs.parameters)  # kaplan counts no embeddings
    np.testing.assert_allclose(curve.parameters, 0.9 * runs.parameters[:7])
    assert curve.best_parameters < runs.parameters[6]


def test_a_refused_fit_of_curves_draws_them_and_nothing_else(tmp_path: Path) -> None:
    rising = [row for number, row in enumerate(grid(noise=0)) if number % 7 > 3]
    path = write_table(tmp_path / "runs.csv", rising)
    with pytest.raises(ConfigError, match=r"0 of 5 budgets have a minimum.*\. The curves") as error:
        fit(path, "--law=isoflop")
    assert str(error.value).startswith(f"{path}: ")
    drawn = Path(str(error.value).rsplit("drawn in ", 1)[1])
    assert drawn.exists() and {file.name for file in drawn.parent.iterdir()} == {
        "refused-light.png",
        "refused-dark.png",
        "refused.pdf",
        "figures.json",
    }


@pytest.mark.slow
def test_a_refused_fit_changes_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    path = write_table(tmp_path / "runs.csv", grid(noise=0))
    main(flag_values(path, "--law=isoflop"))
    read = lambda: {file.name: file.read_bytes() for file in (tmp_path / "fit").iterdir()}
    first = read()
    write_table(path, [row for number, row in enumerate(grid(noise=0)) if number % 7 > 3])
    with pytest.raises(ConfigError, match="The curves are drawn in"):
        main(flag_values(path, "--law=isoflop"))
    second = read()
    changed = {name for name in first | second if first.get(name) != second.get(name)}
    drawn = {"refused-light.png", "refused-dark.png", "refused.pdf"}
    assert changed == {"figures.json", *drawn}
    write_table(path, grid(noise=0))
    main(flag_values(path, "--law=isoflop"))
    assert read() == first


@pytest.mark.parametrize("law", ["isoflop", "steplaw"])
def test_a_refused_fit_leaves_no_empty_directory(tmp_path: Path, law: str) -> None:
    rows = [row | {"learning_rate": 0.01} for row in grid()[:7]]  # one budget, and one rate
    path = write_table(tmp_path / "runs.csv", rows)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        fit(path, f"--law={law}", f"--output={tmp_path / 'fits/mine'}")
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "fits").mkdir()
    with pytest.raises(ConfigError):
        fit(path, f"--law={law}", f"--output={tmp_path / 'fits/mine'}")
    assert list((tmp_path / "fits").iterdir()) == []  # which was there before


def test_three_sizes_in_each_budget_have_no_interval_and_are_drawn(tmp_path: Path) -> None:
    rows = [row for number, row in enumerate(grid(noise=0)) if number % 7 in (2, 3, 4)]
    path = write_table(tmp_path / "runs.csv", rows)
    solution = find(flag_values(path, "--law=isoflop", "--budget=1e21"))
    (optimum,) = json.loads(as_json(solution.results))["optima"]
    assert optimum["best"]["parameters"] > 0
    assert optimum["intervals"]["parameters"] == [None, None]
    assert "unknown" in as_text(solution.results)
    for drawing in solution.drawings[:2]:
        write_drawing(drawing, tmp_path)
    found = fit_isoflop(make_runs(**{name: [row[name] for row in rows] for name in rows[0]}))
    optimum, candidate = isoflop_model(found, list_candidates([RunConfig()]), 1e15)
    assert candidate is not None and np.isnan(optimum.intervals["tokens"]).all()


def test_the_hash_is_that_of_the_table_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that still runs writes the table again while it is fitted."""
    path = write_table(tmp_path / "runs.csv", grid())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr("launch.fit.__main__.make_directory", lambda *_: path.unlink())
    assert find(flag_values(path, "--law=isoflop")).results.table_sha256 == digest


def test_the_step_law_is_fitted_and_drawn(tmp_path: Path) -> None:
    rows = []
    for size in (1e6, 4e6, 16e6, 64e6):
        for tokens in (1e8, 4e8, 16e8):
            best = 1.79 * size**-0.713 * tokens**0.307
            for step in range(-3, 4):
                loss = true_loss(size, tokens) * (1 + 1e-3 * step**2)
                row = {"parameters": size, "tokens": tokens, "loss": loss}
                rows.append(row | {"learning_rate": best * 1.3**step})
    path = write_table(tmp_path / "runs.csv", rows)
    solution = find(flag_values(path, "--law=steplaw"))
    found = {line.name: line.value for line in solution.results.coefficients}
    assert found["learning_rate_N_exponent"] == pytest.approx(-0.713, rel=1e-3)
    assert found["learning_rate_D_exponent"] == pytest.approx(0.307, rel=1e-3)
    assert [drawing.stem for drawing in solution.drawings] == [
        "learning_rates",
        "best_learning_rates",
    ]
    for drawing in solution.drawings:
        write_drawing(drawing, tmp_path)
    with pytest.raises(ConfigError, match="does not weigh size against tokens"):
        fit(path, "--law=steplaw", "--budget=1e20")


@pytest.mark.slow
def test_an_emitted_config_trains(emitted: Path, tmp_path: Path, data_directory: str) -> None:
    command = [
        sys.executable, "-m", "launch.train", f"--config={emitted}",
        f"--workdir={tmp_path / 'run'}", f"--config.data.directory={data_directory}",
        "--config.train.steps=3", "--config.train.batch_size=2", "--config.train.eval_batches=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "validation/loss" in done.stdout


def commands_of_the_page() -> list[list[str]]:
    """Returns the arguments of the commands of docs/scaling_laws.md whose tables are here."""
    page = (ROOT / "docs/scaling_laws.md").read_text().replace("\\\n", " ")
    found = [shlex.split(line) for line in re.findall(r"^python -m launch\.fit (.*)$", page, re.M)]
    return [words for words in found if (ROOT / words[0].removeprefix("--runs=")).exists()]


def test_the_page_has_worked_examples() -> None:
    assert len(commands_of_the_page()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("words", commands_of_the_page(), ids=lambda words: words[-1])
def test_the_commands_of_the_page_print_what_it_shows(words: list[str], tmp_path: Path) -> None:
    """Coefficients are compared to three digits, since the last one depends on NumPy's sums.

    Those that the runs do not even determine to a factor of 100 depend on them more than that.
    """
    command = [sys.executable, "-m", "launch.fit", *words, f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs/scaling_laws.md").read_text()
    for line in json.loads((tmp_path / "fit.json").read_text())["coefficients"]:
        if line["low"] * line["high"] <= 0 or abs(line["high"]) > 100 * abs(line["low"]):
            continue
        shown = re.findall(rf"^{line['name']} +(-?[\d.e+-]+) ", page, re.M)
        assert any(float(value) == pytest.approx(line["value"], rel=2e-3) for value in shown)
