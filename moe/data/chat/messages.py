"""Reads conversations: lists of messages, each with a role and a content."""

import json
from typing import Any, NamedTuple, NoReturn

from moe.config import ConfigError
from moe.config.checks import is_unicode, show

ROLES = ("system", "user", "assistant", "tool")


class Message(NamedTuple):
    """Holds one message: the role of its author, and its text."""

    role: str
    content: str


def read_messages(text: str, origin: str) -> list[Message]:
    """Returns the messages of a conversation in JSON, of which at least one is an answer.

    `origin` says where the text comes from. Raises ConfigError for anything else.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not values:
        _fail(
            origin,
            f"the conversation {show(text)} is no list of messages",
            'write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]',
        )
    messages = [_read_message(value, number, origin) for number, value in enumerate(values, 1)]
    if not any(message.role == "assistant" for message in messages):
        _fail(
            origin,
            "no message has the role 'assistant', so there is no answer to learn",
            "add one, or delete the conversation",
        )
    return messages


def _read_message(value: Any, number: int, origin: str) -> Message:
    """Returns one message. Raises ConfigError for a value that is none."""
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        fields = f"the fields {show(list(value))}" if isinstance(value, dict) else "no fields"
        _fail(origin, f"message {number} has {fields}", "give it 'role' and 'content' alone")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        listed = " or ".join(map(repr, ROLES))
        _fail(origin, f"message {number} has the role {show(role)}", f"write {listed}")
    if not isinstance(content, str) or not is_unicode(content):
        _fail(origin, f"message {number} has the content {show(content)}", "write a text")
    if role == "assistant" and not content.strip():
        _fail(
            origin,
            f"message {number} is an empty answer",
            "write the answer, or delete the conversation",
        )
    return Message(role, content)


def _fail(origin: str, what: str, fix: str) -> NoReturn:
    raise ConfigError(f"{origin}: {what}: {fix}")
