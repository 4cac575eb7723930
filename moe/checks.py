"""Checks that the config's dataclasses share, and the error that they raise."""

import math
import types
import typing
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line naming the field, the value and the fix."""


def without_none(expected: Any) -> Any:
    """Returns the X of a type `X | None`, whose None leaves a field's value to other fields."""
    return typing.get_args(expected)[0] if isinstance(expected, types.UnionType) else expected


def check_types(config: Any) -> None:
    """Raises ConfigError for a field of another type than it is declared with, or a string that is not one of its options."""
    for name, expected in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(expected, types.UnionType) and value is None:
            continue
        expected = without_none(expected)
        if typing.get_origin(expected) is Literal:
            if value not in typing.get_args(expected):
                options = " or ".join(repr(option) for option in typing.get_args(expected))
                raise ConfigError(f"{name}={value!r} is not an option: set {name} to {options}")
        elif expected is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, name, float(value))
        elif type(value) is not expected:
            raise ConfigError(f"{name}={value!r} has type {type(value).__name__}: set {name} to a value of type {expected.__name__}")
        elif expected is float and not math.isfinite(value):
            raise ConfigError(f"{name}={value} is not finite: set {name} to a finite number")


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name}={getattr(config, name)} must be positive: set {name} to more than 0")


def check_not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name}={getattr(config, name)} must not be negative: set {name} to 0 or more")


def check_range(config: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(config, name) <= high:
            raise ConfigError(f"{name}={getattr(config, name)} is out of range: set {name} between {low} and {high}")
