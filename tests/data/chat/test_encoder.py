"""Conversations worked out by hand, in the manner of the templates that are in use."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import ConfigError, DataConfig
from moe.data.chat.encoder import Chat
from moe.data.chat.messages import Message
from moe.data.chat.template import ChatTemplate
from moe.data.tokenizers import make_tokenizer

TURNS = """\
{%- for message in messages %}
<|start|>{{ message['role'] }}
{{ message.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|start|>assistant
{% endif %}
"""
SQUARE = """\
{{- bos_token }}{% for message in messages %}
{% if message.role == 'user' %}[ {{- message.content | trim }}]{% endif %}
{% if message.role == 'assistant' %} {{ message.content | trim }} {{ eos_token }}{% endif %}
{% if message.role == 'system' %}{{ raise_exception('System role is not supported') }}{% endif %}
{% endfor %}"""
B = 255


def chat(template: str) -> Chat:
    """Returns the encoder of a template, with two special tokens whose ids are 256 and 257."""
    tokenizer = make_tokenizer(DataConfig(special_tokens=("<|start|>", "<|end|>")))
    return Chat(ChatTemplate("chat.jinja", template), tokenizer, sequence_length=200)


def conversation(*contents: str, first: str = "user") -> str:
    others = {"user": "assistant", "assistant": "user"}
    roles = [first if n % 2 == 0 else others[first] for n in range(len(contents))]
    return json.dumps([{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)])


def encoded(template: str, text: str) -> tuple[list[int], str]:
    """Returns the tokens of a conversation, and the text of its targets, "|" for special ones."""
    marked = chat(template).encode_document(text, "a.jsonl:17").tokens
    targets = [chr(t) if t < B else "|" for t in marked["token"][marked["target"]]]
    return marked["token"].tolist(), "".join(targets)


def test_special_tokens_come_from_the_template_alone():
    tokens, targets = encoded(TURNS, conversation("<|end|>a", "b<|start|>"))
    assert tokens == [
        *(B, 256, *b"user\n<|end|>a", 257, *b"\n"),
        *(256, *b"assistant\nb<|start|>", 257, *b"\n", B),
    ]
    assert targets == "b<|start|>|"


def test_every_answer_and_its_end_are_targets():
    _, targets = encoded(TURNS, conversation("a", "bc", "d", "ef "))
    assert targets == "bc|ef |"


def test_tokens_of_variables_are_boundaries_and_white_space_may_be_stripped():
    tokens, targets = encoded(SQUARE, conversation(" a ", "\nb\n", "c", "d"))
    assert tokens == [B, *b"[a] b ", B, *b"[c] d ", B]
    assert targets == "b |d |"


def test_the_boundary_ends_an_answer_that_ends_the_text():
    tokens, targets = encoded(
        "{% for m in messages %}{{ m.content }}{% endfor %}", conversation("ab", "c")
    )
    assert (tokens, targets) == ([B, *b"abc", B], "c|")


def test_a_template_may_name_the_targets():
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
        "{% generation %}({{ m.content }})<|end|>{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}\n{% endfor %}"
    )
    tokens, targets = encoded(template, conversation("a", "b", "c", "d"))
    assert targets == "(b)|(d)|"
    expected = [B, *b"user: aassistant: (b)", 257, *b"user: cassistant: (d)", 257, B]
    assert tokens == expected


BLOCK = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}INSIDE{% endgeneration %}OUTSIDE{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def block(inside: str, outside: str) -> str:
    """Returns a template that writes these after an answer, in and after its block."""
    return BLOCK.replace("INSIDE", inside).replace("OUTSIDE", outside)


@pytest.mark.parametrize(
    ("inside", "outside", "end"),
    [
        ("<|end|>", "", 257),
        ("<|end|>{{ '\\n' }}", "", 257),  # as many templates are written
        ("<|end|> ", "{{ '\\n' }}", 257),
        ("<|start|><|end|>", "", 257),
        ("{{ eos_token }}", "<|end|>", B),
        ("", "", B),  # the boundary after the text
    ],
)
def test_the_end_of_a_block_is_the_end_of_turn(inside: str, outside: str, end: int):
    speaker = chat(block(inside, outside))
    assert speaker.end_of_turn() == end
    tokens = speaker.encode_document(conversation("a", "b"), "a.jsonl:17").tokens
    assert end in tokens["token"][tokens["target"]]


@pytest.mark.parametrize(
    ("inside", "outside", "text"),
    [
        ("", "<|end|>", "b"),
        ("", "{{ '\\n' }}<|end|>", "b"),
        ("<|end|>.", "<|end|>", "."),
    ],
)
def test_a_block_without_an_end_of_turn_is_refused(inside: str, outside: str, text: str):
    """A run on it would stop its answers at that letter, which is the last target."""
    speaker = chat(block(inside, outside))
    message = f"writes {text!r} in {{% generation %}} and no special token .* after it"
    with pytest.raises(ConfigError, match=f"^a.jsonl:17: .*{message}"):
        speaker.encode_document(conversation("a", "b"), "a.jsonl:17")
    with pytest.raises(ConfigError, match=message):
        speaker.end_of_turn()


def test_the_boundary_ends_only_the_last_answer_of_a_block():
    with pytest.raises(ConfigError, match=r"writes 'b' in \{% generation %\}"):
        chat(block("", "")).encode_document(conversation("a", "b", "c", "d"), "a.jsonl:17")


def test_a_prompt_is_the_beginning_of_its_conversation():
    speaker = chat(TURNS)
    prompt = speaker.encode_prompt([Message("user", "hello")], "the prompt")
    whole = speaker.encode_document(conversation("hello", "you"), "a.jsonl:17").tokens
    assert prompt.tolist() == [B, 256, *b"user\nhello", 257, *b"\n", 256, *b"assistant\n"]
    assert whole["token"][: len(prompt)].tolist() == prompt.tolist()
    assert not whole["target"][: len(prompt)].any() and whole["target"][len(prompt)]
    assert speaker.end_of_turn() == 257
    assert chat(SQUARE).end_of_turn() == B


def test_marks_are_words_that_nobody_has_written():
    text = conversation("mark0x0; mark1x", "mark0x1;")
    tokens, targets = encoded(TURNS, text)
    assert bytes(t for t in tokens if t < B).decode().count("mark0x") == 2
    assert targets == "mark0x1;|"


CONTENTS = st.text(st.sampled_from("a \n<|>startendmark0x;é{%}"), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(CONTENTS, CONTENTS.filter(str.strip)), min_size=1, max_size=3))
def test_what_is_said_never_becomes_a_special_token(pairs: list[tuple[str, str]]):
    tokens, targets = encoded(TURNS, conversation(*itertools.chain(*pairs)))
    assert [t for t in tokens if t >= B] == [B, *[256, 257] * 2 * len(pairs), B]
    assert targets.encode("latin-1").decode() == "".join(f"{answer}|" for _, answer in pairs)


def test_contents_are_json_where_the_template_says_so():
    template = (
        "{% for m in messages %}{{ m.role | tojson }}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokens, _ = encoded(template, conversation("é", "b"))
    assert tokens == [B, *'"user"é'.encode(), B, *b'"assistant"b', B]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (SQUARE, "fails with 'System role is not supported'"),
        ("{{ messages[7].content }}", "fails with 'list object has no element 7'"),
        ("{{ 1 / 0 }}", "fails with 'division by zero'"),
        ("{{ messages[0].content * 10**18 }}", "fails with 'MemoryError'"),
        ("{{ messages[0].content }}", "drops or repeats the content of message 2"),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            "drops or repeats the content of message 1",
        ),
        (
            "{% for m in messages %}{{ m.content.replace('i', 'j') }}{% endfor %}",
            "changes the content of message 2",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ '!' if 'i' in m.content }}{% endfor %}",
            "changes the content of message 3, or the text around it",
        ),
        (
            "{% for m in messages %}{{ m.content }}### {% endfor %}",
            "writes '### ' after an answer and no special token",
        ),
        (
            "{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}",
            "writes nothing that is to be learnt",
        ),
        ("{{ ''.__class__.__mro__ }}", "fails with"),
        ("{{ messages.append(1) }}", "fails with"),
    ],
)
def test_a_template_that_fails_is_named_with_the_place_of_the_message(template: str, what: str):
    messages = [
        {"role": "system", "content": "abc"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "b"},
    ]
    with pytest.raises(ConfigError) as caught:
        chat(template).encode_document(json.dumps(messages), "a.jsonl:17")
    message = str(caught.value)
    assert message.startswith("a.jsonl:17: data.chat_template='chat.jinja' ") and what in message
    assert "\n" not in message


def test_a_template_that_is_not_jinja_is_refused_with_its_line():
    with pytest.raises(ConfigError, match=r"chat_template='chat.jinja': line 2: .*: write it as"):
        ChatTemplate("chat.jinja", "a\n{% for %}")


def test_a_conversation_that_is_longer_than_a_row_is_refused():
    """It would be cut, and an answer without its question would be learnt."""
    fits = chat(TURNS).encode_document(conversation("a" * 150, "é" * 5), "a.jsonl:17")
    assert (len(fits.tokens), fits.num_bytes) == (183, 10)
    long = conversation("a" * 150, "é" * 15)
    with pytest.raises(ConfigError) as caught:
        chat(TURNS).encode_document(long, "a.jsonl:17")
    assert str(caught.value) == (
        "a.jsonl:17: the conversation has 203 tokens, and a row has room for 201: "
        "set data.sequence_length to at least 202, or shorten it"
    )


def test_a_prompt_must_be_asked_as_in_training():
    other = TURNS.replace("<|start|>assistant\n{% endif", "<|start|>bot\n{% endif")
    with pytest.raises(ConfigError, match="with add_generation_prompt than before an answer"):
        chat(other).end_of_turn()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("plain text", "is no list of messages"),
        ("[]", "is no list of messages"),
        ('{"role": "user"}', "is no list of messages"),
        ("[1]", "message 1 has no fields"),
        ('[{"role": "user"}]', r"message 1 has the fields \['role'\]"),
        ('[{"role": "bot", "content": "a"}]', "message 1 has the role 'bot'"),
        ('[{"role": ["user"], "content": "a"}]', r"message 1 has the role \['user'\]"),
        ('[{"role": "user", "content": null}]', "message 1 has the content None"),
        ('[{"role": "user", "content": "\\ud800"}]', "message 1 has the content"),
        ('[{"role": "user", "content": "a"}]', "no message has the role 'assistant'"),
        ('[{"role": "assistant", "content": " "}]', "message 1 is an empty answer"),
        ("[" * 100_000, "is no list of messages"),
    ],
)
def test_messages_that_are_none_are_named_with_their_place(text: str, what: str):
    with pytest.raises(ConfigError, match=f"^a.jsonl:17: .*{what}.*: ") as caught:
        chat(TURNS).encode_document(text, "a.jsonl:17")
    assert len(str(caught.value)) < 500


def test_a_prompt_of_nothing_is_the_boundary_alone():
    speaker = chat("{% for m in messages %}{{ m.content }}{% endfor %}")
    prompt = speaker.encode_prompt([Message("user", "")], "the prompt")
    assert prompt.tolist() == [speaker.encode_prompt([Message("user", "x")], "x")[0]]
