"""Fits a scaling law to a table of runs, says how sure it is, and predicts the best model.

Examples:
    python -m launch.fit --runs=runs/isoflop_tiny/runs.parquet --law=chinchilla
    python -m launch.fit --runs=runs/isoflop_tiny/runs.parquet --law=chinchilla \\
        --budget=1e14,1e15 --emit=configs/best.py
    python -m launch.fit --runs=theirs.csv --law=chinchilla --output=fits/theirs \\
        --column_parameters=N --column_tokens=D --column_loss=final_loss \\
        --parameters_unit=millions --tokens_unit=billions --where=dataset=c4
    python -m launch.fit --runs=ladder.csv --law=clark --where=router=S-Base,Dense --where=k=1

--runs is a table that launch.sweep wrote, or any CSV or Parquet file with a row for each run. A
table needs three columns, parameters, tokens and loss (nats per token, at the end of training); a
law may need more, and says so. If the columns have other names, --column_NAME=THEIR_NAME names
them. FLOPs, if there is no such column, are 6 for each active parameter and token. Runs whose
status is another one than "finished" are left out, with the reason, and so are runs whose loss is
no better than a guess.

--law is one of:
{laws}

Prints the coefficients with 95 % intervals, from a bootstrap over runs; how the fit went; how well
the law, fitted without the largest budget, predicts that budget's runs; and warnings. Read those
first: they say when the numbers above them mean little, and what to do about it.

--budget finds the best model for a number of training FLOPs: the law is minimised over models. If
the table has a column `config`, as tables of launch.sweep have, these are the models of the table
and models scaled from them by the rules of moe/scaling/experiments/shapes.py, with exact FLOPs;
otherwise they are dense models of any size, at 6 FLOPs for each parameter and token. --emit writes
the config of the best model for the largest budget, to train it with launch.train. A law that
cannot say what is asked for is refused in one line.

Writes to --output, by default DIRECTORY_OF_TABLE/fit_LAW: index.html, a page that holds everything
and needs no network; its figures as PNG files, and as PDF files for papers; and fit.json, with the
coefficients, best models and held-out losses without rounding. The same table, flags and --seed
give the same bytes. If isoflop is refused because budgets lack a minimum, it draws their curves and
writes nothing else.

Exit codes: 0 done, also with warnings; 2 bad input, told in one line; 75 interrupted.
"""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote

from absl import flags

from launch import command_line
from launch.figure_files import write_drawings
from launch.fit import table
from launch.fit.emit import config_file, docstring
from launch.fit.figures import Words, isoflop_drawing
from launch.fit.page import law_page
from launch.fit.results import Results, as_json, as_text
from launch.fit.solve import Request, Solution, check, law_texts, loss_axis, solve
from launch.output_paths import check_directory, output_file
from launch.plotting import Drawing, file_name
from launch.sweep_directory import FIT_PREFIX
from moe.config import ConfigError
from moe.config.checks import expand_path
from moe.files import write_whole
from moe.scaling.experiments.candidates import Candidate
from moe.scaling.laws.isoflop import NoMinima
from moe.storage.paths import make_directory

LEAST_BOOTSTRAPS = 100  # fewer have no 95 % interval worth the name


def main(values: flags.FlagValues) -> None:
    emit = read_emit(values.emit, values.budget or [])
    output = output_directory(values)
    results, drawings, config = find(values)
    print(as_text(results))
    write(output, results, drawings)
    print(f"\nwrote {output / 'index.html'}, its figures and fit.json beside it")
    if emit and config:
        write_whole(emit, config_file(config, docstring(emit, results)))
        command = f"python -m launch.train --config={quote(str(emit))} --workdir=DIR"
        print(f"wrote {emit}; train it with: {command}")


