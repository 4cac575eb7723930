"""Writes a run's model card: what its files say, and marked places for what a person must say.

The sections are those of Mitchell et al. 2019 under the headings that Hugging Face gives them. A
card that exists is written again, and what a person wrote between the marks is kept.
"""

import json
import re
from typing import Any

from launch import report_card_sections as sections
from launch.recorded_evaluations import read_evaluations
from launch.report_card_evaluation import evaluation, recorded_evaluations
from launch.report_card_sections import Facts
from launch.series import Metrics
from moe.config import ConfigError, RunConfig
from moe.storage.paths import RunPath, resolve, write_whole
from moe.workdir.identity import checkpoint_steps, read_about, read_config
from moe.workdir.source import read_origin

CARD_FILE = "MODEL_CARD.md"
_MARKED = re.compile(r"<!-- begin (\w+) -->\n(.*?)\n?<!-- end \1 -->", re.DOTALL)
_REQUEST = "*To be written by a person:"  # begins the text of a place that is still empty
# What a person must write, by the names of the marks.
_REQUESTS = {
    "summary": "one paragraph that says what this model is for.",
    "details": "developers, license, languages of the text, contact.",
    "uses": "intended uses and users, and uses that are out of scope.",
    "risks": "known biases of the data, harms, ethical considerations, advice to users.",
    "evaluation": "what these results mean, and results that no command here can give.",
    "citation": "how to cite this model.",
}
_NOTE = (
    "<!-- `python -m launch.report --card` writes this file from the files of the run, and writes "
    "it again when it is asked to. It keeps what stands between a `begin` and its `end`, and "
    "nothing else. -->"
)
_ANY_MARK = re.compile(r"<!-- (?:begin|end) \w+ -->")


def write_card(workdir: RunPath, metrics: Metrics, environments: list[dict[str, Any]]) -> RunPath:
    """Writes MODEL_CARD.md of a run, and returns its path.

    Raises ConfigError if there is such a file without the marks of this command, and for a custom
    task, of whose model nothing is known here.
    """
    path = workdir / CARD_FILE
    written = read_marked(path)
    config = read_config(workdir)
    if config.task == "custom":
        raise ConfigError(
            f"task='custom' in {workdir} trains a model of its own, which --card cannot describe: "
            "leave out --card"
        )
    sha256 = _rows_sha256(workdir)
    facts = Facts(
        name=resolve(workdir).name,
        config=config,
        metrics=metrics,
        environments=environments,
        rows_sha256=sha256,
        rows=_find_rows(config, sha256),
        origin=read_origin(workdir),
        evaluations=read_evaluations(workdir),
    )
    write_whole(path, card(facts, written))
    return path


def read_marked(path: RunPath) -> dict[str, str]:
    """Returns what stands between the marks of a card, by their names; nothing without a card."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    written = dict(_MARKED.findall(text))
    if not written or len(_ANY_MARK.findall(text)) != 2 * len(written):
        raise ConfigError(
            f"{path} lacks the marks `begin NAME` and `end NAME` around what a person wrote, which "
            "would be lost: restore the marks, or move the file away"
        )
    return written


def card(facts: Facts, written: dict[str, str]) -> str:
    """Returns the text of a card, with the texts that a person has `written` in their places."""
    left = dict(written)

    def person(name: str) -> str:
        """Returns a marked place with what a person wrote there, or with what they should write."""
        text = left.pop(name, _REQUEST)
        if name in _REQUESTS and text.startswith(_REQUEST):
            text = f"{_REQUEST} {_REQUESTS[name]}*"
        return f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->"

    parts = [
        f"# Model Card for {facts.name}",
        _NOTE,
        person("summary"),
        "## Model Details",
        *sections.details(facts),
        person("details"),
        "## Uses",
        person("uses"),
        "## Bias, Risks, and Limitations",
        *sections.limits(facts),
        person("risks"),
        "## How to Get Started with the Model",
        "```\n"
        f"python -m launch.generate --workdir=PATH/{facts.name} --prompt=TEXT\n"
        f"python -m launch.evaluate --workdir=PATH/{facts.name}\n"
        "```",
        *sections.training(facts),
        *evaluation(facts),
        *recorded_evaluations(facts),
        person("evaluation"),
        *sections.routing(facts),
        *sections.compute(facts),
        "## Citation",
        person("citation"),
    ]
    # A mark that is not one of these is a person's own.
    others = [person(name) for name in dict(left)]
    return "\n\n".join([*parts, *(["## More Information", *others] if others else [])]) + "\n"


def _rows_sha256(workdir: RunPath) -> str | None:
    """Returns the checksum of the rows of the latest checkpoint."""
    directory = workdir / "checkpoints"
    steps = checkpoint_steps(directory)
    return read_about(directory / str(steps[-1]))["rows_sha256"] if steps else None


def _find_rows(config: RunConfig, sha256: str | None) -> dict[str, Any]:
    """Returns the metadata of the prepared rows with a checksum, if they are on this machine."""
    for path in sorted(config.data.path.glob("rows/*/metadata.json")):
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
            if metadata["sha256"] == sha256:
                return metadata
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue  # rows of another version, or of another user
    return {}
