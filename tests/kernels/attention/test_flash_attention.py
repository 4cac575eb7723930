"""Checks attention by hand and in float64, the blocks that it visits, its memory, and errors.

test_implementations.py holds every implementation against float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels.attention import Choice, flash_attention
from moe.kernels.attention.inputs import Options, visible_span
from moe.kernels.attention.masks import full_key_blocks, key_blocks, make_mask
from tests.kernels.attention.cases import SMALL, evaluate, expected, flash, random_case


@pytest.mark.parametrize("seed", range(5))
def test_the_reference_and_blockwise_in_float64(seed):
    """This also checks `expected`, on which the other tests rely, against the reference."""
    case = random_case(seed, longest=200)
    for implementation in ("reference", Choice("blockwise", SMALL)):
        with jax.enable_x64(True):
            values = evaluate(functools.partial(flash, implementation), case, "float64")
        for value, right in zip(values, expected(case)[0], strict=True):
            np.testing.assert_allclose(value, right, rtol=1e-9, atol=1e-9)


def test_two_queries_by_hand():
    """Scores of 0 and ln 3 give weights 1/4 and 3/4; with a sink of ln 4 they are 1/8 and 3/8.

    Tolerances are 8 units of rounding of the largest terms, 8 and ln 8.
    """
    q = jnp.array([[[[1.0]], [[1.0]]]])
    k, v = jnp.array([[[[0.0]], [[np.log(3.0)]]]]), jnp.array([[[[4.0]], [[8.0]]]])
    output, lse = flash_attention(q, k, v, causal=True, scale=1.0, return_lse=True)
    np.testing.assert_allclose(output[0, :, 0, 0], [4.0, 7.0], rtol=0, atol=8e-6)
    np.testing.assert_allclose(lse[0, :, 0], np.log([1.0, 4.0]), rtol=0, atol=4e-6)
    output, lse = flash_attention(
        q, k, v, causal=True, scale=1.0, sinks=jnp.log(jnp.array([4.0])), return_lse=True
    )
    np.testing.assert_allclose(output[0, :, 0, 0], [0.8, 3.5], rtol=0, atol=8e-6)
    np.testing.assert_allclose(lse[0, :, 0], np.log([5.0, 8.0]), rtol=0, atol=4e-6)


def test_a_query_that_sees_nothing_gives_nothing():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.normal(size=(1, 5, 2, 8))) for _ in range(3))
    ids = jnp.array([[0, 0, 7, 1, 1]]), jnp.array([[0, 0, 2, 1, 1]])
    call = lambda q, k, v: flash_attention(
        q, k, v, q_segment_ids=ids[0], kv_segment_ids=ids[1], return_lse=True
    )
    (output, lse), pull_back = jax.vjp(jax.jit(call), q, k, v)
    assert not output[0, 2].any() and np.isneginf(lse[0, 2]).all()
    gradients = pull_back((jnp.ones_like(output), jnp.ones_like(lse)))
    assert all(np.isfinite(x).all() for x in gradients)
    assert (
        not gradients[0][0, 2].any()
        and not gradients[1][0, 2].any()
        and not gradients[2][0, 2].any()
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_blocks_visited_are_those_that_the_mask_leaves(seed):
    """It compares the range of blocks with the mask itself, for documents in a row."""
    rng = np.random.default_rng(seed)
    length, q_block, kv_block = (
        int(rng.integers(1, 400)),
        *(int(x) for x in rng.choice([8, 16, 64], 2)),
    )
    options = Options(
        *visible_span(
            bool(rng.integers(2)),
            (int(rng.integers(90)), int(rng.integers(90))) if rng.integers(2) else None,
        ),
        None,
        1.0,
    )
    ids = np.sort(rng.integers(0, 5, (2, length)), axis=1) if rng.integers(2) else None
    pair = (None, None) if ids is None else (jnp.array(ids),) * 2

    @jax.jit
    def mask_and_blocks(*pair):
        seen = make_mask(options, jnp.arange(length), jnp.arange(length), *pair)
        return seen, key_blocks(options, 0, (length, length), (q_block, kv_block), *pair)

    seen, (first, end) = mask_and_blocks(*pair)
    seen = np.broadcast_to(True if seen is None else seen, (2, length, length))
    padded = np.pad(seen, ((0, 0), (0, -length % q_block), (0, -length % kv_block)))
    blocks = padded.reshape(2, padded.shape[1] // q_block, q_block, -1, kv_block).any(axis=(2, 4))
    block = np.arange(blocks.shape[-1])
    np.testing.assert_array_equal(
        (block >= np.asarray(first)[..., None]) & (block < np.asarray(end)[..., None])
        | np.zeros_like(blocks),
        blocks,
    )


@pytest.mark.parametrize("seed", range(12))
def test_full_blocks_are_whole_and_seen_by_every_query(seed):
    """A kernel visits them without a mask. Under a causal mask alone, they are all such blocks."""
    rng = np.random.default_rng(seed)
    length, (q_block, kv_block) = (
        int(rng.integers(64, 300)),
        (int(x) for x in rng.choice([8, 16, 32], 2)),
    )
    options = Options(
        *visible_span(True, (int(rng.integers(20, 200)), 0) if seed % 3 == 1 else None), None, 1.0
    )
    ids = jnp.array(np.sort(rng.integers(0, 3, (2, length)), axis=1)) if seed % 3 == 2 else None
    sizes, pair = (
        ((length, length), (q_block, kv_block)),
        (None, None) if ids is None else (ids, ids),
    )

    @jax.jit
    def mask_and_blocks(*pair):
        seen = make_mask(options, jnp.arange(length), jnp.arange(length), *pair)
        blocks = key_blocks(options, 0, *sizes, *pair)
        return seen, full_key_blocks(options, 0, *sizes, blocks, *pair)

    seen, (begin, stop) = mask_and_blocks(*pair)
    seen = np.broadcast_to(seen, (2, length, length))
    # Queries that are only padding see what they like; keys that are padding must be masked.
    padded = np.pad(seen, ((0, 0), (0, -length % q_block), (0, 0)), constant_values=True)
    padded = np.pad(padded, ((0, 0), (0, 0), (0, -length % kv_block)))
    whole = padded.reshape(2, padded.shape[1] // q_block, q_block, -1, kv_block).all(axis=(2, 4))
    block = np.arange(whole.shape[-1])
    full = (block >= np.asarray(begin)[..., None]) & (
        block < np.asarray(stop)[..., None]
    ) | np.zeros_like(whole)
    assert not (full & ~whole).any() and full.any() == whole.any()
    if seed % 3 == 0:
        np.testing.assert_array_equal(full, whole)


def test_memory_grows_linearly():
    def temporary_bytes(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
        gradient = jax.grad(lambda q: jnp.sum(flash_attention(q, q, q, causal=True)))
        return jax.jit(gradient).lower(q).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(65_536) < 17 * temporary_bytes(4096)


def test_under_vmap_remat_and_scan():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.normal(size=(3, 2, 40, 2, 8))) for _ in range(3))
    call = functools.partial(
        flash_attention, causal=True, window=(20, 0), implementation="blockwise"
    )
    gradient = jax.jit(jax.grad(lambda *qkv: jnp.sum(jnp.sin(call(*qkv))), range(3)))
    one_by_one = [
        jnp.stack(x)
        for x in zip(*(gradient(*(x[i] for x in (q, k, v))) for i in range(3)), strict=True)
    ]
    scanned = jax.lax.scan(
        lambda _, qkv: (
            None,
            jax.grad(lambda *x: jnp.sum(jnp.sin(jax.remat(call)(*x))), range(3))(*qkv),
        ),
        None,
        (q, k, v),
    )[1]
    for right, *others in zip(one_by_one, jax.vmap(gradient)(q, k, v), scanned, strict=True):
        for other in others:
            np.testing.assert_allclose(other, right, rtol=0, atol=1e-5)


X = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (2, 8, 2, 16)}, r"q \(1, 8, 4, 16\) and k \(2, 8, 2, 16\) must have the same batch"),
        ({"k": (1, 8, 2, 8)}, "must have the same batch"),
        (
            {"v": (1, 9, 2, 16)},
            r"k \(1, 8, 2, 16\) and v \(1, 9, 2, 16\) must have the same batch, length and heads",
        ),
        ({"k": (1, 8, 3, 16), "v": (1, 8, 3, 16)}, "has 4 heads, which are no multiple of the 3"),
        ({"v": (8, 2, 16)}, "must be"),
        (
            {"window": (-1, 0)},
            r"window=\(-1, 0\) must be two distances \(left, right\) of 0 or more, or None",
        ),
        ({"window": (3,)}, "0 or more"),
        ({"window": (0.5, 0)}, "0 or more"),
        ({"window": 4}, "0 or more"),
        ({"softcap": 0.0}, "softcap=0.0 must be a finite number above 0, or None"),
        ({"softcap": -1.0}, "softcap=-1.0 must be"),
        ({"softcap": np.nan}, "softcap=nan must be"),
        ({"softcap": np.inf}, "softcap=inf must be"),
        ({"softcap": 1e39}, r"softcap=1e\+39 must be"),
        ({"softcap": 1e-46}, "softcap=1e-46 must be"),
        ({"softcap": "5"}, "softcap=5 must be"),
        ({"scale": 0.0}, "scale=0.0 must be a finite number other than 0, or None"),
        ({"scale": np.nan}, "scale=nan must be"),
        ({"scale": -np.inf}, "scale=-inf must be"),
        ({"q": (1, 0, 4, 16)}, "must have at least one token"),
        ({"k": (1, 0, 2, 16), "v": (1, 0, 2, 16)}, "must have at least one token"),
        ({"k": (1, 8, 0, 16), "v": (1, 8, 0, 16)}, "must have at least one token, one head"),
        ({"q": (1, 8, 4, 0), "k": (1, 8, 2, 0)}, "one number in a head"),
        ({"q_segment_ids": (1, 8)}, "must be given together"),
        (
            {"q_segment_ids": (1, 8), "kv_segment_ids": (1, 7)},
            r"kv_segment_ids \(1, 7\) must be \(1, 8\) and \(1, 8\)",
        ),
        ({"sinks": (3,)}, r"sinks \(3,\) must be \(4,\)"),
        ({"dtype": jnp.int32}, "must have one dtype of bfloat16, float16, float32, float64"),
    ],
)
def test_bad_input_is_told_in_a_line(changes, message):
    dtype = changes.pop("dtype", jnp.float32)
    shapes = {"q": (1, 8, 4, 16), "k": (1, 8, 2, 16), "v": (1, 8, 2, 16)} | {
        name: x for name, x in changes.items() if name in "qkv"
    }
    keywords = {name: x for name, x in changes.items() if name not in shapes}
    is_static = {"window", "softcap", "scale"}.__contains__
    arrays = {
        name: x if is_static(name) else jnp.zeros(x, jnp.int32 if "ids" in name else dtype)
        for name, x in keywords.items()
    }
    with pytest.raises(ValueError, match=message) as raised:
        flash_attention(*(jnp.zeros(shape, dtype) for shape in shapes.values()), **arrays)
    assert "\n" not in str(raised.value)


def test_ids_that_are_no_integers_are_refused():
    q, ids = jnp.zeros((1, 8, 2, 16)), jnp.zeros((1, 8))
    with pytest.raises(
        ValueError, match="q_segment_ids float32 and kv_segment_ids float32 must be integers"
    ):
        flash_attention(q, q, q, q_segment_ids=ids, kv_segment_ids=ids)
