"""Finds out which devices each process of a job sees, and whether they fit together.

GPUs are asked for before JAX starts.
"""

import ctypes
import math
import re
from collections.abc import Mapping, Sequence

from moe.config import ConfigError, MeshConfig
from moe.parallel.rendezvous import Arrival, NotJoined, listed


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the unique identifiers of the NVIDIA GPUs that this process sees, without JAX.

    There are none where JAX is told to use another platform.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and platforms.split(",")[0] not in ("cuda", "gpu"):
        return []
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    chosen = environment.get("JAX_LOCAL_DEVICE_IDS")
    numbers = _parse_ids(chosen) if chosen else range(count.value)
    identifiers = []
    for number in numbers:
        device, identifier = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        if driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDeviceGetUuid_v2(
            identifier, device
        ):
            raise ConfigError(
                f"JAX_LOCAL_DEVICE_IDS={chosen} names GPU {number}, and there are {count.value}: "
                "set it to numbers below that"
            )
        identifiers.append(bytes(identifier).hex())
    return identifiers


def _parse_ids(chosen: str) -> list[int]:
    """Returns the numbers of the devices that JAX_LOCAL_DEVICE_IDS names."""
    try:
        return [int(number) for number in chosen.split(",")]
    except ValueError:
        raise ConfigError(
            f"JAX_LOCAL_DEVICE_IDS={chosen} is no list of numbers: set it to one such as 0,1"
        ) from None


def check_platforms(environment: Mapping[str, str]) -> None:
    """Starts JAX's devices. Raises ConfigError if JAX_PLATFORMS names a platform that is not here.

    For "cuda" without a GPU, with or without the plugin, JAX itself raises an AssertionError
    without a word. For any platform that it has no plugin for it raises a RuntimeError.
    """
    import jax

    setting = f"JAX_PLATFORMS={environment.get('JAX_PLATFORMS', '')}"
    try:
        jax.local_devices()
    except AssertionError as error:
        if str(error):
            raise
        raise ConfigError(
            f"{setting} asks for a GPU, and no NVIDIA GPU is visible here: "
            "start where nvidia-smi lists one, or set JAX_PLATFORMS=cpu"
        ) from None
    except RuntimeError as error:
        # Other errors are not of the variable: a device may be in use, or a driver may be broken.
        if "not in the list of known backends" not in str(error):
            raise
        raise ConfigError(
            f"{setting} names a platform that this installation of JAX has no plugin for: "
            "install it, as make ACCELERATOR=cuda13 does for GPUs, or set JAX_PLATFORMS=cpu"
        ) from None


def check_cpu_devices(environment: Mapping[str, str]) -> None:
    """Raises ConfigError if JAX_NUM_CPU_DEVICES is no number of devices that JAX can make."""
    count = environment.get("JAX_NUM_CPU_DEVICES", "-1")  # JAX's own default
    if count != "-1" and not (count.isdecimal() and int(count)):
        raise ConfigError(
            f"JAX_NUM_CPU_DEVICES={count} is no number of devices: set it to 1 or more, or unset it"
        )


def explain_variable(error: ValueError) -> str:
    """Returns one line for JAX's error at its import for a variable's value. Raises any other."""
    found = re.search(r"for (?:JAX flag|environment) '?(jax_\w+)", str(error), re.IGNORECASE)
    if not found:
        raise error
    return f"{found[1].upper()}: {error}: set it to a value that JAX knows, or unset it"


def check_gpus(arrivals: Sequence[Arrival]) -> None:
    """Raises NotJoined if a process sees another number of GPUs, or a GPU that another one holds.

    Under SLURM the usual accidents are that a task sees only the first GPU of its node, and that
    all tasks of a node see all of its GPUs.
    """
    _check_equal(arrivals, [len(arrival.gpus) for arrival in arrivals], "GPU")
    holders: dict[str, Arrival] = {}
    for arrival in arrivals:
        for gpu in arrival.gpus:
            if gpu in holders:
                raise NotJoined(
                    f"{holders[gpu].name} and {arrival.name} hold the same GPU, {gpu}: start one "
                    "process for each host, or give each its own GPUs (srun --gpus-per-task=1)"
                )
            holders[gpu] = arrival


def check_devices(
    arrivals: Sequence[Arrival], counts: Sequence[int], mesh: MeshConfig | None
) -> None:
    """Raises NotJoined if processes see different numbers of devices, or not those of the mesh.

    `counts` has the number of devices of each process.
    """
    _check_equal(arrivals, counts, "device")
    if mesh is None or -1 in mesh.sizes:
        return
    wanted = math.prod(mesh.sizes)
    if wanted != sum(counts):
        raise NotJoined(
            f"each of the {len(counts)} processes sees {counted(counts[0], 'device')}, which "
            f"makes {sum(counts)}, and config.mesh wants {wanted}: show each process all devices "
            "of its host, start as many processes as are needed, or set config.mesh"
        )


def _check_equal(arrivals: Sequence[Arrival], counts: Sequence[int], thing: str) -> None:
    expected = max(set(counts), key=lambda count: (list(counts).count(count), count))
    wrong = [number for number, count in enumerate(counts) if count != expected]
    if wrong:
        first = wrong[0]
        rest = f" (and {listed(wrong[1:])} too)" if wrong[1:] else ""
        raise NotJoined(
            f"{arrivals[first].name} sees {counted(counts[first], thing)}{rest}, and most "
            f"processes see {expected}: give all processes equally many"
        )


def counted(number: int, thing: str) -> str:
    """Returns a number with its noun, such as "8 devices"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
