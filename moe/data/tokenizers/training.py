"""Trains byte-level BPEs (Sennrich et al. 2016, over bytes as in Radford et al. 2019)."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe.config import ConfigError
from moe.data.sources import Documents

BOUNDARY = "<|endoftext|>"
SMALLEST = 257  # the bytes and the boundary
LARGEST = 2**20  # larger ones are of no use, and take gigabytes
_AT_ONCE = 64  # documents that are read together


class Merges(NamedTuple):
    """Holds what training has found: the largest tokenizer, which has all smaller ones in it."""

    saved: dict[str, Any]  # as tokenizer.json holds it

    @property
    def vocab_size(self) -> int:
        """Returns the number of tokens, the boundary included."""
        return len(self.saved["model"]["vocab"])

    def tokenizer_json(self, vocab_size: int) -> str:
        """Returns the tokenizer.json of the first `vocab_size` tokens.

        BPE is greedy, so that a smaller vocabulary is the beginning of a larger one. Equal merges
        give equal bytes. Raises ConfigError where the text had too few pairs to merge.
        """
        if not SMALLEST <= vocab_size <= self.vocab_size:
            raise ConfigError(
                f"vocab_size={vocab_size} is out of range: set it between {SMALLEST} (the bytes "
                f"and {BOUNDARY}) and {self.vocab_size}, which is what the text gives"
            )
        model = self.saved["model"]
        vocab = {token: id for token, id in model["vocab"].items() if id < vocab_size}
        merges = model["merges"][: vocab_size - SMALLEST]
        shortened = self.saved | {"model": model | {"vocab": vocab, "merges": merges}}
        return json.dumps(shortened, ensure_ascii=False) + "\n"


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    num_texts: int | None = None,
    show_progress: bool = False,
) -> Merges:
    """Returns the merges of a byte-level BPE of at most `vocab_size` tokens.

    The tokenizer changes no character, finds no special token in text, and has a token
    <|endoftext|> that stands between documents. Training needs memory for each different word of
    the texts, not for the texts. With `show_progress` the package shows a bar for each of its
    phases, of which the first counts to `num_texts`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer, num_texts)
    return Merges(json.loads(tokenizer.to_str()))


def sample_texts(documents: Documents, max_bytes: int) -> Iterator[str]:
    """Yields texts of at most `max_bytes` together, from all over the documents.

    The same documents give the same texts. Where all of them fit, all are taken. Otherwise the last
    text is cut, so that a document that is larger than the sample still gives one.
    """
    starts = range(0, len(documents), _AT_ONCE)
    order = np.random.RandomState(0).permutation(len(starts))  # whose values never change
    room = max_bytes
    for start in (starts[index] for index in order):
        for document in documents.between(start, start + _AT_ONCE):
            encoded = document.text.encode(errors="replace")
            if len(encoded) > room:
                if beginning := encoded[:room].decode(errors="ignore"):
                    yield beginning
                return
            room -= len(encoded)
            yield document.text
