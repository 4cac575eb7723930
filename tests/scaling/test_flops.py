"""Tests the counts of parameters against the model, and those of FLOPs against the compiler."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import DataConfig, ModelConfig, MoEConfig, RunConfig
from moe.kernels.attention import Choice
from moe.kernels.attention.inputs import visible_span
from moe.model import attention
from moe.model.transformer import Encoder, EncoderDecoder, Transformer
from moe.parameters import declarations, is_declared
from moe.scaling import flops
from moe.tasks import make_task
from tests.scaling.program_matmuls import matmul_flops
from tests.tiny import OTHER_TASKS

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


# A field that adds parameters has a case here.
@pytest.mark.parametrize("change", [{}, {"tied_embeddings": True}, {"qk_norm": True}], ids=str)
def test_parameters_equal_the_models(change):
    config = dataclasses.replace(CONFIG, **change)
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


def test_hand_worked_flops_of_an_encoder_and_a_decoder():
    """The decoder's row has 4 tokens, the encoder's 6, so 1.5 of these for each of those."""
    decoder = ModelConfig(
        vocab_size=256,
        num_layers=1,
        model_dim=2,
        feed_forward_dim=3,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
    )
    encoder = dataclasses.replace(decoder, feed_forward_dim=5)
    # An encoder's token multiplies 4 matrices of 2x2 for attention and 3 of 2x5, and sees 6 keys.
    of_encoder = 2 * (4 * 4 + 3 * 10) + 4 * 2 * 6
    # A decoder's token sees 2.5 keys of its own on average, and all 6 of the encoder's. It makes a
    # query and an output for these, whose keys and values each token of the encoder makes once.
    of_decoder = 2 * (4 * 4 + 3 * 6 + 2 * 256) + 4 * 2 * 2.5
    of_cross_attention = 2 * (2 * 4) + 1.5 * 2 * (2 * 4) + 4 * 2 * 6
    counts = flops.encoder_decoder_counts(decoder, encoder, 4, 6)
    assert flops.training_flops(counts) == 3 * (1.5 * of_encoder + of_decoder + of_cross_attention)
    assert flops.training_flops(flops.encoder_counts(encoder, 6)) == 3 * of_encoder


@pytest.mark.parametrize("kind", ["encoder", "encoder and decoder"])
def test_parameters_of_encoders_equal_the_models(kind):
    moe = dataclasses.replace(CONFIG, moe=MOE)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if kind == "encoder":
        model, counts = Encoder(moe), flops.encoder_counts(moe, 8)
    else:
        model, counts = EncoderDecoder(moe, CONFIG), flops.encoder_decoder_counts(moe, CONFIG, 8, 8)
    batch = {"tokens": tokens, "encoder_tokens": tokens}
    leaves = jax.tree.leaves(declarations(model, batch), is_leaf=is_declared)
    assert sum(count.parameters for count in counts) == sum(leaf.value.size for leaf in leaves)


# An expert has exactly the room of its even share, so that all experts together compute as many
# rows as are counted. The rows of "dropless" have padding, whose number depends on the routing.
EVEN = dataclasses.replace(
    MOE, dispatch="capacity", capacity_factor=1.0, num_shared_experts=1, first_dense_layers=1
)
LENGTH = 32
PROGRAMS = {
    "dense": {},
    "one head for all queries": {"num_kv_heads": 1},
    "a head for each query": {"num_kv_heads": 4},
    "tied": {"tied_embeddings": True},
    "capacity": {"moe": EVEN},
    "every expert": {"moe": dataclasses.replace(EVEN, dispatch="dense", experts_per_token=8)},
}


@pytest.fixture
def reference_attention(monkeypatch):
    """Attention that computes the scores of all keys, also of those that the mask hides."""
    monkeypatch.setattr(attention, "choose_implementation", lambda *_, **__: Choice("reference"))


def program_flops(model, batch):
    """Returns the FLOPs of the matmuls that make logits, and of those that make gradients."""
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)

    def forward(variables):
        hidden = model.apply(variables, batch).hidden
        if isinstance(model, Encoder) and not model.makes_logits:
            return hidden.sum()
        return model.apply(variables, hidden, method="unembed").sum()

    return [
        matmul_flops(jax.make_jaxpr(run)(variables).jaxpr) for run in (forward, jax.grad(forward))
    ]


def router_sums(config):
    """Returns the FLOPs of the matmuls that are in a program beside the model's own.

    A router sums each expert's probabilities over the tokens of the row, and multiplies them with
    the expert's loads. With "dense", each token's outputs of all experts are summed.
    """
    sparse, experts = len(config.sparse_layers), config.moe.num_experts
    combined = sparse * 2 * LENGTH * experts * config.model_dim
    statistics = sparse * 2 * experts * (LENGTH + 1)
    return statistics, combined if config.moe.dispatch == "dense" and sparse else 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_flops_equal_the_matmuls_of_the_unrolled_program(name, reference_attention):
    config = dataclasses.replace(CONFIG, scan_layers=False, **PROGRAMS[name])
    batch = {"tokens": np.zeros((1, LENGTH), np.int32)}
    forward, training = program_flops(Transformer(config), batch)
    counts = flops.component_counts(config, LENGTH, mask="none")
    statistics, combined = router_sums(config)
    model = LENGTH * flops.training_flops(counts) / 3
    assert forward == model + statistics + combined
    # The reference computes the scores once more in the backward pass.
    scores = LENGTH * config.num_layers * 2 * config.num_heads * config.head_dim * LENGTH
    assert training == 3 * model + scores + statistics + 3 * combined


def test_flops_equal_the_matmuls_of_encoders(reference_attention):
    """With expert choice an expert takes 0.75 * 2 / 8 of the tokens, 1.5 experts for each token."""
    moe = MoEConfig(
        num_experts=8, expert_dim=40, router="expert_choice", dispatch="capacity",
        capacity_factor=0.75,
    )  # fmt: skip
    encoder = dataclasses.replace(CONFIG, scan_layers=False, moe=moe)
    decoder = dataclasses.replace(CONFIG, scan_layers=False, num_kv_heads=4, num_layers=2)
    batch = {"tokens": np.zeros((1, LENGTH), np.int32)}
    counts = flops.encoder_counts(encoder, LENGTH)
    statistics = router_sums(encoder)[0]
    assert (
        program_flops(Encoder(encoder), batch)[0]
        == LENGTH * flops.training_flops(counts) / 3 + statistics
    )
    assert "1.5 active" in next(count.shapes for count in counts if count.name == "experts")
    batch |= {"tokens": np.zeros((1, 24), np.int32), "encoder_tokens": batch["tokens"]}
    counts = flops.encoder_decoder_counts(decoder, encoder, 24, LENGTH, mask="none")
    assert program_flops(EncoderDecoder(decoder, encoder), batch)[0] == pytest.approx(
        24 * flops.training_flops(counts) / 3 + statistics, rel=1e-12
    )


def multiply_visible(q_BTNH, k_BSKH, v_BSKH, *, causal, window=None, **_):
    """Stands in for attention, with the FLOPs of the keys that the call's mask shows."""
    (rows, queries, heads, width), keys = q_BTNH.shape, k_BSKH.shape[1]
    left, right = visible_span(causal, window)
    distance = np.arange(keys) - np.arange(queries)[:, None]
    is_seen = (distance >= -(keys if left is None else left)) & (
        distance <= (keys if right is None else right)
    )
    # The scores and the sums: 2H FLOPs each, for each head and visible key.
    product = jnp.ones((rows * int(is_seen.sum()), heads)) @ jnp.ones((heads, 2 * width))
    return q_BTNH + jnp.sum(product).astype(q_BTNH.dtype)


