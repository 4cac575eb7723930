"""Declares what every source gives: documents, which are read by their numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Document(NamedTuple):
    """Holds one text and where it comes from."""

    text: str
    origin: str  # for messages, such as "notes/a.jsonl:17"
    fields: Mapping[str, Any]  # the example's other numbers and strings, by which to slice


class Documents(Protocol):
    """Gives access to the documents of one split by their numbers."""

    @property
    def directory(self) -> str:
        """Returns where the documents lie, from which `reopen_documents` opens them again."""
        ...

    def __len__(self) -> int: ...

    def between(self, start: int, stop: int) -> Iterator[Document]:
        """Yields the documents from `start` to `stop`, or to the last one."""
        ...


def parts_between(lengths: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, range]]:
    """Yields which parts hold the items from `start` to `stop`, and the items' numbers in each.

    The parts have these lengths and lie one after the other.
    """
    first = 0  # the number of a part's first item
    for part, length in enumerate(lengths):
        inside = range(max(start - first, 0), min(stop - first, length))
        if inside:
            yield part, inside
        first += length
