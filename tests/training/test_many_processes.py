"""Runs over several real processes: deaths, hangs and signals at any time, and how they go on."""

import dataclasses
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.exit_codes import INTERRUPTED, PEER_DIED, PEER_STUCK
from moe.workdir.identity import checkpoint_steps
from moe.workdir.tracking import read_metrics
from tests.jobs import free_port, wait_for_step, wait_until
from tests.tiny import TINY_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
CONFIG = RunConfig(
    model=TINY_MODEL,
    data=DataConfig(sequence_length=64),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_fraction=0.01),
    mesh=MeshConfig(data=2, fsdp=2),
    train=TrainConfig(
        steps=6, batch_size=8, log_every=1, eval_every=100, eval_batches=1, checkpoint_every=100
    ),
    tracking=TrackingConfig(tensorboard=False),
)
# Joins a job and trains. The last argument is Python that runs before `fit`, in all processes.
PROGRAM = textwrap.dedent("""
    import json, os, sys, time
    from pathlib import Path
    from moe.parallel import distributed, watch

    address, count, number, config, workdir, before = sys.argv[1:]
    count, number = int(count), int(number)
    if count > 1:
        distributed.join(distributed.Cluster("a test", address, count, number))
    from moe.config import RunConfig
    from moe.training import evaluation, log, trainer
    from moe.training.trainer import Interrupted, fit
    from moe.workdir import checkpoint

    def wait(name, seconds=100):
        os.write(1, f"{name}\\n".encode())
        time.sleep(seconds)

    def gate(name):
        os.write(1, f"{name}\\n".encode())
        while not Path(workdir).with_name("open").exists():
            time.sleep(0.01)

    def wrap(module, name, first):
        function = getattr(module, name)
        setattr(module, name, lambda *args, **kwargs: (first(), function(*args, **kwargs))[1])

    options = {}
    exec(before)
    code = 0
    try:
        fit(RunConfig.from_config_dict(json.loads(config)), Path(workdir), **options)
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        code = 75
    watch.leave(code)
""")


class Job:
    """Starts a run over processes that have four devices together, and ends them with the test."""

    data_directory = ""

    def __init__(
        self, workdir, *, count=2, before="", stuck_seconds="60", mesh=None, data=None, **train
    ):
        self.config = dataclasses.replace(
            CONFIG,
            mesh=mesh or CONFIG.mesh,
            data=dataclasses.replace(data or CONFIG.data, directory=Job.data_directory),
            train=dataclasses.replace(CONFIG.train, **train),
        )
        self.workdir, self.count = workdir, count
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(4 // count),
            "MOE_STUCK_SECONDS": stuck_seconds,
        }
        address, config = f"127.0.0.1:{free_port()}", json.dumps(self.config.to_dict())
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", PROGRAM, address, str(count), str(number)),
                    *(config, str(workdir), textwrap.dedent(before)),
                ],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_step(self, step):
        wait_for_step(self.workdir, step, *self.processes)

    def wait_for(self, name, number):
        """Waits until a process has come to the place of this name."""
        for line in self.processes[number].stdout:  # Gloo prints there too
            if line == f"{name}\n":
                return
        raise AssertionError(self.processes[number].communicate())

    def open_gate(self):
        """Lets the processes go on that wait in `gate`."""
        self.workdir.with_name("open").touch()

    def end(self, *numbers, timeout=600):
        """Returns the exit codes and the standard error of some processes, or of all."""
        ended = [self.processes[number] for number in numbers or range(self.count)]
        texts = [process.communicate(timeout=timeout)[1] for process in ended]
        return [process.returncode for process in ended], texts


@pytest.fixture(autouse=True, scope="module")
def shared_rows(data_directory):
    Job.data_directory = data_directory


def arrays(workdir, step):
    """Returns the dtype, shape and checksum of each array of a checkpoint."""
    return json.loads((workdir / "checkpoints" / str(step) / "about.json").read_text())["arrays"]


def losses(workdir):
    return {
        line["step"]: line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line
    }


