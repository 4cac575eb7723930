"""Dispatch strategies against a plain loop over tokens and experts, exchanges against one device.

Property tests hold how assignments are arranged.
"""

import dataclasses
import functools
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe.config import ConfigError, MoEConfig
from moe.kernels.grouped_matmul import Choice, Shapes
from moe.model.arrangement import (
    arrange,
    arrange_equally,
    combine,
    copy_to_slots,
    gather_from_slots,
    gather_into_slots,
)
from moe.model.dispatch import (
    Weights,
    choose_kernel,
    choose_strategy,
    dense,
    dropless,
    run_experts,
    with_capacity,
)
from moe.model.routing import route

E, A, D, F = 4, 2, 6, 5
CONFIG = MoEConfig(num_experts=E, experts_per_token=A, expert_dim=F)


def as_function(strategy, **static):
    """Returns y_ND of a strategy as a function of arrays alone, compiled as a whole."""
    return jax.jit(
        lambda x, experts, combine, *weights: (
            strategy(x, experts, combine, Weights(*weights), **static).y_ND
        )
    )


STRATEGIES = {
    "dense": as_function(dense),
    "capacity": lambda x, experts, *rest: as_function(
        with_capacity, capacity=int(loads(experts).max())
    )(x, experts, *rest),
    "dropless": as_function(dropless),
    "dropless, blocks of 3": as_function(dropless, block_rows=3),
    "dropless, blocks of 1": as_function(dropless, block_rows=1),
    "dropless, for TPUs": as_function(dropless, implementation="tpu"),
}


STRATEGIES_OF_ARRAYS = {
    "dense": dense,
    "capacity": functools.partial(with_capacity, capacity=14),
    "dropless": dropless,
}


class SameRows(NamedTuple):
    """Stands for weights of experts that return their rows as they are."""

    num_experts: int

    def __call__(self, rows_ECD):
        return rows_ECD


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.float32(rng.normal(size=shape)) for shape in ((E, D, F), (E, D, F), (E, F, D)))


def loads(experts):
    return np.bincount(np.ravel(experts), minlength=E)[:E]


def routed(tokens=14, seed=0):
    """Returns rows, experts and weights.

    Some assignments have the expert E, which is none. Expert 0 has no tokens, and the last one has
    the most.
    """
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(E - 1)[:A] for _ in range(tokens)])
    experts[rng.random((tokens, A)) < 0.2] = E
    experts = np.append(np.argsort(np.argsort(loads(experts))), E)[experts]
    return (
        jnp.float32(rng.normal(size=(tokens, D))),
        jnp.int32(experts),
        jnp.float32(rng.random((tokens, A)) * (experts < E)),
    )


def plain(x, experts, combine, gate, up, down):
    y = np.zeros_like(x)
    for n in range(len(x)):
        for a in range(experts.shape[1]):
            if (e := experts[n, a]) < len(gate):
                hidden = jax.nn.silu(x[n] @ gate[e]) * (x[n] @ up[e])
                y[n] += combine[n, a] * (hidden @ down[e])
    return y


