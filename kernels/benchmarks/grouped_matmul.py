"""Checks the grouped matmul's numbers on the device at hand, and times it beside other libraries'.

    python -m moe.kernels.benchmarks.grouped_matmul --json=grouped_matmul.json
    python -m moe.kernels.benchmarks.grouped_matmul --shapes 256,64,32,4 --implementation=blockwise

A shape is R,D,F,E: R rows of E experts whose weights are D x F. Loads are uneven. On Hopper GPUs
and TPUs it times one matmul ("forward"), its gradients ("dx" and "dw"), and the whole SwiGLU
("swiglu forward" and "swiglu backward"); with other implementations the SwiGLU alone. "dense"
multiplies R rows with one weight: as many FLOPs, without experts. TFLOP/s count the R rows, and not
what fills up their blocks. Calls are timed in turns, and each number is a median.
"""

import argparse
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.benchmarks.grouped_passes import (
    Call,
    Problem,
    Shape,
    hopper_calls,
    make_problem,
    our_calls,
)
from moe.kernels.benchmarks.results import check_difference, output_file, write_rows
from moe.kernels.benchmarks.timing import median_seconds
from moe.kernels.chips import is_hopper
from moe.kernels.grouped_matmul import (
    Inputs,
    Name,
    Shapes,
    choose,
    grouped_swiglu,
    grouped_swiglu_backward,
    why_not,
)

