"""Counts of parameters against the model's own, and of FLOPs against the compiler's."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moe.config import ModelConfig
from moe.parameters import declarations, is_declared
from moe.scaling import flops
from moe.transformer import Transformer

CONFIG = ModelConfig(vocab_size=512, num_layers=3, model_dim=64, feed_forward_dim=96, num_heads=4, num_kv_heads=2, head_dim=24)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_equal_the_models(tied):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    leaves = jax.tree.leaves(declarations(Transformer(config)), is_leaf=is_declared)
    assert flops.total_parameters(config) == flops.active_parameters(config) == sum(leaf.value.size for leaf in leaves)
    embeddings = sum(leaf.value.size for leaf in leaves if leaf.kind in ("embedding", "unembedding"))
    assert flops.embedding_parameters(config) == embeddings


def test_hand_worked_flops():
    config = ModelConfig(vocab_size=256, num_layers=1, model_dim=2, feed_forward_dim=3, num_heads=1, num_kv_heads=1, head_dim=2)
    # Per token: projections 4 matrices of 2x2, feed-forward 3 of 2x3, unembedding 2x256; 2 FLOPs each, times 3 with the backward pass.
    matmuls = 6 * (4 * 4 + 3 * 6 + 2 * 256)
    # A row of 3: tokens see 1, 2 and 3 keys, 2 on average; 4 FLOPs per key and head dimension, times 3.
    attention = 3 * 4 * 2 * 2
    assert flops.training_flops_per_token(config, 3) == matmuls + attention


def test_forward_flops_equal_the_compilers():
    config = dataclasses.replace(CONFIG, num_layers=2, scan_layers=False, compute_dtype="float32", num_kv_heads=4)
    length, model = 64, Transformer(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), {"tokens": jnp.zeros((1, length), jnp.int32)})

    def forward(variables, tokens):
        return model.apply(variables, model.apply(variables, {"tokens": tokens}).hidden, method="unembed")

    compiled = jax.jit(forward).lower(variables, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
    # XLA's attention computes every key, not half of them; elementwise operations are the few percent left.
    mixing = sum(count.forward_flops for count in flops.component_counts(config, length) if "scores" in count.name)
    counted = length * flops.training_flops_per_token(config, length) / 3
    full = counted + length * mixing * (2 * length / (length + 1) - 1)
    assert full <= compiled.cost_analysis()["flops"] <= 1.1 * full
