"""Each process's log file: what real processes write into it, however they end."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from launch import log_writer, logs
from launch.log_writer import Lines, Log
from launch.logs import last_lines, last_lines_of_ended, log_directory, log_path
from moe.storage import lines, paths
from moe.storage.paths import RunPath

ROOT = Path(__file__).parents[2]
START = """
import os, signal, sys, time
from pathlib import Path
from launch import logs
directory, process_id = Path(sys.argv[1]), int(sys.argv[2])
logs.start(logs.log_path(directory, process_id), process_id, 4)
"""
PREFIX = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \S+ (\d+) \| ")


def start(body: str, directory: Path, process_id: int = 3, **options) -> subprocess.Popen[bytes]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    # With this variable Python has no buffer whose text could be lost.
    options["env"] = {key: os.environ[key] for key in os.environ.keys() - {"PYTHONUNBUFFERED"}}
    return subprocess.Popen(
        [sys.executable, "-c", START + body, str(directory), str(process_id)], cwd=ROOT, **options
    )


def run(body: str, directory: Path, process_id: int = 3) -> tuple[bytes, bytes, int]:
    process = start(body, directory, process_id)
    # Both pipes are open until the writer has ended too.
    output, error = process.communicate(timeout=60)
    return output, error, process.returncode


def logged(directory: Path, process_id: int = 3) -> list[str]:
    """Returns the lines of a log after their prefix, without the first line of a start."""
    lines = log_path(directory, process_id).read_text().splitlines()
    prefixes = [PREFIX.match(line) for line in lines]
    assert all(prefixes), lines
    assert {int(match[1]) for match in prefixes if match} == {process_id}
    texts = [PREFIX.sub("", line, count=1) for line in lines]
    assert re.match(rf"process {process_id} of 4 on \S+ starts: \S+python", texts[0])
    return texts[1:]


def test_a_run_has_its_logs_and_other_commands_have_them_in_the_current_directory() -> None:
    assert log_directory("train", Path("runs/x")) == Path("runs/x/logs")
    assert log_directory("evaluate", Path("runs/x")) == Path("logs/evaluate")
    assert log_directory("benchmark", None) == Path("logs/benchmark")


def test_a_process_writes_everything_into_its_own_log(tmp_path: Path) -> None:
    body = "print('one'); os.write(2, b'native\\n'); print('two', file=sys.stderr); print('three')"
    assert run(body, tmp_path / "logs") == (b"", b"", 0)
    assert logged(tmp_path / "logs") == ["one", "native", "two", "three"]


def test_native_text_is_not_mixed_with_the_output_of_process_0(tmp_path: Path) -> None:
    body = "os.write(1, b'Gloo\\n'); print('{}'); logs.finish(); os.write(1, b'x\\n'); print('end')"
    assert run(body, tmp_path, 0) == (b"{}\nend\n", b"Gloo\nx\n", 0)
    assert sorted(logged(tmp_path, 0)) == ["Gloo", "{}"]


def test_process_0_also_writes_where_it_wrote_before(tmp_path: Path) -> None:
    body = "print('one\\r\\ttwo'); print('\\x1b[1merror\\x1b[0m', file=sys.stderr)"
    assert run(body, tmp_path, 0) == (b"one\r\ttwo\n", b"\x1b[1merror\x1b[0m\n", 0)
    assert sorted(logged(tmp_path, 0)) == ["\ttwo", "error"]


@pytest.mark.parametrize(
    ("end", "code"),
    [("os._exit(76)", 76), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("os.abort()", -6)],
)
def test_the_last_lines_survive(tmp_path: Path, end: str, code: int) -> None:
    body = "print('line'); print('\\r5%', end='', file=sys.stderr); " + end
    assert run(body, tmp_path)[2] == code
    assert logged(tmp_path) == ["line", "5%"]
    assert run(body, tmp_path, 0) == (b"line\n", b"\r5%", code)


def test_a_process_with_a_log_can_still_show_a_text(tmp_path: Path) -> None:
    body = "print('log'); logs.show('process 0 died')"
    assert run(body, tmp_path, 1) == (b"", b"process 0 died\n", 0)
    assert logged(tmp_path, 1) == ["log"]
    assert run(body, tmp_path, 0) == (b"log\n", b"", 0)  # it prints such a text itself


@pytest.mark.parametrize("process_id", [0, 3])
def test_a_writer_that_was_killed_is_named_at_the_end(tmp_path: Path, process_id: int) -> None:
    """As the system does where memory is full. The process itself goes on."""
    body = """
from moe.training.progress import Stream
sys.stdout = Stream(sys.stdout)
print('one')
while not logs.log_path(directory, process_id).read_text().endswith(' | one\\n'):
    time.sleep(0.01)
