"""The dense step whose speed is held against the machine's own matmul: 8 layers of width 512, rows
of 512 bytes, float32.

The proportions are Gemma 2B's (2024, table 1): heads of 256 with one key/value head, F = 8 D. A
microbatch is 4 rows.

Command:  python -m launch.benchmark --config=configs/benchmark_dense.py --trials=7
Hardware: a CPU.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=8,
        model_dim=512,
        feed_forward_dim=4096,
        num_heads=2,
        num_kv_heads=1,
        head_dim=256,
    )
    config.model.update(compute_dtype="float32", scan_layers=False)
    config.data.sequence_length = 512
    config.train.update(batch_size=32, accumulation=8)
    return config
