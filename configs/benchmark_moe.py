"""Times a sparse layer against a dense layer of the same active FLOPs, in float32.

8x2   Eight experts of width 1024, two for each token.
64x8  64 experts of width 256, eight for each token.

Command:  python -m launch.benchmark --config=configs/benchmark_moe.py:64x8 --layer
Hardware: a CPU.
Time, result: a minute; see docs/moe.md.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config(shape: str = "8x2") -> ConfigDict:
    num_experts, experts_per_token = map(int, shape.split("x"))
    config = RunConfig.config_dict()
    config.model.update(model_dim=512, compute_dtype="float32")
    config.model.moe.update(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_dim=2048 // experts_per_token,
    )
    config.data.sequence_length = 512
    config.train.batch_size = 16
    return config
