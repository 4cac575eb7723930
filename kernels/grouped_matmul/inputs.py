"""Defines what the experts' grouped matmuls take and return.

Letters: N tokens, D model width, E experts, F feed-forward width, I rows, G blocks of rows. The
rows are sorted by expert. Each expert's rows fill whole blocks, so every block has one expert.
"""

from typing import NamedTuple

import jax


class Inputs(NamedTuple):
    """The tokens, the experts' weights, the token of each row, and the expert of each block."""

    x_ND: jax.Array
    w_gate_EDF: jax.Array
    w_up_EDF: jax.Array
    w_down_EFD: jax.Array
    tokens_I: jax.Array  # each row's token; N for a row that only fills up its block
    experts_G: jax.Array  # each block's expert, ascending; E for a block that no expert uses

    @property
    def num_experts(self) -> int:
        return self.w_gate_EDF.shape[0]

    @property
    def block_rows(self) -> int:
        """The number of rows in a block."""
        return self.tokens_I.size // self.experts_G.size


class Outputs(NamedTuple):
    """Each row's output, and what the backward pass needs of the forward pass."""

    rows_ID: jax.Array  # (silu(x w_gate) * (x w_up)) w_down
    gate_up: jax.Array  # x w_gate and x w_up side by side, [I, 2F]


class Gradients(NamedTuple):
    """The gradients of everything that `Inputs` holds in floating point, and of the rows' weights.

    The gradient of the tokens is given row by row: the sum over a token's rows is the caller's.
    """

    rows_ID: jax.Array
    w_gate_EDF: jax.Array
    w_up_EDF: jax.Array
    w_down_EFD: jax.Array
    weights_I: jax.Array
