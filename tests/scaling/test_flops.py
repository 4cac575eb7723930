"""Tests the counts of parameters against the model, and those of FLOPs against the compiler."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from moe.config import ModelConfig, MoEConfig
from moe.model.transformer import Transformer
from moe.parameters import declarations, is_declared
from moe.scaling import flops

CONFIG = ModelConfig(
    vocab_size=512,
    num_layers=3,
    model_dim=64,
    feed_forward_dim=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
)
MOE = MoEConfig(num_experts=8, experts_per_token=2, expert_dim=40)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_equal_the_models(tied):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    leaves = jax.tree.leaves(declarations(Transformer(config)), is_leaf=is_declared)
    assert (
        flops.total_parameters(config)
        == flops.active_parameters(config)
        == sum(leaf.value.size for leaf in leaves)
    )
    embeddings = sum(
        leaf.value.size for leaf in leaves if leaf.kind in ("embedding", "unembedding")
    )
    assert flops.embedding_parameters(config) == embeddings


@pytest.mark.parametrize(
    ("num_layers", "changes", "sparse"),
    [
        (3, {}, 3),
        (3, {"num_shared_experts": 2}, 3),
        (3, {"router": "hash"}, 3),
        (5, {"first_dense_layers": 2}, 3),
        (6, {"layer_period": 2}, 3),
        (7, {"first_dense_layers": 1, "layer_period": 4, "num_shared_experts": 1}, 1),
        (
            3,
            {
                "router": "sigmoid",
                "bias_update_rate": 0.001,
                "num_groups": 4,
                "groups_per_token": 2,
                "first_dense_layers": 1,
            },
            2,
        ),
    ],
)
def test_parameters_of_sparse_layers_equal_the_models(num_layers, changes, sparse):
    config = dataclasses.replace(
        CONFIG, num_layers=num_layers, moe=dataclasses.replace(MOE, **changes)
    )
    leaves = jax.tree.leaves(declarations(Transformer(config)), is_leaf=is_declared)
    assert flops.total_parameters(config) == sum(leaf.value.size for leaf in leaves)
    experts = [leaf.value for leaf in leaves if leaf.dims.lstrip("L") in ("EDF", "EFD")]
    assert sum(math.prod(value.shape[:-3]) for value in experts) == 3 * sparse
    # A token reads 2 of 8 experts, and all parameters that do not belong to an expert.
    unread = sum(value.size for value in experts) * 6 // 8
    assert flops.active_parameters(config) == flops.total_parameters(config) - unread


def test_a_table_lists_what_a_model_has():
    names = [count.name for count in flops.component_counts(CONFIG, 1)]
    assert names == [
        "embedding",
        "attention projections",
        "attention scores and sums",
        "feed-forward",
        "norms",
        "unembedding",
    ]
    hashed = dataclasses.replace(
        CONFIG, moe=dataclasses.replace(MOE, router="hash", first_dense_layers=1)
    )
    assert [count.name for count in flops.component_counts(hashed, 1)][3:5] == [
        "feed-forward",
        "experts",
    ]
    shared = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, num_shared_experts=1))
    counts = {count.name: count for count in flops.component_counts(shared, 1)}
    assert "feed-forward" not in counts
    assert [counts[name].repeats for name in ("router", "experts", "shared experts")] == [3, 3, 3]


def test_hand_worked_flops_of_a_sparse_layer():
    moe = MoEConfig(
        num_experts=4, experts_per_token=3, expert_dim=5, num_shared_experts=2, first_dense_layers=1
    )
    config = ModelConfig(
        vocab_size=256,
        num_layers=2,
        model_dim=2,
        feed_forward_dim=7,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        moe=moe,
    )
    attention, row_of_one = 2 * 4 * (2 * 2), 2 * 3 * 4 * 2
    dense = 3 * 2 * 7
    sparse = 2 * 4 + 3 * (3 * 2 * 5) + 3 * 2 * 10  # router, 3 experts, shared experts of width 10
    assert (
        flops.training_flops_per_token(config, 1)
        == 6 * (attention + dense + sparse + 2 * 256) + row_of_one
    )


def test_hand_worked_flops():
    config = ModelConfig(
        vocab_size=256,
        num_layers=1,
        model_dim=2,
        feed_forward_dim=3,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
    )
    # Per token: projections 4 matrices of 2x2, feed-forward 3 of 2x3, unembedding 2x256; 2 FLOPs
    # each, times 3 with the backward pass.
    matmuls = 6 * (4 * 4 + 3 * 6 + 2 * 256)
    # A row of 3: tokens see 1, 2 and 3 keys, 2 on average; 4 FLOPs per key and head dimension,
    # times 3.
    attention = 3 * 4 * 2 * 2
    assert flops.training_flops_per_token(config, 3) == matmuls + attention


# Every token uses every expert, which the dense dispatch computes at once. The compiler would count
# the body of a loop over blocks of rows only once.
ALL_EXPERTS = MoEConfig(
    num_experts=8,
    experts_per_token=8,
    expert_dim=40,
    num_shared_experts=1,
    first_dense_layers=1,
    dispatch="dense",
)


@pytest.mark.parametrize("moe", [MoEConfig(), ALL_EXPERTS])
def test_forward_flops_equal_the_compilers(moe):
    config = dataclasses.replace(
        CONFIG, num_layers=2, scan_layers=False, compute_dtype="float32", num_kv_heads=4, moe=moe
    )
    length, model = 64, Transformer(config)
    variables = jax.eval_shape(
        model.init, jax.random.key(0), {"tokens": jnp.zeros((1, length), jnp.int32)}
    )

    def forward(variables, tokens):
        return model.apply(
            variables, model.apply(variables, {"tokens": tokens}).hidden, method="unembed"
        )

    compiled = (
        jax.jit(forward).lower(variables, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
    )
    # XLA's attention computes the scores of all keys, not only of half of them. Elementwise
    # operations are the few percent that remain.
    mixing = sum(
        count.forward_flops
        for count in flops.component_counts(config, length)
        if "scores" in count.name
    )
    counted = length * flops.training_flops_per_token(config, length) / 3
    full = counted + length * mixing * (2 * length / (length + 1) - 1)
    assert full <= compiled.cost_analysis()["flops"] <= 1.1 * full
