"""Checks attention to a cache: its numbers, the slots that it reads, its steps, and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels.attention import decode, decode_attention, flash_attention

compiled_decode = jax.jit(decode_attention, static_argnames="window")


def expected(q, k, v, positions, window=None, softcap=None, sinks=None):
    """The equations of docs/kernels.md, one query at a time, in float64."""
    group, output = q.shape[2] // k.shape[2], np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, n in np.ndindex(q.shape[:3]):
        end = positions[b, t] + 1
        first = 0 if window is None else max(0, end - 1 - window[0])
        logits = k[b, first:end, n // group] @ q[b, t, n] * q.shape[3] ** -0.5
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        weights, sink = np.exp(logits), 0 if sinks is None else np.exp(sinks[n])
        if end:
            output[b, t, n] = weights @ v[b, first:end, n // group] / (weights.sum() + sink)
    return output


def random_call(seed: int):
    """Returns a random call's arrays in float64, its positions and its keywords.

    Each option is present or absent, no step divides the cache, and some rows see nothing.
    """
    rng = np.random.default_rng(seed)
    flip_coin = lambda: bool(rng.integers(2))
    batch, kv_heads, group, slots = (int(rng.integers(1, top)) for top in (4, 4, 4, 600))
    length, width = int(rng.choice([1, 3])), int(rng.choice([8, 64]))
    value_width = width if flip_coin() else 16
    slots = max(slots, length)
    shapes = (
        (batch, length, kv_heads * group, width),
        (batch, slots, kv_heads, width),
        (batch, slots, kv_heads, value_width),
    )
    positions = (
        rng.integers(-1, slots, (batch, length))
        if flip_coin()
        else slots - length + np.tile(np.arange(length), (batch, 1))
    )
    positions = np.maximum(positions, -1)
    keywords = {"window": (int(rng.integers(200)), 0)} if flip_coin() else {}
    keywords |= {"softcap": float(rng.choice([5.0, 30.0]))} if flip_coin() else {}
    keywords |= {"sinks": rng.normal(size=kv_heads * group)} if flip_coin() else {}
    return tuple(rng.normal(size=shape) for shape in shapes), positions, keywords


@pytest.mark.parametrize(
    ("seed", "dtype"),
    [
        pytest.param(seed, dtype, marks=pytest.mark.exhaustive if (seed + i) % 2 else ())
        for seed in range(12)
        for i, dtype in enumerate(("float32", "bfloat16"))
    ],
)
def test_numerics(seed, dtype, monkeypatch):
    monkeypatch.setattr(decode, "BLOCK", 16)  # so that short caches take several steps
    arrays, positions, keywords = random_call(seed)
    arrays = [
        np.asarray(jnp.asarray(x, dtype), np.float64) for x in arrays
    ]  # their own rounding is no error
    # Compiled here, since a program that is shared would keep its block.
    compiled = jax.jit(functools.partial(decode_attention, **keywords))
    output = compiled(*(jnp.asarray(x, dtype) for x in arrays), jnp.asarray(positions))
    assert output.dtype == dtype
    right = expected(*arrays, positions, **keywords)
    np.testing.assert_allclose(
        np.asarray(output, np.float64),
        right,
        rtol=0,
        atol=np.abs(right).max() * 8 * jnp.finfo(dtype).eps,
    )


def test_the_last_queries_of_a_sequence_are_those_of_flash_attention():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.normal(size=(2, 300, heads, 16))) for heads in (4, 2, 2))
    keywords = {
        "window": (100, 0),
        "softcap": 20.0,
        "sinks": jnp.float32(rng.normal(size=4)),
        "scale": 0.3,
    }
    whole = jax.jit(functools.partial(flash_attention, causal=True, **keywords))(q, k, v)
    decode_last = jax.jit(functools.partial(decode_attention, **keywords))
    for last in (1, 3):
        positions = jnp.broadcast_to(jnp.arange(300 - last, 300), (2, last))
        np.testing.assert_allclose(
            decode_last(q[:, -last:], k, v, positions),
            whole[:, -last:],
            rtol=0,
            atol=1e-5,
        )


def test_of_several_layers_one_is_read():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.float32(rng.normal(size=shape))
        for shape in ((2, 1, 4, 8), (3, 2, 40, 2, 8), (3, 2, 40, 2, 8))
    )
    positions = jnp.array([[39], [7]])
    for layer in range(3):
        others = jnp.arange(3)[:, None, None, None, None] != layer
        output = compiled_decode(
            q, *(jnp.where(others, jnp.nan, x) for x in (k, v)), positions, layer=layer
        )
        np.testing.assert_allclose(
            output, compiled_decode(q, k[layer], v[layer], positions), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_slots_that_a_row_does_not_see_may_hold_anything(value):
    """So do slots that a step reads: after a row's last position, and before its window."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape) for shape in ((2, 1, 4, 8), (2, 50, 2, 8), (2, 50, 2, 8)))
    positions, window = np.array([[7], [31]]), (9, 0)
    right = expected(q, k, v, positions, window)
    slot = np.arange(50)[None, :, None, None]
    hidden = (slot > positions[..., None, None]) | (slot < positions[..., None, None] - window[0])
    k, v = (np.where(hidden, value, x) for x in (k, v))
    arrays = (jnp.float32(x) for x in (q, k, v))
    output = compiled_decode(*arrays, jnp.array(positions), window=window)
    np.testing.assert_allclose(output, right, rtol=0, atol=1e-5)


