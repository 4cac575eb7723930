"""Shows how a trained run's routers specialise, on held-out text.

The statistics are those of OLMoE (Muennighoff et al. 2024, section 5).

Examples:
    python -m launch.routing --workdir=runs/moe_tiny
    python -m launch.routing --workdir=runs/moe_tiny --batches=0
    python -m launch.routing --workdir=runs/moe_tiny --step=800 --compare_step=200

Runs the first batches of the validation split through a checkpoint, and counts which tokens chose
which experts, layer by layer:
    load            each expert's share of all assignments; an even load gives each 1/E of them
    token classes   the same share among letters alone, digits alone, and so on. A class prefers an
                    expert whose share is more than the even one. A token of several characters
                    counts as its first one that is no space
    co-activation   the share of an expert's tokens that also chose another expert
    vocabulary      the share of an id's tokens that chose the id's most frequent expert. It is 1
                    where the id alone decides. If ids decided nothing, it would be the share of all
                    tokens that chose the most loaded expert, which is printed beside it
    saturation      the share of an earlier checkpoint's choices that this checkpoint makes too
Saturation is measured for each earlier checkpoint that the run has kept (train.keep_last,
train.keep_every), and each of them reads the text once more, through both checkpoints. Layers and
experts are numbered from 0, dense layers counted. An assignment that a full expert dropped does not
count as a choice.

Prints tables, writes them with plots in WORKDIR/routing/ (routing.md; routing.json holds every
number), and prints that page's path. launch.report shows the same plots on the run's page when it
is run after this. The plots are PNG files for light and for dark pages, and PDF files for papers.
Where a run has many sparse layers, four at even distances are drawn; the tables have all.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from absl import flags
from tqdm import tqdm

from launch import command_line
from launch.figure_files import write_drawings
from launch.kernel_check import check_kernels
from launch.output_paths import check_directory
from launch.plotting import picture_html
from launch.routing_figures import drawings
from moe.config import ConfigError, RunConfig
from moe.config.objectives import check_decoder
from moe.inference import routing_analysis
from moe.storage.paths import RunPath, make_directory, run_path, write_whole
from moe.workdir.identity import (
    checkpoint_steps,
    read_config,
    saved_step,
    use_stored_tokenizer,
)

if TYPE_CHECKING:
    from moe.data.rows import JoinedRows
    from moe.data.tokenizers import Tokenizer
    from moe.training.train_step import Program


def routing(
    workdir: RunPath,
    step: int | None = None,
    compare_step: int | None = None,
    batches: int = 50,
    *,
    kernels: Mapping[str, Any] | None = None,
) -> RunPath:
    """Writes <workdir>/routing/ for a checkpoint (the latest), and returns its page, routing.md.

    With `compare_step` saturation is measured at that earlier checkpoint alone. With 0 `batches`
    the whole split is read. `kernels` is what `check_kernels` returned. Raises ConfigError.
    """
    check_input(workdir, step, compare_step, batches)
    results = measure(workdir, step, compare_step, batches, kernels)
    directory = workdir / "routing"
    make_directory(directory)
    write_whole(directory / "routing.json", json.dumps(results) + "\n")
    drawn = drawings(results)
    write_drawings(drawn, directory)
    page = directory / "routing.md"
    pictures = "".join(f"\n{picture_html(drawing)}\n" for drawing in drawn)
    write_whole(page, tables(results) + pictures)
    return page


def check_input(
    workdir: RunPath, step: int | None, compare_step: int | None, batches: int
) -> RunConfig:
    """Returns the config of the run. Raises ConfigError for bad input. It loads no JAX."""
    if batches < 0:
        raise ConfigError(
            f"--batches={batches} is no number of batches: set --batches to 1 or more, "
            "or to 0 for the whole split"
        )
    config = read_config(workdir)
    check_decoder(f"--workdir={workdir}", config.task)
    if not config.model.moe.num_experts:
        raise ConfigError(
            f"--workdir={workdir} is a dense run (model.moe.num_experts=0): "
            "set --workdir to a run that has experts"
        )
    use_stored_tokenizer(workdir, config, must_match=False)
    saved_step(workdir, step)
    earlier_checkpoints(checkpoint_steps(workdir / "checkpoints"), step, compare_step)
    return config


def measure(
    workdir: RunPath,
    step: int | None,
    compare_step: int | None,
    batches: int,
    kernels: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns every statistic of a checkpoint. Raises ConfigError for an unknown step."""
    # These load JAX, which bad input need not wait for.
    from moe.data.mixtures import open_validation
    from moe.data.tokenizers import make_tokenizer
    from moe.training import trainer
    from moe.workdir import checkpoint

    with checkpoint.read_checkpoints(workdir) as checkpoints:
        saved = sorted(checkpoints.all_steps())
        earlier_steps = earlier_checkpoints(saved, step, compare_step)
        config, program, variables, step = trainer.load_run(workdir, step, kernels=kernels)
        vocab_size, num_experts = config.model.vocab_size, config.model.moe.num_experts
        rows = open_validation(config, program.task.rows)
        read = choice_reader(config, program, rows, batches)
        counts = routing_analysis.sum_counts(
            routing_analysis.count_choices(experts_LNA, ids_N, vocab_size, num_experts)
            for ids_N, (experts_LNA,) in read(f"step {step}", [variables])
        )
        saturation = {}
        for earlier_step in earlier_steps:
            earlier = checkpoint.restore_variables(
                checkpoints, program.abstract_state, earlier_step
            )
            overlap = routing_analysis.sum_counts(
                routing_analysis.count_overlap(earlier_LNA, later_LNA, num_experts)
                for _, (earlier_LNA, later_LNA) in read(
                    f"step {earlier_step}", [earlier, variables]
                )
            )
            saturation[earlier_step] = rounded(routing_analysis.saturation(overlap))
    classes = classes_of(make_tokenizer(config.data, program.task.special_tokens), vocab_size)
    return checkpoint_statistics(config, step, counts, classes) | {"saturation": saturation}


