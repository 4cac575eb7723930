"""Collects what layers need to know of a batch, once for all layers of a model."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from moe.config import ModelConfig
from moe.model.layers import rotary_angles

Batch = dict[str, jax.Array]


class Rotary(NamedTuple):
    """Holds the angles by which rotary positions turn queries and keys, H/2 for each token."""

    cos_BTH: jax.Array
    sin_BTH: jax.Array


class Memory(NamedTuple):
    """Holds an encoder's output, which the cross-attention of a decoder reads."""

    hidden_BSD: jax.Array
    segment_ids_BS: jax.Array  # 0 is padding


@struct.dataclass
class TokenInfo:
    """Holds what layers need to know of a batch's tokens beside their hidden states.

    A sparse layer reads the first three fields, and attention the others. A caller of `MoE`
    alone gives `TokenInfo(ids_BT, mask_BT)`, and `row_keys_B` as well if the layer has jitter.
    """

    ids_BT: jax.Array
    mask_BT: jax.Array  # False on padding
    row_keys_B: jax.Array | None = None  # keys of each row's random draws in this step
    positions_BT: jax.Array | None = None  # counted from the start of the token's document
    segment_ids_BT: jax.Array | None = None  # a token sees only its own segment
    rotary: Rotary | None = None
    memory: Memory | None = None  # what cross-attention reads; None in models without it
    # Whether every row starts at position 0, so that nothing comes before its tokens. This is
    # known while tracing: a batch without positions starts there.
    from_start: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def from_batch(cls, batch: Batch, config: ModelConfig) -> "TokenInfo":
        """Reads the fields `tokens`, `segment_ids`, `positions` and `row_keys` of a batch.

        Without `positions` every row starts at position 0. Without `segment_ids` each row is one
        document without padding.
        """
        ids_BT = batch["tokens"]
        every_position = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
        positions_BT = batch.get("positions", jnp.broadcast_to(every_position, ids_BT.shape))
        segment_ids_BT = batch.get("segment_ids", jnp.ones(ids_BT.shape, jnp.int32))
        angles_BTH = rotary_angles(positions_BT, config.head_dim, config.rope_base)
        return cls(
            ids_BT=ids_BT,
            mask_BT=segment_ids_BT > 0,
            row_keys_B=batch.get("row_keys"),
            positions_BT=positions_BT,
            segment_ids_BT=segment_ids_BT,
            rotary=Rotary(jnp.cos(angles_BTH), jnp.sin(angles_BTH)),
            from_start="positions" not in batch,
        )

    def for_layer(self, number: jax.Array) -> "TokenInfo":
        """Returns the same information with random keys that belong to one layer."""
        if self.row_keys_B is None:
            return self
        fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
        return dataclasses.replace(self, row_keys_B=fold(self.row_keys_B, number))
