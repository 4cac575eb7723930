"""Saves and restores a run's state with Orbax, and refuses what would not be restored exactly.

The checkpoint of step s is the directory `checkpoints/s`. It holds `state`, the arrays, and
`about.json`, which is written last: format_version, step, the run's config, its layer groups, the
checksum of the rows that it was trained on, the dtype, shape and checksum of each array, and how
many seconds the save took.
"""

import concurrent.futures
import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe.config import ConfigError, RunConfig
from moe.storage.owner import Check, LostRun, unchecked
from moe.storage.paths import (
    RunPath,
    absolute,
    cloud_errors,
    explain,
    is_lost,
    make_directory,
    remove_tree,
)
from moe.workdir.checksum import checksums
from moe.workdir.identity import (
    ABOUT_FILE,
    checkpoint_steps,
    damage_error,
    differing_fields,
    read_about,
    read_config,
    saved_step,
    unfinished_steps,
    write_about,
)
from moe.workdir.orbax_errors import (
    RemovedWhileRead,
    SilencedLog,
    call_orbax,
    restore_error,
    save_error,
)

# Orbax measures a save by the wall clock and gives up after 20 minutes. A clock that is corrected
# meanwhile would end the save, so the limit is out of reach.
_SAVE_TIMEOUT = 10**9
# A live run may replace its latest checkpoint while it is read. A reader then tries the newer one,
# at most this many times.
_MAX_RETRIES = 10


class Checkpoints:
    """Lists the complete checkpoints of a run, and writes new ones in the background.

    It must be closed, which `with` does. `check` raises an error if another process owns the run.
    """

    def __init__(self, workdir: RunPath, config: RunConfig, check: Check = unchecked):
        self.directory, self.config = absolute(workdir / "checkpoints"), config
        self.longest_save_seconds = 0.0  # of the saves of this start, and the one restored
        self._check = check
        # Hosts that wait for directories made in the background give up after 5 minutes.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        if jax.process_count() == 1:
            options.timeout_secs = _SAVE_TIMEOUT
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(), async_options=options
        )
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future[None] | None = None
        self._has_warned = False
        self._silenced_log = SilencedLog()

    def all_steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, in order."""
        return checkpoint_steps(self.directory)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None if there is none."""
        return max(self.all_steps(), default=None)

    def start_saving(self, about: dict[str, Any], state: Any) -> None:
        """Starts writing a checkpoint of `state`, described by `about`.

        Raises OSError if this checkpoint, or the one before it, cannot be written.
        """
        self.wait()
        self._check()
        path, begin = self.directory / str(about["step"]), time.monotonic()

        def start() -> None:
            if jax.process_index() == 0:
                make_directory(path)
            self._checkpointer.save(path / "state", args=ocp.args.PyTreeSave(state), force=True)

        call_orbax(start, lambda error: self._save_error(path, error))
        self._saving = self._background.submit(self._finish, path, about, begin)

    def wait(self) -> None:
        """Waits until nothing is being saved. Raises OSError if a checkpoint was not written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Finishes what is being saved. Raises OSError if it cannot be written."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()
            self._silenced_log.end()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Where the store does not answer, what is being saved would be tried for a quarter of an
        # hour.
        if not is_lost(self.directory, error):
            self.close()

    def _finish(self, path: RunPath, about: dict[str, Any], begin: float) -> None:
        """Completes a checkpoint once its arrays are written, then deletes old checkpoints."""

        explain = lambda error: self._save_error(path, error)
        call_orbax(self._checkpointer.wait_until_finished, explain)
        seconds = time.monotonic() - begin
        self.longest_save_seconds = max(self.longest_save_seconds, seconds)
        about = about | {"save_seconds": seconds}
        if jax.process_index() == 0:
            call_orbax(lambda: write_about(path, about, self._check), explain)
            self._delete_old_ones()

    def _save_error(self, path: RunPath, error: Exception) -> Exception:
        """Returns the error to raise for a checkpoint that could not be written.

        A process that has taken the run over may have deleted what this one was writing.
        """
        try:
            self._check()
        except LostRun as lost:
            return lost
        except (OSError, *cloud_errors()):
            pass  # a store that cannot be reached does not say who owns the run
        return save_error(path, error)

    def _delete_old_ones(self) -> None:
        """Deletes checkpoints that the config does not keep, and unfinished ones."""
        train = self.config.train
        old = [
            step
            for step in self.all_steps()[: -train.keep_last]
            if not train.keep_every or step % train.keep_every
        ]
        for step in old + unfinished_steps(self.directory):
            path = self.directory / str(step)
            self._check()
            try:
                # about.json goes first, so that a reader can tell a checkpoint that is being
                # deleted from one that is damaged.
                (path / ABOUT_FILE).unlink(missing_ok=True)
                remove_tree(path)
            except (OSError, *cloud_errors()) as error:
                if not self._has_warned:
                    logging.warning(
                        "%s cannot be deleted (%s): training goes on, and keeps it",
                        path,
                        explain(error),
                    )
                self._has_warned = True


def open_checkpoints(workdir: RunPath, config: RunConfig, check: Check = unchecked) -> Checkpoints:
    """Opens a run's checkpoints for writing, before each of which `check` is called.

    Each save then deletes the old ones, except the `keep_last` latest and the multiples of
    `keep_every`. Opening deletes nothing.
    """
    checkpoints = Checkpoints(workdir, config, check)
    for step in unfinished_steps(checkpoints.directory):
        logging.warning(
            "%s/%s has no %s: it was not finished, and is ignored",
            checkpoints.directory,
            step,
            ABOUT_FILE,
        )
    return checkpoints


def read_checkpoints(workdir: RunPath) -> Checkpoints:
    """Opens a run's checkpoints for reading only: nothing is created or deleted."""
    return Checkpoints(workdir, read_config(workdir))


