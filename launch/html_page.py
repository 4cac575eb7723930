"""The frame that all pages of this project share: their style, and tables.

A page has no scripts, needs no network, and is for light and dark screens, wide and narrow ones.
"""

import html
import itertools
import string
from collections.abc import Iterable, Sequence

from launch.plotting import THEMES


def whole_page(title: str, body: str) -> str:
    """Returns a page with a title, which is escaped here, and a body, which is HTML."""
    colours = {
        f"{theme}_colours": "".join(f"--{role}:{colour};" for role, colour in roles.items())
        for theme, roles in THEMES.items()
    }
    return _PAGE.substitute(colours, title=html.escape(title), body=body)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table of texts as HTML, whose first column stays in sight on narrow screens.

    Numbers stand on the right of their columns, and words on the left.
    """
    rows = [list(row) for row in rows]
    columns = itertools.zip_longest(*rows, fillvalue="")
    kinds = ["" if any(map(_is_number, column)) else " class=words" for column in columns]
    lines = [_row("th", head, kinds), *(_row("td", row, kinds) for row in rows)]
    return f"<div class='card scroll'><table class=numbers>{''.join(lines)}</table></div>"


def _is_number(cell: str) -> bool:
    return cell.lstrip("+-−~<$")[:1].isdigit()


def _row(tag: str, cells: Iterable[str], kinds: Sequence[str]) -> str:
    """Returns a row of a table, each cell with its column's attributes."""
    pairs = itertools.zip_longest(cells, kinds, fillvalue="")
    found = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in pairs)
    return f"<tr>{found}</tr>"


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
.numbers td.words, .numbers th.words { text-align: left; }
.numbers td.words:last-child { white-space: normal; overflow-wrap: break-word; }
.card.scroll + .card.scroll { margin-top: .75rem; }
.track { height: 1.1rem; margin-top: .15rem; border-radius: .2rem; background: var(--rule); }
.track div { height: 100%; min-width: 2px; border-radius: .2rem; }
.bars td:nth-child(2) { width: 70%; }
.bars tr:first-child td { border-top: 0; }
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
