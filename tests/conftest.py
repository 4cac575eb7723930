"""Every test runs on 8 virtual CPU devices; those marked `gpu` on the machine's GPU.

The number of devices is set for this process alone: a command that a test starts sees one CPU
device, as on a user's machine, unless the test gives it more (JAX_NUM_CPU_DEVICES).
"""

import functools
import gc
import itertools
import os
import shutil
import signal
import tempfile

import jax
import pytest


def xla_flags(given: str) -> str:
    """Returns the flags that tests compile with: ours, then the given ones.

    If a flag is there twice, XLA takes the last.
    """
    # Tests compile hundreds of small programs and run each once or twice, so LLVM's optimisations
    # would take longer than they save. XLA's newer fusion emitters take twice as long to compile as
    # the old ones. JAX 0.11 no longer knows that flag, and XLA ends the process at an unknown flag.
    ours = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * (
        jax.__version_info__ < (0, 11)
    )
    return f"{ours} {given}".strip()


def pytest_configure(config: pytest.Config) -> None:
    # A background job of a script (`make test &`) ignores Ctrl-C, and one of nohup ignores SIGHUP.
    # So would the processes that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Tracing leaves millions of objects in JAX's caches. Python's garbage collector would look
    # through them so often that it took a quarter of the whole time.
    gc.set_threshold(100_000, 20, 10)
    # XLA's CPU client has as many threads as devices, 8. A device that waits in two independent
    # collectives holds two of them. Another device is then left without a thread, all wait for
    # ever, and XLA ends the process. With NPROC=32 it has more threads.
    os.environ.setdefault("NPROC", "32")
    os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Many tests compile the same program, so they share a cache. pytest-xdist's workers and the
        # processes that tests start find it by their environment.
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


def leave_to_the_end() -> None:
    """Takes all objects that there are out of the garbage collector's sight.

    What tests have traced stays in JAX's caches. A collection late in a run would look through all
    of it, for seconds, and restoring a checkpoint may ask for one.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    leave_to_the_end()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        leave_to_the_end()


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the directory where data sets are prepared once for all tests.

    Its `stdlib` has every eighth document alone, so that it is read, cut and evaluated in seconds.
    """
    from moe.config import DataConfig
    from moe.data.sources import open_documents, stdlib

    directory, whole = str(tmp_path_factory.mktemp("data")), stdlib.files_of_split
    with pytest.MonkeyPatch.context() as patch:
        eighth = lambda validation: itertools.islice(whole(validation), 0, None, 8)
        patch.setattr(stdlib, "files_of_split", eighth)
        open_documents(DataConfig(directory=directory), "train")
    return directory


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU and the marker alone: pytest -m gpu")
