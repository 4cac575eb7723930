"""Attention on TPUs in three Pallas kernels: for the output, for dq, and for dk and dv.

Scores are held transposed, [keys, queries]. What belongs to a query (its maximum, its denominator,
its log-sum-exp) then lies along lanes, sums over keys are sums over sublanes, and a log-sum-exp is
stored as it is computed, one number for each query.

The last dimension of a grid is sequential and sums in VMEM. It walks over the blocks that the mask
leaves, whose range is prefetched as scalars, and stands still where a range is shorter than the
grid.
"""
