"""Makes the optimizer of a run: AdamW, its schedule, and which parameters decay."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from moe.config import OptimizerConfig, RunConfig
from moe.parameters import map_declared

# Only matrices that multiply activations decay. Norms and embeddings keep their scale.
DECAYED_KINDS = ("linear", "router", "unembedding")


class Decay(NamedTuple):
    """Says when the learning rate of the schedule "wsd" falls. Both numbers are int32.

    They are arguments of a run's program instead of constants in it. A program with other constants
    may round differently, and a fork must compute bit for bit what a run without a fork does.
    """

    start: Any  # the number of updates before the decay
    steps: Any  # the number of updates in it


def choose_decay(config: RunConfig) -> Decay:
    """Returns when the learning rate of a run falls."""
    steps = config.decay_steps
    return Decay(np.int32(config.train.steps - steps), np.int32(steps))


def make_schedule(config: RunConfig, decay: Decay | None = None) -> optax.Schedule:
    """Makes the learning rate as a function of the update's number, which begins at 0.

    It rises linearly from 0 to its peak, and falls to a fraction of the peak, which it reaches at
    the number `config.train.steps`. The schedule "cosine" begins to fall after the warm-up, and
    "wsd" stays at the peak until the last `config.decay_steps` updates. `decay` says the same as
    `config`, by default, and may be traced.
    """
    peak = config.optimizer.learning_rate
    if config.optimizer.schedule == "wsd":
        warmup = config.warmup_steps
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warmup),
                # A joined schedule counts from where it begins.
                lambda updates: _decayed(config, updates + warmup, decay or choose_decay(config)),
            ],
            [warmup],
        )
    else:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=config.warmup_steps,
            decay_steps=config.train.steps,
            end_value=peak * config.optimizer.final_learning_rate_fraction,
        )
    return _with_standard_promotion(schedule)


def _decayed(config: RunConfig, updates: Any, decay: Decay) -> jax.Array:
    """Returns a learning rate after the warm-up: its peak, then "1-sqrt" (Hägele et al. 2024).

    Before the decay it is the peak itself, bit for bit.
    """
    peak, final = config.optimizer.learning_rate, config.optimizer.final_learning_rate_fraction
    progress = jax.numpy.clip((updates - decay.start) / decay.steps, 0.0, 1.0)
    falling = peak * (1 - (1 - final) * jax.numpy.sqrt(progress))
    return jax.numpy.where(updates <= decay.start, peak, falling)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, declarations: Any
) -> optax.GradientTransformation:
    """Makes AdamW (Loshchilov & Hutter 2019, algorithm 2) with clipping by the global norm.

    Whether a parameter decays depends on the kind that it is declared with.
    """
    decayed = map_declared(lambda leaf: leaf.kind in DECAYED_KINDS, declarations)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
    return optimizer._replace(update=_with_standard_promotion(optimizer.update))


def _with_standard_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """Allows a function of optax to mix integers and floats.

    Some of them do so, which is an error in a program with jax_numpy_dtype_promotion="strict".
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


def tree_where(condition: jax.Array, new: Any, old: Any) -> Any:
    """Selects `new` if the scalar condition holds and `old` if not, leaf by leaf."""
    return jax.tree.map(lambda x, y: jax.numpy.where(condition, x, y), new, old)
