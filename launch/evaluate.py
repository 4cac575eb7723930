"""Evaluates a run's checkpoint on a whole split: loss in nats per token, and bits per byte.

Examples:
    python -m launch.evaluate --workdir=runs/dense_tiny
    python -m launch.evaluate --workdir=runs/dense_tiny --step=500 --split=train
    python -m launch.evaluate --workdir=runs/dense_tiny --data=text:notes --data=text:code
    python -m launch.evaluate --workdir=runs/dense_tiny --data=text:notes --slice=language
    python -m launch.evaluate --workdir=runs/dense_tiny --tasks=keywords --task_directory=tasks
    python -m launch.evaluate --workdir=runs/dense_tiny --data=text:notes --slice=language --record

All devices of this machine share the work, however the run was laid out. Prints one JSON object.
For a model with experts it also has max_vio and load_entropy, which say how even the experts' load
is, and dropped_fraction, all as means over the sparse layers. For a run on a mixture, the numbers
are those of all sources together, and NAME/loss and so on are those of the source NAME.

--data names any data set that data.dataset may name, in place of the run's; it may be given again.
Of the user's own files (text:PATH) all documents are read, unless --split names a part of them.
--slice names a field of the examples, and FIELD=VALUE/loss and so on are those of the documents
with this value. --tasks runs tasks of EleutherAI's lm-evaluation-harness, by their names.
--record keeps the result in the run directory, so that launch.report --card writes it down.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from launch import command_line
from launch.kernel_check import check_kernels
from launch.output_paths import check_directory
from launch.recorded_evaluations import Evaluation, record_evaluation
from launch.slices import check_documents, open_slices, splits_of
from moe.config import ConfigError, DataConfig, RunConfig
from moe.config.checks import show
from moe.config.data import is_token_files
from moe.config.objectives import check_decoder
from moe.data.sources import check_dataset
from moe.storage.paths import RunPath, run_path
from moe.workdir.identity import read_config, saved_step, use_stored_tokenizer


def evaluate(
    workdir: RunPath,
    step: int | None = None,
    split: str | None = None,
    *,
    datasets: Sequence[str] = (),
    slice_by: str | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Returns `step`, `loss` and `bits_per_byte` of a checkpoint (the latest) on a whole split.

    The split is the validation split by default. With `datasets`, these are evaluated and not the
    run's own. `slice_by` is a field of the examples: the values of the documents that share a value
    of it are returned under FIELD=VALUE/loss. A model with sparse layers adds the statistics of
    their load. `kernels` is what `check_kernels` returned. Raises ConfigError for an unknown run,
    step or split, and where a number is not finite.
    """
    check_data(workdir, step, split, datasets, slice_by)
    # These load JAX, which bad input need not wait for.
    from moe.training import evaluation, trainer

    config, program, variables, step = trainer.load_run(workdir, step, kernels=kernels)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=0))
    data = evaluated_data(config.data, split, datasets)
    if not datasets:
        config = dataclasses.replace(config, data=data[""])
    rows = _open_rows(config, program, data, split)
    # The slices are opened first: what is wrong with them need not wait for an evaluation.
    with _open_slices(config, program, data, split, slice_by) as slices:
        measure = functools.partial(evaluation.evaluate_sources, config, program, variables)
        result, *sliced = map(measure, (rows, *slices))
    for values in sliced:
        result |= {name: value for name, value in values.items() if "=" in name}
    _check_finite(result, workdir, step)
    return {"step": step, **with_perplexities(result)}


def check_data(
    workdir: RunPath,
    step: int | None,
    split: str | None,
    datasets: Sequence[str],
    slice_by: str | None,
) -> None:
    """Raises ConfigError for an unknown run, step or data set. It loads no JAX."""
    # The files that the config names may be gone, as the run has its own copies of them.
    saved = use_stored_tokenizer(workdir, read_config(workdir), must_match=False)
    saved_step(workdir, step)
    for one in evaluated_data(saved.data, split, datasets).values():
        check_dataset(one)
        if slice_by:
            check_documents(one, slice_by)


