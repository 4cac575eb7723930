"""TensorBoard's copy of a run's metrics. It may end, as on a full disk, and the run neither waits
for it nor ends with it.

tensorboardX's SummaryWriter gives events to a thread through a short queue. That thread ends at the
first error, and whoever adds the next events waits for room in the queue for ever. So events are
written here by the thread that has them.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

FLUSH_SECONDS = 10


class TensorBoard:
    """Appends scalars to a new event file; from the first error on, which is told in a warning, it
    does nothing.
    """

    def __init__(self, directory: Path, step: int):
        self._directory, self._flushed = directory, time.monotonic()
        self._writer: RecordWriter | None = None
        logging.getLogger("tensorboardX.x2num").setLevel(
            logging.ERROR
        )  # it would warn of each NaN, which the metrics show
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads a directory's files in the order of their names.
            self._writer = RecordWriter(
                str(
                    directory
                    / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
                )
            )
            self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
            # What an earlier start wrote of later steps is hidden from here on.
            self._add(
                Event(
                    wall_time=time.time(),
                    step=step + 1,
                    session_log=SessionLog(status=SessionLog.START),
                )
            )
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a step's scalars; a reader sees them within `FLUSH_SECONDS` of a later call."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._add(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Writes what is left. Calling it again does nothing."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                self._give_up(error)
            else:
                self._writer.close()
                self._writer = None

    def _add(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())

    def _give_up(self, error: OSError) -> None:
        logging.warning(
            "%s gets no more events (%s): metrics.jsonl, which it copies, goes on",
            self._directory,
            error.strerror,
        )
        if self._writer is not None:
            with contextlib.suppress(
                OSError
            ):  # closing writes what is left, and closes the file even where it cannot
                self._writer.close()
        self._writer = None
