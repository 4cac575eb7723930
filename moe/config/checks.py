"""Defines the checks that all config dataclasses share, and the error that they raise."""

import functools
import math
import os
import re
import struct
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")
# A bucket and a name in it. Clients of Google Cloud Storage take #, ?, * and [ for more than text.
_BUCKET_PATH = re.compile(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^/#?*\[\]]+)+/?")

LONGEST_NAME = 255  # bytes of a file's name in nearly all file systems
LARGEST_INT = 2**31 - 1  # JAX's integers have 32 bits unless a program asks for more
LARGEST_FLOAT = float.fromhex("0x1.fffffep127")
# float32 can hold numbers that are smaller than this one, but accelerators treat them as 0.
SMALLEST_FLOAT = 2.0**-126


class ConfigError(ValueError):
    """Says in one line which field of a configuration is wrong, its value, and the fix."""


def show(value: object) -> str:
    """Returns the text of a value for a message: on one line, and cut where it is long."""
    if type(value) is int and abs(value) >= 10**40:
        # Python refuses to write an integer of more than 4,300 digits.
        return f"an integer of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).splitlines())
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 300 else f"{text[:200]}..."


def without_numpy(value: Any) -> Any:
    """Returns a NumPy scalar as Python's value of it, and any other value as it is.

    NumPy is not imported for that. Where nobody has imported it, there is no such scalar.
    """
    numpy = sys.modules.get("numpy")
    return value.item() if numpy and isinstance(value, numpy.generic) else value


def is_file_name(name: object) -> TypeGuard[str]:
    """Returns whether a value names something in a directory, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {*name} & {*"/\\\0"}


def as_float32(value: float) -> float:
    """Returns the nearest float32, which is what a program computes with; it may be infinite."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def without_none(declared: Any) -> Any:
    """Returns the type X of a field that is declared as `X | None`, and any other type as it is."""
    return typing.get_args(declared)[0] if isinstance(declared, types.UnionType) else declared


@functools.cache
def field_types(config_class: type) -> Mapping[str, Any]:
    """Returns the declared types of a dataclass's fields. A sweep builds thousands of configs."""
    return typing.get_type_hints(config_class)


def check_types(config: object, *, wide: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for a field whose value is not of the type that the field declares.

    A string must be one of the options of its Literal. JAX must be able to compute with a number:
    a float is finite in float32, and an integer has 32 bits. Only the fields `wide` may hold
    larger integers. A whole number may stand for a float, a list, as JSON has it, for a tuple, and
    a NumPy scalar for a Python number: the field then holds the float, the tuple or the number.
    """
    for name, declared in field_types(type(config)).items():
        value = getattr(config, name)
        if value is not None or not isinstance(declared, types.UnionType):
            checked = _checked(name, value, without_none(declared), is_wide=name in wide)
            if checked is not value:
                object.__setattr__(config, name, checked)


def _checked(name: str, value: Any, expected: Any, is_wide: bool) -> Any:
    """Returns a field's value in its declared type. Raises ConfigError if it is of another type."""
    value = without_numpy(value)
    if typing.get_origin(expected) is Literal:
        _check_option(name, value, typing.get_args(expected))
    elif typing.get_origin(expected) is tuple:
        return _checked_tuple(name, value, typing.get_args(expected)[0], is_wide)
    elif expected is float and isinstance(value, int) and not isinstance(value, bool):
        _check_whole_float(name, value)
        return float(value)
    elif type(value) is not expected:
        raise ConfigError(
            f"{name}={show(value)} has type {type(value).__name__}: "
            f"set {name} to a value of type {expected.__name__}"
        )
    elif expected is float:
        _check_float(name, value)
    elif expected is int and abs(value) > LARGEST_INT and not is_wide:
        raise ConfigError(
            f"{name}={show(value)} does not fit an int32: set {name} to at most {LARGEST_INT}"
        )
    return value


def _checked_tuple(name: str, value: Any, expected: type, is_wide: bool) -> tuple[Any, ...]:
    """Returns a field's values as a tuple, each in the declared type. Raises ConfigError."""
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"{name}={show(value)} has type {type(value).__name__}: "
            f"set {name} to a tuple of values of type {expected.__name__}"
        )
    return tuple(
        _checked(f"{name}[{index}]", element, expected, is_wide)
        for index, element in enumerate(value)
    )


def _check_option(name: str, value: object, options: tuple[str, ...]) -> None:
    """Raises ConfigError for a value that is not one of a field's options."""
    if type(value) is not str or value not in options:
        listed = " or ".join(repr(option) for option in options)
        raise ConfigError(f"{name}={show(value)} is not an option: set {name} to {listed}")


def _check_whole_float(name: str, value: int) -> None:
    """Raises ConfigError for a whole number that is infinite as a float32."""
    if abs(value) > LARGEST_FLOAT:
        raise ConfigError(
            f"{name}={show(value)} is infinite in float32: "
            f"set {name} to at most {LARGEST_FLOAT:.7g}"
        )


def _check_float(name: str, value: float) -> None:
    """Raises ConfigError for a number that float32 turns into infinity, NaN or 0."""
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value} is not finite: set {name} to a finite number")
    if math.isinf(as_float32(value)):
        raise ConfigError(
            f"{name}={value} is infinite in float32: "
            f"set {name} to a number between ±{LARGEST_FLOAT:.7g}"
        )
    if value and abs(value) < SMALLEST_FLOAT:
        raise ConfigError(
            f"{name}={value} is 0 in float32: "
            f"set {name} to a number of at least {SMALLEST_FLOAT:.7g} in size"
        )