def save(
    checkpoints: Checkpoints,
    config: RunConfig,
    rows_sha256: str,
    state: Any,
    validation_sha256: str | None = None,
) -> None:
    """Starts writing a train state, which may be donated as soon as this returns.

    The checksums are those of the rows that it was trained on, and that evaluations read.

    A state that is saved already is not written again. Raises ConfigError if the directory holds
    another state of this step, or a later step: a resumed run would take that one instead. Raises
    OSError if this checkpoint or the one before it cannot be written.
    """
    checkpoints.wait()
    step, latest = int(state.step), checkpoints.latest_step()
    about = {
        "step": step,
        "config": config.to_dict(),
        "layer_groups": config.model.layer_groups,
        "rows_sha256": rows_sha256,
        "validation_sha256": validation_sha256,
        "arrays": describe(state),
    }
    if latest is not None and step <= latest:
        path = checkpoints.directory / str(latest)
        if step == latest and read_about(path)["arrays"] == about["arrays"]:
            return
        raise ConfigError(
            f"{checkpoints.directory} holds step {latest} already, and this run is at step {step}: "
            f"delete {latest} if it is not of this run"
        )
    checkpoints.start_saving(about, state)


def check_rows(
    checkpoints: Checkpoints, rows_sha256: str, step: int, validation_sha256: str | None = None
) -> None:
    """Raises ConfigError if the run of the checkpoint of `step` had other rows than these.

    The stream of batches would not continue as it began, or the evaluations could not be compared.
    Rows of validation are not compared if one of the checksums is not known, as in checkpoints of
    older versions.
    """
    about = _open_step(checkpoints, step)[1]
    pairs = {
        "trained": (about["rows_sha256"], rows_sha256),
        "evaluated": (about.get("validation_sha256") or validation_sha256, validation_sha256),
    }
    for verb, (saved, now) in pairs.items():
        if now is not None and saved != now:
            raise ConfigError(
                f"{checkpoints.directory} was {verb} on rows with checksum {saved[:8]}, and those "
                f"now under data.directory have {now[:8]}: "
                "set data.directory to the former, or another workdir"
            )


