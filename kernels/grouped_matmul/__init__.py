"""The matmuls of experts on rows grouped by expert, as plain functions of arrays, to be imported
from here.
"""

from moe.kernels.grouped_matmul.blockwise import grouped_swiglu, grouped_swiglu_backward

__all__ = ["grouped_swiglu", "grouped_swiglu_backward"]
