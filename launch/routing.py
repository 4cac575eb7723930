"""Shows how a trained run's routers specialise, on held-out text (after OLMoE, Muennighoff et al.
2024, section 5).

Examples:
    python -m launch.routing --workdir=runs/moe_tiny
    python -m launch.routing --workdir=runs/moe_tiny --batches=0
    python -m launch.routing --workdir=runs/moe_tiny --step=800 --compare_step=200

Runs the first batches of the validation split through a checkpoint, and counts which tokens chose
which experts, layer by layer:
    load            each expert's share of all assignments; an even load gives each 1/E of them
    token classes   the same for letters, digits, spaces, ... alone: over 1 times the even share, the expert prefers that class
    co-activation   of the tokens that chose one expert, the share that also chose another
    vocabulary      of the tokens with one id, the share that chose its most frequent expert: 1 where the id alone decides. Where ids
                    decide nothing, it is the share of tokens at the most loaded expert, which is given beside it
    saturation      of the experts chosen at an earlier checkpoint, the share that is also chosen at this one
Saturation is measured for each earlier checkpoint that the run has kept (train.keep_last,
train.keep_every), and each is one more reading of the text, through both. Layers and experts are
numbered from 0, dense layers counted; what a full expert dropped was not chosen.

Prints tables, writes them with plots in WORKDIR/routing/ (routing.md; routing.json holds every
number), and prints that page's path. launch.report shows the same plots on the run's page when it
is run after this. There, and in routing.md, they are drawn for light and for dark pages; of many
layers four at even distances are drawn, and the tables have all.
"""

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from launch import command_line
from launch.figures import THEMES, Drawing, picture, write_drawing
from launch.routing_figures import drawings
from moe.config import ConfigError, RunConfig
from moe.files import write_whole
from moe.workdir.identity import read_config

# The byte tokenizer's ids by class; two more follow: the boundaries of documents, and all other
# bytes.
CLASSES = {
    "lower case": string.ascii_lowercase,
    "upper case": string.ascii_uppercase,
    "digits": string.digits,
    "spaces, tabs": " \t",
    "line ends": "\n\r",
    "brackets": "()[]{}",
    "operators": "+-*/%=<>&|^~@!",
    "punctuation": "\"'`#$,.:;?\\_",
}

Counts = dict[str, np.ndarray]


def token_classes(vocab_size: int, boundary_id: int) -> dict[str, np.ndarray]:
    """The ids of each class of tokens; every id is in one."""
    classes = {
        name: np.array([ord(character) for character in characters])
        for name, characters in CLASSES.items()
    }
    classes["boundaries"] = np.array([boundary_id])
    return classes | {
        "other bytes": np.setdiff1d(np.arange(vocab_size), np.concatenate(list(classes.values())))
    }


def count(experts_LNA: np.ndarray, ids_N: np.ndarray, vocab_size: int, num_experts: int) -> Counts:
    """Of N tokens: `tokens` [V]; `choices` [L, V, E], by the id and each chosen expert; `pairs` [L,
    E, E], that chose both.

    An expert numbered E is none. Counts add up over batches; `pairs` has the number that chose an
    expert on its diagonal.
    """
    choices, pairs = [], []
    for experts_NA in experts_LNA:
        cells_NA = ids_N[:, None] * (num_experts + 1) + experts_NA
        cells_VE = np.bincount(cells_NA.ravel(), minlength=vocab_size * (num_experts + 1)).reshape(
            vocab_size, -1
        )
        chosen_NE = np.zeros((len(ids_N), num_experts + 1), np.float32)
        chosen_NE[np.arange(len(ids_N))[:, None], experts_NA] = 1
        choices.append(cells_VE[:, :-1])
        pairs.append(
            (chosen_NE.T @ chosen_NE)[:-1, :-1].astype(np.int64)
        )  # exact in float32 for 16 million tokens at a time
    return {
        "tokens": np.bincount(ids_N, minlength=vocab_size),
        "choices": np.stack(choices),
        "pairs": np.stack(pairs),
    }


