"""Tests the tokenizers that are read from files, against the packages that define the files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from moe.config import ConfigError, DataConfig, RunConfig
from moe.data.tokenizers import TextStream, Tokenizer, check_tokenizer, make_tokenizer
from tests.data.tokenizers.conftest import SPLIT_PATTERN, TEXTS

FILES = ("bpe.json", "unigram.json", "bytes.model", "unigram.model", "ranks.tiktoken")
KINDS = ("byte", *FILES)
# Those that change no character of any text.
LOSSLESS = ("byte", "bpe.json", "bytes.model", "ranks.tiktoken")
HOSTILE = [
    "",
    "def f(x):\n\treturn  x  \n\n",
    "family 👩‍👩‍👧‍👦, flag 🏳️‍🌈, skin 👋🏽",
    "e\u0301 a\u0323\u0302 \u0301",  # combining marks, also without a letter
    "שלום \u202eabc\u202c مرحبا",  # right to left
    "nul \0 and \x01\x7f\x85\xa0\u2028\ufeff\ufffd",
    "one\r\ntwo\r\n\r\n",
    "ﬁ ①ａ Å Å",  # what normalisation would change
    " \t leading and trailing \t ",
    "𝒳 數學 \U0010ffff \ue000",
]
SPELLED = ["<|endoftext|>", "</s>", "<s>", "<pad>", "<tool>", "<pad2>", "<new>", "<task>"]


def config_of(kind: str, files: dict[str, Path], **fields: object) -> DataConfig:
    pattern = SPLIT_PATTERN if kind == "ranks.tiktoken" else ""
    path = "byte" if kind == "byte" else str(files[kind])
    return DataConfig(tokenizer=path, **{"split_pattern": pattern} | fields)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, files: dict[str, Path]) -> Tokenizer:
    tokens = ("<tool>", "<new>")
    return make_tokenizer(config_of(request.param, files, special_tokens=tokens), ["<task>"])


def own_ids(kind: str, path: Path, text: str) -> list[int]:
    """Returns the ids that the package of a kind itself gives to a text."""
    if path.suffix == ".model":
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)
    if path.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # which switches its cache off
        tokens = load_tiktoken_bpe(str(path))
    return tiktoken.Encoding(
        kind, pat_str=SPLIT_PATTERN, mergeable_ranks=tokens, special_tokens={}
    ).encode_ordinary(text)


@pytest.mark.parametrize("kind", FILES)
def test_ids_are_those_of_the_package_itself(kind: str, files: dict[str, Path]) -> None:
    tokenizer = make_tokenizer(config_of(kind, files))
    for text in [*HOSTILE, TEXTS[0]]:
        assert tokenizer.encode(text).tolist() == own_ids(kind, files[kind], text)
    together = tokenizer.encode_all(HOSTILE)
    assert [ids.tolist() for ids in together] == [tokenizer.encode(t).tolist() for t in HOSTILE]


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back(kind: str, text: str, files: dict[str, Path]) -> None:
    tokenizer = make_tokenizer(config_of(kind, files))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    document = tokenizer.encode_document(text)
    assert document[0] == document[-1] == tokenizer.boundary_id
    assert tokenizer.decode(document) == text


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("unit", ["a", " "])
def test_a_megabyte_without_a_break_comes_back(
    kind: str, unit: str, files: dict[str, Path]
) -> None:
    tokenizer, text = make_tokenizer(config_of(kind, files)), unit * (10**6 // len(unit.encode()))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_long_text_has_the_ids_of_its_parts(files: dict[str, Path]) -> None:
    """A tiktoken file's long texts are split by another package."""
    tokenizer = make_tokenizer(config_of("ranks.tiktoken", files))
    text = "".join(TEXTS) * (1 + 100_000 // len("".join(TEXTS)))
    assert tokenizer.encode(text).tolist() == own_ids("x", files["ranks.tiktoken"], text)


@pytest.mark.parametrize("kind", ["unigram.json", "unigram.model"])
def test_what_a_file_normalises_is_what_its_package_does(kind: str, files: dict[str, Path]) -> None:
    tokenizer = make_tokenizer(config_of(kind, files))
    text = "a plain sentence."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if kind == "unigram.model":
        assert tokenizer.decode(tokenizer.encode("  two  spaces ﬁ\n")) == "two spaces fi"


def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer) -> None:
    special = {*tokenizer.special_ids.values(), tokenizer.boundary_id}
    for name in (*SPELLED, *tokenizer.special_ids):
        for text in (name, f"a{name}b", f" {name} ", name * 3, f"\n{name}\n", name[:-1], name[1:]):
            ids = tokenizer.encode(text)
            assert special.isdisjoint(ids.tolist())
            # The names have plain characters, which all of these tokenizers leave as they are.
            assert tokenizer.decode(ids).strip() == text.strip()


