"""The draws of objectives: stable values, and every outcome equally likely."""

from collections import Counter

import numpy as np
import pytest

from moe.data.objectives.draws import random_choice, random_parts, random_words


def test_random_words_never_change():
    """The words are those that NumPy promises for all versions, so that runs can be repeated."""
    assert random_words((0, 1), 3).tolist() == [3964924996, 1358922860, 3894904162]
    assert random_words((7, 2**40), 2).tolist() == random_words((7, 2**40), 5)[:2].tolist()
    firsts = {int(random_words((seed, n), 1)[0]) for seed in range(40) for n in range(40)}
    assert len(firsts) == 1600


def outcomes(draw, size: int) -> Counter:
    return Counter(tuple(draw(random_words((3, n), size)).tolist()) for n in range(6000))


@pytest.mark.parametrize(
    ("draw", "size", "count"),
    [
        (lambda words: random_choice(words, 2), 4, 6),
        (lambda words: random_parts(words, 3), 4, 6),  # 5 = 1+1+3 = 1+3+1 = ...
        (lambda words: random_parts(words, 1), 4, 1),
        (lambda words: random_parts(words, 5), 4, 1),
    ],
)
def test_every_outcome_is_equally_likely(draw, size, count):
    counts = outcomes(draw, size)
    assert len(counts) == count
    np.testing.assert_allclose(list(counts.values()), 6000 / count, rtol=0.1)
    for parts in counts:
        assert list(parts) == sorted(parts) or sum(parts) == size + 1
