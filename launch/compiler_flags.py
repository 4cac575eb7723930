"""Sets what the compilers of chips need to hide collectives behind matmuls.

A GPU's compiler starts a gather before the matmul that precedes its use, as it is. That of TPUs
does so with these flags alone: then a gather becomes part of the matmuls beside it. Imports no JAX,
which reads the variable when it loads libtpu.
"""

from collections.abc import MutableMapping

from moe.parallel.distributed import on_tpu

VARIABLE = "LIBTPU_INIT_ARGS"
TPU_FLAGS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


def use_flags(environment: MutableMapping[str, str]) -> None:
    """Adds the flags to the variable on a host of TPUs."""
    if on_tpu(environment):
        add_flags(environment)


def add_flags(environment: MutableMapping[str, str]) -> None:
    """Adds the flags to the variable. Flags that the user has set stay."""
    own = environment.get(VARIABLE, "").split()
    names = {flag.removeprefix("--").split("=")[0] for flag in own}
    new = [f"--{name}={value}" for name, value in TPU_FLAGS.items() if name not in names]
    environment[VARIABLE] = " ".join([*own, *new])
