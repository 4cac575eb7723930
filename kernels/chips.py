"""Tells kinds of chips apart by their names."""

import re


def is_hopper(chip: str) -> bool:
    """Returns whether a device_kind, as JAX names it ("NVIDIA H200"), is a Hopper GPU."""
    return re.search(r"\b(H20|H100|H200|H800|GH200)\b", chip) is not None


def has_large_vmem(chip: str) -> bool:
    """Returns whether a device_kind is a TPU whose cores have at least 64 MiB of VMEM.

    These are v5e, v5p and later ones. A core of TPU v2, v3 and v4 has 16 MiB.
    """
    return chip.startswith("TPU") and re.match(r"TPU v[234]\b", chip) is None
