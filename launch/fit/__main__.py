"""Fits a scaling law to a table of runs, says how sure it is, and predicts the best model.

Examples:
    python -m launch.fit --runs=runs/isoflop_tiny/runs.parquet --law=chinchilla
    python -m launch.fit --runs=runs/isoflop_tiny/runs.parquet --law=chinchilla \\
        --budget=1e14,1e15 --emit=configs/best.py
    python -m launch.fit --runs=theirs.csv --law=chinchilla --output=fits/theirs \\
        --column_parameters=N --column_tokens=D --column_loss=final_loss \\
        --parameters_unit=millions --tokens_unit=billions --where=dataset=c4
    python -m launch.fit --runs=ladder.csv --law=clark --where=router=S-Base --where=seed=42

--runs is a table that launch.sweep wrote, or any CSV or Parquet file with a row for each run. A
table needs three columns, parameters, tokens and loss (nats per token, at the end of training); a
law may need more, and says so. If the columns have other names, --column_NAME=THEIR_NAME names
them. FLOPs, if there is no such column, are 6 for each active parameter and token. Runs whose
status is not "finished" and losses that are not finite are left out, with the reason.

--law is one of:
{laws}

Prints the coefficients with 95 % intervals, from a bootstrap over runs; how the fit went; how well
the law, fitted without the largest budget, predicts that budget's runs; and warnings. Read those
first: they say when the numbers above them mean little, and what to do about it.

--budget finds the best model for a number of training FLOPs: the law is minimised over models. If
the table has a column `config`, as tables of launch.sweep have, these are the models of the table
and models scaled from them by the rules of moe/scaling/shapes.py, with exact FLOPs; otherwise they
are dense models of any size, at 6 FLOPs for each parameter and token. --emit writes the config of
the best model for the largest budget, to train it with launch.train. A law that cannot say what is
asked for is refused in one line.

Writes to --output, by default DIRECTORY_OF_TABLE/fit_LAW: index.html, a page that holds everything
and needs no network; its figures as PNG files; and fit.json, with every number. The same table,
flags and --seed give the same bytes.

Exit codes: 0 done, also with warnings; 2 bad input, told in one line; 75 interrupted.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from launch import command_line
from launch.fit import table
from launch.fit.emit import config_file, docstring
from launch.fit.page import law_page
from launch.fit.prediction import best_model, check_law, law_loss, notes, table_configs
from launch.fit.results import Results, as_json, as_text, coefficients_of, facts_of, held_out_of
from launch.fit.study import draw_fit
from launch.plotting import Drawing, write_drawing
from moe.config import ConfigError, RunConfig
from moe.config.checks import expand_path
from moe.files import write_whole
from moe.scaling.candidates import Candidate, list_candidates
from moe.scaling.laws import LAWS, Fit, Law, fit
from moe.scaling.optimum import Optimum
from moe.scaling.run_checks import check_runs
from moe.scaling.runs import Runs

LEAST_BOOTSTRAPS = 100  # fewer have no 95 % interval worth the name


class Solution(NamedTuple):
    """Holds what a call of the command found, before anything is written."""

    results: Results
    drawings: list[Drawing]
    config: RunConfig | None  # of the best model for the largest budget, where there are configs


def main(values: flags.FlagValues) -> None:
    emit, output = read_emit(values.emit, values.budget or []), paths(values)[1]
    results, drawings, config = solve(values)
    print(as_text(results))
    write(output, results, drawings)
    print(f"\nwrote {output / 'index.html'}, its figures and fit.json beside it")
    if emit and config:
        write_whole(emit, config_file(config, docstring(emit, results)))
        print(f"wrote {emit}; train it with: python -m launch.train --config={emit} --workdir=DIR")


def paths(values: flags.FlagValues) -> tuple[Path, Path]:
    """Returns the path of the table and that of the directory to write to. Raises ConfigError."""
    path = Path(expand_path("--runs", values.runs))
    return path, Path(
        expand_path("--output", values.output or str(path.parent / f"fit_{values.law}"))
    )


def solve(values: flags.FlagValues) -> Solution:
    """Fits and predicts what the flags say. Raises ConfigError before anything takes long."""
    law, budgets = read_law(values.law), table.read_budgets(values.budget or [])
    if values.bootstraps < LEAST_BOOTSTRAPS:
        raise ConfigError(
            f"--bootstraps={values.bootstraps} are too few for an interval: "
            f"set --bootstraps to at least {LEAST_BOOTSTRAPS}"
        )
    path, output = paths(values)
    runs = table.read_table(path, values)
    try:
        candidates = check_table(law, runs, budgets, values.emit)
    except ConfigError as error:
        # The checks of runs do not know which file they came from.
        raise ConfigError(f"{path}: {error}") from None
    output.mkdir(parents=True, exist_ok=True)
    fitted = fit_runs(law, runs, values.seed, values.bootstraps)
    loss = law_loss(fitted)
    found = [best_model(law, loss, candidates, budget) for budget in budgets]
    optima, configs = [best for best, _ in found], [config for _, config in found]
    results = collect(fitted, len(runs), path, values.loss_unit, optima, configs)
    drawings = draw_fit(fitted, [], optima, candidates, unit_text(values))
    return Solution(results, drawings, configs[-1] if configs else None)


def read_law(name: str) -> Law:
    """Returns the law of --law. Raises ConfigError."""
    if name not in LAWS:
        raise ConfigError(f"--law={name} is no law: set --law to one of {', '.join(LAWS)}")
    return LAWS[name]


def read_emit(text: str | None, budgets: Sequence[float]) -> Path | None:
    """Returns the path of --emit. Raises ConfigError where nothing can be written to it."""
    if text is None:
        return None
    path = Path(expand_path("--emit", text))
    if not budgets:
        raise ConfigError(f"--emit={text} needs a budget: set --budget to a number of FLOPs")
    if path.suffix != ".py" or not path.parent.is_dir():
        raise ConfigError(
            f"--emit={text} is no place for a config file: "
            "set --emit to a file NAME.py in a directory that exists"
        )
    return path


def check_table(
    law: Law, runs: Runs, budgets: Sequence[float], emit: str | None
) -> list[Candidate]:
    """Returns the models that the table's configs make, if it has any. Raises ConfigError."""
    check_law(law, runs, budgets)
    check_runs(runs, law.columns, len(law.coefficients))
    candidates = list_candidates(table_configs(runs))
    if emit and not candidates:
        raise ConfigError(
            f"--emit={emit} has no config to start from, as there is no column config: "
            "give a table of launch.sweep, or leave --emit out"
        )
    return candidates


