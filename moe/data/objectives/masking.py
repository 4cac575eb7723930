"""Masks tokens of a row, which an encoder then predicts (Devlin et al. 2018, section 3.1)."""

import numpy as np

from moe.config.objectives import NOISE_DENSITY
from moe.data.objectives.draws import random_choice, random_words

_MASKED, _REPLACED = 0.8, 0.1  # the shares of the chosen tokens; the others stay as they are


def mask_tokens(
    row: dict[str, np.ndarray],
    key: tuple[int, ...],
    *,
    mask_id: int,
    boundary_id: int,
    vocab_size: int,
) -> dict[str, np.ndarray]:
    """Returns a row in which 15 % of the tokens are chosen as targets.

    Of these 80 % become `mask_id`, 10 % a random token below `vocab_size`, and 10 % stay. A target
    is the token that stood at the position itself, and the loss mask is True there alone.
    Boundaries of documents are never chosen.
    """
    tokens = row["tokens"]
    # Three draws for each position: whether it is chosen, what becomes of it, and a random token.
    order_T, fate_T, token_T = random_words(key, 3 * len(tokens)).reshape(3, -1)
    candidates = np.flatnonzero((row["segment_ids"] > 0) & (tokens != boundary_id))
    chosen = candidates[random_choice(order_T[candidates], _number_of_targets(len(candidates)))]
    is_target = np.zeros(len(tokens), bool)
    is_target[chosen] = True
    fate_T = fate_T / 2.0**32
    random_tokens = (token_T % vocab_size).astype(tokens.dtype)
    replaced = np.where(fate_T < _MASKED + _REPLACED, random_tokens, tokens)
    replaced = np.where(fate_T < _MASKED, tokens.dtype.type(mask_id), replaced)
    return row | {
        "tokens": np.where(is_target, replaced, tokens),
        "targets": np.where(is_target, tokens, 0),
        "loss_mask": is_target,
    }


def _number_of_targets(tokens: int) -> int:
    """Returns how many of so many tokens are chosen: at least one, if there is one."""
    return min(max(round(NOISE_DENSITY * tokens), 1), tokens)
