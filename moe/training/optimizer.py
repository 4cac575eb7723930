"""AdamW, its schedule, and which parameters decay."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from moe.config import OptimizerConfig, RunConfig
from moe.parameters import map_declared

# Norms and embeddings keep their scale: only what multiplies activations decays.
DECAYED_KINDS = ("linear", "router", "unembedding")


def make_schedule(config: RunConfig) -> optax.Schedule:
    """Learning rate by update, the first being number 0: linear from 0 to the peak, then a cosine
    to a fraction of it at number `steps`.
    """
    peak = config.optimizer.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=config.warmup_steps,
        decay_steps=config.train.steps,
        end_value=peak * config.optimizer.final_learning_rate_fraction,
    )
    return _with_standard_promotion(schedule)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, declarations: Any
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019, algorithm 2) with decay by the
    kind of each parameter.
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
    """Lets optax mix integers and floats, as it does, where the caller has set
    jax_numpy_dtype_promotion="strict".
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


def tree_where(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the scalar condition holds, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jax.numpy.where(condition, a, b), new, old)


def all_finite(tree: Any) -> jax.Array:
    """Whether a tree's arrays hold neither NaN nor an infinity."""
    return jax.numpy.all(
        jax.numpy.stack([jax.numpy.all(jax.numpy.isfinite(x)) for x in jax.tree.leaves(tree)])
    )
