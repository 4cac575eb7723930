"""The commands that time kernels and tune attention's blocks, on a CPU and small lengths."""

import json

import numpy as np
import pytest

from moe.kernels.attention import Choice
from moe.kernels.benchmarks import attention as benchmark
from moe.kernels.benchmarks import decode, grouped_matmul, tune


def run(monkeypatch, command, *arguments):
    monkeypatch.setattr("sys.argv", [command.__name__, *arguments])
    command.main()


SMALL = ("--heads=2", "--kv_heads=1", "--repeats=1")


def test_the_benchmark_checks_times_and_writes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "attention.json"
    run(
        monkeypatch,
        benchmark,
        *SMALL,
        "--width=16",
        "--dtype=float32",
        "--lengths",
        "64",
        "96",
        f"--json={path}",
    )
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert written["device"] == "cpu" and 0 < written["worst_difference"] < 1e-4
    found = {(row["length"], row["pass"], row["implementation"]) for row in written["rows"]}
    assert found == {
        (length, which, name)
        for length in (64, 96)
        for which in ("forward", "backward")
        for name in ("blockwise", "xla")
    }
    for row in written["rows"]:  # 2 heads of width 16, half of the pairs and the diagonal
        flops = (
            {"forward": 4, "backward": 10}[row["pass"]]
            * 2
            * 16
            * row["length"]
            * (row["length"] + 1)
            / 2
        )
        assert (
            row["tflops"] == pytest.approx(flops / row["ms"] / 1e9)
            and f"{row['ms']:.2f} ms" in printed
        )


@pytest.mark.parametrize(
    ("command", "flag"),
    [(benchmark, "json"), (decode, "json"), (grouped_matmul, "json"), (tune, "table")],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    command, flag, tmp_path, monkeypatch, capsys
):
    for path in (tmp_path, tmp_path / "no" / "a.json"):
        with pytest.raises(SystemExit):
            run(monkeypatch, command, f"--{flag}={path}")
        output = capsys.readouterr()
        assert not output.out and f"--{flag}: {path} is a directory, or in none" in output.err


@pytest.mark.parametrize("command", [benchmark, grouped_matmul])
def test_kernels_of_another_chip_are_refused(command, monkeypatch):
    with pytest.raises(SystemExit, match="error: hopper cannot be timed here, because it runs on"):
        run(monkeypatch, command, "--implementation=hopper")


def test_the_benchmark_times_one_implementation_under_every_mask(monkeypatch):
    masks = {"causal": {"causal": True}, "window 9": {"causal": True, "window": (8, 0)}}
    monkeypatch.setattr(benchmark, "masks", lambda length: masks)
    rows = benchmark.measure("cpu", 64, (2, 1, 16), "float32", repeats=1, name="blockwise")
    found = [(row["mask"], row["pass"], row["implementation"]) for row in rows]
    assert found == [
        (mask, which, name)
        for mask in masks
        for name in ("blockwise", "xla")
        for which in ("forward", "backward")
    ]


