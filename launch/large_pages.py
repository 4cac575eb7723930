"""Gives a command's arrays large pages, which Linux gives to programs that ask for them.

XLA allocates the arrays of a step anew in each step. On a CPU it then waits for a page fault per
4 KiB. glibc asks for pages of 2 MiB if a variable says so as a process begins, so the command
starts itself once more. Imports no JAX.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
VALUE = "glibc.malloc.hugetlb=1"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_large_pages(environment: Mapping[str, str], setting: Path = _SETTING) -> None:
    """Starts this command again with large pages, in the same process, and does not return.

    It returns if the user has set the variable, to whatever value, or if the system gives large
    pages always or never, and within another program, such as a test or a debugger.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    is_command = main is not None and main.name.startswith("launch.")
    if not is_command or VARIABLE in environment:
        return
    if not setting.exists() or "[madvise]" not in setting.read_text():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, {**environment, VARIABLE: VALUE})
