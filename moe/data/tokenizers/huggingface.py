"""Reads Hugging Face's tokenizer.json with the package `tokenizers`."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.config import ConfigError
from moe.config.checks import show
from moe.config.objectives import TASK_TOKENS
from moe.data.tokenizers.errors import damage_error, ordinary_error

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Texts that spell a special token, in which a file must not find it.
_SPELLINGS = ("{}", "a{}a", " {} ", "{}{}", "\n{}\n")
# Characters from all over Unicode. Together, they have all bytes that occur in UTF-8.
_EVERYWHERE = "".join(
    map(chr, [*range(0x100), *range(0x100, 0xD800, 64), *range(0xE000, 0x110000, 0x1000)])
)


class HuggingFaceVocabulary:
    """Reads a tokenizer.json.

    Truncation and padding that the file asks for are switched off, and its own templates of
    special tokens are not applied.
    """

    # The file does not say which of its special tokens end a text; their names do.
    boundary_id: int | None = None

    def __init__(self, path: str, content: bytes, fingerprint: str, wanted: Sequence[str]):
        from tokenizers import Tokenizer

        # Workers share the cores already. A process that has used these threads also warns at
        # each fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            saved = json.loads(content)
            self._tokenizer = Tokenizer.from_buffer(content)
        except (ValueError, RecursionError) as error:
            raise damage_error(path, "tokenizer.json", error) from None
        self.name = f"huggingface {fingerprint}"
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        _check_model(path, saved["model"], self._tokenizer)
        self._declare(path, wanted)
        self.special_ids = self._find_special_ids(saved)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.text_ids = np.unique([*vocabulary])
        self.size = 1 + max(vocabulary, default=0)
        self._tokenizer.encode_special_tokens = True
        self._keep_out_of_text(path)

    def _declare(self, path: str, wanted: Sequence[str]) -> None:
        """Makes added tokens of the file special, if they are wanted as special tokens.

        Raises ConfigError for a wanted token that is one of the ordinary vocabulary.
        """
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        # Tasks' tokens are special in all commands, also where only text is read or prepared.
        for name in dict.fromkeys([*wanted, *TASK_TOKENS]):
            if name in added:
                self._tokenizer.add_special_tokens([name])
            elif name in wanted and self._tokenizer.token_to_id(name) is not None:
                raise ordinary_error(path, name)

    def _find_special_ids(self, saved: Mapping[str, Any]) -> dict[str, int]:
        """Returns the file's special tokens, without the one for unknown characters.

        Text can become that one.
        """
        model = saved["model"]
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        return {
            token.content: id
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content != unknown
        }

    def _keep_out_of_text(self, path: str) -> None:
        """Lets no text become a special token. Raises ConfigError if that cannot be done.

        `encode_special_tokens` switches the search for special tokens off, but models such as
        Unigram may still find their names as ordinary pieces of text.
        """
        from tokenizers import Regex, pre_tokenizers

        found = [name for name in self.special_ids if self._is_found(name)]
        if not found:
            return
        # Such a name is split after its first character, before the model sees it.
        pattern = "|".join(
            f"{_escape(name[0])}(?={_escape(name[1:])})" for name in found if len(name) > 1
        )
        before = [] if self._tokenizer.pre_tokenizer is None else [self._tokenizer.pre_tokenizer]
        split = pre_tokenizers.Split(Regex(pattern or "(?!)"), "isolated")
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, split])
        if found := [name for name in self.special_ids if self._is_found(name)]:
            raise ConfigError(
                f"data.tokenizer={path} finds its special token {show(found[0])} in plain text: "
                "take another file, or one whose model does not have the token as a piece of text"
            )

    def _is_found(self, name: str) -> bool:
        """Returns whether text that spells a special token becomes it."""
        id = self.special_ids[name]
        texts = [spelling.replace("{}", name) for spelling in _SPELLINGS]
        return any(id in ids for ids in self.encode(texts))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, as the file's decoder makes it."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _escape(text: str) -> str:
    """Returns a regular expression that finds a text, also where spaces have become U+2581."""
    return re.escape(text).replace("\\ ", "[ \u2581]")


def _check_model(path: str, model: Mapping[str, Any], tokenizer: "Tokenizer") -> None:
    """Raises ConfigError for a model that drops what it does not know, or fails on it."""
    token = _missing_token(model, tokenizer)
    if token is not None:
        raise ConfigError(
            f"data.tokenizer={path} would lose text: its vocabulary lacks {show(token)}, and a "
            "token for what is unknown: take a tokenizer of all bytes (ByteLevel or a BPE with "
            "byte_fallback), or one whose unk_token is in its vocabulary"
        )


def _missing_token(model: Mapping[str, Any], tokenizer: "Tokenizer") -> str | None:
    """Returns a token that the model lacks for some text, or None if it has all that it needs."""
    kind = type(tokenizer.model).__name__
    vocabulary = model["vocab"]
    if kind == "Unigram":
        vocabulary = {piece for piece, _ in vocabulary}
    unknown = model.get("unk_token")
    if unknown in vocabulary or model.get("unk_id") is not None:
        return None
    if kind in ("WordLevel", "WordPiece"):  # for which any word may be unknown
        return unknown
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    for character in _characters(tokenizer):
        # It may begin a word, stand within it, end it, or be the whole of it.
        for symbol in (start + character + end for start in ("", prefix) for end in ("", suffix)):
            needed = [symbol]
            # The package's Unigram fails without an unk_id even if it has all the bytes.
            if symbol not in vocabulary and model.get("byte_fallback") and kind == "BPE":
                needed = [f"<0x{byte:02X}>" for byte in symbol.encode()]
            for token in needed:
                if token not in vocabulary:
                    return token
    return None


def _characters(tokenizer: "Tokenizer") -> list[str]:
    """Returns characters that reach the model: those of all bytes, if it is one of bytes."""
    text = _EVERYWHERE
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return sorted(set(text))
