"""Files of a run at gs://, on an emulator: whole files, lines in parts, and the lease."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from moe.config import ConfigError, RunConfig, TrackingConfig
from moe.storage import lines, owner, paths
from moe.storage.lines import LineWriter, line_parts
from moe.storage.owner import LostRun, own_run
from moe.storage.paths import run_path, write_whole
from moe.workdir import orbax_errors, tensorboard, tracking
from moe.workdir.identity import write_config
from moe.workdir.origin import write_origin
from moe.workdir.source import Origin, find_origin
from moe.workdir.tracking import MetricWriter, read_metrics, read_router

NO_COPIES = TrackingConfig(tensorboard=False)


def names(directory: paths.RunPath) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_path_of_pathlib_is_the_same_place(workdir: str) -> None:
    assert str(run_path(Path(workdir))) == workdir == str(run_path(run_path(workdir)))
    assert (
        str(paths.resolve(run_path(workdir))) == str(paths.absolute(run_path(workdir))) == workdir
    )


def test_a_file_appears_whole_or_not_at_all(workdir: str) -> None:
    path = run_path(workdir) / "config.json"
    write_whole(path, "old")
    with pytest.raises(ValueError, match="half"), paths.open_whole(path) as file:
        file.write(b"new")
        raise ValueError("half")
    assert path.read_text() == "old" and paths.size(path) == 3
    write_whole(path, "newer")
    assert path.read_text() == "newer" and names(run_path(workdir)) == ["config.json"]


def test_a_listing_shows_what_other_processes_write(workdir: str) -> None:
    directory = run_path(workdir)
    write_whole(directory / "a", "1")
    assert names(directory) == ["a"]
    code = (
        "import sys\n"
        "from moe.storage.paths import run_path, write_whole\n"
        "write_whole(run_path(sys.argv[1]) / 'b', '2')"
    )
    subprocess.run([sys.executable, "-c", code, workdir], check=True)
    assert names(directory) == ["a", "b"] and (directory / "b").exists()
    paths.remove_tree(directory)
    assert not directory.exists()


def test_a_file_is_created_once(workdir: str) -> None:
    path = run_path(workdir) / "lease"
    assert (paths.create(path, "mine"), paths.create(path, "other")) == (True, False)
    assert path.read_text() == "mine"


def test_a_file_that_goes_while_it_is_read_is_an_error_alone(workdir: str) -> None:
    """The libraries below would write the error's traceback to stderr as well."""
    code = (
        "import sys\n"
        "from moe.storage.paths import run_path, write_whole\n"
        "path = run_path(sys.argv[1]) / 'lease'\n"
        "write_whole(path, 'mine')\n"
        "with path.open() as file:\n"
        "    path.unlink()\n"
        "    try:\n"
        "        file.read()\n"
        "    except FileNotFoundError:\n"
        "        print('gone')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, workdir], capture_output=True, text=True, check=True
    )
    assert done.stdout == "gone\n"
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def test_a_bucket_that_does_not_exist_is_named(bucket: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^gs://no-such-bucket/run lies in a bucket that does not exist: create"
    ):
        run_path("gs://no-such-bucket/run")


def test_a_run_that_has_begun_does_not_ask_for_its_origin(bucket: str, tmp_path: Path) -> None:
    run = run_path("gs://no-such-bucket/run", ask=False)
    config = RunConfig()
    origin = Origin(run, 4, is_fork=False)
    write_origin(tmp_path, origin, lambda: None)
    with pytest.raises(ConfigError, match="lies in a bucket that does not exist"):
        find_origin(tmp_path, config, None)
    write_config(tmp_path, config)
    assert find_origin(tmp_path, config, None) == origin


