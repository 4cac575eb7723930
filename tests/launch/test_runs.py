"""The commands around one small run: train, evaluate, generate, benchmark and plan.

Training is killed, interrupted and resumed.
"""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import generate as generate_command
from launch.benchmark import benchmark
from launch.evaluate import evaluate
from launch.generate import generate
from launch.plan_components import compiled_flops, run_lines, summary
from moe.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.scaling.flops import component_counts
from moe.training.progress import Stream
from moe.training.trainer import fit
from moe.workdir.tracking import read_metrics
from tests.jobs import SMALL_MODEL, answers_within, wait_for_step

ROOT = Path(__file__).parents[2]
SMALL = {
    **SMALL_MODEL,
    "data.sequence_length": 64,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.eval_batches": 1,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_directory):
    workdir = tmp_path_factory.mktemp("run")
    config = RunConfig(
        model=ModelConfig(
            num_layers=1, model_dim=16, feed_forward_dim=24, num_heads=2, num_kv_heads=1, head_dim=8
        ),
        data=DataConfig(sequence_length=64, directory=data_directory),
        optimizer=OptimizerConfig(learning_rate=0.05, warmup_fraction=0.25),
        # The larger a batch is, the fewer of them the validation split has.
        train=TrainConfig(steps=4, batch_size=64, log_every=1, eval_every=4, checkpoint_every=2),
        tracking=TrackingConfig(tensorboard=False),
    )
    fit(config, workdir)
    return workdir


def test_evaluate_gives_what_the_run_wrote(workdir):
    result = evaluate(workdir)
    written = next(line for line in read_metrics(workdir) if "validation/loss" in line)
    assert result["step"] == 4
    assert result["loss"] == pytest.approx(written["validation/loss"], rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(written["validation/bits_per_byte"], rel=1e-4)
    assert evaluate(workdir, step=2)["loss"] > result["loss"]


def test_evaluate_refuses_an_unknown_directory(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        evaluate(tmp_path)


def test_evaluate_refuses_an_unknown_split_before_it_loads_jax(workdir):
    text = f"""
import pathlib, sys
from launch.evaluate import evaluate
from moe.config import ConfigError
try:
    evaluate(pathlib.Path({str(workdir)!r}), split="tset")
except ConfigError as error:
    print(error)
print("jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    problem = "split 'tset' is not one of data.dataset='stdlib'"
    fix = "set the split to 'train' or 'validation'"
    assert done.stdout == f"{problem}: {fix}\nFalse\n", done


def test_generate_is_a_function_of_its_arguments(workdir):
    texts = generate(workdir, ["def ", ""], max_new_tokens=20, seed=1)
    assert texts == generate(workdir, ["def ", ""], max_new_tokens=20, seed=1)
    assert texts != generate(workdir, ["def ", ""], max_new_tokens=20, seed=2)
    assert texts[0] != generate(workdir, ["def ", ""], max_new_tokens=20, seed=1, step=2)[0]
    with pytest.raises(ConfigError, match=r"top_p=2\.0"):
        generate(workdir, ["def "], top_p=2.0)
    with pytest.raises(ConfigError, match="set max_new_tokens to less than"):
        generate(workdir, ["def "], max_new_tokens=10**12)


def test_text_is_given_while_it_is_sampled(workdir):
    prompts, options = ["def ", "é"], {"max_new_tokens": 40, "seed": 1}
    parts = [*generate_command.stream(workdir, prompts, **options)]
    assert ["".join(texts) for texts in zip(*parts, strict=True)] == generate(
        workdir, prompts, **options
    )
    assert len(parts) == 4  # three of at most 16 tokens, and what was held back


def show(monkeypatch, stdout, parts):
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(generate_command, "stream", lambda *_, **__: iter(parts))
    options = ("step", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    values = dict.fromkeys(options) | {"workdir": "run", "prompt": ["a", "b"], "suffix": "~"}
    monkeypatch.setattr(generate_command, "read_config", lambda workdir: RunConfig())
    generate_command.main(SimpleNamespace(**values), {})


def test_the_first_text_is_shown_at_once_and_the_others_after_it(monkeypatch):
    shown, line = io.StringIO(), "-" * 80

    def parts():
        for text in ("", "1", "12"):
            assert shown.getvalue() == f"{line}\na{text}"
            yield ["2" if text else "1", "x"]

    show(monkeypatch, Stream(shown), parts())
    assert shown.getvalue() == f"{line}\na122~\n{line}\nbxxx~\n"


def test_a_reader_who_leaves_ends_generation_in_one_line(monkeypatch, capfd):
    reader, writer = os.pipe()

    def parts():
        yield ["1", "x"]
        os.close(reader)
        yield ["2", "x"]
        raise AssertionError("text was sampled that nobody reads")

    with os.fdopen(writer, "w") as pipe:
        show(monkeypatch, Stream(pipe), parts())
    assert capfd.readouterr().err == "stopped: nobody reads the text any more\n"


def test_summary_counts_llama_2_7b():
    model = ModelConfig(
        vocab_size=32_000,
        num_layers=32,
        model_dim=4096,
        feed_forward_dim=11_008,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
    )
    text = summary(RunConfig(model=model, data=DataConfig(sequence_length=4096)))
    assert (
        "parameters: 6,738,415,616 (6,476,271,616 without embeddings), active per token: "
        "6,738,415,616 (6,476,271,616 without embeddings)" in text
    )
    assert "(6N: 40,430,493,696, and 38,857,629,696 without embeddings)" in text
    config = RunConfig(model=model, mesh=MeshConfig(data=-1, fsdp=8))
    flops, size = run_lines(config)
    assert flops.endswith(" FLOPs for 4,096,000 tokens")
    # Four float32 for each parameter, an eighth of them on each device, and 28 bytes of counts.
    assert size.startswith("bytes on each of 8 devices: 13,476,831,260 without activations (")
    assert "(3,369,207,808 of parameters, 6,738,415,624 of optimizer, 0 of router state, " in size


@pytest.mark.slow
def test_xla_counts_the_flops_of_a_step_without_the_loops_of_attention():
    """Beside the matmuls it counts elementwise operations, here with a loss of few of them."""
    model = ModelConfig(num_layers=2, compute_dtype="float32")
    config = RunConfig(
        model=model,
        train=TrainConfig(batch_size=8, accumulation=2, loss_chunk=32),
        data=DataConfig(sequence_length=128),
    )
    counts = component_counts(model, 128)
    matmuls = 3 * sum(count.forward_flops for count in counts if "scores" not in count.name)
    assert matmuls < compiled_flops(config) < 1.15 * matmuls


def test_benchmark_reports_rates_that_agree():
    config = RunConfig(
        model=ModelConfig(num_layers=1, compute_dtype="float32"),
        train=TrainConfig(batch_size=8),
        data=DataConfig(sequence_length=32),
    )
    result = benchmark(config, trials=2)
    assert result["tokens_per_second"] == pytest.approx(8 * 32 / result["step_seconds"])
    assert len(result["ratio_to_matmul_of_trials"]) == 2 and all(
        ratio > 0 for ratio in result["ratio_to_matmul_of_trials"]
    )
    assert "mfu" not in result  # what a CPU can do at most is not known
    assert result["devices"] == "8 x cpu" and result["temporary_bytes_per_device"] > 0


def train(workdir, data_directory, config="configs/dense_tiny.py", **popen):
    flags = SMALL | {
        "train.steps": 30,
        "train.checkpoint_every": 7,
        "data.directory": data_directory,
        "optimizer.warmup_fraction": 0.03,
    }
    command = [
        sys.executable,
        "-m",
        "launch.train",
        f"--config={config}",
        f"--workdir={workdir}",
    ]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen
    )


def deterministic(workdir):
    timed = ("train/tokens_per_second", "train/data_wait_fraction")
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in read_metrics(workdir)
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, data_directory):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for step in (3, 11, 20):
        process = train(killed, data_directory)
        wait_for_step(killed, step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for workdir in (killed, whole):
        process = train(workdir, data_directory)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert deterministic(killed) == deterministic(whole)
    assert evaluate(killed) == evaluate(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_code(tmp_path, data_directory, number):
    gate = tmp_path / "open"
    environment = os.environ | {"GATE": f"10:{gate}"}
    process = train(tmp_path / "run", data_directory, "tests/launch/gated.py", env=environment)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    gate.touch()
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "run the same command again to go on" in errors.splitlines()[-1]
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(saved) == read_metrics(tmp_path / "run")[-1]["step"] >= 3


@pytest.mark.slow
def test_a_run_whose_reader_has_left_trains_to_its_end(tmp_path, data_directory):
    """As `2>&1 | head -1` leaves it, in the first step."""
    process = train(tmp_path, data_directory)
    assert process.stderr and process.stdout
    process.stderr.read(1)
    process.stderr.close()
    process.stdout.close()
    assert process.wait() == 0
    assert read_metrics(tmp_path)[-1]["step"] == 30 and (tmp_path / "checkpoints" / "30").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("train", "absl"),
        ("train", "ml_collections"),
        ("train", "jaxlib._jax"),
        ("sweep", "ml_collections"),
    ],
)
def test_ctrl_c_during_imports_is_answered_in_one_line(tmp_path, command, module):
    file = {
        "train": "config=configs/dense_tiny.py",
        "sweep": "sweep=configs/sweeps/isoflop_tiny.py",
    }
    arguments = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        f"launch.{command}",
        f"--workdir={tmp_path}",
        f"--{file[command]}",
    ]
    # Through so small a pipe, a process cannot be far ahead of the lines that are read here.
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "pipesize": 4096}
    with subprocess.Popen(arguments, cwd=ROOT, text=True, **pipes) as process:
        assert process.stderr
        imported = iter(process.stderr.readline, "")  # a line for each module after its import
        assert any(line.split("|")[-1].strip() == module for line in imported)
        process.send_signal(signal.SIGINT)
        errors = [line for line in imported if not line.startswith("import time:")]
        assert process.wait() == 75 and errors == [
            "interrupted: before there was anything to save\n"
        ]


def run(command, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


DENSE = "--config=configs/dense_tiny.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("train", (DENSE, "--workdir=x", "--config.model.num_heads=3"), "num_kv_heads"),
        ("train", (DENSE, "--workdir=x", "--config.model.vocab_size=100"), "vocab_size"),
        ("train", (DENSE, "--workdir=x", "--config.train.step=1"), "config.train.steps"),
        ("train", (DENSE, "--workdir=x", "--config.mesh.fsdp=3"), "mesh"),
        ("train", (DENSE, "--workdir="), "workdir"),
        ("train", (DENSE, "--workdir=x", "--init_step=3"), "set --init_from"),
        ("train", (DENSE, "--workdir=x", "--fork_from=y"), "set --fork_step"),
        ("plan", ("--config=configs/none.py",), "configs/none.py"),
        ("report", ("--workdir={empty}",), "metrics.jsonl"),
        ("evaluate", ("--workdir={empty}",), "config.json"),
    ],
)
def test_bad_input_is_answered_in_one_line_and_two_seconds(tmp_path, command, arguments, words):
    arguments = [argument.format(empty=tmp_path) for argument in arguments]
    done = run(command, *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert words in done.stderr
    assert answers_within(2.0, lambda: run(command, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", (DENSE, "--workdir={tmp}/file")),
        ("train", (DENSE, "--workdir={tmp}/new", "--config.mesh.data=2")),
        ("train", (DENSE, "--workdir={tmp}/new", "--config.data.dataset=no_such_data")),
        ("train", (DENSE, "--workdir={tmp}/new", "--config.data.directory=/proc/no")),
        ("generate", ("--workdir={tmp}", "--temperature=-1")),
        ("generate", ("--workdir={tmp}", "--seed=-1")),
        ("generate", ("--workdir={tmp}", "--prompt=\udcff")),  # a byte that is not UTF-8
    ],
)
def test_bad_input_that_needs_jax_or_a_data_set_is_answered_in_one_line(
    tmp_path, command, arguments
):
    (tmp_path / "file").write_text("")
    done = run(command, *(argument.format(tmp=tmp_path) for argument in arguments))
    # A run that has begun has said before where it runs.
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == done.stderr.splitlines()[-1:], done


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "train",
        "evaluate",
        "generate",
        "plan",
        "benchmark",
        "report",
        "routing",
        "upcycle",
        "compare",
        "sweep",
    ],
)
def test_help_teaches_and_is_quick(command):
    done = run(command, "--help")
    assert answers_within(2.0, lambda: run(command, "--help"))
    assert done.returncode == 0 and f"python -m launch.{command} --" in done.stdout
