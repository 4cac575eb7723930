"""Turns a row of a batch back into text that tells documents, targets and masks apart."""

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe.data.tokenizers import Tokenizer

BOUNDARY = "<boundary>"  # how the token between documents is shown


class Span(NamedTuple):
    """Holds a text of tokens that are alike."""

    text: str
    is_special: bool
    is_target: bool  # the model learns to predict it, from what stands before or around it
    hidden: str = ""  # what a target was replaced by, where the model predicts it in its own place


class Piece(NamedTuple):
    """Holds the part of a document that is in a row."""

    spans: list[Span]
    num_tokens: int


class Stream(NamedTuple):
    """Holds one sequence of a row: that of the decoder, or that of the encoder."""

    name: str  # "" or "encoder"
    pieces: list[Piece]
    num_padding: int


class _Tokens(NamedTuple):
    """Holds the tokens of a sequence with what is known of each, [tokens]."""

    ids: np.ndarray
    is_target: np.ndarray
    inputs: np.ndarray  # what the model sees in their places
    segments: np.ndarray  # 0 on padding


def read_row(
    fields: Mapping[str, np.ndarray], tokenizer: Tokenizer, *, predicts_next: bool = True
) -> list[Stream]:
    """Returns the sequences of a row, from its fields in a batch [T], as tasks define them.

    `predicts_next` says whether each target is the next token, or one in its own place.
    """
    streams = []
    if "encoder_tokens" in fields:
        ids = fields["encoder_tokens"]
        unpredicted = np.zeros(len(ids), bool)
        tokens = _Tokens(ids, unpredicted, ids, fields["encoder_segment_ids"])
        streams.append(_stream("encoder", tokens, tokenizer))
    streams.append(_stream("", _predicted_tokens(fields, predicts_next), tokenizer))
    return streams


def _predicted_tokens(fields: Mapping[str, np.ndarray], predicts_next: bool) -> _Tokens:
    """Returns the tokens of a sequence that has targets.

    A model predicts the next token, or tokens in their own places, from the others around them. In
    the first case each target is the next input, and the last one is a token more.
    """
    tokens, targets = fields["tokens"], fields["targets"]
    loss_mask, segments = fields["loss_mask"], fields["segment_ids"]
    if not predicts_next:
        return _Tokens(np.where(loss_mask, targets, tokens), loss_mask, tokens, segments)
    # Which document the last target belongs to is known only if it is predicted.
    end = len(targets) if loss_mask[-1] else len(targets) - 1
    ids = np.append(tokens[:1], targets[:end])
    is_target = np.append(False, loss_mask[:end])
    return _Tokens(ids, is_target, ids, np.append(segments, segments[-1:])[: end + 1])


def _stream(name: str, tokens: _Tokens, tokenizer: Tokenizer) -> Stream:
    """Returns a sequence as pieces of documents."""
    pieces = []
    for segment in range(1, int(tokens.segments.max(initial=0)) + 1):
        chosen = tokens.segments == segment
        piece = _Tokens(*(field[chosen] for field in tokens))
        pieces.append(Piece(list(_spans(piece, tokenizer)), len(piece.ids)))
    return Stream(name, pieces, int((tokens.segments == 0).sum()))


def _spans(tokens: _Tokens, tokenizer: Tokenizer) -> Iterator[Span]:
    """Yields the tokens of a piece as texts."""
    names = {id: name for name, id in tokenizer.special_ids.items()}
    names[tokenizer.boundary_id] = BOUNDARY

    def kind(place: int) -> tuple[bool, bool, bool]:
        token = int(tokens.ids[place])
        is_hidden = tokens.inputs[place] != tokens.ids[place]
        return token in names, bool(tokens.is_target[place]), bool(is_hidden)

    for (is_special, is_target, is_hidden), group in itertools.groupby(
        range(len(tokens.ids)), key=kind
    ):
        places = list(group)
        decode = lambda ids: _decode(ids, names, tokenizer)
        hidden = decode(tokens.inputs[places]) if is_hidden else ""
        yield Span(decode(tokens.ids[places]), is_special, is_target, hidden)


