"""Defines the small modules of a Block, and the `einsum` that multiplies by their weights."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe.cross_entropy import as_int32
from moe.parallel.collectives.shared import as_part, part_axes
from moe.parallel.collectives.weights import (
    lay_out_whole,
    manual_axes,
    sum_gradient,
    sum_products,
    weights_are_split,
)
from moe.parallel.mesh import axis_size, constrain, on_auto_axes, per_shard, splitting_axes
from moe.parallel.sequence import gather_time, scatter_time
from moe.parameters import parameter


def einsum(
    equation: str,
    x: jax.Array,
    w: jax.Array,
    dtype: jnp.dtype | type | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Multiplies activations by a weight, and sums the weight's gradient in float32.

    The weight is gathered along D for the product, and its gradient is split as the weight is.

    All matmuls with weights go through here, except those of experts (`parallel.collectives`) and
    of the loss (`moe.cross_entropy`).

    The product is taken in the activations' dtype, and the result has that dtype unless `dtype`
    is given. The weight's gradient has the weight's dtype, and is summed in float32 without being
    rounded to the activations' dtype on the way. TPUs and GPUs round float32 operands before they
    multiply them; the `precision` "highest" forbids that.
    """
    # jax.custom_vjp hides the types of its function from a type checker, so this one shows them.
    return _einsum(equation, x, w, dtype, precision)


def _multiply(
    equation: str, x: jax.Array, w: jax.Array, dtype: jnp.dtype | None, precision: str | None
) -> jax.Array:
    return _einsum_forward(equation, x, w, dtype, precision)[0]


_einsum = jax.custom_vjp(_multiply, nondiff_argnums=(0, 3, 4))


