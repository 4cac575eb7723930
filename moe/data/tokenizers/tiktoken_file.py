"""Reads tiktoken's files, which hold the tokens of a BPE of bytes but not how text is split."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from moe.config import ConfigError
from moe.config.checks import show
from moe.data.tokenizers.errors import damage_error, ordinary_error

LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(?:\n|\Z)")
_MOST_IDS = 2**24  # far beyond any vocabulary; an array has a number for each id
# The package's regular expressions end the process with an error where about a million characters
# could be matched in as many ways, such as a million spaces.
_LONG = 100_000


class TiktokenVocabulary:
    """Reads a file of tiktoken. It has no special tokens, and needs a pattern that splits text."""

    boundary_id: int | None = None

    def __init__(
        self, path: str, content: bytes, fingerprint: str, wanted: Sequence[str], pattern: str
    ):
        import tiktoken

        if not pattern:
            raise ConfigError(
                f"data.tokenizer={path} is a tiktoken file, which does not say how text is split: "
                "set data.split_pattern to the regular expression that it was trained with"
            )
        digest = hashlib.sha256(pattern.encode()).hexdigest()
        self.name = f"tiktoken {fingerprint} {digest}"
        self.special_ids: Mapping[str, int] = {}
        ranks = _read_ranks(path, content)
        for name in wanted:
            if name.encode() in ranks:
                raise ordinary_error(path, name)
        self.size = 1 + max(ranks.values())
        self.text_ids = np.unique([*ranks.values()])
        try:
            self._encoding = tiktoken.Encoding(
                path, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            )
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"data.split_pattern={show(pattern)} is no regular expression ({reason}): "
                "set it to the one that the file was trained with"
            ) from None
        self._pattern = pattern
        self._lengths = np.zeros(self.size, np.int64)  # the number of bytes of each token
        for token, rank in ranks.items():
            self._lengths[rank] = len(token)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text. Raises ConfigError if the pattern leaves some of it out."""
        if len(text) < _LONG:
            ids = self._encoding.encode_ordinary(text)
        else:
            import regex

            pieces = (match[0] for match in regex.finditer(self._pattern, text))
            ids = [id for piece in pieces for id in self._encoding._encode_single_piece(piece)]
        ids = np.asarray(ids, np.int64)
        if self._lengths[ids].sum() != len(text.encode()):
            raise ConfigError(
                f"data.split_pattern={show(self._pattern)} matches only a part of the text "
                f"{show(text[:40])}, and the rest would be lost: add |\\s+|. to its end"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids. Bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode_bytes(ids).decode(errors="replace")


def _read_ranks(path: str, content: bytes) -> dict[bytes, int]:
    """Returns the tokens of a file with their ids. Raises ConfigError for a damaged file."""
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}  # the line of each rank
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            if line:
                encoded, digits = line.split()
                token, rank = base64.b64decode(encoded, validate=True), int(digits)
                if not 0 <= rank < _MOST_IDS:
                    raise ValueError(f"rank {rank} is not between 0 and {_MOST_IDS - 1}")
                if token in ranks or rank in lines:
                    earlier = lines[ranks.get(token, rank)]
                    raise ValueError(f"it has the token or the rank of line {earlier}")
                ranks[token], lines[rank] = rank, number
        except ValueError as error:  # binascii's error is one
            raise damage_error(path, f"tiktoken file, line {number}", error) from None
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise damage_error(path, "tiktoken file", ValueError(f"it has no byte {missing[0]}"))
    return ranks
