"""Computes the cross-entropy of a large vocabulary, whose logits never exist as a whole.

The data passes through once, on each device's own positions:

    weight  -> gathered along D, in the dtype of the hidden states
    hidden  -> logits of a chunk of positions -> their sum of losses
                 |  and where a gradient is taken, in the same pass:
                 v
               gradient of the logits -> gradient of the hidden states
                                      -> added to the gradient of the weight
    gradient of the weight -> summed over the devices, split as the weight is

The loss is the end of a model, so its own gradient is one number. The backward pass multiplies the
two gradients above by it, and need not make the logits again.
"""

import functools
from typing import NamedTuple, cast

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moe.parallel.collectives import vocabulary
from moe.parallel.collectives.shared import as_part, part_axes
from moe.parallel.collectives.weights import gather, sum_gradient, sum_over
from moe.parallel.mesh import on_auto_axes, per_shard

_LOWEST = float(np.finfo(np.float32).min)


class Unembedding(NamedTuple):
    """Holds the weight that turns hidden states into logits."""

    weight: jax.Array
    dims: str = "DV"  # the dimensions of the weight; "VD" if it is the table of embeddings, too
    # Takes the gradient in place of a weight that is shared (`parallel.collectives.shared`).
    companion: jax.Array | None = None


def cross_entropy_sum(
    hidden_BTD: jax.Array,
    unembedding: Unembedding,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    chunk: int,
) -> jax.Array:
    """Returns the sum over unmasked positions of the cross-entropy in nats, in float32.

    The cross-entropy of a position is -log softmax(hidden weight)[target]. Logits exist for
    `chunk` positions of each row at a time. A masked position changes nothing, even if it holds
    NaN. An unmasked target outside [0, V) makes the sum and its gradients NaN.

    It can be differentiated once, in reverse mode, with respect to hidden states and weight. The
    weight's gradient is summed in float32.

    Raises TypeError for a mask that is not bool, or a weight that is no `Unembedding`, and
    ValueError for shapes that do not match, or a chunk below 1.
    """
    return cross_entropy_sums(hidden_BTD, unembedding, targets_BT, mask_BT, (), chunk)[0]


@on_auto_axes(lambda spec: PartitionSpec())
def cross_entropy_sums(
    hidden_BTD: jax.Array,
    unembedding: Unembedding,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    parts_BT: tuple[jax.Array, ...],
    chunk: int,
) -> tuple[jax.Array, ...]:
    """Returns `cross_entropy_sum`, and then its part at the positions of each mask in `parts_BT`.

    The parts are for reports: they have no gradient. A position that `mask_BT` hides is in no part.
    """
    _check_arguments(hidden_BTD, unembedding, targets_BT, (mask_BT, *parts_BT), chunk)
    weight, dims, companion = unembedding
    if not targets_BT.size:
        return tuple(jnp.zeros((), jnp.float32) for _ in range(1 + len(parts_BT)))
    masks_JBT = jnp.stack([mask_BT, *(mask_BT & part_BT for part_BT in parts_BT)])
    targets_BT = as_int32(targets_BT)
    split = vocabulary.split_of(hidden_BTD, weight, dims)
    plan = _Plan(dims, chunk, split, None if companion is None else part_axes())
    # jax.custom_vjp hides the types of its function from a type checker.
    total, parts = cast(
        "tuple[jax.Array, jax.Array]",
        _loss_sums(plan, companion, hidden_BTD, weight, targets_BT, masks_JBT),
    )
    return total, *jax.lax.stop_gradient(parts)


def _check_arguments(
    hidden_BTD: jax.Array,
    unembedding: Unembedding,
    targets_BT: jax.Array,
    masks_BT: tuple[jax.Array, ...],
    chunk: int,
) -> None:
    """Raises TypeError or ValueError for arguments that would fail later, or not at all."""
    if not isinstance(unembedding, Unembedding):
        raise TypeError(
            f"unembedding is of type {type(unembedding).__name__}: give Unembedding(weight_DV)"
        )
    if hidden_BTD.ndim != 3:
        raise ValueError(f"hidden states have shape {hidden_BTD.shape}: give them as [B, T, D]")
    weight, dims = unembedding.weight, unembedding.dims
    if dims not in ("DV", "VD"):
        raise ValueError(f"Unembedding has dims={dims!r}: set dims to 'DV' or 'VD'")
    batch, length, width = hidden_BTD.shape
    if weight.ndim != 2 or weight.shape[dims.index("D")] != width:
        raise ValueError(
            f"the weight {weight.shape} has the dimensions {dims!r}, and hidden states "
            f"{hidden_BTD.shape} have D = {width}: give Unembedding(weight_DV), or "
            "Unembedding(table_VD, 'VD')"
        )
    for name, x in (("targets", targets_BT), *(("mask", mask) for mask in masks_BT)):
        if x.shape != (batch, length):
            raise ValueError(f"{name} has shape {x.shape}: give one of shape {(batch, length)}")
    if not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        raise TypeError(f"targets are {targets_BT.dtype.name}: give token ids, as int32")
    for mask in masks_BT:
        check_mask("mask", mask)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is too small: set it to 1 or more")


