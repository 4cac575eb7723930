"""Saving and restoring a run's state with Orbax, and refusing what would not be restored exactly.

A checkpoint of step s is `checkpoints/s/`: `state`, the arrays, and `about.json`, written last:
format_version, step, the run's config, its layer groups, the checksum of the rows it was trained
on, and each array's dtype, shape and checksum.
"""

import concurrent.futures
import errno
import gc
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from moe.config import ConfigError, RunConfig
from moe.workdir.checksum import checksums
from moe.workdir.identity import (
    ABOUT_FILE,
    checkpoint_steps,
    damaged,
    differing_fields,
    read_about,
    read_config,
    unfinished_steps,
    write_about,
)

# Orbax raises plain Exceptions where an array cannot be read, so no narrower class is enough around
# its calls.
_ORBAX_ERRORS = (Exception,)
# Orbax takes differences of the wall clock for time that has passed, and gives up after 20 minutes:
# a corrected clock would end a save.
_SAVE_TIMEOUT = 10**9
T = TypeVar("T")
# a live run that replaces its checkpoint faster than it can be read, this often in a row, is not
# waited for
_MAX_RETRIES = 10


class _Silence(logging.Filter):
    """Drops what Orbax and its event loops print of an error, again in each thread that it passes:
    the error is raised as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and "orbax" not in record.getMessage()

    def _unraisable(self, unraisable: Any) -> None:
        """Drops the complaints of what still read other arrays when the first one failed."""
        code = getattr(unraisable.object, "cr_code", None)
        if str(unraisable.exc_value) != "Event loop is closed" and not (
            code and "orbax" in code.co_filename
        ):
            self._hook(unraisable)

    def end(self) -> None:
        for name in ("absl", "asyncio"):
            logging.getLogger(name).removeFilter(self)
        if sys.unraisablehook == self._unraisable:
            sys.unraisablehook = self._hook


class Checkpoints:
    """The complete checkpoints of a run, and the writing of new ones in the background. To be
    closed.
    """

    def __init__(self, workdir: Path, config: RunConfig):
        self.directory, self.config = (workdir / "checkpoints").absolute(), config
        asynchronous = ocp.options.AsyncOptions(
            create_directories_asynchronously=False
        )  # those that wait for them wait 5 minutes
        if jax.process_count() == 1:
            asynchronous.timeout_secs = _SAVE_TIMEOUT
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(), async_options=asynchronous
        )
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future[None] | None = None
        self._warned = False
        self._silence = _Silence()

    def all_steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, in order."""
        return checkpoint_steps(self.directory)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None where there is none."""
        return max(self.all_steps(), default=None)

    def start_saving(self, about: dict[str, Any], state: Any) -> None:
        """Starts writing a checkpoint. Raises OSError where this one or the one before it cannot be
        written.
        """
        self.wait()
        path = self.directory / str(about["step"])

        def start() -> None:
            if jax.process_index() == 0:
                path.mkdir(parents=True, exist_ok=True)
            self._checkpointer.save(path / "state", args=ocp.args.PyTreeSave(state), force=True)

        _call_orbax(start, lambda error: _not_saved(path, error))
        self._saving = self._background.submit(self._finish, path, about)

    def wait(self) -> None:
        """Returns once nothing is being saved. Raises OSError where a checkpoint could not be
        written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Finishes what is being saved. Raises OSError where it cannot be written."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()
            self._silence.end()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _finish(self, path: Path, about: dict[str, Any]) -> None:
        def finish() -> None:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                write_about(path, about)

        _call_orbax(finish, lambda error: _not_saved(path, error))
        if jax.process_index() == 0:
            self._delete_old_ones()

    def _delete_old_ones(self) -> None:
        """Deletes complete checkpoints that are not to be kept, and what killed processes left of
        others.
        """
        steps, train = self.all_steps(), self.config.train
        old = [
            step
            for step in steps[: -train.keep_last]
            if not train.keep_every or step % train.keep_every
        ]
        for step in old + unfinished_steps(self.directory):
            path = self.directory / str(step)
            try:
                (path / ABOUT_FILE).unlink(
                    missing_ok=True
                )  # first, so that a reader can tell what is deleted from what is damaged
                shutil.rmtree(path)
            except OSError as error:
                if not self._warned:
                    logging.warning(
                        "%s cannot be deleted (%s): training goes on, and keeps it",
                        path,
                        error.strerror,
                    )
                self._warned = True