logs._running.writer.kill()
logs._running.writer.wait()
print('two')
print('three', flush=True)
"""
    output, error, code = run(body, tmp_path, process_id)
    assert code == 0 and output == (b"" if process_id else b"one\n")
    assert error.decode() == (
        f"\nlog lost: process {process_id}'s log_writer.py was killed by SIGKILL, and what the "
        "process printed since then is neither shown nor in its log\n"
    )
    assert logged(tmp_path, process_id) == ["one"]


HELD = """
import subprocess
holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(directory / "holder").write_text(str(holder.pid))
print("end")
"""


@pytest.mark.parametrize("end", ["logs.finish(); print('finished')", "os.abort()"])
def test_the_writer_ends_with_its_process_though_another_one_holds_its_output(
    tmp_path: Path, end: str
) -> None:
    process = start(HELD + end, tmp_path, 0)
    assert process.stdout and process.stdout.readline() == b"end\n"
    try:
        rest = process.communicate(timeout=100)[0]
    finally:
        os.kill(int((tmp_path / "holder").read_text()), signal.SIGKILL)
    assert logged(tmp_path, 0) == ["end"]
    assert rest == (b"finished\n" if "finish" in end else b"")


def test_signals_do_not_end_the_log_before_its_process(tmp_path: Path) -> None:
    body = """
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
print('ready')
for _ in range(20_000):
    if (directory / 'open').exists():
        break
    time.sleep(0.01)
print('saved')
"""
    process = start(body, tmp_path, 0, process_group=0)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        os.killpg(process.pid, number)
    (tmp_path / "open").touch()
    assert process.communicate(timeout=60)[0] == b"saved\n"
    assert logged(tmp_path, 0) == ["ready", "saved"]


def test_process_0_still_sees_a_terminal_and_its_width(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    body = "print(sys.stdout.isatty(), sys.stderr.isatty(), os.get_terminal_size(2).columns)"
    body += "\nfor i in range(100): print(end=f'\\r{i}', file=sys.stderr)"
    subprocess.run(["stty", "-F", os.ttyname(theirs), "columns", "123", "-onlcr"], check=True)
    assert start(body, tmp_path, 0, stdout=theirs, stderr=theirs).wait(60) == 0
    shown = b""
    while select.select([ours], [], [], 0)[0]:  # one call may read a part
        shown += os.read(ours, 10_000)
    assert shown == b"True True 123\n" + b"".join(b"\r%d" % i for i in range(100))
    os.close(ours)
    os.close(theirs)
    assert logged(tmp_path, 0) == ["True True 123", "99"]


def test_nothing_appears_after_the_end_of_a_process(tmp_path: Path) -> None:
    with (tmp_path / "output").open("w") as file:
        body = "for i in range(20_000): print(i)"
        assert start(body, tmp_path, 0, stdout=file, stderr=file).wait(60) == 0
        assert (tmp_path / "output").read_text().split() == [str(i) for i in range(20_000)]


def test_a_reader_who_leaves_stops_neither_the_process_nor_its_log(tmp_path: Path) -> None:
    body = "for i in range(50_000): print(i)"
    process = start(body, tmp_path, 0)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0
    assert logged(tmp_path, 0) == [str(i) for i in range(50_000)]


def test_closed_streams_are_no_obstacle(tmp_path: Path) -> None:
    command = '"$0" -c "$1" "$2" 0 <&- >&- 2>&-'
    body = START + "os.write(1, b'one\\n'); os.write(2, b'two\\n')"
    done = subprocess.run(["sh", "-c", command, sys.executable, body, tmp_path], cwd=ROOT)
    assert done.returncode == 0
    assert logged(tmp_path, 0) == ["one", "two"]


def test_a_full_disk_stops_neither_the_process_nor_its_output() -> None:
    writer, write = start_writer(ROOT / "launch" / "log_writer.py", Path("/dev/full"), process_id=0)
    os.write(write, b"one\n")
    os.write(write, b"two\n")
    os.close(write)
    assert writer.communicate(timeout=60) == (
        b"one\ntwo\n",
        b"/dev/full cannot be written: No space left on device\n",
    )


def test_a_new_start_appends_and_its_last_lines_are_its_own(tmp_path: Path) -> None:
    run("print('first')", tmp_path)
    run("for i in range(30): print(i)", tmp_path)
    path = log_path(tmp_path, 3)
    assert [line.split(" | ")[1] for line in last_lines(path, 2)] == ["28", "29"]
    assert [line.split(" | ")[1] for line in last_lines(path, 99)] == [str(i) for i in range(30)]
    assert "first" in path.read_text()
    assert last_lines(path, since=time.time() + 1) == []
    assert last_lines(log_path(tmp_path, 4)) == []


def test_the_lines_of_a_process_that_has_ended_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow its writer is: until it has ended, there may be more."""
    monkeypatch.setattr(logs, "_QUIET_SECONDS", 0.01)
    path, looks = log_path(tmp_path, 3), []
    writer, write = start_writer(ROOT / "launch" / "log_writer.py", path, process_id=3)
    os.write(write, b"one\n")

    def find_path() -> Path:
        looks.append(len(last_lines(path)))
        if looks.count(1) == 5 and looks[-1] == 1:
            os.write(write, b"two\n")
            os.close(write)
        return path

    shown = last_lines_of_ended(find_path, seconds=60.0)
    assert [line.split(" | ")[1] for line in shown] == ["one", "two"]
    assert writer.communicate(timeout=60) == (b"", b"")


