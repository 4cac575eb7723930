"""What all commands share: flags, `--help`, and one line with exit code 2 for every bad input.

JAX is not imported here, so that a mistyped flag is answered within a second.
"""

import contextlib
import dataclasses
import difflib
import faulthandler
import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from launch import logs
from launch.compilation_cache import use_cache
from launch.compiler_flags import use_flags
from launch.config_file import ConfigFileErrors, check_config_file
from launch.help_text import config_fields, help_text
from launch.output_paths import check_current_directory
from moe.config import ConfigError, RunConfig, SourceConfig
from moe.config.checks import expand_run_path, show
from moe.exit_codes import BAD_INPUT, INTERRUPTED, NOT_JOINED, PEER_STUCK, UNREACHABLE
from moe.files import announce_wait
from moe.parallel import distributed, watch
from moe.parallel.cluster import hidden_rank
from moe.parallel.devices import check_cpu_devices, check_platforms, explain_variable
from moe.storage.paths import Unreachable, cloud_errors, explain, is_unreachable, run_path
from moe.training.progress import Stream

Main = Callable[..., int | None]  # of the flags, and of what `prepare` has returned
Prepare = Callable[[flags.FlagValues], Any]

# The flags that functions of this file define are listed in the help of the calling command, as if
# the command had defined them itself.
flags.disclaim_key_flags()


def define_config() -> None:
    """Defines the required flag --config=FILE.py, and --config.FIELD=VALUE for every field."""
    config_flags.DEFINE_config_file(
        "config", None, "Config file; --config.FIELD=VALUE changes one field of it. Required."
    )


def define_workdir(description: str) -> None:
    """Defines the required flag --workdir."""
    define_directory("workdir", f"{description} Required.", required=True)


class _DirectoryParser(flags.ArgumentParser):
    """Checks the path of a run directory and expands its ~, as shells do not in --flag=~/x."""

    syntactic_help = "a directory"

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> str:
        return expand_run_path(f"--{self._name}", argument)


def define_directory(
    name: str,
    description: str,
    *,
    required: bool = False,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Defines a flag whose value is a run directory, in which ~ stands for the home directory."""
    flags.DEFINE(
        _DirectoryParser(name),
        name,
        None,
        description,
        flag_values,
        serializer=flags.ArgumentSerializer(),
        required=required,
    )


def read_run_config(config: Any, name: str = "--config") -> RunConfig:
    """Returns the checked config that a get_config() has returned. Raises ConfigError.

    `name` is the flag or the file that messages name.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{name}: get_config() returned {show(config)}: "
            "return RunConfig.config_dict() with your changes"
        )
    with ConfigFileErrors(name):  # a field may be a reference, which is computed only here
        values = config.to_dict()
    return RunConfig.from_config_dict(values)


