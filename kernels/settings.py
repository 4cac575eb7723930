"""The settings of JAX that the kernels are written for, whatever the process that imports them has set for its own code."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def own_settings(dtype: Any) -> Iterator[None]:
    """For the time of a trace: integers of 32 bits, unless arrays of `dtype` are of 64; and operands that JAX may promote.

    With `jax_enable_x64` each number that Python gives to an index map would be an int64 beside the kernel's int32, and a process that
    wants its promotions written out does not want this of the kernels. Nothing of what a caller sees changes: arrays keep their dtypes,
    and those that come in are to be of the dtypes that the kernels know.
    """
    with jax.enable_x64(dtype == "float64"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
