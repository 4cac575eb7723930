"""The dense step whose speed is held against the machine's own matmul: 8 layers of width 512, rows of 512 bytes, float32.

Command:  python -m launch.benchmark --config=configs/benchmark_dense.py
Hardware: a CPU.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(num_layers=8, model_dim=512, feed_forward_dim=2048, num_heads=4, num_kv_heads=4, head_dim=128)
    config.model.update(compute_dtype="float32", scan_layers=False)
    config.data.sequence_length = 512
    config.train.batch_size = 8
    return config
