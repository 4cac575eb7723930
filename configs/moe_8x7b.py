"""Trains Mixtral 8x7B: 46.7B parameters, of which a token uses 12.9B.

Each layer has 8 experts, 2 for each token (Jiang et al. 2024, table 1).

Command:  python -m launch.train --config=configs/moe_8x7b.py --workdir=runs/moe_8x7b
Hardware: 64 H200 (8 hosts), or TPU v5p:4x4x4. Each of a host's 8 GPUs, or of 8 neighbouring
          chips, has one expert of each layer, whose parameters are split over the 8 groups. A
          step gathers them once, which takes 105 GiB of an H200. For chips with less memory set
          --config.train.gather_once=False (33 GiB).
Time, result: not measured. 1.05T tokens need 8.4e22 FLOPs: 38 days at 40 % of 64 H100s' peak.

The paper says nothing about training; batch size, learning rate and balance loss are usual ones. A
device has room for twice its mean load, and rows beyond that are dropped. So far text is read as
bytes. The vocabulary has the published size all the same, so a step costs as much as with the
published vocabulary.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(num_layers=32, model_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128)
    config.model.update(vocab_size=32_000, rope_base=1e6, norm_epsilon=1e-5, remat="save_exchange")
    config.model.moe.update(
        num_experts=8, experts_per_token=2, expert_dim=14_336, normalize_weights=True
    )
    config.model.moe.update(
        dispatch="dropless",
        exchange="ragged_all_to_all",
        balance_weight=0.01,
        balance_scope="batch",
    )
    config.data.sequence_length = 4096
    config.optimizer.update(learning_rate=3e-4, warmup_fraction=0.008)
    config.mesh.update(data=1, fsdp=-1, expert=8)
    config.train.update(batch_size=1024, accumulation=8, gather_once=True, steps=250_000)
    config.train.update(eval_every=1000, eval_batches=20, checkpoint_every=1000, keep_every=25_000)
    return config
