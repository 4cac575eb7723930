"""Checks attention over a split sequence: results, gradients, sends, calls, and residuals."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.kernels.attention import Choice, flash_attention
from moe.kernels.attention.inputs import Options, visible_span
from moe.kernels.attention.masks import key_blocks, make_mask
from moe.parallel import context
from moe.parallel.context.ring_steps import chunk_order, ring_steps

B, T, N, K, H = 2, 64, 8, 4, 8
SEGMENTS = np.repeat(
    [[1, 2, 3, 0], [1, 1, 2, 2]], [37, 9, 12, 6], axis=1
)  # documents, and padding at the end of the first row


SMALL = Choice("blockwise", (4, 4))  # so that a chunk of 4 or 8 tokens is several blocks


def make_mesh(**sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def random_arrays(heads=N, kv_heads=K, width=H, length=T):
    """Returns q, k, v, sinks and g; v is narrower than q and k."""
    rng = np.random.default_rng(0)
    q, k, v, g = (
        (B, length, *rest)
        for rest in ((heads, width), (kv_heads, width), (kv_heads, width - 2), (heads, width - 2))
    )
    return [jnp.float32(rng.normal(size=shape)) for shape in (q, k, v, (heads,), g)]


def split(attention, mesh, ids, **keywords):
    """Returns `attention` as a function of whole q, k, v and sinks (or None).

    The mesh has the axis `context`, and perhaps `data` and `tensor`.
    """
    axis = lambda name: name if name in mesh.shape else None
    part, rows, heads = (
        P(axis("data"), "context", axis("tensor")),
        P(axis("data"), "context"),
        P(axis("tensor")),
    )

    def local(q, k, v, sinks, ids):
        return attention(q, k, v, sinks=sinks, segment_ids=ids, axis_name="context", **keywords)

    function = jax.shard_map(
        local, mesh=mesh, in_specs=(part, part, part, heads, rows), out_specs=part, check_vma=False
    )
    return lambda q, k, v, sinks: function(q, k, v, sinks, ids)


def results(attention, q, k, v, sinks, g):
    """Returns the output and the gradients of all arrays that are not None."""

    @jax.jit
    def run(*arrays):
        output, pull_back = jax.vjp(attention, *arrays)
        return output, *pull_back(g)

    return [x for x in run(q, k, v, sinks) if x is not None]


def check(attention, mesh, *, ids=None, sinks=True, arrays=None, implementation=SMALL, **keywords):
    """Checks that output and gradients of q, k, v and sinks are those of one device."""
    q, k, v, logits, g = random_arrays() if arrays is None else arrays
    ids, logits = None if ids is None else jnp.asarray(ids, jnp.int32), logits if sinks else None
    whole = {"q_segment_ids": ids, "kv_segment_ids": ids, "implementation": "reference", **keywords}
    wanted = results(
        lambda q, k, v, sinks: flash_attention(q, k, v, sinks=sinks, **whole), q, k, v, logits, g
    )
    ours = results(
        split(attention, mesh, ids, implementation=implementation, **keywords), q, k, v, logits, g
    )
    assert len(ours) == len(wanted) == 4 + sinks
    for name, value, right in zip(("output", "q", "k", "v", "sinks"), ours, wanted, strict=False):
        np.testing.assert_allclose(value, right, atol=2e-5, err_msg=name)


RINGS = {
    "causal": (2, {"causal": True}),
    "causal_segments": (
        4,
        {"causal": True, "ids": SEGMENTS, "softcap": 2.0, "implementation": "reference"},
    ),
    "window_in_a_chunk": (
        8,
        {"causal": True, "window": (3, 0), "ids": SEGMENTS, "implementation": "reference"},
    ),
    "window_of_two_chunks": (
        4,
        {"causal": True, "window": (21, 0), "sinks": False, "implementation": "reference"},
    ),
    "window_in_zig_zag": (
        2,
        {
            "causal": True,
            "window": (41, 0),
            "softcap": 2.0,
            "ids": SEGMENTS,
            "implementation": "reference",
        },
    ),
    "window_to_both_sides": (8, {"causal": False, "window": (9, 3), "implementation": "reference"}),
    "no_mask": (2, {"causal": False, "scale": 0.5, "sinks": False, "implementation": "reference"}),
}


@pytest.mark.parametrize("name", RINGS)
def test_a_ring_is_one_device(name):
    size, keywords = RINGS[name]
    check(context.ring_attention, make_mesh(context=size), **keywords)


def rounded_arrays():
    q, k, v, _, g = random_arrays(length=128)
    return [x.astype(jnp.bfloat16) for x in (q, k, v + 4, g)]


@functools.cache
def exact_results(window):
    """Returns what one device computes of the rounded arrays in float64."""
    with jax.enable_x64(True):
        q, k, v, g = (x.astype(jnp.float64) for x in rounded_arrays())
        attend = lambda q, k, v, _: flash_attention(
            q, k, v, window=window, implementation="reference"
        )
        return results(attend, q, k, v, None, g)


@pytest.mark.parametrize(
    ("implementation", "window"),
    [
        ("reference", None),
        pytest.param("blockwise", None, marks=pytest.mark.slow),
        pytest.param("tpu", None, marks=pytest.mark.slow),
        ("reference", (2, 2)),
    ],
)
def test_a_ring_in_bfloat16_is_as_exact_as_one_device(implementation, window):
    """The parts of 8 ranks are rounded once, after they are added up.

    It compares root mean square errors from float64. Values are alike, so that the rounding of an
    output would show where a query sees few keys.
    """
    q, k, v, g = rounded_arrays()
    mask = {"causal": False, "window": window, "implementation": implementation}
    ring = split(context.ring_attention, make_mesh(context=8), None, **mask)
    wanted = exact_results(window)
    one = results(lambda q, k, v, _: flash_attention(q, k, v, **mask), q, k, v, None, g)
    for name, ours, theirs, right in zip(
        ("output", "q", "k", "v"), results(ring, q, k, v, None, g), one, wanted, strict=True
    ):
        our, their = (
            np.sqrt(np.mean((np.float64(x) - np.asarray(right)) ** 2)) for x in (ours, theirs)
        )
        assert our < 1.1 * their, (name, our / their)


ULYSSES = {
    "causal": (2, {"causal": True}),
    "copied_heads": (8, {"causal": True, "ids": SEGMENTS, "softcap": 2.0}),
    "window": (4, {"causal": False, "window": (9, 20), "sinks": False}),
}


@pytest.mark.parametrize("name", ULYSSES)
def test_ulysses_is_one_device(name):
    size, keywords = ULYSSES[name]
    check(
        context.ulysses_attention, make_mesh(context=size), **keywords, implementation="reference"
    )


def test_ulysses_copies_heads_where_neither_number_divides_the_other():
    """With 12 query heads and 4 key/value heads on 6 ranks, rank 1 reads heads 0 and 1."""
    check(
        context.ulysses_attention,
        make_mesh(context=6),
        causal=True,
        arrays=random_arrays(12, 4, length=24),
        implementation="reference",
    )


def test_ulysses_adds_up_the_gradients_of_copied_heads_in_float32():
    """Reads the jaxpr, since a platform may sum bfloat16 in float32 of its own accord."""
    q, k, v, _, g = (x.astype(jnp.bfloat16) for x in random_arrays(8, 2))
    attention = split(
        context.ulysses_attention,
        make_mesh(context=8),
        None,
        causal=True,
        implementation="reference",
    )
    jaxpr = str(
        jax.make_jaxpr(lambda q, k, v: jax.vjp(lambda *x: attention(*x, None), q, k, v)[1](g))(
            q, k, v
        )
    )
    sums = [
        line for line in jaxpr.splitlines() if "= reduce_sum[" in line or "= scatter-add[" in line
    ]
    assert sums and all(":f32[" in line for line in sums), sums


@pytest.mark.parametrize("attention", [context.ring_attention, context.ulysses_attention])
def test_beside_other_axes(attention):
    mesh = make_mesh(data=2, context=2, tensor=2)
    check(attention, mesh, causal=True, ids=SEGMENTS, softcap=2.0, implementation="reference")


MASKS = (
    {},
    {"window": (3, 0)},
    {"window": (21, 0)},
    {"window": (41, 0)},
    {"window": (9, 20), "causal": False},
    {"causal": False},
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("attention", [context.ring_attention, context.ulysses_attention])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("mask", "ids", "extras"),
    [(m, ids, x) for m in MASKS for ids in (None, SEGMENTS) for x in (False, True)],
)
@pytest.mark.parametrize("implementation", ["blockwise", "tpu"])
def test_all_options(attention, size, mask, ids, extras, implementation):
    length = 60 if size == 3 else T
    arrays = random_arrays(2 * size, 2, length=length)
    ids = None if ids is None else ids[:, :length]
    keywords = {"causal": True} | mask | ({"softcap": 2.0} if extras else {})
    check(
        attention,
        make_mesh(context=size),
        arrays=arrays,
        ids=ids,
        sinks=extras,
        implementation=implementation,
        **keywords,
    )


@pytest.mark.parametrize("attention", [context.ring_attention, context.ulysses_attention])
def test_without_an_implementation_any_dtype_will_do(attention):
    """The TPU's kernels, which the default would take, do no float16 and no float64."""
    q, k, v, _, g = random_arrays(length=16)
    function = split(attention, make_mesh(context=2), None, causal=True, window=(3, 0))
    right = results(function, q, k, v, None, g)
    for dtype, tolerance in (("float16", 0.02), ("float64", 1e-4)):
        with jax.enable_x64(dtype == "float64"):
            values = results(function, *(x.astype(dtype) for x in (q, k, v)), None, g.astype(dtype))
        assert {x.dtype.name for x in values} == {dtype}
        for value, wanted in zip(values, right, strict=True):
            np.testing.assert_allclose(
                np.float64(value), wanted, rtol=0, atol=tolerance * np.abs(wanted).max()
            )


