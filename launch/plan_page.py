"""Writes the page of a plan, which needs no other file: bars of the memory by kind, and tables."""

import dataclasses
import html

from launch.html_page import table, whole_page
from launch.plan_program import (
    StepProgram,
    place_rows,
    program_collective_rows,
    program_headline,
    program_memory_rows,
)
from launch.plan_text import (
    GIB,
    collective_rows,
    fit_line,
    flops_line,
    headline,
    speed_line,
    time_rows,
)
from moe.scaling.hardware import Chip
from moe.scaling.layouts import Layout


def plan_page(layout: Layout, chip: Chip, program: StepProgram | None = None) -> str:
    """Returns the page of a plan as HTML, with the compiled program if there is one."""
    parts = [
        f"<h1>A plan for {html.escape(chip.name)}</h1>",
        _paragraph(headline(layout, chip)),
        "<h2>Memory of a device</h2>",
        _bars(layout, chip),
        _paragraph(f"{fit_line(layout, chip)} A grey bar is the memory of the chip."),
        "<h2>Time of a step</h2>",
        _paragraph(f"{speed_line(layout)} {flops_line(layout)}"),
        _table(time_rows(layout)),
        "<h2>What each device sends</h2>",
        _table(collective_rows(layout)),
        *(_program(program, layout, chip) if program else ()),
        "<h2>The layout</h2>",
        _paragraph(layout.flags),
    ]
    return whole_page(f"Plan for {chip.name}", "\n".join(parts))


def _program(program: StepProgram, layout: Layout, chip: Chip) -> list[str]:
    """Returns the part of a page that shows what was compiled."""
    return [
        "<h2>The compiled program</h2>",
        _paragraph(program_headline(program)),
        _table(program_memory_rows(program.memory, chip)),
        _table(program_collective_rows(program.collectives, layout.estimate.collectives)),
        _table(place_rows(program.collectives)),
    ]


def _bars(layout: Layout, chip: Chip) -> str:
    """Returns one bar for each kind of memory, each of which begins where the last one ends.

    The grey track is the chip's memory. A layout that does not fit fills the width with its total.
    """
    memory = layout.estimate.memory
    scale = max(memory.total, chip.memory_bytes)
    colour = "var(--first)" if memory.total <= chip.memory_bytes else "var(--alarm)"
    start, rows = 0, []
    kinds = dataclasses.asdict(memory)
    for kind, size in (*kinds.items(), ("total", memory.total)):
        begin = 0 if kind == "total" else start
        bar = _bar(begin / scale, size / scale, chip.memory_bytes / scale, colour)
        share = f"{100 * size / chip.memory_bytes:.1f} %"
        cells = f"<td>{kind}</td><td>{bar}</td><td>{size / GIB:.2f} GiB</td><td>{share}</td>"
        rows.append(f"<tr>{cells}</tr>")
        start += size
    body = "".join(rows)
    return f"<div class='card scroll'><table class='numbers bars'>{body}</table></div>"


def _bar(start: float, width: float, track: float, colour: str) -> str:
    """Returns a bar as HTML. All three are parts of the room that there is for it."""
    place = f"margin-left:{100 * start / track:.2f}%;width:{100 * width / track:.2f}%"
    inner = f"<div style='{place};background:{colour}'></div>"
    return f"<div class=track style='width:{100 * track:.2f}%'>{inner}</div>"


def _table(rows: list[tuple[str, ...]]) -> str:
    return table(rows[0], rows[1:])


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
