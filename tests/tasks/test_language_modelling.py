"""The loss of language modelling by hand, its scores, and the choice of a run's task."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe import losses
from moe.config import ConfigError, RunConfig
from moe.cross_entropy import Unembedding
from moe.model.stack import Output
from moe.tasks import choose_task, make_task
from moe.tasks.language_modelling import bits_per_byte, counts, next_token_loss


def test_hand_worked_loss():
    # Logits (ln 1, ln 3): target 0 has probability 1/4, target 1 has 3/4; the third position is
    # masked.
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]]]))
    batch = {
        "targets": jnp.array([[0, 1, 0]]),
        "loss_mask": jnp.array([[True, True, False]]),
        "segment_ids": jnp.array([[1, 1, 1]]),
    }
    sums = next_token_loss(chunk=2)(Output(logits, (), None), Unembedding(jnp.eye(2)), batch)
    np.testing.assert_allclose(sums["loss"], np.log(4) + np.log(4 / 3), rtol=1e-6)
    assert sums["targets"] == 2
    np.testing.assert_allclose(
        losses.metrics(sums)["loss"], (np.log(4) + np.log(4 / 3)) / 2, rtol=1e-6
    )


def test_bits_per_byte():
    assert bits_per_byte(np.log(2) * 3, num_targets=10, num_bytes=15) == pytest.approx(2.0)


CUSTOM = RunConfig(task="custom")


def test_random_rows_are_batches_of_the_task():
    task = make_task(RunConfig())
    rows = task.random_rows(RunConfig(), 3)
    assert {name: array.shape for name, array in rows.items()} == dict.fromkeys(task.dims, (3, 256))
    assert float(task.counts(rows)["targets"]) == 3 * 256


def test_a_run_has_the_task_that_its_config_names_or_else_the_callers():
    task = make_task(RunConfig())
    assert choose_task(RunConfig(), None).dims == task.dims
    assert choose_task(CUSTOM, task) is task
    with pytest.raises(ConfigError, match=r"config.task='custom' needs a Task .* as task=\.\.\."):
        choose_task(CUSTOM, None)
    with pytest.raises(ConfigError, match=r"set config\.task to 'custom'"):
        choose_task(RunConfig(), task)


def test_a_custom_task_need_not_have_a_vocabulary_of_bytes():
    small = dataclasses.replace(CUSTOM.model, vocab_size=4)
    assert dataclasses.replace(CUSTOM, model=small).model.vocab_size == 4
    with pytest.raises(ConfigError, match="smaller than the byte tokenizer's 256"):
        RunConfig(model=small)


def test_counts_need_no_segments_and_refuse_weights():
    tokens, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    for batch in ({}, {"segment_ids": tokens + 1}):
        found = counts(batch | {"loss_mask": mask})
        assert (int(found["targets"]), int(found["tokens"])) == (6, 6)
    with pytest.raises(TypeError, match=r"^loss_mask is float32, .*: give loss_mask > 0"):
        counts({"targets": tokens, "loss_mask": 0.5 * mask})
