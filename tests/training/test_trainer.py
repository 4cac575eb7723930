"""Runs from beginning to end: resuming bit for bit, refusing another config, stopping when nothing
is finite.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import types

import jax
import numpy as np
import pytest

from launch.benchmark import benchmark
from launch.evaluate import evaluate
from launch.generate import generate
from launch.upcycle import upcycle
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
from moe.data import prepare
from moe.data.rows import JoinedRows
from moe.files import try_lock
from moe.interop.compatible import SHARED_FIELDS
from moe.parallel.hub import HostTimes
from moe.scaling import hardware
from moe.training import evaluation, log, signals, start, train_step, trainer
from moe.training.optimizer import make_schedule
from moe.training.signals import SIGNALS
from moe.workdir import checkpoint
from moe.workdir.identity import read_config
from moe.workdir.source import SHARED_MOE_FIELDS
from moe.workdir.tracking import check_workdir, read_metrics, read_router
from tests.tiny import TINY_MODEL

MODEL = dataclasses.replace(TINY_MODEL, num_layers=2)

DETERMINISTIC = (
    "step",
    "train/loss",
    "train/gradient_norm",
    "train/learning_rate",
    "train/skipped_steps",
    "validation/loss",
)


@functools.cache
def make_program(config, devices=None):
    """Runs of one config share what they trace and compile."""
    return train_step.make_program(config, None if devices is None else list(devices))


@pytest.fixture(scope="module", autouse=True)
def one_program_for_a_config():
    def make(config, devices=None, *, task=None, refused=()):
        assert task is None and not refused
        return make_program(config, devices and tuple(devices))

    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer, start):
            patch.setattr(module, "make_program", make)
        yield


@pytest.fixture(scope="session")
def config(data_directory):
    return RunConfig(
        model=MODEL,
        data=DataConfig(sequence_length=64, directory=data_directory),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_fraction=0.25),
        train=TrainConfig(
            steps=8, batch_size=8, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=3
        ),
        tracking=TrackingConfig(tensorboard=False),
    )


@pytest.fixture(scope="session")
def uninterrupted(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    trainer.fit(config, workdir)
    return workdir


def lines(workdir):
    return [
        {name: line[name] for name in DETERMINISTIC if name in line}
        for line in read_metrics(workdir)
    ]


def saved_state(config, workdir, step=None, mesh=None):
    program = make_program(dataclasses.replace(config, mesh=mesh or config.mesh))
    with checkpoint.open_checkpoints(workdir, config) as checkpoints:
        return checkpoint.restore(checkpoints, program.abstract_state, step)


def assert_same_run(config, workdir, expected):
    assert lines(workdir) == lines(expected)
    states = [
        jax.tree.map(np.asarray, saved_state(config, directory))
        for directory in (workdir, expected)
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)


def stop_at(monkeypatch, step):
    """As if a signal came while the `step`-th step of this call was running."""
    begun, add = [], log.Log.add
    monkeypatch.setattr(log.Log, "add", lambda *args: begun.append(None) or add(*args))

    @contextlib.contextmanager
    def catch():
        yield lambda: len(begun) >= step

    monkeypatch.setattr(trainer, "catch_signals", catch)


def test_a_run_logs_evaluates_and_learns(config, uninterrupted):
    written = lines(uninterrupted)
    assert [line["step"] for line in written if "train/loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in written if "validation/loss" in line] == [4, 8]
    assert written[-1]["validation/loss"] < written[0]["train/loss"] - 0.1
    assert read_config(uninterrupted) == config
    state = saved_state(config, uninterrupted)
    assert (int(state.step), int(state.examples)) == (8, 64)


@pytest.mark.parametrize("steps", [(1,), (3,), (4,), (2, 3), (7,)])
def test_resumed_equals_uninterrupted_bit_for_bit(
    config, uninterrupted, tmp_path, monkeypatch, steps
):
    for step in steps:
        stop_at(monkeypatch, step)
        with pytest.raises(trainer.Interrupted, match="run the same command again"):
            trainer.fit(config, tmp_path)
    monkeypatch.undo()
    trainer.fit(config, tmp_path)
    assert_same_run(config, tmp_path, uninterrupted)


def test_what_was_logged_after_the_last_checkpoint_is_written_again(
    config, uninterrupted, tmp_path, monkeypatch
):
    """As after kill -9: metrics of steps 4 and 5, half a line, and half a checkpoint, but the last
    whole checkpoint is of step 3.
    """
    stop_at(monkeypatch, 3)
    with pytest.raises(trainer.Interrupted):
        trainer.fit(config, tmp_path)
    monkeypatch.undo()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 4, "train/loss": 9.0}\n{"step": 5, "train/loss": 9.0}\n{"step": 6, "tra'
        )
    (tmp_path / "checkpoints" / "6" / "state.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    trainer.fit(config, tmp_path)
    assert_same_run(config, tmp_path, uninterrupted)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]


def test_a_finished_run_is_left_as_it_is(config, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_text()
    metrics = trainer.fit(config, uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_text() == before
    assert metrics["validation/loss"] == lines(uninterrupted)[-1]["validation/loss"]


@pytest.mark.slow
def test_another_mesh_restores_the_same_state_and_agrees(
    config, uninterrupted, tmp_path, monkeypatch
):
    stop_at(monkeypatch, 4)
    with pytest.raises(trainer.Interrupted):
        trainer.fit(config, tmp_path)
    monkeypatch.undo()
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    states = saved_state(config, tmp_path), saved_state(config, tmp_path, mesh=mesh)
    assert states[0].params["embedding"].sharding != states[1].params["embedding"].sharding
    jax.tree.map(
        np.testing.assert_array_equal, *(jax.tree.map(np.asarray, state) for state in states)
    )
    trainer.fit(dataclasses.replace(config, mesh=mesh), tmp_path)
    for got, expected in zip(lines(tmp_path), lines(uninterrupted), strict=True):
        assert got == pytest.approx(expected, rel=1e-3)


def test_another_config_is_refused_by_its_fields(config, uninterrupted):
    other = dataclasses.replace(
        config, seed=1, train=dataclasses.replace(config.train, steps=9, batch_size=16)
    )
    with pytest.raises(
        ConfigError, match=r"seed is 0 there and 1 here; train.batch_size is 8 there and 16 here"
    ):
        trainer.fit(other, uninterrupted)


def with_steps(config, steps):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def test_a_finished_run_goes_on_to_more_steps_by_their_schedule(
    config, uninterrupted, tmp_path, monkeypatch
):
    """It is a run of 12 steps that was interrupted at 8, but for the learning rates that it had
    before.
    """
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    longer = with_steps(config, 12)
    trainer.fit(longer, tmp_path)
    expected = [
        float(make_schedule(run)(step))
        for run, steps in ((config, range(8)), (longer, range(8, 12)))
        for step in steps
    ]
    assert [
        line["train/learning_rate"] for line in lines(tmp_path) if "train/loss" in line
    ] == pytest.approx(expected, rel=1e-5)
    old, new = (float(make_schedule(run)(8)) for run in (config, longer))
    assert warnings == [
        "train.steps is 12 now, and was 8: "
        f"at step 8 the learning rate goes from {old:.3g}, of the old schedule, to {new:.3g}"
    ]
    assert lines(tmp_path)[: len(lines(uninterrupted))] == lines(uninterrupted)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 12
    with pytest.raises(
        ConfigError,
        match=r"train.steps=8 is not more than the 12 steps that .* has trained: "
        r"set train.steps to 12, or",
    ):
        trainer.fit(config, tmp_path)
    trainer.fit(longer, tmp_path)
    assert len(warnings) == 1


@pytest.mark.slow
def test_a_longer_run_equals_one_that_had_its_schedule_from_the_start(
    config, tmp_path, monkeypatch
):
    """With a constant learning rate the schedules agree, and the extended run is the longer one bit
    for bit.
    """
    constant = dataclasses.replace(
        config.optimizer, warmup_fraction=0.0, final_learning_rate_fraction=1.0
    )
    config = dataclasses.replace(config, optimizer=constant)
    trainer.fit(with_steps(config, 4), tmp_path / "extended")
    trainer.fit(with_steps(config, 8), tmp_path / "extended")
    trainer.fit(with_steps(config, 8), tmp_path / "whole")
    assert_same_run(with_steps(config, 8), tmp_path / "extended", tmp_path / "whole")


@pytest.mark.parametrize(
    ("steps", "refused"), [(2, True), (3, True), (4, False), (8, False), (12, False)]
)
def test_an_interrupted_run_may_change_its_steps_to_more_than_it_has_trained(
    config, tmp_path, monkeypatch, steps, refused
):
    stop_at(monkeypatch, 3)
    with pytest.raises(trainer.Interrupted):
        trainer.fit(config, tmp_path)
    if refused:
        with pytest.raises(ConfigError, match=rf"train.steps={steps} is not more than the 3 steps"):
            check_workdir(tmp_path, with_steps(config, steps))
    else:
        check_workdir(tmp_path, with_steps(config, steps))


def fork_of(config):
    """Another schedule, batch size and seed, on the other split."""
    optimizer = OptimizerConfig(learning_rate=1e-4, warmup_fraction=0.0, weight_decay=0.0)
    train = dataclasses.replace(
        config.train, steps=4, eval_every=4, checkpoint_every=1, keep_last=9
    )
    return dataclasses.replace(config, seed=1, optimizer=optimizer, train=train)


def test_a_new_run_starts_from_anothers_parameters(config, uninterrupted, tmp_path, monkeypatch):
    """Its loss at step 0 is the other's last validation loss; step, stream and moments are new.
    Resuming needs neither flag nor source.
    """
    source, workdir = tmp_path / "source", tmp_path / "fork"
    shutil.copytree(uninterrupted, source)
    fork = fork_of(config)
    stop_at(monkeypatch, 2)
    with pytest.raises(trainer.Interrupted):
        trainer.fit(fork, workdir, init_from=source)
    monkeypatch.undo()
    assert json.loads((workdir / "origin.json").read_text()) == {
        "init_from": str(source),
        "step": 8,
    }
    first, last = saved_state(fork, workdir, 0), saved_state(config, source)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.tree.map(np.asarray, state.params) for state in (first, last)),
    )
    assert (int(first.step), int(first.examples)) == (0, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first.opt_state))
    rows = JoinedRows({"": prepare.prepare(fork.data, "validation")})
    loss = evaluation.evaluate_sources(fork, make_program(fork), first.variables, rows)["loss"]
    assert loss == pytest.approx(lines(source)[-1]["validation/loss"], rel=1e-5)
    trainer.fit(fork, workdir, init_from=source, init_step=8)  # the same flags again
    shutil.rmtree(source)
    assert trainer.fit(fork, workdir)["validation/loss"] < loss + 0.01
    with pytest.raises(
        ConfigError,
        match=r"fork started from step 8 of .*/source: "
        r"leave out --init_from, or set another workdir",
    ):
        trainer.fit(fork, workdir, init_from=uninterrupted)
    with pytest.raises(ConfigError, match=r"fork started from step 8 of .*/source"):
        trainer.fit(fork, workdir, init_from=source, init_step=6)


def test_a_fork_killed_before_its_first_checkpoint_starts_from_the_same_step_again(
    config, uninterrupted, tmp_path, monkeypatch
):
    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(fork_of(config), tmp_path, init_from=uninterrupted, init_step=6)
    monkeypatch.undo()
    stop_at(monkeypatch, 1)
    with pytest.raises(trainer.Interrupted):
        trainer.fit(fork_of(config), tmp_path)
    params = [
        saved_state(run, workdir, step).params
        for run, workdir, step in ((fork_of(config), tmp_path, 0), (config, uninterrupted, 6))
    ]
    jax.tree.map(
        np.testing.assert_array_equal, *(jax.tree.map(np.asarray, tree) for tree in params)
    )


def test_what_a_run_cannot_start_from_is_refused(config, uninterrupted, tmp_path):
    def refused(message, workdir=tmp_path / "new", model=MODEL, **flags):
        with pytest.raises(ConfigError, match=message):
            trainer.fit(dataclasses.replace(config, model=model), workdir, **flags)

    refused(
        r"--init_from=.*nothing is no run: set --init_from to the directory of a run",
        init_from=tmp_path / "nothing",
    )
    refused(
        r"no checkpoint of step 5: set --init_step to one of its steps \(6, 8\)",
        init_from=uninterrupted,
        init_step=5,
    )
    refused(
        r"holds a run that started from new parameters: leave out --init_from",
        workdir=uninterrupted,
        init_from=uninterrupted,
    )
    moe = MoEConfig(num_experts=2, expert_dim=24)
    for field, value in (("rope_base", 5000.0), ("num_layers", 1), ("moe", moe)):
        name = "moe.num_experts" if field == "moe" else field
        model = dataclasses.replace(MODEL, **{field: value})
        refused(
            rf"model.{name}=.* in the run to start from: set model.{name} to",
            model=model,
            init_from=uninterrupted,
        )


def test_every_field_of_a_model_may_differ_between_a_run_and_its_origin_or_not():
    """A new field has to be put on one side: it changes the function of the same parameters, or it
    does not.
    """
    free = {"compute_dtype", "remat", "scan_layers", "attention", "moe"}
    assert {field.name for field in dataclasses.fields(ModelConfig)} == free | set(SHARED_FIELDS)
    free = {"jitter", "balance_weight", "balance_scope", "z_weight", "bias_update_rate"}
    free |= {
        "dispatch",
        "implementation",
        "capacity_factor",
        "priority",
        "exchange",
        "receive_factor",
    }
    assert {field.name for field in dataclasses.fields(MoEConfig)} == free | set(SHARED_MOE_FIELDS)


def with_stable_phase(config, steps):
    """A quarter of the steps decays. Every second step is saved, and nothing is deleted."""
    optimizer = dataclasses.replace(
        config.optimizer, schedule="wsd", warmup_steps=2, decay_fraction=0.25
    )
    train = dataclasses.replace(
        config.train, steps=steps, log_every=1, checkpoint_every=2, keep_last=9
    )
    return dataclasses.replace(config, optimizer=optimizer, train=train)


@pytest.fixture(scope="session")
def stable(config, tmp_path_factory):
    """A run of 8 steps whose learning rate is constant up to step 6."""
    workdir = tmp_path_factory.mktemp("stable")
    trainer.fit(with_stable_phase(config, 8), workdir, jax.devices()[:1])
    return workdir


def test_a_fork_equals_the_run_of_so_many_steps_bit_for_bit(config, stable, tmp_path, monkeypatch):
    """It is stopped after a step. Resuming needs neither flag nor trunk."""
    shorter, device = with_stable_phase(config, 6), jax.devices()[:1]
    trunk, fork, alone = (tmp_path / name for name in ("trunk", "fork", "alone"))
    shutil.copytree(stable, trunk)
    stop_at(monkeypatch, 1)
    with pytest.raises(trainer.Interrupted):
        trainer.fit(shorter, fork, device, fork_from=trunk, fork_step=4)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"forked from step 4 of .*: leave out --fork_from"):
        trainer.fit(shorter, fork, device, fork_from=trunk, fork_step=2)
    shutil.rmtree(trunk)
    trainer.fit(shorter, fork, device)
    trainer.fit(shorter, fork, device, fork_from=trunk, fork_step=4)  # the same flags again
    trainer.fit(shorter, alone, device)
    assert_same_run(shorter, fork, alone)


@pytest.mark.slow
def test_a_fork_of_a_sparse_run_has_its_routers_too(moe_config, tmp_path):
    trunk, fork, alone = (tmp_path / name for name in ("trunk", "fork", "alone"))
    shorter, device = with_stable_phase(moe_config, 6), jax.devices()[:1]
    trainer.fit(with_stable_phase(moe_config, 8), trunk, device)
    trainer.fit(shorter, fork, device, fork_from=trunk, fork_step=4)
    trainer.fit(shorter, alone, device)
    assert_same_run(shorter, fork, alone)
    assert (fork / "router.jsonl").read_bytes() == (alone / "router.jsonl").read_bytes()
    assert jax.tree.leaves(saved_state(shorter, fork).router_state)


def test_what_is_no_fork_is_refused(config, uninterrupted, stable, tmp_path):
    def refused(message, workdir=tmp_path / "new", fork=None, **flags):
        flags = {"fork_from": stable, "fork_step": 4} | flags
        with pytest.raises(ConfigError, match=message):
            trainer.fit(fork or with_stable_phase(config, 6), workdir, **flags)

    other = with_stable_phase(dataclasses.replace(config, seed=1), 6)
    refused(r"is a run of another config \(seed is 0 there and 1 here\): set the same", fork=other)
    message = r"--fork_step=6 is in the decay .* up to step 4: set --fork_step to .* \(2, 4\)"
    refused(message, fork_step=6)
    message = r"--fork_step=8 is in the decay .* up to step 6: set .* \(2, 4, 6\)"
    refused(message, fork=with_stable_phase(config, 20), fork_step=8)
    refused(r"no checkpoint of step 3: set --fork_step to one of its steps \(2, 4,", fork_step=3)
    refused(r"--fork_from=.* names a run, but no step: set --fork_step", fork_step=None)
    refused(r"--fork_step=4 names a step, but no run: set --fork_from", fork_from=None)
    refused(r"name two runs to start from: leave one of them out", init_from=stable)
    refused(r"nothing is no run: set --fork_from", fork_from=tmp_path / "nothing")
    same = with_stable_phase(config, 8)
    refused(r"holds a run that started from new parameters: leave out --fork_from", stable, same)
    refused(
        r"since optimizer.schedule='cosine': train both with", fork=config, fork_from=uninterrupted
    )
    refused(
        r"warmup_fraction=0.25 gives 2 steps of warm-up in .* and 1 here: train both with",
        fork=with_stable_phase(config, 2),
        fork_step=2,
    )


def test_a_fork_that_was_killed_at_once_is_checked_again(config, stable, tmp_path, monkeypatch):
    """Its origin.json is written, and it has no config yet."""

    def kill(*_):
        raise KeyboardInterrupt

    shorter, one = with_stable_phase(config, 6), jax.devices()[:1]
    monkeypatch.setattr(checkpoint, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(shorter, tmp_path, one, fork_from=stable, fork_step=4)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"a run of another config .seed is 0 there and 1 here"):
        trainer.fit(dataclasses.replace(shorter, seed=1), tmp_path, one)
    with pytest.raises(ConfigError, match=r"forked from step 4 of .*: leave out --init_from"):
        trainer.fit(shorter, tmp_path, one, init_from=stable, init_step=4)


def test_a_run_that_decays_cannot_get_other_steps(config, stable):
    """Its stable phase would have a decay in it. Before the decay it may."""
    with pytest.raises(
        ConfigError, match=r"other learning rates from step 6 on, .* fork it .* of at most 6$"
    ):
        check_workdir(stable, with_stable_phase(config, 12))


@pytest.mark.parametrize(("steps", "refused"), [(6, False), (4, True), (12, False)])
def test_a_run_that_does_not_decay_yet_may_get_other_steps(
    config, stable, tmp_path, steps, refused
):
    shutil.copytree(stable, tmp_path, dirs_exist_ok=True)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    with pytest.raises(ConfigError) if refused else contextlib.nullcontext():
        check_workdir(tmp_path, with_stable_phase(config, steps))


def test_other_rows_are_refused(config, uninterrupted, monkeypatch):
    rows = prepare.prepare(config.data, "train")
    monkeypatch.setattr(prepare, "prepare", lambda *_: dataclasses.replace(rows, sha256="0" * 64))
    with pytest.raises(
        ConfigError,
        match=rf"rows with checksum {rows.sha256[:8]}, .* have 00000000: set data.directory",
    ):
        trainer.fit(config, uninterrupted)


def test_other_rows_of_validation_are_refused(config, uninterrupted, monkeypatch):
    original = prepare.prepare

    def changed(data, split):
        rows = original(data, split)
        return rows if split == "train" else dataclasses.replace(rows, sha256="0" * 64)

    monkeypatch.setattr(prepare, "prepare", changed)
    with pytest.raises(ConfigError, match=r"was evaluated on rows with checksum .* have 00000000:"):
        trainer.fit(config, uninterrupted)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_that_are_not_those_of_process_0_are_refused(config, tmp_path, monkeypatch, split):
    def told(name, make):
        if name != "the checksums of the rows":
            return make()
        return tuple(
            "1" * 64 if split == one else other
            for one, other in zip(("train", "validation"), make(), strict=True)
        )

    monkeypatch.setattr(start, "from_first", told)
    match = rf"has {split} rows with checksum \w{{8}}, and on that of process 0 with 11111111: give"
    with pytest.raises(ConfigError, match=match):
        trainer.fit(config, tmp_path)


def test_the_first_process_alone_writes(config, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with start.open_records(tmp_path, config, make_program(config), [], 0) as records:
        records.metrics(1, {"train/loss": 1.0})
        records.hosts(HostTimes(1, [1.0], [1.0]))
        records.flush()
    assert list(tmp_path.iterdir()) == []


def test_what_a_check_of_kernels_found_stands_with_the_run(config, tmp_path, monkeypatch):
    """The program takes no refused kernel, and environment.jsonl says why."""
    kernels = {
        "chip": "a chip",
        "found": {"hopper, attention": "it is wrong"},
        "refused": {"attention": ["hopper"], "experts": []},
    }
    asked = []

    def make(config, devices, *, task, refused):
        asked.append(refused)
        return make_program(config)

    def train(run, state, batches):
        raise RuntimeError("it would train now")

    monkeypatch.setattr(trainer, "make_program", make)
    monkeypatch.setattr(trainer, "_train", train)
    with pytest.raises(RuntimeError, match="it would train now"):
        trainer.fit(config, tmp_path, kernels=kernels)
    line = json.loads((tmp_path / "environment.jsonl").read_text())
    assert asked == [kernels["refused"]] and line["kernels"] == kernels


def test_a_refused_config_leaves_its_workdir_free(config, tmp_path):
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, train_split="trian"))
    with pytest.raises(ConfigError, match="'trian'"):
        trainer.fit(wrong, tmp_path)
    check_workdir(tmp_path, config)


def test_a_damaged_checkpoint_is_named(config, uninterrupted, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "checkpoints" / "8" / "state")
    with pytest.raises(
        ConfigError, match=r"checkpoints/8 is damaged \([^\n]*\): delete it, and step 6 is taken$"
    ):
        trainer.load_run(workdir)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ConfigError, match="checkpoints does not exist"):
        trainer.load_run(workdir)
    assert not (workdir / "checkpoints").exists()


def test_what_is_no_run_is_told_without_a_command_s_flags(uninterrupted, tmp_path):
    for path, message in (
        (None, r"^workdir=None is no path: set workdir to the directory of a run$"),
        (uninterrupted / "config.json", rf"is a file: set workdir to {uninterrupted}$"),
        (uninterrupted / "metrics.jsonl", r"is a file: set workdir to the directory of a run$"),
        (uninterrupted / "config.json" / "x", r"x.config.json does not exist: set workdir to the"),
        (tmp_path, r"config.json does not exist: set workdir to the directory of a run$"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer.load_run(path)


def test_checkpoints_kept(config, tmp_path):
    train = dataclasses.replace(
        config.train, steps=7, checkpoint_every=1, keep_last=2, keep_every=3
    )
    trainer.fit(dataclasses.replace(config, train=train), tmp_path)
    with checkpoint.open_checkpoints(tmp_path, config) as checkpoints:
        assert list(checkpoints.all_steps()) == [3, 6, 7]


def test_a_checkpoint_of_another_shape_dtype_or_tree_is_refused(config, uninterrupted):
    def restore(change, tree=lambda state: state):
        program = make_program(
            dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
        )
        with checkpoint.open_checkpoints(uninterrupted, config) as checkpoints:
            checkpoint.restore(checkpoints, tree(program.abstract_state))

    with pytest.raises(
        ConfigError,
        match=r"embedding as float32\[256, 16\], and the config asks for float32\[512, 16\]",
    ):
        restore({"vocab_size": 512})
    with pytest.raises(
        ConfigError, match=r"unembedding as float32\[16, 256\], and the config asks for nothing"
    ):
        restore({"tied_embeddings": True})
    bfloat16 = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "bfloat16", sharding=leaf.sharding)
    with pytest.raises(
        ConfigError,
        match=r"params\.embedding as float32\[256, 16\], and the config asks for bfloat16",
    ):
        restore({}, lambda state: state.replace(params=jax.tree.map(bfloat16, state.params)))


def test_a_run_without_its_config_json_is_still_that_run(config, uninterrupted, tmp_path):
    """The checkpoints say which run they are of: another config is refused, and the same one writes
    the file again.
    """
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"holds a run of another config \(seed is 0 there and 1 here\)"
    ):
        trainer.fit(dataclasses.replace(config, seed=1), tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before.keys()
    assert trainer.load_run(tmp_path)[3] == 8
    trainer.fit(config, tmp_path)
    assert read_config(tmp_path) == config
    assert_same_run(config, tmp_path, uninterrupted)


def test_a_second_start_on_a_run_is_refused_and_writes_nothing(config, tmp_path):
    with start.lock_run(tmp_path, lambda: None):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(
            ConfigError,
            match=rf"is being written by process {os.getpid()} on {socket.gethostname()}: "
            r"wait until it ends",
        ):
            trainer.fit(config, tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with start.lock_run(tmp_path, lambda: None):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    code = textwrap.dedent("""
        import pathlib, sys
        from moe.files import try_lock
        with try_lock(pathlib.Path(sys.argv[1])) as holder:
            print(holder, flush=True)
            input()
    """)
    path = tmp_path / "run.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "None\n"
    with try_lock(path) as holder:
        assert holder == f"process {process.pid} on {socket.gethostname()}"
    process.kill()
    process.communicate()
    with try_lock(path) as holder:
        assert holder is None


def test_a_step_that_was_not_saved_is_refused(uninterrupted):
    with pytest.raises(
        ConfigError, match=r"no checkpoint of step 5: choose one of its steps \(6, 8\)"
    ):
        trainer.load_run(uninterrupted, step=5)


def test_a_run_that_is_not_finite_stops_and_keeps_its_last_checkpoint(config, tmp_path):
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=1e20, weight_decay=0.0, warmup_fraction=0.125
        ),
        train=dataclasses.replace(config.train, max_skipped_steps=3, checkpoint_every=1),
    )
    with pytest.raises(trainer.Diverged, match="3 updates in a row"):
        trainer.fit(config, tmp_path)
    assert lines(tmp_path)[-1]["train/skipped_steps"] == 3.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_handlers_come_back(number, capfd):
    before = [signal.getsignal(number) for number in SIGNALS]
    with signals.catch_signals() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        assert interrupted()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert "a second signal stops at once" in capfd.readouterr().err
    with signals.catch_signals() as interrupted:
        assert not interrupted()


@pytest.mark.parametrize(("first", "second"), list(itertools.product(SIGNALS, SIGNALS)))
def test_a_second_signal_of_either_kind_ends_a_process_that_runs_no_python(first, second):
    """As while XLA compiles: the main thread waits in C, where Python calls no handlers."""
    program = textwrap.dedent("""
        import ctypes
        from moe.training import signals
        signals.SAME_REQUEST_S = 0.0
        with signals.catch_signals():
            print("ready", flush=True)
            ctypes.CDLL(None).select(0, None, None, None, ctypes.byref((ctypes.c_long * 2)(60, 0)))
            ctypes.CDLL(None).select(0, None, None, None, ctypes.byref((ctypes.c_long * 2)(60, 0)))
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        while "stopping: this step is finished and saved first" not in process.stderr.readline():
            pass
        process.send_signal(second)
        assert process.wait(50) == 128 + second
        assert (
            "stopped at once: what was trained since the last checkpoint is lost"
            in process.stderr.read()
        )


