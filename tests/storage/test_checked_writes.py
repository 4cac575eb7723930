"""Every write of a run is checked: an owner that has lost its run writes nothing more."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from moe.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.parallel.hub import HostTimes
from moe.storage import owner
from moe.storage.owner import LostRun, own_run
from moe.training.profile import open_profile
from moe.workdir.checkpoint import Checkpoints
from moe.workdir.identity import write_about, write_config
from moe.workdir.origin import Origin, write_origin
from moe.workdir.tensorboard import TensorBoard
from moe.workdir.tracking import MetricWriter, copy_lines, write_environment

Check = Callable[[], None]
CONFIG = RunConfig()
ROOT = Path(__file__).parents[2]


class Writers:
    """Holds what is open in a run directory, and calls its writers."""

    def __init__(self, run: Path, check: Check):
        self.run, self.check = run, check
        self.source = run.with_name("source")
        self.source.mkdir()
        (self.source / "metrics.jsonl").write_text('{"step": 1}\n')
        self.checkpoints = Checkpoints(run, CONFIG, check)
        self.metrics = MetricWriter(run, TrackingConfig(tensorboard=False), 0, check)
        self.tensorboard = TensorBoard(run / "tensorboard", 0, check)

    def config(self) -> None:
        write_config(self.run, CONFIG, self.check)

    def environment(self) -> None:
        write_environment(self.run, "blockwise", check=self.check)

    def origin(self) -> None:
        write_origin(self.run, Origin(self.run, 1, False), self.check)

    def copied_lines(self) -> None:
        copy_lines(self.source, self.run, 1, self.check)

    def metric(self) -> None:
        self.metrics.write(1, {"train/loss": 1.0})

    def router(self) -> None:
        self.metrics._router.append("{}\n")

    def hosts(self) -> None:
        self.metrics.write_hosts(HostTimes(1, [1.0], [1.0]))

    def later_lines(self) -> None:
        MetricWriter(self.run, TrackingConfig(tensorboard=False), 0, self.check)

    def events(self) -> None:
        self.tensorboard.write(1, {"train/loss": 1.0})

    def last_events(self) -> None:
        self.tensorboard.close()

    def new_events(self) -> None:
        TensorBoard(self.run / "tensorboard" / "new", 0, self.check).close()

    def profile(self) -> None:
        with open_profile(self.run, range(1, 2), 0, self.check) as profile:
            profile.begin(1)
            profile.end(1, jnp.ones(1))

    def arrays(self) -> None:
        self.checkpoints.start_saving({"step": 7}, {"w": jnp.ones(2)})
        self.checkpoints.wait()

    def about(self) -> None:
        write_about(self.run / "checkpoints" / "3", {"step": 3}, self.check)

    def old_checkpoints(self) -> None:
        self.checkpoints._delete_old_ones()


WRITERS = [name for name in vars(Writers) if not name.startswith("_")]


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a directory that counts as one on NFS."""
    monkeypatch.setattr(owner, "file_system", lambda path: "nfs4")
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes]:
    """Returns what is in a run, without what the lease itself needs."""
    paths = [path for path in run.rglob("*") if "lease" not in path.parts]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_whose_run_was_taken_refuses_and_leaves_everything_as_it_was(
    mount: Path, name: str
) -> None:
    with own_run(mount) as (check, _):
        writers = Writers(mount, check)
        (mount / "checkpoints" / "3").mkdir(parents=True)  # another one is writing it
        (mount / "metrics.jsonl").write_text('{"step": 5}\n')
        before = contents(mount)
        (mount / "lease" / "2").write_text(json.dumps({"holder": "process 7 on node-1"}))
        with pytest.raises(LostRun, match="was taken over by process 7 on node-1"):
            getattr(writers, name)()
        assert contents(mount) == before
        (mount / "lease" / "2").unlink()
        getattr(writers, name)()  # it is the lease alone that kept it from writing
        # Events are held back for a while.
        assert name.endswith("events") or contents(mount) != before
        writers.checkpoints.close()
        writers.tensorboard.close()