def test_lines_that_never_come_are_not_waited_for_any_longer(tmp_path: Path) -> None:
    assert last_lines_of_ended(lambda: log_path(tmp_path, 3), seconds=0.3) == []


OWNED = """
import contextlib, os, sys, time
from pathlib import Path
from launch import logs
run = Path(sys.argv[1])
places = logs.Places(Path(sys.argv[1] + "-first", "start"), run / "logs")
logs.start(logs.log_path(places.first, 3), 3, 4, logs.log_path(places.run, 3))
print("before")

def wait_for(line):
    text = ""
    while f" | {line}\\n" not in text:
        time.sleep(0.01)
        with contextlib.suppress(FileNotFoundError):  # the log has just moved
            text = places.path(3).read_text()
"""


def run_owned(tmp_path: Path, body: str) -> None:
    """Runs a process whose run is `tmp_path/run`, and whose log is elsewhere until it owns that."""
    command = [sys.executable, "-c", OWNED + body, str(tmp_path / "run")]
    # The writer has these pipes too, so this waits for it.
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)


@pytest.mark.parametrize("end", ["", "os._exit(2)", "wait_for('before'); os.abort()"])
def test_a_start_that_does_not_own_the_run_leaves_nothing_in_it(tmp_path: Path, end: str) -> None:
    run_owned(tmp_path, end)
    assert logged(tmp_path / "run-first" / "start") == ["before"]
    assert not (tmp_path / "run").exists()


def test_the_log_of_an_owner_has_its_start_too_and_is_the_only_one(tmp_path: Path) -> None:
    body = "print('unwritten'); logs.own(run, None); print('after'); logs.own(run, 2); print('end')"
    for _ in range(2):
        run_owned(tmp_path, body)
    assert not (tmp_path / "run-first" / "start").exists()
    text = log_path(tmp_path / "run" / "logs", 3).read_text()
    texts = [line.split(" 3 | ")[1] for line in text.splitlines()]
    lines = ["before", "unwritten", "after", "end"]
    assert [text for text in texts if "starts: " not in text] == 2 * lines
    assert len(texts) == 10 and "starts: " in texts[0] and "starts: " in texts[5]


def test_the_log_leaves_a_run_that_another_job_has_taken(tmp_path: Path) -> None:
    (tmp_path / "run" / "lease").mkdir(parents=True)
    body = """
(run / "lease" / "2").touch()
logs.own(run, 2)
print("ours")
wait_for("ours")
(run / "lease" / "3").touch()
print("lost")
"""
    run_owned(tmp_path, body)
    assert logged(tmp_path / "run" / "logs") == ["before", "ours"]
    first = log_path(tmp_path / "run-first" / "start", 3).read_text()
    assert PREFIX.sub("", first) == "lost\n"