def _define_cluster() -> None:
    """Defines the flags that say which process of a job this one is."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, in a job of several processes. SLURM, Kubernetes, TPUs and Open "
        "MPI say it themselves, and so does launch.local; else JAX_COORDINATOR_ADDRESS may.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes the job has; else JAX_NUM_PROCESSES may say it."
    )
    flags.DEFINE_integer(
        "process_id", None, "Which of them this one is, from 0; else JAX_PROCESS_ID may say it."
    )


def run(
    main: Main,
    description: str | None,
    *,
    devices: bool = False,
    prepare: Prepare | None = None,
) -> NoReturn:
    """Parses this process's flags, calls `main` with them, and exits with the code that it returns.

    None stands for 0. Bad input (a flag, a config, a path) gets one line on stderr and exit code 2;
    any other error keeps its traceback. `--help` prints `description`, which is the docstring of
    the command's file, the flags that the command defined, and the fields of --config if that is
    one of them.

    A command that uses `devices` first joins the other processes of its job, if there are any. Then
    each of them has a log file, and only process 0 prints. Such a command may have a `prepare`. It
    is called with the flags before this process touches its devices, and `main` gets what it
    returns as well.
    """
    # If the reader of a pipe leaves, as in `| head -1`, the output stops and the command goes on.
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    if devices:
        _define_cluster()
    parse = functools.partial(_parse, description or "")
    app.run(functools.partial(_call, main, devices, prepare), flags_parser=parse)


def _call(main: Main, devices: bool, prepare: Prepare | None, _: list[str]) -> int:
    code = _exit_code(main, devices, prepare)
    if code == UNREACHABLE:
        watch.leave(code)
        watch.fatal(code)  # threads of the store's client would still try for minutes
    if code:
        watch.leave(code)  # else JAX would wait minutes for the other processes of the job
    return code


def _exit_code(main: Main, devices: bool, prepare: Prepare | None) -> int:
    """Joins the job if `devices` is set, calls `main`, and returns the exit code of the command."""
    values = flags.FLAGS
    prepared = lambda: (prepare(values),) if prepare else ()
    try:
        if devices:
            # `kill -USR1` shows what each thread of a process does, which goes on.
            faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
            # Before a run has anything to save, SIGTERM ends it as Ctrl-C does.
            interrupt = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGTERM, interrupt or signal.default_int_handler)
            use_cache(os.environ)
            use_flags(os.environ)
            return main(values, *_join(values, prepared)) or 0
        return main(values) or 0
    except distributed.NotJoined as error:
        print(f"not joined: {error}", file=sys.stderr)
        return NOT_JOINED
    except distributed.Late as error:
        print(f"stuck: {error}", file=sys.stderr)
        return PEER_STUCK
    except (ConfigError, FileNotFoundError) as error:
        return _fail(error)
    except (Unreachable, *cloud_errors()) as error:
        if not is_unreachable(error):
            return _fail(explain(error))
        print(f"unreachable: {explain(error)}", file=sys.stderr)
        return UNREACHABLE
    except OSError as error:
        # A full disk or a lost connection has an error number but no file name: no flag is to blame
        # for it. A bad path has both, and an OSError that this project raises has neither.
        if error.filename is None and error.errno is not None:
            raise
        return _fail(error)
    except ValueError as error:  # of a variable that JAX reads, wherever it is first imported
        return _fail(explain_variable(error))
    except KeyboardInterrupt:
        print("interrupted: before there was anything to save", file=sys.stderr)
        return INTERRUPTED


def _join(values: flags.FlagValues, prepare: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Joins the other processes of this job, if a scheduler or a flag says that there are any.

    Returns what `prepare` returns, which is called before this process touches its devices.
    """
    # A mistake in the config is told before anybody waits for anybody.
    mesh = read_run_config(values.config).mesh if "config" in values else None
    check_cpu_devices(os.environ)
    cluster = distributed.find_cluster(
        os.environ, values.coordinator_address, values.num_processes, values.process_id
    )
    if cluster is None and distributed.on_tpu(os.environ):
        cluster = distributed.find_tpu_cluster()
    if cluster is None:
        if note := distributed.why_alone(os.environ):
            print(note, file=sys.stderr)
        prepared = prepare()
        check_platforms(os.environ)
        return prepared
    places = _start_log(values, cluster)

    def last_lines(process_id: int) -> str:
        return "\n".join(logs.last_lines_of_ended(lambda: places.path(process_id)))

    def prepare_watched() -> tuple[Any, ...]:
        watch.show_last_lines(last_lines)
        return prepare()

    try:
        return distributed.join(cluster, mesh, prepare=prepare_watched)
    except distributed.NotJoined as error:
        if cluster.process_id == 1:  # process 0, which is shown, may not be there
            logs.show(f"not joined: {error}")
        raise


def _start_log(values: flags.FlagValues, cluster: distributed.Cluster) -> logs.Places:
    """Gives this process of a job its own log file, and returns where those of all are.

    From here on only process 0 is shown.
    """
    workdir = run_path(values.workdir) if "workdir" in values else None
    places = logs.find_places(Path(sys.argv[0]).stem, workdir, cluster.coordinator)
    rank = cluster.process_id
    run_log = logs.log_path(places.run, rank) if places.run is not None else None
    logs.start(logs.log_path(places.first, rank), rank, cluster.num_processes, run_log)
    sys.stdout = Stream(sys.stdout)
    watch.use_log(logs.show, logs.finish, logs.own)
    return places


