"""Trains a small decoder to write functions of Python's standard library from their docstrings.

The answers alone are learnt. configs/experiments/requests.py shows what the requests are worth.

Command:  python -m launch.train --config=configs/chat_tiny.py --workdir=runs/chat_tiny
Hardware: 2 CPU cores.
Time:     16 min, while other work took the cores.
Result:   0.928 nats per byte (1.345 bits) of 76 held-out functions, and 1.375 without requests.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=2, model_dim=64, feed_forward_dim=176, num_heads=2, num_kv_heads=2, head_dim=32
    )
    config.model.compute_dtype = "float32"  # CPUs have no faster arithmetic than this
    config.model.vocab_size = 264  # bytes, and the special tokens
    config.data.dataset = "stdlib_functions/with_request"
    config.data.chat_template = "configs/chat.jinja"
    config.data.special_tokens = ("<|user|>", "<|assistant|>", "<|end|>")
    config.data.update(sequence_length=512, packing="best_fit")
    config.optimizer.update(learning_rate=4e-3, warmup_fraction=0.0625)
    # A small model learns late to look back at the request, in the second half of these steps.
    config.train.update(batch_size=16, steps=2000, eval_every=250, checkpoint_every=500)
    return config
