"""Keeps results of launch.evaluate in a run directory, where the model card finds them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moe.config import ConfigError
from moe.storage.paths import RunPath, make_directory, write_whole

DIRECTORY = "evaluations"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Says what was evaluated, and holds what came out."""

    step: int
    values: Mapping[str, Any]  # metrics by name; of tasks, the harness's results of each
    split: str | None = None  # None: the validation split, or all documents of text files
    datasets: tuple[str, ...] = ()  # empty: the run's own
    slice_by: str | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None  # how many examples of each task
    num_fewshot: int | None = None

    @property
    def subject(self) -> dict[str, Any]:
        """Returns what was evaluated: all fields but the step and the values."""
        fields = dataclasses.asdict(self)
        return {name: fields[name] for name in fields if name not in ("step", "values")}


def record_evaluation(workdir: RunPath, evaluation: Evaluation) -> RunPath:
    """Writes an evaluation into a run directory, and returns the path of its file.

    It replaces an earlier evaluation of the same subject, of whatever step.
    """
    subject = json.dumps(evaluation.subject, sort_keys=True)
    directory = workdir / DIRECTORY
    make_directory(directory)
    path = directory / f"{hashlib.sha256(subject.encode()).hexdigest()[:12]}.json"
    write_whole(path, json.dumps(dataclasses.asdict(evaluation), indent=2, allow_nan=False) + "\n")
    return path


def read_evaluations(workdir: RunPath) -> list[Evaluation]:
    """Returns the evaluations that a run directory holds, by data sets, slices and tasks.

    Raises ConfigError for a file that this module has not written.
    """
    found = []
    for path in (workdir / DIRECTORY).glob("*.json"):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            lists = {name: tuple(fields[name]) for name in ("datasets", "tasks")}
            evaluation = Evaluation(**(fields | lists))
            _ = evaluation.values.items(), int(evaluation.step)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise ConfigError(
                f"{path} is damaged: delete it, and run launch.evaluate --record again"
            ) from None
        found.append(evaluation)
    return sorted(found, key=lambda one: json.dumps(one.subject, sort_keys=True))
