"""Computes attention on NVIDIA Hopper GPUs, in Pallas' Mosaic GPU.

A program (a thread block) has three warpgroups of 128 threads. Two of them compute, 64 rows of a
tile each, with the tensor cores' warpgroup products (wgmma). The third only starts copies by the
Tensor Memory Accelerator (TMA) into rings of buffers in shared memory (SMEM): this is the warp
specialisation of FlashAttention-3 (Shah et al. 2024, section 3.1). Two barriers for each buffer of
a ring synchronise the producer with the consumers: "full" says that the copy has arrived, and
"free" that both warpgroups that compute have read it.

forward.py computes the output, dq.py and dkv.py the gradients in two kernels (backward.py), and
fused.py the gradients in one. common.py holds what all of them use, and over_queries.py
what dkv.py and fused.py use.
"""
