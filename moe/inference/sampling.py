"""Says how tokens are sampled, and refuses options that make no sense. It imports no JAX."""

from typing import NamedTuple

from moe.config import ConfigError
from moe.config.checks import LARGEST_FLOAT, SMALLEST_FLOAT


class Sampling(NamedTuple):
    """Says how the next token is sampled from the model's distribution."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # only this many tokens, the likeliest, may be sampled; 0 allows all
    top_p: float = 1.0  # only the likeliest tokens up to this total probability; 1 allows all


PLAIN = Sampling()  # samples from the model's own distribution


def check_sampling(sampling: Sampling, max_new_tokens: int) -> None:
    """Raises ConfigError for a sampling option that makes no sense."""
    if sampling.temperature and not SMALLEST_FLOAT <= sampling.temperature <= LARGEST_FLOAT:
        raise ConfigError(
            f"temperature={sampling.temperature} is out of range: set it to 0 (the likeliest "
            f"token), or from {SMALLEST_FLOAT:.7g} to {LARGEST_FLOAT:.7g}"
        )
    if sampling.top_k < 0:
        raise ConfigError(
            f"top_k={sampling.top_k} is negative: set it to a number of tokens, or 0 for all"
        )
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p={sampling.top_p} is out of range: set it above 0 and up to 1")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is not positive: set it to 1 or more")
