"""Fills in a chat template, and separates the template's own text from that of the messages.

The template is filled in twice: with the contents of the messages, and with a mark in place of each
content. The second output is cut at its marks, and the first one shows whether the template wrote
each content as it is.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe.config import ConfigError
from moe.config.checks import show
from moe.data.chat.messages import Message

# What an expression of a template may raise, besides the errors of Jinja itself.
_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)
# The marks that do not stand for contents: special tokens that a template takes from variables, and
# the ends of a {% generation %} block.
_NAMES = ("bos", "eos", "begin", "end")


class Part(NamedTuple):
    """Holds a part of a template's output: a mark's text, and the template's own text after it."""

    mark: str  # the number of a message, or "bos", "eos", "begin" or "end"; "" at the start
    text: str  # what the mark stands for: a content, as the template writes it
    after: str


class ChatTemplate:
    """Holds a compiled template. It is sandboxed: it can read its variables and nothing else."""

    def __init__(self, name: str, source: str):
        """Compiles a template. `name` is its path, for messages. Raises ConfigError."""
        self.name, self.source = name, source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            line = getattr(error, "lineno", 1)
            raise ConfigError(
                f"data.chat_template={show(name)}: line {line}: {_one_line(error)}: "
                "write it as Jinja reads it"
            ) from None

    @property
    def fingerprint(self) -> str:
        """Returns a checksum of the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def parts(
        self, messages: Sequence[Message], origin: str, *, add_generation_prompt: bool = False
    ) -> list[Part]:
        """Returns the template's output for a conversation, cut at its marks.

        Raises ConfigError if the template fails, or drops or changes what a message says.
        """
        contents = [message.content for message in messages]
        word = _unused_word([*contents, self.source])
        # A content of white space stays as it is, since templates may leave out what is empty.
        marked = [
            f"{word}{number};" if content.strip() else content
            for number, content in enumerate(contents)
        ]
        fill_in = lambda contents: self._fill_in(
            [{"role": m.role, "content": c} for m, c in zip(messages, contents, strict=True)],
            origin,
            word,
            add_generation_prompt,
        )
        cut = re.split(f"{word}(\\w+);", fill_in(marked))
        for number, content in enumerate(marked):
            if content.startswith(word) and cut[1::2].count(str(number)) != 1:
                self.fail(origin, f"drops or repeats the content of message {number + 1}")
        return self._match(cut, contents, fill_in(contents), word, origin)

    def _fill_in(
        self, messages: Sequence[Mapping[str, str]], origin: str, word: str, is_prompt: bool
    ) -> str:
        """Returns the template's output. Raises ConfigError if it fails."""
        bos, eos, begin, end = (f"{word}{name};" for name in _NAMES)
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=is_prompt,
                bos_token=bos,
                eos_token=eos,
                generation_marks=(begin, end),
            )
        except _ERRORS as error:
            self.fail(origin, f"fails with '{_one_line(error)}'")

    def _match(
        self, cut: list[str], contents: Sequence[str], filled: str, word: str, origin: str
    ) -> list[Part]:
        """Returns the parts of an output, with the contents as the template wrote them.

        A template may strip the white space around a content, as many do, and change nothing else.
        `cut` is the output with marks, and `filled` the output with contents.
        """
        parts: list[Part] = []
        position = number = 0
        for mark, after in zip(["", *cut[1::2]], cut[::2], strict=True):
            candidates = [f"{word}{mark};" if mark else ""]
            if mark.isdecimal():
                number = int(mark)
                content = contents[number]
                candidates = [content, content.strip(), content.lstrip(), content.rstrip()]
            texts = [text for text in candidates if filled.startswith(text + after, position)]
            if not texts:
                break
            parts.append(Part(mark, texts[0], after))
            position += len(texts[0] + after)
        if position != len(filled) or 2 * len(parts) != len(cut) + 1:
            self.fail(origin, f"changes the content of message {number + 1}, or the text around it")
        return parts

    def fail(self, origin: str, what: str) -> NoReturn:
        """Raises ConfigError for a conversation from `origin`, saying what the template does."""
        raise ConfigError(
            f"{origin}: data.chat_template={show(self.name)} {what}: "
            "change the template, or the messages"
        )


class _Generation(Extension):
    """Lets a template name what is to be learnt: {% generation %}...{% endgeneration %}."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        """Returns the block as a call that puts marks around its output."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.Name("generation_marks", "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, marks: tuple[str, str], caller: Callable[[], str]) -> str:
        return marks[0] + caller() + marks[1]


def _to_json(value: Any, indent: int | None = None) -> str:
    """Writes a value as JSON. Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unused_word(texts: Sequence[str]) -> str:
    """Returns a word that is in none of the texts."""
    number = 0
    while any(f"mark{number}x" in text for text in texts):
        number += 1
    return f"mark{number}x"
