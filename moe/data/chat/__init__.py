"""Turns conversations into tokens through a Jinja template, with the answers as targets."""

from pathlib import Path

from moe.config import ConfigError, DataConfig
from moe.config.checks import expand_path, show
from moe.data.chat.encoder import Chat
from moe.data.chat.template import ChatTemplate
from moe.data.tokenizers import Tokenizer

__all__ = ["Chat", "make_chat", "read_template"]


def make_chat(config: DataConfig, tokenizer: Tokenizer) -> Chat | None:
    """Returns what encodes conversations, or None if the documents are plain text.

    Raises ConfigError for a template that cannot be read.
    """
    template = read_template(config)
    return Chat(template, tokenizer, config.sequence_length) if template else None


def read_template(config: DataConfig) -> ChatTemplate | None:
    """Returns the template that the config names. Raises ConfigError if it cannot be read."""
    if not config.chat_template:
        return None
    path = Path(expand_path("data.chat_template", config.chat_template))
    try:
        return ChatTemplate(config.chat_template, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"data.chat_template={show(config.chat_template)} cannot be read ({reason}): "
            "set it to the path of a Jinja template"
        ) from None
