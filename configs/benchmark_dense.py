"""Times a dense step, whose speed is compared with that of the machine's own matmul.

The model has 8 layers of width 512, in float32, and rows are 512 bytes. The proportions are those
of Gemma 2B (2024, table 1): heads of 256 with one key/value head, and F = 8 D. A microbatch is 4
rows.

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
