"""Lists the implementations of attention, and says what each one cannot do.

Adding a kernel is a file and a row: docs/kernels.md shows an example. The files of kernels are
imported when they are used, since Pallas takes a second to load.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from moe.kernels.attention import blockwise, cudnn, reference
from moe.kernels.attention.inputs import Gradients, Inputs, Options, Request
from moe.kernels.chips import is_hopper

# The longest rows that cuDNN gets a mask for. It takes 2 T² bytes a row of the batch, 32 MiB here,
# and the backward pass writes a gradient of as many that nobody reads.
_LONGEST_MASK = 4096

# How many queries and how many keys make a block.
Blocks = tuple[int, int]


class Implementation(NamedTuple):
    """A row of the table."""

    # forward(options, inputs) -> (output, lse)
    forward: Callable[..., tuple[jax.Array, jax.Array | None]]
    # backward(options, inputs, lse, dout, delta) -> Gradients. None: JAX differentiates `forward`,
    # which gives no lse.
    backward: Callable[..., Gradients] | None
    # obstacle(request, chip) -> why it cannot compute a request, or None if it can. The reason
    # is a clause about "it", such as "it takes float32, not bfloat16"; errors put the name before
    # it. If `chip` is None, the chip is no obstacle.
    obstacle: Callable[[Request, str | None], str | None]
    # blocks(options) -> the sizes of blocks for calls that blocks.json does not list. If there is
    # such a rule, both passes take `blocks=`.
    blocks: Callable[[Options], Blocks] | None = None
    # Whether both passes take `interpret=`, True to run on a CPU.
    interpretable: bool = False


def differentiable_once(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a kernel raise a clear error where it is differentiated, in place of Pallas' own."""

    # The kernel itself cannot be a custom_jvp, since it may write to references, which custom_jvp
    # does not take. So its arrays pass through one.
    @jax.custom_jvp
    def guard(*arrays: Any) -> Any:
        return arrays

    @guard.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{name!r} attention has no second derivatives: take implementation='reference', "
            "or 'blockwise' for forward over reverse mode"
        )

    return lambda options, *arrays, **static: kernel(options, *guard(*arrays), **static)


def _tpu_forward(options: Options, inputs: Inputs, **static: Any) -> Any:
    from moe.kernels.attention.tpu import forward

    return forward.forward(options, inputs, **static)


def _tpu_backward(options: Options, inputs: Inputs, *rows: jax.Array, **static: Any) -> Gradients:
    from moe.kernels.attention.tpu import backward

    return backward.backward(options, inputs, *rows, **static)


def _hopper_forward(options: Options, inputs: Inputs) -> Any:
    from moe.kernels.attention.hopper import forward

    return forward.forward(options, inputs)


def _hopper_backward(options: Options, inputs: Inputs, *rows: jax.Array) -> Gradients:
    from moe.kernels.attention.hopper import backward

    return backward.backward(options, inputs, *rows)


def _hopper_fused_backward(options: Options, inputs: Inputs, *rows: jax.Array) -> Gradients:
    from moe.kernels.attention.hopper import fused

    return fused.backward(options, inputs, *rows)


def _blockwise_blocks(options: Options) -> Blocks:
    """Returns 256 queries, and 512 keys or fewer under a mask.

    Under a causal mask, which is the limit 0 of `right`, queries and keys have blocks of one size:
    then the fewest scores beside the diagonal are computed in vain. If `left` is a limit as well, a
    block of keys holds at most half of the window, for the same reason, but never fewer than 128.
    """
    largest = 256 if options.right == 0 else 512
    if options.left is None or options.right is None:
        return 256, largest
    half = max(1, (options.left + options.right + 1) // 2)
    power_of_two = 1 << half.bit_length() - 1
    return 256, max(128, min(largest, power_of_two))


def _tpu_blocks(options: Options) -> Blocks:
    return 512, 512


def _symbolic_lengths(request: Request) -> str | None:
    if all(isinstance(length, int) for length in request.lengths):
        return None
    return f"it takes lengths that are numbers, not {request.lengths[0]} and {request.lengths[1]}"


def _symbolic_shape(request: Request) -> str | None:
    if reason := _symbolic_lengths(request):
        return reason
    if not isinstance(request.batch, int):
        return f"it takes a batch that is a number, not {request.batch}"
    return None


def _obstacle_to_reference(request: Request, chip: str | None) -> str | None:
    return None


def _obstacle_to_blockwise(request: Request, chip: str | None) -> str | None:
    return _symbolic_lengths(request)


def _obstacle_to_tpu(request: Request, chip: str | None) -> str | None:
    if reason := _symbolic_shape(request):
        return reason
    if chip is not None and not chip.startswith("TPU") and chip != "cpu":
        return f"it runs on TPUs, and interpreted on CPUs, not on {chip}"
    if request.dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 and float32, not {request.dtype}"
    return None


def _obstacle_to_hopper(request: Request, chip: str | None, widest: int = 256) -> str | None:
    if reason := _symbolic_shape(request):
        return reason
    if chip is not None and not is_hopper(chip):
        return f"it runs on Hopper GPUs, not on {chip}"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {request.dtype}"
    if max(request.widths) > widest:
        return f"it takes head widths of up to {widest}, not {max(request.widths)}"
    return None


def _obstacle_to_hopper_fused(request: Request, chip: str | None) -> str | None:
    return _obstacle_to_hopper(request, chip, widest=128)


def _obstacle_to_cudnn(request: Request, chip: str | None) -> str | None:
    if reason := _symbolic_shape(request):
        return reason
    if chip is not None and not chip.startswith("NVIDIA"):
        return f"it runs on NVIDIA GPUs, not on {chip}"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {request.dtype}"
    (width, value_width), (length, kv_length) = request.widths, request.lengths
    if width != value_width or width > 128 or width % 8:
        return f"it takes one head width, a multiple of 8 up to 128, not {width} and {value_width}"
    if length != kv_length:
        return f"it takes as many keys as queries, not {kv_length} and {length}"
    if request.options.right != 0:
        # Its windows that are not causal see later keys: jax issue 39576.
        return "it takes causal attention alone"
    if request.segments and length > _LONGEST_MASK:
        return f"it takes segments in rows of up to {_LONGEST_MASK}, not of {length}"
    unknown = {
        "softcap": request.options.softcap is not None,
        "sinks": request.sinks,
        "offsets": request.offsets,
        "lse": request.lse,
    }
    return next((f"it knows no {name}" for name, asked in unknown.items() if asked), None)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference.forward, reference.backward, _obstacle_to_reference),
    "blockwise": Implementation(
        blockwise.forward, blockwise.backward, _obstacle_to_blockwise, _blockwise_blocks
    ),
    "tpu": Implementation(
        differentiable_once("tpu", _tpu_forward),
        differentiable_once("tpu", _tpu_backward),
        _obstacle_to_tpu,
        _tpu_blocks,
        interpretable=True,
    ),
    "hopper": Implementation(
        differentiable_once("hopper", _hopper_forward),
        differentiable_once("hopper", _hopper_backward),
        _obstacle_to_hopper,
    ),
    # "hopper" with gradients of q that are summed in no fixed order.
    "hopper_fused": Implementation(
        differentiable_once("hopper_fused", _hopper_forward),
        differentiable_once("hopper_fused", _hopper_fused_backward),
        _obstacle_to_hopper_fused,
    ),
    "cudnn": Implementation(cudnn.forward, None, _obstacle_to_cudnn),
}