def test_a_query_beyond_the_cache_gives_nan():
    """Such a query has no slot for its own key, so any number would be a wrong answer.

    Other queries are not changed.
    """
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.float32(rng.normal(size=shape))
        for shape in ((3, 1, 4, 8), (3, 20, 2, 8), (3, 20, 2, 8))
    )
    inside = compiled_decode(q, k, v, jnp.array([[3], [19], [19]]))
    output = compiled_decode(q, k, v, jnp.array([[3], [20], [10**6]]))
    np.testing.assert_allclose(output[0], inside[0], rtol=0, atol=1e-5)
    assert np.isnan(output[1:]).all()


@pytest.mark.parametrize("slots", [4096, 4096 + 77])
@pytest.mark.parametrize(
    ("positions", "window", "steps"),
    [
        ([0, 0], None, (0, 1)),
        ([255, 3], None, (0, 1)),
        ([3, 256], None, (0, 2)),
        ([700, 900], (100, 0), (2, 4)),
        ([-1, -1], None, (0, 0)),
    ],
)
def test_steps_beyond_the_rows_are_not_taken(slots, positions, window, steps, monkeypatch):
    """Puts NaN into all slots outside the steps of 256 that a query needs, and counts the steps."""
    taken = []
    loop = jax.lax.fori_loop

    def counted(first, end, body, carry):
        return loop(
            first, end, lambda step, carry: (taken.append(int(step)), body(step, carry))[1], carry
        )

    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=shape) for shape in ((2, 1, 4, 8), (2, slots, 2, 8), (2, slots, 2, 8))
    )
    positions = np.array(positions)[:, None]
    right = expected(q, k, v, positions, window)
    first, end = (256 * step for step in steps)
    k[:, :first], k[:, end:], v[:, :first], v[:, end:] = np.nan, np.nan, np.nan, np.nan
    arrays = [jnp.float32(x) for x in (q, k, v)]
    output = compiled_decode(*arrays, positions, window=window)
    np.testing.assert_allclose(output, right, atol=1e-5)
    monkeypatch.setattr(jax.lax, "fori_loop", counted)
    with jax.disable_jit():
        decode_attention(*arrays, jnp.array(positions), window=window)
    assert taken == list(range(*steps))


def test_a_long_cache_has_more_splits_rather_than_more_steps():
    """The jaxpr shows that a step computes the logits of S / 16 slots, so 16 steps suffice."""
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((1, 1, 8, 64), (1, 131_072, 2, 64), (1, 131_072, 2, 64))
    ]
    program = str(
        jax.make_jaxpr(decode_attention)(*shapes, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    )
    assert "f32[1,128,2,4,64]" in program


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_a_step(dtype):
    """No key is repeated for the 32 heads that share it, and no cache copied or converted."""

    def temporary_bytes(slots):
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape in ((1, 1, 64, 64), (1, slots, 2, 64), (1, slots, 2, 64))
        ]
        compiled = (
            jax.jit(decode_attention)
            .lower(*shapes, jax.ShapeDtypeStruct((1, 1), jnp.int32))
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1024) < 4 * (256 * 2 * 64 * 4)  # keys of one step in float32
    assert temporary_bytes(65_536) < 4 * (4096 * 2 * 64 * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (1, 4, 16)}, "must be"),
        ({"k": (2, 8, 2, 16)}, r"q \(1, 1, 4, 16\) and k \(2, 8, 2, 16\) must have the same batch"),
        (
            {"v": (1, 9, 2, 16)},
            r"k \(1, 8, 2, 16\) and v \(1, 9, 2, 16\) must have the same batch, length and heads",
        ),
        ({"k": (1, 8, 3, 16), "v": (1, 8, 3, 16)}, "has 4 heads, which are no multiple of the 3"),
        ({"positions": (1,)}, r"positions \(1,\) must be \(1, 1\)"),
        ({"window": (-1, 0)}, "0 or more"),
        ({"softcap": 0.0}, "softcap=0.0 must be a finite number above 0"),
        (
            {"q": (1, 9, 4, 16), "positions": (1, 9)},
            r"q \(1, 9, 4, 16\) has 9 queries a row and the cache 8 slots",
        ),
        (
            {"layer": 3, "k": (3, 1, 8, 2, 16), "v": (3, 1, 8, 2, 16)},
            "layer=3 must be at least 0 and less than 3",
        ),
        ({"layer": -1, "k": (3, 1, 8, 2, 16), "v": (3, 1, 8, 2, 16)}, "layer=-1 must be"),
        ({"scale": float("nan")}, "scale=nan must be a finite number other than 0"),
        ({"sinks": (3,)}, r"sinks \(3,\) must be \(4,\)"),
    ],
)
def test_bad_input_is_told_in_a_line(changes, message):
    shapes = {"q": (1, 1, 4, 16), "k": (1, 8, 2, 16), "v": (1, 8, 2, 16), "positions": (1, 1)}
    keywords = {
        name: jnp.zeros(x) if name == "sinks" else x
        for name, x in changes.items()
        if name not in shapes
    }
    arrays = {
        name: jnp.zeros(changes.get(name, shape), int if name == "positions" else float)
        for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=message) as raised:
        decode_attention(*arrays.values(), **keywords)
    assert "\n" not in str(raised.value)
