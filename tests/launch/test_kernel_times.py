"""The times of a step's kernels: read off a trace of this machine, and of devices that stand in."""

import types

import jax
import jax.numpy as jnp
import pytest

from launch.kernel_times import STEPS, kernel_times, sum_events


def plane(name, device=0, **lines):
    """A plane of a trace, whose lines are lists of (kernel, nanoseconds)."""
    return types.SimpleNamespace(
        name=name,
        lines=[
            types.SimpleNamespace(
                name=line.replace("_", " "),
                events=[
                    types.SimpleNamespace(
                        name=event,
                        duration_ns=time,
                        stats=[("hlo_op", event), ("device_ordinal", device)],
                    )
                    for event, time in events
                ],
            )
            for line, events in lines.items()
        ],
    )


def test_a_loop_of_matmuls_is_seen_for_what_it_is():
    """Its kernels are called in each turn, and the loop around them is not counted beside them."""

    @jax.jit
    def run(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ x), x)

    x = jnp.eye(256)
    run(x)
    found = kernel_times(lambda: jax.block_until_ready(run(x)))
    assert all(kernel["ms"] >= 0 for kernel in found)
    assert [kernel["ms"] for kernel in found] == sorted((k["ms"] for k in found), reverse=True)
    # A CPU's threads may each record a part of a call.
    assert sum(kernel["calls"] >= 5 for kernel in found) >= 2
    assert not any(kernel["name"].startswith(("while", "ThreadpoolListener")) for kernel in found)


@pytest.mark.parametrize(("kind", "line"), [("GPU", "Stream_#13(Compute)"), ("TPU", "XLA_Ops")])
def test_devices_are_averaged_and_nothing_else_is_counted(kind, line):
    devices = [
        plane(
            f"/device:{kind}:{i}",
            **{line: [("matmul", 3e6 * (i + 1)), ("matmul", 1e6), ("norm", 1e6), ("while.3", 9e9)]},
            XLA_Modules=[("jit_train_step", 9e9)],
        )
        for i in range(2)
    ]
    other = plane("/device:CUSTOM:Megascale", **{line: [("matmul", 1e12)]})
    found = {kernel["name"]: kernel for kernel in sum_events([other, *devices])}
    assert list(found) == ["matmul", "norm"]
    assert found["matmul"]["ms"] == pytest.approx((4 + 7) / 2 / STEPS)
    assert found["matmul"]["calls"] == 2 / STEPS and found["norm"]["calls"] == 1 / STEPS


def test_the_devices_of_a_cpu_are_averaged():
    planes = [plane("/host:CPU", device=i, tf_XLAEigen=[("matmul", 3e6)]) for i in range(4)]
    assert sum_events(planes) == [{"name": "matmul", "ms": 3 / STEPS, "calls": 1 / STEPS}]
