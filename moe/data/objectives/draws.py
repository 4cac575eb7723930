"""Draws from random numbers that are the same with every version of NumPy.

NumPy guarantees the values of `SeedSequence.generate_state`, but not those of a `Generator`.
"""

import numpy as np


def random_words(key: tuple[int, ...], count: int) -> np.ndarray:
    """Returns `count` random numbers below 2**32, as uint32, which follow from the key alone."""
    return np.random.SeedSequence(key).generate_state(count)


def random_choice(words: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` different indices of `words`, ascending. Each set is equally likely."""
    return np.sort(np.argsort(words, kind="stable")[:count])


def random_parts(words: np.ndarray, num_parts: int) -> np.ndarray:
    """Divides len(words) + 1 into so many parts of at least 1. Each division is equally likely."""
    cuts = random_choice(words, num_parts - 1) + 1
    return np.diff(np.concatenate([[0], cuts, [len(words) + 1]]))
