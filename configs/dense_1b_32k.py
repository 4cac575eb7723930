"""Trains `dense_1b` on rows of 32,768 tokens, each of which is split over 8 devices.

In attention the devices exchange heads (Ulysses, Jacobs et al. 2023), which suits 8 key/value heads
on the 8 devices of a host. For more devices than heads, set a larger `mesh.context` and
`--config.model.attention.context_parallelism=ring`.

Command:  python -m launch.train --config=configs/dense_1b_32k.py --workdir=runs/dense_1b_32k
Hardware: 8 H200 (1 host), or TPU v5p:2x2x2, one row at a time over all of them.
Time, result: not measured. Its step, with the TPU's attention kernels, compiles for 8 TPU v5p (jax
          0.10.2, libtpu 0.0.42): 13.8 GiB of state and 14.3 GiB of other arrays on each.
"""

from ml_collections import ConfigDict

from configs import dense_1b


def get_config() -> ConfigDict:
    config = dense_1b.get_config()
    config.model.attention.context_parallelism = "ulysses"
    config.model.remat = "save_attention"
    config.data.sequence_length = 32_768
    config.mesh.update(data=-1, fsdp=1, context=8)
    config.train.update(batch_size=32, accumulation=8)
    return config
