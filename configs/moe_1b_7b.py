"""Trains OLMoE-1B-7B: 6.92B parameters, of which a token uses 1.28B.

Each layer has 64 experts, 8 for each token (Muennighoff et al. 2024, table 1).

Command:  python -m launch.train --config=configs/moe_1b_7b.py --workdir=runs/moe_1b_7b
Hardware: 64 H200 (8 hosts), or TPU v5p:4x4x4. Parameters are split over the 8 GPUs of a host,
          or over 8 neighbouring chips, and rows over all. No token is dropped.
Time, result: not measured. The paper's 5.1T tokens need 4.0e22 FLOPs: 18 days at 40 % of 64 H100s'
          peak.

Unlike OLMoE, the model has no norm of queries and keys: OLMoE's is over all heads together (65,536
parameters). The load is balanced over a microbatch on all devices rather than on each device. So
far text is read as bytes. The vocabulary has the published size all the same, so a step costs as
much as with the published vocabulary.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(num_layers=16, model_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128)
    config.model.update(vocab_size=50_304, norm_epsilon=1e-5, remat="full")
    config.model.moe.update(
        num_experts=64,
        experts_per_token=8,
        expert_dim=1024,
        normalize_weights=False,
        dispatch="dropless",
    )
    config.model.moe.update(balance_weight=0.01, balance_scope="batch", z_weight=0.001)
    config.data.sequence_length = 4096
    config.optimizer.update(learning_rate=4e-4, warmup_fraction=2000 / 1_220_000)
    config.mesh.update(data=-1, fsdp=8)
    config.train.update(batch_size=1024, accumulation=4, steps=1_220_000)
    config.train.update(eval_every=5000, eval_batches=20, checkpoint_every=1000, keep_every=25_000)
    return config
