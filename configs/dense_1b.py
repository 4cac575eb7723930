"""Trains a dense decoder of 1.24B parameters, with the shape of Llama 3.2 1B.

The number of parameters equals that of the published model (Grattafiori et al. 2024).

Command:  python -m launch.train --config=configs/dense_1b.py --workdir=runs/dense_1b
Hardware: 8 H200 (1 host), or TPU v5p:2x2x2. Parameters are split over all.
Time, result: not measured. 26B tokens (21 per parameter) need 2.0e20 FLOPs: 18 hours at 40 % of
          eight H100s' peak. On one H200, 16 rows at a time, a step with --config.model.remat=none
          and --config.model.scan_layers=False has 56 % (docs/performance.md). A step with
          train.batch_size=64 and accumulation=1 compiles for 8 TPU v5p (fsdp=8): 1.7 GiB of state
          and 7.8 GiB of temporaries on each.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=16,
        model_dim=2048,
        feed_forward_dim=8192,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
    )
    config.model.update(vocab_size=128_256, tied_embeddings=True, rope_base=500_000.0, remat="full")
    config.data.sequence_length = 2048
    config.optimizer.update(learning_rate=3e-4, warmup_fraction=0.04)
    config.mesh.update(data=1, fsdp=-1)
    config.train.update(
        batch_size=512,
        accumulation=4,
        gather_once=True,
        steps=25_000,
        eval_batches=20,
        checkpoint_every=1000,
        keep_every=5000,
    )
    return config
