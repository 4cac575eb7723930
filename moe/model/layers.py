"""The small modules inside a Block, and the one door that every weight matmul goes through."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe.config import ModelConfig
from moe.parallel.mesh import constrain, on_auto_axes
from moe.parameters import parameter


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def einsum(
    equation: str,
    x: jax.Array,
    w: jax.Array,
    dtype: jnp.dtype | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Multiplies activations by a weight, in the activations' dtype, into `dtype` (theirs). All
    weight matmuls are this one.

    The weight's gradient has the weight's dtype and is summed in float32, never rounded to the
    activations' on the way. TPUs and GPUs round float32 operands before they multiply them; the
    `precision` "highest" forbids that.
    """
    return jnp.einsum(
        equation, x, w.astype(x.dtype), preferred_element_type=dtype, precision=precision
    )


def _einsum_forward(
    equation: str, x: jax.Array, w: jax.Array, dtype: jnp.dtype | None, precision: str | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return einsum(equation, x, w, dtype, precision), (x, w)


def _einsum_backward(
    equation: str,
    _: jnp.dtype | None,
    precision: str | None,
    residuals: tuple[jax.Array, jax.Array],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    g = g.astype(x.dtype)
    operands, out_dims = equation.split("->")
    x_dims, w_dims = operands.split(",")
    gradient_x = jnp.einsum(
        f"{out_dims},{w_dims}->{x_dims}", g, w.astype(g.dtype), precision=precision
    )
    # First the operand that has the weight's first dimension, so that what comes out need not be
    # transposed.
    (left, left_dims), (right, right_dims) = sorted(
        ((x, x_dims), (g, out_dims)), key=lambda operand: w_dims[0] not in operand[1]
    )
    equation = f"{left_dims},{right_dims}->{w_dims}"
    gradient_w = jnp.einsum(
        equation, left, right, preferred_element_type=w.dtype, precision=precision
    )
    return gradient_x, gradient_w


einsum.defvjp(_einsum_forward, _einsum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(dtype: jnp.dtype, table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Returns the table's row of each id in `dtype`, [B, T, D]; NaN for an id outside [0, V).

    The table's gradient has the table's dtype and is summed in float32: in bfloat16 a sum of many
    like terms stops growing at 256 of them.
    """
    # Gathered over fsdp first, as every weight is: looking up in a table split along D would move
    # activations instead.
    table_VD = constrain(table_VD.astype(dtype), "V-")
    return table_VD.at[_rows(ids_BT, table_VD)].get(mode="fill", fill_value=jnp.nan)


def _rows(ids_BT: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Returns the ids, with V in place of negative ones, which JAX would count from the end."""
    return jnp.where(ids_BT < 0, table_VD.shape[0], ids_BT)


def _look_up_backward(
    dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], g_BTD: jax.Array
) -> tuple[jax.Array, None]:
    table_VD, ids_BT = residuals
    sum_dtype = jnp.promote_types(table_VD.dtype, jnp.float32)
    zeros_VD = jnp.zeros(table_VD.shape, sum_dtype)
    gradient_VD = zeros_VD.at[_rows(ids_BT, table_VD)].add(g_BTD.astype(sum_dtype), mode="drop")
    # Each device sums what its own tokens add to the whole table: if the sum were split along D,
    # the partitioner would move activations instead.
    return constrain(gradient_VD, "V-").astype(table_VD.dtype), None


look_up.defvjp(
    lambda dtype, table, ids: (look_up(dtype, table, ids), (table, ids)), _look_up_backward
)


def check_static(name: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a symbolic size, as jax.export makes it: blocks and capacities are
    computed from sizes while tracing.
    """
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(
            f"{name} {shape} has a symbolic size, which this cannot be traced for: export a program for each shape"
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019, eq. 4), in float32; returns the dtype of its
    input.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dim = x_BTD.shape[-1]
        scale_D = parameter(self, "scale", "D", (dim,), kind="norm", fan_in=1)
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * scale_D[None, None]).astype(x_BTD.dtype)


def rotary_angles(positions_BT: jax.Array, head_dim: int, base: float) -> jax.Array:
    """Angles of rotary positions (Su et al. 2021, eq. 15): position / base^(2i/H), as float32 [B,
    T, H/2].
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x_i, x_{i+H/2}) by angles whose cosines and sines are [B, T, H/2], in
    float32.
    """
    # Turned as [B, N, T, H], the order that attention multiplies in, so that one copy both turns
    # and transposes.
    first, second = jnp.split(jnp.moveaxis(x_BTNH, 2, 1).astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.moveaxis(turned, 1, 2).astype(x_BTNH.dtype)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): `(silu(x W_gate) * x W_up) W_down`."""

    width: int
    output_scale: float = 1.0  # of the initial output

    @on_auto_axes(lambda x_BTD: x_BTD)
    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        d, f = x_BTD.shape[-1], self.width
        w_gate_DF = parameter(self, "gate", "DF", (d, f), kind="linear", fan_in=d)
        w_up_DF = parameter(self, "up", "DF", (d, f), kind="linear", fan_in=d)
        w_down_FD = parameter(
            self, "down", "FD", (f, d), kind="linear", fan_in=f, scale=self.output_scale
        )
        gate_BTF = constrain(einsum("BTD,DF->BTF", x_BTD, w_gate_DF), "BTF")
        up_BTF = constrain(einsum("BTD,DF->BTF", x_BTD, w_up_DF), "BTF")
        return einsum("BTF,FD->BTD", swiglu(gate_BTF, up_BTF), w_down_FD)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, keeping nothing but the two for the backward pass."""
    return gate * jax.nn.sigmoid(gate) * up


def _swiglu_backward(
    residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    return g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


def residual_scale(config: ModelConfig) -> float:
    """Shrinks what 2L sublayers add to the residual stream to a variance of one in all (Radford et
    al. 2019, section 2.3).
    """
    return (2 * config.num_layers) ** -0.5