def open_checkpoints(workdir: Path, config: RunConfig) -> Checkpoints:
    """Opens a run's checkpoints for writing: the last `keep_last` stay, and every `keep_every`-th
    step's.
    """
    checkpoints = Checkpoints(workdir, config)
    for step in unfinished_steps(checkpoints.directory):
        logging.warning(
            "%s/%s has no %s: it was not finished, and is ignored",
            checkpoints.directory,
            step,
            ABOUT_FILE,
        )
    return checkpoints


def read_checkpoints(workdir: Path) -> Checkpoints:
    """Opens a run's checkpoints to be read alone: nothing is made or deleted. Raises ConfigError
    where there are none.
    """
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(
            f"{workdir / 'checkpoints'} does not exist: set --workdir to a run that has saved one"
        )
    return Checkpoints(workdir, read_config(workdir))


def save(checkpoints: Checkpoints, config: RunConfig, rows_sha256: str, state: Any) -> None:
    """Starts writing a train state, which may be donated as soon as this returns. A state that was
    saved is left alone.

    Raises ConfigError where the directory holds another state of this step, or a later one: it
    would be taken instead.
    """
    checkpoints.wait()
    step, latest = int(state.step), checkpoints.latest_step()
    about = {
        "step": step,
        "config": config.to_dict(),
        "layer_groups": config.model.layer_groups,
        "rows_sha256": rows_sha256,
    }
    about["arrays"] = describe(state)
    if latest is not None and step <= latest:
        if (
            step == latest
            and read_about(checkpoints.directory / str(step))["arrays"] == about["arrays"]
        ):
            return
        raise ConfigError(
            f"{checkpoints.directory} holds step {latest} already, and this run is at step {step}: delete {latest} if it is not of this run"
        )
    checkpoints.start_saving(about, state)


def check_rows(checkpoints: Checkpoints, rows_sha256: str) -> None:
    """Raises ConfigError where the latest checkpoint was trained on other rows: the stream of
    batches would not go on as it began.
    """
    saved = _open_step(checkpoints, None)[1]["rows_sha256"]
    if saved != rows_sha256:
        raise ConfigError(
            f"{checkpoints.directory} was trained on rows with checksum {saved[:8]}, and those now under data.directory have "
            f"{rows_sha256[:8]}: set data.directory to the former, or another --workdir"
        )


def restore(checkpoints: Checkpoints, abstract: Any, step: int | None = None) -> Any:
    """Returns the train state of `step` (the latest, by default), laid out by the shardings of
    `abstract`.

    Raises ConfigError where there is no such checkpoint; where its config, or a leaf's name, shape
    or dtype, is another (Orbax would cast silently); and where its bytes are not those that were
    saved. Raises OSError where the system does not let them be read.
    """
    path, about = _open_step(checkpoints, step)
    check_leaves(path, about["arrays"], abstract)
    return _restore(path, about["arrays"], abstract)


def restore_variables(checkpoints: Checkpoints, abstract: Any, step: int | None = None) -> Any:
    """Returns the model's variables alone of a checkpoint, as `restore` would give them; the
    optimizer's state is not read.
    """
    return restore_variables_and_step(checkpoints, abstract, step)[0]


def restore_variables_and_step(
    checkpoints: Checkpoints, abstract: Any, step: int | None = None
) -> tuple[Any, int]:
    """Returns the model's variables of a checkpoint and its step.

    A live run may delete the latest checkpoint while it is read. Where no step was asked for, the
    newer one is read instead.
    """
    wanted = abstract.variables
    for tries_left in reversed(range(_MAX_RETRIES)):
        try:
            path, about = _open_step(checkpoints, step)
            roots = tuple(f"{name}." for name in wanted)
            check_leaves(
                path,
                {name: array for name, array in about["arrays"].items() if name.startswith(roots)},
                wanted,
            )
            return _restore(path, about["arrays"], wanted), int(path.name)
        except _Removed:
            if step is not None or not tries_left:
                raise
    raise AssertionError  # the last try returns or raises


