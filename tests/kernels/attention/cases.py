"""Makes the cases that every implementation of attention is tested on, and checks them.

A case is a random call over all options and odd shapes. `expected` computes its results in float64,
and `xla` computes the same formula in XLA, whose error is the yardstick.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention import Choice, choice, flash_attention

SMALL = (128, 128)  # so that short sequences have several blocks


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of a call in float64, and the gradients of its results."""

    arrays: tuple[Any, ...]  # q, k, v, and sinks or None
    gradients: tuple[np.ndarray, np.ndarray]  # of the output and of the lse
    keywords: dict[str, Any]  # of flash_attention

    def __str__(self) -> str:
        q, k, v, sinks = self.arrays
        names = {name: value for name, value in self.keywords.items() if "ids" not in name}
        has_ids = "q_segment_ids" in self.keywords
        shapes = f"q {q.shape} k {k.shape} v {v.shape[-1]}"
        return f"{shapes} sinks {sinks is not None} ids {has_ids} {names}"


def random_case(seed: int, longest: int = 700) -> Case:
    """Returns a random case, with each option present or absent.

    No block divides its lengths. There are queries that see nothing, and ids that rise along a row
    as well as ids that do not.
    """
    rng = np.random.default_rng(seed)
    flip_coin = lambda: bool(rng.integers(2))
    batch, length, kv_heads, group = (int(rng.integers(1, top)) for top in (3, longest, 3, 4))
    kv_length = length if flip_coin() else int(rng.integers(1, 2 * longest))
    width = int(rng.choice([64, 80, 96, 128, 192, 256]))
    value_width = width if flip_coin() else 64
    shapes = (
        (batch, length, kv_heads * group, width),
        (batch, kv_length, kv_heads, width),
        (batch, kv_length, kv_heads, value_width),
    )
    keywords: dict[str, Any] = {"causal": flip_coin()}
    if flip_coin():
        keywords["window"] = tuple(int(x) for x in rng.integers(0, 300, 2))
    if flip_coin():
        keywords["softcap"] = float(rng.choice([5.0, 30.0]))
    if flip_coin():
        keywords["q_offset"], keywords["kv_offset"] = (int(x) for x in rng.integers(0, 400, 2))
    if flip_coin():
        ids = [rng.integers(0, 4, (batch, size)).astype(np.int32) for size in (length, kv_length)]
        if flip_coin():
            ids = [np.sort(x, axis=1) for x in ids]
        keywords["q_segment_ids"], keywords["kv_segment_ids"] = (
            (ids[0], ids[0]) if length == kv_length else ids
        )
    arrays = (
        *(rng.normal(size=shape) for shape in shapes),
        rng.normal(size=shapes[0][2]) if flip_coin() else None,
    )
    gradients = rng.normal(size=(*shapes[0][:3], value_width)), rng.normal(size=shapes[0][:3])
    return Case(arrays, gradients, keywords)


def evaluate(attention: Callable[..., Any], case: Case, dtype: str) -> list[np.ndarray]:
    """Returns output, lse and the gradients of q, k, v and sinks in `dtype`.

    `attention(q, k, v, sinks, **keywords)` returns (output, lse).
    """
    float_type = "float64" if dtype == "float64" else "float32"
    arrays = [
        None if x is None else jnp.asarray(x, float_type if x.ndim == 1 else dtype)
        for x in case.arrays
    ]
    # A query that sees nothing, not even a sink, has an lse of minus infinity. This lse has no
    # gradient.
    finite = mask(case).any(axis=-1, keepdims=True) | (case.arrays[3] is not None)
    g, dlse = (
        jnp.asarray(case.gradients[0], dtype),
        np.where(finite, case.gradients[1], 0).astype(float_type),
    )

    @jax.jit
    def values_and_gradients(*arrays: Any) -> tuple[Any, ...]:
        results, pull_back = jax.vjp(lambda *arrays: attention(*arrays, **case.keywords), *arrays)
        return *results, *(x for x in pull_back((g, jnp.asarray(dlse))) if x is not None)

    return [np.asarray(x, np.float64) for x in values_and_gradients(*arrays)]


