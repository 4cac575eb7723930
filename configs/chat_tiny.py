"""Trains a small decoder to write functions of Python's standard library from their docstrings.

The answers alone are learnt. With `--config.data.dataset=stdlib_functions/without_input` the same
answers follow empty requests, which shows what the requests are worth.

Command:  python -m launch.train --config=configs/chat_tiny.py --workdir=runs/chat_tiny
Hardware: 2 CPU cores.
Time, result: not measured yet.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=4, model_dim=128, feed_forward_dim=352, num_heads=4, num_kv_heads=2, head_dim=32
    )
    config.model.compute_dtype = "float32"  # CPUs have no faster arithmetic than this
    config.model.vocab_size = 264  # bytes, and the special tokens
    config.data.dataset = "stdlib_functions/described"
    config.data.chat_template = "configs/chat.jinja"
    config.data.special_tokens = ("<|user|>", "<|assistant|>", "<|end|>")
    config.data.update(sequence_length=512, packing="pad")
    config.optimizer.update(learning_rate=4e-3, warmup_fraction=0.0625)
    config.train.update(batch_size=16, steps=400, eval_every=100, checkpoint_every=400)
    return config
