"""Counts what a step keeps in memory beside the training state, from the config and mesh alone.

A step is at its largest in one of a few moments, and each moment is a list of arrays:

- in the backward pass of a layer, whose forward pass remat has computed again;
- in the loss, while the logits of a chunk and the gradient of the unembedding exist;
- where the gradient of the embedding is added up.

What all moments share: the inputs of all layers and what else remat saves (without it, everything
that their backward passes read), and the gradients. In a pipeline these are the layers of a stage,
for all microbatches that have gone through it. docs/planning/counted.md explains the arrays one
by one. Compilers add copies of their own, and how well they pack arrays can't be known beforehand.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from moe.config import ModelConfig, RunConfig
from moe.config.layout import gathers_once
from moe.scaling.arrays import Array, parameters
from moe.scaling.communication import (
    FLOAT32,
    ITEM,
    Passes,
    layer_passes,
    local_tokens,
    own_passes,
    pipeline_schedule,
    stream_parts,
)
from moe.scaling.expert_rows import expert_rows
from moe.scaling.hardware import Platform

# The arrays [B, T, D] in a layer's backward pass whose tokens the tensor axis splits: the layer's
# input and the stream between its parts, and the gradient of the stream.
MADE_STREAMS, GRADIENT_STREAMS = 2, 1
# The arrays [B, T, D] whose tokens it does not split: the two normed inputs of the parts, and the
# gradients of the layer's output and of a normed input. If it splits the stream, these are gathered
# or scattered. On GPUs queries, keys and values then each make a gradient of the normed input
# before the three are added up, so there are twice as many gradients.
MADE_INPUTS, GRADIENT_INPUTS = 2, 2
# The arrays [B, T, F]: gate, up and their product, and the gradients of gate and up.
MADE_WIDTHS, GRADIENT_WIDTHS = 3, 2
NORMS = 2  # of a layer
BATCH_BYTES = 17  # of a token: four int32 (token, target, segment and position) and a mask


class Activations(NamedTuple):
    """Says how many bytes of one device a step takes beside its state and gradients."""

    saved: int  # what the layers' backward passes read, in all layers
    layer: int  # what one layer's backward pass makes, with its whole weights and their gradients
    loss: int  # what the loss makes
    embedding: int  # what the gradient of the embedding takes

    @property
    def temporaries(self) -> int:
        """Returns the bytes of the moment that takes most, without what is saved for it."""
        return max(self.layer, self.loss, self.embedding)


class Widths(NamedTuple):
    """Says how many numbers of each kind a token has on one device."""

    stream: int
    own_stream: int  # where the tensor axis splits the tokens: the average over all tokens
    queries: int
    keys: int
    heads: int
    vocabulary: int


def weight_copies(config: RunConfig, sizes: Mapping[str, int], platform: Platform) -> int:
    """Returns the bytes of the weights that a compiler copies for all layers at once.

    The compiler of GPUs reorders, in float32, the parts of weights that are gathered along another
    dimension than their first, and copies the experts' gradients in the loop over rows that adds
    them up. The one of TPUs casts all weights of layers to the compute dtype. The one of CPUs cuts
    the weights of unrolled layers out of their stacks.
    """
    total = 0
    for array in parameters(config):
        size = array.layers(sizes) * array.elements(sizes)
        is_gathered = array.axes("D", sizes) and not gathers_once(config, sizes)
        if platform == "gpu" and is_gathered and array.dims[0] != "D":
            total += FLOAT32 * size
        if platform == "gpu" and array.name == "experts":
            total += FLOAT32 * array.elements(sizes, whole=("fsdp",))
        is_cast = array.repeats > 1 and len(array.dims) > 1 and not gathers_once(config, sizes)
        if platform == "tpu" and is_cast:
            total += ITEM[config.model.compute_dtype] * size
        if platform == "cpu" and not config.model.scan_layers and array.repeats > 1:
            total += FLOAT32 * size
    return total


def activations(config: RunConfig, sizes: Mapping[str, int], platform: Platform) -> Activations:
    """Returns the bytes that activations take on each device of a mesh of such axes."""
    model, own = config.model, own_passes(config, sizes)
    item, widths = ITEM[model.compute_dtype], _widths(config, sizes)
    stacks = 1.0
    if config.task == "span_corruption":  # the decoder has as many layers, and fewer tokens
        stacks += config.corrupted_row.targets / config.data.sequence_length
    staged, *others = layer_passes(config, sizes)
    in_stages = staged.stored * _saved(config, sizes, staged, platform)
    saved = in_stages + sum(_saved(config, sizes, passes, platform) for passes in others)
    # The backward passes of layers before the stages begin when those of the stages have ended.
    is_after = model.pipelined_group + 1 < len(model.layer_groups)
    freed = 0 if is_after else round(in_stages)
    largest = [_layer(config, sizes, passes, platform) - freed for passes in others]
    table = FLOAT32 * widths.vocabulary * widths.stream
    waiting = table * _waiting_tables(config, sizes, platform)
    return Activations(
        saved=round(stacks * saved) + _pipeline_carry(config, sizes),
        layer=max([_layer(config, sizes, staged, platform), *largest]) + waiting,
        loss=_loss(config, sizes, platform) - _later_gradients(config, sizes),
        embedding=table + waiting + 2 * item * own.tokens * widths.stream,
    )


def _waiting_tables(config: RunConfig, sizes: Mapping[str, int], platform: Platform) -> int:
    """Returns how many gradients of the loss stay whole while those of the layers are made.

    That of a tied table waits for the embedding's. Otherwise GPUs scatter it last, and they make
    the zeros that it begins with once for all microbatches.
    """
    table, *untied = (array for array in parameters(config) if "V" in array.dims)
    if not table.axes("D", sizes) or gathers_once(config, sizes):
        return 0
    return (2 if platform == "gpu" else 0) if untied else 1


def _saved(config: RunConfig, sizes: Mapping[str, int], passes: Passes, platform: Platform) -> int:
    """Returns the bytes that the backward passes of some layers read, for one pass of them."""
    model, tokens = config.model, passes.tokens
    item, widths = ITEM[model.compute_dtype], _widths(config, sizes)
    if model.remat != "none":
        # Where the stream between the parts of a layer is small, it is saved as well.
        streams = (model.remat != "offload") + (widths.own_stream < widths.stream)
        saved = passes.layers * streams * item * tokens * widths.own_stream
        if model.remat == "save_attention":
            saved += passes.layers * tokens * _attention_outputs(widths)
        if model.remat == "save_exchange":
            saved += passes.sparse_layers * _exchanged(config, sizes, tokens, platform)
        return saved
    saved = passes.layers * tokens * _attention_residuals(model, widths)
    saved += (passes.layers - passes.sparse_layers) * _dense_residuals(model, sizes, tokens)
    if passes.sparse_layers:
        saved += passes.sparse_layers * _sparse_residuals(config, sizes, tokens)
        saved += passes.sparse_layers * _exchanged(config, sizes, tokens, platform)
        gate_up = 2 * expert_rows(config, sizes, tokens, platform) * model.moe.expert_dim
        saved += passes.sparse_layers * item * gate_up // sizes["tensor"]
    return saved


def _pipeline_carry(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Returns the bytes that a stage carries between ticks: ring, belt and own microbatches."""
    schedule = pipeline_schedule(config, sizes)
    if schedule is None:
        return 0
    stream = ITEM[config.model.compute_dtype] * local_tokens(config, sizes) * config.model.model_dim
    return (2 + schedule.groups) * stream


