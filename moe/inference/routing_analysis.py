"""Computes what a model's routers have learnt, from the experts that they chose for a text.

The statistics follow OLMoE (Muennighoff et al. 2024, section 5): saturation, co-activation, and
specialisation by kind of token and by token id. All functions are pure functions of numpy arrays.
`launch.routing` is the command that reads a checkpoint's choices, calls them, and plots them.

A choice is an expert's number, from 0 on, in an array [L, N, A]: A choices for each of N tokens in
each of L sparse layers (Transformer(config, capture=("experts",)) returns them). The number E
stands for no expert: a full expert has dropped that assignment, and it is not counted.

Counts of several batches add up (`sum_counts`), so a text of any length can be read batch by batch.
The functions that return shares come after that, and divide the counts of the whole text once.
"""

import functools
import string
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

# The classes of characters. `token_classes` adds two more.
_CHARACTERS = {
    "lower case": string.ascii_lowercase,
    "upper case": string.ascii_uppercase,
    "digits": string.digits,
    "spaces, tabs": " \t",
    "line ends": "\n\r",
    "brackets": "()[]{}",
    "operators": "+-*/%=<>&|^~@!",
    "punctuation": "\"'`#$,.:;?\\_",
}
_SPECIAL, _OTHER = "boundaries", "other characters"


class ChoiceCounts(NamedTuple):
    """Counts how often each expert was chosen at one checkpoint."""

    tokens_V: np.ndarray  # tokens with each id
    choices_LVE: np.ndarray  # tokens with each id that chose each expert
    pairs_LEE: np.ndarray  # tokens that chose both experts; on the diagonal, those that chose it


class OverlapCounts(NamedTuple):
    """Counts how many of an earlier checkpoint's choices a later checkpoint makes too."""

    chosen_L: np.ndarray  # assignments at the earlier checkpoint
    common_L: np.ndarray  # assignments that the later checkpoint makes too


class VocabularySpecialisation(NamedTuple):
    """Says how far a token's id decides its expert, as shares from 0 to 1."""

    share_LV: np.ndarray  # the share of an id's tokens that chose the id's most frequent expert
    mean_L: np.ndarray  # the share of all tokens that chose their own id's most frequent expert
    by_load_L: np.ndarray  # the share of all tokens that chose the most loaded expert


Counts = TypeVar("Counts", ChoiceCounts, OverlapCounts)


def token_classes(texts: Sequence[str], special_ids: Collection[int]) -> dict[str, np.ndarray]:
    """Returns the ids of a vocabulary by kind of character; every id is in exactly one class.

    `texts` holds the text of each id. A token of several characters belongs to the class of its
    first one that is no space, tab or line end, since many tokens are a word with a space before
    it. Where it has no other, the last one decides. `special_ids`, which stand for no text, are the
    boundaries between documents and other special tokens.
    """
    names = {character: name for name, group in _CHARACTERS.items() for character in group}
    classes: dict[str, list[int]] = {name: [] for name in (*_CHARACTERS, _SPECIAL, _OTHER)}
    for id, text in enumerate(texts):
        decisive = (text.lstrip(" \t\n\r") or text[-1:])[:1]
        classes[_SPECIAL if id in special_ids else names.get(decisive, _OTHER)].append(id)
    return {name: np.array(ids, int) for name, ids in classes.items()}


def count_choices(
    experts_LNA: np.ndarray, ids_N: np.ndarray, vocab_size: int, num_experts: int
) -> ChoiceCounts:
    """Counts the choices of N tokens by token id, and by pair of experts.

    The pairs are exact for up to 16 million tokens at a time, which float32 can count.
    """
    choices, pairs = [], []
    for experts_NA in experts_LNA:
        # One bin for each id and expert, and for each id another one for dropped assignments.
        bins_NA = ids_N[:, None] * (num_experts + 1) + experts_NA
        counts = np.bincount(bins_NA.ravel(), minlength=vocab_size * (num_experts + 1))
        choices.append(counts.reshape(vocab_size, num_experts + 1)[:, :-1])
        # A matrix product in float32 is many times faster than one in integers.
        is_chosen_NE = np.zeros((len(ids_N), num_experts + 1), np.float32)
        is_chosen_NE[np.arange(len(ids_N))[:, None], experts_NA] = 1
        pairs.append((is_chosen_NE.T @ is_chosen_NE)[:-1, :-1].astype(np.int64))
    return ChoiceCounts(
        np.bincount(ids_N, minlength=vocab_size), np.stack(choices), np.stack(pairs)
    )


def count_overlap(
    earlier_LNA: np.ndarray, later_LNA: np.ndarray, num_experts: int
) -> OverlapCounts:
    """Counts an earlier checkpoint's choices that a later one makes too, for the same N tokens."""
    is_chosen_LNA = earlier_LNA < num_experts
    # A token's choices have no order: each is compared with all of the later ones.
    is_found_LNA = np.any(earlier_LNA[..., :, None] == later_LNA[..., None, :], axis=-1)
    return OverlapCounts(
        chosen_L=np.sum(is_chosen_LNA, axis=(1, 2)),
        common_L=np.sum(is_chosen_LNA & is_found_LNA, axis=(1, 2)),
    )


def sum_counts(counts: Iterable[Counts]) -> Counts:
    """Returns the counts of all batches together, of which there is at least one."""
    return functools.reduce(lambda total, more: type(total)(*map(np.add, total, more)), counts)


def load_shares(choices_LVE: np.ndarray) -> np.ndarray:
    """Returns each expert's share of all assignments, [L, E]; an even load gives each 1/E."""
    counts_LE = choices_LVE.sum(axis=1)
    return counts_LE / np.maximum(counts_LE.sum(axis=-1, keepdims=True), 1)


def class_shares(choices_LVE: np.ndarray, classes: Sequence[np.ndarray]) -> np.ndarray:
    """Returns each expert's share of the assignments of each class of ids, [L, classes, E].

    A class prefers an expert whose share is more than 1/E. The shares of a class without
    assignments are 0.
    """
    return np.stack([load_shares(choices_LVE[:, ids]) for ids in classes], axis=1)


def coactivation(pairs_LEE: np.ndarray) -> np.ndarray:
    """Returns how often the tokens that chose an expert also chose another, [L, E, E].

    Entry [l, i, j] is a share of the tokens that chose expert i in layer l: those that chose j too.
    The row of an expert that no token chose is 0.
    """
    chosen_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
    return pairs_LEE / np.maximum(chosen_LE, 1)[..., None]


def vocabulary_specialisation(counts: ChoiceCounts) -> VocabularySpecialisation:
    """Returns how far a token's id decides its expert; 1 means that the id alone does.

    `mean_L` is never less than `by_load_L`. The two are equal where the most frequent expert of
    every id is the most loaded one, so the part above `by_load_L` is what the ids decide.
    """
    largest_LV = counts.choices_LVE.max(axis=-1)
    num_tokens = max(counts.tokens_V.sum(), 1)
    return VocabularySpecialisation(
        share_LV=largest_LV / np.maximum(counts.tokens_V, 1),
        mean_L=largest_LV.sum(axis=-1) / num_tokens,
        by_load_L=counts.choices_LVE.sum(axis=1).max(axis=-1) / num_tokens,
    )


def saturation(counts: OverlapCounts) -> np.ndarray:
    """Returns the share of an earlier checkpoint's choices that the later one makes too, [L].

    Experts drawn at random would make it A/E; it is 1 where the routers choose as before.
    """
    return counts.common_L / np.maximum(counts.chosen_L, 1)
