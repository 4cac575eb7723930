"""Writes the sections of a model card that a run's files say: tables and sentences in Markdown."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from launch.recorded_evaluations import Evaluation
from launch.series import Metrics
from moe.config import RunConfig
from moe.config.objectives import TaskName
from moe.data.rows import source_line
from moe.scaling.flops import (
    embedding_parameters,
    run_active_parameters,
    run_parameters,
    run_training_flops,
)
from moe.workdir.source import Origin


class Facts(NamedTuple):
    """Holds what a run's files say."""

    name: str
    config: RunConfig
    metrics: Metrics  # the lines of metrics.jsonl
    environments: list[dict[str, Any]]  # one for each start
    rows_sha256: str | None  # of the rows that it was trained on; None before the first checkpoint
    rows: dict[str, Any]  # what the prepared rows say of themselves, if they are on this machine
    origin: Origin | None  # the checkpoint of another run that it started from
    evaluations: list[Evaluation]  # what launch.evaluate --record kept

    @property
    def step(self) -> int:
        """Returns the last step that was logged."""
        return self.metrics[-1]["step"]

    @property
    def tokens(self) -> int:
        """Returns the number of tokens of all rows up to that step."""
        return self.step * self.config.train.batch_size * self.config.data.sequence_length


class _Kind(NamedTuple):
    """Says in words what the model of a task is."""

    model: str
    attention: str
    use: str


# The kinds of models by the task that trains them.
_KINDS: dict[TaskName, _Kind] = {
    "language_modelling": _Kind(
        "A decoder-only Transformer language model", "causal", "It continues text."
    ),
    "fill_in_the_middle": _Kind(
        "A decoder-only Transformer language model",
        "causal",
        "It continues text, and fills in the middle of it.",
    ),
    "masked_tokens": _Kind(
        "An encoder-only Transformer", "in both directions", "It predicts masked tokens."
    ),
    "span_corruption": _Kind(
        "A Transformer of an encoder and a decoder",
        "in both directions in the encoder, causal in the decoder",
        "It writes the spans that a text lacks.",
    ),
}


def details(facts: Facts) -> Iterator[str]:
    """Yields what kind of model it is, and where it came from."""
    model, step, steps = facts.config.model, facts.step, facts.config.train.steps
    kind = "a mixture of experts" if model.moe.num_experts else "dense"
    yield (
        f"{_KINDS[facts.config.task].model} ({kind}) with "
        f"{run_parameters(facts.config):,} parameters, of which a token uses "
        f"{run_active_parameters(facts.config):,}. The embedding and the unembedding have "
        f"{embedding_parameters(model):,} of them."
    )
    state = "is finished" if step == steps else f"is at step {step:,} of {steps:,}"
    origin = facts.origin
    if origin is None:
        yield f"Training started from random parameters (seed {facts.config.seed}) and {state}."
    else:
        part = "whole state" if origin.is_fork else "parameters"
        yield (
            f"Training started from the {part} of step {origin.step:,} of the run "
            f"`{origin.run.name}` and {state}."
        )
    yield "### Model Architecture"
    yield markdown_table(("field", "value"), _architecture(facts.config))


