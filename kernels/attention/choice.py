"""Chooses which implementation computes an attention on a chip.

These are pure functions of shapes, options and the name of a chip: nothing is run or asked of a
device, so that programs can be compiled for chips that are not here.
"""

import dataclasses
import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import jax

from moe.kernels.attention.inputs import (
    Inputs,
    Options,
    Request,
    Window,
    check_inputs,
    make_options,
    make_request,
)
from moe.kernels.attention.table import IMPLEMENTATIONS, Blocks

TUNED_BLOCKS = Path(__file__).with_name("blocks.json")

Shaped = jax.Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Choice:
    """The name of an implementation in the table, and the sizes of its blocks."""

    name: str
    blocks: Blocks | None = None  # None takes those of the implementation's rule


def as_choice(implementation: str | Choice) -> Choice:
    """Returns a choice, given a name or a choice. Raises ValueError for an unknown name."""
    choice = Choice(implementation) if isinstance(implementation, str) else implementation
    if choice.name not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation={choice.name!r} is not known: choose from {names}")
    return choice


def with_blocks(choice: Choice, options: Options) -> Choice:
    """Returns a choice with the sizes of blocks that its implementation's rule gives."""
    rule = IMPLEMENTATIONS[choice.name].blocks
    if choice.blocks is not None or rule is None:
        return choice
    return Choice(choice.name, rule(options))


def choose(
    chip: str,
    q: Shaped,
    k: Shaped,
    v: Shaped,
    *,
    refused: Collection[str] = (),
    **keywords: Any,
) -> Choice:
    """Returns the fastest implementation on `chip` for a call of flash_attention.

    `chip` is a device_kind as JAX names it: "TPU v5p", "NVIDIA H200", "cpu". Only shapes and dtypes
    of the arrays are read, so jax.ShapeDtypeStruct will do. The keywords are flash_attention's.
    Implementations that are `refused` are not chosen.
    """
    request = describe(q, k, v, **keywords)
    # docs/performance.md has the times that this order comes from. "hopper_fused" is no candidate,
    # since the last bits of its gradients differ from run to run: a caller must ask for that.
    candidates = () if chip == "cpu" else ("tpu", "hopper", "cudnn")
    able = (
        name for name in candidates if name not in refused and obstacle(name, request, chip) is None
    )
    name = next(able, "blockwise")
    return Choice(name, tuned_blocks().get(chip, {}).get(tuning_key(name, request)))


@functools.cache
def tuned_blocks() -> dict[str, dict[str, Blocks]]:
    """Returns the fastest sizes of blocks, by chip and `tuning_key`.

    `python -m moe.kernels.benchmarks.tune` wrote them.
    """
    table = json.loads(TUNED_BLOCKS.read_text(encoding="utf-8"))
    return {
        chip: {key: tuple(blocks) for key, blocks in rows.items()} for chip, rows in table.items()
    }


def tuning_key(name: str, request: Request) -> str:
    """Returns the key under which requests share their sizes of blocks.

    It names the implementation, the dtype, the head width, the kind of mask, and the length up to
    the next power of two.
    """
    mask = "causal" if request.options.right == 0 else "full"
    if request.options.left is not None:
        mask = "window"
    power_of_two = 1 << (request.lengths[0] - 1).bit_length()
    return f"{name} {request.dtype} {request.widths[0]} {mask} {power_of_two}"


def supported(
    name: str, q: Shaped, k: Shaped, v: Shaped, *, chip: str | None = None, **keywords: Any
) -> bool:
    """Returns whether an implementation can do a call of flash_attention.

    See `why_not`; nothing is run.
    """
    return why_not(name, q, k, v, chip=chip, **keywords) is None


def why_not(
    name: str, q: Shaped, k: Shaped, v: Shaped, *, chip: str | None = None, **keywords: Any
) -> str | None:
    """Returns what keeps an implementation from doing a call of flash_attention, or None.

    If `chip` is given, this may be that the implementation does not run there.
    """
    return obstacle(name, describe(q, k, v, **keywords), chip)


def obstacle(name: str, request: Request, chip: str | None = None) -> str | None:
    """Returns what keeps an implementation from computing a request, or None."""
    return IMPLEMENTATIONS[as_choice(name).name].obstacle(request, chip)


def describe(
    q: Shaped,
    k: Shaped,
    v: Shaped,
    *,
    causal: bool = False,
    window: Window | None = None,
    q_segment_ids: Shaped | None = None,
    kv_segment_ids: Shaped | None = None,
    q_offset: jax.Array | int = 0,
    kv_offset: jax.Array | int = 0,
    softcap: float | None = None,
    sinks: Shaped | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Request:
    """Returns the request that a call of flash_attention makes.

    Raises ValueError where the arguments do not agree.
    """
    # Only shapes and dtypes are read from here on.
    inputs = Inputs(*cast("list[jax.Array]", [q, k, v, sinks, q_segment_ids, kv_segment_ids]))
    check_inputs(inputs)
    options = make_options(q.shape[3], causal, window, softcap, scale)
    return make_request(inputs, options, (q_offset, kv_offset), return_lse)
