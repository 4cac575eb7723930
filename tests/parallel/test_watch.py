"""Processes that watch each other: deaths, goodbyes and steps without an end, all without JAX."""

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from moe.config import ConfigError
from moe.exit_codes import BAD_INPUT, DIVERGED, INTERRUPTED, PEER_DIED, PEER_STUCK
from moe.parallel import hub, watch
from moe.parallel.hub import Hub, Judge
from tests.jobs import wait_until

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()


def judge_of(num_processes):
    """Returns a judge who has met all processes, on the hosts a, b, ..., and seen their step 1."""
    judge = Judge(num_processes, 60.0)
    for number in range(num_processes):
        judge.meet(number, "abcdefgh"[number], 0.0)
        say(judge, number, 0.0, "compiling", 1)
    for number in range(num_processes):
        say(judge, number, 1.0, "training", 2)
    assert judge.decide(1.0) is None
    return judge


def say(judge, number, now, phase, step, batch=0):
    judge.hear(number, {"phase": phase, "step": step, "batch": batch}, now)


def leave(judge, number, now, code, reason=""):
    judge.hear(number, {"exit_code": code, "reason": reason}, now)


def decide(judge, times):
    """Returns the first verdict of a judge who is asked each second, and when it comes."""
    for now in times:
        for number in (0, 1, 2):  # they run
            say(judge, number, now, *judge._peers[number].place)
        if verdict := judge.decide(now):
            return now, verdict
    return None


def test_a_closed_connection_without_a_goodbye_is_a_death():
    judge = judge_of(3)
    judge.lose(2)
    assert judge.decide(1.5) == (PEER_DIED, "process 2 of 3 on c died", 2, 0)
    judge = judge_of(3)
    leave(judge, 2, 1.2, 0)
    judge.lose(2)
    assert judge.decide(1.5) is None


def test_the_lowest_process_that_is_left_speaks():
    judge = judge_of(3)
    judge.lose(0)
    assert judge.decide(1.5) == (PEER_DIED, "process 0 of 3 on a died", 0, 1)


def test_a_process_that_has_still_to_connect_is_left_too():
    judge = Judge(3, 60.0)
    judge.meet(1, "b", 0.0)
    judge.lose(1)
    assert judge.decide(0.5) == (PEER_DIED, "process 1 of 3 on b died", 1, 0)
    assert judge.others_are_left()


@pytest.mark.parametrize(
    ("code", "told"), [(1, PEER_DIED), (143, PEER_DIED), (BAD_INPUT, BAD_INPUT)]
)
def test_an_exit_code_that_is_not_of_all_ends_the_others_after_a_grace(code, told):
    judge = judge_of(3)
    leave(judge, 1, 1.0, code)
    judge.lose(1)
    assert judge.decide(2.0) is None
    assert judge.decide(3.5) == (told, f"process 1 of 3 on b ended with exit code {code}", 1, 0)


@pytest.mark.parametrize("code", [0, DIVERGED, INTERRUPTED])
def test_an_end_that_is_of_all_gives_the_others_time_but_not_for_ever(code):
    judge = judge_of(3)
    leave(judge, 1, 1.0, code)
    say(judge, 0, 1.0, "saving", 2)
    assert decide(judge, range(2, 200)) is None
    say(judge, 0, 200.0, "training", 3)
    now, verdict = decide(judge, range(200, 300))
    assert now == 260 and verdict[:2] == (
        PEER_DIED,
        f"process 1 of 3 on b ended with exit code {code}",
    )


def test_a_goodbye_with_a_reason_ends_all_at_once():
    judge = judge_of(3)
    leave(judge, 1, 1.0, INTERRUPTED, "was asked to stop")
    assert judge.decide(1.0) == (INTERRUPTED, "process 1 of 3 on b was asked to stop", 1, 0)


def test_the_process_whose_host_works_is_stuck_and_not_those_that_wait():
    judge = judge_of(3)
    say(judge, 0, 2.0, "waiting", 2)
    say(judge, 2, 2.0, "waiting", 2)
    now, verdict = decide(judge, range(2, 100))
    assert now == 62 and verdict[:3] == (PEER_STUCK, "process 1 of 3 on b is stuck in step 2", 1)


def test_the_process_that_does_not_run_is_stuck():
    judge = judge_of(3)
    for now in range(2, 61):
        for number in (0, 1):
            say(judge, number, now, "waiting", 2)
        assert judge.decide(now) is None
    expected = "process 2 of 3 on c is stuck in step 2, and does not run"
    assert judge.decide(61.5)[:2] == (PEER_STUCK, expected)