def test_a_sigterm_that_slurm_sends_twice_is_one_request(monkeypatch, capfd):
    monkeypatch.setattr(signals, "SAME_REQUEST_S", 1e6)
    with signals.catch_signals() as interrupted:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted()
    assert capfd.readouterr().err.count("a second signal stops at once") == 1


@pytest.mark.slow
def test_a_short_run_whose_every_update_was_skipped_has_diverged(config, tmp_path, monkeypatch):
    """It has too few steps for max_skipped_steps. The finished run says it again."""
    train = dataclasses.replace(config.train, steps=2)
    config = dataclasses.replace(config, train=train)
    state = make_program(config).init_state()
    broken = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    monkeypatch.setattr(trainer, "first_state", lambda *_: broken)
    with pytest.raises(
        trainer.Diverged,
        match="step 2: every update was skipped, since its loss or its gradient was not finite",
    ):
        trainer.fit(config, tmp_path)
    monkeypatch.undo()
    with pytest.raises(trainer.Diverged, match="step 2: every update"):
        trainer.fit(config, tmp_path)
    with pytest.raises(
        ConfigError,
        match="checkpoints/2 has a loss that is not finite: set --step to an earlier checkpoint",
    ):
        evaluate(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"checkpoints/2 holds numbers that are not finite in params/.*: set the step to",
    ):
        generate(tmp_path, ["def "], max_new_tokens=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["validation/loss", "validation/bits_per_byte", "validation/max_vio"]
)
def test_an_end_that_is_not_finite_has_diverged(name, value):
    with pytest.raises(
        trainer.Diverged, match=f"step 8: {name} is {value}: lower optimizer.learning_rate"
    ):
        trainer.check_outcome(8, 0, {"validation/loss": 2.0, name: value})
    trainer.check_outcome(8, 7, {"validation/loss": 2.0})
    trainer.check_outcome(0, 0, {})


