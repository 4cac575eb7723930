"""Names what commands write into a sweep's directory, and refuses runs of the same names.

A run of such a name would lie in the way of what is written, or mix its files with it.
"""

from pathlib import Path

from launch.slurm.job import FOLDER as SLURM_FOLDER
from moe.config import ConfigError
from moe.storage.owner import LEASE_DIRECTORY, LOCK_FILE

RESULTS = "results"  # the folder of the runs' result files
PARQUET_FILE, CSV_FILE = "runs.parquet", "runs.csv"
COMPARISON_JSON, COMPARISON_TEXT = "comparison.json", "comparison.md"
LOSSES_FIGURE, FRONTS_FIGURE = "comparison.png", "fronts.png"
FIT_PREFIX = "fit_"  # launch.fit writes to fit_LAW, beside the table

_RESERVED = {
    RESULTS: "launch.sweep",
    PARQUET_FILE: "launch.sweep",
    CSV_FILE: "launch.sweep",
    LOCK_FILE: "launch.sweep",
    LEASE_DIRECTORY: "launch.sweep",
    SLURM_FOLDER: "launch.slurm",
    COMPARISON_JSON: "launch.compare",
    COMPARISON_TEXT: "launch.compare",
    **{
        f"{Path(figure).stem}{suffix}": "launch.compare"
        for figure in (LOSSES_FIGURE, FRONTS_FIGURE)
        for suffix in (".png", ".pdf")
    },
}


def check_name(name: str) -> None:
    """Raises ConfigError for the name of a run if a command writes something else there."""
    first = name.split("/")[0]
    writer = "launch.fit" if first.startswith(FIT_PREFIX) else _RESERVED.get(first)
    if writer:
        raise ConfigError(
            f"{name} cannot name a run's directory, since {writer} writes {first} in the "
            "directory of the sweep: rename the run"
        )
