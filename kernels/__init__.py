"""Kernels as plain functions of arrays; import them as `moe.kernels`.

This directory is also reachable as a top-level package when the repository is on the path. Some
libraries (transformers is one) probe an unrelated package called `kernels` for its version, so it
states one.
"""

__version__ = "0"