def test_the_benchmark_counts_the_pairs_that_a_mask_leaves():
    distance, documents = np.arange(64)[:, None] - np.arange(64), np.arange(64) // 8
    causal, ids = distance >= 0, benchmark.masks(16_384)["8 documents"]
    assert benchmark.visible_pairs(64, {"causal": True}) == causal.sum()
    assert (
        benchmark.visible_pairs(64, {"causal": True, "window": (9, 0)})
        == (causal & (distance <= 9)).sum()
    )
    assert benchmark.visible_pairs(64, ids) == (causal & (documents[:, None] == documents)).sum()
    np.testing.assert_array_equal(ids["q_segment_ids"][0], np.arange(16_384) // 2048)


def test_the_benchmark_refuses_wrong_numbers(monkeypatch):
    attention = benchmark.flash_attention
    wrong = lambda q, k, v, **keywords: (
        attention(q, k, v, **keywords)
        * (1.03 if keywords["implementation"].name == "blockwise" else 1)
    )
    monkeypatch.setattr(benchmark, "flash_attention", wrong)
    with pytest.raises(
        ValueError, match=r"blockwise differs from the reference by 3\.\d%: its times mean nothing"
    ):
        benchmark.check_numbers(Choice("blockwise"), (2, 1, 16), "float32")


@pytest.mark.slow
def test_tuning_adds_the_fastest_blocks_to_the_table(tmp_path, monkeypatch, capsys):
    table = tmp_path / "blocks.json"
    table.write_text('{"TPU v9": {}}')
    monkeypatch.setitem(tune.CANDIDATES, "blockwise", ((8, 32), (16,)))
    measured = iter(
        [
            {(8, 16): 1.0, (32, 16): 3.0, (32, 32): 2.0},
            {(8, 16): 2.0, (32, 16): 1.0, (32, 32): 3.0},
            {(32, 32): 1.0},
        ]
    )

    def median_seconds(calls, repeats):
        times = next(measured)
        return {(blocks, which): times.get(blocks, 9.0) for blocks, which in calls}

    monkeypatch.setattr(tune, "median_seconds", median_seconds)
    options = ("--dtypes=float32", "--widths=16", "--lengths=32", f"--table={table}")
    run(monkeypatch, tune, *SMALL, *options)
    assert json.loads(table.read_text()) == {
        "TPU v9": {},
        "cpu": {
            "blockwise float32 16 causal 32": [8, 16],
            "blockwise float32 16 full 32": [32, 16],
            "blockwise float32 16 window 32": [32, 32],
        },
    }
    assert (
        "blockwise float32 16 causal 32: (8, 16), 0.50 times the time of the rule's"
        in capsys.readouterr().out
    )


def test_the_grouped_matmul_is_checked_timed_and_written(tmp_path, monkeypatch, capsys):
    """A competitor that fails is a row that says so."""

    def fail(*arrays):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(grouped_matmul, "_dense_swiglu", fail)
    path = tmp_path / "grouped_matmul.json"
    options = ("--shapes", "100,16,8,3", "--repeats=1", "--dtype=float32", f"--json={path}")
    run(monkeypatch, grouped_matmul, *options)
    written = json.loads(path.read_text())
    assert written["device"] == "cpu" and 0 < written["worst_difference"] < 1e-5
    found = {(row["pass"], row["implementation"]): row for row in written["rows"]}
    ours = {(f"swiglu {which}", "blockwise") for which in ("forward", "backward")}
    refused = {(f"swiglu {which}", "dense") for which in ("forward", "backward")}
    matmuls = {(which, "dense") for which in ("forward", "dx", "dw")}
    assert set(found) == ours | refused | matmuls
    assert {key for key, row in found.items() if row.get("refused") == "out of memory"} == refused
    for which, matmuls in (("forward", 3), ("backward", 6)):
        row = found[f"swiglu {which}", "blockwise"]
        assert row["tflops"] == pytest.approx(matmuls * 2 * 100 * 16 * 8 / row["ms"] / 1e9)
    assert "not run: out of memory" in capsys.readouterr().out


@pytest.mark.slow
def test_the_passes_of_the_tpu_kernels_are_timed_beside_ragged_dot(tmp_path, monkeypatch):
    path = tmp_path / "grouped_matmul.json"
    options = ("--shapes", "40,128,256,3", "--repeats=1", f"--json={path}", "--implementation=tpu")
    run(monkeypatch, grouped_matmul, *options)
    rows = json.loads(path.read_text())["rows"]
    assert not any("refused" in row for row in rows)
    passes = {
        name: {row["pass"] for row in rows if row["implementation"] == name}
        for name in ("tpu", "jax.lax.ragged_dot")
    }
    assert passes["jax.lax.ragged_dot"] == {"forward", "dx", "dw"}
    assert passes["tpu"] == {"forward", "dx", "dw", "swiglu forward", "swiglu backward"}


def test_rows_of_the_benchmark_fill_blocks_of_their_experts():
    shape = grouped_matmul.Shape(100, 16, 8, 3)
    problem = grouped_matmul.make_problem(shape, "hopper", "bfloat16")
    tokens, experts = (np.asarray(x) for x in problem.inputs[4:])
    loads = np.asarray(problem.loads_E)
    rows = tokens.reshape(len(experts), 128)
    assert loads.sum() == 100 and len(set(loads)) > 1
    # Row after row belongs to the first expert, then to the second, ...
    owners = np.concatenate(
        [np.repeat(e, (x < 100).sum()) for e, x in zip(experts, rows, strict=True)]
    )
    np.testing.assert_array_equal(owners, np.repeat(np.arange(3), loads))
    np.testing.assert_array_equal(tokens[tokens < 100], np.arange(100))
