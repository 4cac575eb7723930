"""Says what the forward pass of a layer keeps for its backward pass, by the name of a policy.

What is not kept, the backward pass computes again, from the input of the layer:

    none            keeps all activations
    save_exchange   keeps what devices sent each other for the experts, and sends it once
    save_attention  keeps the outputs of attention, which then is computed once
    offload         moves the input of each layer to the host's memory, and keeps nothing else
    full            keeps the input of each layer, and nothing else

All but "none" also keep the stream between the parts of a layer, where the tensor axis splits it
(`parallel.sequence`). No policy keeps gathered weights: the backward pass gathers them again.
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
    return _keep(_SAVED[remat], offloaded=remat == "offload")


def make_stage_policy(remat: str) -> Policy:
    """Returns the policy for all layers of a piece of a pipeline's stage, which is cut out first.

    The layers are in one call of jax.checkpoint, so their inputs are kept by name.
    """
    if remat == "offload":
        return _keep((), offloaded=True)
    if remat != "none":
        return _keep((*_SAVED[remat], LAYER_INPUT))

    def forget_weights(primitive: Any, *avals: Any, **params: Any) -> bool:
        """Returns whether to keep a result: no copy of a piece's parameters, no gathered weight."""
        is_cut = primitive is jax.lax.dynamic_slice_p
        return not is_cut and save_all_but_gathered(primitive, *avals, **params)

    return forget_weights


def _keep(names: tuple[str, ...], *, offloaded: bool = False) -> Policy:
    """Returns the policy that keeps arrays of these names, and offloads the inputs of layers."""
    keeps_attention = ATTENTION in names
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[*names, BETWEEN_PARTS],
        names_which_can_be_offloaded=[LAYER_INPUT] if offloaded else [],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def policy(primitive: Any, *avals: Any, **params: Any) -> Any:
        if keeps_attention and primitive.name == _CUDNN:
            return True
        return by_name(primitive, *avals, **params)

    return policy