# Where a process waits while it is killed, in its first step and in its first save.
PLACES = {
    "training": "",
    "compiling": """
        make_program = trainer.make_program
        def make(*args, **kwargs):
            program = make_program(*args, **kwargs)
            def train_step(*args):
                wait("compiling")
            import dataclasses
            return dataclasses.replace(program, train_step=train_step)
        if number == VICTIM:
            trainer.make_program = make
    """,
    "saving": """
        if number == VICTIM:
            wrap(checkpoint, "save", lambda: wait("saving"))
    """,
}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_after_a_kill_the_other_is_gone_within_15_seconds(tmp_path, place, victim):
    before = PLACES[place].replace("VICTIM", str(victim))
    with Job(tmp_path / "run", before=before, steps=100_000, checkpoint_every=3) as job:
        if before:
            job.wait_for(place, victim)
            time.sleep(1)
        else:
            job.wait_for_step(5)
        job.processes[victim].kill()
        begin = time.monotonic()
        codes, texts = job.end(1 - victim)
        assert time.monotonic() - begin < 15
    assert codes == [PEER_DIED], texts
    line = f"process {victim} of 2 on {HOST} died: this process ends too, with exit code 76"
    assert line in texts[0].splitlines()


SLOW_STEPS = 'wrap(log.Log, "add", lambda: time.sleep(0.3))'


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_stopped_is_stuck(tmp_path, victim):
    # A process that is stopped while it evaluates or saves is not stuck, so it only trains.
    train = {"steps": 100_000, "eval_every": 100_000, "checkpoint_every": 100_000}
    with Job(tmp_path / "run", before=SLOW_STEPS, stuck_seconds="6", **train) as job:
        job.wait_for_step(20)
        job.processes[victim].send_signal(signal.SIGSTOP)
        codes, texts = job.end(1 - victim)
    assert codes == [PEER_STUCK], texts
    expected = rf"process {victim} of 2 on {HOST} is stuck in step \d+, and does not run: this "
    assert re.match(expected, texts[0].splitlines()[-1])
    assert "in _train" in texts[0]  # the stack


def test_a_process_that_hangs_is_stuck_and_shows_its_stack(tmp_path):
    before = """
        def hang_in_step_20():
            time.sleep(0.3)
            if number == 1 and watch._watch.place.step == 20:
                time.sleep(1000)
        wrap(log.Log, "next_batch", hang_in_step_20)
    """
    # The median of the steps is known by then: the first one took as long as the compiler.
    with Job(tmp_path / "run", before=before, steps=100, stuck_seconds="6") as job:
        codes, texts = job.end()
    assert codes == [PEER_STUCK] * 2, texts
    assert all(f"process 1 of 2 on {HOST} is stuck in step 20" in text for text in texts)
    assert "in hang_in_step_20" in texts[1] and "hang_in_step_20" not in texts[0]


def test_a_process_that_hangs_in_an_evaluation_is_stuck(tmp_path):
    before = """
        def hang_in_batch_20():
            time.sleep(0.3)
            if number == 1 and watch._watch.place.batch == 20:
                time.sleep(1000)
        wrap(evaluation, "global_batch", hang_in_batch_20)
    """
    train = {"steps": 4, "eval_every": 2, "eval_batches": 30}
    with Job(tmp_path / "run", before=before, stuck_seconds="6", **train) as job:
        codes, texts = job.end()
    assert codes == [PEER_STUCK] * 2, texts
    line = f"process 1 of 2 on {HOST} is stuck in batch 20 of an evaluation"
    assert all(line in text for text in texts)
    assert "in hang_in_batch_20" in texts[1] and "hang_in_batch_20" not in texts[0]