def test_special_tokens_have_ids_after_the_vocabulary(tokenizer: Tokenizer) -> None:
    new = [tokenizer.special_ids[name] for name in ("<new>", "<task>")]
    assert new == [tokenizer.vocab_size - 2, tokenizer.vocab_size - 1]
    ids = [*tokenizer.special_ids.values()]
    assert len(set(ids)) == len(ids) and max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([*ids, tokenizer.boundary_id]) == ""


def test_an_id_beyond_the_vocabulary_is_shown(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    decoded = tokenizer.decode([*a, tokenizer.vocab_size, 10**6, *b])
    assert re.fullmatch("a\ufffd\ufffd ?b", decoded)


def test_a_lone_surrogate_is_refused_in_one_line(tokenizer: Tokenizer) -> None:
    message = (
        r"^text 'ab\\ud800c' has the surrogate U\+D800 at character 2, which is half of a "
        "character: mend or remove it$"
    )
    with pytest.raises(ConfigError, match=message):
        tokenizer.encode("ab\ud800c")


def test_whole_characters_are_streamed(tokenizer: Tokenizer) -> None:
    for text in HOSTILE:
        ids = tokenizer.encode_document(text)
        stream = TextStream(tokenizer)
        parts = [stream.push([id]) for id in ids]
        assert "".join([*parts, stream.finish()]) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts)


def test_a_long_run_of_spaces_is_streamed_in_linear_time(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_decoded, decode = 0, tokenizer.vocabulary.decode

    def counted(ids: list[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(ids)
        return decode(ids)

    space = int(tokenizer.encode("a  b")[1])
    ids = [*tokenizer.encode("a"), *[space] * 1000, *tokenizer.encode("b c")]
    expected = tokenizer.decode(ids)
    monkeypatch.setattr(type(tokenizer.vocabulary), "decode", lambda self, ids: counted(ids))
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push([id]) for id in ids), stream.finish()]) == expected
    assert num_decoded < 200 * len(ids)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_text_of_all_ids(
    kind: str, data: st.DataObject, files: dict[str, Path]
) -> None:
    tokenizer = make_tokenizer(config_of(kind, files, special_tokens=("<new>",)))
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=12)
    prompt, chunks = data.draw(ids), data.draw(st.lists(ids, max_size=5))
    stream = TextStream(tokenizer, prompt)
    text = "".join([*(stream.push(chunk) for chunk in chunks), stream.finish()])
    everything = tokenizer.decode([*prompt, *(id for chunk in chunks for id in chunk)])
    # What a prompt leaves unfinished is shown with it, and its bytes do not join later ones.
    if not tokenizer.decode(prompt).endswith("\ufffd"):
        assert tokenizer.decode(prompt) + text == everything


def test_the_space_between_a_prompt_and_its_continuation_is_streamed(
    files: dict[str, Path],
) -> None:
    tokenizer = make_tokenizer(config_of("bytes.model", files))
    prompt, new = tokenizer.encode("the value"), tokenizer.encode("of")
    assert tokenizer.decode(new) == "of"
    assert TextStream(tokenizer, prompt).push(new) == " of"


def boundary_name(tokenizer: Tokenizer) -> str:
    return {id: name for name, id in tokenizer.special_ids.items()}[tokenizer.boundary_id]


