"""Times `decode_attention` beside XLA's own attention with a mask, as a cache fills.

    python -m moe.kernels.benchmarks.decode

It fills a part of the cache and times pairs of calls, one of each function right after the other.
For each part it prints the median of the ratios of their times.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe.kernels.attention import decode_attention

BATCH, SLOTS, HEADS, KV_HEADS, WIDTH = 1, 8192, 8, 2, 64
PAIRS, CALLS = 25, 5


def masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    mask_B1TS = jnp.arange(k_BSKH.shape[1]) <= positions_BT[:, None, :, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS)


def seconds(function: Callable[..., jax.Array], *arrays: jax.Array) -> float:
    """Returns the mean time of a few calls."""
    start = time.perf_counter()
    for _ in range(CALLS):
        function(*arrays).block_until_ready()
    return (time.perf_counter() - start) / CALLS


def benchmark(fill: float, dtype: str) -> str:
    """Returns a row of the table: how much of the cache is filled, the time, and the ratio."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (BATCH, 1, HEADS, WIDTH), *[(BATCH, SLOTS, KV_HEADS, WIDTH)] * 2
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    arrays.append(jnp.full((BATCH, 1), round(fill * SLOTS) - 1))
    # GPUs and TPUs multiply float32 numbers rounded, unless they are told otherwise.
    with jax.default_matmul_precision("highest"):
        results = [attend(*arrays) for attend in (decode_attention, masked_attention)]
    error = jnp.max(jnp.abs(results[0].astype(jnp.float32) - results[1].astype(jnp.float32)))
    assert error < (1e-5 if dtype == "float32" else 0.02), error
    ours, theirs = jax.jit(decode_attention), jax.jit(masked_attention)
    pairs = [(seconds(ours, *arrays), seconds(theirs, *arrays)) for _ in range(PAIRS)]
    ratio, time_ms = (
        statistics.median(b / a for a, b in pairs),
        1e3 * statistics.median(a for a, _ in pairs),
    )
    return f"{dtype:>10} {fill:6.0%} {time_ms:8.2f} ms {ratio:8.2f}"


if __name__ == "__main__":
    print(
        f"B={BATCH} S={SLOTS} N={HEADS} K={KV_HEADS} H={WIDTH}: "
        "time of a call, and how many times as fast it is as XLA's attention with a mask"
    )
    for dtype in ("float32", "bfloat16"):
        for fill in (0.05, 0.5, 1.0):
            print(benchmark(fill, dtype), flush=True)
