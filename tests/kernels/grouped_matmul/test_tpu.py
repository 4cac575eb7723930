"""The TPU kernels: what they visit, how they are cut, and their numbers, interpreted on a CPU."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from moe.config import RunConfig
from moe.kernels.grouped_matmul import Inputs, Shapes, choose
from moe.kernels.grouped_matmul.tpu import blocks, gradient, hidden, matmul, projections, swiglu
from moe.model.dispatch import Weights, dropless
from moe.scaling.communication import local_tokens
from tests.kernels.grouped_matmul.cases import Drawn, check_against_plain_jax, draw_case

# One tile and several, padded widths, and experts without rows.
SHAPES = [
    (Drawn(4, 256, 512, 9), 32),
    (Drawn(3, 192, 320, 7), 8),
    (Drawn(5, 100, 72, 6), 16),
    (Drawn(8, 384, 256, 13, "float32"), 16),
    (Drawn(2, 256, 128, 21, "float32"), 128),
]
# The seed makes the order of parallel grid points another than their own.
SIMULATION = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=4)


@pytest.fixture
def simulation():
    yield SIMULATION
    pltpu.reset_tpu_interpret_mode_state()  # an exception leaves its state behind


@pytest.fixture
def small_tiles(monkeypatch):
    """Leaves room for tiles of 128 columns, so that calls have several, and sums several calls."""
    monkeypatch.setattr(blocks, "VMEM_FOR_TILES", 650_000)
    monkeypatch.setattr(matmul, "FEWEST_COLUMNS", 1024)
    monkeypatch.setattr(gradient, "LARGEST_TILE", 128)


def test_visits_are_the_experts_blocks_and_one_for_each_expert_without_any():
    visits = gradient.plan_visits(jnp.array([1, 1, 3, 5, 5]), num_experts=5)
    # The last four steps do nothing.
    assert visits.experts.tolist() == [0, 1, 1, 2, 3, 4, 4, 4, 4, 4]
    assert visits.is_first.tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 0, 0]
    assert visits.has_rows.tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    has_rows = visits.has_rows == 1
    assert visits.blocks[has_rows].tolist() == [0, 1, 2]
    assert set(visits.blocks.tolist()) == {0, 1, 2}  # nothing else is fetched


def test_blocks_without_an_expert_fetch_nothing():
    block_map = blocks.map_blocks(jnp.array([0, 2, 4, 4]), num_experts=4)
    fetched = [int(blocks.used_block(g, block_map.num_used_1)) for g in range(4)]
    assert fetched == [0, 1, 1, 1]
    assert [int(blocks.block_expert(g, *block_map)) for g in range(4)] == [0, 2, 2, 2]
    none = blocks.map_blocks(jnp.array([4, 4]), num_experts=4)
    assert [int(blocks.block_expert(g, *none)) for g in range(2)] == [3, 3]


# D and F of OLMoE, Mixtral, Qwen3-30B-A3B and DeepSeek-V3.
WIDTHS = [(2048, 1024), (4096, 14_336), (2048, 768), (7168, 2048)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("dim", "width"), WIDTHS)
def test_tiles_divide_widths_and_are_wide(dim, width, dtype):
    enough = 512 if dtype == "bfloat16" else 128
    tiles = [
        choose_tile(256, dim, width, dtype)
        for choose_tile in (projections.choose_tile, hidden.choose_tile)
    ]
    for tile in tiles:
        assert width % tile == 0 and tile % 128 == 0 and tile >= min(width, enough)
    for num_terms in (1, 2):
        columns, size, calls = matmul.choose_tiling(num_terms, 256, width, dim, dtype)
        assert dim % columns == 0 and columns >= enough and width % size == 0
        assert (num_terms * width // size) % calls == 0
    tile_rows, tile_columns = gradient.choose_tile(dim, width)
    assert dim % tile_rows == 0 and width % tile_columns == 0
    assert (dim // tile_rows) * (width // tile_columns) >= 2
    # Each byte of the 16-bit operands that is fetched gives as many FLOPs.
    assert tile_rows * tile_columns / (tile_rows + tile_columns) > 430


def test_a_sum_is_cut_where_its_weights_would_leave_room_for_few_columns():
    assert matmul.choose_tiling(2, 256, 1024, 2048, "bfloat16") == (2048, 1024, 1)
    assert matmul.choose_tiling(1, 256, 14_336, 4096, "bfloat16") == (512, 7168, 2)


def test_rows_that_fit_no_vmem_are_refused():
    with pytest.raises(
        NotImplementedError, match="no room in VMEM for blocks of 256 rows of width 65536"
    ):
        projections.choose_tile(256, 65_536, 1024, "bfloat16")


def _loads(tokens: int, experts_per_token: int, num_experts: int, seed: int) -> np.ndarray:
    """Draws loads as a trained router's: each expert's share differs by a factor of up to 4."""
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0.5, 2.0, num_experts)
    return rng.multinomial(tokens * experts_per_token, shares / shares.sum())


plan_visits = jax.jit(gradient.plan_visits, static_argnums=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["moe_1b_7b", "moe_8x7b", "moe_30b_a3b", "moe_671b"])
def test_weight_gradients_waste_less_than_a_tenth(name, seed):
    """The blocks that the grid visits have at most 1.1 times the rows that were routed."""
    config = RunConfig.from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    moe, mesh = config.model.moe, config.mesh.resolve(1024 if name == "moe_671b" else 64)
    group = mesh.expert  # the devices whose tokens come to an expert
    tokens = local_tokens(config, dataclasses.asdict(mesh)) * group
    loads = _loads(tokens, moe.experts_per_token, moe.num_experts, seed)
    own = loads[: moe.num_experts // group]
    room = tokens * moe.experts_per_token // group
    if group > 1:
        room = round(room * moe.receive_factor)
    choice = choose("TPU v5", Shapes(room, len(own), "bfloat16"))
    assert choice.name == "tpu"
    blocks_E = -(-own // choice.block_rows)
    experts = np.repeat(np.arange(len(own)), blocks_E)
    # As many blocks without an expert as make the number of blocks the same for each draw.
    without = room // choice.block_rows + len(own) - len(experts)
    experts = np.append(experts, [len(own)] * without)
    visits = plan_visits(jnp.int32(experts), len(own))
    visited = int(visits.has_rows.sum()) * choice.block_rows
    waste = visited / own.sum()
    print(f"{name}: {own.mean():.0f} rows an expert, {choice.block_rows} a block, {waste:.3f}")
    assert waste <= 1.1


@pytest.mark.parametrize(("shapes", "block_rows"), [SHAPES[0], SHAPES[2], SHAPES[4]], ids=str)
def test_drawn_cases(shapes, block_rows):
    for seed in range(4):
        check_against_plain_jax("tpu", seed, shapes, block_rows)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("shapes", "block_rows"), SHAPES, ids=str)
def test_200_drawn_cases(shapes, block_rows):
    for seed in range(40):
        check_against_plain_jax("tpu", seed, shapes, block_rows)


SEVERAL_TILES = Drawn(3, 256, 512, 4, "float32")


def test_several_tiles_and_calls(small_tiles):
    assert matmul.choose_tiling(2, 16, 512, 256, "float32") == (256, 256, 4)
    assert projections.choose_tile(16, 256, 512, "float32") == 128
    for seed in (0, 3):
        check_against_plain_jax("tpu", seed, SEVERAL_TILES, block_rows=16)


@pytest.mark.slow
def test_memory_that_nothing_wrote_is_not_read_and_cores_do_not_race(
    simulation, small_tiles, capsys
):
    """Memory starts as NaN, and two cores share the grid. Tests of attention show what is seen."""

    def both_passes(interpret, inputs, weights_I, grad_y_ND):
        rows, gate_up = swiglu.forward(inputs, interpret=interpret)
        gradients = swiglu.backward(inputs, gate_up, weights_I, grad_y_ND, interpret=interpret)
        return rows, gate_up, *gradients

    # All loads have the same shapes, and go through the same two programs.
    simulated, interpreted = (
        jax.jit(functools.partial(both_passes, interpret)) for interpret in (simulation, True)
    )
    for seed in (0, 2, 3):
        case = draw_case(seed, SEVERAL_TILES, block_rows=16)
        *floats, tokens, experts = case.inputs
        inputs = Inputs(*map(jnp.float32, floats), jnp.int32(tokens), jnp.int32(experts))
        arguments = inputs, jnp.float32(case.weights_I), jnp.float32(case.grad_y_ND)
        values = [np.asarray(x) for x in simulated(*arguments)]
        assert "RACE" not in capsys.readouterr().out, f"seed {seed}"
        for value, expected in zip(values, interpreted(*arguments), strict=True):
            assert np.isfinite(value).all(), f"seed {seed}"  # NaN would equal NaN
            np.testing.assert_allclose(value, expected, atol=1e-5, err_msg=f"seed {seed}")


def _arrays():
    """Returns tokens, experts and weights of assignments, and the experts' weights."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.float32(0.5 * rng.normal(size=shape))
    experts = jnp.int32(rng.integers(0, 4, (12, 2)))
    return normal(12, 6), experts, normal(12, 2), normal(3, 6, 4), normal(3, 6, 4), normal(3, 4, 6)