def _architecture(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yields the rows of the table of the architecture."""
    model, moe = config.model, config.model.moe
    yield "layers", f"{model.num_layers}, pre-norm (RMSNorm)"
    yield "width", f"{model.model_dim}"
    groups = f"{model.num_heads} query heads and {model.num_kv_heads} key/value heads"
    attention = _KINDS[config.task].attention
    norms = ", norms of queries and keys (QK-norm)" if model.qk_norm else ""
    yield "attention", f"{attention}, {groups} of width {model.head_dim}, rotary positions{norms}"
    dense = model.num_layers - len(model.sparse_layers)
    if dense:
        yield "feed-forward", f"SwiGLU of width {model.feed_forward_dim}, in {dense} layers"
    if moe.num_experts:
        shared = f", and {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
        yield (
            "experts",
            f"{moe.num_experts} of width {moe.expert_dim}, {moe.experts_per_token} for each "
            f"token{shared}, in {len(model.sparse_layers)} layers",
        )
        yield "router", f"{moe.router}, dispatch {moe.dispatch}"
    tied = "tied" if model.tied_embeddings else "not tied"
    yield "vocabulary", f"{model.vocab_size:,}, embedding and unembedding {tied}"
    yield "types", f"parameters float32, activations {model.compute_dtype}"


def limits(facts: Facts) -> Iterator[str]:
    """Yields the limits that follow from how the model was trained."""
    config = facts.config
    tokens_per_parameter = facts.tokens / run_active_parameters(config)
    answers = bool(config.data.chat_template)
    untrained = "refuse any request" if answers else "follow instructions or to refuse any"
    found = [
        f"{_KINDS[config.task].use} It was not trained to {untrained}.",
        f"It was trained on rows of {config.data.sequence_length:,} tokens, and has not seen text "
        "that reaches further back.",
        f"It saw {facts.tokens:,} tokens in this run, {tokens_per_parameter:.3g} for each active "
        "parameter.",
    ]
    if repeats := _repeats(facts):
        found.append(f"It read its training text {repeats:.3g} times.")
    found.append(_known_text(facts))
    yield "\n".join(f"- {limit}" for limit in found)


def _known_text(facts: Facts) -> str:
    """Returns a sentence on the text that the model was evaluated on."""
    is_validated = any("validation/loss" in line for line in facts.metrics)
    own = is_validated or any(not one.datasets and not one.tasks for one in facts.evaluations)
    parts = ["held-out text of the data set that it was trained on"] if own else []
    parts += ["other data"] if any(one.datasets for one in facts.evaluations) else []
    parts += ["tasks"] if any(one.tasks for one in facts.evaluations) else []
    if not parts:
        return "It has not been evaluated, so what text it knows is not known from this run."
    return (
        f"Its evaluation below is on {' and on '.join(parts)}. Whether it knows any other text is "
        "not known from this run."
    )


def training(facts: Facts) -> Iterator[str]:
    """Yields the data and the hyperparameters of the training."""
    data, optimizer, train = facts.config.data, facts.config.optimizer, facts.config.train
    rows = facts.rows
    yield "## Training Details"
    yield "### Training Data"
    table = [
        *_data_sets(facts),
        ("tokenizer", data.tokenizer),
        ("fingerprint", f"SHA-256 of the rows: `{facts.rows_sha256 or 'no checkpoint yet'}`"),
    ]
    if rows:
        table.append(
            (
                "size",
                f"{rows['num_documents']:,} documents, {rows['num_bytes']:,} bytes, "
                f"{rows['num_tokens']:,} tokens in {rows['num_rows']:,} rows",
            )
        )
        table.append(("read", f"{_repeats(facts):.3g} times"))
    yield markdown_table(("field", "value"), table)
    yield "### Training Hyperparameters"
    adamw = (
        f"AdamW, betas {optimizer.beta1} and {optimizer.beta2}, weight decay "
        f"{optimizer.weight_decay}, gradients clipped to norm {optimizer.clip_norm}"
    )
    table = [
        ("steps", f"{facts.step:,} of {train.steps:,}"),
        ("batch", f"{train.batch_size:,} rows of {data.sequence_length:,} tokens"),
        ("tokens", f"{facts.tokens:,}"),
        ("optimizer", adamw),
        ("learning rate", _schedule(facts.config)),
        ("seed", f"{facts.config.seed}"),
    ]
    line = next((line for line in reversed(facts.metrics) if "train/loss" in line), None)
    if line:
        table.append(("skipped updates", f"{line['train/skipped_steps']:,.0f}"))
        table.append(("last training loss", f"{line['train/loss']:.4f} nats per token"))
    yield markdown_table(("field", "value"), table)


def _data_sets(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yields the data set, or what the run reads of each source of its mixture."""
    data = facts.config.data
    if not data.mixture:
        yield "data set", f"{facts.rows.get('source', data.dataset)}, split `{data.train_split}`"
        return
    yield "mixture", data.description
    for source in facts.environments[-1].get("sources", []) if facts.environments else []:
        yield "source", source_line(source)


def _schedule(config: RunConfig) -> str:
    """Returns the learning rate's course in words."""
    optimizer = config.optimizer
    final = optimizer.learning_rate * optimizer.final_learning_rate_fraction
    fall = "a cosine" if optimizer.schedule == "cosine" else "one minus a square root"
    return (
        f"{optimizer.learning_rate:g} after {_steps(config.warmup_steps)} of warm-up; "
        f"{final:g} at the end of the last {_steps(config.decay_steps)}, along {fall}"
    )


def _steps(count: int) -> str:
    return f"{count:,} step" + "s" * (count != 1)


def routing(facts: Facts) -> Iterator[str]:
    """Yields the statistics of a mixture's routers in the last logged step."""
    line = next((line for line in reversed(facts.metrics) if "router/max_vio" in line), None)
    if line is None:
        return
    yield "## Model Examination"
    yield (
        f"How evenly the routers used the experts in step {line['step']:,}, as means over the "
        "sparse layers: an even load has `max_vio` 0 and `load_entropy` 1."
    )
    names = sorted(name for name in line if name.startswith("router/"))
    rows = [(name.removeprefix("router/"), f"{line[name]:.4g}") for name in names]
    yield markdown_table(("statistic", "value"), rows)


def compute(facts: Facts) -> Iterator[str]:
    """Yields what the training took."""
    config, devices = facts.config, {}
    if facts.environments:
        devices = facts.environments[-1].get("devices") or {}
    kinds = " and ".join(devices.get("kinds", []))
    per_token = run_training_flops(config)
    rows = [
        ("training FLOPs", f"{per_token * facts.tokens:.4g} ({per_token:,.0f} for each token)"),
        ("devices", f"{devices['count']} x {kinds}" if "count" in devices else "unknown"),
    ]
    if hours := _hours(facts):
        rows.append(("hours of training steps", f"{hours:.3g}"))
    if mfu := [line["train/mfu"] for line in facts.metrics if "train/mfu" in line]:
        rows.append(("median MFU", f"{np.median(mfu):.1%}"))
    if facts.environments:
        packages = facts.environments[-1].get("packages") or {}
        rows.append(("software", ", ".join(f"{name} {packages[name]}" for name in packages)))
        if git := facts.environments[-1].get("git"):
            changed = ", with changes" if git.get("dirty") else ""
            rows.append(("code", f"commit {git.get('commit')}{changed}"))
    yield "## Technical Specifications"
    yield "### Compute Infrastructure"
    yield markdown_table(("field", "value"), rows)
    yield (
        "FLOPs are those of the model's matmuls, forward and backward, counted from the config. "
        "Hours are those of training steps, without compiling, evaluating and saving."
        + (" Both include the steps before the fork." if _is_fork(facts) else "")
    )


def _is_fork(facts: Facts) -> bool:
    return facts.origin is not None and facts.origin.is_fork


def _hours(facts: Facts) -> float:
    """Returns the hours of all steps by the speeds that were logged, or 0 if none was."""
    tokens_per_step = facts.tokens / facts.step
    steps = seconds = 0.0
    last = 0
    for line in facts.metrics:
        if "train/tokens_per_second" in line:
            steps += line["step"] - last
            seconds += (line["step"] - last) * tokens_per_step / line["train/tokens_per_second"]
        last = line["step"]
    return seconds / steps * facts.step / 3600 if steps else 0.0


def _repeats(facts: Facts) -> float:
    """Returns how often the training text was read, or 0 if its size is not known here."""
    return facts.step * facts.config.train.batch_size / facts.rows["num_rows"] if facts.rows else 0


def markdown_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Returns a table in Markdown, in which a value cannot end a cell or a line."""
    lines = [head, ("---",) * len(head), *rows]
    cell = lambda text: " ".join(str(text).replace("|", "\\|").split())
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
