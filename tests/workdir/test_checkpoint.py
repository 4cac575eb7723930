"""Tests checkpoints under injected faults.

Whatever is wrong on disk, a state is restored bit for bit or refused in one line.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import resource
import shutil
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe.config import ConfigError, RunConfig, TrainConfig
from moe.storage.owner import LostRun
from moe.workdir import checkpoint, identity
from moe.workdir.checksum import checksum, checksums
from tests.jobs import file_size_limit

CONFIG = RunConfig(train=TrainConfig(keep_last=2))
ONE = RunConfig(train=TrainConfig(keep_last=1))
ROWS = "0" * 64


class State(struct.PyTreeNode):
    """Stands for a train state, since checkpoints do not depend on the model."""

    step: jax.Array
    params: dict
    router_state: dict

    @property
    def variables(self):
        return {"params": self.params, "router_state": self.router_state}


def make_state(step):
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "w": jax.random.normal(keys[0], (16, 8)),
        "b": jax.random.normal(keys[1], (8,), jnp.bfloat16),
    }
    return State(jnp.int32(step), params, {"bias": jax.random.normal(keys[2], (4,))})


ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0)
)


def save(workdir, *steps, config=CONFIG):
    identity.write_config(workdir, config)
    with checkpoint.open_checkpoints(workdir, config) as checkpoints:
        for step in steps:
            checkpoint.save(checkpoints, config, ROWS, make_state(step))
    return workdir


def restore(workdir, step=None, config=CONFIG):
    with checkpoint.open_checkpoints(workdir, config) as checkpoints:
        return checkpoint.restore(checkpoints, ABSTRACT, step)


def assert_same(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved"), 4)


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def files(workdir):
    return sorted(path for path in (workdir / "checkpoints" / "4").rglob("*") if path.is_file())


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    return text


def test_a_state_comes_back_bit_for_bit(copy):
    assert_same(restore(copy), 4)
    about = json.loads((copy / "checkpoints" / "4" / "about.json").read_text())
    assert about["arrays"]["params.b"].keys() == {"dtype", "shape", "checksum"}
    assert (about["step"], about["config"]["seed"], about["rows_sha256"]) == (4, 0, ROWS)


@pytest.mark.slow
def test_each_flipped_bit_is_refused_or_changes_nothing(copy):
    """Flips some bits of every file. Either the flip is refused or the arrays are the same bits."""
    outcomes = {"refused": 0, "equal": 0}
    for path in files(copy):
        original = path.read_bytes()
        for position in np.linspace(0, 8 * len(original) - 1, 3).astype(int) if original else ():
            changed = bytearray(original)
            changed[position // 8] ^= 1 << position % 8
            path.write_bytes(changed)
            try:
                assert_same(restore(copy), 4)
                outcomes["equal"] += 1
            except (ConfigError, OSError) as error:
                assert "\n" not in str(error), error
                outcomes["refused"] += 1
        path.write_bytes(original)
    assert outcomes["refused"] >= 8, outcomes
    assert_same(restore(copy), 4)


@pytest.mark.parametrize("change", ["value", "exchange"])
def test_arrays_that_read_well_and_are_others_are_refused(copy, change):
    """Storage may return other bytes without an error, which Orbax reads without noticing."""
    state = make_state(4)
    w = state.params["w"]
    w = w.at[3, 2].add(1e-6) if change == "value" else w.at[0].set(w[1]).at[1].set(w[0])
    about = (copy / "checkpoints" / "4" / "about.json").read_text()
    shutil.rmtree(copy / "checkpoints")
    with checkpoint.open_checkpoints(copy, CONFIG) as checkpoints:
        checkpoint.save(checkpoints, CONFIG, ROWS, state.replace(params=state.params | {"w": w}))
    (copy / "checkpoints" / "4" / "about.json").write_text(about)
    with pytest.raises(
        ConfigError,
        match=r"checkpoints/4 is damaged \(params\.w .*checksum.*\): no earlier one is left",
    ) as error:
        restore(copy)
    one_line(error)


@pytest.mark.slow
def test_each_missing_cut_or_extra_file_is_refused_or_changes_nothing(copy):
    for path in files(copy):
        original = path.read_bytes()
        for content in (None, original[: len(original) // 2], b"[]"):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            try:
                assert_same(restore(copy), 4)
            except (ConfigError, OSError) as error:
                assert "\n" not in str(error), error
        path.write_bytes(original)
    for name in (
        "checkpoints/4/extra",
        "checkpoints/4/state/extra",
        "checkpoints/notes.txt",
        "checkpoints/04",
    ):
        (copy / name).write_text("extra")
    assert_same(restore(copy), 4)


def test_an_incomplete_checkpoint_is_ignored_with_a_warning(copy, caplog):
    shutil.copytree(copy / "checkpoints" / "4", copy / "checkpoints" / "9")
    (copy / "checkpoints" / "9" / "about.json").unlink()
    assert_same(restore(copy), 4)
    assert "checkpoints/9 has no about.json: it was not finished, and is ignored" in caplog.text
    save(copy, 5)
    assert identity.checkpoint_steps(copy / "checkpoints") == [4, 5]
    assert not (copy / "checkpoints" / "9").exists()


def test_the_older_format_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "3" / "about").mkdir(parents=True)
    with pytest.raises(
        ConfigError,
        match="checkpoints/3 has format 1, not 3: read it with the version that wrote it",
    ):
        restore(tmp_path)


def test_the_format_before_examples_had_64_bits_is_refused(copy):
    path = copy / "checkpoints" / "4"
    identity.write_about(path, identity.read_about(path) | {"format_version": 2})
    with pytest.raises(
        ConfigError,
        match="checkpoints/4 has format 2, not 3: read it with the version that wrote it",
    ):
        restore(copy)


def test_a_directory_of_another_step_is_refused(copy):
    (copy / "checkpoints" / "4").rename(copy / "checkpoints" / "50")
    with pytest.raises(
        ConfigError, match="checkpoints/50 holds step 4: rename it to 4, or delete it"
    ):
        restore(copy)


@pytest.mark.parametrize("step", [3, 4])
def test_a_save_that_a_resumed_run_would_not_take_is_refused(copy, step):
    """A resumed run would take the checkpoint that is there, and this state would be lost."""
    with checkpoint.open_checkpoints(copy, CONFIG) as checkpoints:
        checkpoint.save(checkpoints, CONFIG, ROWS, make_state(4))  # the same state is left alone
        other = make_state(7).replace(step=jnp.int32(step))
        with pytest.raises(
            ConfigError, match=rf"holds step 4 already, and this run is at step {step}: delete 4"
        ):
            checkpoint.save(checkpoints, CONFIG, ROWS, other)


def test_another_config_is_refused_whatever_config_json_says(copy):
    other = dataclasses.replace(CONFIG, seed=3)
    with pytest.raises(
        ConfigError, match=r"checkpoints/4 is of another config \(seed is 0 there and 3 here\)"
    ):
        restore(copy, config=other)
    identity.write_config(copy, other)
    with (
        checkpoint.read_checkpoints(copy) as checkpoints,
        pytest.raises(ConfigError, match="of another config"),
    ):
        checkpoint.restore_variables(checkpoints, ABSTRACT)


def test_where_a_run_is_laid_out_is_no_part_of_its_identity(copy):
    """A run may go on where there is more or less memory."""
    elsewhere = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, remat="full"),
        mesh=dataclasses.replace(CONFIG.mesh, fsdp=2),
        data=dataclasses.replace(CONFIG.data, directory="/elsewhere"),
        train=dataclasses.replace(CONFIG.train, gather_once=True),
    )
    assert_same(restore(copy, config=elsewhere), 4)


def test_a_latest_checkpoint_that_is_deleted_while_read_gives_way_to_a_newer_one(
    tmp_path, monkeypatch
):
    """A live run with keep_last=1 deletes it at the worst moment: after about.json was read."""
    read, deleted = checkpoint.read_about, []

    def read_and_delete(path):
        about = read(path)
        if len(deleted) < 3:
            deleted.append(path.name)
            save(tmp_path, int(path.name) + 1, config=ONE)
        return about

    monkeypatch.setattr(checkpoint, "read_about", read_and_delete)
    with checkpoint.read_checkpoints(save(tmp_path, 4, config=ONE)) as checkpoints:
        variables, step = checkpoint.restore_variables_and_step(checkpoints, ABSTRACT)
    assert (deleted, step) == (["4", "5", "6"], 7)
    jax.tree.map(np.testing.assert_array_equal, variables, make_state(7).variables)


def test_a_deleted_step_that_was_asked_for_is_not_called_damaged(copy, monkeypatch):
    read = checkpoint.read_about
    monkeypatch.setattr(checkpoint, "read_about", lambda path: (read(path), shutil.rmtree(path))[0])
    with (
        checkpoint.read_checkpoints(copy) as checkpoints,
        pytest.raises(ConfigError, match="checkpoints/4 was removed while it was read"),
    ):
        checkpoint.restore_variables(checkpoints, ABSTRACT, 4)


def test_too_many_open_files_are_not_called_damage(copy):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with checkpoint.open_checkpoints(copy, CONFIG) as checkpoints, contextlib.ExitStack() as held:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard)
        )
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        directory = held.enter_context(os.scandir(copy / "checkpoints" / "4"))
        assert directory
        with contextlib.suppress(OSError):
            while True:
                held.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files") as error:
            checkpoint.restore(checkpoints, ABSTRACT)
    assert "damaged" not in one_line(error)
    assert_same(restore(copy), 4)


def test_a_full_disk_ends_a_save_in_one_line(tmp_path, capfd):
    large = make_state(4).replace(params={"w": jax.random.normal(jax.random.key(0), (512, 512))})
    begin = time.monotonic()
    with (
        file_size_limit(2**16),
        pytest.raises(OSError, match=r"checkpoints/4 cannot be saved: .*File too large") as error,
        checkpoint.open_checkpoints(tmp_path, CONFIG) as checkpoints,
    ):
        checkpoint.save(checkpoints, CONFIG, ROWS, large)
    one_line(error)
    assert time.monotonic() - begin < 60
    assert capfd.readouterr().err.count("\n") < 3
    assert identity.checkpoint_steps(tmp_path / "checkpoints") == []
    save(tmp_path, 5)
    assert_same(restore(tmp_path), 5)


def test_a_directory_that_cannot_be_written_ends_a_save_in_one_line(tmp_path, capfd):
    (tmp_path / "checkpoints").write_text("a file where the directory belongs")
    begin = time.monotonic()
    with pytest.raises(
        OSError, match=r"checkpoints/4 cannot be saved: (Not a directory|File exists)"
    ) as error:
        save(tmp_path, 4)
    one_line(error)
    assert time.monotonic() - begin < 60
    assert capfd.readouterr().err.count("\n") < 3


def test_a_save_that_fails_since_the_run_was_taken_over_says_so(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the directory belongs")
    first = iter([True])

    def check():
        if not next(first, False):
            raise LostRun("taken over")

    with (
        checkpoint.open_checkpoints(tmp_path, CONFIG, check) as checkpoints,
        pytest.raises(LostRun, match="taken over"),
    ):
        checkpoint.save(checkpoints, CONFIG, ROWS, make_state(4))


def test_a_checkpoint_that_cannot_be_deleted_ends_nothing(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "remove_tree", refuse)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 1, 2, 3, 4)
    assert len(re.findall(r"cannot be deleted \(Permission denied", caplog.text)) == 1
    assert identity.checkpoint_steps(tmp_path / "checkpoints") == [3, 4]


@pytest.mark.parametrize("days", [-30, 30])
def test_a_clock_that_is_set_does_not_end_a_save(tmp_path, monkeypatch, days):
    begin, real = time.monotonic(), time.time
    identity.write_config(tmp_path, CONFIG)
    with checkpoint.open_checkpoints(tmp_path, CONFIG) as checkpoints:
        calls = iter(range(10**9))
        monkeypatch.setattr(time, "time", lambda: real() + 86400 * days * (next(calls) > 20))
        for step in (1, 2):
            checkpoint.save(checkpoints, CONFIG, ROWS, make_state(step))
            checkpoints.wait()
    monkeypatch.undo()
    assert_same(restore(tmp_path), 2)
    assert time.monotonic() - begin < 60


ARRAYS = {
    "float32": np.linspace(-3, 3, 48, dtype=np.float32).reshape(8, 6),
    "bfloat16": np.arange(48).reshape(8, 6).astype(jnp.bfloat16),
    "bool": np.arange(48).reshape(8, 6) % 3 == 0,
    "uint8": np.arange(48, dtype=np.uint8).reshape(8, 6),
    "int32": np.arange(48, dtype=np.int32).reshape(8, 6) - 24,
}


def numpy_checksum(x):
    """Returns the checksum by its definition, in 64-bit arithmetic and without a mesh."""

    def mix(x):
        x = (x ^ x >> np.uint64(16)) * np.uint64(0x7FEB352D) % np.uint64(2**32)
        x = (x ^ x >> np.uint64(15)) * np.uint64(0x846CA68B) % np.uint64(2**32)
        return x ^ x >> np.uint64(16)

    word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    position = np.full(x.shape, 0x9E3779B9, np.uint64)
    for dimension, size in enumerate(x.shape):
        index = np.arange(size, dtype=np.uint64).reshape(
            [-1 if i == dimension else 1 for i in range(x.ndim)]
        )
        position = mix(position ^ index)
    return int(mix(position ^ x.view(word).astype(np.uint64)).sum() % 2**32)


def test_a_checksum_is_the_same_on_every_mesh_and_finds_each_bit_and_exchange():
    for x in ARRAYS.values():
        mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
        specs = [
            PartitionSpec(),
            PartitionSpec("a"),
            PartitionSpec("a", "b"),
            PartitionSpec(("a", "b")),
        ]
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in specs]
        numbers = checksums(placed)
        assert numbers == [numpy_checksum(x)] * 4
    x = ARRAYS["float32"]
    flipped = [
        x.view(np.uint32) ^ np.uint32((np.arange(48).reshape(8, 6) == i % 48) << i % 32)
        for i in range(48)
    ]
    others = [y.view(np.float32) for y in flipped] + [
        x.T,
        x[::-1],
        x.reshape(6, 8),
        np.roll(x, 1, 1),
    ]
    assert len({*checksums([jnp.asarray(y) for y in (x, *others)])}) == 53


def test_checksums_of_arrays_that_are_not_matrices():
    assert checksums({}) == []
    assert checksums([jnp.zeros((0, 3))]) == [0]
    assert checksums([jnp.float32(1.5)]) == [numpy_checksum(np.float32(1.5).reshape(()))]
    key = jax.random.key(0)
    assert (
        checksums([key]) == checksums([jax.random.key_data(key)]) != checksums([jax.random.key(1)])
    )


def test_a_checksum_takes_at_most_a_word_for_each_element():
    x = jax.ShapeDtypeStruct((1024, 2048), jnp.float32)
    assert checksum.lower(x).compile().memory_analysis().temp_size_in_bytes < 1.01 * 4 * x.size


def test_a_checksum_of_64_bit_words_needs_no_64_bit_arithmetic():
    with jax.enable_x64(True):
        x = jnp.arange(6, dtype=jnp.int64) << 33
        first = checksums([x, x.astype(jnp.float64)])
        second = checksums([x + (jnp.arange(6) == 2), x])
    assert len({*first, *second}) == 3 and first[0] == second[1]


def test_rows_of_validation_are_compared_where_both_are_known(tmp_path):
    identity.write_config(tmp_path, CONFIG)
    with checkpoint.open_checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoint.save(checkpoints, CONFIG, ROWS, make_state(1))  # as older versions did
        checkpoint.save(checkpoints, CONFIG, ROWS, make_state(2), "a")
        checkpoints.wait()
        for step, validation_sha256 in ((1, "b"), (1, None), (2, "a"), (2, None)):
            checkpoint.check_rows(checkpoints, ROWS, step, validation_sha256)
        with pytest.raises(ConfigError, match="was evaluated on rows with checksum a, and those"):
            checkpoint.check_rows(checkpoints, ROWS, 2, "b")


def test_the_longest_save_is_known_to_the_start_that_goes_on(tmp_path, monkeypatch):
    """So that it stops early enough before the end of its job."""
    times = iter([0, 500, 600, 700])  # when each of two saves begins and ends
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: next(times)))
    identity.write_config(tmp_path, CONFIG)
    with checkpoint.open_checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.longest_save_seconds == 0
        for step in (1, 2):
            checkpoint.save(checkpoints, CONFIG, ROWS, make_state(step))
            checkpoints.wait()
            assert checkpoints.longest_save_seconds == 500
    with checkpoint.open_checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoint.check_rows(checkpoints, ROWS, 2)
        assert checkpoints.longest_save_seconds == 100  # that of the step which is restored
