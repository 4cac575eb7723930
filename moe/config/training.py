"""The config of the optimizer, of the training loop and of its metrics."""

import dataclasses

from moe.config.checks import (
    ConfigError,
    check_not_negative,
    check_positive,
    check_range,
    check_types,
    computed,
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with a linear warm-up, then a cosine.

    The cosine ends at a fraction of the peak learning rate.
    """

    learning_rate: float = 1e-3  # the peak
    warmup_fraction: float = 0.1  # of train.steps, in which the learning rate rises to its peak
    final_learning_rate_fraction: float = 0.1  # of the peak, where the cosine ends
    weight_decay: float = 0.1  # of matrices, times the learning rate
    beta1: float = 0.9  # decay of the gradient's mean
    beta2: float = 0.95  # decay of the squared gradient's mean
    clip_norm: float = 1.0  # the norm that larger gradients are scaled down to

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "learning_rate", "clip_norm")
        check_range(self, 0.0, 1.0, "final_learning_rate_fraction")
        for name in ("beta1", "beta2"):
            if not 0.0 <= computed(self, name) < 1.0:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is not a decay: "
                    f"set {name} to at least 0.0 and less than 1.0"
                )
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ConfigError(
                f"warmup_fraction={self.warmup_fraction} is not a part of the run: "
                "set warmup_fraction to at least 0.0 and less than 1.0"
            )
        check_not_negative(self, "weight_decay")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run trains, how much at a time, and what it writes down on the way."""

    steps: int = 1000  # updates of the parameters
    batch_size: int = 16  # rows of a step, over all devices and microbatches
    accumulation: int = 1  # microbatches of a step
    loss_chunk: int = 128  # positions of each row whose logits exist at once
    log_every: int = 10  # steps from one line of metrics to the next
    eval_every: int = 500  # steps from one evaluation to the next
    eval_batches: int = 0  # batches of the validation split at each evaluation; 0 takes them all
    checkpoint_every: int = 500  # steps from one checkpoint to the next
    keep_last: int = 2  # checkpoints kept besides the multiples of keep_every
    keep_every: int = 0  # 0 keeps only the last ones
    max_skipped_steps: int = 10  # updates in a row that are not finite, after which the run stops

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(
            self, "steps", "batch_size", "accumulation", "loss_chunk", "log_every", "eval_every"
        )
        check_positive(self, "checkpoint_every", "keep_last", "max_skipped_steps")
        check_not_negative(self, "eval_batches", "keep_every")
        if self.batch_size % self.accumulation:
            nearest = self.accumulation * max(1, round(self.batch_size / self.accumulation))
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"accumulation={self.accumulation}: set batch_size to {nearest}"
            )


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl, which is always written."""

    tensorboard: bool = True  # metrics are written for TensorBoard as well

    def __post_init__(self) -> None:
        check_types(self)
