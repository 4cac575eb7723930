"""Best-fit packing cuts no document that fits into a row (Ding et al. 2024, arXiv 2404.10830).

Documents longer than a row are cut into full rows and a rest. All pieces then go, the longest
first, each into the row that has the least room left among those that have enough (best-fit
decreasing). A piece that no row has room for begins a new one.

Packing needs all documents at once, so long streams are packed in windows of many documents.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moe.data.packing.cut import cut_document

_WINDOW_TOKENS = 2**25  # 64 MiB of tokens of two bytes; a window leaves a few rows half empty
_WORD_BITS = 6  # a node of the tree has 2**6 children


def pack(
    documents: Iterable[np.ndarray], sequence_length: int, window_tokens: int = _WINDOW_TOKENS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of a stream of documents, as (tokens, lengths of the pieces as uint32).

    Rows are in the order of their first pieces, and the pieces of a row in that of the stream. So
    the first rows of a split are a sample of short and long documents.
    """
    pieces: list[np.ndarray] = []
    num_tokens = 0
    for document in documents:
        pieces += cut_document(document, sequence_length)
        num_tokens += len(document)
        if num_tokens >= window_tokens:
            yield from _rows(pieces, sequence_length)
            pieces, num_tokens = [], 0
    yield from _rows(pieces, sequence_length)


def _rows(
    pieces: Sequence[np.ndarray], sequence_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the packed rows of some pieces."""
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    for row in sorted(map(sorted, best_fit(lengths, sequence_length + 1))):
        yield np.concatenate([pieces[piece] for piece in row]), lengths[row].astype(np.uint32)


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Returns the numbers of the pieces in each row, for pieces [P] of at most `capacity` tokens.

    The first of equal pieces is placed first, in the first of the rows with equal room. So
    the result depends on the lengths alone. It takes O(P log(P capacity)) steps.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = defaultdict(list)  # each list is a heap
    rooms = _Rooms(capacity)  # those with a row in `rows_by_room`
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        room = rooms.at_least(length)
        if room is None:
            row, room = len(rows), capacity
            rows.append([piece])
        else:
            row = heapq.heappop(rows_by_room[room])
            rows[row].append(piece)
            if not rows_by_room[room]:
                rooms.remove(room)
        if room > length:
            heapq.heappush(rows_by_room[room - length], row)
            rooms.add(room - length)
    return rows


class _Rooms:
    """Holds a set of whole numbers up to a largest one, and finds the next one above a number.

    It is a tree of bits: a bit of a level says whether the 64 bits below it have one that is set.
    """

    def __init__(self, largest: int):
        self._levels: list[list[int]] = []
        size = largest + 1
        while not self._levels or size > 1:
            size = -(-size // 2**_WORD_BITS)
            self._levels.append([0] * size)

    def add(self, number: int) -> None:
        for level in self._levels:
            number, bit = divmod(number, 2**_WORD_BITS)
            level[number] |= 1 << bit

    def remove(self, number: int) -> None:
        for level in self._levels:
            number, bit = divmod(number, 2**_WORD_BITS)
            level[number] &= ~(1 << bit)
            if level[number]:
                return

    def at_least(self, number: int) -> int | None:
        """Returns the smallest number of the set that is not below `number`, or None."""
        for height, level in enumerate(self._levels):
            word, bit = divmod(number, 2**_WORD_BITS)
            above = level[word] >> bit if word < len(level) else 0
            if above:
                number += _lowest_bit(above)
                for lower in reversed(self._levels[:height]):
                    number = number * 2**_WORD_BITS + _lowest_bit(lower[number])
                return number
            number = word + 1
        return None


def _lowest_bit(word: int) -> int:
    """Returns the number of the lowest bit that is set."""
    return (word & -word).bit_length() - 1
