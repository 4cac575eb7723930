"""Tests sampling against full forward passes, between rows, and its truncations by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.inference.generate import Sampling, _generate, generate, keep_likeliest
from moe.model.transformer import Transformer
from moe.parameters import unbox
from tests.tiny import TINY_MODEL

MODEL = Transformer(dataclasses.replace(TINY_MODEL, vocab_size=16, num_layers=2))
VARIABLES = jax.jit(lambda key: unbox(MODEL.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)})))(
    jax.random.key(0)
)
PROMPTS = [np.array([1, 2, 3, 4, 5]), np.array([7]), np.array([9, 9, 8])]


@jax.jit
def all_logits(tokens_BT):
    hidden = MODEL.apply(VARIABLES, {"tokens": tokens_BT}).hidden
    return MODEL.apply(VARIABLES, hidden, method="unembed")


def greedy_without_a_cache(prompt, count):
    tokens, length = np.zeros(16, np.int32), len(prompt)
    tokens[:length] = prompt
    for index in range(length, length + count):
        tokens[index] = np.argmax(all_logits(tokens[None])[0, index - 1])
    return tokens[length : length + count].tolist()


def test_greedy_equals_full_forward_passes():
    texts = generate(
        MODEL, VARIABLES, PROMPTS, max_new_tokens=6, end_id=-1, sampling=Sampling(temperature=0)
    )
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text.tolist() == greedy_without_a_cache(prompt, 6)


def test_generation_ends_at_the_end_token():
    expected = greedy_without_a_cache(PROMPTS[0], 6)
    end = next(
        token for index, token in enumerate(expected) if index and token not in expected[:index]
    )
    texts = generate(
        MODEL, VARIABLES, PROMPTS, max_new_tokens=6, end_id=end, sampling=Sampling(temperature=0)
    )
    assert texts[0].tolist() == expected[: expected.index(end)]


def test_a_row_does_not_depend_on_the_others_and_the_seed_decides():
    sample = lambda prompts, seed: generate(
        MODEL, VARIABLES, prompts, max_new_tokens=8, end_id=-1, seed=seed
    )
    together = sample(PROMPTS, 3)
    np.testing.assert_array_equal(together[0], sample(PROMPTS[:1], 3)[0])
    np.testing.assert_array_equal(together[2], sample([PROMPTS[1], PROMPTS[0], PROMPTS[2]], 3)[2])
    assert any(np.any(a != b) for a, b in zip(together, sample(PROMPTS, 4), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_one_cache(dtype):
    """The loops over tokens and layers neither copy nor convert the cache that they carry."""
    model = Transformer(dataclasses.replace(MODEL.config, num_layers=6, compute_dtype=dtype))
    declared = jax.eval_shape(
        lambda key: unbox(model.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)})),
        jax.random.key(0),
    )
    arrays = (
        declared,
        jax.ShapeDtypeStruct((2, 8), jnp.int32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.random.key(0),
    )
    compiled = _generate.lower(model, 4088, -1, Sampling(temperature=0), *arrays).compile()
    cache = sum(x.nbytes for x in jax.tree.leaves(model.init_cache(2, 4096)))
    assert compiled.memory_analysis().temp_size_in_bytes < 1.3 * cache


def test_keep_likeliest_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    kept = lambda top_k, top_p: np.isfinite(keep_likeliest(logits, top_k, top_p)[0]).tolist()
    assert kept(0, 1.0) == [True, True, True, True]
    assert kept(2, 1.0) == [False, True, False, True]
    assert kept(99, 1.0) == [True, True, True, True]
    assert kept(0, 0.65) == [False, True, False, True]  # 0.4 does not reach 0.65, 0.4 + 0.3 does
    assert kept(0, 0.75) == [False, True, True, True]
    assert kept(0, 1e-9) == [False, True, False, False]
    assert kept(1, 0.9) == [False, True, False, False]


@pytest.mark.parametrize(
    ("probs", "top_k", "top_p", "kept"),
    [
        ([0.3, 0.1, 0.1, 0.5], 0, 0.8, [0, 3]),  # 0.5 + 0.3 is the mass exactly
        ([0.3, 0.1, 0.1, 0.5], 0, 0.9, [0, 1, 3]),  # of two equal tokens, the lower id is kept
        ([0.25, 0.25, 0.25, 0.25], 0, 0.5, [0, 1]),
        ([0.25, 0.25, 0.25, 0.25], 0, 0.51, [0, 1, 2]),
        ([0.25, 0.25, 0.25, 0.25], 3, 1.0, [0, 1, 2]),
        ([0.1, 0.4, 0.1, 0.4], 3, 1.0, [0, 1, 3]),
        ([0.1] * 10, 0, 0.3, [0, 1, 2]),
        ([0.2, 0.2, 0.3, 0.3], 3, 0.75, [2, 3]),  # top_k leaves three, among which 0.3 is 3/8
        ([0.2, 0.2, 0.3, 0.3], 3, 0.76, [0, 2, 3]),
    ],
)
def test_tokens_are_kept_by_rank(probs, top_k, top_p, kept):
    logits = keep_likeliest(jnp.log(jnp.array([probs])), top_k, top_p)[0]
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(logits)), kept)
    np.testing.assert_array_equal(logits[np.array(kept)], jnp.log(jnp.array(probs))[np.array(kept)])


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=2e-38), Sampling(top_p=1e-45), Sampling(2e-38, 3, 1e-45)]
)
def test_the_least_random_sample_is_the_likeliest_token(sampling):
    sample = lambda sampling: generate(
        MODEL, VARIABLES, PROMPTS, max_new_tokens=2, end_id=-1, sampling=sampling
    )
    np.testing.assert_array_equal(sample(sampling), sample(Sampling(temperature=0)))


def test_samples_follow_the_distribution():
    prompts = [np.array([1, 2])] * 4000
    first = np.array(
        [text[0] for text in generate(MODEL, VARIABLES, prompts, max_new_tokens=1, end_id=-1)]
    )
    probs = jax.nn.softmax(all_logits(np.array([[1, 2]]))[0, -1])
    np.testing.assert_allclose(np.bincount(first, minlength=16) / 4000, probs, atol=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(temperature=-1.0)}, "temperature=-1.0"),
        (
            {"sampling": Sampling(temperature=1e-40)},
            "temperature=1e-40 is out of range: set it to 0 .*, or from 1.175494e-38",
        ),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature=nan"),
        ({"sampling": Sampling(temperature=1e39)}, "temperature=1e[+]39"),
        ({"sampling": Sampling(top_k=-1)}, "top_k=-1"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p=0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        (
            {"max_new_tokens": 10**12},
            r"max_new_tokens=10+ takes .* GiB of key/value cache, .* set max_new_tokens to less "
            r"than [1-9]",
        ),
        ({"prompts": []}, "prompts"),
        (
            {"prompts": [np.array([1, -1])]},
            "prompts hold the token -1, and vocab_size=16: give tokens from 0 to 15",
        ),
        ({"prompts": [np.array([1]), np.array([2**32 + 1])]}, "prompts hold the token 4294967297"),
        ({"prompts": [np.array([], int)]}, "prompts"),
    ],
)
def test_bad_options_are_refused(options, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 4, "end_id": -1} | options
    with pytest.raises(ValueError, match=message):
        generate(MODEL, VARIABLES, arguments.pop("prompts"), **arguments)