def count_common(earlier_LNA: np.ndarray, latest_LNA: np.ndarray, num_experts: int) -> Counts:
    """Of the assignments at an earlier checkpoint: `all` [L], and the `common` [L] ones, whose
    expert the token has at the latest too.
    """
    chosen_LNA = earlier_LNA < num_experts
    common_LNA = np.any(earlier_LNA[..., :, None] == latest_LNA[..., None, :], axis=-1) & chosen_LNA
    return {"all": np.sum(chosen_LNA, axis=(1, 2)), "common": np.sum(common_LNA, axis=(1, 2))}


def class_shares(choices_LVE: np.ndarray, classes: Sequence[np.ndarray]) -> np.ndarray:
    """Each expert's share of the assignments of each class of ids, [L, C, E]."""
    counts_LCE = np.stack([choices_LVE[:, ids].sum(axis=1) for ids in classes], axis=1)
    return counts_LCE / np.maximum(counts_LCE.sum(axis=-1, keepdims=True), 1)


def coactivation(pairs_LEE: np.ndarray) -> np.ndarray:
    """Of the tokens that chose expert i, the share that chose j: [L, i, j]. Zeros for an expert
    that none chose.
    """
    return pairs_LEE / np.maximum(np.diagonal(pairs_LEE, axis1=1, axis2=2), 1)[..., None]


