"""Turns text into token ids, and token ids into text."""

from moe.config import DataConfig
from moe.data.tokenizers.byte import ByteTokenizer


def make_tokenizer(config: DataConfig) -> ByteTokenizer:
    """Returns the tokenizer that `config.tokenizer` names."""
    match config.tokenizer:
        case "byte":
            return ByteTokenizer()
