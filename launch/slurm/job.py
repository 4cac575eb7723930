"""Makes the text of a SLURM job from the flags of launch.slurm. It imports no JAX."""

import math
import os
import re
import shlex
import sys
from pathlib import Path

from absl import flags

from moe.config import ConfigError

FOLDER = "slurm"  # in the run directory
TEMPLATE = Path(__file__).with_name("job.sbatch")
# SLURM may send the signal up to a minute late, and starting takes time as well.
MARGIN_S = 120


def job_text(values: flags.FlagValues, command: list[str]) -> str:
    """Returns the file to submit: the template with the job's options and settings."""
    if command[0].startswith("launch."):
        command = [sys.executable, "-m", *command]
    settings = [
        f"command=({shlex.join(command)})",
        f"srun_options=({shlex.join(values.srun)})",
        f"max_restarts={values.restarts} backoff_s={values.backoff_s}",
        f"at_time_limit={'end' if values.chain > 1 else 'requeue'}",
        f"least_time_s={values.save_s + MARGIN_S}",
    ]
    options = [f"#SBATCH {option}" for option in _options(values)]
    text = TEMPLATE.read_text(encoding="utf-8")
    return text.replace("# @OPTIONS@", "\n".join(options)).replace(
        "# @SETTINGS@", "\n".join(settings)
    )


def job_folder(workdir: str) -> Path:
    """Returns where the file and the output of a job go, which is in the run directory.

    SLURM cannot write to gs://, so for a run there it is a folder of the current directory.
    """
    path = Path(workdir)
    return Path(FOLDER, path.name) if "://" in workdir else path / FOLDER


def _options(values: flags.FlagValues) -> list[str]:
    """Returns the options of sbatch. If one is there twice, SLURM takes the last."""
    # In file names, SLURM replaces %j and the like; %% stands for a percent sign.
    folder = str(job_folder(values.workdir)).replace("%", "%%")
    options = [
        f"--job-name={Path(values.workdir).name}",
        f"--nodes={values.nodes}",
        "--ntasks-per-node=1",
        f"--chdir={os.getcwd()}",
        f"--output={folder}/{'%A_%a' if values.array else '%j'}.log",
        "--open-mode=append",  # a job that is queued again goes on in its file
        "--requeue",
        f"--signal=B:USR1@{values.save_s}",
    ]
    if values.cpus_per_node:
        options.append(f"--cpus-per-task={values.cpus_per_node}")
    else:
        options += ["--exclusive", "--mem=0"]  # all cores and all memory of the nodes
    for option, value in (
        ("gpus-per-node", values.gpus_per_node),
        ("time", values.time),
        ("partition", values.partition),
        ("account", values.account),
        ("array", values.array),
    ):
        if value:
            options.append(f"--{option}={value}")
    return [_quote(option) for option in [*options, *values.sbatch]]


def _quote(option: str) -> str:
    """Returns an option as a #SBATCH line may hold it. Refuses what no line can hold."""
    if re.search(r"[\n\"\\]", option):
        raise ConfigError(
            f'{option!r} cannot stand in a #SBATCH line: leave out \\, " and newlines'
        )
    return f'"{option}"' if re.search(r"[\s'#]", option) else option


def check_time(time: str | None, save_s: int) -> None:
    """Raises ConfigError for a time limit that leaves no time to train before the signal.

    The job would save at once, be queued again, and never get further.
    """
    if time is None or time.upper() in ("UNLIMITED", "INFINITE"):
        return
    seconds = time_limit_s(time)
    if seconds < save_s + MARGIN_S:
        raise ConfigError(
            f"--time={time} is {seconds} s, and --save_s={save_s} of them are for saving: "
            f"set --time to at least {_least_minutes(save_s)} minutes"
        )


def check_default_time(answer: str, save_s: int) -> None:
    """Raises ConfigError if a job without --time has a limit that leaves no time to train.

    `answer` is what squeue says of the limit, on a line for each job: the partition's default.
    """
    limit = answer.split("\n")[0].strip()
    if re.fullmatch(r"[\d:-]+", limit) and time_limit_s(limit) < save_s + MARGIN_S:
        raise ConfigError(
            f"--time is not set, and the partition's default is {limit}, of which "
            f"--save_s={save_s} seconds are for saving: "
            f"set --time to at least {_least_minutes(save_s)} minutes"
        )


def _least_minutes(save_s: int) -> int:
    return math.ceil((save_s + MARGIN_S) / 60)


def time_limit_s(time: str) -> int:
    """Returns the seconds of a time limit in one of SLURM's forms.

    These are minutes, minutes:seconds, hours:minutes:seconds, and after days, as in 1-12:30, first
    hours.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise ConfigError(
            f"--time={time} is not a time limit: set it to minutes, or as in 12:00:00 or 1-12:00:00"
        )
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part]
    # Without days, a single number means minutes, and two mean minutes and seconds.
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(
        number * unit for number, unit in zip(numbers, units, strict=False)
    )
