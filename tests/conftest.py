"""Every test runs on 8 virtual CPU devices; those marked `gpu` on the machine's GPU.

The number of devices is set for this process alone: a command that a test starts sees one CPU
device, as on a user's machine, unless the test gives it more (JAX_NUM_CPU_DEVICES).
"""

import functools
import os
import shutil
import tempfile

import jax
import pytest


def xla_flags(given: str) -> str:
    """Returns the flags that tests compile with: ours, then those given, since of a flag that
    stands twice XLA takes the last.
    """
    # Tests compile hundreds of small programs and run each once or twice: LLVM's optimisations
    # would take longer than they save, and XLA's newer emitters of fusions take twice as long to
    # compile as the old ones. XLA ends the process at a flag that it does not know.
    ours = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * (
        jax.__version_info__ < (0, 11)
    )
    return f"{ours} {given}".strip()


def pytest_configure(config: pytest.Config) -> None:
    # XLA's CPU client takes as many threads as it has devices, 8, and a device that waits in two
    # independent collectives at once holds two of them: with the rest of the devices left without a
    # thread, all wait for ever, and XLA ends the process.
    os.environ.setdefault("NPROC", "32")
    os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Many tests compile the same program. pytest-xdist's workers and the processes that tests
        # start find this in their environment.
        directory = tempfile.mkdtemp(prefix="moe-compiled-")
        config.add_cleanup(functools.partial(shutil.rmtree, directory, ignore_errors=True))
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": directory,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if config.getoption("markexpr") != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where datasets are prepared, once for all tests."""
    return str(tmp_path_factory.mktemp("data"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU and the marker alone: pytest -m gpu")
