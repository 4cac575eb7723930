"""Shows how far a sweep is, in one line on stderr: runs, FLOPs, the time left, and losses."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch.sweep_table import Row
from moe.storage.paths import RunPath
from moe.training.progress import Stream
from moe.workdir.tracking import METRICS_FILE

DONE = ("finished", "diverged")  # a run in one of these states is not trained again
_TAIL_BYTES = 8192  # of metrics.jsonl: more than its last two lines have
_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}FLOP {elapsed}<{remaining}{postfix}"


class Progress:
    """Shows the progress bar of a sweep. It counts FLOPs, since runs differ in length.

    The time left follows from the FLOPs per second since this process began, so that the time in
    which runs start and compile is in it.
    """

    def __init__(
        self, rows: Sequence[Row], first_steps: Sequence[int], workdir: RunPath, *, shown: bool
    ):
        """Begins with the rows of all runs, of which some may be done.

        `first_steps` are the steps that they start from: a fork does not train all of its steps.
        """
        self._rows = {row["run"]: row for row in rows}
        self._first_steps = {
            row["run"]: first for row, first in zip(rows, first_steps, strict=True)
        }
        self._workdir, self._shown = workdir, shown
        self._bar = tqdm(
            total=sum(self._flops(row["run"], row["steps"]) for row in rows),
            initial=self._done_flops(),
            unit_scale=True,
            smoothing=0,
            bar_format=_FORMAT,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            file=Stream(sys.stderr),
            disable=not shown,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def _flops(self, name: str, step: int) -> float:
        """Returns the FLOPs that a run has spent up to a step."""
        row = self._rows[name]
        return max(0, step - self._first_steps[name]) * row["flops"] / row["steps"]

    def _done_flops(self) -> float:
        done = [row for row in self._rows.values() if row["status"] in DONE]
        return sum(self._flops(row["run"], row["steps"]) for row in done)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._shown:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def end(self, row: Row, seconds: float) -> None:
        """Says how a run has ended."""
        self._rows[row["run"]] = row
        loss = "" if row["loss"] is None else f", loss {row['loss']:.4f}"
        reason = "" if row["reason"] is None else f": {row['reason']}"
        self.say(f"{row['status']}: {row['run']}{loss}, {seconds:.0f} s{reason}")

    def show(self, running: Sequence[str]) -> None:
        """Moves the bar to what is done, with the steps of the runs that are in training."""
        flops, texts = self._done_flops(), []
        for name in running:
            step, loss = last_step(self._workdir / name)
            steps = self._rows[name]["steps"]
            flops += self._flops(name, step)
            texts.append(f"{name} {step}/{steps}" + ("" if loss is None else f" loss {loss:.3f}"))
        num_done = sum(row["status"] in DONE for row in self._rows.values())
        text = f"{num_done} of {len(self._rows)} runs"
        self._bar.set_description_str(text, refresh=False)
        self._bar.set_postfix_str("; ".join(texts), refresh=False)
        self._bar.update(flops - self._bar.n)


def last_step(workdir: RunPath) -> tuple[int, float | None]:
    """Returns the last step that a run has logged and its training loss: (0, None) if none.

    Only the end of the file is read. A run in an object store is not looked at while it trains.
    """
    path = workdir / METRICS_FILE
    if not isinstance(path, Path) or not path.exists():
        return 0, None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        values = _parse(line)
        if "train/loss" in values:
            loss = values["train/loss"]
            return int(values["step"]), loss if isinstance(loss, float) else None
    return 0, None


def _parse(line: str) -> dict[str, Any]:
    """Returns the values of a line, or none if it is being written or was cut."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
