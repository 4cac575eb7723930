"""Configures the optimizer, the training loop and where metrics are written."""

import dataclasses
import math
from typing import Literal

from moe.config.checks import (
    ConfigError,
    as_computed,
    check_not_negative,
    check_positive,
    check_range,
    check_types,
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Describes AdamW (Loshchilov & Hutter 2019) and its schedule, which begins with a warm-up."""

    learning_rate: float = 1e-3  # the highest learning rate, at the end of the warm-up
    # How the learning rate falls after the warm-up: along a "cosine", or not before the last
    # decay_fraction of the run ("wsd", for warm-up, stable, decay).
    schedule: Literal["cosine", "wsd"] = "cosine"
    # The fraction of train.steps in which the learning rate rises from 0 to learning_rate.
    warmup_fraction: float = 0.1
    # The number of steps in which it rises, whatever train.steps is; None takes warmup_fraction.
    warmup_steps: int | None = None
    # The fraction of train.steps, the last ones, in which "wsd" lowers the learning rate.
    decay_fraction: float = 0.2
    # The learning rate at the end of the run, as a fraction of learning_rate.
    final_learning_rate_fraction: float = 0.1
    # The decay of weight matrices: each step subtracts weight_decay * learning rate * the matrix.
    weight_decay: float = 0.1
    beta1: float = 0.9  # the decay of the running mean of gradients
    beta2: float = 0.95  # the decay of the running mean of squared gradients
    clip_norm: float = 1.0  # the largest norm of a gradient; larger gradients are scaled down to it

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "learning_rate", "clip_norm")
        check_range(self, 0.0, 1.0, "final_learning_rate_fraction")
        for name in ("beta1", "beta2"):
            if not 0.0 <= as_computed(self, name) < 1.0:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is not a decay: "
                    f"set {name} to at least 0.0 and less than 1.0"
                )
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ConfigError(
                f"warmup_fraction={self.warmup_fraction} is not a fraction of the run: "
                "set warmup_fraction to at least 0.0 and less than 1.0"
            )
        check_range(self, 0.0, 1.0, "decay_fraction")
        check_not_negative(self, "weight_decay")
        self._check_updates()
        if self.warmup_steps is not None:
            check_not_negative(self, "warmup_steps")

    def _check_updates(self) -> None:
        """Raises ConfigError if an update could make a parameter infinite, with finite gradients.

        The root of the second moment, plus 1e-8, divides the first moment, which is at most as
        large as a clipped gradient. So an update is at most 1e8 times these numbers' product, 1e28,
        and as long as decay makes nothing larger, 1e10 updates are finite.
        """
        rate, decay = as_computed(self, "learning_rate"), as_computed(self, "weight_decay")
        largest_gradient = min(as_computed(self, "clip_norm"), _LARGEST_NORM)
        if rate * largest_gradient > _LARGEST_PRODUCT:
            raise ConfigError(
                f"learning_rate={self.learning_rate} could make an infinite update with "
                f"clip_norm={self.clip_norm}: set learning_rate to "
                f"{_rounded_down(_LARGEST_PRODUCT / largest_gradient)} or less"
            )
        if rate * decay > 2:
            raise ConfigError(
                f"weight_decay={self.weight_decay} times learning_rate={self.learning_rate} is "
                "more than 2, so decay would make weights larger: set weight_decay to "
                f"{_rounded_down(2 / rate)} or less"
            )


# The norm of a gradient whose squares have a finite sum in float32, and the bound of an update
# times 1e-8, with room for rounding.
_LARGEST_NORM, _LARGEST_PRODUCT = 2e19, 1.001e20


def _rounded_down(number: float) -> str:
    """Returns a positive number with two digits, rounded towards 0."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{math.floor(number / unit) * unit:.2g}"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Says how long a run trains, how much each step processes, and how often results are saved."""

    steps: int = 1000  # the number of updates of the parameters
    batch_size: int = 16  # the number of rows in a step, over all devices and microbatches
    accumulation: int = 1  # the number of microbatches into which a step's batch is divided
    # True gathers parameters over mesh.fsdp and mesh.expert once for all microbatches of a step,
    # and scatters gradients once. Each device then holds both whole, in float32, but of the experts
    # only its own. False does it for each layer and microbatch, and so do steps of one microbatch,
    # which would send no less.
    gather_once: bool = False
    # How often each microbatch goes around the stages of mesh.pipeline: 1 is GPipe's schedule, and
    # more rounds of fewer layers each are the circular one, whose stages wait less.
    pipeline_rounds: int = 1
    loss_chunk: int = 128  # the number of positions of each row whose logits are in memory at once
    log_every: int = 10  # the number of steps between two lines of metrics
    eval_every: int = 500  # the number of steps between two evaluations
    # The number of batches of the validation split in each evaluation. 0 takes the whole split.
    eval_batches: int = 0
    checkpoint_every: int = 500  # the number of steps between two checkpoints
    keep_last: int = 2  # the number of latest checkpoints that are not deleted
    # Checkpoints at multiples of this step are never deleted. 0 deletes all but the latest ones.
    keep_every: int = 0
    # The number of updates that may be skipped in a row, because the loss or the gradient is not
    # finite, before the run stops.
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(
            self, "steps", "batch_size", "accumulation", "loss_chunk", "log_every", "eval_every"
        )
        check_positive(self, "pipeline_rounds")
        check_positive(self, "checkpoint_every", "keep_last", "max_skipped_steps")
        check_not_negative(self, "eval_batches", "keep_every")
        if self.batch_size % self.accumulation:
            nearest = self.accumulation * max(1, round(self.batch_size / self.accumulation))
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"accumulation={self.accumulation}: set batch_size to {nearest}"
            )

    @property
    def gathers_once(self) -> bool:
        """Returns whether a step has several microbatches to gather parameters once for."""
        return self.gather_once and self.accumulation > 1


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Says where metrics are written besides metrics.jsonl, which is always written."""

    tensorboard: bool = True  # True writes the metrics for TensorBoard as well

    def __post_init__(self) -> None:
        check_types(self)
