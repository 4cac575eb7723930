"""Which implementation can do a call of attention, and which one does it on a chip: pure functions,
nothing is run or asked of a device.
"""

import dataclasses
import functools
import json
import numbers
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe.kernels.attention.masks import Options, Window, span
from moe.kernels.settings import check_axes

Name = Literal["reference", "blockwise", "tpu", "hopper", "hopper_fused", "cudnn"]

# Positions in a block of queries and in one of keys, where blocks.json has none for a call.
BLOCKS: dict[str, tuple[int, int]] = {"blockwise": (256, 512), "tpu": (512, 512)}
TABLE = Path(__file__).with_name("blocks.json")
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Call:
    """What of a call decides who can do it."""

    dtype: str
    batch: int  # this and the lengths may be symbolic, for jax.export
    lengths: tuple[int, int]  # T and S
    widths: tuple[int, int]  # H of keys and of values
    options: Options
    segments: bool  # whether there are ids, and so on
    sinks: bool
    offsets: bool
    lse: bool


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Who computes an attention, and the sizes of the blocks of queries and of keys that it takes."""

    name: Name
    blocks: tuple[int, int] | None = None  # None takes the rule's: see `of`

    @classmethod
    def of(cls, value: "Name | Implementation", options: Options) -> "Implementation":
        """With blocks, where `value` has none: those of BLOCKS, but on CPUs blocks of keys of at
        most half a window.
        """
        value = value if isinstance(value, Implementation) else cls(value)
        if value.blocks or value.name not in BLOCKS:
            return value
        q_block, kv_block = BLOCKS[value.name]
        if value.name == "blockwise" and options.left is not None and options.right is not None:
            half = max(1, (options.left + options.right + 1) // 2)
            kv_block = max(128, min(kv_block, 1 << half.bit_length() - 1))
        return cls(value.name, (q_block, kv_block))


def choose(chip: str, q: Any, k: Any, v: Any, **keywords: Any) -> Implementation:
    """The fastest implementation on `chip`, a device_kind as JAX names it ("TPU v5p", "NVIDIA
    H200", "cpu"), of a call of flash_attention.

    Of arrays only shapes and dtypes are read: jax.ShapeDtypeStruct will do. The keywords are
    flash_attention's.
    """
    call = describe(q, k, v, **keywords)
    # The Hopper kernels are not among them: they have not run on a device yet, and are there by
    # name. The fused one would not be anyway, for its sums have no order: who takes it should know.
    candidates: tuple[Name, ...] = () if chip == "cpu" else ("tpu", "cudnn")
    name = next((name for name in candidates if obstacle(name, call, chip) is None), "blockwise")
    return Implementation(name, tuned_blocks().get(chip, {}).get(key(name, call)))


@functools.cache
def tuned_blocks() -> dict[str, dict[str, tuple[int, int]]]:
    """The sizes of blocks that were the fastest, by chip and `key`: what `python -m
    moe.kernels.benchmarks.tune` wrote.
    """
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        chip: {key: tuple(blocks) for key, blocks in rows.items()} for chip, rows in table.items()
    }


def key(name: Name, call: Call) -> str:
    """Calls of a key share their blocks: implementation, dtype, head width, kind of mask, and
    length up to the next power of two.
    """
    mask = (
        "window"
        if call.options.left is not None
        else "causal"
        if call.options.right == 0
        else "full"
    )
    return f"{name} {call.dtype} {call.widths[0]} {mask} {1 << (call.lengths[0] - 1).bit_length()}"


def supported(
    implementation: Name, q: Any, k: Any, v: Any, *, chip: str | None = None, **keywords: Any
) -> bool:
    """Whether an implementation can do a call of flash_attention (on `chip`, if given), as `choose`
    reads it; nothing is run.
    """
    return why_not(implementation, q, k, v, chip=chip, **keywords) is None


def why_not(
    implementation: Name, q: Any, k: Any, v: Any, *, chip: str | None = None, **keywords: Any
) -> str | None:
    """What keeps an implementation from doing a call of flash_attention (on `chip`, if given); None
    where nothing does.
    """
    return obstacle(implementation, describe(q, k, v, **keywords), chip)


def describe(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: Window | None = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    softcap: float | None = None,
    sinks: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Call:
    """What decides of a call's arguments. Raises ValueError where they do not agree."""
    check(q, k, v, sinks, q_segment_ids, kv_segment_ids, window, softcap, scale)
    return Call(
        q.dtype.name,
        q.shape[0],
        (q.shape[1], k.shape[1]),
        (k.shape[3], v.shape[3]),
        make_options(q, causal, window, softcap, scale),
        segments=q_segment_ids is not None,
        sinks=sinks is not None,
        offsets=not (
            isinstance(q_offset, int) and isinstance(kv_offset, int) and q_offset == kv_offset
        ),
        lse=return_lse,
    )


def obstacle(implementation: Name, call: Call, chip: str | None = None) -> str | None:
    """What keeps an implementation from doing a call (on `chip`, if given); None where nothing
    does.
    """
    if implementation != "reference" and not all(isinstance(x, int) for x in call.lengths):
        return f"it takes lengths that are numbers, not {call.lengths[0]} and {call.lengths[1]}"
    if implementation not in ("blockwise", "reference") and not isinstance(call.batch, int):
        return f"it takes a batch that is a number, not {call.batch}"
    if implementation == "tpu":
        return _obstacle_to_tpu(call, chip)
    if implementation == "hopper":
        return _obstacle_to_hopper(call, chip, widest=256)
    if implementation == "hopper_fused":
        return _obstacle_to_hopper(call, chip, widest=128)
    if implementation == "cudnn":
        return _obstacle_to_cudnn(call, chip)
    return None


def _obstacle_to_tpu(call: Call, chip: str | None) -> str | None:
    if chip is not None and not chip.startswith("TPU") and chip != "cpu":
        return f"it runs on TPUs, and interpreted on CPUs, not on {chip}"
    if call.dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 and float32, not {call.dtype}"
    return None


def _obstacle_to_hopper(call: Call, chip: str | None, widest: int) -> str | None:
    if chip is not None and not re.search(r"\b(H20|H100|H200|H800|GH200)\b", chip):
        return f"it runs on Hopper GPUs, not on {chip}"
    if call.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {call.dtype}"
    if max(call.widths) > widest:
        return f"it takes head widths of up to {widest}, not {max(call.widths)}"
    return None


def _obstacle_to_cudnn(call: Call, chip: str | None) -> str | None:
    if chip is not None and not chip.startswith("NVIDIA"):
        return f"it runs on NVIDIA GPUs, not on {chip}"
    if call.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {call.dtype}"
    if call.widths[0] != call.widths[1] or call.widths[0] > 128 or call.widths[0] % 8:
        return f"it takes one head width, a multiple of 8 up to 128, not {call.widths[0]} and {call.widths[1]}"
    if call.lengths[0] != call.lengths[1]:
        return f"it takes as many keys as queries, not {call.lengths[1]} and {call.lengths[0]}"
    if call.options.right != 0:
        return "it takes causal attention alone, for its windows that are not causal see later keys (jax #39576)"
    given = {"softcap": call.options.softcap is not None} | {
        name: getattr(call, name) for name in ("segments", "sinks", "offsets", "lse")
    }
    return next((f"it knows no {name}" for name, present in given.items() if present), None)


def make_options(
    q: Any, causal: bool, window: Window | None, softcap: float | None, scale: float | None
) -> Options:
    """The options of a call that `check` lets through, as plain numbers of Python."""
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return Options(*span(causal, window), None if softcap is None else float(softcap), scale)


def check(
    q: Any,
    k: Any,
    v: Any,
    sinks: Any,
    q_ids: Any,
    kv_ids: Any,
    window: Window | None,
    softcap: float | None = None,
    scale: float | None = None,
) -> None:
    """Raises ValueError, in one line, for arrays that do not make an attention, with their shapes,
    and for options that make no sense.
    """
    check_axes("q", q)
    _check_arrays(q, k, v, sinks, q_ids, kv_ids)
    if window is not None and not (
        isinstance(window, tuple | list) and len(window) == 2 and all(map(_is_distance, window))
    ):
        raise ValueError(
            f"window={window} must be two distances (left, right) of 0 or more, or None for no limit"
        )
    if softcap is not None and not _as_float32(softcap) > 0:
        raise ValueError(f"softcap={softcap} must be a finite number above 0, or None for no cap")
    if scale is not None and not abs(_as_float32(scale)) > 0:
        raise ValueError(
            f"scale={scale} must be a finite number other than 0, or None for 1 / sqrt(H)"
        )


def _is_distance(x: Any) -> bool:
    return x is None or (isinstance(x, numbers.Integral) and not isinstance(x, bool) and x >= 0)


def _as_float32(x: Any) -> float:
    """The number that a kernel computes with, and NaN for what is no finite number: a text,
    infinity, 1e39. Below 2**-126 it is 0.
    """
    float32 = np.finfo(np.float32)
    if (
        not isinstance(x, numbers.Real)
        or isinstance(x, bool)
        or not abs(float(x)) <= float(float32.max)
    ):
        return float("nan")
    return float(x) if abs(float(x)) >= float(float32.tiny) else 0.0


def _check_arrays(q: Any, k: Any, v: Any, sinks: Any, q_ids: Any, kv_ids: Any) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must be [B, T, N, H], [B, S, K, H] and [B, S, K, H]"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {q.shape} and k {k.shape} must have the same batch (B) and head width (H)"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k {k.shape} and v {v.shape} must have the same batch, length and heads (B, S, K)"
        )
    if k.shape[2] and q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {q.shape} has {q.shape[2]} heads, which are no multiple of the {k.shape[2]} of k {k.shape}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise ValueError(
            f"q {q.dtype}, k {k.dtype} and v {v.dtype} must have one dtype of {', '.join(DTYPES)}"
        )
    if 0 in (*q.shape[1:], *k.shape[1:], v.shape[3]):
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must have at least one token, one head and one number in a head"
        )
    if (q_ids is None) != (kv_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    if q_ids is not None and (q_ids.shape != q.shape[:2] or kv_ids.shape != k.shape[:2]):
        raise ValueError(
            f"q_segment_ids {q_ids.shape} and kv_segment_ids {kv_ids.shape} must be {q.shape[:2]} and {k.shape[:2]}"
        )
    if q_ids is not None and not {q_ids.dtype.kind, kv_ids.dtype.kind} <= set("iub"):
        raise ValueError(
            f"q_segment_ids {q_ids.dtype} and kv_segment_ids {kv_ids.dtype} must be integers"
        )
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(
            f"sinks {sinks.shape} must be {q.shape[2:3]}, one for each head of q {q.shape}"
        )
