"""Every test runs on 8 virtual CPU devices; those marked `gpu` on the machine's GPU.

The number of devices is set for this process alone: a command that a test starts sees one CPU device, as on a user's machine, unless the
test gives it more (JAX_NUM_CPU_DEVICES).
"""

import os

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Tests compile hundreds of small programs and run each once or twice: LLVM's optimisations would take longer than they save, and
    # XLA's newer emitters of fusions take twice as long to compile as the old ones. XLA ends the process at a flag that it does not know.
    flags = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * (jax.__version_info__ < (0, 11))
    os.environ.setdefault("XLA_FLAGS", flags)
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