def as_computed(config: object, name: str) -> float:
    """Returns a field's value as a program computes with it: 0.999999999 is 1 in float32."""
    value = getattr(config, name)
    return as_float32(value) if isinstance(value, float) else value


def check_positive(config: object, *names: str) -> None:
    """Raises ConfigError for a field whose value is not above 0."""
    for name in names:
        if not as_computed(config, name) > 0:
            value = getattr(config, name)
            raise ConfigError(f"{name}={value} must be positive: set {name} to more than 0")


def check_not_negative(config: object, *names: str) -> None:
    """Raises ConfigError for a field whose value is below 0."""
    for name in names:
        if not as_computed(config, name) >= 0:
            value = getattr(config, name)
            raise ConfigError(f"{name}={value} must not be negative: set {name} to 0 or more")


def check_range(config: object, low: float, high: float, *names: str) -> None:
    """Raises ConfigError for a field whose value is below `low` or above `high`."""
    for name in names:
        if not low <= as_computed(config, name) <= high:
            value = show(getattr(config, name))
            raise ConfigError(
                f"{name}={value} is out of range: set {name} between {low} and {high}"
            )


def check_path(name: str, path: str) -> None:
    """Raises ConfigError for a text that cannot be a path, before anything is created there."""
    _check_text(name, path)
    if _SCHEME.match(path):
        raise ConfigError(
            f"{name}={show(path)} is an address, and this must lie in a file system: "
            "set it to a local or mounted directory"
        )
    longest = max(path.split("/"), key=lambda part: len(part.encode()))
    if len(longest.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"{name}={show(path)} has a name of {len(longest.encode())} bytes: "
            f"set it to a path whose files and directories have names of at most {LONGEST_NAME}"
        )


def _check_text(name: str, path: str) -> None:
    """Raises ConfigError for a text that no file can have as its name."""
    if not path:
        raise ConfigError(f"{name}='' is empty: set it to a path")
    if "\0" in path or not is_unicode(path):
        raise ConfigError(
            f"{name}={show(path)} is not UTF-8, or has a NUL: set it to a path in UTF-8 without NUL"
            f"{locale_advice()}"
        )


def is_unicode(text: str) -> bool:
    """Returns whether a text can be encoded: halves of a surrogate pair alone cannot.

    Bytes of a command line that are not UTF-8 arrive as such halves.
    """
    return text.encode(errors="ignore").decode() == text


def locale_advice() -> str:
    """Returns what to do where the system's words, such as arguments, are not taken for UTF-8."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return ""
    return f", and set PYTHONUTF8=1, since this process takes arguments for {encoding}"


def expand_path(name: str, path: str) -> str:
    """Returns a checked path with its ~ replaced by the home directory.

    All paths of configs and flags are expanded here, so that ~ means the same in each.
    """
    check_path(name, path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{name}={show(path)} names no user's home: set it to a path")
    return expanded


def expand_run_path(name: str, path: str) -> str:
    """Returns a checked path of a run directory, with its ~ expanded. It may lie at gs://.

    Orbax, which writes the checkpoints, knows file systems and gs:// alone.
    """
    _check_text(name, path)
    if not _SCHEME.match(path):
        return expand_path(name, path)
    if not path.startswith("gs://"):
        raise ConfigError(
            f"{name}={show(path)} is no place for a run, which is a directory or at gs://: "
            "mount the store, and set it to the directory of the mount"
        )
    if not _BUCKET_PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise ConfigError(
            f"{name}={show(path)} does not name a bucket and a directory in it: "
            "set it to gs://BUCKET/NAME"
        )
    return path


def nearest_divisors(number: int, value: int, at_most: int = 8) -> str:
    """Returns the divisors of `number` that are nearest to `value`, as a message lists them.

    It takes sqrt(number) steps, which is instant for an int32.
    """
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = {*small, *(number // n for n in small)}
    nearest = sorted(divisors, key=lambda n: (abs(n - value), n))[:at_most]
    return f"one of {', '.join(map(str, sorted(nearest)))}" if len(nearest) > 1 else str(nearest[0])
