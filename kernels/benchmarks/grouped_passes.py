"""Draws the arrays of grouped matmuls, and prepares calls of our implementations' passes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.grouped_matmul import (
    Inputs,
    Name,
    Shapes,
    grouped_swiglu,
    grouped_swiglu_backward,
    with_blocks,
)

Call = Callable[[], Any]


class Shape(NamedTuple):
    """The sizes of a grouped matmul."""

    num_rows: int
    dim: int
    width: int
    num_experts: int

    @property
    def flops(self) -> int:
        """The FLOPs of one matmul."""
        return 2 * self.num_rows * self.dim * self.width


class Problem(NamedTuple):
    """The arrays of a shape: rows in blocks for our kernels, and without gaps for the others."""

    shape: Shape
    inputs: Inputs  # each row is a token of its own
    x_RD: jax.Array
    grad_RF: jax.Array
    loads_E: jax.Array
    implementation: Name


def make_problem(shape: Shape, implementation: Name, dtype: str) -> Problem:
    """Draws arrays and loads between a half and one and a half of the mean."""
    num_rows, dim, width, num_experts = shape
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.5, 1.5, num_experts)
    loads = np.floor(shares / shares.sum() * num_rows).astype(np.int32)
    loads[0] += num_rows - loads.sum()
    block_rows = with_blocks(implementation, Shapes(num_rows, num_experts, dtype)).block_rows
    blocks = -(-loads // block_rows)
    starts = np.cumsum(blocks * block_rows) - blocks * block_rows
    # A row's place is its place among those of its expert, after the expert's first one.
    within = np.concatenate([np.arange(load) for load in loads])
    tokens = np.full(blocks.sum() * block_rows, num_rows, np.int32)
    tokens[np.repeat(starts, loads) + within] = np.arange(num_rows)
    experts = np.repeat(np.arange(num_experts, dtype=np.int32), blocks)

    # Each weight has the scale that keeps the size of what it is multiplied with.
    draw = jax.jit(
        lambda key, shape, scale: (scale * jax.random.normal(key, shape)).astype(dtype),
        static_argnums=(1,),
    )
    projection, down = (num_experts, dim, width), (num_experts, width, dim)
    sizes = ((num_rows, dim), (num_rows, width), projection, projection, down)
    scales = (1.0, 1.0, dim**-0.5, dim**-0.5, width**-0.5)
    keys = jax.random.split(jax.random.key(0), 5)
    x_RD, grad_RF, gate, up, w_down = map(draw, keys, sizes, scales)
    inputs = Inputs(x_RD, gate, up, w_down, jnp.asarray(tokens), jnp.asarray(experts))
    return Problem(shape, inputs, x_RD, grad_RF, jnp.asarray(loads), implementation)


def our_calls(problem: Problem) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yields the name of each pass, and what prepares a call of it."""
    inputs, name = problem.inputs, problem.implementation
    if name == "hopper":
        yield from hopper_calls(problem, None)
    elif name == "tpu":
        yield from _tpu_calls(problem)
    forward = jax.jit(lambda inputs: grouped_swiglu(inputs, name))
    backward = jax.jit(functools.partial(grouped_swiglu_backward, implementation=name))
    weights_I = (inputs.tokens_I < problem.shape.num_rows).astype(jnp.float32)
    yield "swiglu forward", lambda: functools.partial(forward, inputs)
    yield (
        "swiglu backward",
        lambda: functools.partial(
            backward, inputs, forward(inputs).gate_up, weights_I, problem.x_RD
        ),
    )


def hopper_calls(
    problem: Problem, sizes: tuple[int, ...] | None
) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yields the passes of one matmul. `sizes` are those of a Tiling, None for the usual one."""
    from moe.kernels.grouped_matmul.hopper.gradient import grouped_weight_gradient
    from moe.kernels.grouped_matmul.hopper.matmul import grouped_matmul
    from moe.kernels.grouped_matmul.hopper.pipeline import Tiling

    tiling = None if sizes is None else Tiling(*sizes)

    inputs, experts_G = problem.inputs, problem.inputs.experts_G
    weight = inputs.w_gate_EDF
    # The arrays are arguments: as constants of a program, they would be copied into it.
    multiply = jax.jit(lambda x, w, experts: grouped_matmul(x, (w,), experts, tiling=tiling))
    multiply_transposed = jax.jit(
        lambda grad, w, experts: grouped_matmul(grad, (w,), experts, transposed=True, tiling=tiling)
    )
    sum_rows = jax.jit(
        functools.partial(grouped_weight_gradient, num_experts=inputs.num_experts, tiling=tiling)
    )
    x_ID, grad_IF = _rows_in_blocks(problem)
    yield "forward", lambda: functools.partial(multiply, x_ID, weight, experts_G)
    yield "dx", lambda: functools.partial(multiply_transposed, grad_IF, weight, experts_G)
    yield "dw", lambda: functools.partial(sum_rows, x_ID, grad_IF, experts_G)


def _tpu_calls(problem: Problem) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yields the passes of one matmul."""
    from moe.kernels.grouped_matmul.tpu.blocks import map_blocks
    from moe.kernels.grouped_matmul.tpu.gradient import grouped_weight_gradient, plan_visits
    from moe.kernels.grouped_matmul.tpu.matmul import grouped_matmul
    from moe.kernels.grouped_matmul.tpu.swiglu import run_on_platform

    inputs, num_experts = problem.inputs, problem.inputs.num_experts

    def multiply(
        rows: jax.Array,
        w: jax.Array,
        experts_G: jax.Array,
        transposed: bool,
        interpret: Any = False,
    ) -> jax.Array:
        block_map = map_blocks(experts_G, num_experts)
        return grouped_matmul((rows,), (w,), block_map, transposed=transposed, interpret=interpret)

    def sum_rows(
        x: jax.Array, grad: jax.Array, experts_G: jax.Array, interpret: Any = False
    ) -> jax.Array:
        visits = plan_visits(experts_G, num_experts)
        return grouped_weight_gradient(x, grad, visits, num_experts, interpret)

    def compiled(run: Callable[..., jax.Array], **static: Any) -> Callable[..., jax.Array]:
        return jax.jit(functools.partial(run_on_platform, functools.partial(run, **static)))

    x, grad = (
        rows.reshape(inputs.experts_G.size, inputs.block_rows, -1)
        for rows in _rows_in_blocks(problem)
    )
    forward, dx = (compiled(multiply, transposed=transposed) for transposed in (False, True))
    weight, experts_G = inputs.w_gate_EDF, inputs.experts_G
    yield "forward", lambda: functools.partial(forward, x, weight, experts_G)
    yield "dx", lambda: functools.partial(dx, grad, weight, experts_G)
    yield "dw", lambda: functools.partial(compiled(sum_rows), x, grad, experts_G)


def _rows_in_blocks(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Returns the rows and their gradients, with zeros where a row only fills up its block."""
    gather = lambda x: x.at[problem.inputs.tokens_I].get(mode="fill", fill_value=0)
    return gather(problem.x_RD), gather(problem.grad_RF)
