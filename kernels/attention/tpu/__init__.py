"""Computes attention on TPUs in three Pallas kernels: for the output, for dq, and for dk and dv.

Scores are held transposed, [keys, queries], with one lane for each query. So m, l and the
log-sum-exp are one number in each lane, sums over keys are sums over sublanes, and log-sum-exps are
stored in the layout in which they are computed.

The last dimension of a grid is sequential, and accumulates in VMEM. Its steps visit the range of
blocks that the mask leaves, which is prefetched as scalars. Steps beyond the end of that range copy
and compute nothing.
"""