def _einsum_forward(
    equation: str, x: jax.Array, w: jax.Array, dtype: jnp.dtype | None, precision: str | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    _, w_dims = equation.split("->")[0].split(",")
    whole_w = lay_out_whole(w, x.dtype, w_dims)
    y = jnp.einsum(equation, x, whole_w, preferred_element_type=dtype, precision=precision)
    # The gathered weight is a residual, so that the gather of a recomputed forward pass also serves
    # the gradient of x. Where nothing is gathered, the weight itself is the residual.
    is_split = weights_are_split(w.shape[w_dims.index("D")])
    return y, (x, whole_w if is_split else w, jnp.zeros((0,), w.dtype))


def _einsum_backward(
    equation: str,
    _: jnp.dtype | None,
    precision: str | None,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    grad_out: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, w, like_w = residuals
    grad_out = grad_out.astype(x.dtype)
    operands, out_dims = equation.split("->")
    x_dims, w_dims = operands.split(",")
    grad_x = jnp.einsum(
        f"{out_dims},{w_dims}->{x_dims}", grad_out, w.astype(grad_out.dtype), precision=precision
    )
    # The operand that has the weight's first dimension comes first, so that the product need not
    # be transposed.
    if w_dims[0] in x_dims:
        left, left_dims, right, right_dims = x, x_dims, grad_out, out_dims
    else:
        left, left_dims, right, right_dims = grad_out, out_dims, x, x_dims
    multiply = functools.partial(
        jnp.einsum,
        f"{left_dims},{right_dims}->{w_dims}",
        preferred_element_type=like_w.dtype,
        precision=precision,
    )
    # An encoder's tokens are laid out as all others, and RULES have no letter S.
    dims = left_dims.replace("S", "T"), right_dims.replace("S", "T")
    return grad_x, sum_products(multiply, dims, w_dims, left, right)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def look_up(
    dtype: str, table_VD: jax.Array, ids_BT: jax.Array, companion_PVD: jax.Array | None = None
) -> jax.Array:
    """Returns the table's row of each id in `dtype`, [B, T, D]; NaN for an id outside [0, V).

    The table's gradient has the table's dtype and is summed in float32: in bfloat16 a sum of many
    equal terms stops growing at 256 of them. The companion of a table that is shared takes the
    gradient in its place (`parallel.collectives.shared`).
    """
    ids_BT = as_int32(ids_BT)
    # JAX would count a negative index from the end. V is no row either, and needs no such care.
    rows_BT = jnp.where(ids_BT < 0, table_VD.shape[0], ids_BT)
    return _look_up(dtype, companion_PVD is not None, table_VD, companion_PVD, rows_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(
    dtype: str,
    is_shared: bool,
    table_VD: jax.Array,
    companion_PVD: jax.Array | None,
    rows_BT: jax.Array,
) -> jax.Array:
    # The table is gathered over fsdp first, as every weight is. Looking up in a table that is
    # split along D would move activations instead.
    table_VD = lay_out_whole(table_VD, dtype, "VD")
    rows_BT = constrain(rows_BT, "BT")
    x_BTD = scatter_time(table_VD.at[rows_BT].get(mode="clip"))
    return jnp.where((rows_BT < table_VD.shape[0])[..., None], x_BTD, jnp.nan)


def _look_up_forward(
    dtype: str,
    is_shared: bool,
    table_VD: jax.Array,
    companion_PVD: jax.Array | None,
    rows_BT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _look_up(dtype, is_shared, table_VD, companion_PVD, rows_BT), (table_VD, rows_BT)


def _look_up_backward(
    dtype: str, is_shared: bool, residuals: tuple[jax.Array, jax.Array], grad_BTD: jax.Array
) -> tuple[jax.Array | None, jax.Array | None, None]:
    table_VD, rows_BT = residuals
    sum_dtype = jnp.promote_types(table_VD.dtype, jnp.float32)
    rows_BT = constrain(rows_BT, "BT")
    grad_BTD = constrain(grad_BTD.astype(sum_dtype), "BTD")
    gradient = _add_to_table(grad_BTD, rows_BT, table_VD.shape[0], is_shared)
    if is_shared:
        return None, gradient, None
    return gradient.astype(table_VD.dtype), None, None


def _add_to_table(
    x_BTD: jax.Array, rows_BT: jax.Array, num_rows: int, is_shared: bool
) -> jax.Array:
    """Adds each token's `x` to its row of a table [V, D]; a number that is no row's is left out.

    For a table that is shared, it returns the devices' parts of the sum, [P, V, D].
    Each device sums what its own tokens add to the whole width. The partitioner would gather the
    tokens of all devices instead, or move them to where their part of the width is.
    """
    vocabulary_axes, width_axes = splitting_axes("VD", (num_rows, x_BTD.shape[-1]))
    rows, time, _ = splitting_axes("BTD", x_BTD.shape)
    all_parts = part_axes()

    def add_shard(x_BTD: jax.Array, rows_BT: jax.Array) -> tuple[jax.Array]:
        axes = manual_axes(vocabulary_axes)
        size = num_rows // math.prod(map(axis_size, axes))  # of this device's part of V
        first = jax.lax.axis_index(axes) * size if axes else 0
        own_rows_BT = jnp.where(rows_BT < first, size, rows_BT - first)
        sums_VD = jnp.zeros((size, x_BTD.shape[-1]), x_BTD.dtype)
        sums_VD = sums_VD.at[own_rows_BT].add(x_BTD, mode="drop")
        if is_shared:
            return (as_part(sums_VD, all_parts, rows + time),)
        return (sum_gradient(sums_VD, 1, width_axes, rows + time),)

    out_dims = "PVD" if is_shared else "VD"
    return per_shard(add_shard, ("BTD", "BT"), (out_dims,), x_BTD, rows_BT)[0]


_look_up.defvjp(_look_up_forward, _look_up_backward)


def check_static(name: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a symbolic size, as jax.export makes it.

    Blocks and capacities are computed from sizes while tracing.
    """
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(
            f"{name} {shape} has a symbolic size, but a model is traced for given numbers alone: "
            "export a program for each shape"
        )


class RMSNorm(nn.Module):
    """Divides by the root mean square (Zhang & Sennrich 2019, eq. 4) and multiplies by a scale.

    The mean is over the last dimension, and the scale has its size. It computes in float32 and
    returns the dtype of its input.
    """

    epsilon: float
    dims: str = "BtD"  # of the input, by the legend

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        last, size = self.dims[-1], x.shape[-1]
        scale = parameter(self, "scale", last, (size,), kind="norm", fan_in=1)
        return rms_norm(self.epsilon, self.dims, x, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rms_norm(epsilon: float, dims: str, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x / sqrt(mean(x²) + epsilon) * scale, and keeps no float32 array of the size of x.

    `dims` are the dimensions of x, of which the last is averaged over. It can only be
    differentiated in reverse mode.
    """
    return _rms_norm_forward(epsilon, dims, x, scale)[0]


def _rms_norm_forward(
    epsilon: float, dims: str, x: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    x_float32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x_float32 * x_float32, axis=-1, keepdims=True) + epsilon)
    y = x_float32 * inverse * jnp.expand_dims(scale, range(x.ndim - 1))
    # Laid out here, the result is gathered after it has been rounded, not before.
    return constrain(y.astype(x.dtype), dims), (x, inverse, scale)


def _rms_norm_backward(
    epsilon: float, dims: str, residuals: tuple[jax.Array, jax.Array, jax.Array], grad_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, inverse, scale = residuals
    grad = constrain(grad_y, dims).astype(jnp.float32)
    normed = x.astype(jnp.float32) * inverse
    grad_scale = jnp.sum(grad * normed, axis=range(x.ndim - 1)).astype(scale.dtype)
    # In a caller's shard_map each device has summed over its own tokens.
    varying, allowed = (jax.typeof(array).manual_axis_type.varying for array in (grad_scale, scale))
    if varying := varying - allowed:
        grad_scale = jax.lax.psum(grad_scale, tuple(sorted(varying)))
    grad = grad * jnp.expand_dims(scale, range(x.ndim - 1))
    grad_x = inverse * (grad - normed * jnp.mean(grad * normed, axis=-1, keepdims=True))
    return grad_x.astype(x.dtype), grad_scale


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rotary_angles(positions_BT: jax.Array, head_dim: int, base: float) -> jax.Array:
    """Returns the angles of rotary positions, position / base^(2i/H), as float32 [B, T, H/2].

    Su et al. 2021, eq. 15.
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i+H/2}) in float32, each by its own angle.

    `cos` and `sin` are the cosines and sines of the angles, [B, T, H/2].
    """
    # The rotation is done on [B, N, T, H], the order that attention multiplies in, so that one
    # copy both rotates and transposes.
    first, second = jnp.split(jnp.moveaxis(x_BTNH, 2, 1).astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.moveaxis(rotated, 1, 2).astype(x_BTNH.dtype)


class FeedForward(nn.Module):
    """Applies the SwiGLU layer (Shazeer 2020, eq. 6): `(silu(x W_gate) * x W_up) W_down`."""

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
        x_BTD = gather_time(x_BTD)
        gate_BTF = constrain(einsum("BTD,DF->BTF", x_BTD, w_gate_DF), "BTF")
        up_BTF = constrain(einsum("BTD,DF->BTF", x_BTD, w_up_DF), "BTF")
        return scatter_time(einsum("BTF,FD->BTD", swiglu(gate_BTF, up_BTF), w_down_FD))


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) * up, and keeps nothing but these two for the backward pass."""
    return gate * jax.nn.sigmoid(gate) * up


def _swiglu_forward(
    gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(
    residuals: tuple[jax.Array, jax.Array], grad_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    grad_gate = grad_out * up * sigmoid * (1 + gate * (1 - sigmoid))
    return grad_gate, grad_out * gate * sigmoid


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def residual_scale(num_sublayers: int) -> float:
    """Returns the factor of each sublayer's initial output that gives their sum a variance of one.

    Radford et al. 2019, section 2.3.
    """
    return num_sublayers**-0.5
