"""Checks attention's numbers on the device at hand, and times it beside other libraries' attention.

    python -m moe.kernels.benchmarks.attention --json=attention.json
    python -m moe.kernels.benchmarks.attention --lengths 1024 2048 --heads=8 --kv_heads=8 \\
        --width=64 --dtype=float32

TFLOP/s count only what the mask leaves: 4 H FLOPs forward and 10 H backward for each pair of a
query and a key that it sees. Calls are timed in turns, and each number is a median. Give
small lengths on a CPU.
"""

import argparse
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention import Choice, choose, flash_attention, why_not
from moe.kernels.benchmarks.results import check_difference, output_file, write_rows
from moe.kernels.benchmarks.timing import median_seconds

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def masks(length: int) -> dict[str, dict[str, Any]]:
    """Returns the masks that are timed at a length, as keywords of flash_attention.

    They are causal, and at 16k also windows and packed documents.
    """
    found: dict[str, dict[str, Any]] = {"causal": {"causal": True}}
    if length == 16_384:
        ids = jnp.repeat(jnp.arange(8, dtype=jnp.int32), length // 8)[None]
        found |= {
            f"window {width}": {"causal": True, "window": (width - 1, 0)} for width in (512, 1024)
        }
        found["8 documents"] = {"causal": True, "q_segment_ids": ids, "kv_segment_ids": ids}
    return found


def visible_pairs(length: int, keywords: dict[str, Any]) -> int:
    """Returns how many pairs of a query and a key a causal mask of `masks` leaves."""
    spans = [length // 8] * 8 if "q_segment_ids" in keywords else [length]
    left = keywords.get("window", (length, 0))[0]
    return sum(int(np.minimum(np.arange(span), left).sum()) + span for span in spans)


def competitors(chip: str, keywords: dict[str, Any]) -> dict[str, Attention]:
    """Returns what else computes the same on this chip, by name.

    It is cuDNN or XLA through jax.nn, and on NVIDIA GPUs also tokamax and jax's own kernel.
    """
    plain = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        implementation="cudnn" if "NVIDIA" in chip else "xla",
    )
    if "window" in keywords:
        plain = functools.partial(plain, local_window_size=keywords["window"])
    if "q_segment_ids" in keywords:
        ids = keywords["q_segment_ids"]
        plain = functools.partial(plain, mask=(ids[:, None, :, None] == ids[:, None, None, :]))
    found: dict[str, Attention] = {"cudnn" if "NVIDIA" in chip else "xla": plain}
    if "NVIDIA" in chip and list(keywords) == ["causal"]:
        from jax.experimental.pallas.ops.gpu import attention_mgpu

        config = attention_mgpu.TuningConfig(
            block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
        )
        found["jax's mosaic kernel"] = functools.partial(attention_mgpu.attention, config=config)
        if importlib.util.find_spec("tokamax"):
            tokamax = importlib.import_module("tokamax")
            found["tokamax"] = functools.partial(
                tokamax.dot_product_attention, is_causal=True, implementation="mosaic"
            )
    return found


def check_numbers(implementation: Choice, shape: tuple[int, int, int], dtype: str) -> float:
    """Returns the largest difference from the float32 reference, over its largest value.

    It compares outputs and gradients. Raises ValueError above 2 %.
    """
    arrays = random_arrays(512, shape, dtype)
    results = []
    for name, cast in ((implementation, dtype), (Choice("reference"), "float32")):
        attention = functools.partial(flash_attention, causal=True, implementation=name)
        q, k, v, g = (x.astype(cast) for x in arrays)
        output, pull_back = jax.vjp(jax.jit(attention), q, k, v)
        results.append([np.asarray(x, np.float32) for x in (output, *pull_back(g))])
    return check_difference(implementation.name, *results)


def random_arrays(length: int, shape: tuple[int, int, int], dtype: str) -> tuple[jax.Array, ...]:
    """Returns q, k, v and the gradient of the output, of one row, for a shape (N, K, H)."""
    heads, kv_heads, width = shape
    keys = jax.random.split(jax.random.key(0), 4)
    heads_of = (heads, kv_heads, kv_heads, heads)
    return tuple(
        jax.random.normal(key, (1, length, n, width), jnp.float32).astype(dtype)
        for key, n in zip(keys, heads_of, strict=True)
    )


def passes(attention: Attention, arrays: tuple[jax.Array, ...]) -> dict[str, Callable[[], Any]]:
    """Returns the forward pass, and the backward pass alone, compiled and run once."""
    q, k, v, g = arrays
    forward = jax.jit(attention)
    # JAX's pullback is a pytree of the arrays that the forward pass keeps. As an argument of a
    # jitted function, it makes a program of the backward pass alone.
    pull_back = jax.jit(lambda q, k, v: jax.vjp(attention, q, k, v)[1])(q, k, v)
    backward = jax.jit(lambda pull_back, g: pull_back(g))
    calls = {"forward": lambda: forward(q, k, v), "backward": lambda: backward(pull_back, g)}
    for call in calls.values():
        jax.block_until_ready(call())
    return calls


def measure(
    chip: str,
    length: int,
    shape: tuple[int, int, int],
    dtype: str,
    repeats: int,
    name: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a row for each mask, pass and implementation at one length."""
    arrays = random_arrays(length, shape, dtype)
    flops_of_pair = {"forward": 4, "backward": 10}
    for mask, keywords in masks(length).items():
        chosen = Choice(name) if name else choose(chip, *arrays[:3], **keywords)
        ours = functools.partial(flash_attention, implementation=chosen, **keywords)
        calls, refused = {}, {}
        others = competitors(chip, keywords)
        if "xla" in others and 4 * shape[0] * length**2 > 2**31:
            refused["xla"] = "it would hold several arrays of scores, each of more than 2 GiB"
            del others["xla"]
        for label, attention in {chosen.name: ours, **others}.items():
            try:
                calls |= {(label, which): call for which, call in passes(attention, arrays).items()}
            except (NotImplementedError, ValueError, RuntimeError) as error:
                if attention is ours:
                    raise
                refused[label] = str(error).splitlines()[0]
        seconds = median_seconds(calls, repeats)
        pairs = visible_pairs(length, keywords) * shape[0] * shape[2]
        for (label, which), time_s in seconds.items():
            flops = flops_of_pair[which] * pairs
            yield {
                "mask": mask,
                "length": length,
                "pass": which,
                "implementation": label,
                "ms": time_s * 1e3,
                "tflops": flops / time_s / 1e12,
            }
        yield from (
            {"mask": mask, "length": length, "implementation": label, "refused": why}
            for label, why in refused.items()
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[4096, 8192, 16_384, 32_768],
        help="T = S of a row",
    )
    parser.add_argument("--heads", type=int, default=64, help="N, query heads")
    parser.add_argument("--kv_heads", type=int, default=8, help="K, key/value heads")
    parser.add_argument("--width", type=int, default=128, help="H of a head")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--implementation",
        choices=["blockwise", "tpu", "hopper", "hopper_fused"],
        help="which of ours to time; by default what `choose` returns",
    )
    parser.add_argument("--repeats", type=int, default=10, help="turns whose median is taken")
    parser.add_argument(
        "--json", type=output_file, help="where to write the rows, with the device and the versions"
    )
    return parser.parse_args()


def print_row(row: dict[str, Any]) -> None:
    result = f"not run: {row.get('refused')}"
    if "refused" not in row:
        result = f"{row['pass']:8} {row['ms']:9.2f} ms {row['tflops']:7.2f} TFLOP/s"
    print(f"{row['length']:>6} {row['mask']:12} {row['implementation']:20} {result}", flush=True)


def main() -> None:
    arguments = parse_arguments()
    shape = (arguments.heads, arguments.kv_heads, arguments.width)
    chip = jax.devices()[0].device_kind
    arrays = random_arrays(512, shape, arguments.dtype)[:3]
    chosen = Choice(arguments.implementation) if arguments.implementation else None
    chosen = chosen or choose(chip, *arrays, causal=True)
    if reason := why_not(chosen.name, *arrays, chip=chip, causal=True):
        sys.exit(f"error: {chosen.name} cannot be timed here, because {reason}")
    try:
        worst = check_numbers(chosen, shape, arguments.dtype)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sizes = f"N={shape[0]} K={shape[1]} H={shape[2]}"
    print(
        f"{chosen.name} on {chip}, {arguments.dtype}, {sizes}: "
        f"at most {worst:.1e} from the reference"
    )
    rows = []
    name, repeats = arguments.implementation, arguments.repeats
    for length in arguments.lengths:
        for row in measure(chip, length, shape, arguments.dtype, repeats, name):
            rows.append(row)
            print_row(row)
    if arguments.json:
        write_rows(arguments.json, rows, shape=shape, dtype=arguments.dtype, worst_difference=worst)


if __name__ == "__main__":
    main()
