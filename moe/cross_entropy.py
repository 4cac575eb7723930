"""Computes the cross-entropy of a large vocabulary, whose logits never exist as a whole.

The data passes through once, on each device's own positions:

    weight  -> gathered along D, in the dtype of the hidden states
    hidden  -> logits of a chunk of positions -> their sum of losses
                 |  and where a gradient is taken, in the same pass:
                 v
               gradient of the logits -> gradient of the hidden states
                                      -> added to the gradient of the weight
    gradient of the weight -> summed over the devices, split as the weight is

The loss is the end of a model, so its own gradient is a number: the backward pass multiplies by it.
So no logits are made twice, as they would be if the backward pass had to make them again.
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
from moe.parallel.collectives.weights import sum_gradient
from moe.parallel.mesh import on_auto_axes, per_shard


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
    weight, dims, companion = unembedding
    if not targets_BT.size:
        return tuple(jnp.zeros((), jnp.float32) for _ in range(1 + len(parts_BT)))
    masks_PBT = jnp.stack([mask_BT, *(mask_BT & part_BT for part_BT in parts_BT)])
    targets_BT = jnp.asarray(targets_BT).astype(jnp.int32)
    split = vocabulary.split_of(hidden_BTD, weight, dims)
    plan = _Plan(dims, chunk, split, None if companion is None else part_axes())
    # jax.custom_vjp hides the types of its function from a type checker.
    total, parts = cast(
        "tuple[jax.Array, jax.Array]",
        _sums(plan, companion, hidden_BTD, weight, targets_BT, masks_PBT),
    )
    return total, *jax.lax.stop_gradient(parts)


class _Plan(NamedTuple):
    """Holds what is static."""

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
def _sums(
    plan: _Plan,
    companion: jax.Array | None,
    hidden_BTD: jax.Array,
    weight: jax.Array,
    targets_BT: jax.Array,
    masks_PBT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum over the first mask's positions, and those over the other masks'."""
    run = functools.partial(_sum_shard, plan)
    in_dims = ("BTD", plan.dims, "BT", "-BT")
    (sums_P,) = per_shard(run, in_dims, ("-",), hidden_BTD, weight, targets_BT, masks_PBT)
    return sums_P[0], sums_P[1:]


