"""Compiles for TPUs that are not attached what docs/importing.md says of other projects' meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe import ModelConfig, MoE, MoEConfig, Transformer
from moe.kernels.attention import flash_attention
from moe.parameters import unbox
from tests.kernels.programs import tpus

MODEL = ModelConfig(
    vocab_size=512,
    num_layers=2,
    model_dim=256,
    feed_forward_dim=512,
    num_heads=2,
    num_kv_heads=2,
    head_dim=128,
)


@pytest.mark.aot
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_attention_in_a_shard_map_sends_nothing(kind, monkeypatch):
    devices = np.array(tpus("v5e:2x2", monkeypatch)).reshape(2, 2)
    mesh = Mesh(devices, ("rows", "heads"), axis_types=(kind, kind))
    part = PartitionSpec("rows", None, "heads")
    attend = functools.partial(flash_attention, causal=True)
    attend = jax.shard_map(attend, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    q = jax.ShapeDtypeStruct((4, 256, 4, 128), jnp.bfloat16, sharding=NamedSharding(mesh, part))
    gradient = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v)), argnums=(0, 1, 2))
    program = jax.jit(gradient).lower(q, q, q).compile().as_text()
    assert "tpu_custom_call" in program
    assert not any(name in program for name in (" all-gather(", " all-to-all(", " all-reduce("))


@pytest.mark.aot
@pytest.mark.parametrize("axis", ["replica", "data"])
@pytest.mark.parametrize("name", ["Transformer", "MoE"])
def test_modules_compile_on_axes_with_other_names(name, axis, monkeypatch):
    """Rows that an axis of another name splits are gathered, since no compiler splits a kernel."""
    mesh = Mesh(np.array(tpus("v5e:2x2", monkeypatch)), (axis,), axis_types=(AxisType.Auto,))
    if name == "MoE":
        model = MoE(MoEConfig(num_experts=8, experts_per_token=2, expert_dim=256))
        shape, dtype, result = (8, 512, 256), jnp.bfloat16, lambda output: output[0]
        as_input = lambda x: x
    else:
        model, shape, dtype = Transformer(MODEL), (8, 512), jnp.int32
        result, as_input = lambda output: output.hidden, lambda tokens: {"tokens": tokens}
    init = lambda: unbox(model.init(jax.random.key(0), as_input(jnp.zeros(shape, dtype))))
    place = lambda spec: (
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    )
    variables = jax.tree.map(place(PartitionSpec()), jax.eval_shape(init))
    rows = place(PartitionSpec(axis))(jax.ShapeDtypeStruct(shape, dtype))

    def loss(params, rest, rows):
        output = result(model.apply(rest | {"params": params}, as_input(rows)))
        return jnp.sum(output.astype(jnp.float32))

    params = variables.pop("params")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(jax.grad(loss)).lower(params, variables, rows).compile().as_text()
    assert "tpu_custom_call" in program
