"""Trains a dense decoder of 6.7B parameters, with the architecture of Llama 2 7B.

The number of parameters equals that of the published model (Touvron et al. 2023, section 2.2).

Command:  python -m launch.train --config=configs/dense_7b.py --workdir=runs/dense_7b
Hardware: 64 H200 or H100 (8 hosts), or TPU v5p:4x4x4. Heads and widths are split over pairs of
          neighbours, rows and parameters over the 32 pairs. Parameters are gathered once a step,
          and nothing is computed twice: that takes 60 GiB of a GPU. On v5p mesh.tensor=1 sends
          less, and takes 82 GiB (docs/log.md).
Time, result: not measured. 1.05T tokens need 4.5e22 FLOPs: three weeks at 40 % of 64 H100s' peak.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=32,
        model_dim=4096,
        feed_forward_dim=11_008,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
    )
    config.model.update(vocab_size=32_000, norm_epsilon=1e-5)
    config.data.sequence_length = 4096
    config.optimizer.update(learning_rate=3e-4, warmup_fraction=0.008)
    config.mesh.update(data=1, fsdp=-1, tensor=2)
    config.train.update(batch_size=1024, accumulation=16, gather_once=True, steps=250_000)
    config.train.update(eval_every=1000, eval_batches=20, checkpoint_every=1000, keep_every=25_000)
    return config
