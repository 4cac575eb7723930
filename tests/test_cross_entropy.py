"""Cross-entropy in chunks against the plain formula, on one device and on eight."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from moe.cross_entropy import (
    Unembedding,
    _softmax_sums,
    _softmax_sums_in_one_pass,
    as_int32,
    cross_entropy_sum,
    cross_entropy_sums,
)
from moe.parallel.mesh import spec
from moe.scaling.programs import read_collectives


@jax.jit
def plain_cross_entropy(hidden, weight_DV, targets, mask):
    log_probs = jax.nn.log_softmax((hidden @ weight_DV).astype(jnp.float64), axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask, picked, 0.0))


def inputs(batch=3, length=13, width=8, vocab=11, dtype=np.float64):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(batch, length, width)).astype(dtype)
    weight = rng.normal(size=(width, vocab)).astype(dtype)
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    return hidden, weight, targets, rng.random((batch, length)) > 0.3


@functools.cache
def expected_loss_and_gradients():
    with jax.enable_x64(True):
        return jax.jit(jax.value_and_grad(plain_cross_entropy, argnums=(0, 1)))(*inputs())


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 100])
def test_chunks_equal_the_plain_formula(chunk):
    hidden, weight, targets, mask = inputs()

    def chunked(hidden, weight):
        return cross_entropy_sum(hidden, Unembedding(weight), targets, mask, chunk)

    with jax.enable_x64(True):
        value, gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, weight)
    expected, expected_gradients = expected_loss_and_gradients()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(
            gradient, wanted, rtol=1e-5, atol=1e-5
        )  # sums of up to 39 terms of size 1


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=(1, 2))
def loss_and_gradients(chunk, hidden, weight, targets, mask):
    return cross_entropy_sum(hidden, Unembedding(weight), targets, mask, chunk)


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("wrong", [-100, -1, 11, 300])
def test_a_target_outside_the_vocabulary_is_nan_unless_it_is_masked(wrong, chunk):
    hidden, weight, targets, mask = inputs(dtype=np.float32)
    targets[1, 2], mask[1, 2] = wrong, True
    for leaf in jax.tree.leaves(loss_and_gradients(chunk, hidden, weight, targets, mask)):
        assert np.isnan(leaf).any()
    mask[1, 2] = False
    value, gradients = loss_and_gradients(chunk, hidden, weight, targets, mask)
    with jax.enable_x64(True):
        expected = plain_cross_entropy(hidden, weight, np.clip(targets, 0, 10), mask)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients) and not np.any(
        gradients[0][1, 2]
    )


def test_a_target_that_int32_cannot_hold_is_outside_the_vocabulary():
    hidden, weight, targets, mask = inputs(dtype=np.float32)
    with jax.enable_x64(True):
        far = jnp.asarray(targets, jnp.int64) + 2**32
        total = cross_entropy_sum(hidden, Unembedding(weight), far, np.ones_like(mask), 4)
        masked = cross_entropy_sum(hidden, Unembedding(weight), far, np.zeros_like(mask), 4)
    assert np.isnan(total) and masked == 0


def test_a_numpy_id_that_int32_cannot_hold_is_outside_the_vocabulary_without_64_bit_types():
    far = np.array([2**32 + 5, -(2**40), 7, 2**31 - 1])
    np.testing.assert_array_equal(as_int32(far), [2**31 - 1, -(2**31), 7, 2**31 - 1])
    hidden, weight, targets, mask = inputs(dtype=np.float32)
    far = targets.astype(np.int64) + 2**32
    assert np.isnan(cross_entropy_sum(hidden, Unembedding(weight), far, np.ones_like(mask), 4))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("chunk", [4, 100])
def test_what_a_masked_position_holds_changes_nothing(chunk, value):
    hidden, weight, targets, mask = inputs(dtype=np.float32)
    spoilt = np.where(mask[..., None], hidden, value).astype(np.float32)
    expected = loss_and_gradients(chunk, hidden, weight, targets, mask)
    actual = loss_and_gradients(chunk, spoilt, weight, targets, mask)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_no_position_has_no_loss(shape):
    hidden, weight = jnp.ones((*shape, 8)), jnp.ones((8, 11))
    targets, mask = jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
    total = lambda weight: cross_entropy_sum(hidden, Unembedding(weight), targets, mask, 4)
    value, gradient = jax.value_and_grad(total)(weight)
    assert value == 0 and not gradient.any()


def test_chunks_are_as_equal_as_can_be():
    hidden, weight, targets, mask = inputs(length=513, dtype=np.float32)
    total = lambda weight: cross_entropy_sum(hidden, Unembedding(weight), targets, mask, chunk=512)
    program = str(jax.make_jaxpr(total)(weight))
    assert f"f32[{3 * 257},11]" in program and f"f32[{3 * 512},11]" not in program


def test_memory_stays_under_a_quarter_of_the_logits():
    vocab, length, width = 128 * 1024, 4096, 512
    weight = jax.ShapeDtypeStruct((width, vocab), jnp.float32)
    hidden = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), jnp.bool_)

    def loss(hidden, weight, targets, mask):
        return cross_entropy_sum(hidden, Unembedding(weight), targets, mask, chunk=256)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(hidden, weight, targets, mask).compile()
    logits = 4 * vocab * length
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4


MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "context": 2},
    {"fsdp": 4, "tensor": 2},
    {"expert": 8},
]


def loss_on_a_mesh(sizes, dims, dtype=np.float32, batch=4):
    """Returns the jitted loss and gradients, their mesh and their arguments, laid out on it."""
    hidden, weight, targets, mask = inputs(batch, length=12, width=8, vocab=16, dtype=np.float32)
    weight = weight if dims == "DV" else weight.T
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    lay_out = lambda x, dims: jax.device_put(x, NamedSharding(mesh, spec(dims, x.shape, mesh)))
    arguments = lay_out(jnp.asarray(hidden, dtype), "BTD"), lay_out(weight, dims)
    part = np.arange(12) % 3 == 0

    def loss(hidden, weight):
        sums = cross_entropy_sums(
            hidden,
            Unembedding(weight, dims),
            targets,
            mask,
            (jnp.broadcast_to(part, mask.shape),),
            3,
        )
        return sums[0], sums[1]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)), mesh, arguments


def layouts():
    """Returns the product of meshes, batches and kinds of tables.

    The plain cases have each pair of two of these.
    """
    pairs = itertools.product(enumerate(MESHES), enumerate((4, 3, 8)))
    return [
        pytest.param(sizes, dims, batch, marks=pytest.mark.exhaustive if (i + j + k) % 2 else ())
        for (i, sizes), (j, batch) in pairs
        for k, dims in enumerate(("DV", "VD"))
    ]


@pytest.mark.parametrize(("sizes", "dims", "batch"), layouts())
def test_eight_devices_equal_one(sizes, dims, batch):
    """Three rows cannot be split, so every device has all of them."""
    function, mesh, arguments = loss_on_a_mesh(sizes, dims, batch=batch)
    expected = function(*jax.device_get(arguments))
    with jax.set_mesh(mesh):
        actual = function(*arguments)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), actual, expected
    )


def test_a_weight_is_gathered_once_and_its_gradient_is_summed_once():
    """Nothing that stays the same is sent again for each chunk."""
    function, mesh, arguments = loss_on_a_mesh({"data": 2, "fsdp": 4}, "DV", jnp.bfloat16, batch=8)
    with jax.set_mesh(mesh):
        program = function.lower(*arguments).compile().as_text()
    sent = [
        (found.kind, found.axes, found.what, found.count)
        for found in read_collectives(program, dict(mesh.shape))
        if found.bytes > 16
    ]
    assert sorted(sent) == [
        ("all-gather", ("fsdp",), "f32[2,16]", 1),
        ("all-reduce", ("data",), "f32[2,16]", 1),
        ("reduce-scatter", ("fsdp",), "f32[8,16]", 1),
    ]


def test_a_part_has_no_gradient_and_no_masked_position():
    hidden, weight, targets, mask = inputs(dtype=np.float32)
    every = np.ones_like(mask)

    def part(hidden):
        return cross_entropy_sums(hidden, Unembedding(weight), targets, mask, (every,), 4)[1]

    value, gradient = jax.value_and_grad(part)(hidden)
    total = cross_entropy_sum(hidden, Unembedding(weight), targets, mask, 4)
    np.testing.assert_allclose(value, total, rtol=1e-6)
    assert not gradient.any()


@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("float64", "float32")])
def test_strict_promotion_and_64_bit_types_change_no_gradient(dtypes):
    hidden, weight, targets, mask = inputs()
    hidden, weight = hidden.astype(dtypes[0]), weight.astype(dtypes[1])

    def total(hidden, weight):
        return cross_entropy_sum(hidden, Unembedding(weight), targets, mask, 4)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, weight)
    for gradient, wanted, dtype in zip(
        gradients, expected_loss_and_gradients()[1], dtypes, strict=True
    ):
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e30])
def test_one_pass_over_the_logits_gives_what_three_do(scale):
    """GPUs take it, so nothing else here runs it."""
    logits = jax.random.normal(jax.random.key(0), (5, 1000)) * scale
    logits = logits.at[0, 7].set(-jnp.inf).at[1].set(-3e38).at[2, :900].set(0.0)
    targets = jnp.where(jnp.arange(1000) == 8, logits, 0.0)
    for one, three in zip(
        _softmax_sums_in_one_pass(logits, targets), _softmax_sums(logits, targets), strict=True
    ):
        np.testing.assert_allclose(one, three, rtol=1e-5)
    for wrong in (jnp.nan, jnp.inf):
        for sums in (_softmax_sums, _softmax_sums_in_one_pass):
            maximum, total, _ = sums(logits.at[3, 3].set(wrong), targets)
            denominators = np.asarray(maximum + jnp.log(total))
            assert not np.isfinite(denominators[3]) and np.isfinite(denominators[4])


def test_a_device_may_hold_logits_of_minus_infinity_alone():
    """The maximum and the sum of its part are those of nothing."""
    for sums in (_softmax_sums, _softmax_sums_in_one_pass):
        maximum, total, _ = sums(jnp.full((2, 8), -jnp.inf), jnp.zeros((2, 8)))
        assert np.all(np.isfinite(maximum)) and np.all(total == 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": jnp.full((2, 3), 0.5)}, "mask is float32, and a mask is bool: give mask > 0"),
        (
            {"unembedding": np.ones((4, 5))},
            "unembedding is of type ndarray: give Unembedding(weight_DV)",
        ),
        (
            {"unembedding": Unembedding(jnp.ones((5, 4)))},
            "the weight (5, 4) has the dimensions 'DV', and hidden states (2, 3, 4) have D = 4: "
            "give Unembedding(weight_DV), or Unembedding(table_VD, 'VD')",
        ),
        (
            {"targets": jnp.zeros((2, 4), jnp.int32)},
            "targets has shape (2, 4): give one of shape (2, 3)",
        ),
        (
            {"targets": jnp.zeros((2, 3))},
            "targets are float32: give token ids, as int32",
        ),
        (
            {"hidden": jnp.ones((3, 4))},
            "hidden states have shape (3, 4): give them as [B, T, D]",
        ),
        (
            {"unembedding": Unembedding(jnp.ones((4, 5)), "EV")},
            "Unembedding has dims='EV': set dims to 'DV' or 'VD'",
        ),
        ({"chunk": 0}, "chunk=0 is too small: set it to 1 or more"),
    ],
    ids=["mask", "weight", "transposed", "shape", "dtype", "rank", "dims", "chunk"],
)
def test_wrong_arguments_are_refused_in_one_line(changes, message):
    arguments = {
        "hidden": jnp.ones((2, 3, 4)),
        "unembedding": Unembedding(jnp.ones((4, 5))),
        "targets": jnp.zeros((2, 3), jnp.int32),
        "mask": jnp.ones((2, 3), bool),
        "chunk": 2,
    }
    with pytest.raises((TypeError, ValueError)) as caught:
        cross_entropy_sum(*(arguments | changes).values())
    assert str(caught.value) == message
