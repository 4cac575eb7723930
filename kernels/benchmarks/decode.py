"""Times `decode_attention` beside XLA's own attention with a mask, as a cache fills.

    python -m moe.kernels.benchmarks.decode

It fills a part of the cache and times pairs of calls, one of each function right after the other.
For each part it prints the median of the ratios of their times.
"""

import argparse
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from moe.kernels.attention import decode_attention
from moe.kernels.benchmarks.results import output_file, write_rows
from moe.kernels.benchmarks.timing import seconds

BATCH, SLOTS, HEADS, KV_HEADS, WIDTH = 1, 8192, 8, 2, 64
PAIRS, CALLS = 25, 20


def masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    mask_B1TS = jnp.arange(k_BSKH.shape[1]) <= positions_BT[:, None, :, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS)


def measure(filled: float, dtype: str) -> list[dict[str, Any]]:
    """Returns a row for each function: a part of the cache, the time, and the ratio of the times.

    Raises AssertionError if the two do not agree.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (BATCH, 1, HEADS, WIDTH), *[(BATCH, SLOTS, KV_HEADS, WIDTH)] * 2
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    arrays.append(jnp.full((BATCH, 1), round(filled * SLOTS) - 1))
    # GPUs and TPUs multiply float32 numbers rounded, unless they are told otherwise.
    with jax.default_matmul_precision("highest"):
        results = [attend(*arrays) for attend in (decode_attention, masked_attention)]
    error = jnp.max(jnp.abs(results[0].astype(jnp.float32) - results[1].astype(jnp.float32)))
    assert error < (1e-5 if dtype == "float32" else 0.02), error

    ours, theirs = (
        functools.partial(jax.jit(attend), *arrays)
        for attend in (decode_attention, masked_attention)
    )
    pairs = [(seconds(ours, CALLS), seconds(theirs, CALLS)) for _ in range(PAIRS)]
    ratio = statistics.median(theirs_s / ours_s for ours_s, theirs_s in pairs)
    case = {"filled": filled, "dtype": dtype}
    medians = [1e3 * statistics.median(times) for times in zip(*pairs, strict=True)]
    return [
        {**case, "implementation": "decode_attention", "ms": medians[0], "ratio": ratio},
        {**case, "implementation": "xla", "ms": medians[1]},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=output_file, help="where to write the rows")
    arguments = parser.parse_args()
    print(
        f"B={BATCH} S={SLOTS} N={HEADS} K={KV_HEADS} H={WIDTH}: "
        "time of a call, and how many times as fast it is as XLA's attention with a mask"
    )
    rows = []
    for dtype in ("float32", "bfloat16"):
        for filled in (0.05, 0.5, 1.0):
            ours, theirs = measure(filled, dtype)
            rows += [ours, theirs]
            print(
                f"{dtype:>10} {filled:6.0%} {ours['ms']:8.2f} ms {ours['ratio']:8.2f}", flush=True
            )
    if arguments.json:
        write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
