"""The routing command on a small run, against the choices and loads that the model itself returns.

tests/inference/test_routing_analysis.py has the statistics on hand-worked arrays.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from launch.plotting import THEMES, line_shades
from launch.report import report
from launch.routing import earlier_checkpoints, routing, tables
from launch.routing_figures import drawings, read_results
from moe.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.data.loader import evaluation_batches
from moe.data.prepare import prepare
from moe.model.transformer import Transformer
from moe.parallel.mesh import global_batch
from moe.training import trainer
from moe.workdir import checkpoint
from tests.launch.report_runs import colours
from tests.tiny import TINY_MODEL

ROOT = Path(__file__).parents[2]
MODEL = dataclasses.replace(TINY_MODEL, num_layers=4)


def test_sparse_layers_keep_their_numbers_among_dense_ones():
    sparse = MoEConfig(num_experts=4, first_dense_layers=1, layer_period=2)
    assert ModelConfig(num_layers=6, moe=sparse).sparse_layers == [2, 4]


@pytest.fixture(scope="module")
def config(data_directory):
    return RunConfig(
        model=dataclasses.replace(
            MODEL, moe=MoEConfig(num_experts=4, expert_dim=12, layer_period=2, dispatch="dense")
        ),
        data=DataConfig(sequence_length=64, directory=data_directory),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_fraction=1 / 6),
        train=TrainConfig(
            steps=6, batch_size=8, eval_every=6, eval_batches=1, checkpoint_every=2, keep_last=3
        ),
        tracking=TrackingConfig(tensorboard=False),
    )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    trainer.fit(config, workdir, jax.devices()[:1])
    return workdir


@pytest.fixture(scope="module")
def page(workdir):
    return routing(workdir, batches=2)


@pytest.fixture(scope="module")
def results(page):
    return json.loads((page.parent / "routing.json").read_text())


@pytest.fixture(scope="module")
def choices(workdir):
    """What the model itself says of the first two validation batches, by checkpoint's step.

    The ids [N], the experts [2, N, A] as it captured them, and its load [2, E].
    """
    config, program, _, _ = trainer.load_run(workdir)
    model, by_step = Transformer(config.model, capture=("experts",)), {}
    apply, rows = jax.jit(model.apply), prepare(config.data, "validation")
    with checkpoint.read_checkpoints(workdir) as checkpoints, jax.set_mesh(program.mesh):
        for step in (2, 4, 6):
            variables, ids, experts, loads = (
                checkpoint.restore_variables(checkpoints, program.abstract_state, step),
                [],
                [],
                [],
            )
            for batch in evaluation_batches(
                rows, batch_size=8, num_batches=2, host_rows=np.arange(8)
            ):
                output = apply(variables, global_batch(batch, program.mesh, 8, program.task.dims))
                assert output.captured[0][0] == {}  # of the dense layers
                ids.append(batch["tokens"].ravel())
                experts.append(np.asarray(output.captured[0][1]["experts"]).reshape(2, -1, 2))
                loads.append(np.asarray(output.stats[0][1].load))
            by_step[step] = np.concatenate(ids), np.concatenate(experts, axis=1), sum(loads)
    return by_step


def test_the_load_is_the_same_as_the_models_own(choices, results):
    _, _, load = choices[6]
    np.testing.assert_allclose(results["load"], load / load.sum(axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(
        results["vocabulary"]["by_load"], load.max(axis=1) / (2 * 8 * 64), atol=1e-5
    )
    assert (results["step"], results["tokens"], results["layers"]) == (6, 2 * 8 * 64, [1, 3])


def test_statistics_agree_with_counting_tokens_one_by_one(choices, results):
    ids, experts, _ = choices[6]
    for layer, experts_NA in enumerate(experts):
        sets = [set(row) for row in experts_NA.tolist()]
        with_0 = [row for row in sets if 0 in row]
        assert results["coactivation"][layer][0][1] == pytest.approx(
            np.mean([1 in row for row in with_0]), abs=1e-5
        )
        spaces = [row for row, token in zip(sets, ids, strict=True) if token in b" \t"]
        assert results["classes"]["spaces, tabs"]["tokens"] == len(spaces)
        share = sum(3 in row for row in spaces) / (2 * len(spaces))
        assert results["classes"]["spaces, tabs"]["share"][layer][3] == pytest.approx(
            share, abs=1e-5
        )
        of_e = [row for row, token in zip(sets, ids, strict=True) if token == ord("e")]
        most = max(np.mean([expert in row for row in of_e]) for expert in range(4))
        index = results["vocabulary"]["ids"].index(ord("e"))
        assert results["vocabulary"]["share"][layer][index] == pytest.approx(most, abs=1e-5)


def test_saturation_is_measured_at_each_earlier_checkpoint(choices, results):
    assert list(results["saturation"]) == ["2", "4"]
    for step in (2, 4):
        pairs = zip(choices[step][1].tolist(), choices[6][1].tolist(), strict=True)
        common = [
            [len({*before} & {*latest}) for before, latest in zip(*layers, strict=True)]
            for layers in pairs
        ]
        np.testing.assert_allclose(
            results["saturation"][str(step)], np.mean(common, axis=1) / 2, atol=1e-5
        )
    assert np.mean(results["saturation"]["4"]) > np.mean(results["saturation"]["2"])


STEMS = [
    "load",
    "classes_1",
    "classes_3",
    "coactivation_1",
    "coactivation_3",
    "vocabulary",
    "saturation",
]


def test_the_page_has_tables_and_plots(page, results):
    text = page.read_text()
    assert "1,024 tokens of the split 'validation'; 2 of 4 experts per token" in text
    assert "\n| layer | largest load / even |" in text
    mean = np.mean(results["saturation"]["4"])
    assert f"\n| 4 | {mean:.1%} | " in text
    assert re.findall('<img src="([^"]*)"', text) == [f"{stem}-light.png" for stem in STEMS]
    assert re.findall('srcset="([^"]*)"', text) == [f"{stem}-dark.png" for stem in STEMS]
    for stem in STEMS:
        for theme, other in (("light", "dark"), ("dark", "light")):
            seen = colours(page.parent / f"{stem}-{theme}.png")
            assert (
                THEMES[theme]["card"] in seen
                and THEMES[other]["card"] not in seen
                and len(seen) > 10
            )


@pytest.mark.slow
def test_the_report_of_the_run_shows_the_same_figures(page, workdir):
    text = report(workdir).read_text()
    for stem in STEMS:
        assert f'<img src="{stem}-light.png"' in text
        assert (workdir / "report" / f"{stem}-dark.png").read_bytes() == (
            page.parent / f"{stem}-dark.png"
        ).read_bytes()
    assert "At step 6, over 1,024 held-out tokens." in text


def test_a_report_says_how_to_make_missing_figures_and_refuses_damaged_ones(workdir, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    assert (
        f"python -m launch.routing --workdir={tmp_path} &amp;&amp; python -m launch.report"
        in report(tmp_path).read_text()
    )
    (tmp_path / "routing").mkdir()
    path = tmp_path / "routing" / "routing.json"
    for content in (
        "",
        "[]",
        "{}",
        '{"layers": 3}',
        '{"layers": [0], "num_experts": "x", "load": []}',
    ):
        path.write_text(content)
        problem = f"{path} is not what launch.routing writes"
        with pytest.raises(
            ConfigError, match=f"{problem}: run launch.routing again, or delete {path}$"
        ):
            report(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "load",
        "coactivation",
        "classes",
        "vocabulary",
        "saturation",
        "step",
        "layers",
        "num_experts",
    ],
)
def test_damaged_results_are_refused(results, tmp_path, name):
    path = tmp_path / "routing.json"
    path.write_text(json.dumps(results))
    assert read_results(path) == results
    for value in (None, "x", [[1]], {"a": [2]}, 2.5):
        path.write_text(json.dumps(results | {name: value}))
        with pytest.raises(ConfigError, match=r"is not what launch\.routing writes"):
            read_results(path)


def test_figures_without_data_are_left_out(page, results, tmp_path):
    alone = results | {"saturation": {}, "coactivation": np.tile(np.eye(4), (2, 1, 1)).tolist()}
    assert "has kept no earlier checkpoint" in tables(alone)
    assert [drawing.stem for drawing in drawings(alone)] == [
        "load",
        "classes_1",
        "classes_3",
        "vocabulary",
    ]


def test_four_of_many_layers_are_drawn_in_shades_of_one_colour(results):
    layers = list(range(1, 128, 2))
    many = results | {
        "layers": layers,
        "coactivation": results["coactivation"] * 32,
        "load": results["load"] * 32,
    }
    many |= {
        "saturation": {"2": [0.5] * 64},
        "classes": {"digits": {"share": results["load"] * 32}},
    }
    stems = [drawing.stem for drawing in drawings(many)]
    assert [stem for stem in stems if stem.startswith("classes")] == [
        "classes_1",
        "classes_43",
        "classes_85",
        "classes_127",
    ]
    shades = np.array(line_shades(THEMES["light"], 4))[:, :3]
    assert np.all(np.diff(shades.sum(axis=1)) < 0)  # the later the stronger
    assert to_hex(shades[-1]) == THEMES["light"]["first"]


@pytest.mark.parametrize("stem", ["vocabulary", "saturation"])
def test_no_legend_lies_over_a_line_and_every_axis_has_a_title(results, stem):
    (drawing,) = [drawing for drawing in drawings(results) if drawing.stem == stem]
    figure = Figure(figsize=(5, 660 / 224), dpi=224, layout="constrained")
    axes = figure.subplots()
    drawing.paint(axes, THEMES["light"])
    figure.canvas.draw()
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1
    assert legend.get_window_extent().x1 <= figure.bbox.x1
    assert axes.get_xlabel() and axes.get_ylabel()


def test_one_earlier_checkpoint_can_be_asked_for():
    assert earlier_checkpoints([2, 4, 6], None, None) == [2, 4]
    assert earlier_checkpoints([2, 4, 6], 4, None) == [2]
    assert earlier_checkpoints([2, 4, 6], 6, 4) == [4]
    assert earlier_checkpoints([], None, None) == []
    problem = "--compare_step=6 is no checkpoint before the one of --step"
    with pytest.raises(ConfigError, match=rf"{problem}: choose one of those \(2, 4\)"):
        earlier_checkpoints([2, 4, 6], None, 6)
    with pytest.raises(ConfigError, match=r"choose one of those \(there is none\)"):
        earlier_checkpoints([], None, 6)


def test_bad_input_is_named(workdir, tmp_path):
    with pytest.raises(
        ConfigError, match=r"no checkpoint of step 3: choose one of its steps \(2, 4, 6\)"
    ):
        routing(workdir, step=3)
    with pytest.raises(ConfigError, match="--batches=-1"):
        routing(workdir, batches=-1)
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        routing(tmp_path)
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(ConfigError, match="checkpoints does not exist"):
        routing(tmp_path)


def test_a_dense_run_gets_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RunConfig(model=MODEL).to_dict()))
    command = [sys.executable, "-m", "launch.routing", f"--workdir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: --workdir={tmp_path} is a dense run (model.moe.num_experts=0): "
        "set --workdir to a run that has experts\n"
    )
