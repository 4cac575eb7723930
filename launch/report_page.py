"""The HTML of a run's report: one page without scripts, which needs nothing but the figures beside
it.

Whatever comes from a file (names, config values, commands) is escaped.
"""

import dataclasses
import html
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.figures import THEMES, Drawing, picture
from launch.report_plots import HEADLINES
from moe.config import RunConfig

Columns = Mapping[str, tuple[np.ndarray, np.ndarray]]  # steps and values of each metric

CARD_LENGTH = 9  # characters for which a card has room


@dataclasses.dataclass
class Section:
    """Figures under one heading, and a sentence about them."""

    heading: str
    drawings: list[Drawing]
    note: str = ""


def page(
    name: str,
    step: int,
    columns: Columns,
    config: dict[str, Any],
    environments: list[dict[str, Any]],
    sections: Sequence[Section],
) -> str:
    """The whole page of the run `name`, which stands at `step`."""
    parts = [_header(name, step, config, environments), _headlines(columns)]
    parts += [_section(section) for section in sections if section.drawings or section.note]
    parts.append(
        "<h2>Numbers</h2>\n"
        + _table(("metric", "last", "at step", "lowest", "highest"), _numbers(columns))
    )
    parts.append(
        "<h2>Config</h2>\n<p class=muted>Values that differ from the defaults are in bold.</p>\n"
        + _config(config)
    )
    if environments:
        parts.append("<h2>Environment</h2>\n" + "".join(map(_environment, environments)))
    colours = {
        f"{theme}_colours": "".join(f"--{role}:{colour};" for role, colour in THEMES[theme].items())
        for theme in THEMES
    }
    return _PAGE.substitute(colours, title=html.escape(name), body="\n".join(parts))


def _header(
    name: str, step: int, config: dict[str, Any], environments: list[dict[str, Any]]
) -> str:
    tokens = step * config["train"]["batch_size"] * config["data"]["sequence_length"]
    facts = [f"step {step:,} of {config['train']['steps']:,}", f"{tokens:,} tokens"]
    if environments:
        devices, time = environments[-1].get("devices"), str(environments[0].get("time", "unknown"))
        if isinstance(devices, dict) and isinstance(devices.get("kinds"), list):
            facts.append(f"{devices.get('count')} × {' and '.join(map(str, devices['kinds']))}")
        facts.append(f"started {time[:16].replace('T', ' ')} UTC")
    return f"<h1>{html.escape(name)}</h1>\n<p class=muted>{html.escape(' · '.join(facts))}</p>"


def _headlines(columns: Columns) -> str:
    cards = [
        f"<div class=card><dt>{label}</dt><dd>{_headline(columns[name][1][-1], form)}<small>{unit}</small></dd></div>"
        for name, label, form, unit in HEADLINES
        if name in columns
    ]
    return f"<dl class=headlines>{''.join(cards)}</dl>"


def _headline(value: float, form: str) -> str:
    """A value as its headline says, or shorter where a card has no room for that."""
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
    note = f"<p class=muted>{html.escape(section.note)}</p>\n" if section.note else ""
    figures = "".join(
        f"<figure class=card>{picture(drawing)}</figure>" for drawing in section.drawings
    )
    return f"<h2>{html.escape(section.heading)}</h2>\n{note}" + (
        f"<div class=plots>{figures}</div>" if figures else ""
    )


def _numbers(columns: Columns) -> Iterator[tuple[str, ...]]:
    for name, (steps, values) in sorted(columns.items()):
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
    """A card for each group of fields, nested ones after their own: model, model.attention,
    model.moe.
    """
    defaults = dict(_groups(RunConfig().to_dict(), "run"))
    cards = []
    for name, fields in _groups(config, "run"):
        default, prefix = (
            defaults.get(name, {}),
            "".join(f"{part}." for part in name.split(".")[1:]),
        )
        rows = "".join(
            _config_row(prefix + field, value, default.get(field))
            for field, value in fields.items()
        )
        cards.append(f"<div class=card><h3>{html.escape(name)}</h3><table>{rows}</table></div>")
    return f"<div class=config>{''.join(cards)}</div>"


def _groups(config: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The dotted name and the fields of each group that has fields, outer groups first."""
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
    return f"<tr class=changed><td>{html.escape(name)}</td><td>{written} <small>default {html.escape(_plain(default))}</small></td></tr>"


def _environment(start: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_plain(value))}</td></tr>"
        for name, value in start.items()
    )
    time = html.escape(_plain(start.get("time")))
    return f"<details class=card><summary>Start at {time}</summary><table>{rows}</table></details>"


def _plain(value: Any) -> str:
    """JSON as people write it: a list with spaces, an object as names and values."""
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
body { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; background: var(--page); color: var(--text);
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0 0 .4rem; font-size: .95rem; }
p { margin: .35rem 0 .9rem; }
small, dt, .muted, th, td:first-child { color: var(--muted); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .9rem 1rem; min-width: 0; }
.headlines { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
dt { font-size: .85rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: .8rem; line-height: 1.35; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); gap: .75rem; }
.plots .card { padding: .5rem; }
.config { columns: 20rem; column-gap: .75rem; }
.config .card { break-inside: avoid; margin-bottom: .75rem; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { font-weight: 500; }
td, th { padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: top; }
td + td, th + th { padding-right: 0; padding-left: .75rem; }
.numbers td + td, .numbers th + th, .config td + td { text-align: right; }
.numbers { border-collapse: separate; border-spacing: 0; }
.numbers td + td, .numbers th { white-space: nowrap; }
.numbers td { border-top: 1px solid var(--rule); }
.scroll { overflow-x: auto; padding-left: 0; padding-right: 0; }
.scroll td:last-child, .scroll th:last-child { padding-right: 1rem; }
.scroll td:first-child, .scroll th:first-child { position: sticky; left: 0; padding-left: 1rem; background: var(--card); }
.scroll td:first-child { min-width: 11rem; }
.changed td + td { color: var(--text); font-weight: 700; }
.changed td:first-child { color: var(--text); }
.changed small { display: block; font-weight: 400; }
.config td + td { min-width: 5rem; }
details { margin-bottom: .75rem; }
summary { cursor: pointer; }
details table { margin-top: .5rem; }
details td:first-child { width: 6rem; }
@media (max-width: 30rem) { body { padding: 1.5rem .6rem 3rem; } .plots .card { padding: .25rem; }
                           .numbers { font-size: .8rem; } }
</style>
$body
</html>
""")