@pytest.mark.parametrize("devices", [1, 8])
def test_a_model_that_cannot_fit_is_refused_before_anything_is_made(
    config, tmp_path, monkeypatch, devices
):
    """Virtual CPU devices share one memory: what each of 8 holds counts 8 times."""
    program = make_program(config, tuple(jax.devices()[:devices]))
    state_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.abstract_state))
    params_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.abstract_state.params))
    needed = devices * (state_bytes + params_bytes)
    monkeypatch.setattr(prepare, "prepare", lambda *_: pytest.fail("data was prepared"))
    monkeypatch.setattr(start, "memory_bytes", lambda device: needed - 1)
    with pytest.raises(
        ConfigError,
        match=r"config.model takes .* GiB of memory without its activations, "
        r"and there are .* GiB: split it",
    ):
        trainer.fit(config, tmp_path / "new", jax.devices()[:devices])
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(start, "memory_bytes", lambda device: needed)
    start.check_memory(program.mesh, program.abstract_state, program.abstract_state.params)


def test_every_command_that_makes_a_state_looks_at_the_memory_first(
    config, uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setattr(start, "memory_bytes", lambda device: 1000)
    sparse = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=2, expert_dim=24))
    for command in (
        lambda: benchmark(config, trials=1),
        lambda: trainer.load_run(uninterrupted),
        lambda: upcycle(
            uninterrupted, dataclasses.replace(config, model=sparse), tmp_path / "upcycled"
        ),
    ):
        with pytest.raises(ConfigError, match=r"config\.model takes 0\.0 GiB of memory"):
            command()