def test_lines_are_written_in_batches_and_parts(
    workdir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_path(workdir) / "lines.jsonl"
    monkeypatch.setattr(lines, "PART_BYTES", 10)
    monkeypatch.setattr(lines, "FLUSH_SECONDS", 1e6)
    writer = LineWriter(path)
    writer.append("first\n")
    assert line_parts(path) == []
    writer.flush()
    assert path.read_text() == "first\n"
    writer.append("second\n")
    monkeypatch.setattr(lines, "FLUSH_SECONDS", 0)
    writer.append("third\n")
    writer.append("fourth\n")
    assert names(path.parent) == ["lines.jsonl", "lines.jsonl.000001"]
    writer = LineWriter(path)  # another start goes on with the last part
    for line in ("fifth\n", "sixth\n"):
        writer.append(line)
    assert names(path.parent)[-1] == "lines.jsonl.000002"
    text = "".join(line for part in line_parts(path) for line in lines.read_lines(part))
    assert text == "first\nsecond\nthird\nfourth\nfifth\nsixth\n"


@pytest.mark.parametrize("step", [0, 5])
def test_a_resumed_run_drops_later_lines(
    workdir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(lines, "PART_BYTES", 40)
    for directory in (run_path(workdir), tmp_path):
        with MetricWriter(directory, NO_COPIES, 0) as writer:
            for number in range(1, 8):
                writer.write(number, {"a": number}, {})
                writer.flush()
        with MetricWriter(directory, NO_COPIES, step) as writer:
            writer.write(step + 1, {"a": -1})
    assert read_metrics(run_path(workdir)) == read_metrics(tmp_path)
    assert all(map(paths.size, line_parts(run_path(workdir) / "metrics.jsonl")))
    assert list(read_router(run_path(workdir))) == []


def test_an_environment_is_added_at_each_start(workdir: str) -> None:
    for _ in range(2):
        tracking.write_environment(run_path(workdir), "blockwise")
    found = (run_path(workdir) / "environment.jsonl").read_text().splitlines()
    assert [json.loads(line)["attention"] for line in found] == ["blockwise"] * 2


def test_tensorboard_gets_files_that_follow_each_other(
    workdir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", 0)
    monkeypatch.setattr(tensorboard, "PART_BYTES", 300)
    writer = tensorboard.TensorBoard(run_path(workdir), 0)
    for step in range(1, 21):
        writer.write(step, {"loss": step / 2})
    writer.close()
    files = sorted(run_path(workdir).iterdir())
    assert len(files) > 2
    events = [event for file in files for event in read_events(file.read_bytes())]
    assert [event.step for event in events if event.HasField("summary")] == list(range(1, 21))


def read_events(content: bytes) -> list[Event]:
    """Returns the events of a file: each is its length, a checksum, the event and a checksum."""
    events = []
    while content:
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return events


def test_a_lease_is_held_renewed_lost_and_given_back(
    workdir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(owner, "POLL_SECONDS", 0.05)
    directory = run_path(workdir)
    with own_run(directory) as (check, _):
        check()
        with pytest.raises(ConfigError, match="is being written by process"), own_run(directory):
            pass
    with own_run(directory) as (check, _):
        assert names(directory / "lease") == ["2"]
        (directory / "lease" / "3").write_text('{"holder": "process 7 on node-1"}')
        with pytest.raises(LostRun, match="taken over by process 7 on node-1"):
            check()
        writer = LineWriter(directory / "metrics.jsonl", check)
        with pytest.raises(LostRun):
            writer.append("{}\n")
            writer.flush()
    monkeypatch.setattr(owner, "LEASE_SECONDS", 0.5)
    begin = time.monotonic()
    with own_run(directory):
        assert names(directory / "lease") == ["4"] and time.monotonic() - begin >= 0.5


def command(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python's `text`, and then launch.evaluate on a directory at gs://."""
    code = f"""
import runpy, sys
{text}
sys.argv = ["launch.evaluate", "--workdir=gs://bucket/run"]
try:
    runpy.run_module("launch.evaluate", run_name="__main__")
finally:
    print("jax" in sys.modules, "tensorflow" in sys.modules)
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )


def test_a_missing_package_is_one_line() -> None:
    done = command("sys.modules['gcsfs'] = None")
    assert done.stderr.startswith("error: gs://bucket/run needs a package")
    assert done.stderr.endswith("pip install gcsfs, which the extra `gcs` has\n"), done.stderr
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("False False\n", 2, 1)


@pytest.mark.slow  # Google's client looks for credentials in several places
def test_missing_credentials_are_one_line(bucket: str) -> None:
    class Refuse(http.server.BaseHTTPRequestHandler):
        """Answers as Google does where nobody has signed in."""

        def do_GET(self) -> None:
            message = "Anonymous caller does not have storage.objects.list access to the bucket."
            content = json.dumps({"error": {"code": 401, "message": message}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = command("", STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: gs://bucket/run cannot be reached (Anonymous caller"), done
    assert "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION" in last
    assert (done.stdout, done.returncode) == ("False False\n", 2)
    assert not [line for line in done.stderr.splitlines()[:-1] if not line.startswith("waiting")]


def http_error(code: int) -> Exception:
    gcsfs = pytest.importorskip("gcsfs")
    return gcsfs.retry.HttpError({"code": code, "message": "no"})


def test_a_store_that_does_not_answer_is_told_from_one_that_refuses(bucket: str) -> None:
    auth = pytest.importorskip("google.auth.exceptions")
    aiohttp = pytest.importorskip("aiohttp")
    late = [TimeoutError(), ConnectionRefusedError(111, "Connection refused"), http_error(503)]
    late += [http_error(429), auth.TransportError("no metadata"), aiohttp.ClientError("reset")]
    late += [ValueError("UNAVAILABLE: CURL error Couldn't connect to server [source.cc]")]
    refused = [http_error(401), http_error(400), auth.DefaultCredentialsError("none")]
    refused += [OSError("Forbidden: https://x"), auth.RefreshError("expired", retryable=False)]
    refused += [ValueError("PERMISSION_DENIED: no"), FileNotFoundError("gs://x")]
    assert [paths.is_unreachable(error) for error in late] == [True] * len(late)
    assert [paths.is_unreachable(error) for error in refused] == [False] * len(refused)
    store, local = paths.run_path(f"{bucket}/run"), Path("run")
    for error in late:
        assert isinstance(orbax_errors.save_error(store, error), paths.Unreachable)
        assert isinstance(orbax_errors.restore_error(store, error), paths.Unreachable)
        assert not isinstance(orbax_errors.save_error(local, error), paths.Unreachable)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError("Forbidden: https://x\nno access"), "Forbidden: https://x no access: run `gcloud"),
        (ValueError("Anonymous caller does not have access, 401"), "run `gcloud auth application"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_errors_of_a_store_are_one_line_with_a_fix(error: Exception, text: str) -> None:
    assert text in paths.explain(error) and "\n" not in paths.explain(error)
