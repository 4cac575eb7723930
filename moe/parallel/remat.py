"""Chooses what the forward pass of a layer saves for its backward pass, by the name of a policy.

The backward pass computes everything else again, from the input of the layer:

    none            saves all activations
    save_exchange   saves what devices sent each other for the experts, so it is sent once
    save_attention  saves the outputs of attention, so they are computed once
    offload         moves the input of each layer to the host's memory, and saves nothing else
    full            saves the input of each layer, and nothing else

All but "none" also save the stream between the parts of a layer, where the tensor axis splits it
(`parallel.sequence`). No policy saves gathered weights: the backward pass gathers them again.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from moe.kernels.attention import RESIDUALS as ATTENTION
from moe.parallel.collectives.expert import EXCHANGED
from moe.parallel.collectives.weights import save_all_but_gathered
from moe.parallel.sequence import BETWEEN_PARTS

Policy = Callable[..., Any]  # as jax.checkpoint takes it
LAYER_INPUT = "layer input"
_SAVED = {
    "save_exchange": (EXCHANGED,),
    "save_attention": (ATTENTION,),
    "offload": (),
    "full": (),
}
# cuDNN's attention has residuals of its own, which are the results of this operation of JAX.
_CUDNN = "dot_product_attention_fwd"


def name_layer_input(x_BTD: jax.Array) -> jax.Array:
    """Marks the input of a layer, which "offload" moves and the stages of a pipeline store."""
    return checkpoint_name(x_BTD, LAYER_INPUT)


def make_policy(remat: str) -> Policy:
    """Returns the policy of jax.checkpoint for a layer."""
    if remat == "none":
        return save_all_but_gathered
    return _save_names(_SAVED[remat], offloaded=remat == "offload")


def make_stage_policy(remat: str) -> Policy:
    """Returns the policy for a piece of a pipeline's stage: cutting it out, and all of its layers.

    The layers are in one call of jax.checkpoint, so their inputs are saved by name.
    """
    if remat == "offload":
        return _save_names((), offloaded=True)
    if remat != "none":
        return _save_names((*_SAVED[remat], LAYER_INPUT))

    def save_all_but_weights(primitive: Any, *avals: Any, **params: Any) -> bool:
        """Returns whether to save a result: no copy of a piece's parameters, no gathered weight."""
        is_cut = primitive is jax.lax.dynamic_slice_p
        return not is_cut and save_all_but_gathered(primitive, *avals, **params)

    return save_all_but_weights


def _save_names(names: tuple[str, ...], *, offloaded: bool = False) -> Policy:
    """Returns the policy that saves arrays of these names, and may offload the inputs of layers."""
    saves_attention = ATTENTION in names
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[*names, BETWEEN_PARTS],
        names_which_can_be_offloaded=[LAYER_INPUT] if offloaded else [],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def policy(primitive: Any, *avals: Any, **params: Any) -> Any:
        if saves_attention and primitive.name == _CUDNN:
            return True
        return by_name(primitive, *avals, **params)

    return policy
