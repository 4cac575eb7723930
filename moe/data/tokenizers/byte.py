"""Takes the bytes of a text as its tokens."""

import dataclasses

import numpy as np

from moe.config import BYTE_VOCABULARY


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Takes the UTF-8 bytes of a text as its ids.

    0xFF, a byte that UTF-8 never uses, marks where a document starts and where it ends.
    """

    name: str = "byte"
    vocab_size: int = BYTE_VOCABULARY
    boundary_id: int = 0xFF
    special_tokens: tuple[str, ...] = ()  # their ids follow those of the bytes

    @property
    def special_ids(self) -> dict[str, int]:
        """Returns the ids of the special tokens, which no text becomes."""
        return {name: self.vocab_size + i for i, name in enumerate(self.special_tokens)}

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text` without boundaries, [bytes] uint16, as for a prompt."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def encode_document(self, text: str) -> np.ndarray:
        """Returns the ids of `text` between two boundaries, [bytes + 2] uint16.

        With the boundaries, a model also predicts the first byte of a document and its end.
        """
        return np.pad(self.encode(text), 1, constant_values=self.boundary_id)

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of `ids`, [ids] of any integer type.

        Boundaries are dropped, and ids that are not UTF-8 become U+FFFD.
        """
        ids = np.asarray(ids)
        ids = ids[ids != self.boundary_id]
        # A model's vocabulary may be larger than the tokenizer's. Such an id becomes 0xFF, which
        # is not UTF-8 either.
        text = np.where(ids < self.vocab_size, ids, 0xFF).astype(np.uint8).tobytes()
        return text.decode(errors="replace")
