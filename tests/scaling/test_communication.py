"""Compares the least that a step must send with cases worked by hand."""

import dataclasses

from moe.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from moe.scaling.communication import Collective, least_collectives

DENSE = ModelConfig(
    vocab_size=256,
    num_layers=3,
    model_dim=16,
    feed_forward_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
MOE = MoEConfig(num_experts=8, experts_per_token=2, expert_dim=12, exchange="ragged_all_to_all")
ATTENTION = 16 * (4 + 2 + 2 + 4) * 8  # the weights of a layer's attention
FEED_FORWARD = 3 * 16 * 32


def run_config(model, mesh, length=32, **train):
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=length),
        train=TrainConfig(**{"batch_size": 16, "accumulation": 2, **train}),
        mesh=mesh,
    )


def least(model, mesh, length=32):
    """Returns the collectives of a step by (kind, axes, what)."""
    found = least_collectives(run_config(model, mesh, length), mesh)
    assert list(found) == sorted(found, key=lambda collective: -collective.bytes)
    return {(c.kind, c.axes, c.what): c for c in found}


def test_fsdp_gathers_weights_twice_and_scatters_gradients_once_a_microbatch():
    """Two microbatches, three layers, four devices: each sends three quarters of the whole."""
    found = least(DENSE, MeshConfig(data=1, fsdp=4))
    fsdp = ("fsdp",)
    expected = {
        ("all-gather", "feed-forward: weights"): (2 * 2 * 3 * 2 * FEED_FORWARD, 2 * 2 * 9),
        ("reduce-scatter", "feed-forward: gradients"): (2 * 3 * 4 * FEED_FORWARD, 2 * 9),
        ("all-gather", "attention: weights"): (2 * 2 * 3 * 2 * ATTENTION, 2 * 2 * 12),
        ("reduce-scatter", "attention: gradients"): (2 * 3 * 4 * ATTENTION, 2 * 12),
        ("all-gather", "unembedding: weights"): (2 * 2 * 256 * 16, 2),
        ("reduce-scatter", "unembedding: gradients"): (2 * 4 * 256 * 16, 2),
        ("all-gather", "embedding: weights"): (2 * 2 * 256 * 16, 2),
        ("reduce-scatter", "embedding: gradients"): (2 * 4 * 256 * 16, 2),
        ("all-gather", "norms: weights"): (2 * 2 * 7 * 4 * 16, 2 * 2 * 7),
        ("reduce-scatter", "norms: gradients"): (2 * 7 * 4 * 16, 2 * 7),
    }
    assert found == {
        (kind, fsdp, what): Collective(kind, fsdp, what, size * 3 / 4, count)
        for (kind, what), (size, count) in expected.items()
    }


def test_replicas_add_up_their_gradients_once_a_step():
    """Each of two replicas sends half of a sum there, and half of the result back."""
    found = least(DENSE, MeshConfig(data=2, fsdp=2))
    key = ("all-reduce", ("data",), "attention: gradients")
    assert found[key].bytes == 2 * (1 / 2) * 4 * 3 * ATTENTION / 2
    assert found[key].count == 3 * 4


def test_expert_rows_travel_four_times_and_five_times_under_full_remat():
    """A device has 16 rows in 2 microbatches over 4 devices, of 32 tokens with 2 experts each."""
    mesh = MeshConfig(data=1, expert=4)
    sparse = dataclasses.replace(DENSE, moe=MOE)
    key = ("all-to-all", ("expert",), "expert rows")
    rows = 2 * 32 * 2 * 16 * 2  # rows, tokens, experts, width and bytes
    found = least(sparse, mesh)
    assert found[key].bytes == 2 * 3 * 4 * rows * 3 / 4
    assert found[key].count == 2 * 3 * 4
    remat = least(dataclasses.replace(sparse, remat="full"), mesh)
    assert remat[key].bytes == 2 * 3 * 5 * rows * 3 / 4
    # The experts' own weights stay where they are, and all others are split over the axis.
    assert not [what for _, _, what in found if what.startswith("experts")]
    assert ("all-gather", ("expert",), "attention: weights") in found


def test_gathered_tokens_are_scattered_back():
    """All 2 x 32 x 4 tokens of a microbatch are shown to every device: A plays no part."""
    gather = dataclasses.replace(MOE, exchange="all_gather")
    found = least(dataclasses.replace(DENSE, moe=gather), MeshConfig(data=1, expert=4))
    sent = 2 * 3 * 2 * (4 * 2 * 32 * 16 * 2) * 3 / 4
    for kind in ("all-gather", "reduce-scatter"):
        assert found[kind, ("expert",), "expert rows"].bytes == sent


