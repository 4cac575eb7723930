"""Every shell script of launch/ is correct for bash, and for shellcheck."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe.exit_codes import may_restart
from tests.launch.test_slurm import text

FOLDER = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(FOLDER.rglob("*.sh"))


def check(command: list[str], script: str) -> None:
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bash_can_read_every_script() -> None:
    assert SCRIPTS
    for script in [*(path.read_text() for path in SCRIPTS), text()]:
        check(["bash", "-n"], script)


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not shellcheck:
        pytest.skip("shellcheck is not installed: install the extra `test`")
    for script in [*(path.read_text() for path in SCRIPTS), text()]:
        check([shellcheck, "-"], script)


@pytest.mark.parametrize("name", ["slurm/job.sbatch", "tpu/host.sh"])
def test_scripts_restart_what_may_be_restarted(name: str) -> None:
    lines = (FOLDER / name).read_text().splitlines()
    (pattern,) = [line.split(")")[0] for line in lines if line.strip().startswith("1 | 69 |")]
    loop = f"for n in {{1..255}}; do case $n in {pattern}) echo $n ;; esac; done"
    done = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, check=True)
    assert [int(code) for code in done.stdout.split()] == [
        code for code in range(1, 256) if may_restart(code)
    ]
