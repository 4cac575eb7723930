"""Tells kinds of chips apart by their names."""

import re


def is_hopper(chip: str) -> bool:
    """Returns whether a device_kind, as JAX names it ("NVIDIA H200"), is a Hopper GPU."""
    return re.search(r"\b(H20|H100|H200|H800|GH200)\b", chip) is not None
