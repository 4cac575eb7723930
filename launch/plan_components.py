"""Counts the components that a config builds: shapes, parameters, FLOPs per token, and bytes.

Every number is counted from the config. FLOPs are those of training (forward and backward),
averaged over the tokens of a row of config.data.sequence_length. Bytes of the table are those of
the parameters in float32.
"""

import dataclasses
import math

from moe.config import MeshConfig, RunConfig
from moe.scaling.flops import (
    embedding_parameters,
    planned_flops,
    planned_tokens,
    run_active_parameters,
    run_counts,
    run_parameters,
    run_training_flops,
)
from moe.scaling.memory import WORD, state_bytes


def summary(config: RunConfig) -> str:
    """Returns the table of the components of a run's model, and its totals, as text."""
    rows = [("component", "repeats", "shapes", "parameters", "training FLOPs/token", "bytes")]
    for count in run_counts(config):
        flops, size = 3 * count.forward_flops, count.parameters * WORD
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
    total, embeddings = run_parameters(config), embedding_parameters(config.model)
    active, flops = run_active_parameters(config), run_training_flops(config)
    totals = (
        f"parameters: {total:,} ({total - embeddings:,} without embeddings), "
        f"active per token: {active:,} ({active - embeddings:,} without embeddings)",
        f"training FLOPs per token: {flops:,.0f} at sequence length {config.data.sequence_length} "
        f"(6N: {6 * active:,}, and {6 * (active - embeddings):,} without embeddings)",
    )
    return "\n".join([*align(rows), *totals])


def run_lines(config: RunConfig) -> list[str]:
    """Returns a line on the FLOPs of a whole run, and one on the bytes of its training state."""
    mesh, tokens, flops = config.mesh, planned_tokens(config), planned_flops(config)
    devices = math.prod(abs(size) for size in mesh.sizes)
    size = state_bytes(config, mesh.resolve(devices))
    parts = ", ".join(f"{value:,} of {name}" for name, value in dataclasses.asdict(size).items())
    return [
        f"training: {flops:.4g} FLOPs for {tokens:,} tokens",
        f"bytes on {'each of ' * (devices > 1)}{devices} device{'s' * (devices > 1)}: "
        f"{size.total:,} without activations ({parts.replace('_', ' ')})",
    ]


def compiled_flops(config: RunConfig) -> float:
    """Returns the FLOPs per token that XLA counts in a training step without loops of ours.

    XLA counts the body of a loop once. Layers, microbatches and chunks of the loss are written out
    for this, but attention and dropless experts remain loops, of which XLA counts less than is
    done. docs/scaling_laws/counting.md compares the counts.
    """
    import jax

    from moe.training.train_step import make_program

    rows = config.train.batch_size // config.train.accumulation
    length = config.data.sequence_length
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=1),
        model=dataclasses.replace(config.model, scan_layers=False),
        train=dataclasses.replace(config.train, batch_size=rows, accumulation=1, loss_chunk=length),
    )
    program = make_program(config, jax.devices()[:1])
    batch = {
        name: jax.ShapeDtypeStruct(field.shape, field.dtype)
        for name, field in program.task.random_rows(config, rows).items()
    }
    step = program.train_step
    with jax.set_mesh(program.mesh):
        compiled = step.func.lower(*step.args, program.abstract_state, batch).compile()
    return compiled.cost_analysis()["flops"] / (rows * length)


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Returns the rows as aligned lines, with a rule under the first one and after the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        for row in rows
    ]
    rule = "  ".join("-" * width for width in widths)
    lines = ["  ".join(row).rstrip() for row in cells]
    return [lines[0], rule, *lines[1:], rule]