WATCHED = """
from moe.parallel import watch
def from_first(name, make):
    path = directory / name
    if process_id == 0:
        path.with_suffix(".new").write_text(make())
        path.with_suffix(".new").rename(path)
    while not path.exists():
        time.sleep(0.01)
    return path.read_text()
watch.use_log(logs.show, logs.finish)
watch.start(process_id, 3, "127.0.0.1", from_first)
def last_lines(number):
    return "\\n".join(logs.last_lines_of_ended(lambda: logs.log_path(directory, number)))
watch.show_last_lines(last_lines)
print("last line of", process_id)
(directory / f"ready-{process_id}").touch()
time.sleep(600)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_the_lowest_process_that_is_left_shows_the_last_lines(tmp_path: Path, victim: int) -> None:
    """Also where that is not process 0, whose output alone is shown otherwise."""
    processes = [start(WATCHED, tmp_path, number) for number in range(3)]
    while not all((tmp_path / f"ready-{number}").exists() for number in range(3)):
        time.sleep(0.01)
    processes[victim].kill()
    shown = [process.communicate(timeout=60)[1].decode() for process in processes]
    speaker = 1 if victim == 0 else 0
    text = rf"\n?process {victim} of 3( on \S+)? died: this process ends too, with exit code 76\n"
    line = rf"\S+Z \S+ {victim} \| last line of {victim}\n"
    assert re.fullmatch(text + line, shown[speaker])
    assert [shown[number] for number in range(3) if number != speaker] == ["", ""]
    for number in {0, 1, 2} - {victim}:
        assert re.search(text, log_path(tmp_path, number).read_text())


def feed(*parts: bytes) -> tuple[list[bytes], list[bytes]]:
    """Returns the lines of a text that arrives in parts, and what is unfinished in the end."""
    lines = Lines()
    ended = [line for part in parts for line in lines.feed(part)]
    return ended, list(lines.unfinished())


@pytest.mark.parametrize(
    ("parts", "ended", "unfinished"),
    [
        ([b"one\ntwo\n"], [b"one", b"two"], []),
        ([b"on", b"e\n\ntw"], [b"one", b""], [b"tw"]),
        ([b"dos\r\nline\r", b"\n"], [b"dos", b"line"], []),
        ([b"\r1%", b"\r2%\r3%"], [], [b"3%"]),
        ([b"\r1", b"0%\r", b"2", b"0%\n"], [b"20%"], []),
        ([b"\r50%|\r    \r", b"a message\n\r60%"], [b"a message"], [b"60%"]),
        ([b"\r50%\r   \r"], [], [b"50%"]),
        ([b"x" * 70_000, b"y\n"], [b"x" * 70_000, b"y"], []),
    ],
)
def test_lines(parts: list[bytes], ended: list[bytes], unfinished: list[bytes]) -> None:
    assert feed(*parts) == (ended, unfinished)


def test_a_state_of_a_bar_is_returned_once() -> None:
    lines = Lines()
    assert list(lines.feed(b"\r1%")) == []
    assert [list(lines.unfinished()) for _ in range(2)] == [[b"1%"], []]
    assert list(lines.feed(b"\r2%")) == [] and list(lines.unfinished()) == [b"2%"]
    assert list(lines.feed(b"\n")) == [b"2%"]


def start_writer(script: Path, path: Path, process_id: int) -> tuple[subprocess.Popen[bytes], int]:
    """Starts the process that writes a log, and returns it and a descriptor to write to."""
    read, write = os.pipe()
    arguments = [
        sys.executable,
        str(script),
        str(path),
        "host",
        str(process_id),
        f"process {process_id} of 4 on host starts: x",
        f"{read}:1",
    ]
    writer = subprocess.Popen(
        arguments,
        pass_fds=[read],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(read)
    return writer, write


def test_the_log_has_the_state_of_a_bar_while_it_moves(tmp_path: Path) -> None:
    script, path = tmp_path / "log_writer.py", tmp_path / "log"
    text = (ROOT / "launch" / "log_writer.py").read_text()
    script.write_text(text.replace("BAR_SECONDS = 30.0", "BAR_SECONDS = 0.1"))
    writer, write = start_writer(script, path, process_id=3)
    os.write(write, b"\r1%\r2%")
    while not (path.exists() and path.read_text().endswith(" host 3 | 2%\n")):
        time.sleep(0.01)
    os.write(write, b"\r3%")
    os.close(write)
    assert writer.communicate(timeout=60) == (b"", b"")
    assert [line.split(" | ")[1] for line in path.read_text().splitlines()[1:]] == ["2%", "3%"]


def test_an_object_has_each_line_once_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, answers = epath.Path(tmp_path / "log"), [OSError("no answer"), OSError("no answer")]
    write_whole = lines.write_whole

    def write(target: RunPath, content: bytes) -> None:
        if answers:
            raise answers.pop()
        write_whole(target, content)

    monkeypatch.setattr(lines, "write_whole", write)
    monkeypatch.setattr(lines, "FLUSH_SECONDS", 0)
    monkeypatch.setattr(paths, "run_path", lambda _: path)
    log = Log("gs://bucket/log")
    for text in (b"one\n", b"two\n", b""):
        log.write(text)
        log.flush()
    assert path.read_text() == "one\ntwo\n"
    assert capfd.readouterr().err.count("cannot be written: no answer") == 1


def test_the_owner_of_a_run_is_looked_for_only_where_something_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A progress bar ends no line, and a look into an object store takes long."""
    looks = []
    monkeypatch.setattr(log_writer, "_is_lost", lambda *lease: bool(looks.append(lease)))
    monkeypatch.setattr(paths, "run_path", lambda _: epath.Path(tmp_path / "object"))
    for number, (path, expected) in enumerate(((str(tmp_path / "log"), 1), ("gs://b/log", 0))):
        log = Log(str(tmp_path / f"first_{number}"))
        log.move(path, "run", 7)
        looks.clear()
        for text in (b"", b"a line\n", b""):
            log.write(text)
        assert len(looks) == expected
        log.flush()
        assert looks == [("run", 7)] * (expected + 1)
