"""Kernels as plain functions of arrays; import them as `moe.kernels`.

This directory is also reachable as a top-level package when the repository is on the path. Some
libraries (transformers is one) look for an unrelated package called `kernels`, find this one, and
read its version. So it needs a version.
"""

__version__ = "0"
