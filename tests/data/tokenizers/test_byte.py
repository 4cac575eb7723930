"""Tests that texts become ids and come back."""

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data.tokenizers import make_tokenizer

TOKENIZER = make_tokenizer(DataConfig())


def test_ids_are_utf8_bytes():
    ids = TOKENIZER.encode("aé")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [0x61, 0xC3, 0xA9]


def test_a_document_lies_between_boundaries():
    ids = TOKENIZER.encode_document("aé")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [0xFF, 0x61, 0xC3, 0xA9, 0xFF]
    assert TOKENIZER.encode_document("").tolist() == [0xFF, 0xFF]


@pytest.mark.parametrize("text", ["", "def f():\n\treturn 0\r\n\0", "naïve – 数学 🙂"])
def test_decoding_gives_the_text_back(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode_document(text)) == text


def test_no_text_has_the_boundary_in_it():
    every_character = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    assert TOKENIZER.boundary_id not in TOKENIZER.encode(every_character)


def test_what_is_not_utf8_is_replaced():
    assert TOKENIZER.decode([0x61, 0xC3, 0x62]) == "a\ufffdb"
    assert TOKENIZER.decode(np.array([0x61, 300, 70_000, 0x62], np.int32)) == "a\ufffd\ufffdb"


def test_special_tokens_follow_the_bytes():
    assert (TOKENIZER.vocab_size, TOKENIZER.boundary_id) == (256, 0xFF)
    tokenizer = make_tokenizer(DataConfig(special_tokens=("<a>", "<b>")), ["<c>", "<a>"])
    assert tokenizer.special_ids == {"<a>": 256, "<b>": 257, "<c>": 258}
    assert (tokenizer.vocab_size, tokenizer.boundary_id) == (259, 0xFF)
    assert tokenizer.encode("<a>").tolist() == list(b"<a>")
    assert tokenizer.decode([0x61, 256, 0x62, 258, 259]) == "ab\ufffd"
