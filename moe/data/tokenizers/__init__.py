"""Turns text into token ids, and token ids into text."""

from collections.abc import Sequence

from moe.config import DataConfig
from moe.data.tokenizers.byte import ByteTokenizer

Tokenizer = ByteTokenizer


def make_tokenizer(config: DataConfig, special_tokens: Sequence[str] = ()) -> ByteTokenizer:
    """Returns the tokenizer that `config.tokenizer` names, with the ids of special tokens."""
    match config.tokenizer:
        case "byte":
            return ByteTokenizer(special_tokens=tuple(special_tokens))
