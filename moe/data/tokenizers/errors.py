"""Makes the errors for mistakes that a tokenizer's file of any kind can have."""

from moe.config import ConfigError
from moe.config.checks import show


def damage_error(path: str, kind: str, error: Exception) -> ConfigError:
    """Returns the error for a file that cannot be read as the kind that it seems to be."""
    reason = " ".join(str(error).split())[:200]
    return ConfigError(
        f"data.tokenizer={path} cannot be read as a {kind} ({reason}): "
        "set data.tokenizer to a whole file"
    )


def ordinary_error(path: str, name: str) -> ConfigError:
    """Returns the error for a special token that is an ordinary token of the file."""
    return ConfigError(
        f"data.special_tokens names {show(name)}, an ordinary token of {path}, which text may "
        "become: give the special token another name"
    )
