"""Reads short programs whose collectives were added up by hand, and programs that JAX compiles."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe.scaling.communication import Collective
from moe.scaling.programs import UnreadableProgram, read_collectives

MESH = {"data": 1, "fsdp": 2, "expert": 4, "context": 1, "tensor": 1}
PAIRS = "{{0,4},{1,5},{2,6},{3,7}}"  # along fsdp
FOURS = "{{0,1,2,3},{4,5,6,7}}"  # along expert


def module(*lines: str, others: str = "") -> str:
    """Returns a program whose first computation has these lines after a parameter of 256 bytes."""
    body = "\n".join(f"  {line}" for line in ("%p = f32[64]{0} parameter(0)", *lines))
    return f"HloModule m\n{others}\n\nENTRY %main (p: f32[64]) -> f32[] {{\n{body}\n}}\n"


def sent(program: str, mesh_shape=MESH) -> list[tuple[str, str, float, float]]:
    """Returns kind, axes, bytes and count of what a program sends."""
    return [
        (found.kind, "*".join(found.axes), found.bytes, found.count)
        for found in read_collectives(program, mesh_shape)
    ]


# Each device puts in 256 bytes, or the two arrays of 24 and 8 bytes. Along fsdp there are 2
# devices, along expert 4.
BY_HAND = {
    f"f32[128]{{0}} all-gather(%p), channel_id=1, replica_groups={PAIRS}, dimensions={{0}}": (
        ("all-gather", "fsdp", 256, 1)
    ),
    f"f32[256]{{0}} all-gather(%p), channel_id=1, replica_groups={FOURS}, dimensions={{0}}": (
        ("all-gather", "expert", 3 * 256, 1)
    ),
    "f32[512]{0} all-gather(%p), channel_id=1, replica_groups={}, dimensions={0}": (
        ("all-gather", "fsdp*expert", 7 * 256, 1)
    ),
    f"f32[16]{{0}} reduce-scatter(%p), replica_groups={FOURS}, dimensions={{0}}, to_apply=%add": (
        ("reduce-scatter", "expert", 192, 1)
    ),
    f"f32[64]{{0}} all-reduce(%p), replica_groups={FOURS}, to_apply=%add": (
        ("all-reduce", "expert", 2 * 192, 1)
    ),
    f"(f32[2,3]{{1,0}}, bf16[4]{{0}}) all-reduce(%x, /*index=1*/%y), replica_groups={FOURS}": (
        ("all-reduce", "expert", 2 * 24, 1)
    ),
    f"f32[64]{{0}} all-to-all(%p), replica_groups={FOURS}, dimensions={{0}}": (
        ("all-to-all", "expert", 192, 1)
    ),
    f"(f32[2,3]{{1,0}}, f32[2,3]{{1,0}}) all-to-all(%x, %x), replica_groups={PAIRS}": (
        ("all-to-all", "fsdp", 24, 1)
    ),
    # The third operand and those after it are the plan of the exchange. The room of 2048 bytes is
    # larger than the rows that there are.
    f"f32[512]{{0}} ragged-all-to-all(%p, %room, %y, %y, %y, %y), replica_groups={FOURS}": (
        ("all-to-all", "expert", 192, 1)
    ),
    f"f32[64]{{0}} ragged-all-to-all(%room, %p, %y, %y, %y, %y), replica_groups={FOURS}": (
        ("all-to-all", "expert", 192, 1)
    ),
    "f32[64]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,2}}": (
        ("collective-permute", "expert", 256, 1)
    ),
    "f32[64]{0} collective-permute(%p), source_target_pairs={{0,4},{4,0},{1,6}}": (
        ("collective-permute", "fsdp*expert", 256, 1)
    ),
    # Asynchronous forms, on GPUs and on TPUs. What is done counts once, at its start.
    f"((f32[64]{{0}}), f32[16]{{0}}) reduce-scatter-start(%p), replica_groups={FOURS}": (
        ("reduce-scatter", "expert", 192, 1)
    ),
    f"(f32[64]{{0}}, f32[128]{{0:T(256)}}) all-gather-start(%p), replica_groups={PAIRS}": (
        ("all-gather", "fsdp", 256, 1)
    ),
    "(f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%p), "
    "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}": ("collective-permute", "expert", 256, 1),
}


@pytest.mark.parametrize("instruction", BY_HAND)
def test_bytes_by_hand(instruction: str) -> None:
    program = module(
        "%x = f32[2,3]{1,0} constant({...})",
        "%y = bf16[4]{0:T(128)(2,1)S(1)} constant({1, 2, 3, 4})",
        "%room = f32[512]{0} constant({...})",
        f"%c = {instruction}",
        "ROOT %end = f32[] constant(0)",
    )
    assert sent(program) == [BY_HAND[instruction]]


def test_one_device_in_a_group_sends_nothing() -> None:
    groups = "{{0},{1},{2},{3},{4},{5},{6},{7}}"
    assert sent(module(f"ROOT %c = f32[64]{{0}} all-reduce(%p), replica_groups={groups}")) == []
    stay = "source_target_pairs={{0,0},{1,1}}"
    assert sent(module(f"ROOT %c = f32[64]{{0}} collective-permute(%p), {stay}")) == []


GATHER = f"f32[128]{{0}} all-gather(%q), replica_groups={PAIRS}, dimensions={{0}}"
REDUCE = f"f32[64]{{0}} all-reduce(%q), replica_groups={FOURS}, to_apply=%add"


def computation(name: str, *lines: str) -> str:
    body = "\n".join(f"  {line}" for line in ("%q = f32[64]{0} parameter(0)", *lines))
    return f"\n%{name} (q: f32[64]) -> f32[] {{\n{body}\n}}\n"


CALLS = {
    "f32[] fusion(%p), kind=kCustom, calls=%sends": ("all-gather", "fsdp", 256, 1),
    "f32[] call(%p), to_apply=%sends": ("all-gather", "fsdp", 256, 1),
    "((f32[64]{0}), f32[], u32[]) async-start(%p), calls=%sends": ("all-gather", "fsdp", 256, 1),
    "f32[] custom-call(%p), called_computations={%sends}": ("all-gather", "fsdp", 256, 1),
    # On a TPU, a sum of which each device keeps a part is written so.
    "f32[] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1": (
        ("reduce-scatter", "expert", 192, 1)
    ),
    # Of two branches the one counts that sends more.
    "f32[] conditional(%b, %p, %p), true_computation=%sends, false_computation=%reduces": (
        ("all-reduce", "expert", 384, 1)
    ),
    "f32[] conditional(%b, %p, %p), branch_computations={%sends, %reduces}": (
        ("all-reduce", "expert", 384, 1)
    ),
}


@pytest.mark.parametrize("instruction", CALLS)
def test_what_an_instruction_runs_is_counted(instruction: str) -> None:
    others = (
        computation("sends", f"ROOT %c = {GATHER}")
        + computation("reduces", f"ROOT %c = {REDUCE}")
        + computation("all-reduce-scatter.1", f"%c = {REDUCE}", "ROOT %d = f32[16]{0} slice(%c)")
    )
    line = f"ROOT %end = {instruction}"
    assert sent(module("%b = pred[] constant(true)", line, others=others)) == [CALLS[instruction]]


def test_what_is_waited_for_is_counted_once() -> None:
    program = module(
        "%s = ((f32[64]{0}), f32[], u32[]) async-start(%p), calls=%sends",
        "%u = ((f32[64]{0}), f32[], u32[]) async-update(%s), calls=%sends",
        "ROOT %d = f32[] async-done(%u), calls=%sends",
        others=computation("sends", f"ROOT %c = {GATHER}"),
    )
    assert sent(program) == [("all-gather", "fsdp", 256, 1)]


def test_a_tpus_gather_beside_matmuls_is_counted_once() -> None:
    """Fusions that begin it, go on with it beside a matmul, and end it all name the collective."""
    gather = f'%c = {GATHER}, frontend_attributes={{chain_id="3"}}'
    call = "ROOT %r = f32[128]{0} custom-call(%c), custom_call_target="
    program = module(
        *(f"%{name} = f32[] fusion(%p), kind=kCustom, calls=%{name}" for name in ("s", "g", "e")),
        others=computation("s", gather, f'{call}"AsyncCollectiveStart"')
        + computation("g", gather, "ROOT %r = (f32[64]{0}, f32[128]{0}) tuple(%q, %c)")
        + computation("e", gather, f'{call}"AsyncCollectiveDone"'),
    )
    assert sent(program) == [("all-gather", "fsdp", 256, 1)]


def test_a_gather_that_nothing_begins_is_refused() -> None:
    gather = f'%c = {GATHER}, frontend_attributes={{chain_id="3"}}'
    goes_on = computation("g", gather, "ROOT %r = (f32[64]{0}, f32[128]{0}) tuple(%q, %c)")
    program = module("%g = f32[] fusion(%p), kind=kCustom, calls=%g", others=goes_on)
    with pytest.raises(UnreadableProgram, match="nothing begins what it goes on with"):
        sent(program)


def loop(attributes: str, *lines: str, others: str = "") -> str:
    """Returns a program with a loop over (f32[64], counter), whose body gathers."""
    body = (
        "%t = (f32[64]{0}, u32[]) parameter(0)",
        "%q = f32[64]{0} get-tuple-element(%t), index=0",
        f"%c = {GATHER}",
        *lines,
    )
    text = "\n".join(f"  {line}" for line in body)
    return module(
        "%zero = u32[] constant(0)",
        "%start = (f32[64]{0}, u32[]) tuple(%p, %zero)",
        f"ROOT %w = (f32[64]{{0}}, u32[]) while(%start), condition=%until, body=%round{attributes}",
        others=f"{others}\n\n%round (t: (f32[64], u32[])) -> (f32[64], u32[]) {{\n{text}\n}}\n",
    )


def test_a_loop_of_a_known_number_counts_so_often() -> None:
    known = ', backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0"}}'
    end = "ROOT %r = (f32[64]{0}, u32[]) tuple(%q, %q)"
    assert sent(loop(known, end)) == [("all-gather", "fsdp", 12 * 256, 12)]


def test_loops_in_loops_multiply() -> None:
    known = ', backend_config={"known_trip_count":{"n":"3"}}'
    inner = (
        "\n%inner (q: f32[64]) -> f32[64] {\n  %q = f32[64]{0} parameter(0)\n"
        f"  ROOT %c = {REDUCE}\n}}\n"
    )
    line = f"%v = f32[64]{{0}} while(%q), condition=%until, body=%inner{known}"
    program = loop(known, line, "ROOT %r = (f32[64]{0}, u32[]) tuple(%v, %q)", others=inner)
    assert sent(program) == [
        ("all-reduce", "expert", 9 * 384, 9),
        ("all-gather", "fsdp", 3 * 256, 3),
    ]


def condition(comparison: str, number: int) -> str:
    """Returns the condition of a loop whose counter is compared within a fusion, as on a TPU."""
    return f"""