def close(actual, expected, rtol=1e-6):
    """Compares up to `rtol` of the largest number, since sums of such products may cancel."""
    np.testing.assert_allclose(actual, expected, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_equals_a_loop_over_tokens(name):
    arguments = (*routed(), *weights())
    close(STRATEGIES[name](*arguments), plain(*map(np.asarray, arguments)))


@functools.cache
def gradients(name):
    """Returns a strategy's gradients. An assignment to nowhere has a weight that nothing reads."""
    x, experts, combine = routed()
    target = jnp.float32(np.random.default_rng(1).normal(size=x.shape))

    def loss(x, combine, *weights):
        return jnp.sum(STRATEGIES[name](x, experts, combine, *weights) * target)

    by_x, by_combine, *by_weights = jax.jit(jax.grad(loss, range(5)))(x, combine, *weights())
    return by_x, np.where(experts < E, by_combine, 0), *by_weights


@pytest.mark.parametrize("name", list(STRATEGIES)[1:])
def test_a_strategy_has_the_oracles_gradients(name):
    for expected, actual in zip(gradients("dense"), gradients(name), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("weights_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["dense", "capacity", "dropless"])
def test_gradients_have_the_dtypes_of_their_arrays(name, dtype, weights_dtype):
    x, experts, combine = routed()
    arrays = (x.astype(dtype), combine.astype(weights_dtype), *(w.astype(dtype) for w in weights()))

    def loss(x, combine, *weights):
        return jnp.sum(STRATEGIES[name](x, experts, combine, *weights).astype(jnp.float32))

    found = jax.eval_shape(jax.grad(loss, range(5)), *arrays)
    assert [x.dtype for x in found] == [x.dtype for x in arrays]


def test_many_assignments_are_added_up_in_float32():
    """In bfloat16 a sum of ones stops growing at 256."""
    tokens, choices = 3, 300
    arrangement = arrange_equally(jnp.zeros((tokens, choices), jnp.int32), 1, tokens * choices)
    rows = jnp.ones((tokens * choices, D), jnp.bfloat16)
    summed = combine(rows, jnp.ones((tokens, choices), jnp.bfloat16), arrangement)
    np.testing.assert_array_equal(summed, jnp.full((tokens, D), choices, jnp.bfloat16))


@pytest.mark.parametrize("name", ["dense", "capacity", "dropless"])
def test_arrays_that_do_not_match_are_refused(name):
    x, experts, combine = routed()
    with_room = functools.partial(with_capacity, capacity=4)
    strategy = {"dense": dense, "capacity": with_room, "dropless": dropless}[name]
    run = functools.partial(strategy, weights=Weights(*weights()))
    for arrays in (
        (x, experts[:5], combine),
        (x, experts[:5], combine[:5]),
        (x[None], experts, combine),
        (x, experts, combine[:, 0]),
    ):
        with pytest.raises(ValueError, match=r"give x \[N, D\], and experts and weights \[N, A\]"):
            run(*arrays)
    with pytest.raises(TypeError, match=r"^experts is float32: give the experts' numbers"):
        run(x, experts.astype(jnp.float32), combine)


@pytest.mark.parametrize("name", STRATEGIES_OF_ARRAYS)
def test_a_token_without_experts_is_refused(name):
    x, experts, combine = routed()
    with pytest.raises(ValueError, match=r"experts \(14, 0\) and .* where A is 1 or more$"):
        STRATEGIES_OF_ARRAYS[name](x, experts[:, :0], combine[:, :0], Weights(*weights()))


@pytest.mark.parametrize("name", STRATEGIES_OF_ARRAYS)
def test_no_tokens_have_no_sums_and_no_gradients(name):
    """A device of a mesh may have no tokens, and so may a guest's batch."""
    arrays = [array[:0] for array in routed()]

    def loss(x, combine, *weights):
        output = STRATEGIES_OF_ARRAYS[name](x, arrays[1], combine, Weights(*weights))
        assert output.y_ND.shape == (0, D)
        return jnp.sum(output.y_ND)

    for compiled in (lambda f: f, jax.jit):
        found = compiled(jax.grad(loss, range(5)))(arrays[0], arrays[2], *weights())
        for gradient, array in zip(found, (arrays[0], arrays[2], *weights()), strict=True):
            np.testing.assert_array_equal(gradient, np.zeros_like(array))


@pytest.mark.parametrize("name", STRATEGIES_OF_ARRAYS)
def test_numpy_arrays_are_taken_outside_of_jit(name):
    arrays = [np.asarray(array) for array in (*routed(), *weights())]
    run = lambda x, experts, combine, *weights: STRATEGIES_OF_ARRAYS[name](
        x, experts, combine, Weights(*weights)
    )
    output = run(*arrays)
    close(output.y_ND, plain(*arrays))
    assert isinstance(output.y_ND, jax.Array)
    by_x, by_combine = jax.grad(
        lambda x, c: jnp.sum(run(x, arrays[1], c, *arrays[3:]).y_ND), (0, 1)
    )(arrays[0], arrays[2])
    assert np.isfinite(by_x).all() and np.isfinite(by_combine).all()


def test_experts_without_room_drop_and_count_everything():
    x, experts, combine = routed()
    output = with_capacity(x, experts, combine, Weights(*weights()), capacity=0)
    np.testing.assert_array_equal(output.y_ND, jnp.zeros_like(x))
    np.testing.assert_array_equal(output.dropped_N, jnp.sum(experts < E, axis=1))


def test_dropless_takes_the_most_uneven_load():
    """There are enough blocks for all assignments to one expert, to all experts, and to none."""
    x = jnp.float32(np.random.default_rng(0).normal(size=(40, D)))
    combine, in_blocks_of_8 = jnp.ones((40, 1)), as_function(dropless, block_rows=8)
    for experts in (
        jnp.zeros((40, 1), jnp.int32),
        jnp.arange(40, dtype=jnp.int32)[:, None] % E,
        jnp.full((40, 1), E),
    ):
        y = in_blocks_of_8(x, experts, combine, *weights())
        close(y, plain(*map(np.asarray, (x, experts, combine, *weights()))))


def test_rows_lie_by_expert():
    """Experts 2, 0, 0, 2, 2 with room for 3: two rows of 0, none of 1, three of 2."""
    experts, x = jnp.array([[2], [0], [0], [2], [2]]), jnp.arange(1.0, 6.0)[:, None]
    rows = copy_to_slots(x, arrange_equally(experts, 3, 3))
    np.testing.assert_array_equal(rows[:, 0], [2, 3, 0, 0, 0, 0, 1, 4, 5])
    y, dropped = with_capacity(x, experts, jnp.ones((5, 1)), SameRows(3), capacity=3)
    np.testing.assert_array_equal(y[:, 0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(dropped, 0)


def test_a_row_beyond_an_experts_room_takes_no_others_place():
    """Two experts get three tokens and have room for two; -1 and 7 are no experts at all."""
    experts = jnp.array([[0], [0], [0], [2], [2], [2], [-1], [7]])
    x, ones = jnp.arange(1.0, 9.0)[:, None], jnp.ones((8, 1))
    rows = copy_to_slots(x, arrange_equally(experts, 3, 2))
    np.testing.assert_array_equal(rows[:, 0], [1, 2, 0, 0, 4, 5])
    run = functools.partial(with_capacity, capacity=2)
    y, dropped = run(x, experts, ones, SameRows(3))
    np.testing.assert_array_equal(y[:, 0], [1, 2, 0, 4, 5, 0, 0, 0])
    np.testing.assert_array_equal(dropped, [0, 0, 1, 0, 0, 1, 0, 0])
    gradient = jax.grad(lambda x: jnp.sum(run(x, experts, ones, SameRows(3)).y_ND))(ones)
    np.testing.assert_array_equal(gradient[:, 0], [1, 1, 0, 1, 1, 0, 0, 0])


def test_a_dropped_assignment_adds_nothing_even_where_another_row_is_nan():
    """The token 0 has no expert, the token 4 no room, and the last of all rows is NaN."""
    arrangement = arrange_equally(jnp.array([[2], [0], [1], [1], [1]]), 2, 2)
    rows = jnp.array([[1.0], [0.0], [2.0], [jnp.nan]])
    y = combine(rows, jnp.ones((5, 1)), arrangement)
    np.testing.assert_array_equal(y[:, 0], [0, 1, 2, jnp.nan, 0])
    pull_back = jax.vjp(lambda x: copy_to_slots(x, arrangement), jnp.ones((5, 1)))[1]
    np.testing.assert_array_equal(pull_back(rows)[0][:, 0], [0, 1, 2, jnp.nan, 0])


# Of few shapes, so that each is compiled once.
PROPERTY = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
TOKENS, CHOICES, EXPERTS, SLOTS = 7, 2, 3, 9
jitted_arrange = jax.jit(arrange, static_argnums=2)


@st.composite
def arrangements(draw):
    """Draws assignments, some of them to no expert, and the first slot of each expert."""
    number = st.integers(-1, EXPERTS + 1)
    numbers = draw(st.lists(number, min_size=TOKENS * CHOICES, max_size=TOKENS * CHOICES))
    experts = np.array(numbers, np.int32).reshape(TOKENS, CHOICES)
    first_slots = draw(st.lists(st.integers(0, SLOTS), min_size=EXPERTS, max_size=EXPERTS))
    first_slots = np.array([0, *sorted(first_slots)[1:]], np.int32)
    return experts, first_slots, jitted_arrange(experts, first_slots, SLOTS)


@PROPERTY
@hypothesis.given(arrangements())
def test_every_assignment_has_its_own_slot_in_its_experts_room(case):
    """An expert's first assignments fill its slots in order, and the others have none."""
    experts, first_slots, (slots, assignments) = case
    slots, assignments = np.asarray(slots).ravel(), np.asarray(assignments)
    ends = [*first_slots[1:], SLOTS]
    expected = np.full(TOKENS * CHOICES, SLOTS)
    for expert, (first, end) in enumerate(zip(first_slots, ends, strict=True)):
        own = np.flatnonzero(experts.ravel() == expert)[: end - first]
        expected[own] = first + np.arange(len(own))
    np.testing.assert_array_equal(slots, expected)
    inverse = np.full(SLOTS + 1, TOKENS * CHOICES)
    inverse[slots] = np.arange(TOKENS * CHOICES)
    np.testing.assert_array_equal(assignments, inverse[:SLOTS])


@jax.jit
def gathered(arrangement, slot_values, values_NA, rows_ID, x_ND):
    return (
        gather_from_slots(slot_values, arrangement),
        gather_into_slots(values_NA, arrangement),
        copy_to_slots(x_ND, arrangement),
        combine(rows_ID, jnp.ones((TOKENS, CHOICES)), arrangement),
    )


@PROPERTY
@hypothesis.given(arrangements(), st.integers(0, 2**32 - 1))
def test_gathers_are_each_others_transposes(case, seed):
    """<gather_from_slots(s), a> = <s, gather_into_slots(a)>, and likewise for rows."""
    rng = np.random.default_rng(seed)
    # Small integers, whose sums are exact.
    slot_values, values_NA, rows_ID, x_ND = (
        rng.integers(-9, 10, shape).astype(np.float32)
        for shape in (SLOTS, (TOKENS, CHOICES), (SLOTS, 2), (TOKENS, 2))
    )
    from_slots, into_slots, copied, combined = gathered(
        case[2], slot_values, values_NA, rows_ID, x_ND
    )
    assert np.sum(from_slots * values_NA) == np.sum(slot_values * into_slots)
    assert np.sum(copied * rows_ID) == np.sum(x_ND * combined)


MESH = (2, 4), ("data", "expert"), (AxisType.Auto,) * 2


def batch(seed=0, rows=8, length=5):
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(CONFIG, normalize_weights=False)
    routing = jax.jit(route, static_argnums=1)(
        jnp.float32(rng.normal(size=(rows, length, E))),
        config,
        jnp.array(rng.random((rows, length)) < 0.8),
    )
    return jnp.float32(rng.normal(size=(rows, length, D))), routing.experts_BTA, routing.weights_BTA


def emulated_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """Does what the collective does, by gathering everything.

    A sender's rows from input_offsets[receiver] on go to the place output_offsets[receiver] of the
    receiver.
    """
    receiver = jax.lax.axis_index(axis_name)
    gather = lambda x: jax.lax.all_gather(x, axis_name)
    operands, starts, sizes, offsets = map(
        gather, (operand, input_offsets, send_sizes, output_offsets)
    )
    index = jnp.arange(output.shape[0])
    for sender in range(operands.shape[0]):
        place = index - offsets[sender, receiver]
        inside = (place >= 0) & (place < sizes[sender, receiver])
        rows = (
            operands[sender]
            .at[jnp.where(inside, place + starts[sender, receiver], operand.shape[0])]
            .get(mode="fill", fill_value=0)
        )
        output = jnp.where(inside[:, None], rows, output)
    return output


def over_mesh(config, capacity, x, experts, combine, *weights):
    mesh = jax.make_mesh(*MESH)
    rows, of_experts = PartitionSpec(("data", "expert")), PartitionSpec("expert")
    function = functools.partial(run_experts, config, capacity)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(rows,) * 3 + (of_experts,) * 3,
        out_specs=(rows, rows),
        check_vma=False,
    )
    return jax.jit(mapped)(x, experts, combine, *weights)


EXCHANGES = [
    ("all_gather", "dense"),
    ("all_gather", "capacity"),
    ("all_gather", "dropless"),
    ("all_to_all", "capacity"),
]


@pytest.mark.parametrize(("exchange", "dispatch"), [*EXCHANGES, ("ragged_all_to_all", "dropless")])
def test_an_exchange_equals_one_device(exchange, dispatch, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    config = dataclasses.replace(CONFIG, exchange=exchange, dispatch=dispatch, receive_factor=4.0)
    x, experts, combine = batch()
    target = jnp.float32(np.random.default_rng(1).normal(size=x.shape))

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=range(1, 6), has_aux=True)
    def loss(run, x, combine, *weights):
        y, dropped = run(config, 5, x, experts, combine, *weights)
        return jnp.sum(y * target), (y, dropped)

    arguments = (x, combine, *weights())
    (_, (expected_y, _)), expected = loss(run_experts, *arguments)
    (_, (y, dropped)), actual = loss(over_mesh, *arguments)
    close(y, expected_y)
    assert not dropped.any()
    assigned = np.asarray(experts < E)
    close(np.where(assigned, actual[1], 0), np.where(assigned, expected[1], 0))
    for index in (0, 2, 3, 4):
        close(actual[index], expected[index])


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_what_overflows_an_experts_rows_is_counted_and_passes_by(exchange):
    """Without `limit_to_capacity`, experts get 2 or 3 of a row's 5 tokens, and have room for 1."""
    config = dataclasses.replace(
        CONFIG, exchange=exchange, dispatch="capacity", experts_per_token=1, normalize_weights=False
    )
    x, _, _ = batch()
    experts, combine = (
        jnp.broadcast_to(jnp.array([0, 1, 0, 1, 0])[:, None], (8, 5, 1)),
        jnp.ones((8, 5, 1)),
    )
    y, dropped = over_mesh(config, 1, x, experts, combine, *weights())
    assert dropped.sum() == 8 * 3
    free = plain(
        *map(
            np.asarray,
            (x.reshape(40, D), experts.reshape(40, 1), combine.reshape(40, 1), *weights()),
        )
    )
    np.testing.assert_allclose(
        y, np.where(np.asarray(dropped)[..., None] > 0, 0, free.reshape(x.shape)), atol=1e-5
    )


def test_what_overflows_a_ragged_exchange_is_counted_and_passes_by(monkeypatch):
    """Every row goes to device 0, which has room for the rows of one device: its own."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    config = dataclasses.replace(
        CONFIG, exchange="ragged_all_to_all", experts_per_token=1, receive_factor=1.0
    )
    x, _, _ = batch()
    experts, combine = jnp.zeros((8, 5, 1), jnp.int32), jnp.ones((8, 5, 1))
    y, dropped = over_mesh(config, 5, x, experts, combine, *weights())
    # Each device has one row of the batch, and the group of each data row has four devices.
    has_room = np.array([True, False, False, False] * 2)
    np.testing.assert_array_equal(dropped, np.broadcast_to(~has_room[:, None], (8, 5)))
    np.testing.assert_array_equal(y[~has_room], 0)
    on_one_device = jax.jit(functools.partial(run_experts, config, 5))
    close(y[has_room], on_one_device(x, experts, combine, *weights())[0][has_room])


def test_a_config_names_the_kernel_of_dropless():
    assert choose_kernel("hopper", Shapes(64, 8, "bfloat16")) == Choice("hopper", 128)
    with pytest.raises(
        ConfigError, match="because it takes bfloat16 and float16, not float32: set "
    ):
        config = dataclasses.replace(CONFIG, implementation="hopper")
        choose_strategy(config, 0)(*routed(), Weights(*weights()))
    with pytest.raises(ConfigError, match="set dispatch to 'dropless'"):
        dataclasses.replace(CONFIG, implementation="hopper", dispatch="dense")
