"""Trains a tiny tokenizer of each kind on the text of this repository."""

import base64
import io
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.data.tokenizers.training import train_bpe

ROOT = Path(__file__).parents[3]
TEXTS = [path.read_text() for path in sorted((ROOT / "moe" / "config").glob("*.py"))]
# Words may have a space before them, runs of spaces stay together, and nothing is left out.
SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the path of a file of each kind."""
    directory = tmp_path_factory.mktemp("tokenizers")
    merges = train_bpe(TEXTS, 600)
    contents = {
        "bpe.json": merges.tokenizer_json(600).encode(),
        "unigram.json": unigram_json().encode(),
        "bytes.model": sentence_piece(
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["<tool>"],
            control_symbols=["<pad2>"],
        ),
        "unigram.model": sentence_piece(model_type="unigram"),
        "ranks.tiktoken": ranks(merges.saved["model"]["merges"]),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return {name: directory / name for name in contents}


def unigram_json() -> str:
    """Returns a Unigram tokenizer.json. As in T5's, its special tokens are pieces of text too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def sentence_piece(**options: object) -> bytes:
    """Returns a SentencePiece model of 500 pieces."""
    model = io.BytesIO()
    lines = [line for text in TEXTS for line in text.split("\n")] + ["a | b"] * 100
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=500, minloglevel=2, **options
    )
    return model.getvalue()


def ranks(merges: list[list[str]]) -> bytes:
    """Returns a tiktoken file of the bytes and the merges."""
    characters = byte_characters()
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(characters[character] for character in "".join(pair)) for pair in merges]
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    return b"".join(lines)


def byte_characters() -> dict[str, int]:
    """Returns the byte that each character of a byte-level BPE's file stands for.

    Printable characters of Latin-1 stand for themselves, and the others are moved to U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {chr(0x100 + number): byte for number, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved
