"""Tests that tables are read as they are meant, and that bad ones are refused in one line."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from moe.config import ConfigError
from moe.scaling.experiments.run_checks import check_runs
from moe.scaling.experiments.runs import make_runs, read_runs
from moe.scaling.laws import LAWS
from tests.scaling.tables import isoflop_runs

TABLE = """name,N,D,L,set
a,1e6,2e7,5.5,rw
b,2e6,2e7,5.2,rw
c,1e6,4e7,,rw
d,4e6,8e7,4.1,owt
"""
NAMES = {"run": "name", "parameters": "N", "tokens": "D", "loss": "L", "dataset": "set"}


def write(directory, text: str):
    path = directory / "runs.csv"
    path.write_text(text)
    return path


def test_a_table_is_read_with_its_own_names(tmp_path):
    runs = read_runs(write(tmp_path, TABLE), NAMES)
    assert list(runs.run) == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(runs.flops, 6 * runs.parameters * runs.tokens)
    np.testing.assert_array_equal(runs.active_parameters, runs.parameters)
    np.testing.assert_array_equal(runs.sparsity, 0)
    np.testing.assert_array_equal(runs.experts, 1)
    assert list(runs.status) == ["finished"] * 4
    assert np.isnan(runs.loss[2])


def test_parquet_and_csv_are_one_table(tmp_path):
    runs = read_runs(write(tmp_path, TABLE), NAMES)
    path = tmp_path / "runs.parquet"
    columns = {"parameters": runs.parameters, "tokens": runs.tokens, "loss": runs.loss}
    parquet.write_table(pyarrow.table(columns), path)
    again = read_runs(path)
    np.testing.assert_array_equal(again.loss, runs.loss)
    assert list(again.run) == ["row 1", "row 2", "row 3", "row 4"]


def test_rows_are_chosen_and_keep_their_numbers(tmp_path):
    path = write(tmp_path, TABLE)
    runs = read_runs(path, NAMES, where={"set": "owt", "N": "4000000"}, scale={"tokens": 1e3})
    assert list(runs.row) == [4]
    np.testing.assert_array_equal(runs.tokens, 8e10)
    np.testing.assert_array_equal(runs.flops, 6 * 4e6 * 8e10)
    assert len(read_runs(path, NAMES, where={"set": "owt,rw"})) == 4
    with pytest.raises(ConfigError, match=r"'N' has 4000000\.0 in the rows that the conditions"):
        read_runs(path, NAMES, where={"set": "owt", "N": "1e6"})


def test_a_header_that_is_no_utf_8_is_told(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes("größe,tokens,loss\n1e6,2e7,3.1\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="is no table of runs, CSV or Parquet"):
        read_runs(path)


def test_dense_models_may_have_0_experts():
    runs = make_runs(parameters=[1e6, 8e6], experts=[0, 8], experts_per_token=[0, 1])
    np.testing.assert_array_equal(runs.sparsity, [0, 7 / 8])
    np.testing.assert_array_equal(runs.active_parameters, [1e6, np.nan])


@pytest.mark.parametrize(
    ("columns", "where", "message"),
    [
        ({}, {}, "there is no column parameters, tokens, loss: "),
        (NAMES | {"loss": "X"}, {}, "there is no column 'X' for loss: the table has name, N"),
        (NAMES | {"los": "L"}, {}, "column 'los' is no column of a table of runs: name one of"),
        (NAMES, {"colour": "red"}, "there is no column 'colour' to choose rows by"),
        (NAMES, {"set": "c4"}, "no row with set=c4 is left: column 'set' has rw, owt"),
        (NAMES | {"tokens": "set"}, {}, r"column 'set' holds no number in rows 1 \('rw'\), 2"),
    ],
)
def test_wrong_columns_are_refused(tmp_path, columns, where, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_runs(write(tmp_path, TABLE), columns, where=where)
    assert "\n" not in str(caught.value)


def test_what_is_no_table_of_rows_and_columns_is_refused(tmp_path):
    for text, message in (
        ("N,N,D\n1,2,3\n", "there are two columns 'N': rename one"),
        ("N,D,L\n", "has no rows: write a row for each run"),
        ("N;D;L\n1;2;3\n", "there is one column, 'N;D;L': separate columns by commas"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_runs(write(tmp_path, text))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match="is no regular file"):
            read_runs(path)


@pytest.mark.parametrize("text", ["", "a,b\n1\n"])
def test_what_is_no_table_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="is no table of runs"):
        read_runs(write(tmp_path, text))
    with pytest.raises(ConfigError, match="does not exist: name a table of runs"):
        read_runs(tmp_path / "missing.csv")


GOOD = isoflop_runs(0.001, batch_tokens=np.full(35, 1e6), vocab_size=np.full(35, 5e4))
UNKNOWN = {"batch_tokens": np.full(35, np.nan)}


def check(**columns):
    """Checks the good runs with other columns, for Chinchilla's law."""
    names = ("run", "status", "parameters", "tokens", "loss", "batch_tokens", "vocab_size")
    table = {name: getattr(GOOD, name) for name in names}
    law = LAWS["chinchilla"]
    return check_runs(make_runs(**table | columns), law.columns, len(law.coefficients))


def changed(name: str, rows: list[int], value: float) -> dict[str, np.ndarray]:
    values = getattr(GOOD, name).copy()
    values[np.array(rows) - 1] = value
    return {name: values}


def test_good_runs_pass():
    runs, left_out = check()
    assert len(runs) == 35
    assert left_out == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (changed("loss", [3], np.nan), r"^loss: row 3 \(nan\) is empty or not a number: fill"),
        (changed("loss", [3, 9], -1), r"^loss: rows 3 \(-1\), 9 \(-1\) must be positive"),
        (changed("loss", [5], np.inf), r"^loss: row 5 \(inf\) must be positive"),
        (changed("parameters", [2], 0), r"^parameters: row 2 \(0\) must be positive"),
        (changed("parameters", [2], np.nan), r"^parameters: row 2 \(nan\) is empty"),
        ({"tokens": np.full(35, 1e307)}, r"^flops: rows 1 \(inf\), .* must be positive"),
        (
            UNKNOWN
            | {"parameters": GOOD.parameters * 1e199, "tokens": GOOD.tokens * 1e199}
            | {"flops": np.full(35, 1e20)},
            "^flops: rows .* are more than 30 times off",
        ),
        ({"loss": GOOD.loss + 40, "vocab_size": np.full(35, np.nan)}, "above 30 nats per token"),
        (changed("tokens", [35], 10), r"^tokens: row 35 \(10\) is below the tokens of one batch"),
        (changed("tokens", [1], np.nan), r"^tokens: row 1 \(nan\) is empty"),
        ({"tokens": np.full(35, np.nan)}, "^tokens: no run has a value"),
        ({"parameters": np.full(35, 1e8)}, "^active_parameters: all 35 runs have one value, 1e"),
        ({"loss": np.full(35, 3.0)}, "^loss: all 35 runs have one value, 3: name the column"),
        ({"tokens": np.full(35, 1e9)}, "^tokens: all 35 runs have one value"),
        ({"flops": GOOD.flops / 1e15}, "^flops: rows .* are more than 30 times off 6"),
        ({"embedding_parameters": GOOD.parameters}, "^embedding_parameters: rows 1 .* are not be"),
        ({"sparsity": np.full(35, 1.0)}, "^sparsity: rows 1 .* must be 0 or more and below 1"),
        (
            {"dataset": ["rw"] * 30 + ["owt"] * 5},
            "^dataset: the table mixes rw and owt .rows 31, 32, 33, 34, 35., .* --where=dataset=rw",
        ),
        ({"tokenizer": ["byte"] * 34 + ["bpe"]}, "^tokenizer: the table mixes byte and bpe .row 3"),
        ({"vocab_size": [256] * 33 + [32000] * 2}, "^vocab_size: the table mixes 256 and 32000"),
        ({"vocab_size": [np.nan] + [5e4] * 34}, "^vocab_size: .* mixes 50000 and no value .row 1"),
        ({"tokens": GOOD.tokens / 1e6, **UNKNOWN}, "^tokens: rows 1 .* not between 0.001 and"),
        ({"parameters": GOOD.parameters / 1e6}, "^tokens: rows 1 .* for each active parameter"),
        ({"parameters": GOOD.parameters / 1e9}, "^parameters: rows 1 .* are below 1: check"),
        ({"tokens": np.full(35, 0.5), **UNKNOWN}, "^tokens: rows 1 .* are below 1: check the"),
        ({"status": ["failed"] * 35}, "^status: no run can be used .35 were left out, the first"),
        ({"status": ["diverged"] * 31 + ["finished"] * 4}, "^4 runs are too few .*31 were left"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_in_one_line(columns, message):
    # A warning, as of an overflow, would be a second line.
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=message) as caught:
        warnings.simplefilter("error")
        check(**columns)
    assert "\n" not in str(caught.value)


def test_one_tokenizer_may_have_vocabularies_of_several_sizes():
    check(vocab_size=[256] * 33 + [264] * 2, tokenizer=["byte"] * 35)


def test_losses_that_rise_with_the_tokens_are_refused():
    sizes = np.repeat(GOOD.parameters[:7], 5)
    tokens = np.tile(np.geomspace(1e9, 1e11, 5), 7)
    loss = 2 + 1e3 / tokens**0.3 + 100 / sizes**0.3
    table = {"parameters": sizes, "tokens": tokens, "batch_tokens": np.full(35, np.nan)}
    check(**table, loss=loss)
    loss[9] *= 1.5
    with pytest.raises(ConfigError, match=r"^loss: row 10 \(.* after .*\) rises with the tokens"):
        check(**table, loss=loss)


def test_a_worse_run_of_the_same_model_and_tokens_is_no_rise():
    table = {name: getattr(GOOD, name)[[*range(35), 3]] for name in ("parameters", "tokens")}
    loss = np.append(GOOD.loss, 1.03 * GOOD.loss[3])
    rows = {"batch_tokens": np.full(36, np.nan), "vocab_size": np.full(36, np.nan)}
    rows |= {"run": np.full(36, ""), "status": np.full(36, "")}
    with pytest.raises(ConfigError, match=r"^loss: row 36 .* is more than 2% above that of the sa"):
        check(**table, **rows, loss=loss)


def test_experts_without_active_parameters_are_refused():
    """Their FLOPs are unknown, so that no budget is the largest one."""
    table = {"experts": np.tile([4, 8, 16, 32, 64], 7), "experts_per_token": np.ones(35)}
    runs = make_runs(parameters=GOOD.parameters, tokens=GOOD.tokens, loss=GOOD.loss, **table)
    with pytest.raises(ConfigError, match=r"^active_parameters: no run has a value"):
        check_runs(runs, LAWS["sparsity"].columns, 8)


def test_runs_that_did_not_learn_are_left_out_with_the_reason():
    runs, left_out = check(**changed("loss", [2], 11.0))
    assert len(runs) == 34
    assert left_out == [
        ("row 2", "its loss 11 is not below that of a guess among 50000 tokens: it diverged")
    ]


def test_a_dense_law_refuses_a_table_of_different_mixtures():
    experts = {"experts": [8] * 20 + [1] * 15, "experts_per_token": np.ones(35)}
    with pytest.raises(ConfigError, match=r"^experts: the table has models of 1 and 8 experts"):
        check(**experts, active_parameters=GOOD.parameters)
    same = {"experts": np.full(35, 8), "experts_per_token": np.ones(35)}
    check(**same, active_parameters=GOOD.parameters)


def test_a_bad_table_is_told_before_anything_slow_is_imported():
    program = """
import sys
import moe.scaling.laws, moe.scaling.experiments.runs
print(sorted({"jax", "flax", "scipy", "matplotlib", "pandas"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_no_experts_are_one():
    runs = make_runs(parameters=[1e6], experts=[0], tokens=[1e8])
    assert runs.experts[0] == 1
    assert runs.active_parameters[0] == 1e6
