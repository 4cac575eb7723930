"""Writes a trace of some steps of a run, which Perfetto shows."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from moe.storage.owner import Check, unchecked
from moe.storage.paths import RunPath, make_directory, write_whole


class Profile:
    """Traces some steps of this process, and writes the trace into a folder.

    Each process of a job has a file of its own there. Perfetto (https://ui.perfetto.dev) opens it.
    """

    def __init__(self, directory: RunPath, steps: range, check: Check):
        name = f"steps-{steps[0]}-{steps[-1]}-process-{jax.process_index():05d}.json.gz"
        self.path = directory / name
        self._check = check  # raises an error if another job owns the run now
        self._steps, self._files = steps, tempfile.TemporaryDirectory()
        self._is_running = False

    def begin(self, step: int) -> None:
        """Starts the trace if this step, which is about to be taken, is the first one of it."""
        if step == self._steps[0]:
            jax.profiler.start_trace(self._files.name, create_perfetto_trace=True)
            self._is_running = True

    def end(self, step: int, metrics: Any) -> None:
        """Writes the trace once the last step of it, which has these metrics, is done."""
        if step == self._steps[-1] and self._is_running:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Writes the steps that were traced, if the trace was not written yet."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
            (trace,) = Path(self._files.name).rglob("perfetto_trace.json.gz")
            self._check()
            make_directory(self.path.parent)
            write_whole(self.path, trace.read_bytes())
            logging.warning("%s holds the trace: open it at https://ui.perfetto.dev", self.path)
        self._files.cleanup()


@contextlib.contextmanager
def open_profile(
    workdir: RunPath, steps: range | None, start: int, check: Check = unchecked
) -> Iterator[Profile | None]:
    """Yields the profile of a run that goes on from step `start`, or None if nothing is traced."""
    if steps is None:
        yield None
        return
    if start >= steps[0]:
        logging.warning("step %d is done already: nothing is traced", steps[0])
    with contextlib.closing(Profile(workdir / "profile", steps, check)) as profile:
        yield profile
