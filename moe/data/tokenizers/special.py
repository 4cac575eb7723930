"""Gives special tokens their ids, and finds the token that stands between documents."""

from collections.abc import Mapping, Sequence

from moe.config import ConfigError, DataConfig
from moe.data.tokenizers.tokenizer import Tokenizer, Vocabulary

# The names that models give to the token at the end of a text, and to the one at its beginning.
_END_NAMES = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)
_BEGIN_NAMES = (
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<|bos|>",
    "[BOS]",
    "<｜begin▁of▁sentence｜>",
    "[CLS]",
)
_NEW_NAME = "<|endoftext|>"


def add_special_tokens(
    vocabulary: Vocabulary, config: DataConfig, wanted: Sequence[str]
) -> Tokenizer:
    """Returns a tokenizer with the wanted special tokens.

    Its boundary is the one that the file itself names, or else the special token whose name is that
    of an end or a beginning of text. If there is none, the boundary is a new token, the first one
    after the vocabulary. Raises ConfigError where several tokens could be the boundary.
    """
    special_ids = dict(vocabulary.special_ids)
    if vocabulary.boundary_id is not None:
        _append(special_ids, wanted, vocabulary.size)
        return Tokenizer(vocabulary, special_ids, vocabulary.boundary_id)
    name = _find_boundary(special_ids, config)
    is_new = name not in special_ids and name not in wanted
    _append(special_ids, [name, *wanted] if is_new else wanted, vocabulary.size)
    return Tokenizer(vocabulary, special_ids, special_ids[name])


def _append(special_ids: dict[str, int], names: Sequence[str], next_id: int) -> None:
    """Gives each name that has no id yet the next one."""
    for name in names:
        if name not in special_ids:
            special_ids[name] = next_id
            next_id += 1


def _find_boundary(declared: Mapping[str, int], config: DataConfig) -> str:
    """Returns the name of the token that is the boundary, which may be a new one."""
    ends_and_begins = [*_END_NAMES, *_BEGIN_NAMES]
    chosen = [name for name in ends_and_begins if name in config.special_tokens]
    ends = [name for name in _END_NAMES if name in declared]
    begins = [name for name in _BEGIN_NAMES if name in declared]
    names = chosen[:1] if chosen else ends or begins
    if len(names) > 1:
        raise ConfigError(
            f"data.tokenizer={config.tokenizer} has several tokens that end or begin a text "
            f"({', '.join(names)}): name the one that stands between documents in "
            "data.special_tokens"
        )
    return names[0] if names else _NEW_NAME
