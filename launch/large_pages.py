"""Gives a command's arrays large pages, which Linux gives to programs that ask for them.

XLA allocates the arrays of a step anew in each step. On a CPU it then waits for a page fault per
4 KiB. glibc asks for pages of 2 MiB if a variable says so as a process begins, so a command starts
itself once more. Imports Python's own packages alone, since it is the first thing that a command
does.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
VALUE = "glibc.malloc.hugetlb=1"
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_large_pages(environment: Mapping[str, str], setting: Path = SETTING) -> None:
    """Starts this command again with large pages, in the same process, and does not return.

    It returns if the user has set the variable, to whatever value, and where the system gives large
    pages always or never.
    """
    if VARIABLE in environment or not setting.exists():
        return
    if "[madvise]" in setting.read_text(encoding="utf-8"):
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**environment, VARIABLE: VALUE})