def _parse(description: str, argv: list[str]) -> list[str]:
    """Returns the arguments that are no flags, or prints the help and exits."""
    # Libraries write every step that they take to absl's log; --verbosity=0 shows all of it.
    logging.set_verbosity(logging.WARNING)
    # absl only warns if get_config() returns None, and read_run_config then raises an error.
    is_wanted = lambda record: "get_config() returned None" not in str(record.msg)
    logging.get_absl_logger().addFilter(is_wanted)
    help_wanted = {"--help", "-help", "-h", "--helpshort", "--helpfull"}.intersection(argv)
    try:
        check_current_directory()
        argv[1:] = _expand_config_path(argv[1:])
        path = _config_path(argv) if "config" in flags.FLAGS else None
        if help_wanted:
            config = _read_named_config(argv, path) if path else RunConfig()
            print(help_text(description, config if "config" in flags.FLAGS else None, path))
            sys.exit(0)
        if "config" in flags.FLAGS:
            _check_config_flags(argv, path)
        return _parse_flags(argv, path)
    except ConfigError as error:
        sys.exit(_fail(error))
    except flags.Error as error:
        # If a flag's own parser refused the value, its message says more than absl's.
        cause = error.__context__
        sys.exit(_fail(cause if isinstance(cause, ConfigError) else _explain(str(error))))
    except KeyboardInterrupt:
        print("interrupted: before there was anything to save", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(error: Exception | str) -> int:
    """Tells a mistake in one line. Of many processes that make the same one, process 0 prints it.

    The others write it into their logs, since a host may also have a mistake of its own.
    """
    text = " ".join(["error:", *str(error).splitlines()])
    rank = hidden_rank(os.environ)
    if rank is not None and not logs.has_started():
        with contextlib.suppress(OSError):
            logs.write_line(Path(sys.argv[0]).stem, rank, text)
            return BAD_INPUT
    print(text, file=sys.stderr)
    return BAD_INPUT


def _expand_config_path(arguments: list[str]) -> list[str]:
    """Returns the arguments with the ~ of --config expanded.

    config_flags reads the arguments again, so they are changed instead of the flag's value.
    """
    expand = lambda match: (match[1] or "") + os.path.expanduser(match[2])
    expanded = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_config = argument.startswith(("--config=", "-config="))
        if is_config or before in ("--config", "-config"):
            argument = re.sub(r"^(--?config=)?(~.*)$", expand, argument)
        expanded.append(argument)
    return expanded


def _config_path(argv: list[str]) -> str | None:
    """Returns the path in --config, or None where there is no --config.

    An argument of get_config, which follows the path after a colon, is left out.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=values)
    values(argv, known_only=True)
    return values.config and values.config.split(":")[0]


def _read_named_config(argv: list[str], path: str) -> RunConfig:
    """Returns the config that the arguments name, whatever other flags are there or missing."""
    _check_config_flags(argv, path)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    with announce_wait(f"reading {path}"), ConfigFileErrors(path):
        values(argv, known_only=True)
        getattr(values.config, "lock", None)
    return read_run_config(values.config)


def _check_config_flags(argv: list[str], path: str | None) -> None:
    """Raises ConfigError where --config is missing or no file, or a changed field does not exist.

    config_flags would raise errors that do not say which flag is wrong.
    """
    if not path:
        raise ConfigError("--config is missing: set --config to a config file")
    names = [name.removeprefix("config.") for name, _ in config_fields(RunConfig())]
    with announce_wait(f"reading {path}"):
        check_config_file(path)
    for changed in filter(
        None, (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)
    ):
        possible = [*names, *_names_in_mixture(changed[1])]
        if changed[1] not in possible:
            near = difflib.get_close_matches(changed[1], possible, n=1)
            hint = f"did you mean --config.{near[0]}?" if near else "--help lists the fields"
            raise ConfigError(f"{changed[0]} is not a field: {hint}")


def _names_in_mixture(name: str) -> list[str]:
    """Returns the fields of a source of data.mixture, if `name` is like the name of one of them.

    Only the config file knows the names of the sources.
    """
    source = re.match(r"data\.mixture\.\w+\.", name)
    fields = [field.name for field in dataclasses.fields(SourceConfig)[1:]]
    return [f"{source[0]}{field}" for field in fields] if source else []


def _parse_flags(argv: list[str], config_path: str | None) -> list[str]:
    with announce_wait(f"reading {config_path}"), ConfigFileErrors(config_path or "--config"):
        try:
            rest = flags.FLAGS(argv)
        except (KeyError, AttributeError) as error:
            raise _explain_missing(argv, error) or error from None
        if config_path:
            # config_flags keeps an OSError of get_config() back until an attribute is read.
            getattr(flags.FLAGS.config, "lock", None)
    if rest[1:]:
        raise ConfigError(
            f"{rest[1]!r} is not a flag: "
            "write flags as --name=value, and quote values that have spaces"
        )
    return rest


def _explain_missing(argv: list[str], error: Exception) -> ConfigError | None:
    """Returns the error for a flag of a source, or of its field, that the config file lacks.

    config_flags says only the name that is missing.
    """
    for argument in argv:
        flag = re.match(r"--?config\.data\.mixture\.(\w+)\.(\w+)=", argument)
        if flag and any(repr(name) in str(error.args[0]) for name in flag.groups()):
            return ConfigError(
                f"{argument}: the config file has no such field of a source: "
                "set it there first, as SourceConfig.config_dict(...) does for every field"
            )
    return None


def _hint(name: str) -> str:
    """Returns which flags may be meant by the name of one that does not exist."""
    fields = [name for name, _ in config_fields(RunConfig())] if "config" in flags.FLAGS else []
    # The last part of a field names it too, as people write --steps=3.
    ends = (f".{name}", f".{name.removeprefix('no')}")
    near = [field for field in fields if field.endswith(ends)]
    near = near or difflib.get_close_matches(name, [*flags.FLAGS, *fields], n=1)
    meant = " or ".join(f"--{found}" for found in near)
    return f"did you mean {meant}?" if meant else "--help lists the flags"


def _explain(message: str) -> str:
    """Returns one line for an error of absl's flags: the flag, the value, and the fix."""
    if missing := re.match(r"flag --(\S+)=None: Flag --\1 must have a value", message):
        return f"--{missing[1]} is missing: set --{missing[1]}=VALUE"
    if unknown := re.match(r"Unknown command line flag '(.*?)'", message):
        return f"--{unknown[1]} is not a flag: {_hint(unknown[1])}"
    for name, field_type in config_fields(RunConfig()):
        if mistyped := re.match(rf"flag --{name}=(.*?): ", message):
            return (
                f"--{name}={mistyped[1]} has the wrong type: "
                f"set {name} to a value of type {field_type.__name__}"
            )
    return message