def test_nobody_is_stuck_while_one_prepares_compiles_or_saves(tmp_path):
    """Each takes longer than a step may take, and so does the first batch of an evaluation.

    For the hub the time runs ten times as fast meanwhile. The processes cannot wait for each other
    for long: Gloo gives up after 30 seconds.
    """
    before = """
        from moe.parallel import hub
        is_slow = Path(workdir).with_name("slow")
        class Clock:
            sleep, now, last = time.sleep, time.monotonic(), time.monotonic()
            def monotonic():
                last, Clock.last = Clock.last, time.monotonic()
                Clock.now += (10 if is_slow.exists() else 1) * (Clock.last - last)
                return Clock.now
        hub.time = Clock
        wrap(log.Log, "add", lambda: time.sleep(0.3))
        if number == 1:
            slow = lambda: (is_slow.touch(), time.sleep(2), is_slow.unlink())
            wrap(trainer, "first_state", slow)
            wrap(checkpoint, "save", slow)
            wrap(evaluation, "router_summary", slow)
            for module, name in ((log.Log, "next_batch"), (evaluation, "global_batch")):
                wrap(module, name, lambda first=[slow]: first and first.pop()())
    """
    # After 20 steps the median of the steps is known: the first one took as long as the compiler.
    train = {"steps": 20, "eval_every": 20, "eval_batches": 3}
    # Not less, since the steps of a busy machine may take seconds.
    with Job(tmp_path / "run", before=before, stuck_seconds="10", **train) as job:
        codes, texts = job.end()
    assert codes == [0, 0], texts


def test_an_error_of_one_process_has_its_traceback_and_ends_the_other(tmp_path):
    before = """
        def fail_in_step_5():
            if number == 1 and watch._watch.place.step == 5:
                raise ValueError("seven")
        wrap(log.Log, "next_batch", fail_in_step_5)
    """
    with Job(tmp_path / "run", before=before, steps=100_000) as job:
        codes, texts = job.end()
    assert codes == [PEER_DIED, 1], texts
    assert "ValueError: seven" in texts[1]
    assert f"process 1 of 2 on {HOST} ended with exit code 1: this" in texts[0].splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the directory of a run over two processes that nothing has interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with Job(workdir, steps=12, eval_every=4) as job:
        codes, texts = job.end()
    assert codes == [0, 0], texts
    return workdir


