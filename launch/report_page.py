"""The HTML of a run's report: one page without scripts.

The page needs nothing but the figures beside it. Whatever comes from a file (names, config values,
commands) is escaped.
"""

import dataclasses
import html
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.plotting import THEMES, Drawing, picture_html
from launch.report_plots import HEADLINES
from launch.series import AllSeries
from moe.config import RunConfig

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
    parts += [_section(section) for section in sections if section.drawings or section.note]
    columns = ("metric", "last", "at step", "lowest", "highest")
    parts.append("<h2>Numbers</h2>\n" + _table(columns, _numbers(metrics)))
    note = "<p class=muted>Values that differ from the defaults are in bold.</p>"
    parts.append(f"<h2>Config</h2>\n{note}\n" + _config(run.config))
    if run.environments:
        environments = "".join(map(_environment, run.environments))
        parts.append(f"<h2>Environment</h2>\n{environments}")
    colours = {
        f"{theme}_colours": "".join(f"--{role}:{colour};" for role, colour in roles.items())
        for theme, roles in THEMES.items()
    }
    return _PAGE.substitute(colours, title=html.escape(run.name), body="\n".join(parts))


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


def _numbers(metrics: AllSeries) -> Iterator[tuple[str, ...]]:
    """The rows of the table of numbers: last, lowest and highest value of each metric."""
    for name, (steps, values) in sorted(metrics.items()):
        finite = values[np.isfinite(values)]
        lowest, highest = (finite.min(), finite.max()) if len(finite) else (math.nan, math.nan)
        yield name, _number(values[-1]), f"{steps[-1]:,}", _number(lowest), _number(highest)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='card scroll'><table class=numbers><tr>{header}</tr>{body}</table></div>"


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


_PAGE = string.Template("""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>$title</title>
<style>
:root { $light_colours --page: #f6f7f8; }
@media (prefers-color-scheme: dark) { :root { $dark_colours --page: #14171b; } }
body { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1rem 4rem;
       background: var(--page); color: var(--text); overflow-wrap: anywhere;
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0 0 .4rem; font-size: .95rem; }
p { margin: .35rem 0 .9rem; }
small, dt, .muted, th, td:first-child { color: var(--muted); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
        padding: .9rem 1rem; min-width: 0; }
.headlines { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
             gap: .75rem; margin: 1.5rem 0 0; }
dt { font-size: .85rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: .8rem; line-height: 1.35; }
.plots { display: grid; gap: .75rem;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }
.plots .card { padding: .5rem; }
.config { columns: 20rem; column-gap: .75rem; }
.config .card { break-inside: avoid; margin-bottom: .75rem; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
        font-variant-numeric: tabular-nums; }
th { font-weight: 500; }
td, th { padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: top; }
td + td, th + th { padding-right: 0; padding-left: .75rem; }
.numbers td + td, .numbers th + th, .config td + td { text-align: right; }
.numbers { border-collapse: separate; border-spacing: 0; }
.numbers td + td, .numbers th { white-space: nowrap; }
.numbers td { border-top: 1px solid var(--rule); }
.scroll { overflow-x: auto; padding-left: 0; padding-right: 0; }
.scroll td:last-child, .scroll th:last-child { padding-right: 1rem; }
.scroll td:first-child, .scroll th:first-child { position: sticky; left: 0; padding-left: 1rem;
                                                background: var(--card); }
.scroll td:first-child { min-width: 11rem; }
.changed td + td { color: var(--text); font-weight: 700; }
.changed td:first-child { color: var(--text); }
.changed small { display: block; font-weight: 400; }
.config td + td { min-width: 5rem; }
details { margin-bottom: .75rem; }
summary { cursor: pointer; }
details table { margin-top: .5rem; }
details td:first-child { width: 6rem; }
@media (max-width: 30rem) {
  body { padding: 1.5rem .6rem 3rem; }
  .plots .card { padding: .25rem; }
  .numbers { font-size: .8rem; }
}
</style>
$body
</html>
""")