@contextlib.contextmanager
def _open_slices(
    config: RunConfig,
    program: Any,
    data: Mapping[str, DataConfig],
    split: str | None,
    slice_by: str | None,
) -> Iterator[list[Any]]:
    """Yields the rows of all slices in a list, which is empty where none are asked for."""
    if not slice_by:
        yield []
        return
    splits = [
        # Of the user's own files that --data names, all documents are read.
        (source, splits_of(source, split if name else source.validation_split))
        for name, one in data.items()
        for source in map(one.for_source, one.sources)
    ]
    with open_slices(config, splits, program.task.rows, slice_by) as slices:
        yield [slices]


def _open_rows(
    config: RunConfig, program: Any, data: Mapping[str, DataConfig], split: str | None
) -> Any:
    """Returns the rows of each data set by its name, or those of the run's own sources."""
    from moe.data.mixtures import open_validation
    from moe.data.rows import JoinedRows

    if "" in data:
        return open_validation(config, program.task.rows)
    opened = {}
    for name, one in data.items():
        one_config = dataclasses.replace(config, data=one)
        splits = splits_of(one, split)
        opened[name] = JoinedRows({part: program.task.rows(one_config, part) for part in splits})
    return JoinedRows(opened)


def evaluated_data(
    data: DataConfig, split: str | None, datasets: Sequence[str]
) -> dict[str, DataConfig]:
    """Returns the config of each data set to evaluate, by the name that its values have.

    The run's own data has the name "", and may be a mixture.
    """
    if not datasets:
        return {"": data.with_validation_split(split) if split else data}
    own = DataConfig()
    fields = {"mixture": (), "stages": own.stages, "text_field": data.sources[0].text_field}
    as_they_are = {"packing": own.packing, "chat_template": own.chat_template}
    split = split or own.validation_split
    return {
        name: dataclasses.replace(
            data,
            dataset=name,
            train_split=split,
            validation_split=split,
            skip_bad_documents=data.skip_bad_documents and name.startswith("text:"),
            **fields,
            **(as_they_are if is_token_files(name) else {}),
        )
        for name in datasets
    }