def find(values: flags.FlagValues) -> Solution:
    """Fits and predicts what the flags say. Raises ConfigError before anything takes long."""
    if values.law not in law_texts():
        raise ConfigError(
            f"--law={values.law} is no law: set --law to one of {', '.join(law_texts())}"
        )
    if values.bootstraps < LEAST_BOOTSTRAPS:
        raise ConfigError(
            f"--bootstraps={values.bootstraps} are too few for an interval: "
            f"set --bootstraps to at least {LEAST_BOOTSTRAPS}"
        )
    budgets = table.read_budgets(values.budget or [])
    path = Path(expand_path("--runs", values.runs))
    runs, sha256 = table.read_table(path, values)
    request = Request(
        law=values.law,
        path=path,
        sha256=sha256,
        runs=runs,
        budgets=budgets,
        emit=values.emit,
        seed=values.seed,
        starts=values.starts,
        bootstraps=values.bootstraps,
        loss_unit=values.loss_unit,
    )
    with naming(path):
        candidates = check(request)
    output = output_directory(values)
    check_directory("--output", output)
    with new_directories(output), naming(path):
        try:
            return solve_with_bar(request, candidates)
        except NoMinima as error:
            raise ConfigError(f"{error}{draw_refused(error, request, output)}") from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the table's path before an error. The checks of runs do not know where they are from.

    An error of --budget, which is of no run, stays as it is.
    """
    try:
        yield
    except ConfigError as error:
        if str(error).startswith("--budget="):
            raise
        raise ConfigError(f"{path}: {error}") from None


@contextlib.contextmanager
def new_directories(path: Path) -> Iterator[None]:
    """Makes the directory to write to. An error removes what was made of it and is still empty."""
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    make_directory(path, "--output")
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        with contextlib.suppress(OSError):  # one that is not empty stays
            for directory in made:
                directory.rmdir()
        raise


def draw_refused(error: NoMinima, request: Request, output: Path) -> str:
    """Draws the curves of a refused fit, and returns a sentence that says where."""
    if not error.curves:
        return ""
    drawing = isoflop_drawing(error.curves, Words(loss=loss_axis(request)))
    # An earlier fit, whose page has other curves, may be here.
    drawing = dataclasses.replace(drawing, stem="refused")
    write_drawings([drawing], output, keep_others=True)
    return f". The curves are drawn in {output / file_name(drawing, 'light')}"


def output_directory(values: flags.FlagValues) -> Path:
    """Returns the directory to write to. Raises ConfigError for a text that is no path."""
    if values.output:
        return Path(expand_path("--output", values.output))
    return Path(expand_path("--runs", values.runs)).parent / f"{FIT_PREFIX}{values.law}"


def solve_with_bar(request: Request, candidates: Sequence[Candidate]) -> Solution:
    """Returns what the fit says, and shows a bar while the bootstrap runs."""
    from tqdm import tqdm

    with tqdm(desc=f"fitting {request.law}", disable=None, leave=False) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        return solve(request, candidates, progress)


def read_emit(text: str | None, budgets: Sequence[str]) -> Path | None:
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
    return output_file("--emit", text)


def write(output: Path, results: Results, drawings: Sequence[Drawing]) -> None:
    """Writes the figures, the page and the numbers."""
    write_drawings(drawings, output)
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
        "starts", 200, "The number of starts of the optimiser.", 1, flag_values=flag_values
    )
    flags.DEFINE_integer(
        "bootstraps", 1000, "The number of the bootstrap's samples.", flag_values=flag_values
    )
    table.define_flags(flag_values)


def help_text() -> str:
    """Returns what --help prints: this file's docstring, with the laws."""
    lines = []
    for name, texts in law_texts().items():
        wrapped = [line for text in texts for line in textwrap.wrap(text, 80)]
        lines.append(f"    {name:14}{wrapped[0]}")
        lines += [" " * 18 + line for line in wrapped[1:]]
    return (__doc__ or "").format(laws="\n".join(lines))


if __name__ == "__main__":
    define_flags()
    command_line.run(main, help_text())
