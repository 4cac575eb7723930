"""Trains a tokenizer on a data set, and shows how many bytes its tokens hold.

Examples:
    python -m launch.tokenizer --data=stdlib --vocab_size=8192 --out=~/.cache/moe/stdlib_8192.json
    python -m launch.tokenizer --data=text:notes --vocab_size=32768 --out=notes.json
    python -m launch.tokenizer --data=stdlib --vocab_size=50257 --out=big.json --max_bytes=50000000

The tokenizer is a byte-level BPE: it begins with the 256 bytes and a token <|endoftext|>, and then
makes the most frequent pair of neighbouring tokens into a new token, again and again, until there
are --vocab_size tokens. Pairs are counted within words, which may begin with a space. Every text
has ids, and decoding them gives the same text back, to the byte.

The result is a tokenizer.json, which the package `tokenizers` reads as well. Train with it by
    --config.data.tokenizer=FILE --config.model.vocab_size=VOCAB_SIZE
The same text gives the same file, byte for byte.

Training reads the train split, or --max_bytes of it from all over. The table then says how many
bytes a token holds on held-out text, the validation split, for this size and for others. (A smaller
BPE is the beginning of a larger one, so they cost one training together.) More bytes per token make
sequences shorter, so that the same text takes fewer steps. A larger vocabulary has more embeddings
to learn, and more logits to compute for each token. Take a size from which the bytes per token grow
little; for a model of a few million parameters, that is some thousands.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from launch import command_line
from moe.config import ConfigError, DataConfig
from moe.config.checks import expand_path
from moe.config.data import is_token_files
from moe.data.sources import check_dataset, open_documents
from moe.data.tokenizers.huggingface import HuggingFaceVocabulary
from moe.data.tokenizers.training import LARGEST, SMALLEST, Merges, sample_texts, train_bpe
from moe.files import write_whole
from moe.storage.paths import make_directory

SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 50257)
_HELD_OUT_BYTES = 2_000_000


def train_tokenizer(config: DataConfig, vocab_size: int, path: Path, max_bytes: int) -> str:
    """Trains a BPE on the train split, writes it to `path`, and returns the table of sizes.

    Raises ConfigError for a text that is too small for the vocabulary.
    """
    documents = open_documents(config, config.train_split)
    texts = sample_texts(documents, max_bytes)
    show_progress = sys.stderr.isatty()
    merges = train_bpe(texts, max(vocab_size, *SIZES), len(documents), show_progress)
    content = merges.tokenizer_json(vocab_size)
    held_out = open_documents(config, config.validation_split)
    table = size_table(merges, vocab_size, list(sample_texts(held_out, _HELD_OUT_BYTES)))
    write_whole(path, content)
    return table


def size_table(merges: Merges, vocab_size: int, texts: Sequence[str]) -> str:
    """Returns the bytes per token of some texts for each size of a vocabulary, as a table."""
    num_bytes = sum(len(text.encode()) for text in texts)
    lines = [f"{num_bytes:,} held-out bytes:", "  vocabulary   bytes per token       tokens"]
    sizes = sorted({vocab_size, *(size for size in SIZES if size <= merges.vocab_size)})
    for size in tqdm(sizes, "comparing sizes", unit="size", disable=None, leave=False):
        num_tokens = count_tokens(merges.tokenizer_json(size), texts)
        mark = "  <- this one" if size == vocab_size else ""
        ratio = num_bytes / max(num_tokens, 1)
        lines.append(f"  {size:>10,}   {ratio:>15.3f}   {num_tokens:>10,}{mark}")
    return "\n".join(lines)


def count_tokens(tokenizer_json: str, texts: Iterable[str]) -> int:
    """Returns the number of tokens of all texts together, without boundaries."""
    vocabulary = HuggingFaceVocabulary("the new tokenizer", tokenizer_json.encode(), "", ())
    return sum(len(ids) for text in texts for ids in vocabulary.encode([text]))


def read_out(text: str) -> Path:
    """Returns the path of --out, into whose directory a file can be written.

    Raises ConfigError, or OSError if the directory cannot be made.
    """
    path = Path(expand_path("--out", text))
    make_directory(path.parent, "--out")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        what = "is a directory" if path.is_dir() else "cannot be written"
        raise ConfigError(f"--out={text} {what}: set --out to a file, such as tokenizer.json")
    return path


def main(values: flags.FlagValues) -> None:
    if not SMALLEST <= values.vocab_size <= LARGEST:
        raise ConfigError(
            f"--vocab_size={values.vocab_size} is out of range: "
            f"set it from {SMALLEST} (the bytes and <|endoftext|>) to {LARGEST}"
        )
    if values.max_bytes < 1:
        raise ConfigError(f"--max_bytes={values.max_bytes} is not positive: set it to 1 or more")
    config = DataConfig(
        dataset=values.data,
        text_field=values.text_field,
        train_split=values.train_split,
        validation_split=values.validation_split,
        directory=values.directory,
    )
    if is_token_files(config.dataset):
        raise ConfigError(
            f"--data={config.dataset} holds tokens and no text: "
            "set --data to the text that they were made from"
        )
    check_dataset(config)
    path = read_out(values.out)
    print(train_tokenizer(config, values.vocab_size, path, values.max_bytes))
    print(
        f"wrote {path}: train with --config.data.tokenizer={values.out} "
        f"--config.model.vocab_size={values.vocab_size}"
    )


def define_flags() -> None:
    """Defines the flags of this command."""
    defaults = DataConfig()
    flags.DEFINE_string(
        "data", None, "The data set, as data.dataset names it: stdlib, text:PATH, a TFDS name."
    )
    flags.DEFINE_integer("vocab_size", None, "How many tokens there are to be, bytes included.")
    flags.DEFINE_string("out", None, "The tokenizer.json to write.")
    flags.mark_flags_as_required(["data", "vocab_size", "out"])
    flags.DEFINE_string("text_field", defaults.text_field, "The field that holds the text.")
    flags.DEFINE_string("train_split", defaults.train_split, "The split to train on.")
    flags.DEFINE_string(
        "validation_split", defaults.validation_split, "The split that the table is about."
    )
    flags.DEFINE_string("directory", defaults.directory, "Where prepared data sets lie.")
    flags.DEFINE_integer(
        "max_bytes",
        300_000_000,
        "Bytes of text to train on at most, taken from all over the split. Memory grows with the "
        "number of different words in them.",
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main, __doc__)
