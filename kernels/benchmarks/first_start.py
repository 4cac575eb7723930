"""Checks the kernels that a run is to use on the device at hand, in a process of its own.

    python -m moe.kernels.benchmarks.first_start < request.json

A kernel may fail on a kind of device that it has never run on: it may be wrong, crash or hang. So
`launch.kernel_check` starts this file before a run touches the device, and kills it after some
minutes. The request says what the run computes, and what is known of earlier checks:

    {"attention": {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16",
                   "causal": [true]},
     "experts": {"dtype": "bfloat16"},      or null
     "known": {"NVIDIA H200, jax 0.10.2, kernels 1f0c...": {"hopper, ...": null, ...}}
     "refused": ["hopper"]}

It tries what `choose` names, on small arrays, beside the reference in float32. Where that fails it
tries what `choose` names next. "known" has what is wrong with a kernel for each call that was
checked, or null. A line tells what is checked next, and the last line is the answer as JSON.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe.kernels import attention, grouped_matmul
from moe.kernels.grouped_matmul import Inputs, Shapes

# Plain JAX is what everything is compared with.
TRUSTED = ("reference", "blockwise")
CHECKING = "checking "  # begins the line that tells what is checked next
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

    name: str  # what is computed, the same for equal calls
    choose: Callable[[str, tuple[str, ...]], str]  # (chip, refused names) -> a name
    # (implementation, dtype) -> its results and gradients. "reference" in float32 is the truth.
    run: Callable[[str, str], Arrays]
    dtype: str


def check_calls(
    calls: list[Call], chip: str, known: Mapping[str, str | None], refused: tuple[str, ...]
) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """Returns what was found out about kernels, and the names of all that are refused."""
    found: dict[str, str | None] = {}
    for call in calls:
        while (name := call.choose(chip, refused)) not in TRUSTED:
            key = f"{name}, {call.name}"
            if key not in known and key not in found:
                print(f"{CHECKING}{key}", flush=True)
                found[key] = what_is_wrong(call, name)
            if (found | dict(known))[key] is None:
                break
            refused = (*refused, name)
    return found, refused


def what_is_wrong(call: Call, name: str) -> str | None:
    """Returns in a few words what is wrong with a kernel's results for a call, or None."""
    truth = call.run("reference", "float32")
    plain = call.run("blockwise", call.dtype)
    try:
        ours = call.run(name, call.dtype)
    except FAILURES as error:
        return f"it raised {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    for place, arrays in enumerate(zip(ours, plain, truth, strict=True)):
        result, other, exact = (x.astype(jnp.float32) for x in arrays)
        largest = float(jnp.max(jnp.abs(exact)))
        error, usual = (float(jnp.max(jnp.abs(x - exact))) for x in (result, other))
        if not error <= TIMES * usual + SHARE * largest:
            return f"result {place} is wrong by {error / largest:.2g} of the largest number"
    return None


def attention_calls(options: Mapping[str, Any]) -> Iterator[Call]:
    """Yields the attention of packed rows, with and without a causal mask as the run has it."""
    heads, kv_heads, width = options["heads"], options["kv_heads"], options["head_dim"]
    groups, length = max(1, heads // kv_heads), 512
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (
        jax.random.normal(key, (1, length, number, width))
        for key, number in zip(keys, (groups, 1, 1, groups), strict=True)
    )
    ids = jnp.where(jnp.arange(length)[None] < 200, 1, 2)
    for causal in options["causal"]:
        keywords = {"causal": causal, "q_segment_ids": ids, "kv_segment_ids": ids}

        def choose(chip: str, refused: tuple[str, ...], keywords: Any = keywords) -> str:
            arrays = (x.astype(options["dtype"]) for x in (q, k, v))
            return attention.choose(chip, *arrays, refused=refused, **keywords).name

        def run(name: str, dtype: str, keywords: Any = keywords) -> Arrays:
            def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
                output = attention.flash_attention(q, k, v, implementation=name, **keywords)
                return jnp.sum(output.astype(jnp.float32) * weights), output

            gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                gradients, output = gradient(*(x.astype(dtype) for x in (q, k, v)))
            return output, *gradients

        text = f"attention of {groups} heads of {width}, causal {causal}, {options['dtype']}"
        yield Call(text, choose, run, options["dtype"])


def expert_calls(options: Mapping[str, Any]) -> Iterator[Call]:
    """Yields the SwiGLU of experts with unequal loads, one of which has no rows."""
    dtype, num_tokens, width = options["dtype"], 384, 256
    shapes = Shapes(num_tokens, 4, dtype)
    tokens_I, experts_G = _blocks(num_tokens)
    keys = jax.random.split(jax.random.key(1), 5)
    x, grad_y = (jax.random.normal(key, (num_tokens, width)) for key in keys[:2])
    weights = [width**-0.5 * jax.random.normal(key, (4, width, width)) for key in keys[2:]]
    weights_I = (tokens_I < num_tokens).astype(jnp.float32)

    def choose(chip: str, refused: tuple[str, ...]) -> str:
        return grouped_matmul.choose(chip, shapes, refused=refused).name

    def run(name: Any, run_dtype: str) -> Arrays:
        w_gate, w_up, w_down = (w.astype(run_dtype) for w in weights)
        inputs = Inputs(x.astype(run_dtype), w_gate, w_up, w_down, tokens_I, experts_G)

        @jax.jit
        def both(inputs: Inputs) -> Arrays:
            outputs = grouped_matmul.grouped_swiglu(inputs, name)
            gradients = grouped_matmul.grouped_swiglu_backward(
                inputs, outputs.gate_up, weights_I, grad_y.astype(run_dtype), name
            )
            # A row that only fills up its block may hold anything.
            hide = lambda rows: jnp.where(weights_I[:, None] > 0, rows, 0)
            return hide(outputs.rows_ID), hide(gradients.rows_ID), *gradients[1:4]

        with jax.default_matmul_precision("highest" if run_dtype == "float32" else "default"):
            return both(inputs)

    yield Call(f"experts of {width} x {width}, {dtype}", choose, run, dtype)


def _blocks(num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens of rows in blocks of 128, and each block's expert; the last has none."""
    block, loads, blocks = 128, (200, 0, 100, num_tokens - 300), (2, 0, 1, 1)
    tokens, first = [], 0
    for load, number in zip(loads, blocks, strict=True):
        tokens += [*range(first, first + load), *[num_tokens] * (number * block - load)]
        first += load
    tokens_I = jnp.asarray(tokens + [num_tokens] * block, jnp.int32)
    return tokens_I, jnp.asarray([0, 0, 2, 3, 4], jnp.int32)


def hash_kernels() -> str:
    """Returns a digest of all files of kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    request = json.load(sys.stdin)
    chip = jax.devices()[0].device_kind
    key = f"{chip}, jax {jax.__version__}, kernels {hash_kernels()}"
    calls = list(attention_calls(request["attention"]))
    if request["experts"]:
        calls += expert_calls(request["experts"])
    known = request["known"].get(key, {})
    found, refused = check_calls(calls, chip, known, tuple(request["refused"]))
    answer = {"key": key, "chip": chip, "found": found, "refused": refused}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
