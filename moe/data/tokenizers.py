"""Text to token ids and back."""

import dataclasses

import numpy as np

from moe.config import BYTE_VOCABULARY, DataConfig


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are the ids. 0xFF, a byte that UTF-8 never uses, marks where a document starts
    and ends.
    """

    name: str = "byte"
    vocab_size: int = BYTE_VOCABULARY
    boundary_id: int = 0xFF

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text` without boundaries, [bytes] uint16: a prompt."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def encode_document(self, text: str) -> np.ndarray:
        """The ids of `text` between two boundaries, [bytes + 2] uint16: its first byte and its end
        are predicted too.
        """
        return np.pad(self.encode(text), 1, constant_values=self.boundary_id)

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`, [ids] of any integer type. Boundaries are dropped; what is not UTF-8
        becomes U+FFFD.
        """
        ids = np.asarray(ids)
        ids = ids[ids != self.boundary_id]
        # A model's vocabulary may be larger than the tokenizer's: such an id is no byte, like 0xFF.
        return (
            np.where(ids < self.vocab_size, ids, 0xFF)
            .astype(np.uint8)
            .tobytes()
            .decode(errors="replace")
        )


def make_tokenizer(config: DataConfig) -> ByteTokenizer:
    """The tokenizer that `config.tokenizer` names."""
    match config.tokenizer:
        case "byte":
            return ByteTokenizer()
