"""Tests what a tokenizer.json does with characters that its vocabulary lacks."""

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe.config import ConfigError, DataConfig
from moe.data.tokenizers import TextStream, make_tokenizer
from moe.data.tokenizers.huggingface import _EVERYWHERE
from tests.data.tokenizers.conftest import byte_characters

LETTERS = {"a": 0, "b": 1}
# The symbols of all bytes, and those of the bytes that occur in UTF-8.
ALPHABET = {symbol: id for id, symbol in enumerate(sorted(byte_characters()))}
IN_UTF8 = [s for s, byte in byte_characters().items() if byte in _EVERYWHERE.encode()]
USED = {symbol: id for id, symbol in enumerate(IN_UTF8)}
FALLBACK = {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
BOTH = {"continuing_subword_prefix": "#", "end_of_word_suffix": "$"}
# The symbols of all bytes wherever they stand in a word, but those at the end of a longer one.
PLACED = [form.format(s) for s in ALPHABET for form in ("{}", "#{}", "{}$")]
TEXT = "az \0 naïve 数学 🙂 \u0378 \U0010ffff"


def config_of(model: models.Model, tmp_path: Path, splits_bytes: bool = False) -> DataConfig:
    """Returns a config with a file of a model, by itself or over the symbols of bytes."""
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    if splits_bytes:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "x.json"))
    return DataConfig(tokenizer=str(tmp_path / "x.json"))


def without(vocabulary: dict[str, int], name: str) -> dict[str, int]:
    """Returns a vocabulary without one of its tokens."""
    assert name in vocabulary
    return {token: id for token, id in vocabulary.items() if token != name}


def unigram(symbols: dict[str, int], **options: Any) -> models.Model:
    return models.Unigram([(symbol, -1.0) for symbol in symbols], **options)


def test_all_bytes_of_utf8_are_asked_for() -> None:
    """UTF-8 never has the bytes C0 and C1, which would be too long a form, nor those from F5."""
    assert set(_EVERYWHERE.encode()) == {*range(0xC0), *range(0xC2, 0xF5)}


@pytest.mark.parametrize(
    ("model", "splits_bytes", "lacks"),
    [
        (models.BPE(LETTERS, []), False, "\x00"),
        (models.BPE(LETTERS, []), True, "!"),
        (models.BPE(without(ALPHABET, "Í"), []), True, "Í"),
        (models.BPE(without(ALPHABET, "Í"), [], unk_token="<unk>"), True, "Í"),
        (models.BPE(ALPHABET, [], end_of_word_suffix="$"), True, "!$"),
        (models.BPE({s: id for id, s in enumerate(PLACED)}, [], **BOTH), True, "#!$"),
        (models.BPE(LETTERS, [], byte_fallback=True), False, "<0x00>"),
        (
            models.BPE(LETTERS | without(FALLBACK, "<0xCD>"), [], byte_fallback=True),
            False,
            "<0xCD>",
        ),
        (models.BPE(LETTERS, [], unk_token="<unk>"), False, "\x00"),
        (unigram(LETTERS), False, "\x00"),
        (unigram(LETTERS | FALLBACK, byte_fallback=True), False, "\x00"),
        (models.WordLevel(LETTERS, unk_token="<unk>"), False, "<unk>"),
        (models.WordPiece(LETTERS, unk_token="[UNK]"), False, "[UNK]"),
    ],
)
def test_a_file_that_would_lose_text_is_refused(
    model: models.Model, splits_bytes: bool, lacks: str, tmp_path: Path
) -> None:
    """The package drops some of it without a trace, and raises bare exceptions for the rest."""
    config = config_of(model, tmp_path, splits_bytes)
    message = re.escape(f"would lose text: its vocabulary lacks {lacks!r}, and a token for what")
    with pytest.raises(ConfigError, match=message) as caught:
        make_tokenizer(config)
    assert config.tokenizer in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "splits_bytes"),
    [
        (models.BPE(ALPHABET, []), True),
        (models.BPE(USED, []), True),
        (models.BPE(USED, [], unk_token="<unk>"), True),
        (models.BPE(LETTERS | FALLBACK, [], byte_fallback=True), False),
        (unigram(USED), True),
    ],
)
def test_a_file_of_all_bytes_is_taken(
    model: models.Model, splits_bytes: bool, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(config_of(model, tmp_path, splits_bytes))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    "model",
    [
        models.BPE(LETTERS, [], unk_token="b"),
        unigram(LETTERS, unk_id=1),
        models.WordLevel(LETTERS, unk_token="b"),
        models.WordPiece(LETTERS, unk_token="b"),
    ],
)
def test_a_token_for_what_is_unknown_is_enough(model: models.Model, tmp_path: Path) -> None:
    assert make_tokenizer(config_of(model, tmp_path)).encode("z").tolist() == [1]


def test_a_stream_keeps_what_it_has_shown_before_a_broken_character(tmp_path: Path) -> None:
    """The package decodes all bytes that stand together as U+FFFD if one of them is wrong."""
    model = models.BPE(LETTERS | FALLBACK, [], byte_fallback=True)
    tokenizer = make_tokenizer(config_of(model, tmp_path))
    ids = tokenizer.encode("好好")
    for end, shown, at_once in ((6, "好好", "好好"), (5, "好" + "\ufffd" * 4, "\ufffd" * 5)):
        stream = TextStream(tokenizer)
        parts = [stream.push([id]) for id in ids[:end]]
        assert "".join([*parts, stream.finish()]) == shown
        assert tokenizer.decode(ids[:end]) == at_once