def test_a_step_in_which_all_wait_is_said_to_be_one():
    judge = judge_of(3)
    for number in range(3):
        say(judge, number, 2.0, "waiting", 2)
    now, verdict = decide(judge, range(2, 100))
    assert now == 62 and verdict.text == (
        "process 0 of 3 on a is stuck in step 2, in which all processes wait for their devices"
    )


@pytest.mark.parametrize("phase", ["compiling", "evaluating", "saving", "preparing", "starting"])
def test_nobody_is_stuck_while_anyone_does_something_else(phase):
    judge = judge_of(3)
    say(judge, 1, 2.0, phase, 2)
    assert decide(judge, range(2, 1000)) is None
    say(judge, 1, 1000.0, "training", 3)
    now, _ = decide(judge, range(1000, 2000))
    assert now == 1060


def evaluating(batch_seconds):
    """Returns a judge whose processes begin batch 4 of an evaluation at 1000.

    The first batch took 500 seconds.
    """
    judge = judge_of(3)
    for number in range(3):
        say(judge, number, 400.0, "evaluating", 2, 1)
    assert decide(judge, range(400, 900)) is None
    for batch in (2, 3, 4):
        for number in range(3):
            now = 1000 + (batch - 4) * batch_seconds
            say(judge, number, now, "scoring", 2, batch)
        assert judge.decide(now) is None
    return judge


@pytest.mark.parametrize(("batch_seconds", "limit"), [(1, 60), (20, 200)])
def test_a_batch_of_an_evaluation_may_take_ten_times_the_median(batch_seconds, limit):
    judge = evaluating(batch_seconds)
    for number in (0, 2):
        say(judge, number, 1000.0, "waiting", 2, 4)
    now, verdict = decide(judge, range(1000, 2000))
    text = "process 1 of 3 on b is stuck in batch 4 of an evaluation"
    assert (now, verdict[:2]) == (1001 + limit, (PEER_STUCK, text))


def test_of_a_batch_and_the_step_after_it_the_longer_limit_counts():
    judge = evaluating(20)
    for number in (0, 2):
        say(judge, number, 1000.0, "evaluating", 2)
        say(judge, number, 1000.0, "training", 3)
        say(judge, number, 1000.0, "waiting", 3)
    now, verdict = decide(judge, range(1000, 2000))
    assert now == 1201 and verdict.text.endswith("is stuck in batch 4 of an evaluation")


def test_after_its_last_batch_an_evaluation_may_take_any_time():
    judge = evaluating(1)
    say(judge, 1, 1000.0, "evaluating", 2)
    assert decide(judge, range(1000, 2000)) is None


def test_a_step_may_take_ten_times_the_median():
    judge = judge_of(3)
    for step in range(3, 9):
        for number in range(3):
            say(judge, number, 20.0 * step, "training", step)
        assert judge.decide(20.0 * step) is None
    now, _ = decide(judge, range(160, 1000))
    assert now == 361  # step 8 began at 160, and the median is 20


def test_a_first_step_that_takes_long_gives_the_second_one_time():
    judge = Judge(2, 60.0)
    for number in range(2):
        judge.meet(number, "a", 0.0)
        say(judge, number, 0.0, "compiling", 1)
    for number in range(2):
        say(judge, number, 100.0, "training", 2)
    assert judge.limit(100.0) == 1000
    for number in range(2):
        say(judge, number, 110.0, "evaluating", 2, 1)
    for number in range(2):
        say(judge, number, 310.0, "scoring", 2, 2)
    assert judge.limit(310.0) == 2000


def test_a_pause_of_the_hub_counts_against_nobody():
    judge = judge_of(3)
    for number in range(3):
        say(judge, number, 500.0, "training", 2)
    assert judge.decide(500.0) is None


def test_a_wrong_limit_is_refused_by_name():
    assert watch._stuck_seconds(None) == 60 and watch._stuck_seconds("2.5") == 2.5
    for text in ("", "x", "0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=r"MOE_STUCK_SECONDS=.*: set it to a number"):
            watch._stuck_seconds(text)


def test_a_stranger_is_not_heard():
    ended = []
    watching = Hub("127.0.0.1", 2, 60.0, ended.append)
    host, port, *_ = json.loads(watching.address)
    for text in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\n",
        b"7\n",
        b"[" * 60_000 + b"\n",
        b'{"process_id": 1, "host": "x"}\n',
        b'{"process_id": 1, "host": "x", "token": "guess"}\n',
        b'{"process_id": 1, "host": "x", "token": 7}\n',
    ):
        with socket.create_connection((host, port), 5) as stranger:
            stranger.sendall(text)
            assert stranger.recv(1) == b""  # the hub has hung up
    assert not ended


