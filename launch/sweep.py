"""Trains all runs of a sweep, and writes what came of them into one table.

Examples:
    python -m launch.sweep --sweep=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop --dry_run
    python -m launch.sweep --sweep=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop --jobs=2
    python -m launch.sweep --sweep=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop --index=3
    python -m launch.slurm --nodes=1 --array=0-22%4 --workdir=runs/isoflop -- \\
        launch.sweep --sweep=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop --index=%a

A sweep is a config file with a get_config(), the base, and a get_sweep() that yields the runs: for
each a name, and the fields that it changes in the base. docs/scaling_laws/sweeps.md shows how to
write one.

Each run is a process of launch.train in the directory DIR/NAME, so that none of them can end the
others: one that fails or diverges is reported, and the next one begins. The same command goes on
after any interruption, each run from its own checkpoint. What is finished is skipped, and so is a
run that is the same as another one. Ctrl-C (SIGINT) and SIGTERM save all runs before they stop.

DIR/runs.parquet and DIR/runs.csv have a row for each run. With --index, one job is trained: a run,
or a run with the others that start from its state. So any scheduler can train a sweep as an array,
and --report_only gathers the table afterwards.

Exit codes: 0 all runs are finished; 1 some have failed; 2 bad input, told in one line; 3 some have
diverged; 75 interrupted, and saved unless a second signal came. With --index, a failed run's exit
code is that of launch.train. With --report_only it is 0 whatever became of the runs.
"""

import os
from collections.abc import Sequence

from absl import flags

from launch import command_line
from launch.output_paths import check_directory
from launch.sweep_directory import PARQUET_FILE, RESULTS
from launch.sweep_file import Planned, check_runs, distinct, jobs_of, read_sweep
from launch.sweep_progress import DONE
from launch.sweep_runs import Sweep, report_rows
from launch.sweep_table import Row, gather, planned_row, read_result
from moe.config import ConfigError
from moe.parallel.cluster import is_restarted
from moe.storage.owner import RESTART_WAIT_SECONDS, own_run
from moe.storage.paths import RunPath, make_directory, run_path

_HEAD = "index      active       total        tokens      FLOPs      rate  batch    steps  run"


def main(values: flags.FlagValues) -> int:
    workdir = run_path(values.workdir)
    planned = read_sweep(values.sweep, values.set)
    if values.dry_run:
        print(describe(planned, workdir, values.flops_per_second))
        return 0
    check_directory("--workdir", workdir)
    if values.report_only:
        if not (workdir / RESULTS).exists():
            raise FileNotFoundError(
                f"{workdir} holds no results of a sweep: leave out --report_only, "
                "or set --workdir to the directory that has them"
            )
        return _finish(planned, workdir)
    check_runs(planned, workdir)
    if values.index is not None:
        return _train_job(planned, workdir, values.index)
    return train(planned, workdir, values.jobs)


def train(planned: Sequence[Planned], workdir: RunPath, jobs: int) -> int:
    """Trains a sweep as the only process that does so, and returns the command's exit code."""
    make_directory(workdir)
    wait_seconds = RESTART_WAIT_SECONDS if is_restarted(os.environ) else 0.0
    with own_run(workdir, wait_seconds):
        code = Sweep(distinct(planned), workdir, jobs).train()
    _finish(planned, workdir)
    return code


def _train_job(planned: Sequence[Planned], workdir: RunPath, index: int) -> int:
    """Trains one job, whose runs print here, and returns its exit code."""
    jobs = jobs_of(planned)
    if not 0 <= index < len(jobs):
        raise ConfigError(
            f"--index={index} is no job of the sweep: set --index between 0 and {len(jobs) - 1}"
        )
    return Sweep(jobs[index], workdir, 1, shown=True).train()


def _finish(planned: Sequence[Planned], workdir: RunPath) -> int:
    """Writes the table, and prints what became of the runs."""
    rows = gather([one.run for one in distinct(planned)], workdir)
    print(report_rows(rows))
    print(f"The table is in {workdir / PARQUET_FILE}")
    return 0


def describe(planned: Sequence[Planned], workdir: RunPath, rate: float | None) -> str:
    """Returns the list of the runs with what they cost, and the cost of those that are left.

    Hours follow from the FLOPs per second that are given, or that the finished runs had.
    """
    index_of = {one.name: number for number, job in enumerate(jobs_of(planned)) for one in job}
    rows = {one.name: planned_row(one.run) for one in planned}
    results = {one.name: read_result(workdir, one.run) for one in distinct(planned)}
    lines = [_HEAD]
    for one in planned:
        result = results.get(one.name)
        index = str(index_of.get(one.name, "-"))
        note = f" (the same as {one.run.same_as})" if one.run.same_as else ""
        note = f" (from step {one.first_step} of {one.run.fork_from})" if one.first_step else note
        note = f" ({result['status']})" if result else note
        lines.append(f"{index:>5}  {_line(rows[one.name], one)}{note}")
    return "\n".join([*lines, _totals(planned, rows, results, rate)])


def _line(row: Row, one: Planned) -> str:
    """Returns what a run costs, as one line of the list."""
    batch = one.run.config.train.batch_size
    return (
        f"{row['active_parameters']:>10,}  {row['parameters']:>10,}  {row['tokens']:>12,}  "
        f"{row['flops']:>9.3g}  {row['learning_rate']:>8.3g}  {batch:>5}  "
        f"{row['steps']:>7,}  {one.name}"
    )


def _totals(
    planned: Sequence[Planned],
    rows: dict[str, Row],
    results: dict[str, Row | None],
    rate: float | None,
) -> str:
    """Returns how many runs there are, and the FLOPs and hours of those that are left."""
    done = [row for row in results.values() if row and row["status"] == "finished"]
    left = {name for name, row in results.items() if not row or row["status"] not in DONE}
    parts = {one.name: 1 - one.first_step / one.run.config.train.steps for one in planned}
    flops = sum(rows[name]["flops"] * parts[name] for name in left)
    text = f"{len(planned)} runs, {len(results)} of them different, {len(done)} finished; "
    text += f"{flops:.3g} FLOPs are left"
    source = "--flops_per_second"
    if rate is None and (timed := [row for row in done if row["step_seconds"]]):
        seconds = sum(row["steps"] * row["step_seconds"] for row in timed)
        rate, source = sum(row["flops"] for row in timed) / seconds, "the finished runs, one by one"
    if rate is None:
        return f"{text}; --flops_per_second tells how long that takes"
    return (
        f"{text}: {flops / rate / 3600:.2f} hours at {rate:.3g} FLOP/s, from {source}, "
        "without starting and compiling"
    )


def define_flags() -> None:
    """Defines the flags that say how runs are trained, which launch.compare takes too."""
    command_line.define_workdir("The directory of all runs: a new one, or one to go on with.")
    flags.DEFINE_multi_string("set", [], "FIELD=VALUE: sets a field of the config in every run.")
    flags.DEFINE_integer("jobs", 1, "Runs at once. Cores and GPUs are shared out.", lower_bound=1)
    flags.DEFINE_boolean("report_only", False, "Gathers the runs that are there; trains nothing.")


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "The sweep's config file. Required.", required=True)
    define_flags()
    flags.DEFINE_integer("index", None, "Trains one job of the sweep, for arrays of a scheduler.")
    flags.DEFINE_boolean("dry_run", False, "Lists the runs and their cost, and trains nothing.")
    flags.DEFINE_float(
        "flops_per_second", None, "What --dry_run takes for the speed of all jobs.", lower_bound=1.0
    )
    command_line.run(main, __doc__)