# A field that changes which keys a token sees has a case here.
@pytest.mark.parametrize(
    ("task", "change"),
    [(task, {}) for task in ("language_modelling", *OTHER_TASKS)]
    + [("span_corruption", {"qk_norm": True})],
)
def test_flops_of_a_run_equal_the_matmuls_of_its_model(task, change, monkeypatch):
    """The keys that a token sees are those of the calls that the model makes."""
    monkeypatch.setattr(attention, "flash_attention", multiply_visible)
    config = RunConfig(
        task=task,
        model=dataclasses.replace(CONFIG, scan_layers=False, **change),
        data=DataConfig(sequence_length=LENGTH),
    )
    made = make_task(config)
    batch = {name: row[:1] for name, row in made.random_rows(config, 1).items()}
    forward, _ = program_flops(made.model(config.model), batch)
    assert LENGTH * made.training_flops(config) / 3 == pytest.approx(forward, rel=1e-12)
    leaves = jax.tree.leaves(
        declarations(made.model(config.model), made.init_batch), is_leaf=is_declared
    )
    assert flops.run_parameters(config) == sum(leaf.value.size for leaf in leaves)
    assert flops.planned_flops(config) == pytest.approx(
        1000 * 16 * LENGTH * made.training_flops(config)
    )


def test_matmuls_that_run_an_unknown_number_of_times_are_not_counted():
    def body(carry):
        return carry @ carry

    x = jnp.zeros((2, 2))
    scanned = lambda x: jax.lax.scan(lambda c, _: (body(c), None), x, length=3)
    assert matmul_flops(jax.make_jaxpr(scanned)(x).jaxpr) == 3 * 16
    loop = lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, body, x)
    with pytest.raises(ValueError, match="while run an unknown number of times"):
        matmul_flops(jax.make_jaxpr(loop)(x).jaxpr)


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