def test_tensor_parallelism_scatters_and_gathers_four_times_a_layer():
    """The rows of 4 fsdp devices are 2 in a microbatch; six gathers a layer under full remat."""
    mesh = MeshConfig(data=1, fsdp=4, tensor=2)
    scatter, gather = (
        (kind, ("tensor",), "activations") for kind in ("reduce-scatter", "all-gather")
    )
    stream = 2 * (2 * 32) * 16
    found = least(DENSE, mesh)
    assert found[scatter].bytes == found[gather].bytes == 2 * (4 * 3 + 2) * stream / 2
    remat = least(dataclasses.replace(DENSE, remat="full"), mesh)
    assert remat[scatter] == found[scatter]
    assert remat[gather].bytes == 2 * (6 * 3 + 2) * stream / 2
    assert remat[gather].count == 2 * (6 * 3 + 2)
    # The tensor axis splits a weight, and the rest of it is gathered.
    weights = least(DENSE, mesh)["all-gather", ("fsdp",), "feed-forward: weights"]
    assert weights.bytes == 2 * 2 * 3 * 2 * FEED_FORWARD / 2 * 3 / 4


def test_tokens_that_the_tensor_axis_cannot_split_are_added_up_for_all_devices():
    """Two devices, and 33 tokens in each of 2 rows: a sum sends each half there and back."""
    mesh = MeshConfig(data=1, fsdp=4, tensor=2)
    key = ("all-reduce", ("tensor",), "activations")
    stream = 2 * (2 * 33) * 16
    assert least(DENSE, mesh, length=33)[key].bytes == 2 * (4 * 3 + 2) * 2 * stream / 2
    remat = dataclasses.replace(DENSE, remat="full")
    assert least(remat, mesh, length=33)[key].bytes == 2 * (5 * 3 + 2) * 2 * stream / 2


def test_a_ring_sends_keys_and_values_to_all_others():
    """Each device holds 8 rows of 8 tokens. Keys and values go round twice, gradients once."""
    mesh = MeshConfig(data=1, context=4)
    found = least(DENSE, mesh)
    block = 2 * (8 * 8) * 2 * 8
    ring = found["collective-permute", ("context",), "keys, values"]
    assert ring.bytes == 2 * 3 * 3 * (2 * 2 + 4) * block
    assert ring.count == 2 * 3 * 3 * 3
    ulysses = dataclasses.replace(DENSE, attention=AttentionConfig(context_parallelism="ulysses"))
    heads = least(ulysses, mesh)["all-to-all", ("context",), "attention heads"]
    assert heads.bytes == 2 * 3 * 2 * (2 * (8 * 8) * (4 + 2) * 8 * 2) * 3 / 4


def test_one_device_sends_nothing():
    assert least(DENSE, MeshConfig(data=1)) == {}


def test_stages_of_a_pipeline_hand_on_the_stream_and_share_the_rest():
    """Two stages of two layers, 4 microbatches of 4 rows, and fsdp=2: there are 5 ticks.

    Ring and belt move after each tick and once more, forward and backward. Each stage applies its
    layers at each tick, and all others once.
    """
    model, mesh = dataclasses.replace(DENSE, num_layers=4), MeshConfig(data=1, pipeline=2, fsdp=2)
    config = run_config(model, mesh, accumulation=4)
    found = {(c.kind, c.axes, c.what): c for c in least_collectives(config, mesh)}
    axes, moves = ("pipeline",), 2 * 2 * 6
    size = moves * 2 * 2 * 32 * 16  # bfloat16, of 2 rows on each of the fsdp axis's devices
    assert found.pop(("collective-permute", axes, "ring and belt")) == Collective(
        "collective-permute", axes, "ring and belt", size, moves
    )
    assert found["all-gather", ("fsdp",), "attention: weights"] == Collective(
        "all-gather", ("fsdp",), "attention: weights", 5 * 2 * 2 * 2 * ATTENTION / 2, 5 * 2 * 2 * 4
    )
    assert found["all-gather", ("fsdp",), "embedding: weights"].count == 1
    # What all stages hold, of which a device has half, is added up over them.
    assert {what for _, used, what in found if used == axes} == {
        "embedding: gradients",
        "unembedding: gradients",
        "norms: gradients",
    }
    embedding = found["all-reduce", axes, "embedding: gradients"]
    assert embedding.bytes == 2 * 4 * 256 * 16 / 2 / 2


def test_the_circular_schedule_exchanges_weights_and_gradients_once():
    """Half of what a stage computes with is stored on the other stage's devices."""
    model, mesh = dataclasses.replace(DENSE, num_layers=4), MeshConfig(data=1, pipeline=2)
    config = run_config(model, mesh, accumulation=4, pipeline_rounds=2)
    found = {(c.kind, c.what): c for c in least_collectives(config, mesh)}
    exchange = found["all-to-all", "attention: weights, gradients"]
    assert exchange.bytes == 2 * ATTENTION * (2 + 4) / 2
    assert found["collective-permute", "ring and belt"].count == 2 * 2 * (9 + 1)
