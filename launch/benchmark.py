"""Measures a config's training step: tokens per second, MFU, and the ratio to a plain matmul.

Examples:
    python -m launch.benchmark --config=configs/moe_tiny.py
    python -m launch.benchmark --config=configs/benchmark_dense.py --trials=10
    python -m launch.benchmark --config=configs/dense_125m.py --json=dense_125m.json
    python -m launch.benchmark --config=configs/benchmark_moe.py:64x8 --layer
    python -m launch.benchmark --config=configs/moe_tiny.py --beside=transformers
    python -m launch.benchmark --config=configs/moe_tiny.py --kernel_times --json=moe_tiny.json

MFU = tokens/s x training FLOPs per token / peak FLOP/s (Chowdhery et al. 2022, appendix B). Only
the causal half of attention's scores is counted, and recomputation is not counted. The peak is the
bfloat16 rate of all devices by their data sheet. A CPU has no such rate, and gets no MFU.

ratio_to_matmul divides the step's FLOP/s (tokens/s x training FLOPs per token) by those of a matmul
on all devices, of 2048^3 on CPUs and 8192^3 elsewhere. Every trial times the matmul right before
the step, since a busy machine slows both, and the result is the median of the trials' ratios. It is
not a share of a peak, and may exceed 1.

With --kernel_times it also traces two steps, and says which of their kernels take the most time.
All of them go to the file of --json.

With --layer it measures one sparse layer instead, forward and backward. Beside it, in pairs, it
measures a dense layer of the same active FLOPs.

With --beside=transformers it measures, in pairs, the step of the same model in Hugging Face's
transformers on PyTorch. That works on CPUs, in float32 (launch/transformers_step.py), and needs a
machine on which nothing else runs.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from launch import command_line
from launch.kernel_check import check_kernels
from launch.kernel_times import kernel_times
from launch.output_paths import output_file
from moe.config import ConfigError, RunConfig
from moe.files import write_whole

PRINTED_KERNELS = 12


class Step(NamedTuple):
    """Holds the compiled training step of a config."""

    run: Callable[[], None]  # takes the next step, on the same batch, and waits for its end
    devices: list[Any]
    num_parameters: int
    compile_seconds: float
    temporary_bytes: int


def benchmark(
    config: RunConfig,
    trials: int = 5,
    kernels: Mapping[str, Any] | None = None,
    with_kernel_times: bool = False,
) -> dict[str, Any]:
    """Times `trials` training steps on random tokens.

    `kernels` is what `check_kernels` returned. Returns medians over the trials, with the compiled
    step's memory and JAX's version, and `kernel_times` if they are asked for.
    """
    step = compile_step(config, kernels)
    step.run()  # the first step of a process is slower, and not timed
    return {
        **_time_steps(config, step, trials),
        "compile_seconds": step.compile_seconds,
        "temporary_bytes_per_device": step.temporary_bytes,
        **_versions(step.devices),
        **({"kernel_times": kernel_times(step.run)} if with_kernel_times else {}),
    }


def compile_step(config: RunConfig, kernels: Mapping[str, Any] | None = None) -> Step:
    """Compiles the training step of a config, and makes its state and a batch."""
    import jax

    from moe.parallel.mesh import global_batch, host_rows
    from moe.training.start import check_memory
    from moe.training.train_step import make_program

    program = make_program(config, refused=(kernels or {}).get("refused"))
    params = program.abstract_state.params
    check_memory(program.mesh, program.abstract_state, params)
    size = config.train.batch_size
    rows = program.task.random_rows(config, len(host_rows(program.mesh, size)))
    batch = global_batch(rows, program.mesh, size, program.task.dims)
    state = program.init_state()
    with jax.set_mesh(program.mesh):
        begin = time.perf_counter()
        decay, jitted = program.train_step.args, program.train_step.func
        compiled = jitted.lower(*decay, state, batch).compile()
        compile_seconds = time.perf_counter() - begin

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(*decay, state, batch))[0]

    return Step(
        run,
        list(program.mesh.devices.flat),
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        compile_seconds,
        compiled.memory_analysis().temp_size_in_bytes,
    )


def _versions(devices: Sequence[Any]) -> dict[str, str]:
    import jax

    return {"devices": f"{len(devices)} x {devices[0].device_kind}", "jax": jax.__version__}


def _time_steps(config: RunConfig, step: Step, trials: int) -> dict[str, Any]:
    """Times a step, each time right after a matmul."""
    import jax
    from tqdm import trange

    from moe.scaling.flops import run_training_flops
    from moe.scaling.hardware import matmul_flops, peak_flops

    tokens = config.train.batch_size * config.data.sequence_length
    flops = tokens * run_training_flops(config)
    # All virtual devices of a CPU share its cores, which a single matmul already keeps busy.
    is_cpu = step.devices[0].platform == "cpu"
    matmul_devices = 1 if is_cpu else len(step.devices)
    # A GPU needs a large matmul to be busy longer than it takes to start it.
    size = 2048 if is_cpu else 8192
    seconds, matmul, ratios = [], [], []
    for _ in trange(trials, desc="steps", disable=jax.process_index() > 0):
        rate = matmul_flops(step.devices[0], config.model.compute_dtype, size, trials=3)
        matmul.append(rate * matmul_devices)
        seconds.append(_seconds(step.run))
        ratios.append(flops / seconds[-1] / matmul[-1])
    step_seconds, peak = statistics.median(seconds), peak_flops(step.devices)
    return {
        "tokens_per_second": tokens / step_seconds,
        **({"mfu": flops / step_seconds / peak} if peak else {}),
        "ratio_to_matmul": statistics.median(ratios),
        "ratio_to_matmul_of_trials": ratios,
        "step_seconds": step_seconds,
        "model_flops_per_second": flops / step_seconds,
        "matmul_flops_per_second": statistics.median(matmul),
    }


def benchmark_beside_transformers(config: RunConfig, trials: int = 5) -> dict[str, Any]:
    """Times steps of this project and of transformers in turn, on a CPU."""
    import jax

    from launch.transformers_step import transformers_step

    if jax.default_backend() != "cpu":
        raise ConfigError(
            "--beside=transformers measures on CPUs, and JAX has found a "
            f"{jax.devices()[0].device_kind}: set JAX_PLATFORMS=cpu"
        )
    theirs = transformers_step(config)
    ours = compile_step(config)
    our_seconds, their_seconds = _time_pairs(ours.run, theirs.run, trials)
    tokens = config.train.batch_size * config.data.sequence_length
    ratios = [b / a for a, b in zip(our_seconds, their_seconds, strict=True)]
    if max(ratios) > 2 * min(ratios):
        print(
            "the pairs differ by more than a factor of 2, as on a busy machine, where PyTorch's "
            "threads wait for each other: measure again while nothing else runs",
            file=sys.stderr,
        )
    return {
        "speed_over_transformers": statistics.median(ratios),
        "speed_over_transformers_of_trials": ratios,
        "tokens_per_second": tokens / statistics.median(our_seconds),
        "transformers_tokens_per_second": tokens / statistics.median(their_seconds),
        "parameters": ours.num_parameters,
        "transformers_parameters": theirs.num_parameters,
        **({"transformers_experts": theirs.experts} if theirs.experts else {}),
        **_versions(ours.devices),
        **theirs.versions,
    }


def benchmark_layer(config: RunConfig, trials: int = 9) -> dict[str, Any]:
    """Times a sparse layer against a dense one as wide as all experts of one token.

    Each run computes the gradients of all weights and of the input.
    """
    import jax

    from moe.model.experts import MoE
    from moe.model.layers import FeedForward
    from moe.parameters import unbox

    c = config.model.moe
    if not c.num_experts:
        raise ConfigError(
            "model.moe.num_experts=0 is no sparse layer: set --config to a config that has experts"
        )
    shape = (config.train.batch_size, config.data.sequence_length, config.model.model_dim)
    x, target = jax.random.normal(
        jax.random.key(config.seed), (2, *shape), config.model.compute_dtype
    )

    def gradient(layer: Any, output: Callable[[Any], jax.Array]) -> Callable[[], Any]:
        variables = unbox(jax.jit(layer.init)(jax.random.key(config.seed), x))
        loss = lambda variables, x: jax.numpy.sum(output(layer.apply(variables, x)) * target)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables, x).compile()
        return lambda: jax.block_until_ready(compiled(variables, x))

    sparse = gradient(MoE(c), lambda result: result[0])
    dense = gradient(
        FeedForward((c.experts_per_token + c.num_shared_experts) * c.expert_dim), lambda y: y
    )
    sparse_seconds, dense_seconds = _time_pairs(sparse, dense, trials)
    ratios = [first / second for first, second in zip(sparse_seconds, dense_seconds, strict=True)]
    return {
        "sparse_over_dense": statistics.median(ratios),
        "sparse_over_dense_of_trials": ratios,
        "sparse_seconds": statistics.median(sparse_seconds),
        "dense_seconds": statistics.median(dense_seconds),
        **_versions(jax.devices()[:1]),
    }


def _time_pairs(
    first: Callable[[], Any], second: Callable[[], Any], trials: int
) -> tuple[list[float], list[float]]:
    """Returns the seconds of two functions, called in turn: a busy machine slows both of a pair."""
    from tqdm import trange

    pairs = [(_seconds(first), _seconds(second)) for _ in trange(trials + 1, desc="pairs")]
    # The first pair warms up.
    return [pair[0] for pair in pairs[1:]], [pair[1] for pair in pairs[1:]]


def _seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def prepare(values: flags.FlagValues) -> Mapping[str, Any]:
    """Checks the flags and the kernels of a step. Returns what is known of the kernels."""
    measured = [name for name in ("layer", "beside", "kernel_times") if values[name].value]
    if len(measured) > 1:
        raise ConfigError(
            f"--{measured[0]} and --{measured[1]} measure different things: set one of them"
        )
    if values.json:
        output_file("--json", values.json)  # a mistyped path must not cost minutes of measuring
    config = command_line.read_run_config(values.config)
    # A layer alone has no mesh to choose a kernel for: it takes the one that the config names. What
    # is measured beside transformers runs on a CPU.
    return {} if values.layer or values.beside else check_kernels(config)


def main(values: flags.FlagValues, kernels: Mapping[str, Any]) -> None:
    config = command_line.read_run_config(values.config)
    if values.layer:
        result = benchmark_layer(config, values.trials)
    elif values.beside:
        result = benchmark_beside_transformers(config, values.trials)
    else:
        result = benchmark(config, values.trials, kernels, values.kernel_times)
    numbers = {name: value for name, value in result.items() if name != "kernel_times"}
    for name, value in numbers.items():
        print(f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value}")
    if "mfu" in result:
        print("mfu = model_flops_per_second / the data sheets' bfloat16 rate of all devices")
    if "ratio_to_matmul" in result:
        print(
            "ratio_to_matmul = model_flops_per_second / matmul_flops_per_second, "
            "each timed beside the other: not a share of a peak"
        )
    for kernel in result.get("kernel_times", [])[:PRINTED_KERNELS]:
        print(f"{kernel['ms']:9.2f} ms in {kernel['calls']:,g} calls of {kernel['name']}")
    if values.json:
        write_whole(output_file("--json", values.json), json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    command_line.define_config()
    flags.DEFINE_integer("trials", 5, "Steps to time.", lower_bound=1)
    flags.DEFINE_bool(
        "layer", False, "Time one sparse layer against a dense one, instead of the training step."
    )
    flags.DEFINE_enum(
        "beside", None, ["transformers"], "Time the same model in this library as well, in turn."
    )
    flags.DEFINE_bool("kernel_times", False, "Trace two more steps, and sum the times by kernel.")
    flags.DEFINE_string("json", None, "A file to write the numbers to.")
    command_line.run(main, __doc__, devices=True, prepare=prepare)