def _sums_forward(
    plan: _Plan, companion: jax.Array | None, *arrays: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    run = functools.partial(_differentiate_shard, plan)
    hidden_dims = "BtD" if plan.split.splits_time else "BTD"
    in_dims, out_dims = ("BTD", plan.dims, "BT", "-BT"), ("-", hidden_dims, plan.gradient_dims)
    sums_P, *gradients = per_shard(run, in_dims, out_dims, *arrays)
    return (sums_P[0], sums_P[1:]), tuple(gradients)


def _sums_backward(
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


_sums.defvjp(_sums_forward, _sums_backward)


def _sum_shard(
    plan: _Plan,
    hidden_BTD: jax.Array,
    weight: jax.Array,
    targets_BT: jax.Array,
    masks_PBT: jax.Array,
) -> tuple[jax.Array]:
    """Returns the sums of a device's positions, added up over all devices."""
    whole = vocabulary.gather_width(weight.astype(hidden_BTD.dtype), plan.width_dim, plan.split)

    def add_chunk(sums_P: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return sums_P + _chunk_losses(plan, whole, *arrays).sums_P, None

    zeros_P = jnp.zeros(masks_PBT.shape[0], jnp.float32)
    sums_P, _ = jax.lax.scan(add_chunk, zeros_P, _cut(plan, hidden_BTD, targets_BT, masks_PBT))
    return (vocabulary.sum_over_positions(sums_P, plan.split),)


def _differentiate_shard(
    plan: _Plan,
    hidden_BTD: jax.Array,
    weight: jax.Array,
    targets_BT: jax.Array,
    masks_PBT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `_sum_shard` does, and the total's gradients of hidden states and weight."""
    whole = vocabulary.gather_width(weight.astype(hidden_BTD.dtype), plan.width_dim, plan.split)
    letters = plan.dims.lower()

    def add_chunk(
        carry: tuple[jax.Array, jax.Array], arrays: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        sums_P, grad_weight = carry
        losses = _chunk_losses(plan, whole, *arrays)
        grad_logits = losses.grad_logits_BTV().astype(hidden_BTD.dtype)
        grad_hidden = jnp.einsum(f"btv,{letters}->btd", grad_logits, whole)
        # The operand with the weight's first dimension comes first, so that the product need not
        # be transposed.
        pair = [(losses.hidden_BTD, "btd"), (grad_logits, "btv")]
        (left, left_dims), (right, right_dims) = pair if letters == "dv" else pair[::-1]
        grad_weight += jnp.einsum(
            f"{left_dims},{right_dims}->{letters}",
            left,
            right,
            preferred_element_type=grad_weight.dtype,
        )
        return (sums_P + losses.sums_P, grad_weight), grad_hidden

    zeros = jnp.zeros(masks_PBT.shape[0], jnp.float32), jnp.zeros(whole.shape, _sum_dtype(weight))
    chunks = _cut(plan, hidden_BTD, targets_BT, masks_PBT)
    (sums_P, grad_weight), grads_hidden = jax.lax.scan(add_chunk, zeros, chunks)
    grad_hidden_BTD = einops.rearrange(grads_hidden, "n b c d -> b (n c) d")
    return (
        vocabulary.sum_over_positions(sums_P, plan.split),
        vocabulary.sum_hidden(grad_hidden_BTD[:, : hidden_BTD.shape[1]], plan.split),
        _sum_weight_gradient(plan, grad_weight, weight.dtype),
    )


def _sum_weight_gradient(plan: _Plan, gradient: jax.Array, dtype: np.dtype) -> jax.Array:
    """Sums the devices' gradients of the weight. Of a shared weight each keeps its own part."""
    if plan.part_axes is not None:
        return as_part(gradient, plan.part_axes, plan.split.positions)
    axes = plan.split.width, plan.split.positions
    return sum_gradient(gradient, plan.width_dim, *axes).astype(dtype)


class _ChunkLosses(NamedTuple):
    """Holds the losses of a chunk, and what their gradient is made of."""

    sums_P: jax.Array  # over the positions of each mask
    hidden_BTD: jax.Array  # with zeros at masked positions
    exps_BTV: jax.Array  # of the logits less their maximum
    denominator_BT1: jax.Array
    is_target_BTV: jax.Array
    factor_BT1: jax.Array  # 1, or 0 at masked positions, or NaN for a target outside [0, V)

    def grad_logits_BTV(self) -> jax.Array:
        """Returns the gradient of the sum over the first mask's positions: softmax less target."""
        probs_BTV = self.exps_BTV / self.denominator_BT1
        return (probs_BTV - self.is_target_BTV.astype(jnp.float32)) * self.factor_BT1


def _chunk_losses(
    plan: _Plan,
    whole: jax.Array,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    masks_BTP: jax.Array,
) -> _ChunkLosses:
    """Returns the losses of a chunk of positions, from the weight that is whole along D."""
    split, mask_BT = plan.split, masks_BTP[..., 0]
    # Masked positions become zeros before anything multiplies them: 0 times NaN would be NaN, also
    # in the gradient of the weight.
    hidden_BTD = jnp.where(mask_BT[..., None], hidden_BTD, 0)
    logits_BTV = jnp.einsum(
        f"btd,{plan.dims.lower()}->btv", hidden_BTD, whole, preferred_element_type=jnp.float32
    )
    size = logits_BTV.shape[-1]

    maximum_BT = vocabulary.max_over_vocabulary(jnp.max(logits_BTV, axis=-1), split)
    exps_BTV = jnp.exp(logits_BTV - maximum_BT[..., None])
    denominator_BT = vocabulary.sum_over_vocabulary(jnp.sum(exps_BTV, axis=-1), split)

    # A comparison rather than a gather: it fuses, and it finds no target in other parts of V.
    is_target_BTV = targets_BT[..., None] == vocabulary.own_tokens(size, split)[None, None]
    target_logits_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    target_logits_BT = vocabulary.sum_over_vocabulary(target_logits_BT, split)

    in_vocabulary_BT = (targets_BT >= 0) & (targets_BT < vocabulary.num_tokens(size, split))
    factor_BT = jnp.where(mask_BT, jnp.where(in_vocabulary_BT, 1.0, jnp.nan), 0.0)
    losses_BT = (maximum_BT + jnp.log(denominator_BT) - target_logits_BT) * factor_BT
    sums_P = jnp.sum(jnp.where(masks_BTP, losses_BT[..., None], 0.0), axis=(0, 1))
    return _ChunkLosses(
        sums_P,
        hidden_BTD,
        exps_BTV,
        denominator_BT[..., None],
        is_target_BTV,
        factor_BT[..., None],
    )


def _sum_dtype(x: jax.Array) -> np.dtype:
    return np.promote_types(x.dtype, np.float32)


def _cut(
    plan: _Plan, hidden_BTD: jax.Array, targets_BT: jax.Array, masks_PBT: jax.Array
) -> tuple[jax.Array, ...]:
    """Cuts the time of each array into chunks, [number of chunks, B, chunk, ...].

    The chunks have nearly equal sizes, so that the last one needs little padding, which is masked.
    """
    length = targets_BT.shape[1]
    num_chunks = -(-length // plan.chunk)
    chunk = -(-length // num_chunks)
    padding = num_chunks * chunk - length

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return einops.rearrange(padded, "b (n c) ... -> n b c ...", c=chunk)

    return cut(hidden_BTD), cut(targets_BT), cut(jnp.moveaxis(masks_PBT, 0, -1))
