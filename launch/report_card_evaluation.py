"""Writes the sections of a model card that say how good the model is."""

from collections.abc import Iterator, Mapping

from launch.recorded_evaluations import Evaluation
from launch.report_card_sections import Facts, markdown_table


def evaluation(facts: Facts) -> Iterator[str]:
    """Yields the metrics of the last evaluation."""
    data, train = facts.config.data, facts.config.train
    yield "## Evaluation"
    lines = [line for line in facts.metrics if "validation/loss" in line]
    if not lines:
        yield "The run has not been evaluated during training."
        return
    names = dict.fromkeys(source.validation_split for source in data.sources)
    splits = "the split " + " and ".join(f"`{name}`" for name in names)
    if data.mixture:
        splits += " of the sources"
    count = train.eval_batches
    part = f"{count:,} batch{'es' * (count != 1)}" if count else "the whole"
    yield (
        f"On {part} of {splits}, at step {lines[-1]['step']:,}. "
        "The loss is in nats per token. Results are means over this text."
    )
    names = [name for name in lines[-1] if name.startswith("validation/")]
    rows = [(name.removeprefix("validation/"), f"{lines[-1][name]:.4f}") for name in names]
    yield markdown_table(("metric", "value"), rows)


def recorded_evaluations(facts: Facts) -> Iterator[str]:
    """Yields the results by slice of the data, on other data and on tasks that were recorded."""
    for one in facts.evaluations:
        if one.tasks:
            yield f"### Evaluation on Tasks of the lm-evaluation-harness\n\n{_asked(one)}."
            rows = [
                (task, name, f"{value:.4f}" if isinstance(value, float) else f"{value}")
                for task, values in one.values.items()
                for name, value in values.items()
                if name != "alias"
            ]
            yield markdown_table(("task", "metric", "value"), rows)
            continue
        by = f" by {one.slice_by}" if one.slice_by else ""
        data = " and ".join(f"`{name}`" for name in one.datasets) or "the Run's Own Data"
        yield f"### Evaluation on {data}{by}\n\n{_asked(one)}."
        yield markdown_table(*_parts(one.values))


def _asked(one: Evaluation) -> str:
    """Returns at which step a run was evaluated, and on which part of what it was asked."""
    parts = [f"At step {one.step:,}"]
    if one.split:
        parts.append(f"on the split `{one.split}`")
    if one.num_fewshot:
        parts.append(f"with {one.num_fewshot} examples before each question")
    if one.limit:
        parts.append(f"on the first {one.limit:,} examples of each")
    return ", ".join(parts)


def _parts(values: Mapping[str, float]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the head and the rows of a table: a row for each part of the data, with its metrics.

    The values of a part are named PART/METRIC, and those of all parts together METRIC.
    """
    parts: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        part, _, metric = name.rpartition("/")
        parts.setdefault(part or "all", {})[metric] = value
    metrics = list(dict.fromkeys(metric for row in parts.values() for metric in row))
    rows = [
        (part, *(f"{row[metric]:.4f}" if metric in row else "" for metric in metrics))
        for part, row in parts.items()
    ]
    return ("part", *metrics), rows
