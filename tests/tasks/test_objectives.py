"""Masked tokens, span corruption and fill in the middle, as whole runs and as steps on meshes."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import numpy as np
import pytest

from launch.benchmark import benchmark
from launch.evaluate import evaluate
from launch.generate import generate
from launch.report import report
from launch.report_card import write_card
from launch.routing import routing
from moe.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.data.loader import make_loader
from moe.data.mixtures import open_training
from moe.parallel.mesh import global_batch
from moe.tasks import make_task
from moe.tasks.fill_in_the_middle import middle_prompt
from moe.training import trainer
from moe.training.train_step import make_program
from moe.training.trainer import fit
from moe.workdir.tracking import read_metrics
from tests.tiny import OTHER_TASKS as TASKS

MOE = MoEConfig(
    num_experts=4,
    expert_dim=12,
    first_dense_layers=1,
    balance_scope="row",
    z_weight=0.01,
    bias_update_rate=0.01,
    dispatch="capacity",
    capacity_factor=2.0,  # as many rows as there are tokens: nothing is dropped
)
# An encoder's experts may choose their tokens. Then their rows are those of one sequence, whatever
# the layout is.
CHOICE = MoEConfig(
    num_experts=4, expert_dim=12, router="expert_choice", dispatch="capacity", balance_scope="row"
)
MODEL = ModelConfig(
    vocab_size=360,
    num_layers=2,
    model_dim=16,
    feed_forward_dim=24,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    compute_dtype="float32",
    moe=MOE,
)


def make_config(task: str, directory: str, **model) -> RunConfig:
    return RunConfig(
        task=task,
        model=dataclasses.replace(MODEL, **model),
        data=DataConfig(sequence_length=64, directory=directory, middle_rate=0.9),
        optimizer=OptimizerConfig(learning_rate=0.01),
        train=TrainConfig(
            steps=6,
            batch_size=8,
            loss_chunk=16,
            log_every=1,
            eval_every=3,
            eval_batches=2,
            checkpoint_every=3,
        ),
        tracking=TrackingConfig(tensorboard=False),
    )


def first_batch(config: RunConfig) -> dict[str, np.ndarray]:
    """Returns the first batch of a run's real text."""
    task = make_task(config)
    loader = make_loader(
        open_training(config, task.rows),
        batch_size=config.train.batch_size,
        examples=0,
        host_rows=slice(None),
        transform=task.transform(config),
    )
    batch = next(loader)
    loader.close()
    return batch


def step_of(config: RunConfig, devices: int):
    """Returns the metrics of a step on real text, and the parameters after it."""
    program = make_program(config, jax.devices()[:devices])
    size = config.train.batch_size
    batch = global_batch(first_batch(config), program.mesh, size, program.task.dims)
    with jax.set_mesh(program.mesh):
        state, metrics = program.train_step(program.init_state(), batch)
    return jax.tree.map(np.asarray, metrics), jax.tree.map(np.asarray, state.params)


@functools.cache
def reference(task: str, directory: str):
    return step_of(make_config(task, directory), 1)


# Each value stands beside each other one in some layout.
LAYOUTS = [
    (MeshConfig(data=2, fsdp=2, tensor=2), True, 1, "full"),
    (MeshConfig(data=2, expert=4), False, 1, "none"),
    (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), False, 2, "full"),
    (MeshConfig(data=1), True, 2, "none"),
]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_does_not_depend_on_its_layout(task, layout, data_directory):
    mesh, scanned, microbatches, remat = layout
    config = make_config(task, data_directory, scan_layers=scanned, remat=remat)
    config = dataclasses.replace(
        config, mesh=mesh, train=dataclasses.replace(config.train, accumulation=microbatches)
    )
    metrics, params = step_of(config, math.prod(mesh.sizes))
    expected_metrics, expected_params = reference(task, data_directory)
    for one, other in zip(jax.tree.leaves(metrics), jax.tree.leaves(expected_metrics), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    # The first step of AdamW moves each parameter by the learning rate, whatever its gradient is.
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        assert np.mean(np.abs(one - other) > 1e-4) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task != "span_corruption"])
def test_a_loss_needs_no_other_part_of_a_row(task, data_directory):
    """Microbatches of a dense model see the device's own part of a row, where context splits it.

    A loss that shifts positions would take the last target of a part from the part's own start.
    """
    config = make_config(task, data_directory, moe=MoEConfig())
    train = dataclasses.replace(config.train, accumulation=2)
    split = dataclasses.replace(config, mesh=MeshConfig(data=2, context=2), train=train)
    (metrics, _), (expected, _) = step_of(split, 4), step_of(config, 1)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_step_in_bfloat16_has_nearly_the_same_loss(task, data_directory):
    metrics, _ = step_of(make_config(task, data_directory, compute_dtype="bfloat16"), 1)
    expected, _ = reference(task, data_directory)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=0.03)