%compares (a: u32[], b: u32[]) -> pred[] {{
  %a = u32[] parameter(0)
  %b = u32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction={comparison}
}}

%until (t: (f32[64], u32[])) -> pred[] {{
  %t = (f32[64]{{0}}, u32[]) parameter(0)
  %n = u32[]{{:T(128)}} get-tuple-element(%t), index=1
  %bound = u32[]{{:T(128)}} constant({number})
  ROOT %f = pred[] fusion(%n, %bound), kind=kLoop, calls=%compares
}}
"""


@pytest.mark.parametrize(
    ("comparison", "number", "step", "times"),
    [
        ("LT", 8, 1, 8),
        ("LT", 8, 2, 4),
        ("LT", 7, 2, 4),
        ("LE", 8, 2, 5),
        ("NE", 8, 2, 4),
        ("GT", -6, -2, 3),
        ("GE", -6, -2, 4),
        ("LT", 0, 1, 0),
    ],
)
def test_a_loop_is_counted_by_its_counter(comparison, number, step, times) -> None:
    program = loop(
        "",
        "%n = u32[] get-tuple-element(%t), index=1",
        f"%step = u32[] constant({step})",
        "%next = u32[] add(%n, %step)",
        "%kept = u32[] copy(%next)",
        "ROOT %r = (f32[64]{0}, u32[]) tuple(%q, %kept)",
        others=condition(comparison, number),
    )
    assert sent(program) == [("all-gather", "fsdp", times * 256, times)]


@pytest.mark.parametrize("moved", ["%n = u32[] negate(%t)", "%n = u32[] constant(3)"])
def test_a_loop_of_an_unknown_number_is_an_error(moved: str) -> None:
    end = "ROOT %r = (f32[64]{0}, u32[]) tuple(%q, %n)"
    with pytest.raises(UnreadableProgram, match=r"^w \(while\): where its counter begins"):
        sent(loop("", moved, end, others=condition("LT", 8)))


def test_a_loop_that_sends_nothing_may_run_any_number_of_times() -> None:
    body = "\n%idle (q: f32[64]) -> f32[64] {\n  ROOT %q = f32[64]{0} parameter(0)\n}\n"
    line = "ROOT %w = f32[64]{0} while(%p), condition=%until, body=%idle"
    assert sent(module(line, others=body)) == []


@pytest.mark.parametrize(
    ("instruction", "problem"),
    [
        ("f32[64]{0} all-reduce(%p), replica_groups=axes[0]", "all-reduce.*'axes.0.'"),
        ("f32[64]{0} all-reduce(%p), to_apply=%add", "neither its groups nor its pairs"),
        ("f32[64]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}", "not all of 8 devices"),
        ("f32[64]{0} all-reduce(%p), replica_groups={{0,1,2},{3,4,5,6,7}}", "different sizes"),
        ("f32[64]{0} all-reduce(), replica_groups={}", "no operands"),
        ("f32[64]{0} collective-broadcast(%p), replica_groups={{0,1}}", "no collective that is"),
        ("f32[64]{0} all-reduce(%odd), replica_groups={}", "x is no type of elements"),
    ],
)
def test_what_cannot_be_read_is_an_error(instruction: str, problem: str) -> None:
    with pytest.raises(UnreadableProgram, match=f"^c .*{problem}"):
        sent(module("%odd = x[2]{0} constant({...})", f"ROOT %c = {instruction}"))


def test_a_text_that_is_no_program_is_an_error() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        read_collectives("module @jit_step {}", MESH)


def test_places_are_told_by_the_path_in_the_model() -> None:
    path = "jit(train_step)/while/body/closed_call/transpose(jvp(Transformer))/stack/layers_0"
    names = {
        f"{path}/layers_0/checkpoint/rematted_computation/block_0/add": (
            "recomputed: stack/layers_0/block_0"
        ),
        f"{path}/checkpoint/block_0/add": "backward: stack/layers_0/block_0",
        "jit(train_step)/jvp(Transformer)/stack/dot_general": "stack",
        "jit(train_step)/reduce_sum": "f32[64]",
    }
    for name, place in names.items():
        metadata = f'metadata={{op_name="{name}"}}'
        line = f"ROOT %c = f32[64]{{0}} all-reduce(%p), replica_groups={{}}, {metadata}"
        assert [found.what for found in read_collectives(module(line), MESH)] == [place]


def test_uses_are_sorted_and_added_up() -> None:
    program = module(
        f"%a = f32[64]{{0}} all-reduce(%p), replica_groups={PAIRS}",
        f"%b = f32[64]{{0}} all-reduce(%p), replica_groups={FOURS}",
        f"ROOT %c = f32[64]{{0}} all-reduce(%p), replica_groups={PAIRS}",
    )
    assert read_collectives(program, MESH) == (
        Collective("all-reduce", ("fsdp",), "f32[64]", 512, 2),
        Collective("all-reduce", ("expert",), "f32[64]", 384, 1),
    )


def test_sums_in_loops_of_a_compiled_program() -> None:
    """64 numbers are summed over fsdp in each of 5 x 7 rounds, and 7 times over expert."""
    axes = (AxisType.Auto,) * len(MESH)
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=axes)

    def inner(x, _):
        return jnp.sin(jax.lax.psum(x, "fsdp")), None

    def outer(x, _):
        return jax.lax.psum(jax.lax.scan(inner, x, length=5)[0], "expert") / 8, None

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def run(x):
        return jax.lax.scan(outer, x, length=7)[0]

    text = jax.jit(run).lower(jnp.zeros(64)).compile().as_text()
    assert sent(text) == [
        ("all-reduce", "fsdp", 35 * 256, 35),
        ("all-reduce", "expert", 7 * 2 * 192, 7),
    ]


def test_gradients_over_fsdp_in_a_compiled_program() -> None:
    """Each of 3 layers gathers a weight of 1 KiB over 8 devices twice, and sums its gradient.

    Programs for CPUs sum whole gradients, which sends 7/8 of them twice; no other array is as
    large.
    """
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    at = lambda *spec: jax.NamedSharding(mesh, PartitionSpec(*spec))
    weights = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32, sharding=at(None, "fsdp"))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=at("fsdp"))

    def layer(x, weight):
        whole = jax.lax.with_sharding_constraint(weight, at())
        return jax.lax.with_sharding_constraint(jnp.sin(x @ whole), at("fsdp")), None

    @functools.partial(jax.jit, out_shardings=at(None, "fsdp"))
    @jax.grad
    def gradient(weights, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0])

    text = gradient.lower(weights, x).compile().as_text()
    found: Counter[str] = Counter()
    for kind, axes, size, _ in sent(text, mesh.shape):
        assert axes == "fsdp"
        found[kind] += size
    assert 2 * 3 * 1024 * 7 / 8 <= found["all-gather"] <= 3 * 3 * 1024 * 7 / 8
    assert found["all-reduce"] == 3 * 2 * 1024 * 7 / 8