def classes_of(tokenizer: "Tokenizer", vocab_size: int) -> dict[str, np.ndarray]:
    """Returns the ids of a model's vocabulary by the kind of character that they stand for."""
    texts = [tokenizer.decode([id]) for id in range(vocab_size)]
    special_ids = {tokenizer.boundary_id, *tokenizer.special_ids.values()}
    return routing_analysis.token_classes(texts, special_ids)


def earlier_checkpoints(saved: list[int], step: int | None, compare_step: int | None) -> list[int]:
    """Returns the saved steps before `step` (the last one), or `compare_step` alone.

    Raises ConfigError where `compare_step` is none of them.
    """
    earlier = [other for other in saved if other < (saved[-1] if step is None else step)]
    if compare_step is not None and compare_step not in earlier:
        steps = ", ".join(map(str, earlier)) or "there is none"
        raise ConfigError(
            f"--compare_step={compare_step} is no checkpoint before the one of --step: "
            f"choose one of those ({steps})"
        )
    return earlier if compare_step is None else [compare_step]


# Takes a title and the variables of several models. Yields for each batch the ids [N] of its tokens
# and each model's choices [L, N, A].
ChoiceReader = Callable[[str, Sequence[Any]], Iterator[tuple[np.ndarray, list[np.ndarray]]]]


