"""The HTML of a run's report: one page without scripts.

The page needs nothing but the figures beside it. Whatever comes from a file (names, config values,
commands) is escaped.
"""

import dataclasses
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.html_page import table, whole_page
from launch.plotting import Drawing, picture_html
from launch.report_plots import HEADLINES
from launch.series import AllSeries
from moe.config import RunConfig
from moe.data.rows import source_line

CARD_LENGTH = 9  # characters for which a card of the headlines has room


@dataclasses.dataclass
class Section:
    """Figures under one heading, and a sentence about them."""

    heading: str
    drawings: list[Drawing]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What the page says of a run beside its metrics."""

    name: str
    step: int  # the last one that was logged
    config: dict[str, Any]  # as config.json has it
    environments: list[dict[str, Any]]  # one for each start, as environment.jsonl has them


def page(run: RunFacts, metrics: AllSeries, sections: Sequence[Section]) -> str:
    """Returns the whole page of a run."""
    parts = [_header(run), _headlines(metrics)]
    if run.environments and (sources := run.environments[-1].get("sources")):
        parts.append(_sources(sources))
    parts += [_section(section) for section in sections if section.drawings or section.note]
    columns = ("metric", "last", "at step", "lowest", "highest")
    parts.append("<h2>Numbers</h2>\n" + table(columns, _numbers(metrics)))
    note = "<p class=muted>Values that differ from the defaults are in bold.</p>"
    parts.append(f"<h2>Config</h2>\n{note}\n" + _config(run.config))
    if run.environments:
        environments = "".join(map(_environment, run.environments))
        parts.append(f"<h2>Environment</h2>\n{environments}")
    return whole_page(run.name, "\n".join(parts))


def _header(run: RunFacts) -> str:
    """The run's name, and one line that says how far it is, on what, and since when."""
    train, data = run.config["train"], run.config["data"]
    tokens = run.step * train["batch_size"] * data["sequence_length"]
    facts = [f"step {run.step:,} of {train['steps']:,}", f"{tokens:,} tokens"]
    if run.environments:
        devices = run.environments[-1].get("devices")
        if isinstance(devices, dict) and isinstance(devices.get("kinds"), list):
            kinds = " and ".join(map(str, devices["kinds"]))
            facts.append(f"{devices.get('count')} × {kinds}")
        time = str(run.environments[0].get("time", "unknown"))
        facts.append(f"started {time[:16].replace('T', ' ')} UTC")
    subtitle = html.escape(" · ".join(facts))
    return f"<h1>{html.escape(run.name)}</h1>\n<p class=muted>{subtitle}</p>"


def _headlines(metrics: AllSeries) -> str:
    """A card with the last value of each headline that the run has logged."""
    cards = []
    for headline in HEADLINES:
        if headline.metric in metrics:
            value = _headline_value(metrics[headline.metric].values[-1], headline.form)
            text = f"<dt>{headline.label}</dt><dd>{value}<small>{headline.unit}</small></dd>"
            cards.append(f"<div class=card>{text}</div>")
    return f"<dl class=headlines>{''.join(cards)}</dl>"


def _headline_value(value: float, form: str) -> str:
    """Returns a value in the form of its headline, or shorter where a card has no room for that."""
    text = form.format(value)
    if len(text) <= CARD_LENGTH or not math.isfinite(value):
        return text
    percent = "%" if form.endswith("%}") else ""
    value = 100 * value if percent else value
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if size <= abs(value) < 1e15:
            return f"{value / size:.1f}{suffix}{percent}"
    return f"{value:.3g}{percent}"


def _section(section: Section) -> str:
    """A heading, its note and its figures."""
    parts = [f"<h2>{html.escape(section.heading)}</h2>\n"]
    if section.note:
        parts.append(f"<p class=muted>{html.escape(section.note)}</p>\n")
    if section.drawings:
        figures = (
            f"<figure class=card>{picture_html(drawing)}</figure>" for drawing in section.drawings
        )
        parts.append(f"<div class=plots>{''.join(figures)}</div>")
    return "".join(parts)


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    """A line for each source: how much of it the run reads, and how it was packed."""
    lines = "".join(f"<li>{html.escape(source_line(source))}</li>" for source in sources)
    return f"<h2>Data</h2>\n<ul>{lines}</ul>"


def _numbers(metrics: AllSeries) -> Iterator[tuple[str, ...]]:
    """The rows of the table of numbers: last, lowest and highest value of each metric."""
    for name, (steps, values) in sorted(metrics.items()):
        finite = values[np.isfinite(values)]
        lowest, highest = (finite.min(), finite.max()) if len(finite) else (math.nan, math.nan)
        yield name, _number(values[-1]), f"{steps[-1]:,}", _number(lowest), _number(highest)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def _config(config: dict[str, Any]) -> str:
    """A card for each group of fields: model, model.attention, model.moe, and so on."""
    defaults = dict(_groups(RunConfig().to_dict(), "run"))
    cards = []
    for name, fields in _groups(config, "run"):
        default: Mapping[str, Any] = defaults.get(name, {})
        # Within the card of a nested group, a field has the group's own name before it.
        prefix = "".join(f"{part}." for part in name.split(".")[1:])
        rows = "".join(
            _config_row(prefix + field, value, default.get(field))
            for field, value in fields.items()
        )
        cards.append(f"<div class=card><h3>{html.escape(name)}</h3><table>{rows}</table></div>")
    return f"<div class=config>{''.join(cards)}</div>"


def _groups(config: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the dotted name and the fields of each group that has fields, outer groups first."""
    fields = {field: value for field, value in config.items() if not isinstance(value, dict)}
    if fields:
        yield name, fields
    for field, value in config.items():
        if isinstance(value, dict):
            yield from _groups(value, field if name == "run" else f"{name}.{field}")


def _config_row(name: str, value: Any, default: Any) -> str:
    written = html.escape(_plain(value))
    if value == default:
        return f"<tr><td>{html.escape(name)}</td><td>{written}</td></tr>"
    written += f" <small>default {html.escape(_plain(default))}</small>"
    return f"<tr class=changed><td>{html.escape(name)}</td><td>{written}</td></tr>"


def _environment(environment: dict[str, Any]) -> str:
    """One start's environment, folded under its time."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_plain(value))}</td></tr>"
        for name, value in environment.items()
    )
    time = html.escape(_plain(environment.get("time")))
    return f"<details class=card><summary>Start at {time}</summary><table>{rows}</table></details>"


def _plain(value: Any) -> str:
    """Returns a JSON value as people write it: lists with spaces, objects as names and values."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return "unknown" if value is None else str(value) or '""'
