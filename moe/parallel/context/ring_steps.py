"""Plans ring attention: which rank computes with which tokens, and when keys are sent on.

All of it is static. `ring_attention` sends and computes what is planned here.
"""

import itertools
from typing import NamedTuple

import numpy as np

from moe.kernels.attention.inputs import Options

Order = tuple[tuple[int, ...], ...]  # the chunks that each rank computes with


class ChunkCall(NamedTuple):
    """One call of the kernel by one rank: one chunk of its queries, one of the keys at hand."""

    q_index: int  # the place of the chunk among the rank's chunks of queries
    kv_index: int  # the place of the chunk among those of the keys that the rank now has
    shift: int  # the position of the first query minus that of the first key, in tokens


class RingStep(NamedTuple):
    """One step of a ring, in which each rank attends to the keys of one rank."""

    distance: int  # rank r has the keys of rank r - distance
    hop: int  # by how many ranks the keys are sent on for the next step; 0 in the last step
    calls: np.ndarray  # int32 [calls, P, 3]: the `ChunkCall` of each call and rank


def chunk_order(options: Options, size: int, length: int) -> Order:
    """Returns the chunks of the sequence that each rank computes with.

    `size` is P, and `length` is T/P. Under a causal mask the last tokens see the most keys. If each
    rank computed with the tokens that it holds, the last rank would do twice the mean work. So the
    sequence is cut into 2P chunks, and rank r computes with chunks r and 2P - 1 - r (zig-zag).

    Without a causal mask, each rank computes with one chunk: the tokens that it holds. The same is
    true under a causal window of at most T/2, for which zig-zag would not balance better and would
    send keys further. Raises ValueError for an odd length in zig-zag.
    """
    is_causal = options.right == 0
    is_narrow = options.left is not None and 2 * options.left <= size * length
    if size == 1 or not is_causal or is_narrow:
        return tuple((rank,) for rank in range(size))
    if length % 2:
        raise ValueError(
            f"{length} tokens on each of {size} ranks: causal ring attention halves them, "
            "so their number must be even"
        )
    # The even chunk comes first, since the first half of the tokens that a rank holds is an even
    # chunk.
    return tuple(
        tuple(sorted((rank, 2 * size - 1 - rank), key=lambda chunk: chunk % 2))
        for rank in range(size)
    )


def ring_steps(options: Options, order: Order, length: int) -> list[RingStep]:
    """Returns the steps of a ring, without those in which the mask hides all keys from all ranks.

    `length` is that of a chunk. Each step has as many calls as its busiest rank needs. A rank that
    needs fewer also makes calls in which its queries see nothing: they compute no block.
    """
    size = len(order)
    calls_by_distance = {}
    for distance in range(size):
        ranks = [_calls_of_rank(options, order, length, rank, distance) for rank in range(size)]
        num_calls = max(
            sum(not _sees_nothing(options, length, call) for call in calls) for calls in ranks
        )
        if num_calls:
            calls = np.array([calls[:num_calls] for calls in ranks], np.int32)
            calls_by_distance[distance] = calls.swapaxes(0, 1)
    hops = np.diff([*calls_by_distance, max(calls_by_distance)]).tolist()
    steps = zip(calls_by_distance, hops, calls_by_distance.values(), strict=True)
    return [RingStep(*step) for step in steps]


def _calls_of_rank(
    options: Options, order: Order, length: int, rank: int, distance: int
) -> list[ChunkCall]:
    """Returns the calls of a rank with the keys of the rank `distance` before it.

    The calls in which a query sees a key come first.
    """
    queries, keys = enumerate(order[rank]), enumerate(order[rank - distance])
    calls = [
        ChunkCall(i, j, (q_chunk - kv_chunk) * length)
        for (i, q_chunk), (j, kv_chunk) in itertools.product(queries, keys)
    ]
    return sorted(calls, key=lambda call: _sees_nothing(options, length, call))


def _sees_nothing(options: Options, length: int, call: ChunkCall) -> bool:
    """Returns whether the mask hides every key of a call from every query of it."""
    # The smallest distance from a query back to a key before it, and on to a key after it.
    nearest_before, nearest_after = call.shift - (length - 1), -call.shift - (length - 1)
    beyond_left = options.left is not None and nearest_before > options.left
    beyond_right = options.right is not None and nearest_after > options.right
    return beyond_left or beyond_right
