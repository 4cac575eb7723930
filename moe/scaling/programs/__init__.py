"""Reads what a compiled program sends between devices, from its text.

    from moe.scaling.programs import read_collectives
    sent = read_collectives(compiled.as_text(), mesh.shape)

The text may be that of a program for CPUs, NVIDIA GPUs or TPUs.
"""

from moe.scaling.programs.collectives import read_collectives
from moe.scaling.programs.text import UnreadableProgram

__all__ = ["UnreadableProgram", "read_collectives"]
