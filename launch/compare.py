"""Trains the variants of an experiment, each with several seeds, and compares them.

Examples:
    python -m launch.compare --sweep=configs/experiments/moe_vs_dense.py \\
        --workdir=runs/moe_vs_dense --jobs=2
    python -m launch.compare --configs=configs/dense_tiny.py,configs/moe_tiny.py --seeds=0,1,2 \\
        --workdir=runs/tiny --set=train.steps=250
    python -m launch.compare --sweep=configs/experiments/moe_vs_dense.py \\
        --workdir=runs/moe_vs_dense --report_only

An experiment is a sweep whose runs are named VARIANT/seed_N, as
moe.scaling.experiments.sweep.repeat names them. It is trained as launch.sweep trains it: in the
same directories, with the same table, and either command goes on with what the other has begun. Or
name config files and seeds; each file is a variant. All variants are trained with the first seed
before any is with the second one.

Writes and prints DIR/comparison.md: losses with standard errors, the paired differences from the
first variant with a t-test, and the variants on the Pareto fronts of loss against FLOPs,
parameters, memory and step time. comparison.json beside it has each seed's loss, and
comparison.png and fronts.png the figures, which are PDF files as well. With --report_only nothing
is trained: the runs that are there are compared, and others may go on training meanwhile.

Exit codes: those of launch.sweep.
"""

import json
from collections.abc import Mapping, Sequence

from absl import flags

from launch import sweep
from launch.command_line import run
from launch.comparison import LEGEND, Rows, comparison, markdown, summarize
from launch.comparison_plots import write_fronts, write_losses
from launch.output_paths import check_directory
from launch.sweep_directory import (
    COMPARISON_JSON,
    COMPARISON_TEXT,
    FRONTS_FIGURE,
    LOSSES_FIGURE,
)
from launch.sweep_file import Planned, check_runs, read_configs, read_sweep
from launch.sweep_table import planned_row, read_result
from moe.config import ConfigError
from moe.storage.paths import RunPath, run_path, write_whole
from moe.workdir.tracking import METRICS_FILE

Variants = Mapping[str, Sequence[Planned]]


def main(values: flags.FlagValues) -> int:
    workdir = run_path(values.workdir)
    check_directory("--workdir", workdir)
    planned = read_planned(values)
    variants = group(planned)
    code = 0
    if not values.report_only:
        check_runs(planned, workdir)
        code = sweep.train(planned, workdir, values.jobs)
        if not has_begun(planned, workdir):  # as if each run has failed at once
            return code
    print(compare(variants, workdir))
    return code


def has_begun(planned: Sequence[Planned], workdir: RunPath) -> bool:
    """Returns whether any run has written its metrics."""
    return any((workdir / one.name / METRICS_FILE).exists() for one in planned)


def read_planned(values: flags.FlagValues) -> list[Planned]:
    """Returns the runs that the flags name: those of a sweep, or of config files and seeds."""
    if bool(values.sweep) == bool(values.configs):
        raise ConfigError(
            "--sweep and --configs say what is compared: set one of them, to a sweep or to files"
        )
    if any(change.partition("=")[0] == "seed" for change in values.set):
        raise ConfigError("--set=seed gives all runs of a variant one seed: leave it out")
    if values.sweep:
        return read_sweep(values.sweep, values.set)
    try:
        seeds = [int(seed) for seed in values.seeds]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"--seeds={','.join(values.seeds)}: write one or more different numbers, as 0,1,2"
        )
    return read_configs(values.configs, seeds, values.set)


def group(planned: Sequence[Planned]) -> dict[str, list[Planned]]:
    """Returns the runs of each variant. Raises ConfigError if there are fewer than two."""
    variants: dict[str, list[Planned]] = {}
    for one in planned:
        name = one.name.removesuffix(f"/seed_{one.run.config.seed}")
        variants.setdefault(name, []).append(one)
    if len(variants) < 2:
        raise ConfigError(
            f"{planned[0].file} has one variant, {next(iter(variants))}: compare two or more"
        )
    return variants


def compare(variants: Variants, workdir: RunPath) -> str:
    """Writes comparison.json, comparison.md and the figures, and returns the tables.

    They cover the runs that have begun. Raises FileNotFoundError where none has begun.
    """
    if not any(has_begun(runs, workdir) for runs in variants.values()):
        raise FileNotFoundError(
            f"{workdir} holds none of the experiment's runs: leave out --report_only, "
            "or set --workdir to the directory that has them"
        )
    rows = {name: finished_rows(runs, workdir) for name, runs in variants.items()}
    results = {
        name: summarize(rows[name], planned_row(runs[0].run)) for name, runs in variants.items()
    }
    workdirs = {
        name: [workdir / (one.run.same_as or one.name) for one in runs]
        for name, runs in variants.items()
    }
    compared = comparison(results, rows)
    text = markdown(compared)
    write_whole(workdir / COMPARISON_JSON, json.dumps(compared, indent=2) + "\n")
    write_losses(results, workdirs, workdir / LOSSES_FIGURE)
    write_fronts(compared, workdir / FRONTS_FIGURE)
    write_whole(
        workdir / COMPARISON_TEXT,
        f"{text}\n\n{LEGEND}\n\n![Losses by variant, and over steps]({LOSSES_FIGURE})\n\n"
        f"![Loss against FLOPs, parameters, memory and step time]({FRONTS_FIGURE})\n",
    )
    return text


def finished_rows(runs: Sequence[Planned], workdir: RunPath) -> Rows:
    """Returns the rows of a variant's finished runs, by seed.

    A run that has lost its metrics has no loss, and counts as one that has not finished.
    """
    rows = {one.run.config.seed: read_result(workdir, one.run) for one in runs}
    is_done = lambda row: row["status"] == "finished" and row["loss"] is not None
    return {seed: row for seed, row in rows.items() if row and is_done(row)}


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "A sweep's config file, whose runs are VARIANT/seed_N.")
    flags.DEFINE_list("configs", None, "Config files to compare, in place of --sweep.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "With --configs: the values of config.seed.")
    sweep.define_flags()
    flags.adopt_module_key_flags(sweep)
    run(main, __doc__)
