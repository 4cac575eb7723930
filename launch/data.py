"""Shows a config's data: the first rows as text, and what the documents are like.

Examples:
    python -m launch.data --config=configs/dense_tiny.py
    python -m launch.data --config=configs/dense_tiny.py --split=validation --rows=10
    python -m launch.data --config=configs/dense_tiny.py --html=data.html

Prepares the rows if they are not there yet, and shows them as the model gets them. A terminal shows
targets in green, what is not predicted in grey, special tokens in yellow and what is hidden from
the model in red; elsewhere marks say the same. Then follow, for each source, its documents, bytes,
tokens, bytes per token, rows, how full they are, and its share; and over all documents a histogram
of their lengths, and how many have exactly the text of an earlier one.
"""

import html
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from absl import flags
from tqdm import tqdm

from launch import command_line
from launch.data_rows import LEGEND, STYLE, Stream, read_row, row_html, row_text
from launch.data_statistics import DocumentCounts, Source, count_documents, histogram, source_table
from launch.html_page import table, whole_page
from launch.output_paths import output_file
from moe.config import ConfigError, RunConfig
from moe.config.data import is_token_files
from moe.data.chat import read_template
from moe.data.sources import Document, check_dataset, open_documents
from moe.data.tokenizers import check_tokenizer, make_tokenizer
from moe.files import write_whole

_BAR_WIDTH = 40


class Look(NamedTuple):
    """Holds what is shown of a config's data."""

    rows: list[tuple[str, list[Stream]]]  # the first rows, each with its heading
    sources: list[Source]
    counts: DocumentCounts | None  # None where there are only rows, and no documents
    row_bytes: float  # how many bytes of text fill a row; 0 where that is not known


def look(config: RunConfig, split: str, num_rows: int) -> Look:
    """Returns the first rows of a config's training or validation split, and statistics.

    Raises ConfigError for data that cannot be read.
    """
    check_dataset(config.data)
    check_tokenizer(config)
    read_template(config.data)
    # These load JAX, which bad input need not wait for.
    from moe.tasks import make_task

    task = make_task(config)
    tokenizer = make_tokenizer(config.data, task.special_tokens)
    transform = task.transform(config)
    sources = open_sources(config, task.rows, split)
    rows = []
    for name, one in sources.items():
        for number in range(min(num_rows, len(one))):
            # A row is transformed as it is in an evaluation, whatever the split.
            row = transform(one[number], (0, number))
            streams = read_row(row, tokenizer, predicts_next=config.task != "masked_tokens")
            rows.append((f"{name} {split} row {number}".strip(), streams))
    described = [
        Source.of_rows(name, one, are_conversations=bool(config.data.chat_template))
        for name, one in sources.items()
    ]
    # Tokens that somebody else has prepared have no documents that could be read.
    has_documents = not any(is_token_files(one.dataset) for one in config.data.sources)
    counts = count_documents(_documents(config, split)) if has_documents else None
    return Look(rows, described, counts, config.data.sequence_length * _bytes_per_token(described))


def open_sources(config: RunConfig, open_rows: Any, split: str) -> Mapping[str, Any]:
    """Returns the rows of each source of a config, by its name."""
    from moe.data.mixtures import open_training, open_validation

    if split == "train":
        return open_training(config, open_rows).rows.sources
    return open_validation(config, open_rows).sources


def _documents(config: RunConfig, split: str) -> Iterator[Document]:
    """Yields the documents of all sources, with a progress bar for each."""
    for source in config.data.sources:
        data = config.data.for_source(source)
        name = source.train_split if split == "train" else source.validation_split
        documents = open_documents(data, name)
        found = documents.between(0, len(documents))
        text = f"reading documents {source.name}".strip()
        yield from tqdm(found, text, len(documents), disable=None, leave=False)


def _bytes_per_token(sources: list[Source]) -> float:
    num_tokens = sum(source.num_tokens or 0 for source in sources)
    return sum(source.num_bytes or 0 for source in sources) / max(num_tokens, 1)


def text_page(found: Look, in_colour: bool) -> str:
    """Returns what a terminal or a file shows."""
    lines = []
    for heading, streams in found.rows:
        lines += [f"━━ {heading} ".ljust(72, "━"), row_text(streams, in_colour), ""]
    lines += [LEGEND[in_colour], ""]
    head, rows = source_table(found.sources)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        lines.append("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    if found.counts:
        lines += ["", duplicates_line(found.counts), "", "documents by their length:"]
        bins = histogram(found.counts, found.row_bytes)
        most = max((count for _, count, _ in bins), default=1)
        for label, count, remark in bins:
            bar = "█" * -(-_BAR_WIDTH * count // most)
            lines.append(f"{label:>20} {count:>12,} {bar} {remark}".rstrip())
    return "\n".join(lines)


def duplicates_line(counts: DocumentCounts) -> str:
    """Returns the sentence about documents that occur again, and about empty ones."""
    share = counts.num_duplicates / max(counts.num_documents, 1)
    empty = f"; {counts.num_empty:,} are empty and left out" if counts.num_empty else ""
    return (
        f"{counts.num_documents:,} documents of {counts.num_bytes:,} bytes, of which "
        f"{counts.num_duplicates:,} ({share:.1%}) have exactly the text of an earlier one{empty}"
    )


def html_page(found: Look, title: str) -> str:
    """Returns the page of --html."""
    parts = [STYLE, f"<h1>{html.escape(title)}</h1>", "<h2>Rows</h2>"]
    parts.append(f"<p class=muted>{html.escape(LEGEND[True])}</p>")
    for heading, streams in found.rows:
        parts += [f"<h3>{html.escape(heading)}</h3>", row_html(streams)]
    parts += ["<h2>Sources</h2>", table(*source_table(found.sources))]
    if found.counts:
        bins = histogram(found.counts, found.row_bytes)
        most = max((count for _, count, _ in bins), default=1)
        parts += ["<h2>Documents</h2>", f"<p>{html.escape(duplicates_line(found.counts))}</p>"]
        parts.append("<div class='card scroll'><table>")
        for label, count, remark in bins:
            bar = f"<span class=bar style='width:{12 * count / most:.2f}rem'></span>"
            parts.append(f"<tr><td>{label}</td><td>{count:,}</td><td>{bar} {remark}</td></tr>")
        parts.append("</table></div>")
    return whole_page(title, "\n".join(parts))


def main(values: flags.FlagValues) -> None:
    if values.rows < 0:
        raise ConfigError(f"--rows={values.rows} is negative: set it to a number of rows")
    path = output_file("--html", values.html) if values.html else None
    config = command_line.read_run_config(values.config)
    found = look(config, values.split, values.rows)
    if path:
        write_whole(path, html_page(found, f"Data of {config.data.description}"))
        print(f"wrote {path}")
    else:
        print(text_page(found, sys.stdout.isatty()))


if __name__ == "__main__":
    command_line.define_config()
    flags.DEFINE_enum(
        "split",
        "train",
        ["train", "validation"],
        "Whether to show what is trained or evaluated on.",
    )
    flags.DEFINE_integer("rows", 4, "How many rows of each source to show.")
    flags.DEFINE_string("html", None, "A file to write everything to as a page, instead.")
    command_line.run(main, __doc__)
