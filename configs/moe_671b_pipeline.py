"""Trains `moe_671b` in a pipeline of two stages, which hold 29 of the 58 sparse layers each.

Each stage is 8 groups of 64 devices. The 30 microbatches have one row for each of these devices, and
a stage waits in 1 of 31 ticks, since 58 layers can be cut into 2 or into 58 pieces alone. The three
dense layers before the experts, embedding, unembedding and loss run on all devices at once.

Command:  python -m launch.train --config=configs/moe_671b_pipeline.py --workdir=runs/moe_671b_pipeline
Hardware: 1,024 H200 (128 hosts).
          1,024 TPU v5p (8x8x16) with --config.model.moe.dispatch=capacity
          --config.model.moe.exchange=all_to_all, since its compiler (libtpu 0.0.42) accepts no ragged
          exchange inside a pipeline.
Time, result: not measured. docs/pipeline.md says what the programs take.
"""  # noqa: E501

from ml_collections import ConfigDict

from configs import moe_671b


def get_config() -> ConfigDict:
    config = moe_671b.get_config()
    config.mesh.pipeline = 2
    config.train.accumulation = 30
    return config
