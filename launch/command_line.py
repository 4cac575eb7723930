"""What all command lines share: flags, `--help`, and one line with exit code 2 for every bad input.

JAX is not imported here, so a mistyped flag is answered before a second has passed.
"""

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from launch.config_file import Blaming, check_config_file
from launch.help_text import config_fields, help_text
from moe.config import ConfigError, RunConfig
from moe.config.checks import expand_path, show
from moe.files import saying
from moe.training.progress import Stream

# Exit codes. 0 is done; 1 is a bug or a broken machine, with its traceback.
BAD_INPUT = 2
# Too many updates in a row were skipped since they were not finite, or the last validation was not.
DIVERGED = 3
INTERRUPTED = 75  # sysexits.h's EX_TEMPFAIL: the state is saved, and the same command resumes

Main = Callable[[flags.FlagValues], int | None]

# Flags defined here belong to the command that asks for them, and are listed in its help.
flags.disclaim_key_flags()


def define_config() -> None:
    """Defines the required flag --config=FILE.py, and --config.FIELD=VALUE for each field of
    RunConfig.
    """
    config_flags.DEFINE_config_file(
        "config", None, "Config file; --config.FIELD=VALUE changes one field of it. Required."
    )


def define_workdir(description: str) -> None:
    """Defines the required flag --workdir."""
    define_directory("workdir", f"{description} Required.", required=True)


class _DirectoryParser(flags.ArgumentParser):
    """Checks a path and expands its ~, which shells leave alone in --flag=~/x."""

    syntactic_help = "a directory"

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> str:
        return expand_path(f"--{self._name}", argument)


def define_directory(name: str, description: str, *, required: bool = False) -> None:
    """Defines a flag whose value is a path of a file system, with ~ for the home directory."""
    flags.DEFINE(
        _DirectoryParser(name),
        name,
        None,
        description,
        serializer=flags.ArgumentSerializer(),
        required=required,
    )


def read_run_config(config: Any) -> RunConfig:
    """The checked config of the flag --config. Raises ConfigError."""
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config: get_config() returned {show(config)}: return RunConfig.config_dict() with your changes"
        )
    with Blaming("--config"):  # a field may be a reference, computed only now
        values = config.to_dict()
    return RunConfig.from_config_dict(values)


def run(main: Main, description: str) -> NoReturn:
    """Parses this process's flags, calls `main` with them, and exits with what it returns (None is
    0).

    Bad input (a flag, a config, a path) gets one line on stderr and exit code 2; any other error
    keeps its traceback. `--help` prints `description`, the flags this command defined, and the
    fields of --config if it is one of them.
    """
    sys.stdout, sys.stderr = (
        Stream(sys.stdout),
        Stream(sys.stderr),
    )  # `| head -1` ends what is shown, and not what is done
    app.run(functools.partial(_call, main), flags_parser=functools.partial(_parse, description))


def _call(main: Main, _: list[str]) -> int | None:
    try:
        return main(flags.FLAGS)
    except (ConfigError, FileNotFoundError) as error:
        return _fail(error)
    except OSError as error:
        if (
            error.filename is None and error.errno is not None
        ):  # a full disk or a lost connection is nobody's input
            raise
        return _fail(error)  # a bad path, or a message of ours, which has no number
    except KeyboardInterrupt:
        print("interrupted: before there was anything to save", file=sys.stderr)
        return INTERRUPTED


def _parse(description: str, argv: list[str]) -> list[str]:
    logging.set_verbosity(
        logging.WARNING
    )  # of absl's log, in which libraries tell each step they take; --verbosity=0 shows it
    logging.get_absl_logger().addFilter(
        lambda record: "get_config() returned None" not in str(record.msg)
    )  # read_run_config tells it
    help_wanted = {"--help", "-help", "-h", "--helpshort", "--helpfull"}.intersection(argv)
    try:
        argv[1:] = _expand_config_path(argv[1:])
        path = _config_path(argv) if "config" in flags.FLAGS else None
        if help_wanted:
            config = _config_of(argv, path) if path else RunConfig()
            print(help_text(description, config if "config" in flags.FLAGS else None, path))
            sys.exit(0)
        if "config" in flags.FLAGS:
            _check_config_flags(argv, path)
        return _parse_flags(argv, path)
    except ConfigError as error:
        sys.exit(_fail(error))
    except flags.Error as error:  # what a flag's own parser refuses is told in its words
        sys.exit(
            _fail(
                error.__context__
                if isinstance(error.__context__, ConfigError)
                else _explain(str(error))
            )
        )
    except KeyboardInterrupt:
        print("interrupted: before there was anything to save", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(error: Exception | str) -> int:
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
    return BAD_INPUT


def _expand_config_path(arguments: list[str]) -> list[str]:
    """The arguments with the ~ of --config expanded. Config_flags read them again, so their list is
    changed, not the flag's value.
    """
    return [
        re.sub(
            r"^(--?config=)?(~.*)$",
            lambda match: (match[1] or "") + os.path.expanduser(match[2]),
            argument,
        )
        if argument.startswith(("--config=", "-config=")) or before in ("--config", "-config")
        else argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
    ]


def _config_path(argv: list[str]) -> str | None:
    """The path in --config without get_config's argument, which follows a colon; None where there
    is no --config.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=values)
    values(argv, known_only=True)
    return values.config and values.config.split(":")[0]


def _config_of(argv: list[str], path: str) -> RunConfig:
    """The config that the arguments name, whatever other flags are there or missing."""
    _check_config_flags(argv, path)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    with saying(f"reading {path}"), Blaming(path):
        values(argv, known_only=True)
        getattr(values.config, "lock", None)
    return read_run_config(values.config)


def _check_config_flags(argv: list[str], path: str | None) -> None:
    """Checks the names of changed fields, where config_flags raises errors that could be anybody's."""
    if not path:
        raise ConfigError("--config is missing: set --config to a config file")
    names = [name.removeprefix("config.") for name, _ in config_fields(RunConfig())]
    with saying(f"reading {path}"):
        check_config_file(path)
    for changed in filter(
        None, (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)
    ):
        if changed[1] not in names:
            near = difflib.get_close_matches(changed[1], names, n=1)
            hint = f"did you mean --config.{near[0]}?" if near else "--help lists the fields"
            raise ConfigError(f"{changed[0]} is not a field: {hint}")


def _parse_flags(argv: list[str], config_path: str | None) -> list[str]:
    with saying(f"reading {config_path}"), Blaming(config_path or "--config"):
        rest = flags.FLAGS(argv)
        if config_path:
            getattr(
                flags.FLAGS.config, "lock", None
            )  # config_flags keeps an OSError of get_config() until the config is touched
    if rest[1:]:
        raise ConfigError(
            f"{rest[1]!r} is not a flag: write flags as --name=value, and quote values that have spaces"
        )
    return rest


def _explain(message: str) -> str:
    """One line for what flags raise: the flag, the value, and the fix."""
    if missing := re.match(r"flag --(\S+)=None: Flag --\1 must have a value", message):
        return f"--{missing[1]} is missing: set --{missing[1]}=VALUE"
    for name, field_type in config_fields(RunConfig()):
        if mistyped := re.match(rf"flag --{name}=(.*?): ", message):
            return f"--{name}={mistyped[1]} has the wrong type: set {name} to a value of type {field_type.__name__}"
    return message
