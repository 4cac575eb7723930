"""Tests scores of sequences against full forward passes in float64, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ConfigError, MeshConfig, RunConfig, TrainConfig
from moe.inference.scoring import Part, _score, padded_length, score_parts
from moe.model.transformer import Transformer
from moe.parallel.mesh import make_mesh
from moe.parameters import unbox
from tests.tiny import TINY_MODEL

MODEL = Transformer(dataclasses.replace(TINY_MODEL, vocab_size=16, num_layers=2))
CONFIG = RunConfig(mesh=MeshConfig(data=-1), train=TrainConfig(batch_size=8))
VARIABLES = jax.jit(lambda key: unbox(MODEL.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)})))(
    jax.random.key(0)
)


@jax.jit
def all_logits(tokens_BT):
    hidden = MODEL.apply(VARIABLES, {"tokens": tokens_BT}).hidden
    return MODEL.apply(VARIABLES, hidden, method="unembed")


def plain_score(part: Part) -> tuple[float, bool]:
    padded = np.zeros((1, 400), np.int32)
    padded[0, : len(part.tokens)] = part.tokens
    logits = np.asarray(all_logits(padded), np.float64)[0]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scored = range(part.start, len(part.tokens))
    return (
        sum(log_probs[place - 1, part.tokens[place]] for place in scored),
        all(logits[place - 1].argmax() == part.tokens[place] for place in scored),
    )


def scores(parts: list[Part], batch_size: int = 8) -> list[tuple[float, bool]]:
    mesh = make_mesh(CONFIG)
    found = dict(score_parts(MODEL, VARIABLES, parts, batch_size=batch_size, mesh=mesh))
    return [tuple(found[number]) for number in range(len(parts))]


def test_scores_equal_full_forward_passes():
    """The lengths fill one batch and a part of another, and one needs two chunks of logits."""
    generator = np.random.default_rng(0)
    lengths = [2, 33, 5, 34, 7, 16, 300, 2, 9, 40]
    parts = [Part(generator.integers(0, 16, n), int(generator.integers(1, n))) for n in lengths]
    # An answer of the model itself is greedy, and one with another token is not.
    greedy = [3]
    for _ in range(5):
        padded = np.zeros((1, 400), np.int32)
        padded[0, : len(greedy)] = greedy
        greedy.append(int(np.argmax(all_logits(padded)[0, len(greedy) - 1])))
    parts += [Part(np.array(greedy), 1), Part(np.array([*greedy[:-1], (greedy[-1] + 1) % 16]), 1)]
    found, expected = scores(parts), [plain_score(part) for part in parts]
    np.testing.assert_allclose([s[0] for s in found], [s[0] for s in expected], rtol=1e-5)
    assert [s[1] for s in found] == [s[1] for s in expected]
    assert [s[1] for s in found[-2:]] == [True, False]


def test_64_bit_types_and_strict_promotion_change_nothing():
    parts = [Part(np.array([1, 2, 3, 4]), 2), Part(np.array([5, 6]), 1)]
    expected = scores(parts)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        found = scores(parts)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_lengths_share_programs():
    """Sequences of 1,000 lengths need six programs."""
    before = _score._cache_size()
    assert len({padded_length(length) for length in range(1, 1025)}) == 6
    scores([Part(np.ones(length, np.int32), 1) for length in range(2, 34)])
    assert _score._cache_size() - before <= 1


def test_a_token_that_the_model_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="prompts hold the token 16, and vocab_size=16"):
        scores([Part(np.array([1, 16]), 1)])
