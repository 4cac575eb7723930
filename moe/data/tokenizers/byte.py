"""Takes the bytes of a text as its tokens."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moe.config import BYTE_VOCABULARY


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """Takes the UTF-8 bytes of a text as its ids."""

    name: str = "byte"
    size: int = BYTE_VOCABULARY
    # A byte that UTF-8 never uses marks where a document starts and where it ends.
    boundary_id: int = 0xFF

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Returns no token: the boundary, a byte, has no name."""
        return {}

    @property
    def text_ids(self) -> np.ndarray:
        """Returns all bytes."""
        return np.arange(BYTE_VOCABULARY)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the bytes of each text, [bytes] uint8."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of bytes. Those that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode(errors="replace")
