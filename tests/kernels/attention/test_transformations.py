"""Checks second derivatives, programs for symbolic shapes, and NaN that a mask hides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels.attention import Choice, flash_attention

TPU = Choice("tpu", (128, 128))


def plain(q):
    logits = jnp.einsum("btnh,bsnh->bnts", q, q) * q.shape[3] ** -0.5
    logits = jnp.where(jnp.tril(jnp.ones(logits.shape[2:], bool)), logits, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), q)


def loss(attention, q):
    return jnp.sum(jnp.sin(attention(q)))


def flash(q, implementation=None, **keywords):
    return flash_attention(q, q, q, causal=True, implementation=implementation, **keywords)


def over(outer, implementation):
    return jax.jit(
        outer(
            jax.grad(
                functools.partial(loss, functools.partial(flash, implementation=implementation))
            )
        )
    )


@pytest.mark.parametrize(
    ("outer", "implementation"),
    [(jax.jacfwd, "blockwise"), (jax.jacfwd, "reference"), (jax.jacrev, "reference")],
)
def test_second_derivatives(outer, implementation):
    q = jax.random.normal(jax.random.key(0), (1, 5, 1, 4))
    wanted = jax.jit(jax.hessian(functools.partial(loss, plain)))(q)
    np.testing.assert_allclose(over(outer, implementation)(q), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("outer", "implementation"), [(jax.jacfwd, None), (jax.jacrev, None), (jax.jacfwd, TPU)]
)
def test_kernels_say_that_they_have_no_second_derivatives(outer, implementation):
    with pytest.raises(
        NotImplementedError,
        match=r"^'tpu' attention has no second derivatives: take implementation='reference'",
    ):
        over(outer, implementation)(jnp.ones((1, 5, 1, 4)))


@pytest.mark.parametrize(
    ("shape", "implementation"),
    [("b, 8, 2, 8", None), ("b, 8, 2, 8", "blockwise"), ("b, t, 2, 8", "reference")],
)
def test_a_program_for_symbolic_shapes(shape, implementation):
    """It exports the gradient once, and runs it for two shapes."""
    gradient = jax.jit(
        jax.grad(functools.partial(loss, functools.partial(flash, implementation=implementation)))
    )
    q = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    exported = jax.export.export(gradient)(q)
    for batch, length in ((1, 8), (3, 8 if "t" not in shape else 5)):
        q = jax.random.normal(jax.random.key(0), (batch, length, 2, 8))
        np.testing.assert_allclose(
            exported.call(q), jax.grad(functools.partial(loss, plain))(q), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("shape", "implementation", "message"),
    [
        (
            "b, t, 2, 8",
            None,
            "'blockwise' cannot do this attention, for it takes lengths that are numbers, "
            "not t and t: 'reference' can",
        ),
        (
            "b, 8, 2, 8",
            "tpu",
            "'tpu' cannot do this attention, for it takes a batch that is a number, "
            "not b: 'blockwise' can",
        ),
    ],
)
def test_symbolic_shapes_that_none_can_take(shape, implementation, message):
    q = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    with pytest.raises(NotImplementedError, match=message):
        jax.export.export(jax.jit(functools.partial(flash, implementation=implementation)))(q)


@pytest.mark.parametrize("implementation", [Choice("blockwise", (128, 128)), TPU, "reference"])
def test_what_a_mask_hides_and_is_nan(implementation):
    """A hidden key changes nothing; a hidden value reaches only queries that visit its block."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.normal(size=(1, 256, 2, 8))) for _ in range(3))
    ids = jnp.arange(256)[None] // 200  # the last tokens are padding, of another id
    call = functools.partial(
        flash_attention,
        causal=True,
        q_segment_ids=ids,
        kv_segment_ids=ids,
        implementation=implementation,
        return_lse=True,
    )
    output, lse = call(q, k, v)
    bad_k, bad_v = (x.at[:, 200:].set(jnp.nan) for x in (k, v))
    for ours, right in zip(call(q, bad_k, v), (output, lse), strict=True):
        np.testing.assert_allclose(ours[:, :200], right[:, :200], rtol=0, atol=1e-5)
    if implementation != "reference":
        np.testing.assert_allclose(
            call(q, k, bad_v)[0][:, :128], output[:, :128], rtol=0, atol=1e-5
        )
    np.testing.assert_allclose(call(q, k, bad_v)[1][:, :200], lse[:, :200], rtol=0, atol=1e-5)
