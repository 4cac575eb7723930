"""The scripts of launch/tpu/, with a gcloud that only notes its arguments."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUEUE, HOST = ROOT / "launch" / "tpu" / "queue.sh", ROOT / "launch" / "tpu" / "host.sh"
GCLOUD = """#!/bin/bash
printf '%s\\n' "$@" '' >>calls
[ "$4" != describe ] || { read -r state <states; sed -i 1d states; echo "$state"; }
"""
SETTINGS = {"NAME": "run", "ZONE": "z", "TYPE": "v5p-128", "RUNTIME": "r", "POLL_S": "0"}


@pytest.fixture
def queue(tmp_path: Path):
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"

    def queue(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(QUEUE), *arguments],
            cwd=tmp_path,
            env=os.environ | {"PATH": path} | SETTINGS | changed,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return queue


def calls(directory: Path) -> list[list[str]]:
    """Returns the arguments of each call of gcloud."""
    text = (directory / "calls").read_text()
    return [call.splitlines() for call in text.split("\n\n") if call]


@pytest.mark.parametrize(
    ("slices", "nodes"),
    [("1", ["--node-id=run"]), ("4", ["--node-count=4", "--node-prefix=run"])],
)
def test_slices_are_asked_for(queue, tmp_path, slices, nodes) -> None:
    assert queue("create", "--spot", SLICES=slices).returncode == 0
    (call,) = calls(tmp_path)
    assert call[:6] == ["compute", "tpus", "queued-resources", "create", "run", "--zone=z"]
    assert call[6:] == ["--accelerator-type=v5p-128", "--runtime-version=r", *nodes, "--spot"]


@pytest.mark.parametrize(("last", "code"), [("ACTIVE", 0), ("FAILED", 1), ("SUSPENDED", 1)])
def test_waiting_ends_when_the_slices_are_there_or_never_will_be(queue, tmp_path, last, code):
    (tmp_path / "states").write_text(f"WAITING_FOR_RESOURCES\nPROVISIONING\n{last}\n")
    done = queue("wait")
    assert (done.returncode, len(calls(tmp_path))) == (code, 3), done


def test_training_starts_on_every_host_with_the_words_as_they_are(queue, tmp_path) -> None:
    assert queue("train", "--config=configs/dense_7b.py", "--note=a b").returncode == 0
    (call,) = calls(tmp_path)
    assert call[3:8] == ["ssh", "run", "--zone=z", "--node=all", "--worker=all"]
    command = " ".join(" ".join(call[8:]).split())
    assert command.endswith(
        "bash launch/tpu/host.sh .venv/bin/python -m launch.train "
        "--config=configs/dense_7b.py --note=a\\ b"
    )


@pytest.mark.parametrize(
    ("arguments", "changed", "message"),
    [
        (("create",), {"ZONE": ""}, "error: ZONE is not set: export it\n"),
        (("create",), {"TYPE": ""}, "error: TYPE is not set: export it\n"),
        ((), {}, "Trains on slices of Cloud TPUs by queued resources."),
        (("start",), {}, "Trains on slices of Cloud TPUs by queued resources."),
    ],
)
def test_mistakes_are_told(queue, arguments, changed, message) -> None:
    done = queue(*arguments, **changed)
    assert done.returncode == 2 and done.stderr.startswith(message), done


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0], 0), ([76, 1, 137, 74, 0], 0), ([77, 75], 75), ([69, 2], 2), ([3], 3)],
)
def test_a_host_starts_again_what_a_restart_can_help(tmp_path, codes, expected) -> None:
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    command = (
        "echo ${MOE_RESTART_COUNT-0} >>counts; read -r code <codes; sed -i 1d codes; exit $code"
    )
    done = subprocess.run(
        [str(HOST), "bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"BACKOFF_S": "0"},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, (tmp_path / "codes").read_text()) == (expected, "")
    counts = [int(count) for count in (tmp_path / "counts").read_text().split()]
    assert counts == list(range(len(codes)))


@pytest.mark.parametrize(
    ("command", "backoff", "code"),
    [
        ("trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done", "60", 75),
        # It could not save, and is not started again all the same.
        ("trap 'exit 76' TERM; echo ready; while :; do sleep 0.05; done", "0", 76),
        ("echo ready; exit 1", "60", 75),  # between two starts
    ],
)
def test_sigterm_saves_and_ends(command, backoff, code) -> None:
    with subprocess.Popen(
        [str(HOST), "bash", "-c", command],
        env=os.environ | {"BACKOFF_S": backoff},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        if "exit 1" in command:
            assert "restart 1 of 10 in 60 s" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == code
