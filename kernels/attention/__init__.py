"""Attention as plain functions of arrays, to be imported from here."""

from moe.kernels.attention.blockwise import causal_attention

__all__ = ["causal_attention"]
