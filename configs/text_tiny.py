"""Trains the model of `dense_tiny` on files of text: by default, on this project's own code.

docs/data.md shows how to train it on files of yours.

Command:  python -m launch.train --config=configs/text_tiny.py --workdir=runs/text_tiny
Hardware: 2 CPU cores.
Time, result: not measured. A step costs what one of `dense_tiny` costs.
"""

from ml_collections import ConfigDict

from configs import dense_tiny


def get_config() -> ConfigDict:
    config = dense_tiny.get_config()
    config.data.dataset = "text:moe"  # a file, a directory or a glob, here, at gs:// or at s3://
    return config