def expected(case: Case) -> tuple[list[np.ndarray], list[float]]:
    """Returns what `evaluate` should return, and the size to which each rounding error is relative.

    The results follow the equations of docs/kernels.md in float64. A size is the root mean square
    of a result. The gradient of a sink is a sum over all queries, whose terms may cancel, so its
    size is that of the terms.
    """
    q, k, v, sinks = case.arrays
    (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
    g, dlse = case.gradients
    k_N, v_N = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    seen = np.broadcast_to(mask(case)[:, None], (batch, heads, length, k.shape[1]))
    scores = np.einsum("btnh,bsnh->bnts", q, k_N) * width**-0.5
    softcap = case.keywords.get("softcap")
    capped = scores if softcap is None else softcap * np.tanh(scores / softcap)
    slope = 1 if softcap is None else 1 - (capped / softcap) ** 2
    sink_logits = np.full(heads, -np.inf) if sinks is None else sinks
    with np.errstate(divide="ignore"):
        lse = np.log(
            np.sum(np.exp(capped) * seen, axis=-1) + np.exp(sink_logits)[:, None]
        )  # [B, N, T]
    base = np.where(np.isfinite(lse), lse, 0)[..., None]
    probs = np.exp(capped - base) * seen
    output = np.einsum("bnts,bsnh->btnh", probs, v_N)
    dlse = np.where(np.isfinite(lse), dlse.swapaxes(1, 2), 0)[..., None]
    delta = np.sum(output * g, axis=-1).swapaxes(1, 2)[..., None] - dlse
    dscores = probs * (np.einsum("btnh,bsnh->bnts", g, v_N) - delta) * slope * width**-0.5
    by_group = lambda x: x.reshape(*k.shape[:3], -1, x.shape[-1]).sum(axis=3)
    gradients = [
        np.einsum("bnts,bsnh->btnh", dscores, k_N),
        by_group(np.einsum("bnts,btnh->bsnh", dscores, q)),
        by_group(np.einsum("bnts,btnh->bsnh", probs, g)),
    ]
    values = [output, lse.swapaxes(1, 2), *gradients]
    sizes = [float(np.sqrt(np.mean(np.where(np.isfinite(x), x, 0) ** 2))) for x in values]
    if sinks is not None:
        terms = -np.exp(sinks[:, None, None] - base) * delta
        values.append(np.sum(terms, axis=(0, 2, 3)))
        sizes.append(float(np.sqrt(np.mean(np.sum(np.abs(terms), axis=(0, 2, 3)) ** 2))))
    return values, sizes


def mask(case: Case) -> np.ndarray:
    """Returns whether each query sees each key, [B, T, S]."""
    (batch, length), kv_length, keywords = (
        case.arrays[0].shape[:2],
        case.arrays[1].shape[1],
        case.keywords,
    )
    distance = (
        np.arange(kv_length)
        + keywords.get("kv_offset", 0)
        - (np.arange(length) + keywords.get("q_offset", 0))[:, None]
    )
    left, right = (np.inf if x is None else x for x in keywords.get("window", (None, None)))
    seen = np.broadcast_to(
        (distance >= -left) & (distance <= (0 if keywords["causal"] else right)),
        (batch, length, kv_length),
    )
    if "q_segment_ids" in keywords:
        seen = seen & (keywords["q_segment_ids"][:, :, None] == keywords["kv_segment_ids"][:, None])
    return seen


def xla(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, seen: jax.Array, softcap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Computes what jax.nn.dot_product_attention does, with softcap and sinks, in its precision.

    Scores are float32, and probabilities are rounded to the dtype of the values.
    """
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    logits = (
        jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
        * q.shape[3] ** -0.5
    )
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(seen[:, None, None], logits, jnp.finfo(jnp.float32).min)
    sink = jnp.full(q.shape[2], -jnp.inf) if sinks is None else sinks
    sink = jnp.broadcast_to(sink.reshape(k.shape[2], -1, 1, 1), (*logits.shape[:-1], 1))
    logits = jnp.concatenate([logits, sink], axis=-1)
    probs = (
        jax.nn.softmax(logits, axis=-1)[..., :-1].astype(v.dtype)
        * jnp.any(seen, axis=-1)[:, None, None, :, None]
    )
    output = jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(*q.shape[:3], -1)
    lse = jnp.moveaxis(jax.nn.logsumexp(logits, axis=-1), 3, 1).reshape(q.shape[:3])
    nothing = ~jnp.any(seen, axis=-1, keepdims=True) & (sinks is None)
    return output, jnp.where(nothing, -jnp.inf, lse)


def able_dtypes(name: str, case: Case, chip: str) -> list[str]:
    """Returns the dtypes in which an implementation can do a case on a chip."""
    able = []
    for dtype in ("float32", "bfloat16", "float16"):
        shapes = [None if x is None else jax.ShapeDtypeStruct(x.shape, dtype) for x in case.arrays]
        keywords = {**case.keywords, "sinks": shapes.pop(), "return_lse": True}
        if choice.why_not(name, *shapes, chip=chip, **keywords) is None:
            able.append(dtype)
    return able


def check_seed(name: str, seed: int, chip: str, *, blocks: Any = SMALL, longest: int = 300) -> bool:
    """Checks a random case in one dtype; returns False if the implementation cannot do it."""
    case = random_case(seed, longest)
    dtypes = able_dtypes(name, case, chip)
    if dtypes:
        check_numerics(case, Choice(name, blocks), dtypes[seed % len(dtypes)])
    return bool(dtypes)


def error(values: list[np.ndarray], expected_values: list[np.ndarray]) -> list[float]:
    """Returns root mean square differences; both must be infinite at the same places."""
    for value, right in zip(values, expected_values, strict=True):
        np.testing.assert_array_equal(np.isfinite(value), np.isfinite(right))
    finite = lambda x: np.where(np.isfinite(x), x, 0)
    return [
        float(np.sqrt(np.mean((finite(x) - finite(y)) ** 2)))
        for x, y in zip(values, expected_values, strict=True)
    ]


def flash(implementation, q, k, v, sinks, **keywords):
    return flash_attention(
        q, k, v, sinks=sinks, return_lse=True, implementation=implementation, **keywords
    )


def check_numerics(case: Case, implementation: Choice, dtype: str) -> None:
    """Checks that errors from float64 are at most twice those of the same formula in XLA."""

    def plain(q, k, v, sinks, **keywords):
        # Without the barrier XLA would compute with the mask while it compiles.
        seen = jax.lax.optimization_barrier(jnp.asarray(mask(case)))
        return xla(q, k, v, sinks, seen, keywords.get("softcap"))

    expected_values, sizes = expected(case)
    errors, xla_errors = (
        error(evaluate(attention, case, dtype), expected_values)
        for attention in (functools.partial(flash, implementation), plain)
    )
    # The rounding of the results themselves is no error of either; nor, in float32, is that of a
    # log-sum-exp of up to 8.
    rounding = float(jnp.finfo(dtype).eps) * (8 if dtype == "float32" else 1)
    for error_of_ours, xla_error, size in zip(errors, xla_errors, sizes, strict=True):
        assert error_of_ours <= 2 * max(xla_error, rounding * size), (str(case), errors, xla_errors)
