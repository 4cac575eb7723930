"""Turns text into token ids, and token ids into text."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from moe.config import ConfigError, DataConfig, RunConfig
from moe.config.checks import expand_path
from moe.config.objectives import special_tokens
from moe.data.tokenizers.byte import ByteVocabulary
from moe.data.tokenizers.huggingface import HuggingFaceVocabulary
from moe.data.tokenizers.sentence_piece import SentencePieceVocabulary
from moe.data.tokenizers.special import add_special_tokens
from moe.data.tokenizers.tiktoken_file import LINE, TiktokenVocabulary
from moe.data.tokenizers.tokenizer import TextStream, Tokenizer, Vocabulary

__all__ = ["TextStream", "Tokenizer", "check_tokenizer", "make_tokenizer", "tokenizer_path"]


def make_tokenizer(config: DataConfig, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Returns the tokenizer that `config.tokenizer` names.

    Its special tokens are those of its file, of `config.special_tokens`, and `special_tokens`, the
    task's own, in this order. A token that the file declares keeps its id. The ids of the others
    follow the vocabulary. Raises ConfigError for a file that is missing, damaged or of no known
    kind, and for special tokens that are ordinary tokens of the file.
    """
    wanted = tuple(dict.fromkeys([*config.special_tokens, *special_tokens]))
    path = tokenizer_path(config)
    if path is None:
        return add_special_tokens(ByteVocabulary(), config, wanted)
    try:
        stat = path.stat()
        # A shard or a prompt each asks for the tokenizer, and a large file takes a second to load.
        key = (stat.st_mtime_ns, stat.st_size)
        return _read_tokenizer(path, key, config, wanted)
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer={config.tokenizer} cannot be read ({error.strerror}): set "
            "data.tokenizer to 'byte', or to the path of a tokenizer.json (launch.tokenizer makes "
            "one), a SentencePiece model or a tiktoken file"
        ) from None


def tokenizer_path(config: DataConfig) -> Path | None:
    """Returns the path of the tokenizer's file with its ~ expanded, or None for bytes."""
    if config.tokenizer == "byte":
        return None
    return Path(expand_path("data.tokenizer", config.tokenizer))


def check_tokenizer(config: RunConfig) -> None:
    """Raises ConfigError for a tokenizer that is wrong or larger than the model's vocabulary.

    It reads the tokenizer's file, and imports no JAX.
    """
    tokenizer = make_tokenizer(config.data, special_tokens(config.task))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the "
            f"{tokenizer.vocab_size} tokens of data.tokenizer={config.data.tokenizer}, special "
            f"tokens included: set model.vocab_size to at least {tokenizer.vocab_size}"
        )


@functools.lru_cache(maxsize=4)
def _read_tokenizer(
    path: Path, key: tuple[int, int], config: DataConfig, wanted: tuple[str, ...]
) -> Tokenizer:
    """Returns the tokenizer of a file. The `key` changes with the file."""
    content = path.read_bytes()
    vocabulary = _read_vocabulary(str(path), content, config.split_pattern, wanted)
    return add_special_tokens(vocabulary, config, wanted)


def _read_vocabulary(
    path: str, content: bytes, pattern: str, wanted: tuple[str, ...]
) -> Vocabulary:
    """Returns the vocabulary of a file, whose content says of which kind it is."""
    fingerprint = hashlib.sha256(content).hexdigest()
    if LINE.match(content):
        return TiktokenVocabulary(path, content, fingerprint, wanted, pattern)
    if pattern:
        raise ConfigError(
            f"data.split_pattern is set, and data.tokenizer={path} is no tiktoken file, which "
            "alone needs it: leave data.split_pattern out"
        )
    is_json = content.lstrip()[:1] == b"{"
    kind = HuggingFaceVocabulary if is_json else SentencePieceVocabulary
    return kind(path, content, fingerprint, wanted)