# Mixtral's experts, and OLMoE's.
SHAPES = ["32768,4096,14336,8", "65536,2048,1024,64"]
# jax.lax.ragged_dot may hold its rows once for each expert. It is not run where that takes more.
MOST_BYTES = 24 * 2**30
# How another library, or the compiler, may fail. NotImplementedError is a RuntimeError.
FAILURES = (
    AssertionError,
    AttributeError,
    ExceptionGroup,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def other_calls(problem: Problem) -> Iterator[tuple[str, str, Callable[[], Call]]]:
    """Yields implementation, pass and preparation of each call to compare ours with."""
    x, grad, inputs = problem.x_RD, problem.grad_RF, problem.inputs
    kinds: dict[str, Callable[..., jax.Array]] = {"dense": lambda x, w, _: x @ w}
    if problem.implementation in ("hopper", "tpu"):
        kinds["jax.lax.ragged_dot"] = jax.lax.ragged_dot
        if problem.implementation == "hopper" and importlib.util.find_spec("tokamax"):
            kinds["tokamax"] = lambda *arrays: importlib.import_module("tokamax").ragged_dot(
                *arrays, implementation="mosaic"
            )
    for name, multiply in kinds.items():
        weight = inputs.w_gate_EDF[0] if name == "dense" else inputs.w_gate_EDF
        yield name, "forward", functools.partial(_prepare, name, problem, multiply, x, weight)
        # The gradient of one operand alone, so that the other one's is not computed.
        for which, argument in (("dx", 0), ("dw", 1)):
            differentiate = functools.partial(_gradient, multiply, argument)
            arrays = x, weight, grad
            yield name, which, functools.partial(_prepare, name, problem, differentiate, *arrays)
    dense_weights = [w[0] for w in inputs[1:4]]
    backward = lambda grad, x, *weights: jax.vjp(_dense_swiglu, x, *weights)[1](grad)
    yield (
        "dense",
        "swiglu forward",
        lambda: functools.partial(jax.jit(_dense_swiglu), x, *dense_weights),
    )
    # This computes the two projections again, which ours keep: see `flops_of`.
    yield (
        "dense",
        "swiglu backward",
        lambda: functools.partial(jax.jit(backward), x, x, *dense_weights),
    )


def _prepare(name: str, problem: Problem, function: Callable[..., Any], *arrays: jax.Array) -> Call:
    shape = problem.shape
    held = 2 * shape.num_experts * shape.num_rows * max(shape.dim, shape.width)
    if name == "jax.lax.ragged_dot" and held > MOST_BYTES:
        raise MemoryError(f"it may hold {held / 2**30:.0f} GiB: its rows once for each expert")
    return functools.partial(jax.jit(function), *arrays, problem.loads_E)


def _gradient(
    multiply: Callable[..., jax.Array],
    argument: int,
    x: jax.Array,
    weight: jax.Array,
    grad: jax.Array,
    loads_E: jax.Array,
) -> jax.Array:
    def of_one(operand: jax.Array) -> jax.Array:
        operands = (operand, weight) if argument == 0 else (x, operand)
        return multiply(*operands, loads_E)

    return jax.vjp(of_one, (x, weight)[argument])[1](grad)[0]


def _dense_swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def flops_of(which: str, implementation: str, shape: Shape) -> int:
    """Returns the FLOPs of a pass: of one matmul, or of SwiGLU's three or six."""
    matmuls = {"swiglu forward": 3, "swiglu backward": 6}.get(which, 1)
    if implementation == "dense" and which == "swiglu backward":
        matmuls += 2  # the projections, computed again
    return matmuls * shape.flops


def check_numbers(implementation: Name, dtype: str) -> float:
    """Returns the largest difference from the float32 reference, over its largest value.

    Raises ValueError above 2 %.
    """
    problem = make_problem(Shape(640, 256, 384, 5), implementation, dtype)
    is_row = problem.inputs.tokens_I < problem.shape.num_rows
    weights_I = is_row.astype(jnp.float32)
    results = []
    pairs: list[tuple[Name, str]] = [(implementation, dtype), ("reference", "float32")]
    for name, cast in pairs:
        x, gate, up, down = (array.astype(cast) for array in problem.inputs[:4])
        inputs = Inputs(x, gate, up, down, problem.inputs.tokens_I, problem.inputs.experts_G)
        rows_ID, gate_up = jax.jit(functools.partial(grouped_swiglu, implementation=name))(inputs)
        backward = functools.partial(grouped_swiglu_backward, implementation=name)
        gradients = jax.jit(backward)(inputs, gate_up, weights_I, problem.x_RD.astype(cast))
        by_row = (rows_ID, gradients.rows_ID, gradients.weights_I[:, None])
        cleared = [jnp.where(is_row[:, None], x, 0) for x in by_row]
        results.append([np.asarray(x, np.float32) for x in (*cleared, *gradients[1:4])])
    return check_difference(implementation, *results)


def measure(
    problem: Problem, repeats: int, tilings: list[tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    """Yields a row for each pass and implementation. One that cannot be run is a row that says so.

    All are refused alike, ours too, so that one failure does not cost the other rows.
    """
    shape, calls, refused = problem.shape, {}, []
    ours = [(problem.implementation, *call) for call in our_calls(problem)]
    for sizes in tilings:
        ours += [(f"hopper {sizes}", *call) for call in hopper_calls(problem, sizes)]
    for name, which, prepare in (*ours, *other_calls(problem)):
        try:
            call = prepare()
            jax.block_until_ready(call())
        except FAILURES as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            refused.append({"pass": which, "implementation": name, "refused": reason})
        else:
            calls[name, which] = call
    for (name, which), seconds in median_seconds(calls, repeats).items():
        rate = flops_of(which, name, shape) / seconds / 1e12
        row = {"pass": which, "implementation": name, "ms": seconds * 1e3, "tflops": rate}
        yield {"shape": shape._asdict(), **row}
    yield from ({"shape": shape._asdict(), **row} for row in refused)


def print_row(row: dict[str, Any]) -> None:
    result = f"not run: {row.get('refused')}"
    if "refused" not in row:
        result = f"{row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s"
    print(f"{row['pass']:16} {row['implementation']:20} {result}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="R,D,F,E of each shape")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--implementation",
        choices=["blockwise", "tpu", "hopper"],
        help="which of ours to time: by default 'hopper' on its GPUs, else what `choose` returns",
    )
    parser.add_argument(
        "--tilings",
        nargs="+",
        type=lambda text: tuple(map(int, text.split(","))),
        default=[],
        help="other tilings of 'hopper' to time: columns of a tile, stages, band and buffers",
    )
    parser.add_argument("--repeats", type=int, default=10, help="turns whose median is taken")
    parser.add_argument(
        "--json", type=output_file, help="where to write the rows, with the device and the versions"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    chip = jax.devices()[0].device_kind
    shapes = Shapes(64, 8, arguments.dtype)
    chosen = "hopper" if is_hopper(chip) else choose(chip, shapes).name
    name: Name = arguments.implementation or chosen
    if reason := why_not(name, chip, shapes):
        sys.exit(f"error: {name} cannot be timed here, because {reason}")
    try:
        worst = check_numbers(name, arguments.dtype)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{name} on {chip}, {arguments.dtype}: at most {worst:.1e} from the reference")
    rows = []
    for text in arguments.shapes:
        shape = Shape(*map(int, text.split(",")))
        print(*(f"{field}={size}" for field, size in zip("RDFE", shape, strict=True)), flush=True)
        problem = make_problem(shape, name, arguments.dtype)
        for row in measure(problem, arguments.repeats, arguments.tilings):
            rows.append(row)
            print_row(row)
    if arguments.json:
        write_rows(arguments.json, rows, dtype=arguments.dtype, worst_difference=worst)
    if any("refused" in row and row["implementation"] == name for row in rows):
        sys.exit(f"error: {name} could not be run: see the rows above")


if __name__ == "__main__":
    main()
