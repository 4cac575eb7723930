"""Tests how the run that another run starts from is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.workdir.origin import Origin, write_origin
from moe.workdir.source import read_origin, read_source


@pytest.mark.parametrize("is_fork", [False, True])
def test_a_step_of_numpy_is_written_as_a_number(tmp_path: Path, is_fork: bool) -> None:
    step: Any = np.int64(3)
    named = (None, None, tmp_path, step) if is_fork else (tmp_path, step, None, None)
    source = read_source(*named)
    assert source and source.step is not None
    write_origin(tmp_path, Origin(source.run, source.step, is_fork), lambda: None)
    assert json.loads((tmp_path / "origin.json").read_text())["step"] == 3
    assert read_origin(tmp_path) == Origin(tmp_path, 3, is_fork)