def stop_after(step: int):
    """Returns a stand-in for the trainer's signals, after which a run stops at a step."""
    asked = itertools.count(1)

    class Signals:
        def __enter__(self):
            return lambda: next(asked) >= step

        def __exit__(self, *_):
            return None

    return Signals


RUNS = {
    "masked_tokens": {"moe": CHOICE, "compute_dtype": "bfloat16", "tied_embeddings": True},
    "fill_in_the_middle": {"moe": MoEConfig(), "scan_layers": False},
}


@pytest.fixture(scope="module", params=TASKS)
def runs(request, tmp_path_factory, data_directory):
    """Returns the config of a task, a run that was never stopped, and one that was resumed."""
    config = make_config(request.param, data_directory, **RUNS.get(request.param, {}))
    whole, resumed = (tmp_path_factory.mktemp(request.param) for _ in range(2))
    fit(config, whole, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "catch_signals", stop_after(4))
        with pytest.raises(trainer.Interrupted):
            fit(config, resumed, jax.devices()[:1])
    fit(config, resumed, jax.devices()[:1])
    return config, whole, resumed


def losses_of(workdir) -> list[dict]:
    names = ("step", "train/loss", "train/middle_loss", "train/gradient_norm", "validation/loss")
    return [{name: line[name] for name in names if name in line} for line in read_metrics(workdir)]


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_never_stopped(runs):
    _, whole, resumed = runs
    assert losses_of(whole) == losses_of(resumed)
    assert [line["step"] for line in losses_of(whole) if "train/loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_evaluate_report_and_benchmark_know_the_task(runs, tmp_path):
    config, workdir, _ = runs
    last = [line for line in read_metrics(workdir) if "validation/loss" in line][-1]
    # Another part of the split than the two batches of training.
    measured = evaluate(workdir, split="validation[:10%]")
    assert measured["loss"] == pytest.approx(last["validation/loss"], rel=0.1)
    assert ("middle_loss" in measured) == (config.task == "fill_in_the_middle")
    assert "bits_per_byte" not in measured
    assert report(workdir).exists()
    card = write_card(workdir, read_metrics(workdir), []).read_text()
    assert ("decoder-only" in card) == (config.task == "fill_in_the_middle")
    timed = benchmark(config, trials=1)
    assert timed["tokens_per_second"] > 0 and timed["ratio_to_matmul"] > 0


@pytest.mark.slow
def test_a_run_fills_in_a_middle(runs):
    config, workdir, _ = runs
    if config.task != "fill_in_the_middle":
        with pytest.raises(ConfigError, match="does not continue text"):
            generate(workdir, ["def "])
        return
    options = {"max_new_tokens": 6, "temperature": 0.0}
    (middle,) = generate(workdir, ["def area(w, h):"], suffix="    return w", **options)
    (other,) = generate(workdir, ["def area(w, h):"], suffix="#" * 20, **options)
    (continued,) = generate(workdir, ["def area(w, h):"], **options)
    assert all(len(text.encode()) <= 6 * 3 for text in (middle, other, continued))


def test_a_prompt_is_a_document_whose_middle_is_missing():
    config = make_config("fill_in_the_middle", "unused")
    tokens = middle_prompt(config, "ab", "c").tolist()
    assert tokens == [255, 256, *b"ab", 257, *b"c", 258]


@pytest.mark.parametrize("task", [*TASKS, "language_modelling"])
def test_what_generate_cannot_do_for_a_task_is_told_at_once(task, tmp_path):
    config = make_config(task, "unused")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    if task in ("masked_tokens", "span_corruption"):
        with pytest.raises(ConfigError, match=f"^workdir=.* has task='{task}', whose model does"):
            generate(tmp_path, ["def "])
        with pytest.raises(ConfigError, match="does not continue text: give the run of a decoder"):
            routing(tmp_path)
    elif task == "language_modelling":
        with pytest.raises(ConfigError, match=r"^suffix='x' needs a run of task 'fill_in_the_"):
            generate(tmp_path, ["def "], suffix="x")


@pytest.mark.parametrize("task", TASKS)
def test_random_rows_are_batches_of_the_task(task):
    config = make_config(task, "unused")
    made = make_task(config)
    rows = made.random_rows(config, 3)
    assert rows.keys() == made.dims.keys()
    assert all(len(array) == 3 for array in rows.values())
    lengths = {name: array.shape[1] for name, array in rows.items()}
    assert lengths["targets"] == config.row_lengths[-1]
    if task == "span_corruption":
        assert lengths["encoder_tokens"] == 64 and lengths["targets"] < 32


@pytest.mark.parametrize("task", TASKS)
def test_real_rows_are_batches_of_the_task_and_fit_its_vocabulary(task, data_directory):
    config = make_config(task, data_directory)
    batch = first_batch(config)
    made = make_task(config)
    random = made.random_rows(config, 8)
    assert batch.keys() == random.keys()
    for name, array in batch.items():
        assert (array.shape, array.dtype) == (random[name].shape, random[name].dtype)
    assert max(batch["targets"].max(), batch["tokens"].max()) < 360
    assert made.counts(batch)["targets"] > 0


@pytest.mark.parametrize(
    ("task", "vocab_size"),
    [("masked_tokens", 257), ("span_corruption", 356), ("fill_in_the_middle", 259)],
)
def test_a_vocabulary_without_the_tasks_tokens_is_refused(task, vocab_size):
    model = dataclasses.replace(MODEL, vocab_size=vocab_size)
    assert RunConfig(task=task, model=model).model.vocab_size == vocab_size
    assert len(make_task(RunConfig(task=task, model=model)).special_tokens) == vocab_size - 256
    with pytest.raises(
        ConfigError,
        match=rf"^model.vocab_size={vocab_size - 1} is smaller .* and the {vocab_size - 256} of "
        rf"task='{task}': set model.vocab_size to at least {vocab_size}$",
    ):
        RunConfig(task=task, model=dataclasses.replace(model, vocab_size=vocab_size - 1))


def test_configs_that_an_objective_cannot_train_are_refused():
    config = make_config("span_corruption", "unused")
    long = dataclasses.replace(config.data, sequence_length=2048)
    with pytest.raises(ConfigError, match=r"sequence_length=2048 needs 114 sentinels .* most 1809"):
        dataclasses.replace(config, data=long)
    with pytest.raises(ConfigError, match=r"^mesh.context=2 splits .*: set mesh.context to 1$"):
        dataclasses.replace(config, mesh=MeshConfig(context=2))
    with pytest.raises(ConfigError, match=r"^mesh.pipeline=2 cuts .*: set mesh.pipeline to 1$"):
        dataclasses.replace(config, mesh=MeshConfig(pipeline=2))
    choice = dataclasses.replace(MODEL, moe=CHOICE)
    assert make_config("masked_tokens", "unused", moe=CHOICE).model == choice
    for task in ("span_corruption", "fill_in_the_middle"):
        with pytest.raises(ConfigError, match="'expert_choice' looks at later tokens"):
            make_config(task, "unused", moe=CHOICE)
    for rate in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"^middle_rate="):
            DataConfig(middle_rate=rate)
    # A row of the decoder is shorter than the encoder's, and must have room for a token, too.
    narrow = dataclasses.replace(MOE, num_experts=64, capacity_factor=0.7)
    assert make_config("masked_tokens", "unused", moe=narrow).model.moe == narrow
    with pytest.raises(ConfigError, match="room for less than one token of a row"):
        make_config("span_corruption", "unused", moe=narrow)
