"""Masked tokens: which tokens are chosen, and what becomes of them."""

import numpy as np

from moe.data.objectives.masking import mask_tokens
from tests.data.objectives.rows import BOUNDARY, row_of

MASK = 256
OPTIONS = {"mask_id": MASK, "boundary_id": BOUNDARY, "vocab_size": 256}


def test_a_target_is_the_token_of_its_own_position_and_others_stay():
    row = row_of([[BOUNDARY, *range(60), BOUNDARY], [BOUNDARY, *range(100, 130)]], 100)
    masked = mask_tokens(row, (3, 4), **OPTIONS)
    chosen = masked["loss_mask"]
    assert chosen.sum() == round(0.15 * 90)
    assert not chosen[row["segment_ids"] == 0].any() and not chosen[row["tokens"] == BOUNDARY].any()
    np.testing.assert_array_equal(masked["targets"], np.where(chosen, row["tokens"], 0))
    np.testing.assert_array_equal(masked["tokens"][~chosen], row["tokens"][~chosen])
    for name in ("segment_ids", "positions"):
        np.testing.assert_array_equal(masked[name], row[name])
    assert {name: field.dtype for name, field in masked.items()} == {
        name: field.dtype for name, field in row.items()
    }
    assert (row["tokens"] != MASK).all()  # the row itself, which others may read, is unchanged


def test_80_10_10():
    """A random token equals the true one with probability 1/256."""
    row = row_of([[7] * 20_001], 20_000)
    rows = [mask_tokens(row, (0, number), **OPTIONS) for number in range(10)]
    tokens = np.concatenate([masked["tokens"][masked["loss_mask"]] for masked in rows])
    assert len(tokens) == 30_000
    np.testing.assert_allclose(np.mean(tokens == MASK), 0.8, atol=0.01)
    np.testing.assert_allclose(np.mean(tokens == 7), 0.1 + 0.1 / 256, atol=0.007)
    others = np.bincount(tokens[(tokens != MASK) & (tokens != 7)], minlength=256)
    assert len(others) == 256 and np.count_nonzero(others) >= 254
    # Every position is chosen equally often.
    chosen = np.mean([masked["loss_mask"].reshape(10, -1).mean(1) for masked in rows], axis=0)
    np.testing.assert_allclose(chosen, 0.15, atol=0.01)


def test_each_example_draws_anew_and_the_same_key_draws_the_same():
    row = row_of([[7] * 101], 100)
    draws = [mask_tokens(row, key, **OPTIONS)["loss_mask"] for key in ((0, 1), (0, 2), (1, 1))]
    assert not any((draws[0] == other).all() for other in draws[1:])
    np.testing.assert_array_equal(mask_tokens(row, (0, 1), **OPTIONS)["loss_mask"], draws[0])


def test_short_rows():
    one = mask_tokens(row_of([[BOUNDARY, 5, BOUNDARY]], 4), (0, 0), **OPTIONS)
    assert one["loss_mask"].tolist() == [False, True, False, False]
    nothing = mask_tokens(row_of([[BOUNDARY, BOUNDARY]], 4), (0, 0), **OPTIONS)
    assert not nothing["loss_mask"].any()