def connect(number, host, port, token):
    """Returns a connection on which a process has said its number to the hub."""
    connection = socket.create_connection((host, port), 60)
    message = {"process_id": number, "host": "x", "token": token}
    connection.sendall(json.dumps(message).encode() + b"\n")
    return connection


def test_a_process_that_connects_after_the_verdict_is_told_too(monkeypatch):
    monkeypatch.setattr(hub, "_FAREWELL", 100.0)
    verdicts, ended = [], threading.Event()
    watching = Hub("127.0.0.1", 3, 60.0, lambda verdict: ended.set())
    host, port, token, _ = json.loads(watching.address)

    def decide(now, decide=watching._judge.decide):
        if verdict := decide(now):
            verdicts.append(verdict)
        return verdict

    watching._judge.decide = decide
    connect(1, host, port, token).close()
    wait_until(lambda: verdicts)
    with connect(2, host, port, token) as late, late.makefile() as file:
        assert json.loads(file.readline()) == {"verdict": list(verdicts[0])}
    assert ended.wait(60)
    watching._server.close()


@pytest.mark.parametrize(("dead", "speaker"), [(0, 2), (1, 0)])
def test_the_last_lines_are_shown_by_a_process_that_is_there(dead, speaker, monkeypatch):
    """One of process 0 and 1 dies, 2 is connected, and the other one has not connected yet."""
    monkeypatch.setattr(hub, "_FAREWELL", 0.0)
    verdicts = queue.Queue()
    watching = Hub("127.0.0.1", 3, 60.0, verdicts.put)
    host, port, token, _ = json.loads(watching.address)
    with connect(2, host, port, token):
        wait_until(lambda: 2 in watching._judge._peers)
        connect(dead, host, port, token).close()
        verdict = verdicts.get(timeout=60)
    assert (verdict.process_id, verdict.speaker) == (dead, speaker)
    for open_socket in (watching._server, *(x.socket for x in watching._connections.values())):
        open_socket.close()


def test_process_0_hears_of_a_death_before_it_watches_itself(monkeypatch):
    told, decided = queue.Queue(), threading.Event()
    monkeypatch.setattr(watch, "_watch", None)
    monkeypatch.setattr(watch, "TICK", 0.05)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(watch.atexit, "register", lambda *_: None)
    monkeypatch.setattr(watch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(watch._Watch, "end", lambda _, verdict: told.put(verdict.text))

    class Seen(Hub):
        def __init__(self, host, num_processes, stuck_seconds, end):
            super().__init__(host, num_processes, stuck_seconds, lambda x: (decided.set(), end(x)))

    monkeypatch.setattr(watch, "Hub", Seen)

    def from_first(name, make):
        address = make()
        connect(1, *json.loads(address)[:3]).close()
        assert decided.wait(60)
        time.sleep(0.05)  # in which the hub would have given up
        return address

    watch.start(0, 2, "127.0.0.1", from_first)
    assert told.get(timeout=60) == "process 1 of 2 on x died"
    ours = watch._watch
    ours.exit_code = 0  # ends its thread, which still waits for messages on the connection
    for thread in threading.enumerate():
        if thread.name == "watch":
            thread.join()
    ours.connection.socket.close()
    ours.hub._server.close()


def test_without_a_watch_nothing_happens():
    watch.report("training", 1)
    watch.send_times(1, 1.0, 1.0)
    assert watch.take_times() == []
    watch.stop_in_warm_up()
    watch.leave(1)


PROGRAM = textwrap.dedent("""
    import pathlib, sys, time
    from moe.parallel import hub, watch

    def from_first(name, make):
        path = pathlib.Path(sys.argv[3], name)
        if sys.argv[1] == "0":
            path.with_suffix(".new").write_text(make())
            path.with_suffix(".new").rename(path)
        while not path.exists():
            time.sleep(0.01)
        return path.read_text()

    def note_limits(connection):
        messages = receive(connection)
        limits.extend(message["limit"] for message in messages if message.get("limit"))
        return messages

    receive, limits = hub.Connection.receive, []
    hub.Connection.receive = note_limits
    watch.start(int(sys.argv[1]), int(sys.argv[2]), "127.0.0.1", from_first)
    watch.show_last_lines(lambda process_id: f"the last words of {process_id}")
    phase, *rest = sys.argv[4].split(" ")
    watch.report("compiling", 1)
    watch.report(phase, 2)
    print("ready", flush=True)
    if rest:
        exec(" ".join(rest))
    time.sleep(600)
""")


class Job:
    """Starts processes that watch each other, and do what they are told."""

    def __init__(self, directory, *programs, seconds="60"):
        environment = os.environ | {"MOE_STUCK_SECONDS": seconds}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(i), str(len(programs)), str(directory), text],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, text in enumerate(programs)
        ]
        for process in self.processes:
            assert process.stdout.readline() == "ready\n", process.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.communicate()

    def end(self, *numbers):
        """Returns the exit codes and the last texts of some processes, once they have ended."""
        ended = [self.processes[number] for number in numbers]
        texts = [process.communicate(timeout=200)[1] for process in ended]
        return [process.returncode for process in ended], texts


