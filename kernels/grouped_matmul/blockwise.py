"""The experts' SwiGLU on rows grouped by expert, on any platform: a loop over blocks of rows, and
blocks of no expert cost nothing.

jax.lax.ragged_dot does E times the needed work on CPUs, and on GPUs too. Here each block gathers
its own rows (ScatterMoE, Tan et al. 2024) and passes all of its expert's matmuls while it is in the
cache, so that gathered rows and hidden activations never exist as a whole. The gradient of a row's
weight comes from what enters the last matmul, so that what leaves it is not kept (SonicMoE, Guo et
al. 2025).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe.kernels.settings import own_settings

RUNS = (
    16,
    4,
    1,
    # blocks of one expert that are multiplied at once: large matmuls are faster, and small blocks
    # pad less
)

_slice = jax.lax.dynamic_slice_in_dim
_update = jax.lax.dynamic_update_slice_in_dim


def grouped_swiglu(
    x_ND: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    tokens_I: jax.Array,
    experts_M: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`(silu(x w_gate) * x w_up) w_down` of each row's expert, on x_ND[tokens_I]: [I, D], and [x
    w_gate, x w_up], [I, 2F].

    Block m, the m-th I/M rows, belongs to expert experts_M[m] of an ascending int32; the number E
    is no expert, and gives zeros. A token number of N fills a block up: what its row holds is not
    defined, and of weight 0 it has no gradients. All is in the dtype of `x_ND`, summed in float32.
    """
    tokens_I, experts_M = (jnp.asarray(x).astype(jnp.int32) for x in (tokens_I, experts_M))
    with own_settings(x_ND.dtype):
        return _forward(x_ND, w_gate_EDF, w_up_EDF, w_down_EFD, tokens_I, experts_M)


