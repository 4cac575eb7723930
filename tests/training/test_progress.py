"""What a person in front of a run sees, and that a run does not need to be seen."""

import io
import logging
import os
import re
import subprocess
import sys

import pytest

from moe.training.progress import Bar, Stream


@pytest.fixture
def shown(capsys):
    """Returns the texts that have stood in the line so far, in order."""
    written = []

    def read():
        written.append(capsys.readouterr().err)
        return [text.strip() for text in re.split(r"[\r\n]", "".join(written)) if text.strip()]

    return read


def test_the_bar_says_what_is_going_on_before_the_first_step_and_between_steps(shown):
    with Bar(20) as bar:
        bar.show("restoring step 5")
        bar.show("resuming from step 5: compiling the training step")
        assert shown() == ["restoring step 5", "resuming from step 5: compiling the training step"]
        bar.step(6)
        bar.show_metrics({"loss": "2.500"})
        bar.show("evaluating step 6")
        bar.step(7)
        bar.show("stopping: saving step 7")
    assert ":" not in shown()[-1].split("%")[0]  # nothing is going on at the end
    assert shown()[2].startswith("30%|") and " 6/20 " in shown()[2]
    assert [
        text.split(":  ")[0] for text in shown() if "%" in text and ": " in text.split("%")[0]
    ] == [
        "evaluating step 6",
        "stopping: saving step 7",
    ]
    assert shown()[-1].endswith("loss=2.500]") and " 7/20 " in shown()[-1]


def test_the_time_left_waits_for_the_second_step_and_leaves_out_the_first(shown, monkeypatch):
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with Bar(12) as bar:
        now += 100  # as if the program were compiled
        bar.step(1)
        assert "<?, ?step/s" in shown()[-1]
        now += 2
        bar.step(2)
    assert "00:02<00:20," in shown()[-1]  # 10 steps of 2 seconds


def test_a_bar_that_is_not_shown_writes_nothing(shown):
    with Bar(3, shown=False) as bar:
        bar.show("initialising the parameters")
        bar.step(1)
        bar.step(2)
        bar.show_metrics({"loss": "2.500"})
    assert shown() == []


def test_nothing_is_lost_where_nobody_reads(monkeypatch):
    """`2>&1 | head -1` leaves a pipe that cannot be written to, and `2>&-` no stream at all."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in range(2):
            with Bar(3) as bar:
                bar.show("compiling")
                bar.step(1)
        Stream(stream).write("more\n")
    monkeypatch.setattr(sys, "stderr", None)
    with Bar(3) as bar:
        bar.step(1)
    assert Stream(None).write("text") == 4


def test_a_full_disk_under_stderr_is_survived():
    with open("/dev/full", "w", buffering=1) as stream:
        for _ in range(3):
            Stream(stream).write("a line\n")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # or closing the stream would fail


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "koi8-r", "utf-8"])
def test_what_an_encoding_lacks_is_written_as_its_escape(encoding):
    """LC_ALL=C gives a terminal ASCII, and a model may sample any character."""
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding, write_through=True) as stream:
        Stream(stream).write("é \u2603 \ud800\n")
        text = content.getvalue().decode(encoding)
    written = {"latin-1": r"é \u2603 \ud800", "utf-8": "é \u2603 \\ud800"}
    assert text == written.get(encoding, r"\xe9 \u2603 \ud800") + "\n"


def test_python_exits_with_its_own_code_after_a_reader_has_left():
    """What is left in a buffer is written at exit, where a failure would be exit code 120."""
    program = """
import sys
from moe.training.progress import Stream
sys.stdout = Stream(sys.stdout)
for _ in range(1000):
    print("a line" * 100)  # more than a pipe holds
sys.exit(7)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 7, process.stderr.read()
        assert process.stderr.read() == b""


def test_a_log_message_has_a_line_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])
    with Bar(20) as bar:
        bar.show("restoring step 5")
        logging.warning("the schedule is another")
        bar.show("compiling")
    assert re.search(
        r"restoring step 5\r +\rthe schedule is another\n\r?compiling", capsys.readouterr().err
    )
    logging.warning("later")
    assert capsys.readouterr().err == "later\n"
