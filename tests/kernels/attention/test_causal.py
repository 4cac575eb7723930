"""Causal attention in blocks of queries and its gradients against the plain formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels.attention import causal


def inputs(batch=2, length=70, heads=4, kv_heads=2, width=8):
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(2, batch, length, heads, width))
    k, v = rng.normal(size=(2, batch, length, kv_heads, width))
    segments = np.cumsum(rng.random((batch, length)) < 0.05, axis=1)
    return q, k, v, segments, g


def plain(q, k, v, segments):
    """The formula, in whatever precision its inputs have."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    seen = (segments[:, :, None] == segments[:, None, :]) & np.tril(np.ones(scores.shape[-2:], bool))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf)), v)


def output_and_gradients(attention, q, k, v, segments, g):
    output, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, segments), q, k, v)
    return output, *pullback(g.astype(output.dtype))


@pytest.mark.parametrize("block", [16, 35, 64, 70, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_plain_formula_in_float64(monkeypatch, block, kv_heads):
    monkeypatch.setattr(causal, "BLOCK", block)
    q, k, v, segments, g = inputs(kv_heads=kv_heads)
    with jax.enable_x64(True):
        expected = output_and_gradients(plain, *map(jnp.asarray, (q, k, v, segments, g)))
    got = output_and_gradients(causal.causal_attention, *(jnp.float32(x) for x in (q, k, v)), jnp.asarray(segments), jnp.float32(g))
    for value, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-5)


def test_bfloat16_errs_at_most_twice_as_much_as_xlas_own():
    q, k, v, segments, g = inputs(length=300)
    with jax.enable_x64(True):
        expected = output_and_gradients(plain, *map(jnp.asarray, (q, k, v, segments, g)))

    def xla(q, k, v, segments):
        mask = segments[:, None, :, None] == segments[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)

    arguments = (*(jnp.bfloat16(x) for x in (q, k, v)), jnp.asarray(segments), jnp.bfloat16(g))
    ours, theirs = output_and_gradients(causal.causal_attention, *arguments), output_and_gradients(xla, *arguments)
    for our, their, wanted in zip(ours, theirs, map(np.asarray, expected), strict=True):
        assert our.dtype == jnp.bfloat16
        our_error, their_error = (np.sqrt(np.mean((np.asarray(x).astype(np.float64) - wanted) ** 2)) for x in (our, their))
        assert our_error <= 2 * their_error


def test_what_is_kept_for_the_backward_pass_grows_linearly():
    def kept_bytes(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
        kept = jax.eval_shape(lambda q, segments: jax.vjp(lambda q: causal.causal_attention(q, q, q, segments), q)[1], q, segments)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

    assert kept_bytes(4096) == 2 * kept_bytes(2048) < 4096 * 4096