def test_the_boundary_is_the_files_own_or_a_new_token(files: dict[str, Path]) -> None:
    names = {kind: boundary_name(make_tokenizer(config_of(kind, files))) for kind in FILES}
    assert names == {
        "bpe.json": "<|endoftext|>",
        "unigram.json": "</s>",
        "bytes.model": "</s>",
        "unigram.model": "</s>",
        "ranks.tiktoken": "<|endoftext|>",
    }
    ranks = make_tokenizer(config_of("ranks.tiktoken", files, special_tokens=("<a>",)))
    assert ranks.special_ids == {"<|endoftext|>": 599, "<a>": 600} and ranks.boundary_id == 599
    named = config_of("ranks.tiktoken", files, special_tokens=("<a>", "<|endoftext|>"))
    assert make_tokenizer(named).special_ids == {"<a>": 599, "<|endoftext|>": 600}


def changed(path: Path, tmp_path: Path, change) -> DataConfig:
    """Returns a config with a copy of a tokenizer.json that `change` has changed."""
    saved = json.loads(path.read_text())
    change(saved)
    copy = tmp_path / "changed.json"
    copy.write_text(json.dumps(saved))
    return DataConfig(tokenizer=str(copy))


def add_token(saved: dict, name: str, special: bool = True) -> None:
    id = len(saved["model"]["vocab"]) + len(saved["added_tokens"])
    token = saved["added_tokens"][0] | {"id": id, "content": name, "special": special}
    saved["added_tokens"].append(token)


def test_several_possible_boundaries_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    config = changed(files["bpe.json"], tmp_path, lambda saved: add_token(saved, "</s>"))
    with pytest.raises(ConfigError, match=r"\(<\|endoftext\|>, </s>\): name the one that stands"):
        make_tokenizer(config)
    chosen = DataConfig(tokenizer=config.tokenizer, special_tokens=("</s>",))
    assert boundary_name(make_tokenizer(chosen)) == "</s>"


def test_a_token_of_the_file_that_is_found_in_text_can_be_made_special(
    files: dict[str, Path], tmp_path: Path
) -> None:
    config = changed(
        files["bpe.json"], tmp_path, lambda saved: add_token(saved, "<call>", special=False)
    )
    found = make_tokenizer(config)
    assert "<call>" not in found.special_ids and len(found.encode("<call>")) == 1
    special = make_tokenizer(DataConfig(tokenizer=config.tokenizer, special_tokens=("<call>",)))
    of_task = make_tokenizer(config, ["<call>"])  # as a task declares its mask
    for tokenizer in (special, of_task):
        assert tokenizer.special_ids["<call>"] == found.encode("<call>")[0]
        assert tokenizer.special_ids["<call>"] not in tokenizer.encode("a<call>b")
        assert tokenizer.decode(tokenizer.encode("a<call>b")) == "a<call>b"


def test_a_piece_that_a_model_finds_in_text_can_be_made_special(files: dict[str, Path]) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(files["bytes.model"]))
    id = own.piece_to_id("<tool>")
    assert id in own.encode("a<tool>b")
    tokenizer = make_tokenizer(config_of("bytes.model", files, special_tokens=("<tool>",)))
    assert tokenizer.special_ids["<tool>"] == id
    ids = tokenizer.encode("a<tool>b")
    assert id not in ids and tokenizer.decode(ids) == "a<tool>b"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("bpe.json", "self"), ("unigram.model", "▁the"), ("ranks.tiktoken", " the")],
)
def test_an_ordinary_token_cannot_be_special(kind: str, name: str, files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=f"names '{name}', an ordinary token of .*{kind}"):
        make_tokenizer(config_of(kind, files, special_tokens=(name,)))


def test_truncation_padding_and_templates_of_a_file_are_left_out(
    files: dict[str, Path], tmp_path: Path
) -> None:
    own = tokenizers.Tokenizer.from_file(str(files["bpe.json"]))
    own.enable_truncation(max_length=3)
    own.enable_padding(length=50)
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    own.save(str(tmp_path / "short.json"))
    tokenizer = make_tokenizer(DataConfig(tokenizer=str(tmp_path / "short.json")))
    expected = make_tokenizer(config_of("bpe.json", files)).encode(TEXTS[0])
    np.testing.assert_array_equal(tokenizer.encode(TEXTS[0]), expected)


