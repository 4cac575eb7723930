"""Tests sampling against full forward passes, between rows, and its truncations by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.inference import generate as module
from moe.inference.generate import Sampling, generate, keep_likeliest, stream
from moe.model.transformer import Transformer
from moe.parameters import unbox
from tests.tiny import TINY_MODEL

MODEL = Transformer(dataclasses.replace(TINY_MODEL, vocab_size=16, num_layers=2))


@functools.cache
def variables():
    init = lambda key: unbox(MODEL.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)}))
    return jax.jit(init)(jax.random.key(0))


PROMPTS = [np.array([1, 2, 3, 4, 5]), np.array([7]), np.array([9, 9, 8])]


@jax.jit
def all_logits(variables, tokens_BT):
    hidden = MODEL.apply(variables, {"tokens": tokens_BT}).hidden
    return MODEL.apply(variables, hidden, method="unembed")


def check_choices(prompt, text, choose):
    """Checks each new token against `choose`, from the logits of one full forward pass."""
    tokens = np.zeros(64, np.int32)
    tokens[: len(prompt) + len(text)] = [*prompt, *text]
    places = np.arange(len(prompt), len(prompt) + len(text))
    assert (
        text.tolist()
        == choose(all_logits(variables(), tokens[None])[0][places - 1], places).tolist()
    )


def test_greedy_equals_full_forward_passes():
    texts = generate(
        MODEL, variables(), PROMPTS, max_new_tokens=36, end_id=-1, sampling=Sampling(temperature=0)
    )
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert len(text) == 36
        check_choices(prompt, text, lambda logits, _: logits.argmax(-1))


def test_samples_depend_on_seed_row_and_position_alone():
    """They are those of full forward passes, so no place at which the loop stops can matter."""
    texts = generate(MODEL, variables(), PROMPTS, max_new_tokens=36, end_id=-1, seed=3)
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        check_choices(prompt, text, functools.partial(sample, jax.random.key(3), row))


@jax.jit
def sample(key, row, logits, places):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, row), places)
    return jax.vmap(jax.random.categorical)(keys, logits)


def test_text_arrives_in_parts_while_it_is_sampled(monkeypatch):
    options = {"max_new_tokens": 36, "end_id": -1, "seed": 3}
    whole = generate(MODEL, variables(), PROMPTS, **options)
    runs = []
    extend = module._extend
    monkeypatch.setattr(module, "_extend", lambda *rest: runs.append(0) or extend(*rest))
    for number, parts in enumerate(stream(MODEL, variables(), PROMPTS, **options)):
        assert len(runs) == number + 1, "later tokens were sampled before these were given"
        for text, part in zip(whole, parts, strict=True):
            assert part.tolist() == text[16 * number : 16 * (number + 1)].tolist()
    assert len(runs) == 3


def test_rows_may_end_anywhere_in_a_part(monkeypatch):
    """Parts have three tokens. A row ends at the start of a part, in it, and at its end."""
    monkeypatch.setattr(module, "_CHUNK", 3)
    module._extend.clear_cache()
    options = {"max_new_tokens": 10, "seed": 3}
    whole = generate(MODEL, variables(), PROMPTS, end_id=-1, **options)
    firsts = [index for index, token in enumerate(whole[0]) if token not in whole[0][:index]]
    for remainder in (0, 1, 2):
        end_id = int(whole[0][next(i for i in firsts if i > 2 and i % 3 == remainder)])
        parts = [*stream(MODEL, variables(), PROMPTS, end_id=end_id, **options)]
        expected = [[*text, end_id].index(end_id) for text in whole]
        for text, length, row in zip(whole, expected, zip(*parts, strict=True), strict=True):
            assert np.concatenate(row).tolist() == text[:length].tolist()
        # At most one part is empty, where no row has any token left.
        assert len(parts) <= max(expected) // 3 + 1
    module._extend.clear_cache()


def test_generation_ends_at_the_end_token():
    options = {"max_new_tokens": 6, "sampling": Sampling(temperature=0)}
    expected = generate(MODEL, variables(), PROMPTS, end_id=-1, **options)[0].tolist()
    end = next(
        token for index, token in enumerate(expected) if index and token not in expected[:index]
    )
    texts = generate(MODEL, variables(), PROMPTS, end_id=end, **options)
    assert texts[0].tolist() == expected[: expected.index(end)]


def test_a_row_does_not_depend_on_the_others_and_the_seed_decides():
    sample = lambda prompts, seed: generate(
        MODEL, variables(), prompts, max_new_tokens=8, end_id=-1, seed=seed
    )
    together = sample(PROMPTS, 3)
    np.testing.assert_array_equal(together[0], sample(PROMPTS[:1], 3)[0])
    np.testing.assert_array_equal(together[2], sample([PROMPTS[1], PROMPTS[0], PROMPTS[2]], 3)[2])
    assert any(np.any(a != b) for a, b in zip(together, sample(PROMPTS, 4), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_one_cache(dtype):
    """The loops over tokens and layers neither copy nor convert the cache that they carry."""
    model = Transformer(dataclasses.replace(MODEL.config, num_layers=6, compute_dtype=dtype))
    variables = jax.eval_shape(
        lambda key: unbox(model.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)})),
        jax.random.key(0),
    )
    loop = module._Loop(model, 4088, -1, Sampling(temperature=0))
    lengths_B, key = jax.ShapeDtypeStruct((2,), jnp.int32), jax.random.key(0)
    tokens_BT = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    read = module._read_prompts.lower(loop, variables, tokens_BT, lengths_B, key)
    progress = jax.eval_shape(module._read_prompts, loop, variables, tokens_BT, lengths_B, key)
    extend = module._extend.lower(loop, variables, progress, lengths_B, key)
    cache = sum(x.nbytes for x in jax.tree.leaves(model.init_cache(2, 4096)))
    for lowered in (read, extend):
        memory = lowered.compile().memory_analysis()
        # What a program returns in place of an argument takes no memory of its own.
        returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
        is_argument = lowered is extend
        assert memory.temp_size_in_bytes + returned + is_argument * cache < 1.3 * cache


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
        MODEL, variables(), PROMPTS, max_new_tokens=2, end_id=-1, sampling=sampling
    )
    np.testing.assert_array_equal(sample(sampling), sample(Sampling(temperature=0)))


def test_samples_follow_the_distribution():
    prompts = [np.array([1, 2])] * 4000
    first = np.array(
        [text[0] for text in generate(MODEL, variables(), prompts, max_new_tokens=1, end_id=-1)]
    )
    probs = jax.nn.softmax(all_logits(variables(), np.array([[1, 2]]))[0, -1])
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
        ({"seed": 2**32 + 1}, "seed=4294967297 is out of range: set it to at least 0"),
        ({"seed": -1}, "seed=-1 is out of range"),
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
        generate(MODEL, variables(), arguments.pop("prompts"), **arguments)