def _forward(
    x_ND: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    tokens_I: jax.Array,
    experts_M: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    block = _block_rows(tokens_I, experts_M)

    def multiply(
        carry: tuple[jax.Array, jax.Array], start: jax.Array, size: int, expert: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        inner = _matmul(
            "id,df->if", _rows(x_ND, tokens_I, start, size), _beside(w_gate_EDF, w_up_EDF, expert)
        ).astype(x_ND.dtype)
        hidden = _swiglu(inner)[0].astype(x_ND.dtype)
        rows = _matmul("if,fd->id", hidden, w_down_EFD[expert]).astype(x_ND.dtype)
        return _update(carry[0], rows, start, 0), _update(carry[1], inner, start, 0)

    carry = tuple(
        jnp.zeros((tokens_I.size, width), x_ND.dtype)
        for width in (x_ND.shape[1], 2 * w_gate_EDF.shape[2])
    )
    return _for_blocks(experts_M, w_gate_EDF.shape[0], block, multiply, carry)


def grouped_swiglu_backward(
    x_ND: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    tokens_I: jax.Array,
    experts_M: jax.Array,
    inner: jax.Array,
    weights_I: jax.Array,
    g_ND: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients of the sum of g_ND[tokens_I] * weights_I * rows, `inner` [I, 2F] and rows being
    what `grouped_swiglu` returned.

    Of each row's input, [I, D] in the dtype of `x_ND`; of the weights gate, up and down, and of
    `weights_I`, in float32.
    """
    tokens_I, experts_M = (jnp.asarray(x).astype(jnp.int32) for x in (tokens_I, experts_M))
    with own_settings(x_ND.dtype):
        return _backward(
            x_ND,
            w_gate_EDF,
            w_up_EDF,
            w_down_EFD,
            tokens_I,
            experts_M,
            inner,
            jnp.asarray(weights_I).astype(jnp.float32),
            g_ND,
        )


def _backward(
    x_ND: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    tokens_I: jax.Array,
    experts_M: jax.Array,
    inner: jax.Array,
    weights_I: jax.Array,
    g_ND: jax.Array,
) -> tuple[jax.Array, ...]:
    block = _block_rows(tokens_I, experts_M)

    def multiply(
        carry: tuple[jax.Array, ...], start: jax.Array, size: int, expert: jax.Array
    ) -> tuple[jax.Array, ...]:
        rows_ID, gradient_gate, gradient_up, gradient_down, gradient_weights = carry
        x, g = _rows(x_ND, tokens_I, start, size), _rows(g_ND, tokens_I, start, size)
        weights = _slice(weights_I, start, size)[:, None]
        hidden, pull_back = _swiglu(_slice(inner, start, size))
        gradient_hidden = _matmul("id,fd->if", g, w_down_EFD[expert])
        gradient_inner = pull_back(gradient_hidden * weights).astype(x.dtype)
        gradient_x = _matmul("if,df->id", gradient_inner, _beside(w_gate_EDF, w_up_EDF, expert))
        of_gate, of_up = jnp.split(_matmul("id,if->df", x, gradient_inner), 2, axis=1)
        return (
            _update(rows_ID, gradient_x.astype(x.dtype), start, 0),
            gradient_gate.at[expert].add(of_gate),
            gradient_up.at[expert].add(of_up),
            gradient_down.at[expert].add(
                _matmul("if,id->fd", (hidden * weights).astype(x.dtype), g)
            ),
            _update(gradient_weights, jnp.sum(gradient_hidden * hidden, axis=1), start, 0),
        )

    shapes = w_gate_EDF.shape, w_up_EDF.shape, w_down_EFD.shape, tokens_I.shape
    carry = (
        jnp.zeros((tokens_I.size, x_ND.shape[1]), x_ND.dtype),
        *(jnp.zeros(shape, jnp.float32) for shape in shapes),
    )
    return _for_blocks(experts_M, w_gate_EDF.shape[0], block, multiply, carry)


def _block_rows(tokens_I: jax.Array, experts_M: jax.Array) -> int:
    if tokens_I.size % experts_M.size:
        raise ValueError(
            f"{tokens_I.size} rows are not a multiple of {experts_M.size} blocks: pad the rows"
        )
    return tokens_I.size // experts_M.size


def _for_blocks(
    experts_M: jax.Array, num_experts: int, block: int, multiply: Callable[..., Any], carry: Any
) -> Any:
    """Applies `multiply(carry, first row, number of rows, expert)` to every block in use, or to a
    run of them.
    """

    def step(starts: jax.Array, blocks: int, i: jax.Array, carry: Any) -> Any:
        return multiply(carry, starts[i] * block, blocks * block, experts_M[starts[i]])

    for blocks, starts, number in _runs(experts_M, num_experts):
        carry = jax.lax.fori_loop(0, number, functools.partial(step, starts, blocks), carry)
    return carry


def _runs(experts_M: jax.Array, num_experts: int) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """Cuts each expert's blocks into runs, the longest first: for each length in RUNS, the first
    blocks of its runs and their number.
    """
    firsts_M, ends_M = (
        jnp.searchsorted(experts_M, experts_M, side=side) for side in ("left", "right")
    )
    place_M, left_M = (
        jnp.arange(experts_M.size) - firsts_M,
        jnp.where(experts_M < num_experts, ends_M - firsts_M, 0),
    )
    for length in RUNS:
        if length <= experts_M.size:
            mask_M = (
                (place_M >= 0) & (place_M < left_M // length * length) & (place_M % length == 0)
            )
            yield (
                length,
                jnp.nonzero(mask_M, size=experts_M.size // length, fill_value=0)[0],
                jnp.sum(mask_M),
            )
            place_M, left_M = place_M - left_M // length * length, left_M % length


def _rows(x_ND: jax.Array, tokens_I: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return x_ND.at[_slice(tokens_I, start, size)].get(
        mode="clip"
    )  # filling with zeros would cost a tenth of the whole


def _beside(w_gate_EDF: jax.Array, w_up_EDF: jax.Array, expert: jax.Array) -> jax.Array:
    """An expert's two weights as one, [D, 2F], for one large matmul instead of two."""
    return jnp.concatenate([w_gate_EDF[expert], w_up_EDF[expert]], axis=1)


def _matmul(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _swiglu(inner: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """silu(gate) * up of [gate, up], in float32, and its gradient's function."""
    gate, up = jnp.split(inner.astype(jnp.float32), 2, axis=1)
    sigmoid = jax.nn.sigmoid(gate)

    def pull_back(g: jax.Array) -> jax.Array:
        return jnp.concatenate(
            [g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid], axis=1
        )

    return gate * sigmoid * up, pull_back
