"""Trains a decoder that also fills in the middle of files of Python's standard library.

Command:  python -m launch.train --config=configs/fill_in_the_middle_tiny.py --workdir=runs/fill_in_the_middle_tiny
Hardware: 2 CPU cores.
Time, result: not measured.
"""  # noqa: E501

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.task = "fill_in_the_middle"
    config.model.update(
        vocab_size=264,  # the bytes and the 3 tokens of the task, as a multiple of 8
        num_layers=4,
        model_dim=128,
        feed_forward_dim=352,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
    )
    config.model.compute_dtype = "float32"  # CPUs have no faster arithmetic than this
    config.data.sequence_length = 128
    config.data.middle_rate = 0.9
    config.optimizer.update(learning_rate=3e-3, warmup_steps=50)
    config.train.update(batch_size=32, steps=1500, eval_every=500, checkpoint_every=500)
    config.train.eval_batches = 40
    return config