# Trains on a directory that counts as a mount. Of each file or folder there that a thread opens for
# writing, makes, renames or deletes, it notes whether that thread has called `check` since it wrote
# another one. The arrays of a checkpoint are left out: they follow the check before they are begun,
# and about.json, which makes them a checkpoint, has a check of its own.
PROGRAM = textwrap.dedent("""
    import json, os, re, sys, threading
    from moe.config import RunConfig
    from moe.storage import owner

    run, source, option, config = sys.argv[1:]
    state, found = threading.local(), {}
    owner.file_system = lambda path: "nfs4"
    check = owner._Lease.check

    def note_check(self):
        check(self)
        state.last = None

    owner._Lease.check = note_check

    def audit(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if not (writes or changes) or isinstance(arguments[0], int):
            return
        path = os.fsdecode(arguments[0])
        if not path.startswith(f"{run}/") or re.search(r"/lease(/|$)|/\\d+/state", path):
            return
        # A file that is written whole has another name first.
        name = re.sub(r"(^|/)\\.([^/]*)\\.[^/]*\\.\\d+\\.partial$", r"\\1\\2", path[len(run) + 1:])
        name = "/".join(name.split("/")[: 2 if name.startswith("checkpoints/") else 1])
        if name == "checkpoints":  # it is made with the first folder in it
            return
        last, state.last = getattr(state, "last", "nothing"), name
        found[name] = found.get(name, True) and last in (None, name)

    sys.addaudithook(audit)
    from moe.training.trainer import fit
    config = RunConfig.from_config_dict(json.loads(config))
    options = {option: source} if option else {}
    options |= {"fork_step": 2} if option == "fork_from" else {}
    fit(config, run, profile_steps=range(3, 4), **options)
    print(json.dumps(found))
""")
FILES = ("config.json", "environment.jsonl", "metrics.jsonl", "router.jsonl", "tensorboard")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_checks_before_each_file_that_it_writes(
    tmp_path: Path, data_directory: str
) -> None:
    """Runs also start from another one and fork, so that they write all that there is."""
    config = RunConfig(
        model=ModelConfig(
            num_layers=1,
            model_dim=16,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            moe=MoEConfig(num_experts=2, experts_per_token=1, expert_dim=16),
        ),
        data=DataConfig(sequence_length=64, directory=data_directory),
        optimizer=OptimizerConfig(schedule="wsd"),
        train=TrainConfig(
            steps=4, batch_size=8, log_every=1, eval_batches=1, checkpoint_every=1, keep_every=2
        ),
    )
    found = {}
    for name, option in (("first", ""), ("second", "init_from"), ("third", "fork_from")):
        done = subprocess.run(
            [
                *(sys.executable, "-c", PROGRAM, str(tmp_path / name)),
                *(str(tmp_path / "first"), option, json.dumps(config.to_dict())),
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout.splitlines()[-1])
    steps = [f"checkpoints/{step}" for step in range(1, 5)]
    assert found["first"] == dict.fromkeys([*FILES, *steps, "profile"], True)
    assert found["second"] == found["first"] | {"origin.json": True, "checkpoints/0": True}
    assert found["third"] == dict.fromkeys([*FILES, *steps[1:], "profile", "origin.json"], True)


# Is paused while it saves step 2, after the arrays were begun.
PAUSED = textwrap.dedent("""
    import json, os, signal, sys
    from moe.config import RunConfig
    from moe.storage import owner
    from moe.storage.owner import LostRun

    run, config = sys.argv[1:]
    owner.file_system = lambda path: "nfs4"
    owner.RENEW_SECONDS, owner.LEASE_SECONDS, owner.POLL_SECONDS = 0.2, 2, 0.1
    if not config:
        with owner.own_run(owner.Path(run)):
            sys.exit()
    from moe.training.trainer import fit
    from moe.workdir.checkpoint import Checkpoints
    finish = Checkpoints._finish

    def pause(self, path, about, begin):
        if about["step"] == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        finish(self, path, about, begin)

    Checkpoints._finish = pause
    try:
        fit(RunConfig.from_config_dict(json.loads(config)), run)
    except LostRun as error:
        print(error)
""")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_an_owner_was_saving_while_it_lost_its_run_is_no_checkpoint(
    tmp_path: Path, data_directory: str
) -> None:
    config = RunConfig(
        model=ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8),
        data=DataConfig(sequence_length=64, directory=data_directory),
        train=TrainConfig(steps=4, batch_size=8, eval_batches=1, checkpoint_every=1),
        tracking=TrackingConfig(tensorboard=False),
    )
    words, run = [sys.executable, "-c", PAUSED], tmp_path / "run"
    with subprocess.Popen(
        [*words, str(run), json.dumps(config.to_dict())],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as paused:
        _, status = os.waitpid(paused.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), paused.communicate()
        subprocess.run([*words, str(run), ""], cwd=ROOT, check=True, timeout=300)
        paused.send_signal(signal.SIGCONT)
        output, error = paused.communicate(timeout=300)
    assert "was taken over by process" in output, error
    assert [path.parent.name for path in run.glob("checkpoints/*/about.json")] == ["1"]
    assert (run / "checkpoints" / "2").exists()
