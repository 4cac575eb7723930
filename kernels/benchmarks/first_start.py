"""Says which kernels a run is to use on a device, and whether each of them is right there.

A kernel may fail on a kind of device that it has never run on: it may be wrong, crash or hang. So
`launch.kernel_check` has each kernel checked by a process of its own before a run touches the
device. What a run computes is described by what JSON can hold:

    {"attention": {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16",
                   "causal": [true]},
     "experts": {"dtype": "bfloat16"}}

Either may be null. `right_kernels` asks `choose` for a kernel, and for the next one if that is
wrong. It touches no device. `what_is_wrong` runs a kernel on small arrays, forward and backward,
beside the reference in float32.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe.kernels import attention, grouped_matmul
from moe.kernels.grouped_matmul import Inputs, Shapes

# Plain JAX is what everything is compared with.
TRUSTED = ("reference", "blockwise")
# A kernel may be so many times as wrong as plain JAX in the same dtype, beside float32, or wrong by
# so much of the largest number.
TIMES, SHARE = 4.0, 1e-3
# A kernel that has never run on a device may fail with any of these.
FAILURES = (
    ArithmeticError,
    AssertionError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

Arrays = tuple[jax.Array, ...]


class Call(NamedTuple):
    """One use of a kernel: how `choose` is asked, and how it is run."""

    operation: str  # "attention" or "experts"
    text: str  # what is computed, the same for equal calls
    choose: Callable[[str, Collection[str]], str]  # (chip, refused names) -> a name
    # (implementation, dtype) -> its results and gradients. "reference" in float32 is the truth.
    run: Callable[[str, str], Arrays]
    dtype: str


def calls_of(run: Mapping[str, Any]) -> dict[str, list[Call]]:
    """Returns the calls that a run makes of each operation. No array is made yet."""
    return {
        "attention": list(_attention_calls(run["attention"])) if run["attention"] else [],
        "experts": [_experts_call(run["experts"]["dtype"])] if run["experts"] else [],
    }


def right_kernels(
    calls: list[Call], chip: str, find_problem: Callable[[Call, str], str | None]
) -> Iterator[str]:
    """Yields the kernels of one operation that must be refused, until `choose` names right ones.

    `find_problem(call, name)` returns what is wrong with a kernel, or None.
    """
    refused: list[str] = []
    place = 0
    while place < len(calls):
        name = calls[place].choose(chip, refused)
        if name in TRUSTED or find_problem(calls[place], name) is None:
            place += 1
            continue
        refused.append(name)
        yield name
        place = 0  # earlier calls may have taken this kernel, and now take another one


def what_is_wrong(call: Call, name: str, begin: Callable[[], None] = lambda: None) -> str | None:
    """Returns in a few words what is wrong with a kernel's results for a call, or None.

    It calls `begin` right before the kernel runs, when plain JAX has run well.
    """
    truth = jax.block_until_ready(call.run("reference", "float32"))
    plain = jax.block_until_ready(call.run("blockwise", call.dtype))
    begin()
    try:
        ours = jax.block_until_ready(call.run(name, call.dtype))
    except FAILURES as error:
        first_line = " ".join(str(error).strip().splitlines()[:1])
        return f"it raised {type(error).__name__}: {first_line[:200]}"
    for place, arrays in enumerate(zip(ours, plain, truth, strict=True)):
        result, other, exact = (x.astype(jnp.float32) for x in arrays)
        largest = float(jnp.max(jnp.abs(exact)))
        error, usual = (float(jnp.max(jnp.abs(x - exact))) for x in (result, other))
        if not error <= TIMES * usual + SHARE * largest:
            return f"result {place} is wrong by {error / largest:.2g} of the largest number"
    return None


def _attention_calls(options: Mapping[str, Any]) -> Iterator[Call]:
    """Yields the attention of packed rows, with and without a causal mask as the run has it."""
    heads, kv_heads, width = options["heads"], options["kv_heads"], options["head_dim"]
    groups, length, dtype = max(1, heads // kv_heads), 512, options["dtype"]
    for causal in options["causal"]:

        def choose(chip: str, refused: Collection[str], causal: bool = causal) -> str:
            q, k = (
                jax.ShapeDtypeStruct((1, length, number, width), dtype) for number in (groups, 1)
            )
            ids = jax.ShapeDtypeStruct((1, length), "int32")
            keywords = {"causal": causal, "q_segment_ids": ids, "kv_segment_ids": ids}
            return attention.choose(chip, q, k, k, refused=refused, **keywords).name

        def run(name: str, run_dtype: str, causal: bool = causal) -> Arrays:
            return _run_attention(name, run_dtype, (groups, length, width), causal)

        text = f"attention of {groups} heads of {width}, causal {causal}, {dtype}"
        yield Call("attention", text, choose, run, dtype)


def _run_attention(name: str, dtype: str, shape: tuple[int, int, int], causal: bool) -> Arrays:
    """Returns the output and the gradients of attention over a row of two documents."""
    groups, length, width = shape
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (
        jax.random.normal(key, (1, length, number, width))
        for key, number in zip(keys, (groups, 1, 1, groups), strict=True)
    )
    ids = jnp.where(jnp.arange(length)[None] < 200, 1, 2)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = attention.flash_attention(
            q, k, v, causal=causal, q_segment_ids=ids, kv_segment_ids=ids, implementation=name
        )
        return jnp.sum(output.astype(jnp.float32) * weights), output

    gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        gradients, output = gradient(*(x.astype(dtype) for x in (q, k, v)))
    return output, *gradients


def _experts_call(dtype: str) -> Call:
    """Returns the SwiGLU of experts with unequal loads, one of which has no rows."""
    num_tokens, width = 384, 256

    def choose(chip: str, refused: Collection[str]) -> str:
        return grouped_matmul.choose(chip, Shapes(num_tokens, 4, dtype), refused=refused).name

    def run(name: str, run_dtype: str) -> Arrays:
        return _run_experts(name, run_dtype, num_tokens, width)

    return Call("experts", f"experts of {width} x {width}, {dtype}", choose, run, dtype)


def _run_experts(name: Any, dtype: str, num_tokens: int, width: int) -> Arrays:
    """Returns the rows of four experts, their gradients, and those of the weights."""
    tokens_I, experts_G = _blocks(num_tokens)
    keys = jax.random.split(jax.random.key(1), 5)
    x, grad_y = (jax.random.normal(key, (num_tokens, width)) for key in keys[:2])
    weights = [width**-0.5 * jax.random.normal(key, (4, width, width)) for key in keys[2:]]
    weights_I = (tokens_I < num_tokens).astype(jnp.float32)
    w_gate, w_up, w_down = (w.astype(dtype) for w in weights)
    inputs = Inputs(x.astype(dtype), w_gate, w_up, w_down, tokens_I, experts_G)

    @jax.jit
    def both(inputs: Inputs) -> Arrays:
        outputs = grouped_matmul.grouped_swiglu(inputs, name)
        gradients = grouped_matmul.grouped_swiglu_backward(
            inputs, outputs.gate_up, weights_I, grad_y.astype(dtype), name
        )
        # A row that only fills up its block may hold anything.
        hide = lambda rows: jnp.where(weights_I[:, None] > 0, rows, 0)
        return hide(outputs.rows_ID), hide(gradients.rows_ID), *gradients[1:4]

    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return both(inputs)


def _blocks(num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens of rows in blocks of 128, and each block's expert; the last has none."""
    block, loads, blocks = 128, (200, 0, 100, num_tokens - 300), (2, 0, 1, 1)
    tokens, first = [], 0
    for load, number in zip(loads, blocks, strict=True):
        tokens += [*range(first, first + load), *[num_tokens] * (number * block - load)]
        first += load
    tokens_I = jnp.asarray(tokens + [num_tokens] * block, jnp.int32)
    return tokens_I, jnp.asarray([0, 0, 2, 3, 4], jnp.int32)
