"""Counts the rows that the experts of a device have room for, with what fills up their blocks."""

import math
from collections.abc import Mapping

from moe.config import ModelConfig, RunConfig
from moe.scaling.hardware import Platform


def expert_rows(
    config: RunConfig, sizes: Mapping[str, int], tokens: int, platform: Platform
) -> int:
    """Returns how many rows the experts of a device have room for in a microbatch."""
    moe, length = config.model.moe, config.data.sequence_length
    devices = sizes["expert"]
    assignments, experts = tokens * moe.experts_per_token, moe.num_experts // devices
    if devices > 1 and moe.exchange == "ragged_all_to_all":
        room = math.ceil(assignments * moe.receive_factor)
        return padded_rows(config.model, room, experts, platform)
    match moe.dispatch:
        case "dense":
            return tokens * devices * experts
        case "capacity":
            room = math.ceil(moe.row_share * min(length, tokens))
            return experts * devices * max(1, tokens // length) * room
        case "dropless":
            return padded_rows(config.model, assignments * devices, experts, platform)


def padded_rows(model: ModelConfig, assignments: int, experts: int, platform: Platform) -> int:
    """Returns the rows that dropless has room for, in whole blocks of each expert."""
    block = block_rows(model, assignments, experts, platform)
    most = assignments + min(experts, assignments) * (block - 1)
    return -(-most // block) * block


def block_rows(model: ModelConfig, assignments: int, experts: int, platform: Platform) -> int:
    """Returns the rows of a block in the implementation that computes a model's experts.

    It is the one that the config names, or that `choose` of `moe.kernels.grouped_matmul` takes on
    such chips, whose rules stand there. A test compares them. TPUs before v5e and GPUs before
    Hopper, for which nothing is planned, have smaller blocks.
    """
    name = model.moe.implementation
    if name == "auto":
        on_gpu = "hopper" if model.compute_dtype in ("bfloat16", "float16") else "blockwise"
        name = {"tpu": "tpu", "gpu": on_gpu}.get(platform, "blockwise")
    if name == "tpu":
        return 256 if assignments >= 8 * 256 * experts else 128
    if name == "hopper":
        return 128
    return min(64, max(8, 2 ** round(math.log2(max(1, assignments / experts / 16)))))