def test_a_signal_in_the_last_step_or_after_it_is_told_to_the_caller(config, tmp_path, monkeypatch):
    """A comparison would go on to its next run. The run itself is whole."""
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (save(*args), saved.append(args[-1])))

    @contextlib.contextmanager
    def catch():
        yield lambda: len(saved) == 3  # those of steps 3, 6 and 8

    monkeypatch.setattr(trainer, "catch_signals", catch)
    with pytest.raises(trainer.Interrupted, match="stopped at step 8 and saved"):
        trainer.fit(config, tmp_path)
    monkeypatch.undo()
    assert trainer.fit(config, tmp_path)["validation/loss"] > 0


def test_an_evaluation_that_a_signal_ended_is_made_by_the_run_that_goes_on(
    config, uninterrupted, tmp_path, monkeypatch
):
    """It was to be made at step 4, and at step 8, the last one."""
    evaluated, evaluate_batches = [], evaluation.evaluation_batches
    monkeypatch.setattr(
        evaluation,
        "evaluation_batches",
        lambda *args, **kwargs: evaluated.append(1) or evaluate_batches(*args, **kwargs),
    )

    @contextlib.contextmanager
    def catch():
        yield lambda: len(evaluated) > 0

    monkeypatch.setattr(trainer, "catch_signals", catch)
    with pytest.raises(trainer.Interrupted, match="stopped at step 4 and saved"):
        trainer.fit(config, tmp_path)
    assert not any("validation/loss" in line for line in lines(tmp_path))
    stop_at(monkeypatch, 1)
    with pytest.raises(trainer.Interrupted, match="stopped at step 5 and saved"):
        trainer.fit(config, tmp_path)
    assert any("validation/loss" in line for line in lines(tmp_path))
    evaluated.clear()
    monkeypatch.setattr(trainer, "catch_signals", catch)
    with pytest.raises(trainer.Interrupted, match="stopped at step 8 and saved"):
        trainer.fit(config, tmp_path)
    monkeypatch.undo()
    trainer.fit(config, tmp_path)
    assert_same_run(config, tmp_path, uninterrupted)


