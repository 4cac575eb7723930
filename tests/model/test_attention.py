"""The options of attention, such as its mask, which several places have to know."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from launch.kernel_check import request_of
from moe.config import DataConfig, RunConfig, TrainConfig
from moe.kernels.benchmarks import first_start
from moe.model import attention
from moe.model.transformer import Transformer
from moe.parallel.mesh import make_mesh
from tests.tiny import TINY_MODEL

CONFIG = RunConfig(
    model=TINY_MODEL, data=DataConfig(sequence_length=8), train=TrainConfig(batch_size=1)
)
# The other keywords of these functions.
BESIDE = ("implementation", "layer", "refused", "q_segment_ids", "kv_segment_ids")


def watch(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[dict[str, Any]]:
    """Returns a list that the different options of a function's calls will come to stand in."""
    function, calls = getattr(module, name), []

    @functools.wraps(function)
    def record(*arguments: Any, **keywords: Any) -> Any:
        options = {
            key: value for key, value in keywords.items() if key not in BESIDE and value is not None
        }
        if options not in calls:
            calls.append(options)
        return function(*arguments, **keywords)

    patch.setattr(module, name, record)
    return calls


# A field that gives attention an option has a case here.
@pytest.mark.parametrize("change", [{}])
def test_all_places_know_every_option_of_a_call(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a kernel is chosen or checked for another call, or decoding differs from training."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(TINY_MODEL, **change))
    called, chosen, decoded = (
        watch(monkeypatch, attention, name)
        for name in ("flash_attention", "choose", "decode_attention")
    )
    model, tokens = Transformer(config.model), jnp.zeros((1, 1), jnp.int32)
    with jax.set_mesh(make_mesh(config, jax.devices()[:1])):
        variables = jax.eval_shape(model.init, jax.random.key(0), {"tokens": tokens})
        batch = {"tokens": tokens, "positions": tokens}
        jax.eval_shape(model.apply, variables, batch, model.init_cache(1, 8))
    assert called and called == chosen
    assert [options | {"causal": True} for options in decoded] == called
    checked, chosen_at_first = (
        watch(monkeypatch, first_start.attention, name) for name in ("flash_attention", "choose")
    )
    for call in first_start.calls_of(request_of(config))["attention"]:
        call.choose("cpu", ())
        jax.eval_shape(functools.partial(call.run, "reference", "float32"))
    assert checked == chosen_at_first == called