def _loss(implementation, x, experts, combine, *weights):
    run = functools.partial(dropless, implementation=implementation, block_rows=8)
    return jnp.sum(jnp.sin(run(x, experts, combine, Weights(*weights)).y_ND))


def _in_vmap(function):
    return lambda x, experts, *rest: jax.vmap(lambda x, experts: function(x, experts, *rest))(
        jnp.stack([x, 2 * x]), jnp.stack([experts, experts[::-1]])
    )


def _in_shard_map_scan_and_remat(function):
    def scan(x, *rest):
        body = jax.checkpoint(lambda total, x: (total + 1, function(x, *rest)))
        return jax.lax.scan(body, 0, jnp.stack([x, 2 * x]))[1]

    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    split, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        scan,
        mesh=mesh,
        in_specs=(split, split, split, whole, whole, whole),
        out_specs=PartitionSpec(None, "data"),
        check_vma=False,
    )


@pytest.mark.parametrize("transform", [_in_vmap, _in_shard_map_scan_and_remat])
def test_transformations_change_nothing(transform):
    """Compares a loss's gradients with those of plain JAX."""
    results = []
    for name in ("tpu", "blockwise"):
        gradients = jax.grad(functools.partial(_loss, name), (0, 2, 3, 4, 5))
        results.append(jax.jit(transform(gradients))(*_arrays()))
    for value, expected in zip(*results, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max())
