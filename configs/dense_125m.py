"""Trains a dense decoder of 124M parameters, with the width and depth of GPT-2 small.

It is the usual first rung of a scaling ladder.

Command:  python -m launch.train --config=configs/dense_125m.py --workdir=runs/dense_125m
Hardware: 1 H200 (1 host), or any GPU of 40 GB.
Time, result: not measured yet. 2.6B tokens (21 per parameter) need 2.1e18 FLOPs: an hour and a half
          at 40 % of an H100's peak.

The data is `stdlib` in bytes. A model of this size only memorises it, which is good enough for
measuring speed and memory. Set data.dataset to a corpus of yours before its loss means anything.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=12,
        model_dim=768,
        feed_forward_dim=2048,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
    )
    config.model.vocab_size = 50_304
    config.model.tied_embeddings = True
    config.data.sequence_length = 1024
    config.optimizer.update(learning_rate=6e-4, warmup_fraction=0.02)
    config.train.update(batch_size=256, accumulation=16, steps=10_000, checkpoint_every=1000)
    return config
