"""Writes what --help prints: the command's own text, its flags, and the fields of --config.

Each field stands there with its value, and with its comment in the source of moe/config/.
"""

import ast
import dataclasses
import inspect
import io
import sys
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

from absl import flags

from moe.config import RunConfig
from moe.config.checks import without_none
from moe.config.run import named_class

_MIN_WIDTH = 20  # characters of a line


def help_text(description: str, config: RunConfig | None = None, path: str | None = None) -> str:
    """Returns the whole text. With a `config` it has the fields and their values too.

    The values were read from `path`, or are the defaults where that is None.
    """
    lines = [description.strip(), "", "Flags:"]
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        default = f" (default: {flag.default})" if flag.default not in (None, "") else ""
        lines += [f"  --{flag.name}=...", _wrap(flag.help + default, indent="      ")]
    if config:
        values = f"their values in {path}" if path else "their default values"
        lines += ["", f"Fields of --config, with {values}:", *_group(config, "config")]
    return "\n".join(lines)


def config_fields(config: Any, path: str = "config") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and type of every field of a config and of the configs within it."""
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from config_fields(value, name)
        elif named_class(types[field.name]):
            for one in value:
                fields = config_fields(one, f"{name}.{one.name}")
                yield from (field for field in fields if field[0] != f"{name}.{one.name}.name")
        else:
            yield name, without_none(types[field.name])


def _group(config: Any, path: str, hidden: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the lines of one dataclass: its own fields, then the dataclasses within it.

    Each of those stands under its docstring. The fields `hidden` are left out.
    """
    types, comments = typing.get_type_hints(type(config)), field_comments(type(config))
    fields = [field.name for field in dataclasses.fields(config) if field.name not in hidden]
    values = {name: getattr(config, name) for name in fields}
    named = {name: values.pop(name) for name in list(values) if named_class(types[name])}
    for name, value in values.items():
        if not dataclasses.is_dataclass(value):
            field, choices = f"  --{path}.{name}={value}", _choices(types[name])
            fits = len(f"{field}  {choices}") <= 80
            yield f"{field}  {choices}".rstrip() if fits else field
            if not fits:
                yield _wrap(choices, indent="      ")
            yield _wrap(comments[name], indent="      ")
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            yield ""
            yield _wrap(f"{path}.{name}: {inspect.getdoc(type(value))}")
            yield from _group(value, f"{path}.{name}")
    for name, configs in named.items():
        yield ""
        yield _wrap(f"{path}.{name}: {comments[name]}")
        for one in configs:
            yield from _group(one, f"{path}.{name}.{one.name}", hidden=("name",))


def _wrap(text: str, indent: str = "") -> str:
    """Breaks a text into lines for this terminal, which may be too narrow for the indentation."""
    return flags.text_wrap(text, max(flags.get_help_width(), _MIN_WIDTH), indent=indent)


def _choices(declared: Any) -> str:
    """Returns the values that a field may have in brackets, or "" if its type alone limits them."""
    if typing.get_origin(declared) is not typing.Literal:
        return ""
    *others, last = typing.get_args(declared)
    return f"({', '.join(others)} or {last})"


def field_comments(config_class: type) -> dict[str, str]:
    """Returns the comments above and beside each field of a dataclass, as one text for a field."""
    source = inspect.getsource(config_class)
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    texts = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, last = node.lineno, node.end_lineno or node.lineno
            while lines[first - 2].strip().startswith("#"):  # line numbers count from 1
                first -= 1
            texts[node.target.id] = " ".join(
                comments[line] for line in range(first, last + 1) if line in comments
            )
    return texts
