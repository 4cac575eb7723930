"""Chooses where JAX keeps compiled programs, so that a restart need not compile again.

Imports no JAX, which reads the environment variable when it is imported.
"""

import hashlib
import os
import platform
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_CPU_INFO = Path("/proc/cpuinfo")


def use_cache(environment: MutableMapping[str, str]) -> None:
    """Sets the variable to a folder of the user's cache, unless it is set. "" means no cache.

    Home directories are shared by the hosts of most clusters. A program that is compiled for one
    CPU may crash on another, so each kind of CPU has a folder of its own. Without a home that can
    be written, there is no cache.
    """
    if VARIABLE in environment:
        return
    folder = user_cache(environment) / "compiled" / cpu_kind(_read_cpu_info())
    try:
        # What lies there is run as code, so nobody else may write it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    status = folder.stat()
    is_own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    if is_own and folder.is_absolute() and os.access(folder, os.W_OK):
        environment[VARIABLE] = str(folder)


def user_cache(environment: Mapping[str, str]) -> Path:
    """Returns the folder of the user's cache for what may be made again."""
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base), "moe")


def _read_cpu_info() -> str:
    if not _CPU_INFO.exists():
        return platform.processor()
    return _CPU_INFO.read_text(encoding="utf-8", errors="replace")


def cpu_kind(cpu_info: str) -> str:
    """Returns a name for the instructions that a CPU has, from the text of /proc/cpuinfo."""
    listed = re.search(r"^(?:flags|Features)\s*: (.*)$", cpu_info, re.MULTILINE)
    features = " ".join(sorted(listed[1].split())) if listed else cpu_info
    digest = hashlib.sha256(features.encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"