def test_fit_may_run_in_a_thread():
    caught = []

    def run():
        with signals.catch_signals() as interrupted:
            caught.append(interrupted())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught == [False]


def test_evaluation_covers_the_split_whatever_the_batch_size(config, uninterrupted):
    rows = prepare.prepare(config.data, "validation")
    variables, sources = saved_state(config, uninterrupted).variables, JoinedRows({"": rows})
    results = []
    for batch_size in (64, 1000):
        train = dataclasses.replace(config.train, eval_batches=0, batch_size=batch_size)
        whole = dataclasses.replace(config, train=train)
        results.append(evaluation.evaluate_sources(whole, make_program(whole), variables, sources))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    expected = results[0]["loss"] * rows.num_targets / rows.num_bytes / np.log(2)
    assert results[0]["bits_per_byte"] == pytest.approx(expected)


@pytest.fixture(scope="session")
def moe_config(config):
    """Four experts with little room and with biases, in both layers."""
    moe = MoEConfig(
        num_experts=4,
        expert_dim=12,
        dispatch="capacity",
        capacity_factor=1.0,
        bias_update_rate=0.01,
        z_weight=1e-3,
    )
    train = dataclasses.replace(
        config.train, steps=6, log_every=2, eval_every=6, checkpoint_every=2
    )
    return dataclasses.replace(config, model=dataclasses.replace(MODEL, moe=moe), train=train)


