"""Trains dense_tiny's model on the same text in tokens of a BPE of 8,192, instead of in bytes.

A token holds 3.7 bytes of the held-out files, so a row of 256 tokens is 950 bytes of text. The
tokenizer is trained once, in some seconds, without network:

    python -m launch.tokenizer --data=stdlib --vocab_size=8192 --out=~/.cache/moe/stdlib_8192.json

Command:  python -m launch.train --config=configs/bpe_tiny.py --workdir=runs/bpe_tiny
Hardware: 2 CPU cores.
Time:     22 minutes of one core's time for 480 steps, in which dense_tiny takes its 800.
Result:   1.685 bits per byte of held-out text after these 480 steps (train.steps=480), and 1.871
          for dense_tiny in the same time (docs/log.md). 800 steps have not been measured.
"""

from ml_collections import ConfigDict

from configs import dense_tiny


def get_config() -> ConfigDict:
    config = dense_tiny.get_config()
    config.data.tokenizer = "~/.cache/moe/stdlib_8192.json"
    config.model.vocab_size = 8192
    return config
