"""Checks that the config's dataclasses share, and the error that they raise."""

import math
import os
import re
import struct
import types
import typing
from typing import Any, Literal

LARGEST_INT = 2**31 - 1  # JAX's integers have 32 bits unless a program asks for more
SMALLEST_FLOAT = 2.0**-126  # float32 holds smaller numbers too, but accelerators take them for 0
LARGEST_FLOAT = float.fromhex("0x1.fffffep127")


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line naming the field, the value and the
    fix.
    """


def show(value: Any) -> str:
    """The value as messages show it: on one line, and not endless."""
    if type(value) is int and abs(value) >= 10**40:
        # Python writes no integer of more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).splitlines())
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 300 else f"{text[:200]}..."


def as_float32(value: float) -> float:
    """The nearest number that float32 holds, which is what a program computes with; infinite where
    there is none.
    """
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def without_none(expected: Any) -> Any:
    """Returns the X of a type `X | None`, whose None leaves a field's value to other fields."""
    return typing.get_args(expected)[0] if isinstance(expected, types.UnionType) else expected


def check_types(config: Any, *, wide: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for a field of another type than it is declared with, or a string that is
    not one of its options.

    Numbers must be such as JAX computes with: integers of 32 bits, but for the fields `wide`, and
    finite as float32.
    """
    for name, expected in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(expected, types.UnionType) and value is None:
            continue
        expected = without_none(expected)
        if typing.get_origin(expected) is Literal:
            if type(value) is not str or value not in typing.get_args(expected):
                options = " or ".join(repr(option) for option in typing.get_args(expected))
                raise ConfigError(f"{name}={show(value)} is not an option: set {name} to {options}")
        elif expected is float and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) > LARGEST_FLOAT:
                raise ConfigError(
                    f"{name}={show(value)} is infinite in float32: set {name} to at most {LARGEST_FLOAT:.7g}"
                )
            object.__setattr__(config, name, float(value))
        elif type(value) is not expected:
            raise ConfigError(
                f"{name}={show(value)} has type {type(value).__name__}: set {name} to a value of type {expected.__name__}"
            )
        elif expected is float:
            _check_float(name, value)
        elif expected is int and abs(value) > LARGEST_INT and name not in wide:
            raise ConfigError(
                f"{name}={show(value)} does not fit an int32: set {name} to at most {LARGEST_INT}"
            )


def _check_float(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value} is not finite: set {name} to a finite number")
    if math.isinf(as_float32(value)):
        raise ConfigError(
            f"{name}={value} is infinite in float32: set {name} to a number between ±{LARGEST_FLOAT:.7g}"
        )
    if value and abs(value) < SMALLEST_FLOAT:
        raise ConfigError(
            f"{name}={value} is 0 in float32: set {name} to a number of at least {SMALLEST_FLOAT:.7g} in size"
        )


def computed(config: Any, name: str) -> float:
    """A field's value as a program computes with it: 0.999999999 is 1 in float32."""
    value = getattr(config, name)
    return as_float32(value) if isinstance(value, float) else value


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not computed(config, name) > 0:
            raise ConfigError(
                f"{name}={getattr(config, name)} must be positive: set {name} to more than 0"
            )


def check_not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not computed(config, name) >= 0:
            raise ConfigError(
                f"{name}={getattr(config, name)} must not be negative: set {name} to 0 or more"
            )


def check_range(config: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= computed(config, name) <= high:
            raise ConfigError(
                f"{name}={show(getattr(config, name))} is out of range: set {name} between {low} and {high}"
            )


def check_path(name: str, path: str) -> None:
    """Raises ConfigError for what can be no path of a file system, before anything is made there."""
    if not path:
        raise ConfigError(f"{name}='' is empty: set it to a path")
    if (
        "\0" in path or path.encode(errors="ignore").decode() != path
    ):  # bytes of a command line that are no text are surrogates
        raise ConfigError(
            f"{name}={show(path)} is not UTF-8 text without NUL: set it to a path that is"
        )
    if re.match(r"[A-Za-z][\w+.-]*://", path):
        raise ConfigError(
            f"{name}={show(path)} is a URL, and only file systems can be written: set it to a path"
        )


def expand_path(name: str, path: str) -> str:
    """The checked path with its ~ replaced by the home directory. The one place that does so."""
    check_path(name, path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{name}={show(path)} names no user's home: set it to a path")
    return expanded


def nearest_divisors(number: int, value: int, at_most: int = 8) -> str:
    """The divisors of `number` that are nearest to `value`, as a message lists them. Takes
    sqrt(number) steps.
    """
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    nearest = sorted({*small, *(number // n for n in small)}, key=lambda n: (abs(n - value), n))[
        :at_most
    ]
    return f"one of {', '.join(map(str, sorted(nearest)))}" if len(nearest) > 1 else str(nearest[0])