def _widths(config: RunConfig, sizes: Mapping[str, int]) -> Widths:
    model, tensor = config.model, sizes["tensor"]
    keys = model.num_kv_heads
    return Widths(
        stream=model.model_dim,
        own_stream=model.model_dim // stream_parts(config, sizes),
        queries=model.num_heads * model.head_dim // tensor,
        keys=(keys // tensor if keys % tensor == 0 else keys) * model.head_dim,
        heads=model.num_heads // tensor,
        vocabulary=model.vocab_size // tensor,
    )


def _attention_residuals(model: ModelConfig, widths: Widths) -> int:
    """Returns the bytes of a token that the backward pass of attention and norms reads.

    Each norm saves its input, one float32 number, and its result. Attention saves queries, keys,
    values, the log-sum-exp, and the output twice: for itself and for the matmul that follows. (In
    bfloat16 compilers merge these two, but then it saves what was rounded off.) The norms of
    queries and keys save their inputs and a number for each head as well.
    """
    item = ITEM[model.compute_dtype]
    norms = NORMS * (item * (widths.own_stream + widths.stream) + FLOAT32)
    if model.qk_norm:
        heads_of_both = (widths.queries + widths.keys) // model.head_dim
        norms += item * (widths.queries + widths.keys) + FLOAT32 * heads_of_both
    heads = 3 * widths.queries + 2 * widths.keys
    return norms + item * heads + FLOAT32 * widths.heads


def _attention_outputs(widths: Widths) -> int:
    """Returns the bytes of a token that attention saves of its forward pass.

    They are the output, in bfloat16 what was rounded off, and the log-sum-exp.
    """
    return FLOAT32 * (widths.queries + widths.heads)


def _exchanged(config: RunConfig, sizes: Mapping[str, int], tokens: int, platform: Platform) -> int:
    """Returns the bytes that a device receives for its experts. What comes back is not saved.

    The backward pass does not need that, since an expert's device applies the weights of its rows.
    """
    moe, devices = config.model.moe, sizes["expert"]
    row = ITEM[config.model.compute_dtype] * config.model.model_dim
    if devices == 1:
        return 0
    if moe.exchange == "all_gather":
        return row * tokens * devices
    return row * expert_rows(config, sizes, tokens, platform)


def _dense_residuals(model: ModelConfig, sizes: Mapping[str, int], tokens: int) -> int:
    """Returns the bytes that the backward pass of a dense feed-forward part reads."""
    width = MADE_WIDTHS * model.feed_forward_dim // sizes["tensor"]
    return ITEM[model.compute_dtype] * tokens * width


def _sparse_residuals(config: RunConfig, sizes: Mapping[str, int], tokens: int) -> int:
    """Returns the bytes that the backward pass of a sparse part reads.

    These are its input, in the compute dtype and for a router of float32, the scores of all
    experts, and gate and up of the shared experts with their product. Rows come on top.
    """
    model, item = config.model, ITEM[config.model.compute_dtype]
    router = FLOAT32 * model.model_dim if item < FLOAT32 else 0
    shared = MADE_WIDTHS * model.moe.num_shared_experts * model.moe.expert_dim // sizes["tensor"]
    per_token = item * (model.model_dim + shared) + router + 2 * FLOAT32 * model.moe.num_experts
    return tokens * per_token


def _layer(config: RunConfig, sizes: Mapping[str, int], passes: Passes, platform: Platform) -> int:
    """Returns the bytes that the backward pass of the largest of some layers takes.

    Remat makes the layer's arrays again. Without it, the backward pass takes the layer's part out
    of the stacks of what is saved. Layers that are unrolled have no stacks, but then the compiler
    of CPUs transposes some of what is saved.
    """
    model, tokens = config.model, passes.tokens
    item, widths = ITEM[model.compute_dtype], _widths(config, sizes)
    heads = (3 if model.qk_norm else 2) * (widths.queries + widths.keys)
    recomputes = model.remat != "none"
    streams = GRADIENT_STREAMS + (MADE_STREAMS if recomputes else 0)
    splits_time = widths.own_stream < widths.stream
    inputs = GRADIENT_INPUTS * (2 if platform == "gpu" and splits_time else 1)
    inputs += MADE_INPUTS if recomputes else 0
    stream = streams * widths.own_stream + inputs * widths.stream
    common = item * tokens * (stream + (heads if recomputes else 0))
    arrays = GRADIENT_WIDTHS + (MADE_WIDTHS if recomputes else 0)
    sparse, dense = 0, item * tokens * arrays * model.feed_forward_dim // sizes["tensor"]
    if passes.sparse_layers:
        sparse = _sparse_layer(config, sizes, tokens, platform)
        dense = dense if passes.sparse_layers < passes.layers else 0
    copied = 0
    if not recomputes and (model.scan_layers or platform == "cpu"):
        copied = _saved(config, sizes, passes, platform) // passes.layers
    # Before the loop, GPUs transpose the stack of an input that was gathered.
    transposed = 0
    if platform == "gpu" and not recomputes and splits_time:
        transposed = passes.layers * item * tokens * widths.stream
    return max(common + max(sparse, dense) + copied, transposed)


def _sparse_layer(
    config: RunConfig, sizes: Mapping[str, int], tokens: int, platform: Platform
) -> int:
    """Returns the bytes that the backward pass of a sparse part takes beside the stream."""
    model, moe, item = config.model, config.model.moe, ITEM[config.model.compute_dtype]
    rows, width = expert_rows(config, sizes, tokens, platform), moe.expert_dim // sizes["tensor"]
    leaving = tokens * moe.experts_per_token
    # The rows and their gradient, and gate and up.
    own_widths = 0 if config.model.remat == "none" else 2 * width
    made = rows * (2 * model.model_dim + own_widths)
    if platform == "tpu":
        # The kernels of TPUs also make the product and the gradients of gate and up for all rows,
        # when what has arrived has been copied to the rows of each expert.
        arriving = (3 * rows + leaving) * model.model_dim if sizes["expert"] > 1 else 0
        made = max(made + rows * (1 + GRADIENT_WIDTHS) * width, arriving)
    elif sizes["expert"] > 1:  # rows leave and arrive, and so do their gradients
        # On CPUs all else is made a block at a time. What the kernels of GPUs make for all rows is
        # not counted: where programs take the most, it is no longer there.
        made += 2 * (rows + leaving) * model.model_dim
    weights = [array for array in parameters(config) if array.name == "experts"]
    # The gradients of all three weights leave the kernel together, before they are scattered.
    whole = sum(array.elements(sizes, whole=("fsdp",)) for array in weights)
    return item * made + (_cast_item(config, weights[0], sizes) + FLOAT32) * whole


def _cast_item(config: RunConfig, array: Array, sizes: Mapping[str, int]) -> int:
    """Returns the bytes of a number of a weight's copy for a matmul, which is gathered and cast.

    They are 0 where the parameter itself serves.
    """
    item = ITEM[config.model.compute_dtype]
    return item if array.axes("D", sizes) or item < FLOAT32 else 0


def _later_gradients(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Returns the bytes of the gradients that begin to exist after the loss.

    They are those of the layers, for one microbatch or, in a pipeline, for all. While
    the loss is computed, only their sums over the microbatches before it exist.
    """
    is_whole = gathers_once(config, sizes)
    return FLOAT32 * sum(
        array.layers(sizes) * array.elements(sizes, array.axes("D", sizes) if is_whole else ())
        for array in parameters(config)
        if "V" not in array.dims
    )


def _loss(config: RunConfig, sizes: Mapping[str, int], platform: Platform) -> int:
    """Returns the bytes that the loss takes: logits of a chunk, and the unembedding's gradient.

    CPUs make the gradient of each chunk before they add it to that of the chunks before. The final
    norm keeps its result and its input, and beside them stands the gradient of the result.
    Programs for GPUs take no more room for that input, and those for TPUs have it in float32.
    """
    tokens = own_passes(config, sizes).tokens
    item, widths = ITEM[config.model.compute_dtype], _widths(config, sizes)
    # The last of the table's one or two arrays: a tied embedding is cast as an unembedding is.
    table = [array for array in parameters(config) if "V" in array.dims][-1]
    chunks = math.ceil(config.data.sequence_length / config.train.loss_chunk)
    logits = (FLOAT32 + item) * math.ceil(tokens / chunks) * widths.vocabulary
    # A gradient that is scattered after all microbatches is counted among the gradients.
    sums = (0 if gathers_once(config, sizes) else 1) + (platform == "cpu")
    weight = _cast_item(config, table, sizes) + sums * FLOAT32
    weight *= widths.vocabulary * widths.stream
    own_input = {"cpu": item, "gpu": 0, "tpu": FLOAT32}[platform] * widths.own_stream
    return logits + weight + tokens * (2 * item * widths.stream + own_input)
