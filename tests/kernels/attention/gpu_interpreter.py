"""Extends JAX's interpreter of Mosaic GPU kernels by what the attention kernels need.

It lacks operands in registers, layouts, and stores to accumulators. The interpreter is private to
JAX, and it may hang, so tests run it in a process of its own, under a time limit. It computes each
product at once and in float32: it checks values and barriers, but not that a wgmma has ended before
its operands are overwritten.
"""

import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax._src.state.types import TransposeTransform

_copy_to_gmem = gpu_callbacks.copy_smem_to_gmem


def _contents(key: Any, transforms: Any, thread: Any) -> np.ndarray:
    """Returns the contents of a reference, seen through its transforms."""
    turned = sum(isinstance(x, TransposeTransform) for x in transforms)
    others = tuple(x for x in transforms if not isinstance(x, TransposeTransform))
    others = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(others))
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    value, *_ = gpu_callbacks._get_shared_memory().get_buffer_content(
        key, utils.to_range(others), *thread[:1], logging_info=thread[1]
    )
    value = np.asarray(value, np.float32)
    return value.T if turned % 2 else value


def _wgmma(
    token: Any,
    device: Any,
    grid: Any,
    thread: Any,
    acc: Any,
    a: Any,
    a_transforms: Any,
    b: Any,
    b_transforms: Any,
    *,
    held: bool,
):
    memory = gpu_callbacks._get_shared_memory()
    info = utils.GPULoggingInfo(
        device_id=int(device),
        grid_point_coords=tuple(map(int, grid)),
        thread_id=int(thread),
        source_info=None,
    )
    thread = memory.get_global_thread_id(int(device), int(thread)), info
    left = np.asarray(a, np.float32) if held else _contents(a, a_transforms, thread)
    total = _contents(acc, (), thread) + left @ _contents(b, b_transforms, thread)
    key = gpu_callbacks.HostAllocationKey.from_array(acc)
    memory.store_buffer_content(key, (), total, thread[0], logging_info=info)
    return token


def _copy(*, reduction_op: str | None, **keywords: Any) -> Any:
    """Copies to global memory; a copy that adds writes the sum of source and target."""
    if reduction_op is None:
        return _copy_to_gmem(reduction_op=None, **keywords)
    assert reduction_op == "add", reduction_op
    memory = gpu_callbacks._get_shared_memory()
    info = utils.GPULoggingInfo(
        device_id=int(keywords["device_id"]),
        grid_point_coords=tuple(map(int, keywords["grid_point_coords"])),
        thread_id=int(keywords["thread_id"]),
        source_info=keywords["source_info"],
    )
    thread = memory.get_global_thread_id(info.device_id, info.thread_id), info
    value = sum(
        _contents(keywords[f"{x}_allocation_key_as_array"], keywords[f"{x}_transforms"], thread)
        for x in ("src", "dst")
    )
    key = gpu_callbacks.HostAllocationKey.from_array(keywords["dst_allocation_key_as_array"])
    place = utils.to_range(
        jax.tree.map(int, gpu_callbacks._remove_noop_transforms(keywords["dst_transforms"]))
    )
    memory.store_buffer_content(key, place, value, thread[0], logging_info=info)
    return keywords["token"]


class Interpreter(jaxpr_interpret.JaxprInterpreter):
    def interpret(self, jaxpr: Any, token: Any, *args: Any) -> Any:
        """Interprets one equation after the other, those that the base class does not know, too."""
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))
        read = lambda x: x.val if isinstance(x, jax.extend.core.Literal) else values[x]
        for eqn in jaxpr.eqns:
            token, results = self._equation(eqn, token, [read(x) for x in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
        return token, [read(x) for x in jaxpr.outvars]

    def _equation(self, eqn: Any, token: Any, inputs: list[Any]) -> Any:
        if eqn.primitive is core.layout_cast_p:
            return token, inputs
        if eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            return self.interpret(inner.jaxpr, token, *inner.consts, *inputs)
        if eqn.primitive is primitives.wgmma_accumulator_store_p:
            return self._store(eqn, token, *inputs), inputs[1:]
        # The base class reads inputs from an environment of its own.
        names = {
            x: value
            for x, value in zip(eqn.invars, inputs, strict=True)
            if not isinstance(x, jax.extend.core.Literal)
        }
        alone = jax.extend.core.Jaxpr((), list(names), eqn.outvars, [eqn], eqn.effects)
        return super().interpret(alone, token, *names.values())

    def _store(self, eqn: Any, token: Any, acc: Any, value: Any) -> Any:
        token, _ = gpu_callbacks.call_swap(
            token=token,
            result_shape_and_dtype=jax.ShapeDtypeStruct(
                eqn.invars[1].aval.shape, eqn.invars[1].aval.dtype
            ),
            device_id=jnp.int32(self.device_info.device_id),
            grid_point_coords=self.grid_point_coords,
            thread_id=self.thread_id,
            allocation_key_as_array=acc,
            transforms=(),
            source_info=eqn.source_info,
            val=value,
            mask=None,
        )
        return token

    def _interpret_wgmma_ref_p(self, eqn: Any, token: Any, get_invals: Any) -> Any:
        acc, a, b, *leaves = get_invals()
        trees = [
            eqn.params[f"{name}_transforms_tree"] or jax.tree.structure(())
            for name in ("acc", "a", "b")
        ]
        _, a_transforms, b_transforms = jax.tree.unflatten(
            jax.tree_util.treedef_tuple(trees), leaves
        )
        call = functools.partial(_wgmma, held=isinstance(eqn.invars[1].aval, jax.core.ShapedArray))
        place = jnp.int32(self.device_info.device_id), self.grid_point_coords, self.thread_id
        operands = acc, a, tuple(a_transforms), b, tuple(b_transforms)
        return callback.io_callback(
            call, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, *place, *operands, ordered=True
        ), []


def interpreted(function: Any, *args: Any) -> Any:
    """Returns the result of a function of arrays that calls Mosaic GPU kernels."""
    jaxpr_interpret.JaxprInterpreter = Interpreter
    gpu_callbacks.copy_smem_to_gmem = _copy
    with force_gpu_interpret_mode(InterpretGPUParams()):
        return jax.jit(function)(*args)
