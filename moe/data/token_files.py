"""Reads rows from files of tokens that another program has prepared, in place.

A split's name is the name of its file: NAME.bin with NAME.idx, as Megatron-LM writes them, or
NAME.npy, one dimension of integers. The files are mapped into memory and never copied or scanned,
so that a run on terabytes begins at once.
"""

import bisect
import dataclasses
import functools
import hashlib
import struct
from pathlib import Path

import numpy as np

from moe.config import ConfigError, DataConfig
from moe.config.checks import expand_path, is_file_name, show
from moe.data.packing.concat import unpack
from moe.data.tokenizers import make_tokenizer

# Megatron-LM's megatron/core/datasets/indexed_dataset.py: a magic text, the version 1, a number for
# the type, the number of sequences, and the number of documents plus 1. The lengths of the
# sequences (int32), their first bytes (int64), and the first sequence of each document and the
# end of the last one (int64) follow.
_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_SAMPLES = 64  # of a file, for its checksum
_SAMPLE_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class TokenFileRows:
    """Reads rows of a split's token file by their index. Threads can share it.

    As in concat packing, a row holds sequence_length + 1 tokens, of which the last one is also the
    first of the next row, and a row's pieces are parts of documents.
    """

    path: Path  # the file of the tokens
    sequence_length: int
    vocab_size: int
    boundary_id: int  # the last token of each document of a .npy file
    num_bytes: int = 0  # of the text, which is not known

    def __len__(self) -> int:
        return -(-(len(self._tokens) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one row's fields of a batch, each [sequence_length], as `packing.unpack` does.

        Raises IndexError for a row that does not exist, and OSError for an id that the tokenizer
        does not have.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        start = int(index) * self.sequence_length
        tokens = self._tokens[start : start + self.sequence_length + 1]
        # As unsigned numbers, negative ids are too large as well.
        if (wrong := tokens[tokens.astype(np.uint64) >= self.vocab_size]).size:
            raise OSError(
                f"{self.path}: row {index} has the id {wrong[0]}, and the tokenizer has "
                f"{self.vocab_size} ids: set data.tokenizer to the one that made the file"
            )
        return unpack(tokens, self._lengths(start, tokens), self.sequence_length)

    @property
    def num_tokens(self) -> int:
        """Returns how many tokens the file has."""
        return len(self._tokens)

    @property
    def num_targets(self) -> int:
        """Returns how many tokens the file has besides the first one.

        The first tokens of documents are no targets, and how many there are is not known.
        """
        return len(self._tokens) - 1

    @property
    def sha256(self) -> str:
        """Returns a checksum of the files' lengths and of parts of them, spread evenly."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for path in (self.path, self.path.with_suffix(".idx")):
            if path.exists():
                content = np.memmap(path, np.uint8, "r")
                digest.update(f"{path.suffix} {len(content)}".encode())
                last = max(0, len(content) - _SAMPLE_BYTES)
                for start in np.linspace(0, last, _SAMPLES, dtype=np.int64):
                    digest.update(content[start : start + _SAMPLE_BYTES].tobytes())
        return digest.hexdigest()

    def _lengths(self, start: int, tokens: np.ndarray) -> np.ndarray:
        """Returns the lengths of a row's pieces, whose first token is the file's `start`-th."""
        if self._index is None:
            ends = np.flatnonzero(tokens == self.boundary_id) + 1
        else:
            ends = self._index.document_ends(start, start + len(tokens)) - start
        lengths = np.diff(ends, prepend=0, append=len(tokens))
        return lengths[lengths > 0]  # a document may be empty

    @functools.cached_property
    def _index(self) -> "_MegatronIndex | None":
        return _read_index(self.path) if self.path.suffix == ".bin" else None

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        """Returns all tokens, which stay on disk."""
        if self._index is not None:
            return np.memmap(self.path, self._index.dtype, "r")
        try:
            # np.load would also open archives and pickled objects.
            tokens = np.lib.format.open_memmap(self.path, mode="r")
        except (ValueError, EOFError) as error:
            raise _damaged(self.path, " ".join(str(error).split())) from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ConfigError(
                f"{self.path} holds {tokens.dtype} of shape {tokens.shape}: "
                "save its tokens as one dimension of integers"
            )
        return tokens

    def __reduce__(self) -> tuple:
        fields = (self.path, self.sequence_length, self.vocab_size, self.boundary_id)
        return TokenFileRows, fields  # what is mapped cannot be pickled


@dataclasses.dataclass(frozen=True)
class _MegatronIndex:
    """Says where the documents of a .bin file begin. Its arrays stay on disk."""

    dtype: np.dtype  # of the tokens
    first_bytes: np.ndarray  # of each sequence
    first_sequences: np.ndarray  # of each document, and the end of the last one

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Returns the ends of all documents that end after the token `start` and before `stop`."""
        # Every document but the first begins where another one ends.
        documents = range(1, len(self.first_sequences) - 1)
        first = bisect.bisect_right(documents, start, key=self._first_token)
        last = bisect.bisect_left(documents, stop, lo=first, key=self._first_token)
        sequences = self.first_sequences[documents.start + first : documents.start + last]
        # Empty documents at the end of the file begin at no sequence.
        sequences = sequences[sequences < len(self.first_bytes)]
        return self.first_bytes[sequences] // self.dtype.itemsize

    def _first_token(self, document: int) -> int:
        sequence = self.first_sequences[document]
        if sequence == len(self.first_bytes):
            return 2**63
        return int(self.first_bytes[sequence]) // self.dtype.itemsize


def _read_index(path: Path) -> _MegatronIndex:
    """Returns the index of a .bin file. Raises ConfigError if the two do not fit each other."""
    index_path = path.with_suffix(".idx")
    content = np.memmap(index_path, np.uint8, "r") if index_path.stat().st_size else np.zeros(0)
    header = content[: _HEADER.size].tobytes()
    if not header.startswith(_MAGIC) or len(header) < _HEADER.size:
        raise _damaged(index_path, "it is no index of Megatron-LM")
    _, version, code, num_sequences, num_firsts = _HEADER.unpack(header)
    if version != 1 or code not in _TYPES:
        raise _damaged(index_path, f"version {version} with type {code} is no index of integers")
    ends = np.cumsum([_HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_firsts])
    if len(content) < ends[3] or not num_sequences or num_firsts < 2:
        raise _damaged(index_path, "it was cut, or names no document")
    lengths = content[ends[0] : ends[1]].view("<i4")
    first_bytes = content[ends[1] : ends[2]].view("<i8")
    first_sequences = content[ends[2] : ends[3]].view("<i8")
    dtype = np.dtype(_TYPES[code])
    expected = int(first_bytes[-1]) + int(lengths[-1]) * dtype.itemsize
    if path.stat().st_size != expected:
        raise _damaged(path, f"it has {path.stat().st_size} bytes, and its index says {expected}")
    if first_bytes[0] != 0 or first_sequences[0] != 0 or first_sequences[-1] != num_sequences:
        raise _damaged(index_path, "its documents are not all tokens")
    return _MegatronIndex(dtype, first_bytes, first_sequences)


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} is damaged ({reason}): copy or write it again")


def open_token_rows(config: DataConfig, split: str) -> TokenFileRows:
    """Returns the rows of a split of "tokens:DIRECTORY". Nothing is prepared.

    Raises ConfigError for a file that is missing, damaged, or made by another tokenizer, as far as
    its first and last row show.
    """
    directory = Path(expand_path("data.dataset", config.dataset.removeprefix("tokens:")))
    if not is_file_name(split):
        raise ConfigError(
            f"split {show(split)} of data.dataset={config.dataset!r} is no name of a file in it: "
            "set data.dataset to the directory of the file, and the split to its name"
        )
    paths = [directory / f"{split}{suffix}" for suffix in (".bin", ".npy")]
    found = [path for path in paths if path.is_file()]
    if len(found) != 1 or (found[0].suffix == ".bin" and not found[0].with_suffix(".idx").exists()):
        names = " or ".join(sorted({path.stem for path in directory.glob("*.[bn][ip][ny]")}))
        raise ConfigError(
            f"data.dataset={config.dataset!r} has no file {split}.bin with {split}.idx, or "
            f"{split}.npy, and not both: set the split to the name of a file ({names or 'none'})"
        )
    tokenizer = make_tokenizer(config)
    rows = TokenFileRows(
        found[0], config.sequence_length, tokenizer.vocab_size, tokenizer.boundary_id
    )
    if rows.num_tokens < 2:
        raise ConfigError(f"{rows.path} holds {rows.num_tokens} tokens: set the split to another")
    try:
        _ = rows[0], rows[len(rows) - 1]
    except OSError as error:
        raise ConfigError(str(error)) from None
    return rows