def choice_reader(
    config: RunConfig, program: "Program", rows: "JoinedRows", num_batches: int
) -> ChoiceReader:
    """Returns a function that runs the text through models, and shows a progress bar.

    It leaves padding out. All models have the same shapes, and share one compiled program.
    """
    import jax

    from moe import losses
    from moe.data.loader import evaluation_batches
    from moe.model.transformer import Output, Transformer
    from moe.parallel.mesh import global_batch, host_rows

    model = Transformer(config.model, capture=("experts",)).without_jitter()
    size = config.train.batch_size
    sources, total = rows.sources.values(), _num_batches(rows, size, num_batches)
    batches_of = functools.partial(
        evaluation_batches,
        batch_size=size,
        num_batches=num_batches,
        host_rows=host_rows(program.mesh, size),
        transform=program.task.transform(config),
    )

    @jax.jit
    def choose(variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
        captured = cast(Output, model.apply(variables, batch)).captured
        return losses.in_layer_order(captured)["experts"]

    def read(title: str, models: Sequence[Any]) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        batches = itertools.chain.from_iterable(map(batches_of, sources))
        for batch in tqdm(batches, total=total, desc=title, unit="batch"):
            is_text_BT = batch["segment_ids"] > 0
            on_devices = global_batch(batch, program.mesh, size, program.task.dims)
            with jax.set_mesh(program.mesh):
                choices = [np.asarray(choose(variables, on_devices)) for variables in models]
            yield batch["tokens"][is_text_BT], [experts[:, is_text_BT] for experts in choices]

    return read


def _num_batches(rows: "JoinedRows", size: int, limit: int) -> int:
    """Returns how many batches all sources have, of each at most `limit`, or all if that is 0."""
    return sum(-(-min(limit * size or len(one), len(one)) // size) for one in rows.sources.values())


def rounded(shares: np.ndarray) -> Any:
    """Returns shares as nested lists, to five digits."""
    return np.round(shares, 5).tolist()


def checkpoint_statistics(
    config: RunConfig,
    step: int,
    counts: routing_analysis.ChoiceCounts,
    classes: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Returns the statistics of one checkpoint, all but saturation.

    Classes and ids that the text does not have are left out.
    """
    tokens_V = counts.tokens_V
    classes = {name: ids for name, ids in classes.items() if tokens_V[ids].any()}
    shares = routing_analysis.class_shares(counts.choices_LVE, list(classes.values()))
    vocabulary = routing_analysis.vocabulary_specialisation(counts)
    return {
        "step": step,
        "split": " and ".join(sorted({one.validation_split for one in config.data.sources})),
        "tokens": int(tokens_V.sum()),
        "num_experts": config.model.moe.num_experts,
        "experts_per_token": config.model.moe.experts_per_token,
        "layers": config.model.sparse_layers,
        "load": rounded(routing_analysis.load_shares(counts.choices_LVE)),
        "classes": {
            name: {"tokens": int(tokens_V[ids].sum()), "share": rounded(shares[:, index])}
            for index, (name, ids) in enumerate(classes.items())
        },
        "coactivation": rounded(routing_analysis.coactivation(counts.pairs_LEE)),
        "vocabulary": {
            "mean": rounded(vocabulary.mean_L),
            "by_load": rounded(vocabulary.by_load_L),
            "ids": np.flatnonzero(tokens_V).tolist(),
            "share": rounded(vocabulary.share_LV[:, tokens_V > 0]),
        },
    }


def tables(results: Mapping[str, Any]) -> str:
    """Returns the results as Markdown: a sentence, and a table for each kind of statistic."""
    num_experts, chosen = results["num_experts"], results["experts_per_token"]
    introduction = (
        f"# Routing at step {results['step']:,}\n\n"
        f"{results['tokens']:,} tokens of the split {results['split']!r}; "
        f"{chosen} of {num_experts} experts per token. "
        f"An even share of assignments is {1 / num_experts:.1%}; "
        f"experts drawn at random would make saturation {chosen / num_experts:.1%}.\n"
    )
    parts = [introduction, _layer_table(results), _class_table(results), _saturation_table(results)]
    return "\n".join(parts)


def _layer_table(results: Mapping[str, Any]) -> str:
    head = [
        "layer",
        "largest load / even",
        "smallest load / even",
        "vocabulary specialisation (by load alone)",
        "strongest co-activation",
    ]
    ratios_LE = np.array(results["load"]) * results["num_experts"]
    vocabulary = results["vocabulary"]
    rows = [
        [
            str(layer),
            f"{ratios_LE[index].max():.2f}",
            f"{ratios_LE[index].min():.2f}",
            f"{vocabulary['mean'][index]:.1%} ({vocabulary['by_load'][index]:.1%})",
            _strongest_pair(np.array(results["coactivation"][index])),
        ]
        for index, layer in enumerate(results["layers"])
    ]
    return f"## Layers\n\n{_table(head, rows)}"


def _strongest_pair(shares_EE: np.ndarray) -> str:
    shares_EE = shares_EE * (1 - np.eye(len(shares_EE)))
    first, second = np.unravel_index(np.argmax(shares_EE), shares_EE.shape)
    return f"{first} with {second}: {shares_EE.max():.1%}" if shares_EE.any() else "none"


def _class_table(results: Mapping[str, Any]) -> str:
    num_tokens, classes = max(results["tokens"], 1), results["classes"]
    head = ["layer"]
    head += [f"{name} ({values['tokens'] / num_tokens:.1%})" for name, values in classes.items()]
    rows = [[str(layer)] for layer in results["layers"]]
    for values in classes.values():
        ratios_LE = np.array(values["share"]) * results["num_experts"]
        for row, ratios_E in zip(rows, ratios_LE, strict=True):
            row.append(f"{np.argmax(ratios_E)}: {ratios_E.max():.2f}")
    return (
        "## Token classes\n\n"
        "The expert with the largest share of each class's assignments, "
        f"and that share over the even one.\n\n{_table(head, rows)}"
    )


def _saturation_table(results: Mapping[str, Any]) -> str:
    heading = (
        "## Saturation\n\n"
        "Of the experts chosen at a step, the share that is also chosen at step "
        f"{results['step']:,}.\n\n"
    )
    if not results["saturation"]:
        return heading + (
            "The run has kept no earlier checkpoint: "
            "train.keep_last and train.keep_every say how many it keeps.\n"
        )
    head = ["step", "mean", *(f"layer {layer}" for layer in results["layers"])]
    rows = [
        [f"{step:,}", f"{np.mean(shares_L):.1%}", *(f"{share:.1%}" for share in shares_L)]
        for step, shares_L in results["saturation"].items()
    ]
    return heading + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def prepare(values: flags.FlagValues) -> Mapping[str, Any]:
    """Checks the flags, and then the kernels of the run, of which it returns what is known."""
    workdir = run_path(values.workdir)
    config = check_input(workdir, values.step, values.compare_step, values.batches)
    check_directory("--workdir", workdir)
    return check_kernels(config)


def main(values: flags.FlagValues, kernels: Mapping[str, Any]) -> None:
    options = values.step, values.compare_step, values.batches
    page = routing(run_path(values.workdir), *options, kernels=kernels)
    print(page.read_text(encoding="utf-8").split("\n<picture>")[0])
    print(f"wrote {page}, and beside it routing.json and the plots")


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; the latest by default.")
    flags.DEFINE_integer(
        "compare_step",
        None,
        "The one earlier checkpoint to measure saturation at; by default all that the run kept.",
    )
    flags.DEFINE_integer("batches", 50, "Batches of the validation split to read; 0 reads all.")
    command_line.run(main, __doc__, devices=True, prepare=prepare)
