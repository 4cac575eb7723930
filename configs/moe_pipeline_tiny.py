"""Trains the model of `moe_tiny` in a pipeline of two stages, each of which holds every second layer.

Four microbatches go around the two stages twice, and a stage waits in 1 of 9 ticks. The loss and the
gradients of a step are those of `moe_tiny` with `train.accumulation=4` on one device.

Command:  python -m launch.train --config=configs/moe_pipeline_tiny.py --workdir=runs/moe_pipeline_tiny
Hardware: 2 H200, or 2 virtual devices on 2 CPU cores: put `python -m launch.local --processes=1 --devices=2 --` in
          place of `python -m`.
Time, result: not measured.
"""  # noqa: E501

from ml_collections import ConfigDict

from configs import moe_tiny


def get_config() -> ConfigDict:
    config = moe_tiny.get_config()
    config.mesh.pipeline = 2
    config.train.update(accumulation=4, pipeline_rounds=2)
    return config
