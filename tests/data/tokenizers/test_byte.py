"""Tests that texts become ids and come back."""

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data.tokenizers import make_tokenizer
from moe.data.tokenizers.byte import ByteTokenizer


def test_ids_are_utf8_bytes():
    ids = ByteTokenizer().encode("aé")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [0x61, 0xC3, 0xA9]


def test_a_document_lies_between_boundaries():
    ids = ByteTokenizer().encode_document("aé")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [0xFF, 0x61, 0xC3, 0xA9, 0xFF]
    assert ByteTokenizer().encode_document("").tolist() == [0xFF, 0xFF]


@pytest.mark.parametrize("text", ["", "def f():\n\treturn 0\r\n\0", "naïve – 数学 🙂"])
def test_decoding_gives_the_text_back(text: str):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_document(text)) == text


def test_no_text_has_the_boundary_in_it():
    every_character = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    assert ByteTokenizer().boundary_id not in ByteTokenizer().encode(every_character)


def test_what_is_not_utf8_is_replaced():
    assert ByteTokenizer().decode([0x61, 0xC3, 0x62]) == "a\ufffdb"
    assert ByteTokenizer().decode(np.array([0x61, 300, 70_000, 0x62], np.int32)) == "a\ufffd\ufffdb"


def test_make_tokenizer():
    assert make_tokenizer(DataConfig(tokenizer="byte")) == ByteTokenizer()
    assert ByteTokenizer().vocab_size == 256
