"""What tests share that start commands, or jobs of several processes."""

import socket

# The fields of a model whose training takes a command seconds.
SMALL_MODEL = {
    "model.num_layers": 1,
    "model.model_dim": 16,
    "model.feed_forward_dim": 24,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