def test_a_ring_refuses_an_implementation_without_lse():
    q = jnp.zeros((2, 16, 8, 8), jnp.bfloat16)
    with pytest.raises(
        NotImplementedError,
        match="'cudnn' cannot do this attention, for it knows no lse: 'blockwise' can",
    ):
        jax.eval_shape(
            split(
                context.ring_attention,
                make_mesh(context=2),
                None,
                causal=True,
                implementation="cudnn",
            ),
            q,
            q,
            q,
            None,
        )


def make_options(causal, window):
    return Options(*visible_span(causal, window), None, 1.0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "window", [None, (0, 0), (1, 0), (7, 0), (8, 0), (9, 0), (30, 0), (5, 17), (20, 0)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_each_visible_pair_of_chunks_has_one_call(size, window, causal):
    """One rank computes each pair of chunks in which a query sees a key, in one call."""
    options, length = make_options(causal, window), 8
    order = chunk_order(options, size, length)
    slots = len(order[0])
    chunk = length // slots
    token = jnp.arange(size * length)
    seen = make_mask(options, token, token, None, None)
    seen = np.broadcast_to(True if seen is None else seen, (size * length,) * 2)
    num_calls, distance = np.zeros_like(seen, int), 0
    for step in ring_steps(options, order, chunk):
        assert step.distance == distance
        distance += step.hop
        useful = np.zeros(len(step.calls))
        for (number, calls), rank in itertools.product(enumerate(step.calls), range(size)):
            i, j, shift = calls[rank]
            q, kv = order[rank][i] * chunk, order[(rank - step.distance) % size][j] * chunk
            assert shift == q - kv
            num_calls[q : q + chunk, kv : kv + chunk] += 1
            useful[number] += seen[q : q + chunk, kv : kv + chunk].any()
        assert useful.all()
    assert (num_calls[seen] == 1).all() and num_calls.max() == 1


def trace(size, differentiate=False, dtype=jnp.float32, **keywords):
    """Returns the types that the jaxpr's ppermutes send, and its number of forward calls."""
    q, k, v, _, g = (x.astype(dtype) for x in random_arrays())
    attention = split(
        context.ring_attention,
        make_mesh(context=size),
        None,
        implementation="reference",
        **keywords,
    )
    function = lambda q, k, v: attention(q, k, v, None)
    if differentiate:
        function = lambda q, k, v: jax.vjp(lambda *x: attention(*x, None), q, k, v)[1](g)
    jaxpr = str(jax.make_jaxpr(function)(q, k, v))
    types = [
        line.split("=")[0].split(":")[1] for line in jaxpr.splitlines() if "= ppermute[" in line
    ]
    return types, jaxpr.count("name=attention_forward")


@pytest.mark.parametrize(
    ("size", "mask", "sends", "calls"),
    [
        # Six halves are dealt and two collected; then k and v at each of 7 steps. 32 pairs of
        # chunks, 17 of them needed.
        (8, {"causal": True}, 8 + 2 * 7, 3 + 2 * 7),
        (8, {"causal": False}, 2 * 7, 8),
        (8, {"causal": True, "window": (0, 0)}, 0, 1),
        (
            8,
            {"causal": True, "window": (8, 0)},
            2,
            2,
        ),  # a query's 8 keys before it are of its rank or the one before
        (8, {"causal": True, "window": (9, 0)}, 4, 3),
        (
            8,
            {"causal": False, "window": (9, 3)},
            2 * 3,
            4,
        ),  # keys come from 1, 2 and 7 ranks before; 7 of 8 ranks before is the next rank
        (2, {"causal": True, "window": (40, 0)}, 8 + 2, 5),
    ],
)
def test_steps_and_calls_that_no_rank_needs_are_dropped(size, mask, sends, calls):
    types, number = trace(size, **mask)
    assert (len(types), number) == (sends, calls)


def test_the_gradients_of_keys_travel_in_float32():
    """Arrays travel in bfloat16, twice: dealt, collected, and sent on at 3 steps.

    dk and dv travel in float32, at 3 steps and once more to the rank that holds the keys.
    """
    types, _ = trace(4, differentiate=True, dtype=jnp.bfloat16, causal=True)
    assert sum(kind.startswith("bf16") for kind in types) == 2 * (8 + 2 * 3)
    assert sum(kind.startswith("f32") for kind in types) == 2 * 4


def count_blocks(options, order, length, block):
    """Returns how many blocks of keys each rank visits in all of its calls."""
    shifts = np.concatenate([step.calls for step in ring_steps(options, order, length)])[:, :, 2]
    ranges = jax.jit(
        jax.vmap(
            jax.vmap(lambda shift: key_blocks(options, shift, (length, length), (block, block)))
        )
    )
    first, end = ranges(shifts)
    return np.asarray(end - first).sum(axis=(0, 2, 3))


def test_causal_work_is_balanced():
    """Eight ranks visit equally many blocks, and together as many as one device."""
    options, size, block = make_options(True, None), 8, 4
    work = count_blocks(options, chunk_order(options, size, 64), 32, block)
    assert work.max() == work.min()
    whole = count_blocks(options, ((0,),), 512, block)
    assert work.sum() == whole.sum()
    in_order = count_blocks(options, tuple((rank,) for rank in range(size)), 64, block)
    assert in_order.sum() == work.sum() and in_order.max() > 10 * in_order.min()


def test_under_a_window_of_half_the_sequence_zig_zag_saves_nothing():
    """The busiest of four ranks visits as many blocks in both orders, to a tenth.

    The tenth is for blocks that the edge of a window cuts, which are visited as a whole.
    """
    options, size, block = make_options(True, (127, 0)), 4, 4
    in_order, zig_zag = (
        chunk_order(make_options(True, window), size, 64) for window in ((127, 0), None)
    )
    assert len(in_order[0]) == 1 and len(zig_zag[0]) == 2
    assert (
        count_blocks(options, in_order, 64, block).max()
        < 1.1 * count_blocks(options, zig_zag, 32, block).max()
    )


@pytest.mark.parametrize("size", [2, 8])
def test_residuals_do_not_grow_with_the_ranks(size):
    """The backward pass is given q, k, v, the output and the lse, and no other rank's keys."""
    q, k, v, _, g = random_arrays()
    attention = split(
        context.ring_attention,
        make_mesh(context=size),
        None,
        causal=True,
        implementation="reference",
    )
    residuals = jax.tree.leaves(
        jax.eval_shape(lambda *x: jax.vjp(lambda *x: attention(*x, None), *x)[1], q, k, v)
    )
    assert (
        sum(x.size for x in residuals if x.ndim > 1)
        == sum(x.size for x in (q, k, v, g)) + B * T * N
    )


@pytest.fixture(scope="module")
def program_for_4_v5p():
    """Returns both passes of a ring, compiled by libtpu for four TPU v5p that are not attached."""
    pytest.importorskip("libtpu", reason="needs pip install libtpu")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("context",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "context"))
    q, k = (
        jax.ShapeDtypeStruct((1, 32768, heads, 128), jnp.bfloat16, sharding=sharding)
        for heads in (8, 2)
    )
    attention = split(context.ring_attention, mesh, None, causal=True, implementation="tpu")

    def gradients(q, k, v, g):
        return jax.vjp(lambda *qkv: attention(*qkv, None), q, k, v)[1](g)

    return (
        jax.jit(gradients).trace(q, k, k, q).lower(lowering_platforms=("tpu",)).compile().as_text()
    )


@pytest.mark.aot
def test_on_4_v5p_the_second_ring_sends_the_keys_again(program_for_4_v5p):
    """The compiler does not merge both rings' sends of the same keys: it would keep all of them."""
    # 6 halves of q, k and v are dealt, and 2 of g. 6 halves of the three gradients are collected.
    # Keys and values are sent on at 3 steps, in both rings; dk and dv at 3 steps, and once home.
    assert (
        len(re.findall(r"collective-permute(?:-start)?\(", program_for_4_v5p))
        == 6 + 2 + 6 + 2 * 6 + 2 * 4
    )


def sends_behind_kernels(program):
    """Returns how many sends of a scheduled program have a kernel between start and end."""
    travelling, behind = {}, 0
    for line in program[program.index("\nENTRY") :].splitlines():
        if start := re.search(r"%(\S+) = .* collective-permute-start\(", line):
            travelling[start[1]] = False
        elif end := re.search(r" collective-permute-done\(%(\S+?)\)", line):
            behind += travelling.pop(end[1])
        elif 'custom_call_target="tpu_custom_call"' in line:
            travelling = dict.fromkeys(travelling, True)
    return behind


@pytest.mark.aot
def test_on_4_v5p_all_sends_to_the_next_rank_are_behind_kernels(program_for_4_v5p):
    """These are keys and values at 3 steps, twice, and dk and dv at 3 steps.

    They are not the chunks that are dealt or collected, nor the finished dk and dv.
    """
    assert sends_behind_kernels(program_for_4_v5p) == 2 * 6 + 6


@pytest.mark.parametrize(
    ("attention", "shapes", "message"),
    [
        (
            context.ring_attention,
            ((2, 20, 8, 8), (2, 20, 4, 8)),
            "5 tokens on each of 4 ranks: .* must be even",
        ),
        (
            context.ring_attention,
            ((2, 16, 8, 8), (2, 32, 4, 8)),
            r"q \(2, 4, 8, 8\) and k \(2, 8, 4, 8\) must hold the same tokens",
        ),
        (
            context.ring_attention,
            ((2, 16, 6, 8), (2, 16, 4, 8)),
            "has 6 heads, which are no multiple of the 4",
        ),
        (
            context.ulysses_attention,
            ((2, 16, 6, 8), (2, 16, 2, 8)),
            "has 6 heads, which cannot be divided over context=4: use ring",
        ),
        (context.ulysses_attention, ((2, 16, 8, 8), (3, 16, 4, 8)), "must have the same batch"),
    ],
)
def test_bad_input_is_told_in_a_line(attention, shapes, message):
    q, k = (jnp.zeros(shape) for shape in shapes)
    function = split(attention, make_mesh(context=4), None, causal=True, implementation="reference")
    with pytest.raises(ValueError, match=message) as raised:
        jax.eval_shape(function, q, k, k, None)
    assert "\n" not in str(raised.value)
