"""Finds the fastest sizes of blocks on the device at hand, and adds them to blocks.json.

    python -m moe.kernels.benchmarks.tune
    python -m moe.kernels.benchmarks.tune --dtypes float32 --widths 64 --lengths 1024 4096

It times the forward and the backward pass of each candidate, in turns with those of the others. A
size that does not compile, perhaps because it is too large for the chip's memory, is left out.
Calls that blocks.json lacks take the sizes of their implementation's rule (table.py). If the
command is interrupted, it keeps what it has found.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from moe.kernels.attention import IMPLEMENTATIONS, Choice, choice, flash_attention
from moe.kernels.attention.inputs import Options
from moe.kernels.attention.table import Blocks
from moe.kernels.benchmarks.attention import passes, random_arrays
from moe.kernels.benchmarks.results import output_file
from moe.kernels.benchmarks.timing import median_seconds

CANDIDATES = {
    "blockwise": ((128, 256, 512), (256, 512, 1024)),
    "tpu": ((256, 512, 1024), (256, 512, 1024)),
}
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "window": {"causal": True, "window": (1023, 0)},
}


def fastest(
    name: str,
    options: Options,
    arrays: tuple[jax.Array, ...],
    keywords: dict[str, Any],
    repeats: int,
) -> tuple[Blocks, float]:
    """Returns the sizes that take the least time in both passes, and their time over the rule's."""
    length = arrays[0].shape[1]
    rule = IMPLEMENTATIONS[name].blocks
    assert rule is not None, f"{name} has no blocks to tune"
    at_most_length = lambda blocks: (min(blocks[0], length), min(blocks[1], length))
    candidates = [*itertools.product(*CANDIDATES[name]), rule(options)]
    calls: dict[tuple[Blocks, str], Callable[[], Any]] = {}
    for blocks in sorted({at_most_length(pair) for pair in candidates}):
        choice = Choice(name, blocks)
        attention = functools.partial(flash_attention, implementation=choice, **keywords)
        try:
            timed = passes(attention, arrays)
        except (RuntimeError, ValueError) as error:
            print(f"  {blocks}: {str(error).splitlines()[0]}")
        else:
            calls |= {(blocks, which): call for which, call in timed.items()}
    seconds = median_seconds(calls, repeats)
    totals = {
        blocks: seconds[blocks, "forward"] + seconds[blocks, "backward"] for blocks, _ in calls
    }
    best = min(totals, key=totals.__getitem__)
    return best, totals[best] / totals[at_most_length(rule(options))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="H of a head")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[1024, 4096, 16_384],
        help="T = S; the blocks found are used for all lengths above T / 2, up to T",
    )
    parser.add_argument("--heads", type=int, default=8, help="N, query heads")
    parser.add_argument("--kv_heads", type=int, default=2, help="K, key/value heads")
    parser.add_argument("--repeats", type=int, default=5, help="calls whose median is taken")
    parser.add_argument(
        "--table", type=output_file, default=choice.TUNED_BLOCKS, help="the table to add to"
    )
    arguments = parser.parse_args()
    chip = jax.devices()[0].device_kind
    for dtype, width, length, (mask, keywords) in itertools.product(
        arguments.dtypes, arguments.widths, arguments.lengths, MASKS.items()
    ):
        arrays = random_arrays(length, (arguments.heads, arguments.kv_heads, width), dtype)
        request = choice.describe(*arrays[:3], **keywords)
        name = choice.choose(chip, *arrays[:3], **keywords).name
        if name not in CANDIDATES:
            print(f"{mask}, {dtype}, H={width}, T={length}: {name} has no blocks to tune")
            continue
        blocks, ratio = fastest(name, request.options, arrays, keywords, arguments.repeats)
        key = choice.tuning_key(name, request)
        print(f"{key}: {blocks}, {ratio:.2f} times the time of the rule's", flush=True)
        table = json.loads(arguments.table.read_text(encoding="utf-8"))
        table.setdefault(chip, {})[key] = blocks
        arguments.table.write_text(
            json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
