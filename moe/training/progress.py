"""Shows a run's progress in one line on stderr, with what the run is waiting for.

A run must not fail because its progress cannot be shown. If stderr is closed or its disk is full,
nothing more is written to it, and training goes on. Commands load this file before they load JAX.
"""

import io
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm


class Stream:
    """Writes text to a stream, and drops what cannot be written.

    Nothing can be written to a pipe whose reader has left, as in `2>&1 | head -1`. A character that
    the stream's encoding lacks, as ASCII does under LC_ALL=C, is written as its escape.
    """

    def __init__(self, stream: TextIO | None):
        # It is None if it was closed before Python began (`2>&-`).
        self._stream = _Nowhere() if stream is None else stream
        self.is_abandoned = False  # whether the reader of a pipe has left

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            # The error itself calls every encoding of a table, such as KOI8-R, "charmap".
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._abandon(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._abandon(error)

    def _abandon(self, error: OSError) -> None:
        """Sends all later text nowhere if nobody can read it.

        The buffer still holds text, and Python would fail to write it at exit.
        """
        if isinstance(error, BrokenPipeError):
            self.is_abandoned = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Nowhere(io.TextIOBase):
    """Drops all text, in place of a stderr that was closed."""

    def write(self, text: str) -> int:
        return len(text)


class Bar:
    """Shows the progress bar of a run: its steps, the time left, and the newest metrics.

    Text before the bar says what the run is doing while it takes no steps. The first step compiles
    the program, so until it is done there is only this text, without a bar and an estimate.
    """

    def __init__(self, steps: int, *, shown: bool = True):
        # With smoothing=0, the time left follows from the mean time of a step since the first one.
        # That mean includes the evaluations between the steps.
        self._bar = tqdm(
            total=steps,
            unit="step",
            smoothing=0,
            bar_format="{desc}",
            file=Stream(sys.stderr),
            disable=not shown,
        )
        self._stepped = False

    def __enter__(self) -> "Bar":
        for handler in logging.getLogger().handlers:
            handler.addFilter(self._make_room)
        return self

    def __exit__(self, *exception: object) -> None:
        for handler in logging.getLogger().handlers:
            handler.removeFilter(self._make_room)
        if self._stepped:
            self._bar.set_description_str("", refresh=False)  # the run does nothing any more
        self._bar.close()

    def show(self, text: str) -> None:
        """Says what the run is doing, until the next step is done."""
        self._bar.set_description_str(text)

    def step(self, step: int) -> None:
        """Moves the bar to a step that is done. The time left is counted from the first one."""
        self._bar.set_description_str("", refresh=False)
        if self._stepped or self._bar.disable:
            self._bar.update(step - self._bar.n)
            return
        self._stepped, self._bar.bar_format = True, None
        self._bar.initial = self._bar.n = step
        self._bar.unpause()
        self._bar.start_t = self._bar.last_print_t
        self._bar.refresh()

    def _make_room(self, _: logging.LogRecord) -> bool:
        """Clears the line before a log message is written on it. The next step shows it again."""
        self._bar.clear()
        return True

    def show_metrics(self, texts: Mapping[str, str]) -> None:
        """Puts the newest metrics behind the bar."""
        self._bar.set_postfix(texts)
