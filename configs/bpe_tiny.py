"""Trains dense_tiny's model on the same text in tokens of a BPE of 8,192, instead of in bytes.

A token holds 3.7 bytes of the held-out files, so a row of 256 tokens is 950 bytes of text. The
tokenizer is trained once, in some seconds, without network:

Command:  python -m launch.tokenizer --data=stdlib --vocab_size=8192 \\
              --out=~/.cache/moe/stdlib_8192.json
          python -m launch.train --config=configs/bpe_tiny.py --workdir=runs/bpe_tiny
"""

from ml_collections import ConfigDict

from configs import dense_tiny


def get_config() -> ConfigDict:
    config = dense_tiny.get_config()
    config.data.tokenizer = "~/.cache/moe/stdlib_8192.json"
    config.model.vocab_size = 8192
    return config
