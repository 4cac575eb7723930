"""Statistics of routers' choices, each on arrays small enough to count by hand."""

import numpy as np
import pytest

from moe.inference.routing_analysis import (
    ChoiceCounts,
    OverlapCounts,
    class_shares,
    coactivation,
    count_choices,
    count_overlap,
    load_shares,
    saturation,
    sum_counts,
    token_classes,
    vocabulary_specialisation,
)

# One layer of 3 experts, and four tokens with 2 experts each. The number 3 is no expert: the last
# token's second assignment was dropped.
IDS = np.array([0, 1, 1, 0])
EXPERTS = np.array([[[0, 1], [1, 2], [2, 1], [0, 3]]])


def test_choices_are_counted_by_id_and_by_pair() -> None:
    counts = count_choices(EXPERTS, IDS, vocab_size=3, num_experts=3)
    assert counts.tokens_V.tolist() == [2, 2, 0]
    assert counts.choices_LVE.tolist() == [[[2, 1, 0], [0, 2, 2], [0, 0, 0]]]
    assert counts.pairs_LEE.tolist() == [[[2, 1, 0], [1, 3, 2], [0, 2, 2]]]


def test_each_layer_has_its_own_counts() -> None:
    counts = count_choices(np.array([[[0]], [[1]]]), np.array([1]), vocab_size=2, num_experts=2)
    assert counts.choices_LVE.tolist() == [[[0, 0], [1, 0]], [[0, 0], [0, 1]]]
    assert counts.pairs_LEE.tolist() == [[[1, 0], [0, 0]], [[0, 0], [0, 1]]]


def test_counts_of_batches_add_up_to_those_of_the_whole_text() -> None:
    whole = count_choices(EXPERTS, IDS, vocab_size=3, num_experts=3)
    batches = (
        count_choices(EXPERTS[:, part], IDS[part], vocab_size=3, num_experts=3)
        for part in (slice(0, 1), slice(1, 3), slice(3, 4))
    )
    added = sum_counts(batches)
    assert isinstance(added, ChoiceCounts)
    for found, expected in zip(added, whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_load_is_each_experts_share_of_the_assignments_that_were_not_dropped() -> None:
    counts = count_choices(EXPERTS, IDS, vocab_size=3, num_experts=3)
    np.testing.assert_allclose(load_shares(counts.choices_LVE), [[2 / 7, 3 / 7, 2 / 7]])
    assert load_shares(np.zeros((1, 3, 2))).tolist() == [[0, 0]]


def test_each_layers_load_adds_up_to_1() -> None:
    choices = np.array([[[1, 3], [0, 0]], [[2, 0], [5, 1]]])
    assert load_shares(choices).tolist() == [[0.25, 0.75], [0.875, 0.125]]


def test_the_shares_of_a_class_are_of_its_own_assignments() -> None:
    choices = np.array([[[2, 1, 1], [0, 4, 0], [0, 0, 0]]])
    shares = class_shares(choices, [np.array([0]), np.array([0, 1]), np.array([2])])
    assert shares.tolist() == [[[0.5, 0.25, 0.25], [0.25, 0.625, 0.125], [0.0, 0.0, 0.0]]]


def test_coactivation_is_a_share_of_the_tokens_that_chose_the_first_expert() -> None:
    pairs = np.array([[[2, 1, 0], [1, 4, 3], [0, 3, 3]], [[0, 0, 0], [0, 1, 0], [0, 0, 0]]])
    assert coactivation(pairs).tolist() == [
        [[1, 0.5, 0], [0.25, 1, 0.75], [0, 1, 1]],
        [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
    ]


def test_vocabulary_specialisation_is_the_share_of_each_ids_most_frequent_expert() -> None:
    # Id 0 goes to expert 0 in 3 of 4 tokens, id 1 always to expert 1, and id 2 does not occur.
    choices = np.array([[[3, 1, 0], [0, 1, 0], [0, 0, 0]]])
    found = vocabulary_specialisation(
        ChoiceCounts(np.array([4, 1, 0]), choices, np.zeros((1, 3, 3)))
    )
    assert found.share_LV.tolist() == [[0.75, 1, 0]]
    assert found.mean_L.tolist() == [0.8]
    assert found.by_load_L.tolist() == [0.6]  # 3 of the 5 tokens chose expert 0


def test_saturation_ignores_the_order_of_choices_and_dropped_assignments() -> None:
    earlier = np.array([[[0, 1], [1, 2], [0, 3]]])
    # The first token has both of its experts again, the second one has expert 2, the third none:
    # its second assignment was dropped at both checkpoints.
    later = np.array([[[1, 0], [2, 0], [1, 3]]])
    counts = count_overlap(earlier, later, num_experts=3)
    assert counts.common_L.tolist() == [3]
    assert counts.chosen_L.tolist() == [5]
    assert saturation(counts).tolist() == [0.6]
    added = sum_counts([counts, OverlapCounts(np.array([3]), np.array([3]))])
    assert saturation(added).tolist() == [0.75]
    assert saturation(OverlapCounts(np.array([0]), np.array([0]))).tolist() == [0]


TEXTS = [bytes([id]).decode(errors="replace") for id in range(256)] + ["\ufffd"] * 44


def test_every_id_is_in_one_class() -> None:
    classes = token_classes(TEXTS, {0xFF})
    assert sorted(np.concatenate(list(classes.values()))) == list(range(300))


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (ord("a"), "lower case"),
        (ord("Z"), "upper case"),
        (ord("7"), "digits"),
        (ord(" "), "spaces, tabs"),
        (ord("\t"), "spaces, tabs"),
        (ord("\n"), "line ends"),
        (ord("("), "brackets"),
        (ord("="), "operators"),
        (ord("_"), "punctuation"),
        (0xFF, "boundaries"),
        (0xE9, "other characters"),
        (299, "other characters"),
    ],
)
def test_an_id_is_in_the_class_of_its_character(token: int, name: str) -> None:
    classes = token_classes(TEXTS, {0xFF})
    assert [found for found, ids in classes.items() if token in ids] == [name]


def test_a_token_of_several_characters_is_in_the_class_of_its_first_visible_one() -> None:
    texts = [" def", "\n    ", "    ", ").", "  \u6570", "", "<x>", "_Name"]
    classes = token_classes(texts, {5, 6})
    assert {name: ids.tolist() for name, ids in classes.items() if len(ids)} == {
        "lower case": [0],
        "spaces, tabs": [1, 2],
        "brackets": [3],
        "boundaries": [5, 6],
        "other characters": [4],
        "punctuation": [7],
    }