def vocabulary_specialisation(
    choices_LVE: np.ndarray, tokens_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of the tokens with an id, the share that chose its most frequent expert, [L, V]; and the mean
    over all tokens, [L].
    """
    largest_LV = choices_LVE.max(axis=-1)
    return largest_LV / np.maximum(tokens_V, 1), largest_LV.sum(axis=-1) / max(tokens_V.sum(), 1)


def routing(
    workdir: Path, step: int | None = None, compare_step: int | None = None, batches: int = 50
) -> Path:
    """Writes <workdir>/routing/ for a checkpoint (the latest), and returns the path of its page,
    routing.md.

    `compare_step` leaves one of the earlier checkpoints for saturation; 0 batches are the whole
    split. Raises ConfigError.
    """
    if batches < 0:
        raise ConfigError(
            f"--batches={batches} is no number of batches: set --batches to 1 or more, or to 0 for the whole split"
        )
    if not read_config(workdir).model.moe.num_experts:
        raise ConfigError(
            f"--workdir={workdir} is a dense run (model.moe.num_experts=0): set --workdir to a run that has experts"
        )
    results = measure(workdir, step, compare_step, batches)
    directory = workdir / "routing"
    directory.mkdir(exist_ok=True)
    write_whole(directory / "routing.json", json.dumps(results) + "\n")
    page = directory / "routing.md"
    write_whole(
        page,
        tables(results)
        + "".join(f"\n{picture(drawing)}\n" for drawing in draw(results, directory)),
    )
    return page


def measure(
    workdir: Path, step: int | None, compare_step: int | None, batches: int
) -> dict[str, Any]:
    """Every statistic of a checkpoint, as routing.json holds it: shares, in nested lists. Raises
    ConfigError for an unknown step.
    """
    from moe.data.prepare import prepare
    from moe.training import trainer  # load JAX, which bad input need not wait for
    from moe.workdir import checkpoint

    with checkpoint.read_checkpoints(workdir) as checkpoints:
        earlier_steps = earlier_checkpoints(sorted(checkpoints.all_steps()), step, compare_step)
        config, program, variables, step = trainer.load_run(workdir, step)
        num_experts, counts, saturation = config.model.moe.num_experts, {}, {}
        rows = prepare(config.data, config.data.validation_split)
        read = choice_reader(config, program.mesh, rows, batches)
        for ids_N, experts_LNA in read(f"step {step}", variables):
            counts = add(counts, count(experts_LNA, ids_N, config.model.vocab_size, num_experts))
        for earlier in earlier_steps:
            before, common = (
                checkpoint.restore_variables(checkpoints, program.abstract_state, earlier),
                {},
            )
            for _, *experts in read(f"step {earlier}", before, variables):
                common = add(common, count_common(*experts, num_experts))
            saturation[earlier] = rounded(common["common"] / np.maximum(common["all"], 1))
    return summarise(
        config, step, counts, token_classes(config.model.vocab_size, rows.boundary_id)
    ) | {"saturation": saturation}


def earlier_checkpoints(saved: list[int], step: int | None, compare_step: int | None) -> list[int]:
    """The saved steps before `step` (the last one), or `compare_step` alone. Raises ConfigError
    where it is none of them.
    """
    earlier = [other for other in saved if other < (saved[-1] if step is None else step)]
    if compare_step is not None and compare_step not in earlier:
        steps = ", ".join(map(str, earlier)) or "there is none"
        raise ConfigError(
            f"--compare_step={compare_step} is no checkpoint before the one of --step: choose one of those ({steps})"
        )
    return earlier if compare_step is None else [compare_step]


def choice_reader(
    config: RunConfig, mesh: Any, rows: Any, num_batches: int
) -> Callable[..., Iterator[tuple[np.ndarray, ...]]]:
    """The function (title, *models) that runs the text through models (variables), behind a
    progress bar with that title.

    It yields, of each batch and without padding, the ids [N], and each model's choice in each
    sparse layer, [L, N, A].
    """
    import jax

    from moe import losses
    from moe.data.loader import evaluation_batches
    from moe.model.transformer import Transformer
    from moe.parallel.mesh import global_batch, host_rows

    model, size = (
        Transformer(config.model, capture=("experts",)).without_jitter(),
        config.train.batch_size,
    )
    held = host_rows(mesh, size)
    total = -(-min(num_batches * size or len(rows), len(rows)) // size)
    # What is captured is stacked as the sums are, and put in the order of the layers like them.
    choose = jax.jit(
        lambda variables, batch: losses.in_layer_order(model.apply(variables, batch).captured)[
            "experts"
        ]
    )

    def read(title: str, *models: Any) -> Iterator[tuple[np.ndarray, ...]]:
        batches = evaluation_batches(rows, batch_size=size, num_batches=num_batches, host_rows=held)
        for batch in tqdm(batches, total=total, desc=title, unit="batch"):
            is_text_BT, on_devices = batch["segment_ids"] > 0, global_batch(batch, mesh, size)
            with jax.set_mesh(mesh):
                choices = [
                    np.asarray(choose(variables, on_devices))[:, is_text_BT] for variables in models
                ]
            yield batch["tokens"][is_text_BT], *choices

    return read


def add(total: Counts, more: Counts) -> Counts:
    """Counts added up; the first ones are added to nothing."""
    return {name: total[name] + value for name, value in more.items()} if total else more


def rounded(shares: np.ndarray) -> Any:
    """Nested lists of shares, to five digits."""
    return np.round(shares, 5).tolist()


def summarise(
    config: RunConfig, step: int, counts: Counts, classes: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The statistics of one checkpoint's counts; classes and ids that the text does not have are
    left out.
    """
    tokens_V, moe = counts["tokens"], config.model.moe
    classes = {name: ids for name, ids in classes.items() if tokens_V[ids].any()}
    shares_LCE = class_shares(counts["choices"], list(classes.values()))
    vocabulary_LV, vocabulary_L = vocabulary_specialisation(counts["choices"], tokens_V)
    return {
        "step": step,
        "split": config.data.validation_split,
        "tokens": int(tokens_V.sum()),
        "num_experts": moe.num_experts,
        "experts_per_token": moe.experts_per_token,
        "layers": config.model.sparse_layers,
        "load": rounded(class_shares(counts["choices"], [np.arange(len(tokens_V))])[:, 0]),
        "classes": {
            name: {"tokens": int(tokens_V[ids].sum()), "share": rounded(shares_LCE[:, index])}
            for index, (name, ids) in enumerate(classes.items())
        },
        "coactivation": rounded(coactivation(counts["pairs"])),
        "vocabulary": {
            "mean": rounded(vocabulary_L),
            "by_load": rounded(counts["choices"].sum(axis=1).max(axis=-1) / max(tokens_V.sum(), 1)),
            "ids": np.flatnonzero(tokens_V).tolist(),
            "share": rounded(vocabulary_LV[:, tokens_V > 0]),
        },
    }


def tables(results: Mapping[str, Any]) -> str:
    """The results as Markdown tables."""
    layers, num_experts = results["layers"], results["num_experts"]
    ratios_LE = np.array(results["load"]) * num_experts
    even = results["experts_per_token"] / num_experts
    text = f"# Routing at step {results['step']:,}\n\n{results['tokens']:,} tokens of the split {results['split']!r}; "
    text += f"{results['experts_per_token']} of {num_experts} experts per token. An even share of assignments is {1 / num_experts:.1%}; "
    text += f"experts drawn at random would make saturation {even:.1%}.\n\n## Layers\n\n"
    vocabulary = zip(results["vocabulary"]["mean"], results["vocabulary"]["by_load"], strict=True)
    rows = [
        (
            f"{ratios_E.max():.2f}",
            f"{ratios_E.min():.2f}",
            f"{mean:.1%} ({by_load:.1%})",
            _likeliest_pair(np.array(pairs)),
        )
        for ratios_E, (mean, by_load), pairs in zip(
            ratios_LE, vocabulary, results["coactivation"], strict=True
        )
    ]
    head = (
        "layer",
        "largest load / even",
        "smallest load / even",
        "vocabulary specialisation (by load alone)",
        "strongest co-activation",
    )
    text += _table(head, [(str(layer), *row) for layer, row in zip(layers, rows, strict=True)])
    text += "\n## Token classes\n\nThe expert with the largest share of each class's assignments, and that share over the even one.\n\n"
    classes = results["classes"]
    head = (
        "layer",
        *(
            f"{name} ({values['tokens'] / max(results['tokens'], 1):.1%})"
            for name, values in classes.items()
        ),
    )
    shares = [np.array(values["share"]) * num_experts for values in classes.values()]
    cells = lambda index: [
        f"{np.argmax(ratios[index])}: {ratios[index].max():.2f}" for ratios in shares
    ]
    text += _table(head, [(str(layer), *cells(index)) for index, layer in enumerate(layers)])
    text += f"\n## Saturation\n\nOf the experts chosen at a step, the share that is also chosen at step {results['step']:,}.\n\n"
    saturation = results["saturation"]
    if not saturation:
        return (
            text
            + "The run has kept no earlier checkpoint: train.keep_last and train.keep_every say how many it keeps.\n"
        )
    head = ("step", "mean", *(f"layer {layer}" for layer in layers))
    return text + _table(
        head,
        [
            (f"{step:,}", *(f"{share:.1%}" for share in (np.mean(row), *row)))
            for step, row in saturation.items()
        ],
    )


def _likeliest_pair(shares_EE: np.ndarray) -> str:
    shares_EE = shares_EE * (1 - np.eye(len(shares_EE)))
    first, second = np.unravel_index(np.argmax(shares_EE), shares_EE.shape)
    return f"{first} with {second}: {shares_EE.max():.1%}" if shares_EE.any() else "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def draw(results: Mapping[str, Any], directory: Path) -> list[Drawing]:
    """Writes the plots as PNG files, removes an earlier call's that are no more, and returns what
    was drawn.
    """
    drawn = drawings(results)
    for drawing in tqdm(drawn, desc="drawing", unit="plot", disable=None, leave=False):
        write_drawing(drawing, directory)
    written = {f"{drawing.stem}-{theme}.png" for drawing in drawn for theme in THEMES}
    for path in directory.glob("*-*.png"):
        if path.name not in written:
            path.unlink()
    return drawn


def main(values: flags.FlagValues) -> None:
    page = routing(Path(values.workdir), values.step, values.compare_step, values.batches)
    print(page.read_text(encoding="utf-8").split("\n<picture>")[0])
    print(f"wrote {page}, and beside it routing.json and the plots")


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; the latest by default.")
    flags.DEFINE_integer(
        "compare_step",
        None,
        "The one earlier checkpoint to measure saturation at; all that the run kept by default.",
    )
    flags.DEFINE_integer("batches", 50, "Batches of the validation split to read; 0 reads all.")
    command_line.run(main, __doc__)
