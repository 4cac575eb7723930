"""Prints the components that a config builds: shapes, parameters, FLOPs per token, and bytes.

Examples:
    python -m launch.summary --config=configs/dense_125m.py
    python -m launch.summary --config=configs/dense_125m.py --config.model.num_layers=24
    python -m launch.summary --config=configs/moe_8x7b.py

Nothing is allocated or compiled: every number is counted from the config. FLOPs are those of
training (forward and backward), averaged over the tokens of a causal row of
config.data.sequence_length. Bytes are those of the parameters in float32. A training state holds
three times as many (the parameters and Adam's two moments), and the gradient takes as many again as
the parameters while a step runs.
"""

from absl import flags

from launch import command_line
from moe.config import ModelConfig
from moe.scaling.flops import (
    active_parameters,
    component_counts,
    embedding_parameters,
    total_parameters,
    training_flops_per_token,
)

BYTES_PER_PARAMETER = 4


def summary(model: ModelConfig, sequence_length: int) -> str:
    """Returns the table of a model's components, and its totals, as text."""
    rows = [("component", "repeats", "shapes", "parameters", "training FLOPs/token", "bytes")]
    for count in component_counts(model, sequence_length):
        flops, size = 3 * count.forward_flops, count.parameters * BYTES_PER_PARAMETER
        rows.append(
            (
                count.name,
                str(count.repeats),
                count.shapes,
                f"{count.parameters:,}",
                f"{flops:,.0f}",
                f"{size:,}",
            )
        )
    total, embeddings = total_parameters(model), embedding_parameters(model)
    active, flops = active_parameters(model), training_flops_per_token(model, sequence_length)
    size = total * BYTES_PER_PARAMETER
    totals = (
        f"parameters: {total:,} ({total - embeddings:,} without embeddings), "
        f"active per token: {active:,}",
        f"training FLOPs per token: {flops:,.0f} at sequence length {sequence_length}",
        f"bytes: {size:,} of float32 parameters, {3 * size:,} of training state",
    )
    return "\n".join([*_align(rows), *totals])


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    """Returns the rows as aligned lines, with a rule under the first one and after the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [
            cell.rjust(width) if cell[0].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        for row in rows
    ]
    rule = "  ".join("-" * width for width in widths)
    lines = ["  ".join(row).rstrip() for row in cells]
    return [lines[0], rule, *lines[1:], rule]


def main(values: flags.FlagValues) -> None:
    config = command_line.read_run_config(values.config)
    print(summary(config.model, config.data.sequence_length))


if __name__ == "__main__":
    command_line.define_config()
    command_line.run(main, __doc__)