def check_mask(name: str, mask: jax.Array) -> None:
    """Raises TypeError for a mask that is not bool. Nothing here weights positions by numbers."""
    if mask.dtype != bool:
        raise TypeError(f"{name} is {mask.dtype.name}, and a mask is bool: give {name} > 0")


def as_int32(x: jax.Array) -> jax.Array:
    """Returns integers as int32. One that int32 cannot hold becomes the nearest one that it can.

    A plain cast would turn an id of 2**32 + 5, which is outside of every vocabulary, into 5. JAX
    casts so what it gets from NumPy without 64-bit types, so a NumPy array is clipped before.
    """
    own, int32 = jnp.iinfo(x.dtype), np.iinfo(np.int32)
    if own.min < int32.min or own.max > int32.max:
        clip = np.clip if isinstance(x, np.ndarray) else jnp.clip
        return jnp.asarray(clip(x, max(int(own.min), int32.min), int32.max), jnp.int32)
    return jnp.asarray(x, jnp.int32)


class _Plan(NamedTuple):
    """Holds what is known while the program is traced."""

    dims: str
    chunk: int
    split: vocabulary.Split
    part_axes: tuple[str, ...] | None  # the axes of the parts of a shared weight's gradient

    @property
    def gradient_dims(self) -> str:
        return self.dims if self.part_axes is None else f"P{self.dims}"

    @property
    def width_dim(self) -> int:
        return self.dims.index("D")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(
    plan: _Plan,
    companion: jax.Array | None,
    hidden_BTD: jax.Array,
    weight: jax.Array,
    targets_BT: jax.Array,
    masks_JBT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum over the first mask's positions, and those over the other masks'."""
    run = functools.partial(_sum_shard, plan)
    in_dims = ("BTD", plan.dims, "BT", "-BT")
    (sums_J,) = per_shard(run, in_dims, ("-",), hidden_BTD, weight, targets_BT, masks_JBT)
    return sums_J[0], sums_J[1:]


def _loss_sums_forward(
    plan: _Plan, companion: jax.Array | None, *arrays: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    run = functools.partial(_differentiate_shard, plan)
    hidden_dims = "BtD" if plan.split.splits_time else "BTD"
    in_dims, out_dims = ("BTD", plan.dims, "BT", "-BT"), ("-", hidden_dims, plan.gradient_dims)
    sums_J, *gradients = per_shard(run, in_dims, out_dims, *arrays)
    return (sums_J[0], sums_J[1:]), tuple(gradients)


def _loss_sums_backward(
    plan: _Plan, gradients: tuple[jax.Array, jax.Array], grad_sums: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    grad_hidden_BTD, grad_weight = gradients
    grad_total = grad_sums[0]

    def scale(gradient: jax.Array) -> jax.Array:
        dtype = _sum_dtype(gradient)
        return (gradient.astype(dtype) * grad_total.astype(dtype)).astype(gradient.dtype)

    grad_hidden_BTD, grad_weight = scale(grad_hidden_BTD), scale(grad_weight)
    if plan.part_axes is None:
        return None, grad_hidden_BTD, grad_weight, None, None
    return grad_weight, grad_hidden_BTD, None, None, None


_loss_sums.defvjp(_loss_sums_forward, _loss_sums_backward)


def _sum_shard(
    plan: _Plan,
    hidden_BTD: jax.Array,
    weight: jax.Array,
    targets_BT: jax.Array,
    masks_JBT: jax.Array,
) -> tuple[jax.Array]:
    """Returns the sums of a device's positions, added up over all devices."""
    whole_w = gather(weight.astype(hidden_BTD.dtype), plan.split.width, plan.width_dim)

    def add_chunk(sums_J: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return sums_J + _chunk_losses(plan, whole_w, *arrays).sums_J, None

    zeros_J = jnp.zeros(masks_JBT.shape[0], jnp.float32)
    sums_J, _ = jax.lax.scan(add_chunk, zeros_J, _cut(plan, hidden_BTD, targets_BT, masks_JBT))
    return (sum_over(sums_J, plan.split.positions),)


def _differentiate_shard(
    plan: _Plan,
    hidden_BTD: jax.Array,
    weight: jax.Array,
    targets_BT: jax.Array,
    masks_JBT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `_sum_shard` does, and the total's gradients of hidden states and weight."""
    whole_w = gather(weight.astype(hidden_BTD.dtype), plan.split.width, plan.width_dim)
    letters = plan.dims.lower()

    def add_chunk(
        carry: tuple[jax.Array, jax.Array], arrays: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        sums_J, grad_weight = carry
        losses = _chunk_losses(plan, whole_w, *arrays)
        grad_logits = losses.grad_logits_NV().astype(hidden_BTD.dtype)
        grad_hidden = jnp.einsum(f"nv,{letters}->nd", grad_logits, whole_w)
        # The operand with the weight's first dimension comes first, so that the product need not
        # be transposed.
        pair = [(losses.hidden_ND, "nd"), (grad_logits, "nv")]
        (left, left_dims), (right, right_dims) = pair if letters == "dv" else pair[::-1]
        equation = f"{left_dims},{right_dims}->{letters}"
        grad_weight += jnp.einsum(equation, left, right, preferred_element_type=grad_weight.dtype)
        return (sums_J + losses.sums_J, grad_weight), grad_hidden

    no_sums_J = jnp.zeros(masks_JBT.shape[0], jnp.float32)
    no_gradient = jnp.zeros(whole_w.shape, _sum_dtype(weight))
    chunks = _cut(plan, hidden_BTD, targets_BT, masks_JBT)
    carry, grads_hidden = jax.lax.scan(add_chunk, (no_sums_J, no_gradient), chunks)
    sums_J, grad_weight = carry
    split_rows = "chunks (b c) d -> b (chunks c) d"
    grad_hidden_BTD = einops.rearrange(grads_hidden, split_rows, b=hidden_BTD.shape[0])
    return (
        sum_over(sums_J, plan.split.positions),
        vocabulary.sum_hidden(grad_hidden_BTD[:, : hidden_BTD.shape[1]], plan.split),
        _sum_weight_gradient(plan, grad_weight, weight.dtype),
    )


def _sum_weight_gradient(plan: _Plan, gradient: jax.Array, dtype: np.dtype) -> jax.Array:
    """Sums the devices' gradients of the weight. If it is shared, each keeps its own part."""
    if plan.part_axes is not None:
        return as_part(gradient, plan.part_axes, plan.split.positions)
    axes = plan.split.width, plan.split.positions
    return sum_gradient(gradient, plan.width_dim, *axes).astype(dtype)


class _ChunkLosses(NamedTuple):
    """Holds the losses of a chunk of N positions, and what their gradient is made of."""

    sums_J: jax.Array  # over the positions of each of J masks
    hidden_ND: jax.Array  # with zeros at masked positions
    exps_NV: jax.Array  # of the logits less their maximum
    denominator_N1: jax.Array
    is_target_NV: jax.Array
    factor_N1: jax.Array  # 1, or 0 at masked positions, or NaN for a target outside [0, V)

    def grad_logits_NV(self) -> jax.Array:
        """Returns the gradient of the sum over the first mask's positions: softmax less target."""
        probs_NV = self.exps_NV / self.denominator_N1
        return (probs_NV - self.is_target_NV.astype(jnp.float32)) * self.factor_N1


def _chunk_losses(
    plan: _Plan, whole_w: jax.Array, hidden_ND: jax.Array, targets_N: jax.Array, masks_NJ: jax.Array
) -> _ChunkLosses:
    """Returns the losses of a chunk of positions, from the weight that is whole along D."""
    split, mask_N = plan.split, masks_NJ[:, 0]
    # Masked positions become zeros before anything multiplies them: 0 times NaN would be NaN, also
    # in the gradient of the weight.
    hidden_ND = jnp.where(mask_N[:, None], hidden_ND, 0)
    logits_NV = jnp.einsum(
        f"nd,{plan.dims.lower()}->nv", hidden_ND, whole_w, preferred_element_type=jnp.float32
    )
    size = logits_NV.shape[-1]

    # A comparison rather than a gather: it fuses, and it finds no target in other parts of V.
    is_target_NV = targets_N[:, None] == vocabulary.own_tokens(size, split)[None]
    target_logits_NV = jnp.where(is_target_NV, logits_NV, 0.0)
    maximum_N, denominator_N, target_logits_N = _sum_parts(logits_NV, target_logits_NV, split)
    exps_NV = jnp.exp(logits_NV - maximum_N[:, None])

    in_vocabulary_N = (targets_N >= 0) & (targets_N < vocabulary.num_tokens(size, split))
    factor_N = jnp.where(mask_N, jnp.where(in_vocabulary_N, 1.0, jnp.nan), 0.0)
    losses_N = (maximum_N + jnp.log(denominator_N) - target_logits_N) * factor_N
    sums_J = jnp.sum(jnp.where(masks_NJ, losses_N[:, None], 0.0), axis=0)
    return _ChunkLosses(
        sums_J, hidden_ND, exps_NV, denominator_N[:, None], is_target_NV, factor_N[:, None]
    )


def _sum_parts(
    logits_NV: jax.Array, target_logits_NV: jax.Array, split: vocabulary.Split
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `_softmax_sums` does, for all devices' parts of V together."""
    own_maximum_N, exp_sums_N, target_logits_N = jax.lax.platform_dependent(
        logits_NV, target_logits_NV, cuda=_softmax_sums_in_one_pass, default=_softmax_sums
    )
    maximum_N = vocabulary.max_over_vocabulary(own_maximum_N, split)
    exp_sums_N *= jnp.exp(own_maximum_N - maximum_N)
    denominator_N = sum_over(exp_sums_N, split.vocabulary)
    return maximum_N, denominator_N, sum_over(target_logits_N, split.vocabulary)


def _softmax_sums(
    logits_NV: jax.Array, target_logits_NV: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the maximum of the logits, the sum of exp(logit - maximum), and the target's logit.

    The maximum is a finite number even where all logits are minus infinity: other devices may have
    the rest of them.
    """
    maximum_N = jnp.max(logits_NV, axis=1, initial=_LOWEST)
    exps_NV = jnp.exp(logits_NV - maximum_N[:, None])
    return maximum_N, jnp.sum(exps_NV, axis=1), jnp.sum(target_logits_NV, axis=1)


def _softmax_sums_in_one_pass(
    logits_NV: jax.Array, target_logits_NV: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `_softmax_sums` does (Milakov & Gimelshein 2018, algorithm 3).

    A GPU reads the logits from its memory once, not three times. A CPU takes longer.
    """

    def add(
        a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Adds two parts, each of which has a maximum of its own."""
        is_larger = a[0] >= b[0]
        maximum = jnp.maximum(a[0], b[0])
        factor = jnp.exp(jnp.minimum(a[0], b[0]) - maximum)
        larger, smaller = jnp.where(is_larger, a[1], b[1]), jnp.where(is_larger, b[1], a[1])
        return maximum, larger + smaller * factor, a[2] + b[2]

    exps_NV = (logits_NV > -jnp.inf).astype(jnp.float32)  # of each logit less itself
    arrays = jnp.maximum(logits_NV, _LOWEST), exps_NV, target_logits_NV
    zero = jnp.float32(0)
    return jax.lax.reduce(arrays, (jnp.float32(_LOWEST), zero, zero), add, (1,))


def _sum_dtype(x: jax.Array) -> np.dtype:
    return np.promote_types(x.dtype, np.float32)


def _cut(
    plan: _Plan, hidden_BTD: jax.Array, targets_BT: jax.Array, masks_JBT: jax.Array
) -> tuple[jax.Array, ...]:
    """Cuts the time of each array into chunks, [number of chunks, B * chunk, ...].

    The chunks have nearly equal sizes, so that the last one needs little padding, which is masked.
    """
    length = targets_BT.shape[1]
    num_chunks = -(-length // plan.chunk)
    chunk = -(-length // num_chunks)
    padding = num_chunks * chunk - length

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return einops.rearrange(padded, "b (chunks c) ... -> chunks (b c) ...", c=chunk)

    return cut(hidden_BTD), cut(targets_BT), cut(jnp.moveaxis(masks_JBT, 0, -1))
