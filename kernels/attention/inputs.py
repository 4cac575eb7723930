"""Defines the arguments of an attention, and checks that they agree.

Every implementation takes `Inputs`, the arrays, and `Options`, which are static. A `Request` is the
part of both that decides which implementations can compute the attention.
"""

import dataclasses
import numbers
from typing import Any, NamedTuple

import jax
import numpy as np

from moe.kernels.settings import check_axes

# How many keys before and after itself a query sees; None is no limit.
Window = tuple[int | None, int | None]

# A window that reaches farther is no limit, since no sequence is longer. With a larger limit the
# sums of a position and the limit would overflow int32.
FARTHEST = 2**30
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Inputs(NamedTuple):
    """The arrays that an attention is computed from."""

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array  # H of the values may differ from that of queries and keys
    sinks_N: jax.Array | None = None  # logits that take part in the softmax and carry no value
    q_segment_ids_BT: jax.Array | None = None
    kv_segment_ids_BS: jax.Array | None = None
    # The position of the first query less the position of the first key, an int32 that may be
    # traced. The mask depends on the positions through this difference alone.
    shift: jax.Array | int = 0

    @property
    def lengths(self) -> tuple[int, int]:
        """Returns the number of queries and of keys in a row (T, S)."""
        return self.q_BTNH.shape[1], self.k_BSKH.shape[1]

    @property
    def segment_ids(self) -> tuple[jax.Array | None, jax.Array | None]:
        return self.q_segment_ids_BT, self.kv_segment_ids_BS


class Gradients(NamedTuple):
    """The gradients of queries, keys and values, each of the shape of its array."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of an attention."""

    left: int | None  # a query sees at most this many keys before itself; None is no limit
    right: int | None  # and this many after itself; 0 makes the mask causal
    softcap: float | None
    scale: float
    # The results are parts that the caller adds up, so they are not rounded to the inputs' dtype.
    partial: bool = False

    def result_dtype(self, dtype: jax.typing.DTypeLike) -> np.dtype:
        """Returns the dtype of the output, and of the gradients, of arrays of `dtype`.

        Results have the dtype of the arrays. Partial results have the dtype in which sums are
        taken: float32, or float64 for float64 arrays.
        """
        return np.promote_types(dtype, np.float32) if self.partial else np.dtype(dtype)


@dataclasses.dataclass(frozen=True)
class Request:
    """What decides whether an implementation can compute an attention."""

    dtype: str
    batch: int  # this and the lengths may be symbolic, for jax.export
    lengths: tuple[int, int]  # T and S
    widths: tuple[int, int]  # H of queries and keys, and H of values
    options: Options
    segments: bool  # whether there are segment ids
    sinks: bool
    offsets: bool  # whether the first query and the first key may have different positions
    lse: bool  # whether the caller wants the log-sum-exp


def make_request(
    inputs: Inputs, options: Options, offsets: tuple[jax.Array | int, jax.Array | int], lse: bool
) -> Request:
    """Returns the request; `offsets` are the positions of the first query and the first key."""
    q_offset, kv_offset = offsets
    static = isinstance(q_offset, int) and isinstance(kv_offset, int)
    return Request(
        inputs.q_BTNH.dtype.name,
        inputs.q_BTNH.shape[0],
        inputs.lengths,
        (inputs.k_BSKH.shape[3], inputs.v_BSKH.shape[3]),
        options,
        segments=inputs.q_segment_ids_BT is not None,
        sinks=inputs.sinks_N is not None,
        offsets=not (static and q_offset == kv_offset),
        lse=lse,
    )


def make_options(
    width: int,
    causal: bool,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Options:
    """Returns the options as plain numbers of Python; `width` is H of queries and keys.

    Raises ValueError, in one line, for an option that makes no sense.
    """
    if window is not None and not (
        isinstance(window, tuple | list) and len(window) == 2 and all(map(_is_distance, window))
    ):
        raise ValueError(
            f"window={window} must be two distances (left, right) of 0 or more, "
            "or None for no limit"
        )
    if softcap is not None and not _as_float32(softcap) > 0:
        raise ValueError(f"softcap={softcap} must be a finite number above 0, or None for no cap")
    if scale is not None and not abs(_as_float32(scale)) > 0:
        raise ValueError(
            f"scale={scale} must be a finite number other than 0, or None for 1 / sqrt(H)"
        )
    left, right = visible_span(causal, window)
    return Options(
        left,
        right,
        None if softcap is None else float(softcap),
        width**-0.5 if scale is None else float(scale),
    )


def visible_span(causal: bool, window: Window | None) -> Window:
    """Returns how many keys before and after itself a query sees."""
    limits = (None, None) if window is None else window
    left, right = (None if x is None or x > FARTHEST else int(x) for x in limits)
    return left, 0 if causal else right


def _is_distance(x: Any) -> bool:
    is_integer = isinstance(x, numbers.Integral) and not isinstance(x, bool)
    return x is None or (is_integer and int(x) >= 0)


def _as_float32(x: Any) -> float:
    """Returns the number that a kernel would compute with.

    It is NaN for anything that is not a finite float32, such as a text, infinity or 1e39, and 0 for
    a number whose size is below 2**-126.
    """
    float32 = np.finfo(np.float32)
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        return float("nan")
    size = abs(float(x))
    if not size <= float(float32.max):
        return float("nan")
    return float(x) if size >= float(float32.tiny) else 0.0


def check_inputs(inputs: Inputs) -> None:
    """Raises ValueError, in one line with the shapes, for arrays that make no attention."""
    q, k, v, sinks = inputs[:4]
    check_axes("q", q)
    _check_shapes(q, k, v)
    _check_segment_ids(q, k, *inputs.segment_ids)
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(
            f"sinks {sinks.shape} must be {q.shape[2:3]}, one for each head of q {q.shape}"
        )


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes} must be [B, T, N, H], [B, S, K, H] and [B, S, K, H]")
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
            f"q {q.shape} has {q.shape[2]} heads, "
            f"which are no multiple of the {k.shape[2]} of k {k.shape}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        dtypes = f"q {q.dtype}, k {k.dtype} and v {v.dtype}"
        raise ValueError(f"{dtypes} must have one dtype of {', '.join(DTYPES)}")
    if 0 in (*q.shape[1:], *k.shape[1:], v.shape[3]):
        raise ValueError(
            f"{shapes} must have at least one token, one head and one number in a head"
        )


def _check_segment_ids(
    q: jax.Array, k: jax.Array, q_ids: jax.Array | None, kv_ids: jax.Array | None
) -> None:
    if (q_ids is None) != (kv_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    if q_ids is None or kv_ids is None:
        return
    if q_ids.shape != q.shape[:2] or kv_ids.shape != k.shape[:2]:
        raise ValueError(
            f"q_segment_ids {q_ids.shape} and kv_segment_ids {kv_ids.shape} "
            f"must be {q.shape[:2]} and {k.shape[:2]}"
        )
    if not {q_ids.dtype.kind, kv_ids.dtype.kind} <= set("iub"):
        raise ValueError(
            f"q_segment_ids {q_ids.dtype} and kv_segment_ids {kv_ids.dtype} must be integers"
        )
