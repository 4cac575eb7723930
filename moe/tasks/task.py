"""Defines what a task is: it connects the training loop with a model and its data."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from moe.config import ModelConfig, RunConfig
from moe.cross_entropy import Unembedding
from moe.data.rows import Rows, Transform, unchanged
from moe.losses import Sums
from moe.model.stack import Output
from moe.model.tokens import Batch


class Task(NamedTuple):
    """Holds the functions that define what a run trains. `fit` calls only these.

    A batch is a dict of arrays whose first dimension is B, the rows. Sums and counts add up over
    microbatches, devices and evaluation batches, so they must be sums over rows, never means.
    """

    # Makes the model. `model.apply(variables, batch)` returns an `Output`, and the model's method
    # `unembedding` an `Unembedding`, which turns hidden states into logits.
    model: Callable[[ModelConfig], nn.Module]

    # The dimension letters of each field of a batch, such as {"tokens": "BT", "label": "B"}. The
    # mesh splits the field by them (`moe.config.layout.RULES`).
    dims: Mapping[str, str]

    # The smallest batch that the model takes. Only the shapes of the parameters come from it.
    init_batch: Mapping[str, np.ndarray]

    # Opens a split of the run's data by its name. The loader makes all batches from the rows.
    rows: Callable[[RunConfig, str], Rows]

    # Makes a batch of a given number of rows of random content. A step on them costs as much as
    # one on real rows, so benchmarks need no data.
    random_rows: Callable[[RunConfig, int], dict[str, np.ndarray]]

    # Returns float32 sums over a batch: `loss`, which training minimises; `router`, which is
    # `losses.in_layer_order(output.stats)`; everything that `counts` returns; and whatever
    # `metrics` and `score` need besides.
    loss: Callable[[Output, Unembedding, Batch], Sums]

    # Returns what sums are divided by, from the batch alone: `targets`, the number of terms in
    # `loss`, and `tokens`, the number of tokens that sparse layers route.
    counts: Callable[[Batch], Sums]

    # Returns means from sums: `loss`, `router` (both as `losses.metrics` makes them) and other
    # scalars. They are logged for training steps and for evaluations. It is called inside jit.
    metrics: Callable[[Sums], dict[str, Any]]

    # Returns further numbers of an evaluation, from its sums and the rows that it read, such as
    # bits per byte. It is called on the host.
    score: Callable[[Sums, Rows], dict[str, float]]

    # Returns the training FLOPs per token of a row (`moe.scaling.flops`). MFU is computed from it,
    # and is left out where it is None.
    training_flops: Callable[[RunConfig], float] | None = None

    # The names of the tokens that the task adds to the vocabulary of the run's tokenizer.
    special_tokens: tuple[str, ...] = ()

    # Makes the function from a row that `rows` holds to the row's fields of a batch. It is pure
    # NumPy and takes its random numbers only from its key (`moe.data.rows.Transform`).
    transform: Callable[[RunConfig], Transform] = lambda config: unchanged