@pytest.mark.parametrize(
    "victim",
    [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)],
)
def test_a_killed_process_is_named_at_once(tmp_path, victim):
    with Job(tmp_path, "saving", "training", "compiling") as job:
        begin = time.monotonic()
        job.processes[victim].kill()
        left = [number for number in range(3) if number != victim]
        codes, texts = job.end(*left)
        assert time.monotonic() - begin < 15 and codes == [PEER_DIED] * 2
    line = f"process {victim} of 3 on {HOST} died: this process ends too, with exit code 76\n"
    assert [text.lstrip("\n") for text in texts] == [f"{line}the last words of {victim}\n", line]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_and_the_stacks_are_shown(tmp_path, victim):
    step = "for n in range(3, 10**9): watch.report('{0}', n); time.sleep(0.01); "
    step += "limits and print(limits.pop(), flush=True)"
    programs = [f"{phase} {step.format(phase)}" for phase in ("training", "waiting", "waiting")]
    with Job(tmp_path, *programs, seconds="5") as job:
        # The hub has heard all of them, and told them the limit.
        assert [process.stdout.readline() for process in job.processes] == ["5.0\n"] * 3
        job.processes[victim].send_signal(signal.SIGSTOP)
        left = [number for number in range(3) if number != victim]
        codes, texts = job.end(*left)
        assert codes == [PEER_STUCK] * 2
        job.processes[victim].send_signal(signal.SIGCONT)
        assert job.end(victim)[0][0] in (PEER_STUCK, PEER_DIED)  # it runs on, and leaves too
    name = rf"process {victim} of 3 on {HOST} is stuck in step \d+, and does not run"
    assert all(re.search(name, text) and "Current thread" in text for text in texts)


@pytest.mark.slow
def test_an_error_has_its_traceback_and_its_exit_code(tmp_path):
    with Job(tmp_path, "training", "training raise ValueError('seven')", "training") as job:
        codes, texts = job.end(0, 1, 2)
    assert codes == [PEER_DIED, 1, PEER_DIED]
    assert "ValueError: seven" in texts[1]
    for text in (texts[0], texts[2]):
        assert text.lstrip().startswith(f"process 1 of 3 on {HOST} ended with exit code 1: ")
    assert texts[0].endswith("the last words of 1\n")


def test_all_leave_together_and_process_0_last(tmp_path):
    early = "training watch.leave(0)"
    wait = "while not pathlib.Path(sys.argv[3], 'open').exists(): time.sleep(0.01)"
    with Job(tmp_path, early, f"saving {wait}\nwatch.leave(0)", early) as job:
        assert job.end(2) == ([0], [""])
        assert [process.poll() for process in job.processes[:2]] == [None, None]
        (tmp_path / "open").touch()
        assert job.end(0, 1) == ([0, 0], ["", ""])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_in_warm_up_ends_all_at_once(tmp_path, victim):
    programs = ["compiling", "compiling", "training"]
    wait = "while not pathlib.Path(sys.argv[3], 'open').exists(): time.sleep(0.01)"
    programs[victim] += f" {wait}\nwatch.stop_in_warm_up()"
    with Job(tmp_path, *programs) as job:
        (tmp_path / "open").touch()
        codes, texts = job.end(0, 1, 2)
    assert codes == [INTERRUPTED] * 3
    name = f"process {victim} of 3 on {HOST} was asked to stop before its first step was done"
    assert all(name in text for number, text in enumerate(texts) if number != victim)


@pytest.mark.slow
def test_the_times_of_all_processes_come_together(tmp_path):
    send = "training watch.send_times(5, 1.0, 0.25 + {})"
    gather = "; hub._TIMES_SECONDS = 100.0; print(watch.take_times(5), flush=True); watch.leave(0)"
    with Job(tmp_path, send.format(0) + gather, send.format(1) + "; watch.leave(0)") as job:
        assert job.processes[0].communicate(timeout=200)[0] == (
            "[HostTimes(step=5, step_seconds=[1.0, 1.0], host_seconds=[0.25, 1.25])]\n"
        )
    assert hub.TICK == 1
