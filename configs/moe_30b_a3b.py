"""Trains Qwen3-30B-A3B: 30.5B parameters, of which a token uses 3.35B.

Each layer has 128 experts, 8 for each token (Yang et al. 2025, table 2).

Command:  python -m launch.train --config=configs/moe_30b_a3b.py --workdir=runs/moe_30b_a3b
Hardware: 64 H200 (8 hosts), or TPU v5p:4x4x4. Each of a host's 8 GPUs, or of 8 neighbouring
          chips, has 16 experts of each layer, and their parameters are split over the 8 groups. A
          step gathers them once, which takes 70 GiB of an H200. For chips with less memory set
          --config.train.gather_once=False (22 GiB).
Time, result: not measured. 1.05T tokens need 2.4e22 FLOPs: 11 days at 40 % of 64 H100s' peak.

The load is balanced over a microbatch on all devices, the global batch of Qiu et al. 2025, with the
weight of the published config. The paper does not give batch size and learning rate; usual ones
stand here. A device has room for twice its mean load, and rows beyond that are dropped. So far text
is read as bytes. The vocabulary has the published size all the same, so a step costs as much as
with the published vocabulary.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(num_layers=48, model_dim=2048, num_heads=32, num_kv_heads=4, head_dim=128)
    config.model.update(vocab_size=151_936, rope_base=1e6, qk_norm=True, remat="full")
    config.model.moe.update(
        num_experts=128, experts_per_token=8, expert_dim=768, normalize_weights=True
    )
    config.model.moe.update(
        dispatch="dropless",
        exchange="ragged_all_to_all",
        balance_weight=0.001,
        balance_scope="batch",
    )
    config.data.sequence_length = 4096
    config.optimizer.update(learning_rate=3e-4, warmup_fraction=0.008)
    config.mesh.update(data=1, fsdp=-1, expert=8)
    config.train.update(batch_size=1024, accumulation=4, gather_once=True, steps=250_000)
    config.train.update(eval_every=1000, eval_batches=20, checkpoint_every=1000, keep_every=25_000)
    return config
