"""Writes a SLURM job that trains a config on several nodes, and submits it.

Examples:
    python -m launch.slurm --nodes=2 --gpus_per_node=8 --time=12:00:00 --partition=train \\
        --config=configs/dense_7b.py --workdir=runs/dense_7b --config.train.steps=100000
    python -m launch.slurm --nodes=2 --config=configs/moe_tiny.py --workdir=runs/tiny --dry_run
    python -m launch.slurm --nodes=2 --workdir=runs/dense_7b -- \\
        launch.evaluate --workdir=runs/dense_7b
    python -m launch.slurm --nodes=1 --array=0-4%2 --workdir=runs/seeds -- \\
        launch.train --config=configs/moe_tiny.py --workdir=runs/seeds/%a --config.seed=%a

The job runs launch.train, whose flags may all be given here, or the command after --. It is one
process on each node, which uses all devices that the job has there. After -- a first word such as
launch.evaluate means `python -m launch.evaluate`, and in an array %a is the number of the element.
The job runs in the current directory with this Python, so all nodes must see both, and the run
directory.

The file that is submitted and the job's output are in WORKDIR/slurm/ (for a run at gs://, in
slurm/NAME/ of the current directory). Before the time limit, all processes save the same step and
the job is queued again, under the same id and with the same run directory. A preempted job is
queued again as well. If a process fails (exit codes 1, 69, 74, 76, 77, or a signal), the command is
started again on the same nodes; after bad input (2) and after divergence (3) it is not.
docs/launching/slurm.md says more.

`scancel JOBID` ends a job and leaves it the cluster's KillWait, often 30 s, to save. With
`scancel --batch --signal=TERM JOBID` the job takes the time that it needs.

Exit codes: 0 submitted; 2 bad input, or refused by SLURM, told in one line.
"""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

from absl import flags

from launch import command_line, train
from launch.output_paths import check_directory
from launch.slurm.job import check_default_time, check_time, job_folder, job_text
from moe.config import ConfigError
from moe.config.layout import check_layout
from moe.files import write_whole
from moe.storage.paths import make_directory


def main(command: list[str], values: flags.FlagValues) -> None:
    """Submits a command, or launch.train with its flags where the command is empty."""
    check_time(values.time, values.save_s)
    if not command:
        _check_run(values)
        command = ["launch.train", *_flags_of_train(sys.argv[1:])]
    text = job_text(values, command)
    if values.dry_run:
        print(text, end="")
        return
    if not shutil.which("sbatch"):
        raise ConfigError(
            "sbatch is not installed on this machine: run this on a login node of the cluster, "
            "or add --dry_run to see the file"
        )
    path = job_folder(values.workdir) / "job.sbatch"
    check_directory("--workdir", path.parent)
    make_directory(path.parent, "--workdir")
    write_whole(path, text)
    _submit(path, values.chain, values.save_s, "{}_*.log" if values.array else "{}.log")


def _check_run(values: flags.FlagValues) -> None:
    """Raises ConfigError for a run that would be refused after it has waited in the queue."""
    if values.array:
        raise ConfigError(
            f"--array={values.array} would train one run several times: "
            "write the command after --, with %a in its --workdir"
        )
    config = command_line.read_run_config(values.config)
    if values.gpus_per_node:
        check_layout(config, config.mesh.resolve(values.nodes * values.gpus_per_node))


def _flags_of_train(arguments: list[str]) -> list[str]:
    """Returns the arguments that are not flags of this command: those for launch.train."""
    ours = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[sys.argv[0]]}
    kept, words = [], iter(arguments)
    for word in words:
        name = word.lstrip("-").split("=")[0]
        if name not in ours and name.removeprefix("no") not in ours:
            kept.append(word)
        elif "=" not in word and name in ours and not flags.FLAGS[name].boolean:
            next(words)  # its value
    return kept


def _submit(path: Path, chain: int, save_s: int, log: str) -> None:
    """Submits the file `chain` times; each job waits for the end of the one before.

    `log` is the name of a job's output, with {} for its id. Raises ConfigError if SLURM refuses the
    job, or gives it too little time to train.
    """
    previous = None
    for _ in range(chain):
        dependency = [f"--dependency=afterany:{previous}"] if previous else []
        done = _ask_slurm("sbatch", "--parsable", *dependency, str(path))
        if done.returncode:
            reason = " ".join(done.stderr.split()).removeprefix("sbatch: error: ")
            raise ConfigError(f"sbatch refused {path}: {reason}")
        previous = done.stdout.strip().split(";")[0]  # a cluster's name may follow the id
        _cancel_if_too_short(previous, save_s)
        after = " after the one before" if dependency else ""
        print(f"submitted job {previous}{after}; its output: {path.parent / log.format(previous)}")


def _ask_slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of SLURM, and returns its exit code with what it prints."""
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")


def _cancel_if_too_short(job: str, save_s: int) -> None:
    """Cancels a job whose time limit, which SLURM knows now, is too short, and raises ConfigError.

    The partition may have set it. The job itself would find that out only when it starts.
    """
    if not shutil.which("squeue"):
        return
    answer = _ask_slurm("squeue", "--noheader", f"--jobs={job}", "--format=%l").stdout
    try:
        check_default_time(answer, save_s)
    except ConfigError:
        subprocess.run(["scancel", job], capture_output=True)
        raise


def define_flags() -> None:
    flags.DEFINE_integer("nodes", None, "Nodes of the job. Required.", lower_bound=1, required=True)
    flags.DEFINE_integer("gpus_per_node", None, "GPUs on each node.", lower_bound=1)
    flags.DEFINE_integer(
        "cpus_per_node", None, "Cores on each node, if not whole nodes.", lower_bound=1
    )
    flags.DEFINE_string("time", None, "The time limit, as 30 (minutes), 12:00:00 or 2-00:00:00.")
    flags.DEFINE_string("partition", None, "The partition; the cluster's default if not set.")
    flags.DEFINE_string("account", None, "The account to charge.")
    flags.DEFINE_string("array", None, "Elements of an array, as 0-9 or 0-9%4 (4 at a time).")
    flags.DEFINE_integer(
        "chain",
        1,
        "Submits so many jobs, each after the end of the one before. At its time limit a job then "
        "ends instead of being queued again.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "save_s", 300, "Seconds before the time limit at which all processes save.", lower_bound=60
    )
    flags.DEFINE_integer(
        "restarts",
        3,
        "Restarts in a row after failures, on the same nodes. A start that lasted ten minutes "
        "begins a new count.",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "backoff_s", 10, "Seconds before the first restart; they double each time.", lower_bound=0
    )
    flags.DEFINE_multi_string("sbatch", [], "One more option of sbatch, as --sbatch=--qos=high.")
    flags.DEFINE_multi_string(
        "srun", [], "One more option of srun, as --srun=--container-image=IMAGE."
    )
    flags.DEFINE_bool("dry_run", False, "Print the file, and submit nothing.")


if __name__ == "__main__":
    # What follows -- is not for this command.
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words_behind = sys.argv[separator + 1 :]
    del sys.argv[separator:]
    define_flags()
    if words_behind:
        command_line.define_workdir("Where the file and the output of the job go.")
    else:
        train.define_flags()
        flags.adopt_module_key_flags(train)  # --help lists them
    command_line.run(functools.partial(main, words_behind), __doc__)
