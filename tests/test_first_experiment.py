"""The experiment of docs/first_experiment.md, planned as it stands there."""

import re
from pathlib import Path

from launch.sweep_file import read_sweep
from launch.sweep_table import planned_row

PAGE = (Path(__file__).parents[1] / "docs/first_experiment.md").read_text()
VARIANTS = ("routed", "shared")


def test_the_runs_are_those_of_the_page(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    file = tmp_path / "shared_expert.py"
    file.write_text(block)
    rows = {one.name: planned_row(one.run) for one in read_sweep(str(file), [])}
    assert list(rows) == [f"{name}/seed_{seed}" for seed in range(3) for name in VARIANTS]
    for name in VARIANTS:
        row = rows[f"{name}/seed_0"]
        counts = f"{row['active_parameters']:,} | {row['parameters']:,}"
        assert f"| {name} | {counts} | " in PAGE
    # One column of the router, of width 64, in each of two layers.
    fewer = rows["routed/seed_0"]["parameters"] - rows["shared/seed_0"]["parameters"]
    assert fewer == 2 * 64
