"""Makes tables of runs whose coefficients are known."""

import numpy as np

from moe.scaling.experiments.runs import Runs, make_runs
from moe.scaling.laws import LAWS, predict

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


def isoflop_runs(noise: float, seed: int = 0, budgets: int = 5, sizes: int = 7, **columns) -> Runs:
    """Returns runs of an iso-FLOP sweep whose losses follow TRUTH, with relative noise."""
    flops = np.repeat(np.geomspace(1e18, 1e20, budgets), sizes)
    best = (TRUTH["alpha"] * TRUTH["A"] / TRUTH["beta"] / TRUTH["B"]) ** (1 / 0.72)
    best = best * (flops / 6) ** (TRUTH["beta"] / 0.72)
    parameters = np.tile(np.geomspace(0.2, 5, sizes), budgets) * best
    runs = {"parameters": parameters, "tokens": flops / (6 * parameters)}
    loss = predict(LAWS["chinchilla"], TRUTH, make_runs(**runs))
    error = noise * np.random.default_rng(seed).standard_normal(len(flops))
    return make_runs(**runs, **{"loss": loss * np.exp(error), **columns})


def learning_rate_runs(sizes, tokens, batches=(2.0**16,), noise: float = 0.003) -> Runs:
    """Returns a grid of learning rates and batches for each size, with the step law's optima."""
    generator = np.random.default_rng(0)
    rates = 2.0 ** np.arange(-14, -4)
    pair, rate, batch = (
        x.ravel() for x in np.meshgrid(np.arange(len(sizes)), rates, batches, indexing="ij")
    )
    size, data = np.asarray(sizes)[pair], np.asarray(tokens)[pair]
    best_rate, best_batch = 1.79 * size**-0.713 * data**0.307, 0.58 * data**0.571
    runs = {"parameters": size, "tokens": data, "learning_rate": rate, "batch_tokens": batch}
    loss = predict(LAWS["chinchilla"], TRUTH, make_runs(**runs))
    loss = loss * (1 + 0.02 * np.log(rate / best_rate) ** 2)
    if len(batches) > 1:
        loss = loss * (1 + 0.01 * np.log(batch / best_batch) ** 2)
    return make_runs(**runs, loss=loss * (1 + noise * generator.standard_normal(len(loss))))
