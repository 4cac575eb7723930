"""Trains an encoder and a decoder to restore hidden spans of Python's standard library (T5).

Command:  python -m launch.train --config=configs/span_corruption_tiny.py --workdir=runs/span_corruption_tiny
Hardware: 2 CPU cores.
Time, result: not measured.
"""  # noqa: E501

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.task = "span_corruption"
    config.model.update(
        vocab_size=360,  # the bytes and 100 sentinels, as a multiple of 8
        num_layers=3,  # of the encoder, and as many of the decoder
        model_dim=128,
        feed_forward_dim=352,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
    )
    config.model.compute_dtype = "float32"  # CPUs have no faster arithmetic than this
    config.data.sequence_length = 128  # of the encoder; 142 bytes of text, and 29 targets
    config.optimizer.update(learning_rate=3e-3, warmup_steps=50)
    config.train.update(batch_size=32, steps=1500, eval_every=500, checkpoint_every=500)
    config.train.eval_batches = 40
    return config