def restore(checkpoints: Checkpoints, abstract: Any, step: int | None = None) -> Any:
    """Returns the train state of `step` (by default the latest), sharded as `abstract` says.

    Raises ConfigError if there is no such checkpoint, if its config or the name, shape or dtype of
    a leaf differs (Orbax would cast it silently), or if its bytes are not those that were saved.
    Raises OSError if the system does not let them be read.
    """
    path, about = _open_step(checkpoints, step)
    check_leaves(path, about["arrays"], abstract)
    return _restore(path, about["arrays"], abstract)


def restore_variables(checkpoints: Checkpoints, abstract: Any, step: int | None = None) -> Any:
    """Returns only the model's variables of a checkpoint, without reading the optimizer's state."""
    return restore_variables_and_step(checkpoints, abstract, step)[0]


def restore_variables_and_step(
    checkpoints: Checkpoints, abstract: Any, step: int | None = None
) -> tuple[Any, int]:
    """Returns the model's variables of a checkpoint, and its step.

    A live run may delete the latest checkpoint while it is read. If no step was asked for, the
    newer checkpoint is read instead.
    """
    wanted = abstract.variables
    roots = tuple(f"{name}." for name in wanted)
    for tries_left in reversed(range(_MAX_RETRIES)):
        try:
            path, about = _open_step(checkpoints, step)
            arrays = about["arrays"]
            saved = {name: array for name, array in arrays.items() if name.startswith(roots)}
            check_leaves(path, saved, wanted)
            return _restore(path, arrays, wanted), int(path.name)
        except RemovedWhileRead:
            if step is not None or not tries_left:
                raise
    raise AssertionError  # the last try returns or raises


def _open_step(checkpoints: Checkpoints, step: int | None) -> tuple[RunPath, dict[str, Any]]:
    """Returns the directory of a checkpoint and its about.json, whose config must be the run's."""
    path = checkpoints.directory / str(saved_step(checkpoints.directory.parent, step))
    try:
        about = read_about(path)
    except FileNotFoundError:
        raise RemovedWhileRead(path) from None
    checkpoints.longest_save_seconds = max(
        checkpoints.longest_save_seconds, about.get("save_seconds", 0.0)
    )
    # A run may be continued to more steps, so its older checkpoints may say fewer.
    saved_config = RunConfig.from_config_dict(about["config"])
    differing = differing_fields(saved_config, checkpoints.config, allowed=("train.steps",))
    if differing:
        raise ConfigError(
            f"{path} is of another config ({'; '.join(differing)}): "
            "use the config that it was saved with"
        )
    return path, about


def _restore(path: RunPath, arrays: dict[str, Any], abstract: Any) -> Any:
    """Returns the arrays of `abstract` from a checkpoint, and compares their checksums."""
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    arguments = ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)

    def read() -> tuple[Any, dict[str, Any]]:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            state = checkpointer.restore(path / "state", args=arguments)
            return state, describe(state)

    state, found = call_orbax(read, lambda error: restore_error(path, error))
    for name, array in found.items():
        if array != arrays[name]:
            raise damage_error(path, f"{name} does not have the checksum that was saved")
    return state


def check_leaves(path: RunPath, saved: dict[str, Any], expected: Any) -> None:
    """Raises ConfigError for the first leaf that differs between a checkpoint and `expected`.

    Leaves differ if only one side has them, or if their shapes or dtypes differ.
    """
    has = {name: f"{array['dtype']}{array['shape']}" for name, array in saved.items()}
    wants = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named_leaves(expected)}
    for name in sorted(has.keys() | wants.keys()):
        if has.get(name) != wants.get(name):
            raise ConfigError(
                f"{path} holds {name} as {has.get(name, 'nothing')}, and the config asks for "
                f"{wants.get(name, 'nothing')}: use the config that it was saved with"
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
    """Yields each leaf with its dotted path, whatever kinds of containers hold it."""

    def part(key: Any) -> str:
        return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))

    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield ".".join(map(part, keys)), leaf