@pytest.mark.parametrize(("number", "victim"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_to_one_process_saves_the_same_step_of_all(tmp_path, whole, number, victim):
    workdir = tmp_path / "run"
    before = """
        added = []
        def wait_in_step_7():
            added.append(1)
            if len(added) == 7:
                gate("step 7")
        wrap(log.Log, "add", wait_in_step_7)
    """
    with Job(workdir, before=before, steps=12, eval_every=4) as job:
        job.wait_for("step 7", victim)
        job.processes[victim].send_signal(number)
        job.open_gate()
        codes, texts = job.end()
    assert codes == [INTERRUPTED] * 2, texts
    (step,) = checkpoint_steps(workdir / "checkpoints")
    assert 7 <= step < 12
    assert all(f"stopped at step {step} and saved" in text for text in texts)
    assert max(losses(workdir)) == step
    with Job(workdir, steps=12, eval_every=4) as job:
        codes, texts = job.end()
    assert codes == [0, 0], texts
    assert losses(workdir) == losses(whole)
    assert arrays(workdir, 12) == arrays(whole, 12)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_in_an_evaluation_ends_it_on_all(tmp_path, whole, victim):
    workdir = tmp_path / "run"
    before = """
        batches = []
        def wait_in_batch_3():
            batches.append(1)
            Path(workdir).with_name(f"batches-{number}").write_text(str(len(batches)))
            if len(batches) == 3:
                gate("batch 3")
        wrap(evaluation, "global_batch", wait_in_batch_3)
    """
    train = {"steps": 12, "eval_every": 4, "eval_batches": 30}
    with Job(workdir, before=before, **train) as job:
        job.wait_for("batch 3", victim)
        job.processes[victim].send_signal(signal.SIGTERM)
        job.open_gate()
        codes, texts = job.end()
    assert codes == [INTERRUPTED] * 2, texts
    # A vote is read one batch later.
    assert all(3 <= int((tmp_path / f"batches-{n}").read_text()) <= 5 for n in range(2))
    assert checkpoint_steps(workdir / "checkpoints") == [4]
    assert not any("validation/loss" in line for line in read_metrics(workdir))
    with Job(workdir, **train) as job:
        codes, texts = job.end()
    assert codes == [0, 0], texts
    assert [line["step"] for line in read_metrics(workdir) if "validation/loss" in line] == [
        4,
        8,
        12,
    ]
    assert arrays(workdir, 12) == arrays(whole, 12)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("place", ["preparing", "compiling"])
def test_a_signal_in_warm_up_ends_all_at_once(tmp_path, place, victim):
    before = {
        "preparing": 'wrap(trainer, "first_state", lambda: wait("preparing"))',
        "compiling": PLACES["compiling"].replace("number == VICTIM", "True"),
    }[place]
    with Job(tmp_path / "run", before=before) as job:
        for number in range(2):
            job.wait_for(place, number)
        job.processes[victim].send_signal(signal.SIGTERM)
        begin = time.monotonic()
        codes, texts = job.end()
        assert time.monotonic() - begin < 50  # they would wait for 100
    assert codes == [INTERRUPTED] * 2, texts
    name = f"process {victim} of 2 on {HOST} was asked to stop before its first step was done"
    assert name in texts[1 - victim]
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == []


def test_a_run_is_saved_before_slurm_ends_its_job(tmp_path):
    """Process 1 alone believes that the job ends soon, as with clocks that differ."""
    before = """
        from moe.training import vote
        added = []
        class Clock:
            def time():
                return 1095.0 if len(added) >= 5 else 1000.0
        wrap(log.Log, "add", lambda: added.append(1))
        if number == 1:
            vote.time = Clock
            os.environ |= {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": "1100"}
    """
    with Job(tmp_path / "run", before=before, steps=1000, checkpoint_every=1000) as job:
        codes, texts = job.end()
    assert codes == [INTERRUPTED] * 2, texts
    (step,) = checkpoint_steps(tmp_path / "run" / "checkpoints")
    assert step >= 5 and all(f"stopped at step {step} and saved" in text for text in texts)
    assert "SLURM's time limit is near" in texts[1]


# Writes the number and the content of each row that a process trains on.
LOG_ROWS = """
    import zlib
    from moe.parallel.mesh import host_rows
    steps, global_batch = [], trainer.global_batch
    def logged(fields, mesh, size, dims):
        rows = {str(n): zlib.crc32(b"".join(x[i].tobytes() for x in fields.values()))
                for i, n in enumerate(host_rows(mesh, size))}
        with open(Path(workdir).parent / f"rows-{number}.jsonl", "a") as file:
            file.write(json.dumps(rows) + "\\n")
        return global_batch(fields, mesh, size, dims)
    trainer.global_batch = logged
    begun = []
    wrap(log.Log, "add", lambda: begun.append(1))
    trainer.asks_to_stop = lambda *_: lambda: len(begun) >= STEPS
"""


def rows_of(directory):
    """Returns the rows of each step, over all processes, and removes what they wrote."""
    steps = []
    for path in sorted(directory.glob("rows-*.jsonl")):
        for step, line in enumerate(path.read_text().splitlines()):
            steps[step:] = steps[step:] or [{}]
            steps[step] |= json.loads(line)
        path.unlink()
    return steps


def mixed(packing):
    """A mixture of two stages in which a small source is read more than once."""
    sources = [
        SourceConfig("small", "stdlib", train_split="train[:1%]", weights=(3.0, 1.0)),
        SourceConfig("rest", "stdlib", train_split="train[1%:3%]", weights=(1.0, 1.0)),
    ]
    return DataConfig(sequence_length=512, packing=packing, mixture=tuple(sources), stages=(0, 60))


UP_AND_DOWN = [(1, MeshConfig(data=2, fsdp=2)), (2, None), (4, None), (1, None)]


@pytest.mark.parametrize(
    ("layouts", "data"),
    [
        (UP_AND_DOWN, None),
        (
            [(2, MeshConfig(data=4)), (2, MeshConfig(fsdp=4)), (2, MeshConfig(fsdp=2, tensor=2))],
            None,
        ),
        (UP_AND_DOWN, mixed("concat")),
        (UP_AND_DOWN, mixed("best_fit")),
        (UP_AND_DOWN, mixed("pad")),
    ],
    ids=["processes", "meshes", "mixed", "mixed_best_fit", "mixed_pad"],
)
def test_other_processes_or_another_mesh_go_on_with_the_same_rows(tmp_path, layouts, data):
    """A restored state is compared with the checksums of the saved one, bit for bit, by `fit`."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    found, mesh = [], None
    parts.mkdir()
    for count, new_mesh in layouts:
        mesh = new_mesh or mesh
        before = LOG_ROWS.replace("STEPS", "3")
        with Job(parts / "run", count=count, before=before, mesh=mesh, data=data, steps=12) as job:
            codes, texts = job.end()
        assert set(codes) <= {0, INTERRUPTED}, texts
        found += rows_of(parts)
    whole.mkdir()
    before = LOG_ROWS.replace("STEPS", str(len(found) + 1))
    with Job(whole / "run", count=1, before=before, mesh=layouts[0][1], data=data, steps=12) as job:
        codes, texts = job.end()
    assert set(codes) <= {0, INTERRUPTED}, texts
    assert found == rows_of(whole)[: len(found)]
    assert all(len(rows) == 8 for rows in found)
    expected = losses(whole / "run")
    assert losses(parts / "run") == pytest.approx(
        {step: expected[step] for step in range(1, len(found) + 1)}, rel=1e-5
    )


def test_a_killed_mixture_goes_on_with_the_same_rows_on_other_processes(tmp_path):
    """Every job is killed while a checkpoint may be half written, and the next has other hosts.

    Two of the jobs are killed once a checkpoint of their own is whole, so that the last one does
    not begin with the first step.
    """
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    parts.mkdir()
    options = {"data": mixed("best_fit"), "mesh": CONFIG.mesh, "steps": 12, "checkpoint_every": 2}
    before = LOG_ROWS.replace("STEPS", "1000")
    third_step = '    wrap(log.Log, "add", lambda: len(begun) == 3 and wait("third step"))\n'
    found = []
    last_step = lambda: max(checkpoint_steps(parts / "run" / "checkpoints"), default=0)
    for count, is_whole in ((1, True), (2, False), (4, True), (1, False)):
        first = last_step()
        with Job(parts / "run", count=count, before=before + third_step, **options) as job:
            for number in range(count):
                job.wait_for("third step", number)
            wait_until(lambda: not is_whole or last_step() > first, *job.processes)  # noqa: B023
        found.append((first, rows_of(parts)))
    first = last_step()
    with Job(parts / "run", count=2, before=before, **options) as job:
        codes, texts = job.end()
    assert codes == [0, 0], texts
    found.append((first, rows_of(parts)))
    whole.mkdir()
    with Job(whole / "run", count=1, before=before, **options) as job:
        codes, texts = job.end()
    assert codes == [0], texts
    expected = rows_of(whole)
    assert len(expected) == 12 and found[-1][0] + len(found[-1][1]) == 12 and found[-1][0] >= 4
    for first, rows in found:
        assert len(rows) >= 3
        assert rows == expected[first : first + len(rows)]
    assert losses(parts / "run") == pytest.approx(losses(whole / "run"), rel=1e-5)


def test_the_times_of_all_hosts_show_the_slow_one(tmp_path):
    before = """
        from moe.parallel import hub
        hub._TIMES_SECONDS = 100.0
        if number == 1:
            wrap(log.Log, "next_batch", lambda: time.sleep(3))
    """
    with Job(tmp_path / "run", before=before, steps=6, log_every=2) as job:
        codes, texts = job.end()
    assert codes == [0, 0], texts
    lines = (tmp_path / "run" / "hosts.jsonl").read_text().splitlines()
    times = [json.loads(line) for line in lines]
    assert [line["step"] for line in times] == [2, 4, 6]
    for line in times:
        # Of two steps, one may have got its batch before the step before them was done.
        assert min(line["step_seconds"]) >= 1.5
        assert line["host_seconds"][1] >= max(1.5, 2 * line["host_seconds"][0])


def test_each_process_traces_its_steps(tmp_path):
    before = 'options["profile_steps"] = range(3, 5)'
    with Job(tmp_path / "run", before=before) as job:
        codes, texts = job.end()
    assert codes == [0, 0], texts
    paths = sorted((tmp_path / "run" / "profile").iterdir())
    assert [path.name for path in paths] == [
        f"steps-3-4-process-{number:05d}.json.gz" for number in range(2)
    ]
    for path in paths:
        with gzip.open(path) as file:
            assert json.load(file)["traceEvents"]
