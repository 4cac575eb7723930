"""Defines masked tokens: an encoder predicts those tokens of a text that it does not see."""

import functools

from moe.config import RunConfig
from moe.config.objectives import MASK_TOKEN
from moe.data.objectives.masking import mask_tokens
from moe.data.rows import Transform
from moe.data.tokenizers import make_tokenizer
from moe.model.transformer import Encoder
from moe.tasks.language_modelling import language_modelling, no_score
from moe.tasks.task import Task


def masked_tokens(config: RunConfig) -> Task:
    """Returns the task of an encoder that predicts masked tokens of packed documents.

    Only the loss mask and the model differ from language modelling: a target is the token of its
    own position, and a loss per masked token says nothing of bits per byte.
    """
    return language_modelling(config)._replace(
        model=functools.partial(Encoder, makes_logits=True),
        score=no_score,
        special_tokens=(MASK_TOKEN,),
        transform=transform,
    )


def transform(config: RunConfig) -> Transform:
    """Returns the function that masks the tokens of a prepared row."""
    tokenizer = make_tokenizer(config.data, (MASK_TOKEN,))
    return functools.partial(
        mask_tokens,
        mask_id=tokenizer.special_ids[MASK_TOKEN],
        boundary_id=tokenizer.boundary_id,
        vocab_size=tokenizer.vocabulary.size,
    )
