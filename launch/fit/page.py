"""The page of a fitted law: one HTML file that holds its figures, and needs no network."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.fit.axes import power_text
from launch.fit.results import (
    Results,
    errors,
    held_out_text,
    interval_text,
    left_out_lines,
    optimum_table,
)
from launch.html_page import table, whole_page
from launch.plotting import HEIGHT, WIDTH, Drawing, file_name

CARD_LENGTH = 8  # characters for which a card of the headlines has room


def law_page(results: Results, drawings: Sequence[Drawing], directory: Path) -> str:
    """Returns the whole page. The drawings lie in `directory` as files."""
    title = f"{results.law} law of {Path(results.table).name}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=muted>{html.escape(results.formula)}<br>{html.escape(results.source)}</p>",
        _headlines(results),
        _list("The runs do not determine the coefficients", results.not_identifiable, "alarm"),
        _list("Warnings", results.warnings or ["None."]),
        _figures(drawings, directory),
        _best_models(results),
        _coefficients(results),
        _list("How the fit went", results.facts),
        _list("Left out", left_out_lines(results.left_out, most=40)),
        _provenance(results),
    ]
    return whole_page(title, "\n".join(part for part in parts if part))


def _headlines(results: Results) -> str:
    """Returns a card for each of the numbers that a reader looks for first."""
    cards = [("runs fitted", f"{results.num_runs}", f"of {results.num_rows} rows")]
    if results.held_out:
        largest = max(map(abs, errors(results.held_out)[0]))
        cards.append(("held-out error", f"{largest:.2%}", "at most, largest budget"))
    for found in results.coefficients[:5]:
        value = f"{found.value:.4g}"
        text = value if len(value) <= CARD_LENGTH else power_text(found.value, 3)
        cards.append((found.name, text, interval_text(found.low, found.high)))
    texts = "".join(
        f"<div class=card><dt>{html.escape(label)}</dt><dd>{value}<small>{html.escape(note)}"
        "</small></dd></div>"
        for label, value, note in cards
    )
    return f"<dl class=headlines>{texts}</dl>"


def _list(heading: str, lines: Sequence[str], border: str = "rule") -> str:
    """Returns a heading and a list in a card, whose border has a colour of the page's theme."""
    if not lines:
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    style = f"padding-left:2rem; border-color:var(--{border})"
    return f'<h2>{heading}</h2>\n<ul class=card style="{style}">{items}</ul>'


def _figures(drawings: Sequence[Drawing], directory: Path) -> str:
    figures = "".join(
        f"<figure class=card>{_picture(drawing, directory)}</figure>" for drawing in drawings
    )
    return f"<h2>Figures</h2>\n<div class=plots>{figures}</div>"


def _picture(drawing: Drawing, directory: Path) -> str:
    """Returns the HTML of a figure, whose two files are part of the text."""
    light, dark = (
        "data:image/png;base64,"
        + base64.b64encode((directory / file_name(drawing, theme)).read_bytes()).decode()
        for theme in ("light", "dark")
    )
    return (
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" width={WIDTH} height={HEIGHT} alt="{html.escape(drawing.title)}">'
        "</picture>"
    )


def _best_models(results: Results) -> str:
    if not results.optima:
        return ""
    head, rows = optimum_table(results.optima)
    notes = "".join(f"<p class=muted>{html.escape(note)}</p>" for note in results.notes)
    return f"<h2>Best models</h2>\n{table(head, rows)}{notes}"


def _coefficients(results: Results) -> str:
    rows = [
        (found.name, f"{found.value:.6g}", interval_text(found.low, found.high))
        for found in results.coefficients
    ]
    text = table(("coefficient", "value", "95 % interval"), rows)
    held_out = results.held_out
    if held_out is None:
        return f"<h2>Coefficients</h2>\n{text}"
    law, repeated = errors(held_out)
    head = ("run", "measured", "predicted", "error", "error of repeating the smaller budget")
    lines = (
        (run, f"{measured:.4f}", f"{predicted:.4f}", f"{100 * own:+.2f} %", f"{100 * other:+.2f} %")
        for run, measured, predicted, own, other in zip(
            held_out.runs, held_out.measured, held_out.predicted, law, repeated, strict=True
        )
    )
    sentence = html.escape(held_out_text(held_out))
    return (
        f"<h2>Coefficients</h2>\n{text}\n<h2>Prediction of the largest budget</h2>\n"
        f"<p class=muted>{sentence}</p>\n{table(head, lines)}"
    )


def _provenance(results: Results) -> str:
    facts: Mapping[str, str] = {
        "table": results.table,
        "its SHA-256": results.table_sha256,
        "its losses in": results.loss_unit,
    }
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<h2>Source</h2>\n<div class=card><table>{rows}</table></div>"
