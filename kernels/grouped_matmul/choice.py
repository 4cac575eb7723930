"""Lists the implementations of the grouped matmuls, and chooses the fastest on a chip.

These are pure functions of a chip's name and of shapes: nothing is run or asked of a device.
"""

import math
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import jax

from moe.kernels.chips import has_large_vmem, is_hopper
from moe.kernels.grouped_matmul import blockwise, reference
from moe.kernels.grouped_matmul.inputs import Gradients, Inputs, Outputs

Name = Literal["reference", "blockwise", "tpu", "hopper"]

DTYPES = ("bfloat16", "float16", "float32", "float64")


class Shapes(NamedTuple):
    """What decides which implementation can compute a call, and in which blocks."""

    num_assignments: int  # pairs of a token and an expert that it chose
    num_experts: int
    dtype: str  # of the tokens


class Implementation(NamedTuple):
    """One way to compute the grouped matmuls."""

    forward: Callable[[Inputs], Outputs]
    backward: Callable[[Inputs, jax.Array, jax.Array, jax.Array], Gradients]
    # obstacle(shapes, chip) -> why it cannot compute a call, or None if it can. If `chip` is None,
    # the chip is no obstacle.
    obstacle: Callable[[Shapes, str | None], str | None]
    blocks: Callable[[Shapes], int]  # the number of rows in a block that suits a call


class Choice(NamedTuple):
    """An implementation's name, and the number of rows in its blocks."""

    name: Name
    block_rows: int


def choose(chip: str | None, shapes: Shapes, refused: Collection[str] = ()) -> Choice:
    """Returns the fastest implementation on `chip`, with its blocks.

    `chip` is a device_kind as JAX names it ("TPU v5p", "NVIDIA H200", "cpu"), or None where it is
    not known. Implementations that are `refused` are not chosen. Raises NotImplementedError if none
    can compute the call.
    """
    candidates: tuple[Name, ...] = ("blockwise",)
    # On CPUs "tpu" is interpreted, for tests, and must be asked for by name.
    if chip is not None and chip.startswith("TPU"):
        candidates = "tpu", "blockwise"
    elif chip is not None and is_hopper(chip):
        candidates = "hopper", "blockwise"
    obstacles = {name: why_not(name, chip, shapes) for name in candidates}
    for name in candidates:
        if name not in refused and obstacles[name] is None:
            return with_blocks(name, shapes)
    reasons = "; ".join(f"{name!r} cannot: {reason}" for name, reason in obstacles.items())
    raise NotImplementedError(f"no implementation computes this grouped matmul. {reasons}")


def why_not(name: Name, chip: str | None, shapes: Shapes) -> str | None:
    """Returns what keeps an implementation from computing a call on a chip, or None."""
    return IMPLEMENTATIONS[name].obstacle(shapes, chip)


def with_blocks(name: Name, shapes: Shapes) -> Choice:
    """Returns an implementation with the blocks that suit a call."""
    return Choice(name, IMPLEMENTATIONS[name].blocks(shapes))


def block_rows(shapes: Shapes) -> int:
    """Returns a power of two near a sixteenth of an expert's mean load, between 8 and 64.

    Small blocks pad less. Runs of them are multiplied at once, so the matmuls stay large.
    """
    mean_load = shapes.num_assignments / shapes.num_experts
    return min(64, max(8, 2 ** round(math.log2(max(1, mean_load / 16)))))


def _obstacle_to_plain_jax(shapes: Shapes, chip: str | None) -> str | None:
    """Returns what keeps an implementation in plain JAX, which runs on every chip, from a call."""
    if shapes.dtype not in DTYPES:
        return f"it takes {', '.join(DTYPES)}, not {shapes.dtype}"
    return _symbolic_rows(shapes)


def _obstacle_to_hopper(shapes: Shapes, chip: str | None) -> str | None:
    if chip is not None and not is_hopper(chip):
        return f"it runs on Hopper GPUs, not on {chip}"
    if shapes.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {shapes.dtype}"
    return _symbolic_rows(shapes)


def _obstacle_to_tpu(shapes: Shapes, chip: str | None) -> str | None:
    if chip is not None and chip != "cpu" and not has_large_vmem(chip):
        return f"it runs on TPU v5e, v5p and later, and interpreted on CPUs, not on {chip}"
    if shapes.dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 and float32, not {shapes.dtype}"
    return _symbolic_rows(shapes)


def _symbolic_rows(shapes: Shapes) -> str | None:
    if isinstance(shapes.num_assignments, int):
        return None
    return f"it takes a number of assignments, not the symbol {shapes.num_assignments}"


# The files of kernels are imported when they are used, since Pallas takes a second to load.


def _hopper_forward(inputs: Inputs) -> Outputs:
    from moe.kernels.grouped_matmul.hopper import swiglu

    return swiglu.forward(inputs)


def _hopper_backward(
    inputs: Inputs, gate_up: jax.Array, weights_I: jax.Array, grad_y_ND: jax.Array
) -> Gradients:
    from moe.kernels.grouped_matmul.hopper import swiglu

    return swiglu.backward(inputs, gate_up, weights_I, grad_y_ND)


def _hopper_block_rows(shapes: Shapes) -> int:
    """Returns the rows that a program multiplies at once."""
    return 128


def _tpu_forward(inputs: Inputs) -> Outputs:
    from moe.kernels.grouped_matmul.tpu import swiglu

    return swiglu.run_on_platform(swiglu.forward, inputs)


def _tpu_backward(
    inputs: Inputs, gate_up: jax.Array, weights_I: jax.Array, grad_y_ND: jax.Array
) -> Gradients:
    from moe.kernels.grouped_matmul.tpu import swiglu

    return swiglu.run_on_platform(swiglu.backward, inputs, gate_up, weights_I, grad_y_ND)


def _tpu_block_rows(shapes: Shapes) -> int:
    """Returns 256 rows, or 128 if an expert's mean load is less than eight times 256.

    An expert's last block is half empty on average, which is a sixteenth of eight blocks. Fewer
    than 128 rows would not fill the matrix units, whose sums over rows are 128 long.
    """
    return 256 if shapes.num_assignments >= 8 * 256 * shapes.num_experts else 128


# To add an implementation, write a file with `forward` and `backward`, and add its name and row.
IMPLEMENTATIONS: dict[Name, Implementation] = {
    "reference": Implementation(
        reference.forward, reference.backward, _obstacle_to_plain_jax, block_rows
    ),
    "blockwise": Implementation(
        blockwise.forward, blockwise.backward, _obstacle_to_plain_jax, block_rows
    ),
    "tpu": Implementation(_tpu_forward, _tpu_backward, _obstacle_to_tpu, _tpu_block_rows),
    "hopper": Implementation(
        _hopper_forward, _hopper_backward, _obstacle_to_hopper, _hopper_block_rows
    ),
}