def with_perplexities(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the values with the perplexity behind each loss, which is its exponential."""
    found = {}
    for name, value in values.items():
        found[name] = value
        prefix, _, last = name.rpartition("/")
        if last == "loss":
            # The exponential of a loss beyond 709 is not a float.
            found[f"{prefix}/perplexity".lstrip("/")] = math.exp(min(value, 700))
    return found


def _check_finite(values: Mapping[str, float], workdir: RunPath, step: int) -> None:
    """Raises ConfigError for a value that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ConfigError(
                f"{workdir / 'checkpoints' / str(step)} has a {name} that is not finite: "
                "set --step to an earlier checkpoint"
            )


def run_tasks(
    workdir: RunPath,
    names: Sequence[str],
    step: int | None = None,
    *,
    directory: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the results of tasks of the lm-evaluation-harness, by their names.

    `directory` holds the user's own task files, and `kernels` is what `check_kernels` returned.
    Raises ConfigError for an unknown run or task.
    """
    manager = find_tasks(workdir, step, tuple(names), directory)
    from launch import harness
    from moe.data.chat import make_chat
    from moe.data.tokenizers import make_tokenizer
    from moe.training import trainer

    config, program, variables, step = trainer.load_run(workdir, step, kernels=kernels)
    tokenizer = make_tokenizer(config.data, program.task.special_tokens)
    run = harness.LoadedRun(
        program.model,
        variables,
        program.mesh,
        config.train.batch_size,
        config.data.sequence_length,
        tokenizer,
        make_chat(config.data, tokenizer),
    )
    results = harness.evaluate_tasks(run, names, manager, limit=limit, num_fewshot=num_fewshot)
    return {"step": step, "tasks": results}


@functools.lru_cache(maxsize=1)
def find_tasks(
    workdir: RunPath, step: int | None, names: tuple[str, ...], directory: str | None
) -> Any:
    """Returns the harness's manager of tasks. Raises ConfigError for an unknown run, step or task.

    To list its tasks takes the harness seconds, so the last answer is kept.
    """
    check_decoder(f"workdir={workdir}", read_config(workdir).task)
    saved_step(workdir, step)
    try:
        from launch import harness
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tasks needs the package {error.name}: pip install lm-eval") from None
    return harness.find_tasks(names, directory)


_DATA_FLAGS = ("data", "slice", "split")
_TASK_FLAGS = ("limit", "num_fewshot", "task_directory")  # they need --tasks


def check_flags(values: flags.FlagValues) -> None:
    """Raises ConfigError for a flag that would have no effect, or whose number is too small."""
    for name in _DATA_FLAGS if values.tasks else _TASK_FLAGS:
        if (value := values[name].value) not in (None, []):
            other = "with" if values.tasks else "without"
            raise ConfigError(
                f"--{name}={show(value)} has no effect {other} --tasks: leave --{name} out"
            )
    for name, least in (("limit", 1), ("num_fewshot", 0)):
        if (value := values[name].value) is not None and value < least:
            raise ConfigError(f"--{name}={value} is too small: set it to {least} or more")


def prepare(values: flags.FlagValues) -> Mapping[str, Any]:
    """Checks the flags, and then the kernels of the run, of which it returns what is known."""
    check_flags(values)
    workdir = run_path(values.workdir)
    config = read_config(workdir)
    if values.record:
        check_directory("--workdir", workdir)
    if values.tasks:
        find_tasks(workdir, values.step, tuple(values.tasks), values.task_directory)
    else:
        check_data(workdir, values.step, values.split, values.data, values.slice)
    return check_kernels(config)


def main(values: flags.FlagValues, kernels: Mapping[str, Any]) -> None:
    workdir = run_path(values.workdir)
    if values.tasks:
        result = run_tasks(
            workdir,
            values.tasks,
            values.step,
            directory=values.task_directory,
            limit=values.limit,
            num_fewshot=values.num_fewshot,
            kernels=kernels,
        )
    else:
        result = evaluate(
            workdir,
            values.step,
            values.split,
            datasets=values.data,
            slice_by=values.slice,
            kernels=kernels,
        )
    print(json.dumps(result, allow_nan=False), flush=True)
    if values.record:
        print(f"wrote {record_evaluation(workdir, _evaluation(values, result))}", file=sys.stderr)


def _evaluation(values: flags.FlagValues, result: Mapping[str, Any]) -> Evaluation:
    """Returns the result of a command with what it was asked to evaluate."""
    metrics = {name: result[name] for name in result if name != "step"}
    return Evaluation(
        step=int(result["step"]),
        values=metrics["tasks"] if values.tasks else metrics,
        split=values.split,
        datasets=tuple(values.data),
        slice_by=values.slice,
        tasks=tuple(values.tasks),
        limit=values.limit,
        num_fewshot=values.num_fewshot,
    )


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that say what to evaluate."""
    flags.DEFINE_string(
        "split",
        None,
        "The split to evaluate on; the config's validation split by default.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "data", [], "A data set to evaluate on, in place of the run's.", flag_values=values
    )
    flags.DEFINE_string(
        "slice", None, "A field of the examples, by whose values to evaluate.", flag_values=values
    )
    flags.DEFINE_list(
        "tasks", [], "Tasks of the lm-evaluation-harness to run instead.", flag_values=values
    )
    flags.DEFINE_string(
        "task_directory", None, "A directory with task files of your own.", flag_values=values
    )
    flags.DEFINE_integer(
        "limit",
        None,
        "How many examples of each task to run; all by default.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_fewshot", None, "How many examples stand before a question.", flag_values=values
    )


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; the latest by default.")
    define_flags(flags.FLAGS)
    flags.DEFINE_bool("record", False, "Whether to keep the result in the run directory.")
    command_line.run(main, __doc__, devices=True, prepare=prepare)
