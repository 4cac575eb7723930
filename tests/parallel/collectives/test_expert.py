"""The plan of a ragged exchange, by hand and for drawn loads."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from moe.parallel.collectives.expert import ExchangePlan, plan_exchange, received_experts

PROPERTY = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
DEVICES, OWN = 3, 2  # devices, and experts on each
jitted_plan = jax.jit(plan_exchange, static_argnums=1)
jitted_experts = jax.jit(received_experts, static_argnums=2)


def test_the_plan_of_an_exchange_by_hand():
    """Two devices of one expert each: 3 and 1 rows from device 0, 2 and 4 from device 1, and room
    for 4.
    """
    plan = plan_exchange(jnp.array([[3, 1], [2, 4]]), room=4)
    np.testing.assert_array_equal(plan.starts_PP, [[0, 3], [0, 2]])
    np.testing.assert_array_equal(plan.offsets_PP, [[0, 0], [3, 1]])
    np.testing.assert_array_equal(plan.sizes_PP, [[3, 1], [1, 3]])
    np.testing.assert_array_equal(
        received_experts(jnp.array([[3, 1], [2, 4]]), jnp.array(1), room=6),
        [0, 0, 0, 0, 0, 1],
    )


def send(buffers, outputs, starts, sizes, offsets):
    """Copies rows as `jax.lax.ragged_all_to_all` does; counts how often each place is written."""
    writes = [np.zeros(len(output), int) for output in outputs]
    for sender, buffer in enumerate(buffers):
        for receiver, output in enumerate(outputs):
            start, size = starts[sender, receiver], sizes[sender, receiver]
            offset = offsets[sender, receiver]
            assert 0 <= start <= start + size <= len(buffer)
            assert 0 <= offset <= offset + size <= len(output)
            output[offset : offset + size] = buffer[start : start + size]
            writes[receiver][offset : offset + size] += 1
    return writes


loads_PE = st.lists(
    st.integers(0, 4), min_size=DEVICES * DEVICES * OWN, max_size=DEVICES * DEVICES * OWN
).map(lambda numbers: np.array(numbers, np.int32).reshape(DEVICES, DEVICES * OWN))


@PROPERTY
@hypothesis.given(loads_PE, st.sampled_from([1, 5, 12, 24, DEVICES * DEVICES * OWN * 4]))
def test_every_row_is_sent_once_to_its_experts_device_and_comes_back(loads, room):
    """Only rows beyond a device's room are left out, and no others."""
    plan = ExchangePlan(*map(np.asarray, jitted_plan(loads, room)))
    # A row is its sender, its expert and its number among these; rows lie sorted by expert.
    rows = [
        [(sender, expert, n) for expert, load in enumerate(loads[sender]) for n in range(load)]
        for sender in range(DEVICES)
    ]
    received = [[None] * room for _ in range(DEVICES)]
    writes = send(rows, received, *(plan.starts_PP, plan.sizes_PP, plan.offsets_PP))
    for device, buffer in enumerate(received):
        own = range(device * OWN, (device + 1) * OWN)
        wanted = [row for sent in rows for row in sent if row[1] in own][:room]
        assert buffer == wanted + [None] * (room - len(wanted))
        np.testing.assert_array_equal(writes[device], [row is not None for row in buffer])
        experts = np.asarray(jitted_experts(loads, jnp.int32(device), room))
        expected = [OWN if row is None else row[1] - own.start for row in buffer]
        np.testing.assert_array_equal(experts, expected)
    returned = [[None] * len(sent) for sent in rows]
    writes = send(received, returned, *(plan.offsets_PP.T, plan.sizes_PP.T, plan.starts_PP.T))
    arrived = {row for buffer in received for row in buffer}
    for device, sent in enumerate(rows):
        assert returned[device] == [row if row in arrived else None for row in sent]
        assert max(writes[device], default=0) <= 1