class _Removed(ConfigError):
    def __init__(self, path: Path):
        super().__init__(
            f"{path} was removed while it was read: choose another step, or set train.keep_last of the run to more"
        )


def _open_step(checkpoints: Checkpoints, step: int | None) -> tuple[Path, dict[str, Any]]:
    """The directory of a checkpoint and what it says about itself, which must be the run's."""
    steps = checkpoints.all_steps()
    if not steps or step not in (None, *steps):
        wanted = "" if step is None else f" of step {step}"
        choices = ", ".join(map(str, steps)) or "none yet"
        raise ConfigError(
            f"{checkpoints.directory} holds no checkpoint{wanted}: choose one of its steps ({choices})"
        )
    path = checkpoints.directory / str(steps[-1] if step is None else step)
    try:
        about = read_about(path)
    except FileNotFoundError:
        raise _Removed(path) from None
    # A run that goes on to more steps has checkpoints from before it was told so.
    differing = differing_fields(
        RunConfig.from_config_dict(about["config"]), checkpoints.config, allowed=("train.steps",)
    )
    if differing:
        raise ConfigError(
            f"{path} is of another config ({'; '.join(differing)}): use the config that it was saved with"
        )
    return path, about


def _restore(path: Path, arrays: dict[str, Any], abstract: Any) -> Any:
    """The arrays of `abstract` out of a checkpoint, with the checksums that they were saved with."""
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    arguments = ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)

    def read() -> tuple[Any, dict[str, Any]]:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            state = checkpointer.restore(path / "state", args=arguments)
            return state, describe(state)

    state, found = _call_orbax(read, lambda error: _not_restored(path, error))
    for name, array in found.items():
        if array != arrays[name]:
            raise damaged(path, f"{name} has not the checksum that was saved")
    return state


def check_leaves(path: Path, saved: dict[str, Any], expected: Any) -> None:
    """Raises ConfigError naming the first leaf whose presence, shape or dtype differs between a
    checkpoint and `expected`.
    """
    has = {name: f"{array['dtype']}{array['shape']}" for name, array in saved.items()}
    wants = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named_leaves(expected)}
    for name in sorted(has.keys() | wants.keys()):
        if has.get(name) != wants.get(name):
            raise ConfigError(
                f"{path} holds {name} as {has.get(name, 'nothing')}, and the config asks for {wants.get(name, 'nothing')}: "
                "use the config that it was saved with"
            )


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """Returns the dtype, shape and checksum of each leaf, under its dotted name."""
    leaves = list(_named_leaves(tree))
    numbers = checksums([leaf for _, leaf in leaves])
    return {
        name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "checksum": number}
        for (name, leaf), number in zip(leaves, numbers, strict=True)
    }


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Each leaf under its dotted path, whatever the containers on the way."""

    def part(key: Any) -> str:
        return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))

    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield ".".join(map(part, keys)), leaf


def _call_orbax(call: Callable[[], T], explain: Callable[[Exception], Exception]) -> T:
    """Returns what `call` does; of an error raises what `explain` makes of it."""
    try:
        return call()
    except _ORBAX_ERRORS as error:
        explained = explain(error)
    # What was still running for this call complains when it ends and is collected, which is here,
    # where `_Silence` hears it.
    time.sleep(0.05)
    gc.collect()
    raise explained


def _not_saved(path: Path, error: Exception) -> Exception:
    return OSError(f"{path} cannot be saved: {_system_words(error) or _first_cause(error)}")


def _not_restored(path: Path, error: Exception) -> Exception:
    if not (path / ABOUT_FILE).exists():
        return _Removed(path)
    if "Out of memory" in str(error) or isinstance(error, MemoryError):
        return error
    if words := _system_words(error):
        return OSError(f"{path} cannot be read: {words}")
    return damaged(path, _first_cause(error))


def _first_cause(error: BaseException) -> str:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _system_words(error: BaseException | None) -> str:
    """What the operating system said, out of an error and what it came from; empty where it said
    nothing but that there is no such file.
    """
    while error is not None:
        if isinstance(error, OSError) and error.strerror and error.errno != errno.ENOENT:
            return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if (told := re.search(r"os_error_code='(\d+)'", str(error))) and int(
            told[1]
        ) != errno.ENOENT:
            return os.strerror(int(told[1]))
        error = error.__cause__ or error.__context__
    return ""
