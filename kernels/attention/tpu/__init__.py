"""Computes attention on TPUs in three Pallas kernels: for the output, for dq, and for dk and dv.

Scores are held transposed, [keys, queries]. The numbers of a query (m, l, its log-sum-exp) then lie
along lanes, sums over keys are sums over sublanes, and a log-sum-exp is stored as it is computed,
one number for each query.

The last dimension of a grid is sequential, and accumulates in VMEM. Its steps visit the range of
blocks that the mask leaves, which is prefetched as scalars. Steps beyond the end of that range copy
and compute nothing.
"""
