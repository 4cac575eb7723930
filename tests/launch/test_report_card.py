"""The model card that `launch.report --card` writes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from launch import report_card, report_card_sections
from launch.recorded_evaluations import Evaluation, record_evaluation
from launch.report import main
from launch.report_card import CARD_FILE
from launch.series import Metrics
from moe.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.scaling.flops import training_flops_per_token
from moe.workdir.identity import read_about
from moe.workdir.tracking import read_metrics
from tests.launch.report_runs import make_run
from tests.tiny import OTHER_TASKS

LINE = {"train/loss": 2.5, "train/skipped_steps": 0, "train/tokens_per_second": 8192.0}
VALIDATION = {"validation/loss": 2.25, "validation/bits_per_byte": 3.25}


def write_card(workdir: Path) -> str:
    path = report_card.write_card(workdir, read_metrics(workdir), [])
    assert path == workdir / CARD_FILE
    return path.read_text()


def cells(card: str) -> dict[str, str]:
    """Returns the rows of all tables of a card: the second cell by the first one."""
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card, re.MULTILINE))


def replace_marked(path: Path, name: str, text: str) -> None:
    """Writes a text as a person does, in the place of what the card asks for."""
    asked = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    path.write_text(asked.sub(rf"\g<1>{text}\g<2>", path.read_text()))


def test_a_card_says_what_the_files_of_a_run_say(tmp_path: Path) -> None:
    """A step has 32 rows of 256 tokens, 8,192 tokens, and takes a second."""
    card = write_card(make_run(tmp_path, [(10, LINE), (20, LINE), (20, VALIDATION)]))
    found = cells(card)
    model = ModelConfig(num_layers=8)
    assert found["steps"] == "20 of 2,000" and found["tokens"] == "163,840"
    flops = training_flops_per_token(model, 256)
    assert found["training FLOPs"] == f"{flops * 163_840:.4g} ({flops:,.0f} for each token)"
    assert found["hours of training steps"] == f"{20 / 3600:.3g}"
    assert found["loss"] == "2.2500" and found["bits_per_byte"] == "3.2500"
    assert found["fingerprint"].endswith("`no checkpoint yet`")
    assert "On the whole of the split `validation`, at step 20." in card
    assert "is at step 20 of 2,000" in card and "Model Examination" not in card
    headings = re.findall(r"^#+ (.*)$", card, re.MULTILINE)
    assert headings[:3] == [
        f"Model Card for {tmp_path.name}",
        "Model Details",
        "Model Architecture",
    ]
    assert {
        "Uses",
        "Bias, Risks, and Limitations",
        "How to Get Started with the Model",
        "Training Data",
        "Training Hyperparameters",
        "Evaluation",
        "Compute Infrastructure",
        "Citation",
    } <= set(headings)


def test_a_card_of_a_run_that_has_hardly_begun_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    card = write_card(make_run(tmp_path, [(10, {"train/loss": 2.5, "train/skipped_steps": 1})]))
    assert "has not been evaluated during training" in card and "nan" not in card
    assert not {"hours of training steps", "median MFU", "code"} & cells(card).keys()
    assert cells(card)["skipped updates"] == "1" and cells(card)["devices"] == "unknown"


def test_what_a_person_wrote_is_kept_and_the_rest_is_written_again(tmp_path: Path) -> None:
    workdir = make_run(tmp_path, [(10, LINE)])
    path = workdir / CARD_FILE
    first = write_card(workdir)
    assert first.count("To be written by a person") == len(re.findall("<!-- begin", first)) == 6
    replace_marked(path, "uses", "For tests:\n\n| a | table |\n| --- | --- |\n")
    replace_marked(path, "citation", "")
    path.write_text(path.read_text() + "\n<!-- begin mine -->\nMy own words.\n<!-- end mine -->\n")
    path.write_text(path.read_text().replace("10 of 2,000", "99 of 2,000"))
    second = write_card(workdir)
    assert "<!-- begin uses -->\nFor tests:\n\n| a | table |\n| --- | --- |\n<!-- end" in second
    assert "## More Information\n\n<!-- begin mine -->\nMy own words.\n<!-- end mine -->" in second
    assert "<!-- begin citation -->\n\n<!-- end citation -->" in second
    assert "10 of 2,000" in second and "99 of 2,000" not in second
    assert second.count("To be written by a person") == 4
    assert write_card(workdir) == second


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- end uses -->", ""),
        ("<!-- begin risks -->", "<!-- begin uses -->"),
        ("<!-- end summary -->", "<!-- end sumary -->"),
    ],
)
def test_a_card_whose_marks_are_damaged_is_not_overwritten(
    tmp_path: Path, old: str, new: str
) -> None:
    workdir = make_run(tmp_path, [(10, LINE)])
    damaged = write_card(workdir).replace(old, new)
    (workdir / CARD_FILE).write_text(damaged)
    with pytest.raises(ConfigError, match=r"MODEL_CARD\.md lacks the marks .*: restore the marks"):
        write_card(workdir)
    assert (workdir / CARD_FILE).read_text() == damaged


def test_a_card_that_a_person_wrote_alone_is_not_overwritten(tmp_path: Path) -> None:
    workdir = make_run(tmp_path, [(10, LINE)])
    (workdir / CARD_FILE).write_text("# My model\n")
    with pytest.raises(ConfigError, match="move the file away"):
        write_card(workdir)


def test_a_card_describes_every_task() -> None:
    assert report_card_sections._KINDS.keys() == {"language_modelling", *OTHER_TASKS}


def test_a_custom_task_has_no_card(tmp_path: Path) -> None:
    workdir = make_run(tmp_path, [(10, LINE)])
    config = RunConfig(task="custom")
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ConfigError, match=r"task='custom' in .*: leave out --card"):
        write_card(workdir)
    assert not (workdir / CARD_FILE).exists()


def test_the_hours_stand_for_all_steps(tmp_path: Path) -> None:
    """The first of three lines has no speed, since its step compiles."""
    config = RunConfig(train=TrainConfig(batch_size=4), data=DataConfig(sequence_length=25))
    lines: Metrics = [{"step": 1}]
    for step, speed in ((2, 100.0), (4, 50.0)):
        lines.append({"step": step, "train/tokens_per_second": speed})
    facts = report_card_sections.Facts("x", config, lines, [], None, {}, None, [])
    compute = "\n\n".join(report_card_sections.compute(facts))
    # One step of a second and two of two seconds: 5 seconds for 3 of 4 steps.
    assert cells(compute)["hours of training steps"] == f"{5 * 4 / 3 / 3600:.3g}"


@pytest.mark.slow
def test_the_card_of_a_real_sparse_run_and_of_its_fork(data_directory, tmp_path, capsys):
    from moe.training.trainer import fit

    moe = MoEConfig(num_experts=4, expert_dim=12, bias_update_rate=0.01)
    config = RunConfig(
        model=ModelConfig(
            num_layers=2, model_dim=16, feed_forward_dim=24, num_heads=2, num_kv_heads=1,
            head_dim=8, compute_dtype="float32", moe=moe,
        ),
        data=DataConfig(sequence_length=64, directory=data_directory),
        optimizer=OptimizerConfig(schedule="wsd", warmup_steps=1, decay_fraction=0.5),
        train=TrainConfig(
            steps=8, batch_size=8, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=2,
            keep_last=9,
        ),
        tracking=TrackingConfig(tensorboard=False),
    )  # fmt: skip
    trunk, fork = tmp_path / "trunk", tmp_path / "fork"
    fit(config, trunk)
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    fit(shorter, fork, fork_from=trunk, fork_step=2)
    flags = type("Flags", (), {"workdir": str(fork), "card": True})
    assert main(flags) is None
    card = (fork / CARD_FILE).read_text()
    found = cells(card)
    sha256 = read_about(fork / "checkpoints" / "4")["rows_sha256"]
    assert found["fingerprint"] == f"SHA-256 of the rows: `{sha256}`"
    assert re.fullmatch(
        r"[\d,]+ documents, [\d,]+ bytes, [\d,]+ tokens in [\d,]+ rows", found["size"]
    )
    assert found["experts"] == "4 of width 12, 2 for each token, in 2 layers"
    assert found["loss"] == f"{read_metrics(fork)[-1]['validation/loss']:.4f}"
    assert {"max_vio", "load_entropy", "dropped_fraction"} <= found.keys()
    assert "On 1 batch of the split `validation`" in card
    assert "after 1 step of warm-up" in card
    assert "the whole state of step 2 of the run `trunk` and is finished" in card
    assert "Both include the steps before the fork" in card
    assert "jax" in found["software"] and "x cpu" in found["devices"]
    assert f"wrote {fork / CARD_FILE}" in capsys.readouterr().out


def test_recorded_evaluations_are_tables_of_the_card(tmp_path: Path) -> None:
    """One is of slices, whose values are named FIELD=VALUE/METRIC, and one of tasks."""
    workdir = make_run(tmp_path, [(10, LINE)])
    values = {"loss": 2.0, "bits_per_byte": 1.5, "kind=a|b/loss": 2.5, "kind=a|b/max_vio": 0.25}
    slices = Evaluation(10, values, datasets=("text:notes",), slice_by="kind")
    record_evaluation(workdir, dataclasses.replace(slices, step=5, values={"loss": 9.0}))
    record_evaluation(workdir, slices)
    tasks = {"arc": {"alias": "arc", "acc,none": 0.5, "sample_len": 7}}
    record_evaluation(workdir, Evaluation(10, tasks, tasks=("arc",), limit=100, num_fewshot=2))
    card = write_card(workdir)
    assert (
        "### Evaluation on `text:notes` by kind\n\nAt step 10.\n\n"
        "| part | loss | bits_per_byte | max_vio |\n"
        "| --- | --- | --- | --- |\n"
        "| all | 2.0000 | 1.5000 |  |\n"
        "| kind=a\\|b | 2.5000 |  | 0.2500 |\n"
    ) in card
    assert (
        "At step 10, with 2 examples before each question, on the first 100 examples of each.\n\n"
        "| task | metric | value |\n| --- | --- | --- |\n"
        "| arc | acc,none | 0.5000 |\n| arc | sample_len | 7 |\n"
    ) in card
    assert "9.0000" not in card  # the later record of the same subject replaced it


@pytest.mark.parametrize(
    ("validation", "evaluations", "sentence"),
    [
        ([], [], "It has not been evaluated, so"),
        (
            [(10, VALIDATION)],
            [],
            "below is on held-out text of the data set that it was trained on.",
        ),
        ([], [Evaluation(10, {"loss": 2.0}, slice_by="kind")], "below is on held-out text of"),
        (
            [],
            [Evaluation(10, {"loss": 2.0}, datasets=("text:a",))],
            "below is on other data. Whether",
        ),
        (
            [(10, VALIDATION)],
            [
                Evaluation(10, {"loss": 2.0}, datasets=("text:a",)),
                Evaluation(10, {}, tasks=("arc",)),
            ],
            "trained on and on other data and on tasks. Whether it knows any other text",
        ),
    ],
)
def test_the_limits_name_what_was_evaluated(tmp_path, validation, evaluations, sentence) -> None:
    workdir = make_run(tmp_path, [(10, LINE), *validation])
    for evaluation in evaluations:
        record_evaluation(workdir, evaluation)
    limits = write_card(workdir).partition("## Bias, Risks")[2].partition("## How to")[0]
    assert sentence in limits
    assert limits.count("not known from this run") == 1


@pytest.mark.parametrize("damage", ["{", "[]", '{"step": 1}', '{"step": 1, "values": 2, "x": 3}'])
def test_a_damaged_record_of_an_evaluation_is_named(tmp_path: Path, damage: str) -> None:
    workdir = make_run(tmp_path, [(10, LINE)])
    path = record_evaluation(workdir, Evaluation(10, {"loss": 2.0}))
    path.write_text(damage)
    with pytest.raises(ConfigError, match=rf"{path} is damaged: delete it, and run"):
        write_card(workdir)