def test_a_changed_file_is_read_again(files: dict[str, Path], tmp_path: Path) -> None:
    config = changed(files["bpe.json"], tmp_path, lambda saved: None)
    before = make_tokenizer(config)
    assert make_tokenizer(config) is before
    changed(files["bpe.json"], tmp_path, lambda saved: add_token(saved, "<call>"))
    after = make_tokenizer(config)
    assert after.name != before.name and after.vocab_size == before.vocab_size + 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"{", r"cannot be read as a tokenizer.json \("),
        ("x.json", b'{"version": "1.0"}', r"cannot be read as a tokenizer.json \("),
        ("x.model", b"", "cannot be read as a SentencePiece model"),
        ("x.model", b"\x00\x01garbage", "cannot be read as a SentencePiece model"),
        ("x.tiktoken", b"QQ== 0\nQg== x\n", r"tiktoken file, line 2 \("),
        ("x.tiktoken", b"QQ== 0\n", r"tiktoken file \(it has no byte 0\)"),
        ("x.tiktoken", b"QQ== 0\nQg== 0\n", r"line 2 \(it has the token or the rank of line 1\)"),
        ("x.tiktoken", b"QQ== 0\nQQ== 1\n", r"line 2 \(it has the token or the rank of line 1\)"),
        ("x.tiktoken", b"QQ== 0\nQg== -5\n", r"line 2 \(rank -5 is not between 0 and"),
        ("x.tiktoken", b"QQ== 9999999999\n", r"line 1 \(rank 9999999999 is not between 0 and"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    pattern = SPLIT_PATTERN if name == "x.tiktoken" else ""
    with pytest.raises(ConfigError, match=message) as caught:
        make_tokenizer(DataConfig(tokenizer=str(path), split_pattern=pattern))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_cut_file_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("bpe.json", "bytes.model"):
        path = tmp_path / kind
        path.write_bytes(files[kind].read_bytes()[:-100])
        with pytest.raises(ConfigError, match=f"data.tokenizer={re.escape(str(path))} cannot be"):
            make_tokenizer(DataConfig(tokenizer=str(path)))


def test_a_missing_file_is_told() -> None:
    message = r"^data.tokenizer=bpe cannot be read \(No such file or directory\): set "
    with pytest.raises(ConfigError, match=message):
        make_tokenizer(DataConfig(tokenizer="bpe"))


def test_split_patterns_that_are_missing_wrong_or_not_needed(files: dict[str, Path]) -> None:
    for kind, pattern, message in (
        ("ranks.tiktoken", "", "does not say how text is split: set data.split_pattern"),
        ("ranks.tiktoken", "(", "data.split_pattern='\\(' is no regular expression"),
        ("bpe.json", SPLIT_PATTERN, "is no tiktoken file, which alone needs it"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_tokenizer(config_of(kind, files, split_pattern=pattern))
    with pytest.raises(ConfigError, match="tokenizer='byte' splits nothing"):
        DataConfig(split_pattern=SPLIT_PATTERN)


def test_a_pattern_that_would_lose_text_is_refused(files: dict[str, Path]) -> None:
    tokenizer = make_tokenizer(config_of("ranks.tiktoken", files, split_pattern=r"\w+"))
    assert tokenizer.decode(tokenizer.encode("word")) == "word"
    with pytest.raises(ConfigError, match="matches only a part of the text 'two words'"):
        tokenizer.encode("two words")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(files: dict[str, Path]) -> None:
    values = RunConfig().to_dict()
    values["data"] = values["data"] | {"tokenizer": str(files["bpe.json"])}
    tasks = ("language_modelling", "masked_tokens")
    for size, task, is_refused in (
        (600, tasks[0], False),
        (600, tasks[1], True),
        (599, tasks[0], True),
    ):
        values["model"] = values["model"] | {"vocab_size": size}
        values["task"] = task
        config = RunConfig.from_config_dict(values)
        if is_refused:
            with pytest.raises(
                ConfigError, match=f"model.vocab_size={size} is smaller than the 60"
            ):
                check_tokenizer(config)
        else:
            check_tokenizer(config)


def test_special_tokens_that_make_no_sense() -> None:
    for tokens, message in (
        (("<a>", "<a>"), "names '<a>' twice"),
        (("",), "holds an empty name"),
        ("<a>", "has type str: set special_tokens to a tuple"),
        ((1,), "has type int"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataConfig(special_tokens=tokens)
    assert DataConfig(special_tokens=["<a>"]).special_tokens == ("<a>",)
