"""A small run directory for tests of its report, and what a reader sees of the report's page."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe.config import ModelConfig, MoEConfig, RunConfig, TrackingConfig, TrainConfig
from moe.workdir.tracking import MetricWriter, write_environment


def make_run(workdir: Path, lines: list[tuple[Any, ...]], moe: MoEConfig | None = None) -> Path:
    """Writes a run of 8 layers; each line holds the arguments of one MetricWriter.write."""
    config = RunConfig(
        model=ModelConfig(num_layers=8, moe=moe or MoEConfig()),
        train=TrainConfig(steps=2000, batch_size=32),
    )
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    write_environment(workdir, "blockwise")
    with MetricWriter(workdir, TrackingConfig(tensorboard=False), step=0) as writer:
        for line in lines:
            writer.write(*line)
    return workdir


def images(workdir: Path) -> set[str]:
    """The names of the report's figures."""
    return {path.name for path in (workdir / "report").glob("*.png")}


def colours(path: Path) -> set[str]:
    """The colours of an image's pixels, as #rrggbb."""
    red, green, blue = np.moveaxis(np.asarray(Image.open(path).convert("RGB"), np.uint32), 2, 0)
    # Numbers are sorted many times faster than rows of three bytes.
    return {f"#{pixel:06x}" for pixel in np.unique(red << 16 | green << 8 | blue)}


def text(page: Path) -> str:
    """What a reader sees of a page: its text without tags."""
    without_tags = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", without_tags)
