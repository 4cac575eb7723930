"""Checks the numbers of what is timed, and writes the rows that a benchmark measured."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np


def check_difference(
    name: str, ours: Iterable[np.ndarray], reference: Iterable[np.ndarray]
) -> float:
    """Returns the largest difference of an array from its reference, over its largest value.

    Raises ValueError above 2 %.
    """
    worst = max(
        float(np.abs(found - right).max() / np.abs(right).max())
        for found, right in zip(ours, reference, strict=True)
    )
    if not worst < 0.02:
        raise ValueError(
            f"{name} differs from the reference by {worst:.1%}: its times mean nothing"
        )
    return worst


def output_file(text: str) -> Path:
    """Reads the path of a file to write. A mistyped one must not cost minutes of measuring."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text} is a directory, or in none that exists: set it to a file's path"
        )
    return path


def write_rows(path: Path, rows: list[dict[str, Any]], **about: Any) -> None:
    """Writes rows as JSON, with the device, the versions, and what else is said `about` them."""
    versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
    head = {"device": jax.devices()[0].device_kind, "versions": versions}
    document = {**head, **about, "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
