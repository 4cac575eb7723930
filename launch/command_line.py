"""What all command lines share: flags, `--help`, and one line with exit code 2 for every bad input.

JAX is not imported here, so a mistyped flag is answered before a second has passed.
"""

import dataclasses
import difflib
import functools
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from moe.config import ConfigError, RunConfig

# Exit codes. 0 is done; 1 is a bug or a broken machine, with its traceback.
BAD_INPUT = 2
DIVERGED = 3  # too many updates in a row skipped for a non-finite loss or gradient
INTERRUPTED = 75  # sysexits.h's EX_TEMPFAIL: the state is saved, and the same command resumes

Main = Callable[[flags.FlagValues], int | None]

# What somebody's unfinished config file raises, besides TypeError and ValueError, which absl makes its own.
_CONFIG_FILE_ERRORS = (SyntaxError, ImportError, NameError, AttributeError, LookupError, ArithmeticError, AssertionError, OSError)

# Flags defined here belong to the command that asks for them, and are listed in its help.
flags.disclaim_key_flags()


def define_config() -> None:
    """Defines the required flag --config=FILE.py, and --config.FIELD=VALUE for each field of RunConfig."""
    config_flags.DEFINE_config_file("config", None, "Config file; --config.FIELD=VALUE changes one field of it. Required.")


def define_workdir(description: str) -> None:
    """Defines the required flag --workdir."""
    define_directory("workdir", description)


def define_directory(name: str, description: str, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a required flag that holds a directory of this machine; a leading ~ is the home directory."""
    flags.DEFINE(_DirectoryParser(name), name, None, f"{description} Required.", flag_values, required=True)


class _DirectoryParser(flags.ArgumentParser):
    """Raises ValueError with what stands after `flag --NAME=VALUE: ` in the message."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def parse(self, argument: str) -> str:
        name = self._name
        if not argument:
            raise ValueError(f"the path is empty: set --{name} to a directory")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", argument):
            raise ValueError(f"addresses cannot be used yet: set --{name} to a directory of this machine")
        if argument.encode(errors="ignore").decode() != argument:
            raise ValueError(f"the path is not UTF-8: set --{name} to a directory whose path is")
        expanded = os.path.expanduser(argument)
        if expanded.startswith("~"):
            raise ValueError(f"that home directory is not known: set --{name} to the whole path")
        return expanded


def read_run_config(config: Any) -> RunConfig:
    """The checked config of the flag --config. Raises ConfigError."""
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config: get_config() returned {config!r}: return RunConfig.config_dict() with your changes")
    return RunConfig.from_config_dict(config)


def run(main: Main, description: str) -> NoReturn:
    """Parses this process's flags, calls `main` with them, and exits with what it returns (None is 0).

    Bad input (a flag, a config, a path) gets one line on stderr and exit code 2; any other error keeps its traceback. `--help` prints
    `description`, the flags this command defined, and the fields of --config if it is one of them.
    """
    app.run(functools.partial(_call, main), flags_parser=functools.partial(_parse, description))


def _call(main: Main, _: list[str]) -> int | None:
    try:
        return main(flags.FLAGS)
    except (ConfigError, FileNotFoundError) as error:
        return _fail(error)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk or a lost connection is nobody's input
            raise
        return _fail(error)  # a bad path, or a message of ours, which has no number
    except KeyboardInterrupt:
        print("interrupted: before there was anything to save", file=sys.stderr)
        return INTERRUPTED


def _parse(description: str, argv: list[str]) -> list[str]:
    if {"--help", "-help", "-h", "--helpshort", "--helpfull"}.intersection(argv):
        print(_help(description))
        sys.exit(0)
    logging.set_verbosity(logging.WARNING)  # of absl's log, in which libraries tell each step they take; --verbosity=0 shows it
    try:
        config_path = _check_config_flags(argv) if "config" in flags.FLAGS else None
        return _parse_flags(argv, config_path)
    except (ConfigError, flags.Error) as error:
        sys.exit(_fail(error))


def _fail(error: Exception | str) -> int:
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
    return BAD_INPUT


def _check_config_flags(argv: list[str]) -> str:
    """The path in --config. Checks it and the names of changed fields, where config_flags raises errors that could be anybody's."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=values)
    values(argv, known_only=True)
    if not values.config:
        raise ConfigError("--config is missing: set --config to a config file")
    path = values.config.split(":")[0]  # what follows a colon is get_config's argument
    try:
        open(path).close()
    except OSError as error:
        raise ConfigError(f"--config={path}: {error.strerror}: set --config to a config file") from error
    names = [name.removeprefix("config.") for name, _, _ in _config_fields(RunConfig)]
    for changed in filter(None, (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)):
        if changed[1] not in names:
            near = difflib.get_close_matches(changed[1], names, n=1)
            hint = f"did you mean --config.{near[0]}?" if near else "--help lists the fields"
            raise ConfigError(f"{changed[0]} is not a field: {hint}")
    return path


def _parse_flags(argv: list[str], config_path: str | None) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if config_path:
            getattr(flags.FLAGS.config, "lock", None)  # config_flags keeps an OSError of get_config() until the config is touched
    except flags.Error as error:
        raise ConfigError(_explain(str(error), config_path)) from error
    except _CONFIG_FILE_ERRORS as error:
        raise ConfigError(_explain("".join(traceback.format_exception(error)), config_path)) from error
    if rest[1:]:
        raise ConfigError(f"{rest[1]!r} is not a flag: write flags as --name=value, and quote values that have spaces")
    return rest


def _explain(message: str, config_path: str | None) -> str:
    """One line for what flags and config files raise: the flag or the place, the value, and the fix."""
    if "Traceback" in message:
        line = re.findall(rf'File "{re.escape(str(config_path))}", line (\d+)', message)
        return f"{config_path}{', line ' + line[-1] if line else ''}: {message.strip().splitlines()[-1]}"
    if missing := re.match(r"flag --(\S+)=None: Flag --\1 must have a value", message):
        return f"--{missing[1]} is missing: set --{missing[1]}=VALUE"
    for name, field_type, _ in _config_fields(RunConfig):
        if mistyped := re.match(rf"flag --{name}=(.*?): ", message):
            return f"--{name}={mistyped[1]} has the wrong type: set {name} to a value of type {field_type.__name__}"
    return message


def _config_fields(config_class: type, path: str = "config") -> Iterator[tuple[str, Any, Any]]:
    """The dotted name, type and default of every field of a config."""
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name, field_type = f"{path}.{field.name}", types[field.name]
        if dataclasses.is_dataclass(field_type):
            yield from _config_fields(field_type, name)
        else:
            yield name, field_type, field.default


def _help(description: str) -> str:
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    lines = [description.strip(), "", "Flags:"]
    for flag in own_flags:
        default = f" (default: {flag.default})" if flag.default not in (None, "") else ""
        lines += [f"  --{flag.name}=...", flags.text_wrap(flag.help + default, indent="      ")]
    if "config" in flags.FLAGS:
        lines += ["", "Fields of --config, with the values they have where the file sets no other:"]
        for name, field_type, default in _config_fields(RunConfig):
            options = f"  ({' or '.join(typing.get_args(field_type))})" if typing.get_args(field_type) else ""
            lines.append(f"  --{name}={default}{options}")
    return "\n".join(lines)
