"""Writes TensorBoard's copy of a run's metrics, whose failure never stops the run.

tensorboardX's own SummaryWriter hands events to a thread through a short queue. That thread ends at
the first error, such as a full disk, and the run would then wait forever for room in the queue. So
events are written here without another thread.

In an object store nothing can be appended to a file. There the events go to a local file, which is
copied as it grows, and is followed by another one when it is large.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

# The generated module defines its classes when it is imported, where a type checker sees none.
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from moe.storage.lines import PART_BYTES
from moe.storage.owner import Check, unchecked
from moe.storage.paths import RunPath, explain, write_whole

FLUSH_SECONDS = 10  # how long a reader may have to wait for new values


class TensorBoard:
    """Appends scalars to a new event file in `directory`, for a run that starts at `step`.

    The first error is logged as a warning. From then on nothing is written. `check` is called
    before each write, and its error, that another process owns the run now, is raised.
    """

    def __init__(self, directory: RunPath, step: int, check: Check = unchecked):
        self._directory, self._flushed = directory, time.monotonic()
        self._check = check
        self._writer: RecordWriter | None = None
        self._copied = None if isinstance(directory, Path) else TemporaryDirectory()
        self._files = 0  # how many files were begun
        # tensorboardX would warn of each NaN, which the metrics show anyway.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        try:
            self._check()
            self._writer = self._begin_file()
            # This event hides what an earlier start wrote about later steps.
            start = SessionLog(status=SessionLog.START)
            _add(self._writer, Event(wall_time=time.time(), step=step + 1, session_log=start))
            self._flush(self._writer)
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scalars of a step. Readers see them after `FLUSH_SECONDS`, at the next call."""
        if self._writer is None:
            return
        if not self._copied:  # what is written may reach the file at once
            self._check()
        try:
            for name, value in values.items():
                summary = scalar(name, value)
                _add(self._writer, Event(wall_time=time.time(), step=step, summary=summary))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush(self._writer)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Writes what is left and closes the file. Calling it again does nothing."""
        if self._writer is not None:
            try:
                self._flush(self._writer)
            except OSError as error:
                self._give_up(error)
            else:
                self._end()

    def _give_up(self, error: OSError) -> None:
        """Warns once, and closes the file so that nothing more is written."""
        logging.warning(
            "%s gets no more events (%s): metrics.jsonl, which it copies, goes on",
            self._directory,
            explain(error),
        )
        self._end()

    def _begin_file(self) -> RecordWriter:
        """Returns the writer of a new file, whose first event says which format it has."""
        if isinstance(self._directory, Path):
            self._directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names, which begin with
        # the time.
        process = f"{socket.gethostname()}.{os.getpid()}"
        number, self._files = f".{self._files:06}" if self._files else "", self._files + 1
        name = f"events.out.tfevents.{time.time():.0f}.{process}{number}"
        directory = self._copied.name if self._copied else str(self._directory)
        writer = RecordWriter(os.path.join(directory, name))
        _add(writer, Event(wall_time=time.time(), file_version="brain.Event:2"))
        return writer

    def _flush(self, writer: RecordWriter) -> None:
        """Lets readers see what was written. Raises OSError."""
        self._check()
        writer.flush()
        self._flushed = time.monotonic()
        if self._copied:
            file = Path(writer.path)
            write_whole(self._directory / file.name, file.read_bytes())
            if file.stat().st_size > PART_BYTES:
                writer.close()
                self._writer = self._begin_file()

    def _end(self) -> None:
        """Closes the file, and deletes it if it was copied."""
        if self._writer is not None:
            # `close` writes what is left, and closes the file even if that fails.
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None
        if self._copied:
            self._copied.cleanup()


def _add(writer: RecordWriter, event: Event) -> None:
    """Appends one event to a file."""
    writer.write(event.SerializeToString())