def _decode(ids: np.ndarray, names: Mapping[int, str], tokenizer: Tokenizer) -> str:
    """Returns the text of tokens, in which special tokens have their names."""
    groups = itertools.groupby(ids.tolist(), key=lambda token: names.get(token, ""))
    return "".join(
        name * len(list(group)) if name else tokenizer.decode(np.array(list(group)))
        for name, group in groups
    )


_COLOURS = {"target": "32", "context": "2", "special": "33", "hidden": "31", "rule": "36"}
LEGEND = {
    True: "green: targets; grey: not predicted; yellow: special tokens; red: hidden from the model",
    False: "«targets» where not all are; {what the model sees → what it predicts}",
}


def row_text(streams: Sequence[Stream], in_colour: bool) -> str:
    """Returns a row for a terminal, in colour, or with marks for a file."""
    paint = _paint if in_colour else lambda text, role: text
    lines = []
    for stream in streams:
        for number, piece in enumerate(stream.pieces, 1):
            name = f"{stream.name} document {number}".strip()
            lines.append(paint(f"── {name}, {piece.num_tokens} tokens ".ljust(72, "─"), "rule"))
            lines.append("".join(_marked(piece, in_colour)))
        if stream.num_padding:
            lines.append(paint(f"── {stream.num_padding} of padding ".ljust(72, "─"), "rule"))
    return "\n".join(lines)


def _marked(piece: Piece, in_colour: bool) -> Iterator[str]:
    """Yields the spans of a piece in colour or with marks."""
    # In plain text the first token of a document is the only one that is not predicted.
    marks_targets = any(not span.is_target for span in piece.spans[1:])
    for span in piece.spans:
        if in_colour:
            yield _paint(span.hidden, "hidden") if span.hidden else ""
            yield _paint(span.text, role_of(span))
        elif span.hidden:
            yield f"{{{span.hidden} → {span.text}}}"
        else:
            yield f"«{span.text}»" if span.is_target and marks_targets else span.text


def role_of(span: Span) -> str:
    """Returns the name of the colour in which a span is shown."""
    if span.is_special:
        return "special"
    return "target" if span.is_target else "context"


def _paint(text: str, role: str) -> str:
    # Each line is painted by itself, as some pagers forget the colour at the end of a line.
    start, end = f"\033[{_COLOURS[role]}m", "\033[0m"
    return "\n".join(f"{start}{_visible(line)}{end}" if line else "" for line in text.split("\n"))


def _visible(text: str) -> str:
    """Returns a text without the control characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in text)


def row_html(streams: Sequence[Stream]) -> str:
    """Returns a row as HTML, for a page that has `STYLE`."""
    parts = []
    for stream in streams:
        for number, piece in enumerate(stream.pieces, 1):
            name = f"{stream.name} document {number}".strip()
            parts.append(f"<h3>{name}, {piece.num_tokens} tokens</h3><pre class=tokens>")
            for span in piece.spans:
                if span.hidden:
                    parts.append(f"<span class=hidden>{html.escape(span.hidden)}</span>")
                parts.append(f"<span class={role_of(span)}>{html.escape(span.text)}</span>")
            parts.append("</pre>")
        if stream.num_padding:
            parts.append(f"<p class=muted>{stream.num_padding} of padding</p>")
    return f"<div class=card>{''.join(parts)}</div>"


STYLE = """<style>
.tokens { white-space: pre-wrap; margin: 0 0 1rem; font-size: .85rem; }
.tokens .target { border-bottom: 2px solid #2e9e5b; }
.tokens .context { color: var(--muted); }
.tokens .special { background: #d9a40055; border-radius: .2rem; }
.tokens .hidden { text-decoration: line-through; color: #c0392b; }
.bar { display: inline-block; height: .7rem; background: #2e9e5b; }
</style>"""