def fit_runs(law: Law, runs: Runs, seed: int, bootstraps: int) -> Fit:
    """Returns the fit, and shows a bar while the bootstrap runs."""
    from tqdm import tqdm

    with tqdm(desc=f"fitting {law.name}", disable=None, leave=False) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        return fit(law, runs, seed=seed, num_bootstraps=bootstraps, progress=progress)


def unit_text(values: flags.FlagValues) -> str:
    """Returns the unit of the losses as the axes name it."""
    return "nats per token" if values.loss_unit == "nats" else "nats (from bits)"


def collect(
    fitted: Fit,
    num_rows: int,
    path: Path,
    loss_unit: str,
    optima: list[Optimum],
    configs: list[RunConfig | None],
) -> Results:
    """Returns everything that is printed and written as numbers and sentences."""
    return Results(
        law=fitted.law.name,
        formula=fitted.law.formula,
        source=fitted.law.source,
        table=str(path),
        table_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        loss_unit=loss_unit,
        num_runs=len(fitted.runs),
        num_rows=num_rows,
        coefficients=coefficients_of(fitted),
        not_identifiable=fitted.not_identifiable,
        facts=facts_of(fitted),
        held_out=held_out_of(fitted),
        warnings=fitted.warnings,
        left_out=fitted.left_out,
        optima=optima,
        notes=notes(optima, configs, fitted.runs) if optima else [],
    )


def write(output: Path, results: Results, drawings: Sequence[Drawing]) -> None:
    """Writes the figures, the page and the numbers."""
    from tqdm import tqdm

    for drawing in tqdm(drawings, desc="drawing", disable=None, leave=False):
        write_drawing(drawing, output)
    write_whole(output / "fit.json", as_json(results))
    write_whole(output / "index.html", law_page(results, drawings, output))


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string(
        "law", None, "The law to fit. Required.", required=True, flag_values=flag_values
    )
    flags.DEFINE_list(
        "budget",
        None,
        "Training FLOPs to find the best model for, as in 1e15,1e16.",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "emit",
        None,
        "The config file to write for the best model of the largest budget.",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "output",
        None,
        "The directory to write to; fit_LAW beside the table by default.",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "seed", 0, "The seed of the starts and the bootstrap.", 0, flag_values=flag_values
    )
    flags.DEFINE_integer(
        "bootstraps", 1000, "The number of the bootstrap's samples.", flag_values=flag_values
    )
    table.define_flags(flag_values)


def help_text() -> str:
    """Returns what --help prints: this file's docstring, with the laws."""
    lines = [f"    {law.name:13} {law.formula}\n{'':18}({law.source})" for law in LAWS.values()]
    return (__doc__ or "").format(laws="\n".join(lines))


if __name__ == "__main__":
    define_flags()
    command_line.run(main, help_text())