@pytest.fixture(scope="session")
def uninterrupted_moe(moe_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted_moe")
    trainer.fit(moe_config, workdir, jax.devices()[:1])  # which compiles sooner
    return workdir


MEANS = {
    "load_entropy", "load_variation", "dropped_fraction", "logit_norm", "router_entropy",
    "top1_margin", "balance_loss", "z_loss", "max_vio",
}  # fmt: skip


def test_a_sparse_run_writes_its_routers_statistics(uninterrupted_moe):
    written = [line for line in read_metrics(uninterrupted_moe) if "train/loss" in line]
    router = list(read_router(uninterrupted_moe))
    assert [line["step"] for line in written] == [step for step, _ in router] == [2, 4, 6]
    for line, (_, layers) in zip(written, router, strict=True):
        names = {name.removeprefix("router/") for name in line if name.startswith("router/")}
        assert names == MEANS | {"dead_experts", "bias_range", "worst_max_vio"}
        assert layers.keys() == MEANS | {"dead_experts", "bias_range", "load"}
        assert {
            name: values.shape for name, values in layers.items() if name != "load"
        } == dict.fromkeys(layers.keys() - {"load"}, (2,))
        assert layers["load"].shape == (2, 4)
        np.testing.assert_allclose(layers["load"].sum(axis=1), 1, atol=1e-4)
        np.testing.assert_allclose(layers["max_vio"], 4 * layers["load"].max(axis=1) - 1, atol=1e-3)
        for name in MEANS:
            assert line[f"router/{name}"] == pytest.approx(layers[name].mean(), rel=1e-4)
        assert line["router/worst_max_vio"] == pytest.approx(layers["max_vio"].max(), rel=1e-4)
    np.testing.assert_allclose(
        router[0][1]["bias_range"], 0.02, rtol=1e-4
    )  # one update before, of 0.01 up and 0.01 down


def test_validation_tells_how_even_the_load_is(uninterrupted_moe):
    (line,) = (line for line in read_metrics(uninterrupted_moe) if "validation/loss" in line)
    names = ("loss", "bits_per_byte", "max_vio", "load_entropy", "dropped_fraction")
    assert set(line) == {"step", *(f"validation/{name}" for name in names)}
    assert (
        line["validation/max_vio"] > 0
        and 0.5 < line["validation/load_entropy"] < 1
        and 0 < line["validation/dropped_fraction"] < 0.5
    )


@pytest.mark.slow
def test_a_resumed_sparse_run_has_the_same_router_file_byte_for_byte(
    moe_config, uninterrupted_moe, tmp_path, monkeypatch
):
    """As after kill -9 too: a line of a step that was not saved, and half a line."""
    stop_at(monkeypatch, 3)
    with pytest.raises(trainer.Interrupted):
        trainer.fit(moe_config, tmp_path, jax.devices()[:1])
    monkeypatch.undo()
    with (tmp_path / "router.jsonl").open("a") as file:
        file.write('{"step": 4, "load": [[1.0, 0.0, 0.0, 0.0]]}\n{"step": 6, "lo')
    trainer.fit(moe_config, tmp_path, jax.devices()[:1])
    assert (tmp_path / "router.jsonl").read_bytes() == (
        uninterrupted_moe / "router.jsonl"
    ).read_bytes()
    assert_same_run(moe_config, tmp_path, uninterrupted_moe)


def test_a_dense_run_writes_nothing_of_routers(uninterrupted):
    assert not (uninterrupted / "router.jsonl").exists()
    assert not [
        name
        for line in read_metrics(uninterrupted)
        for name in line
        if "router" in name or "max_vio" in name
    ]


def test_router_statistics_are_means_sums_and_largest_values():
    router = {
        "load": np.array([[0.5, 0.5], [0.0, 1.0]]),
        "max_vio": np.array([0.0, 1.0]),
        "dead_experts": np.array([0.0, 1.0]),
        "bias_range": np.array([0.25, 0.5]),
    }
    assert evaluation.router_summary(router) == {
        "max_vio": 0.5,
        "dead_experts": 1.0,
        "bias_range": 0.5,
        "worst_max_vio": 1.0,
    }
    assert evaluation.router_summary({}) == {}


def test_an_mfu_is_only_of_a_peak_that_cannot_be_exceeded(config, uninterrupted):
    """A peak measured on this machine can be exceeded, so a run on CPUs has a speed and no MFU."""
    timed = [line for line in read_metrics(uninterrupted) if "train/tokens_per_second" in line]
    assert timed and not [line for line in timed if "train/mfu" in line]
    h100 = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    assert hardware.peak_flops([h100, h100]) == 2 * 989e12
    assert hardware.peak_flops([h100, jax.devices()[0]]) is None


@pytest.mark.parametrize(("count", "mfu"), [(None, False), (lambda config: 5.0, True)])
def test_a_task_has_an_mfu_if_it_counts_its_flops(config, monkeypatch, count, mfu):
    monkeypatch.setattr(log, "peak_flops", lambda devices: 1e12)
    program = make_program(config)
    program = dataclasses.replace(program, task=program.task._replace(training_flops=count))
    lines, bar = [], types.SimpleNamespace(step=lambda step: None, show_metrics=lambda texts: None)
    records = log.Records(lambda step, values, layers: lines.append(values), None, lambda: None)
    speeds = log.Log(config, program, records, bar)
    metrics = {"loss": 1.0, "skipped_steps": 0, "skipped_in_row": 0}
    for step in (1, 2, 3):
        speeds.add(step, metrics)
    assert ("train/mfu" in lines[-1]) == mfu
    assert not mfu or lines[-1]["train/mfu"] == pytest.approx(
        lines[-1]["train/tokens_per_second"] * 5e-12
    )


def test_the_progress_bar_shows_what_there_is():
    dense = {"train/loss": 2.5, "train/skipped_steps": 0.0}
    assert log.postfix(dense) == {"loss": "2.500"}
    on_a_cpu = {"train/tokens_per_second": 41234.0}
    assert log.postfix(dense | on_a_cpu) == {"loss": "2.500", "tokens/s": "4.12e+04"}
    speeds = on_a_cpu | {"train/mfu": 0.5}
    assert log.postfix(dense | speeds) == {
        "loss": "2.500",
        "tokens/s": "4.12e+04",
        "MFU": "50.0%",
    }
    sparse = dense | {"router/worst_max_vio": 0.426, "router/dropped_fraction": 0.0}
    assert log.postfix(sparse) == {"loss": "2.500", "MaxVio": "0.43"}
    dropping = sparse | {"router/dropped_fraction": 0.0312, "train/skipped_steps": 2.0}
    assert log.postfix(dropping) == {
        "loss": "2.500",
        "MaxVio": "0.43",
        "dropped": "3.1%",
        "skipped": "2",
    }
