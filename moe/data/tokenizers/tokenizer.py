"""Defines what all tokenizers share: special tokens, boundaries, and decoding as ids arrive."""

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from moe.config import ConfigError
from moe.config.checks import show

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are not UTF-8, and for unknown ids

_SPACES = 64  # parts of a stream that are kept for what follows them
_UNKNOWN, _TEXT, _DROPPED = range(3)  # what an id may stand for


class Vocabulary(Protocol):
    """Turns text into ids and back, with no notion of special tokens or documents.

    There is one for each kind of file.
    """

    @property
    def name(self) -> str:
        """Returns the kind of the file and its fingerprint. Equal names give equal ids."""
        ...

    @property
    def size(self) -> int:
        """Returns the number that all ids of the file are below."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Returns the special tokens that the file declares. No text becomes one of them."""
        ...

    @property
    def boundary_id(self) -> int | None:
        """Returns the token that the file itself says ends or begins a text, or None."""
        ...

    @property
    def text_ids(self) -> np.ndarray:
        """Returns the ids that `decode` knows."""
        ...

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """Returns the ids of each text, none of which is special."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, all of them among `text_ids`."""
        ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turns text into token ids, and token ids into text."""

    vocabulary: Vocabulary
    special_ids: Mapping[str, int]  # the special tokens of the file, of the config and of the task
    boundary_id: int  # stands where a document starts and where it ends

    @property
    def name(self) -> str:
        """Returns the kind of the tokenizer and the fingerprint of its file."""
        return self.vocabulary.name

    @functools.cached_property
    def vocab_size(self) -> int:
        """Returns the number that all ids, those of special tokens included, are below."""
        return max(self.vocabulary.size, *(1 + id for id in self.special_ids.values()), 0)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text` without boundaries, as for a prompt.

        Text that spells a special token is text like any other. The type is uint16 for a vocabulary
        of up to 65,536 tokens, and uint32 for a larger one. Raises ConfigError for a text that has
        no UTF-8.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, which takes less time than one text after another."""
        for text in texts:
            _check_text(text)
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        return [np.asarray(ids, dtype) for ids in self.vocabulary.encode(texts)]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Returns the ids of `text` after a boundary, as a document begins."""
        return np.insert(self.encode(text), 0, self.boundary_id)

    def encode_document(self, text: str) -> np.ndarray:
        """Returns the ids of `text` between two boundaries.

        With the boundaries, a model also predicts the first token of a document and its end.
        """
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text between two boundaries."""
        return [self._between_boundaries(ids) for ids in self.encode_all(texts)]

    def _between_boundaries(self, ids: np.ndarray) -> np.ndarray:
        # np.pad takes longer for a short document than all else that happens to it.
        document = np.full(len(ids) + 2, self.boundary_id, ids.dtype)
        document[1:-1] = ids
        return document

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`, of any integer type.

        Boundaries and special tokens are dropped. Bytes that are not UTF-8 become U+FFFD, and so
        does each id that the tokenizer does not know: a model's vocabulary may be the larger one.
        """
        ids = np.asarray(ids, np.int64)
        kinds = self._kinds[np.where(ids < 0, self.vocab_size, np.minimum(ids, self.vocab_size))]
        ids, is_known = ids[kinds != _DROPPED], (kinds == _TEXT)[kinds != _DROPPED]
        starts = np.flatnonzero(np.diff(is_known)) + 1
        runs = zip(np.split(ids, starts), np.split(is_known, starts), strict=True)
        return "".join(
            self.vocabulary.decode(run.tolist()) if known[0] else REPLACEMENT * len(run)
            for run, known in runs
            if len(run)
        )

    @functools.cached_property
    def _kinds(self) -> np.ndarray:
        """Returns the kind of each id, and of one beyond the vocabulary."""
        kinds = np.full(self.vocab_size + 1, _UNKNOWN)
        kinds[self.vocabulary.text_ids] = _TEXT
        kinds[[self.boundary_id, *self.special_ids.values()]] = _DROPPED
        return kinds


class TextStream:
    """Decodes ids as they arrive, and holds back a character until all of its bytes are there.

    The texts that `push` and `finish` return, one after another, are the text that
    `Tokenizer.decode` gives for all ids at once, if the ids hold whole characters. Otherwise they
    may differ: the package `tokenizers` decodes neighbouring bytes of `byte_fallback` as a whole,
    and where one is wrong it gives U+FFFD for all, also for those of characters that a stream has
    shown. If the ids continue a prompt, its ids are given first: with some tokenizers the space
    before a word belongs to the word, and a text has none at its start.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray = ()):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # ids whose text is out already
        # The last ids after the context whose text was only white space. More of them would make
        # each id of a long run of spaces cost as much as the run.
        self._spaces: deque[list[int]] = deque(maxlen=_SPACES)
        self._held: list[int] = []
        self.push(prompt)
        self.finish()

    def push(self, ids: Sequence[int] | np.ndarray) -> str:
        """Adds ids, and returns the text that has become whole."""
        self._held += np.asarray(ids, np.int64).tolist()
        text = self._text()
        return "" if text.endswith(REPLACEMENT) else self._release(text)

    def finish(self) -> str:
        """Returns the text that is held back. What is not whole is U+FFFD in it."""
        return self._release(self._text())

    def _text(self) -> str:
        """Returns the text of the ids that are held back."""
        known = [*self._context, *itertools.chain(*self._spaces)]
        before = self._tokenizer.decode(known)
        return self._tokenizer.decode(known + self._held)[len(before) :]

    def _release(self, text: str) -> str:
        """Makes the ids that are held back the context of the next ones, and returns their text."""
        # A context of spaces alone would not do: they might be stripped as the start of a text.
        if self._tokenizer.decode(self._held).strip():
            self._context = self._held
            self._spaces.clear()
        elif self._held:
            self._spaces.append(self._held)
        self._held = []
        return text


def _check_text(text: str) -> None:
    """Raises ConfigError for a text with half of a surrogate pair, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = max(error.start - 10, 0)
        raise ConfigError(
            f"text {show(text[start : error.start + 10])} has the surrogate "
            f"U+{ord(text[error.start]):04X} at character {error.start}, which is half of a "
            "character: mend or remove it"
        ) from None
