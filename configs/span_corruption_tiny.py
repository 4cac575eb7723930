"""Trains an encoder and a decoder to restore hidden spans of Python's standard library (T5).

Command:  python -m launch.train --config=configs/span_corruption_tiny.py --workdir=runs/span_corruption_tiny
Hardware: 2 CPU cores.
Time:     7 min, while other work took the cores.
Result:   2.198 nats per byte of the decoder's text. It learns late to read the encoder's output, as
          docs/data/objectives.md shows.
"""  # noqa: E501

from ml_collections import ConfigDict

from configs import masked_tiny


def get_config() -> ConfigDict:
    config = masked_tiny.get_config()
    config.task = "span_corruption"
    config.model.vocab_size = 360  # the bytes and 100 sentinels, as a multiple of 8
    config.model.num_layers = 3  # of the encoder, and as many of the decoder
    config.data.sequence_length = 128  # of the encoder; 142 bytes of text, and 29 targets
    return config
