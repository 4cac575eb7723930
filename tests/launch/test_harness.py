"""Runs the lm-evaluation-harness on a small model, offline, with task files of our own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from launch.harness import (
    LoadedRun,
    RunModel,
    cut_at,
    evaluate_tasks,
    find_tasks,
    read_generation_options,
)
from moe.config import ConfigError, DataConfig, MeshConfig, RunConfig, TrainConfig
from moe.data.chat import make_chat
from moe.data.tokenizers import make_tokenizer
from moe.inference.generate import Sampling
from moe.inference.scoring import score_parts
from moe.model.transformer import Transformer
from moe.parallel.mesh import make_mesh
from moe.parameters import unbox
from tests.tiny import TINY_MODEL

MODEL = Transformer(dataclasses.replace(TINY_MODEL, vocab_size=258))
ROW = 32
CONFIG = RunConfig(mesh=MeshConfig(data=-1), train=TrainConfig(batch_size=8))
BOUNDARY = 255


@pytest.fixture(scope="module")
def variables() -> Any:
    init = lambda key: unbox(MODEL.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)}))
    return jax.jit(init)(jax.random.key(0))


@pytest.fixture(scope="module")
def run(variables: Any) -> LoadedRun:
    return LoadedRun(
        MODEL, variables, make_mesh(CONFIG), 8, ROW, make_tokenizer(DataConfig()), None
    )


@jax.jit
def all_log_probs(variables: Any, tokens_BT: jax.Array) -> jax.Array:
    hidden = MODEL.apply(variables, {"tokens": tokens_BT}).hidden
    return jax.nn.log_softmax(MODEL.apply(variables, hidden, method="unembed"))


def log_prob(variables: Any, tokens: list[int], start: int) -> float:
    """Returns the log-probability of the tokens from `start` on, by one full forward pass."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    log_probs = np.asarray(all_log_probs(variables, padded)[0])
    return float(sum(log_probs[place - 1, tokens[place]] for place in range(start, len(tokens))))


def requests(kind: Any, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, 0) for args in arguments]


def test_log_likelihoods_are_those_of_a_forward_pass(run: LoadedRun, variables: Any):
    """The space before a word is scored with the word, also where a task puts it before."""
    pairs = [("a context ", "word"), ("a context", " word"), ("", "x"), ("é", "é")]
    found = RunModel(run).loglikelihood(requests("loglikelihood", *pairs))
    whole = [BOUNDARY, *b"a context word"]
    expected = [
        log_prob(variables, whole, 10),
        log_prob(variables, whole, 10),
        log_prob(variables, [BOUNDARY, *b"x"], 1),
        log_prob(variables, [BOUNDARY, *"éé".encode()], 3),
    ]
    np.testing.assert_allclose([score for score, _ in found], expected, rtol=1e-5)
    assert all(type(is_greedy) is bool for _, is_greedy in found)


def test_a_context_that_is_too_long_loses_its_beginning(run: LoadedRun, variables: Any):
    model = RunModel(run)
    ((found, _),) = model.loglikelihood(requests("loglikelihood", ("a" * 50, "bcd")))
    assert found == pytest.approx(log_prob(variables, [*b"a" * 30, *b"bcd"], 30), rel=1e-5)
    assert model.num_cut == 1
    with pytest.raises(ConfigError, match="has 33 tokens, and the run's rows have 32"):
        model.loglikelihood(requests("loglikelihood", ("a", "b" * 33)))


def test_rolling_windows_score_every_token_once(run: LoadedRun, variables: Any):
    """A text that fits is scored whole, and a longer one in windows that are full."""
    text = bytes(range(65, 65 + 45)).decode()
    found = RunModel(run).loglikelihood_rolling(
        requests("loglikelihood_rolling", (text[:32],), (text,), ("",))
    )
    tokens = [BOUNDARY, *text.encode()]
    first = log_prob(variables, tokens[:33], 1)
    # The second window scores the other 13 tokens, after the 20 before them.
    second = log_prob(variables, tokens[13:], 20)
    np.testing.assert_allclose(found, [first, first + second, 0.0], rtol=1e-5)
    whole = LoadedRun(*run[:4], 64, *run[5:])
    (found,) = RunModel(whole).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(log_prob(variables, tokens, 1), rel=1e-5)


def test_answers_end_at_their_stops():
    assert cut_at("a b\n\nc;", ["\n\n", ";"]) == "a b"
    options = {"until": ["\n", ""], "do_sample": False, "temperature": 0.7}
    assert read_generation_options(options) == (Sampling(temperature=0.0), 256, ["\n"])
    options = {"until": "x", "max_gen_toks": 5, "do_sample": True, "top_p": 0.9}
    assert read_generation_options(options) == (Sampling(1.0, 0, 0.9), 5, ["x"])
    for nothing in ("", None, [], [""]):
        assert read_generation_options({"until": nothing})[2] == []
    with pytest.raises(ConfigError, match="a task sets num_beams=4 for generation"):
        read_generation_options({"num_beams": 4})


TASKS = {
    "our_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "our_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "our_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(directory: Path) -> None:
    """Writes task files, which the harness reads as YAML, and the file of their examples."""
    examples = [{"question": f"Is {n} even?", "answer": n % 2} for n in range(10)]
    data = directory / "examples.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    for name, task in TASKS.items():
        source = {"task": name, "dataset_path": "json", "test_split": "test"}
        source["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        (directory / f"{name}.yaml").write_text(json.dumps(source | task))


@pytest.mark.filterwarnings("ignore")  # of the harness's own packages
def test_the_harness_runs_task_files_of_our_own(
    run: LoadedRun, variables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_tasks(tmp_path)
    manager = find_tasks(list(TASKS), str(tmp_path))
    results = evaluate_tasks(run, list(TASKS), manager, limit=None, num_fewshot=0)
    assert results.keys() == TASKS.keys()
    texts = [f"Is {n} even?" for n in range(10)]
    nats = -sum(log_prob(variables, [BOUNDARY, *text.encode()], 1) for text in texts)
    num_bytes = sum(map(len, texts))
    assert results["our_text"]["bits_per_byte,none"] == pytest.approx(
        nats / np.log(2) / num_bytes, rel=1e-5
    )
    likelier = [
        max(
            "yes",
            "no",
            key=lambda a: log_prob(variables, [BOUNDARY, *f"{t} {a}".encode()], len(t) + 1),
        )
        for t in texts
    ]
    hits = [answer == ["yes", "no"][n % 2] for n, answer in enumerate(likelier)]
    assert results["our_choice"]["acc,none"] == pytest.approx(np.mean(hits))
    assert results["our_answer"]["exact_match,none"] == 0.0


ROLES = ("<|user|>", "<|assistant|>", "<|end|>")


def run_on_conversations(run: LoadedRun, template: Path) -> LoadedRun:
    """Returns a run whose tokenizer and chat template know the roles."""
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    data = DataConfig(packing="pad", chat_template=str(template), special_tokens=ROLES)
    tokenizer = make_tokenizer(data)
    model = Transformer(dataclasses.replace(MODEL.config, vocab_size=264))
    init = lambda key: unbox(model.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)}))
    return run._replace(
        model=model,
        variables=jax.jit(init)(jax.random.key(0)),
        max_length=128,
        tokenizer=tokenizer,
        chat=make_chat(data, tokenizer),
    )


@pytest.mark.filterwarnings("ignore")  # of the harness's own packages
def test_questions_and_examples_before_them_go_through_the_chat_template(
    run: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The model is asked in tokens: special ones around what each role says."""
    asked = run_on_conversations(run, tmp_path / "chat.jinja")
    scored: list[list[int]] = []

    def keep_parts(model: Any, variables: Any, parts: Any, **options: Any) -> Any:
        scored.extend(part.tokens.tolist() for part in parts)
        return score_parts(model, variables, parts, **options)

    monkeypatch.setattr("launch.harness.score_parts", keep_parts)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(TASKS["our_choice"], "fewshot_split", "test")
    write_tasks(tmp_path)
    manager = find_tasks(["our_choice"], str(tmp_path))
    evaluate_tasks(asked, ["our_choice"], manager, limit=3, num_fewshot=1)
    assert len(scored) == 6
    user, assistant, end = (asked.tokenizer.special_ids[name] for name in ROLES)
    for number, tokens in enumerate(scored):
        question = f"Is {number // 2} even?".encode()
        answer = [end, assistant, *["yes", "no"][number % 2].encode()]
        assert tokens[:2] == [BOUNDARY, user] and tokens.count(BOUNDARY) == 1
        assert tokens[-len(question) - len(answer) :] == [*question, *answer]
        # The example before the question is there too.
        assert bytes(token for token in tokens if token < BOUNDARY).count(b"even?") == 2


def test_an_unknown_directory_of_tasks_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"task_directory='.*nowhere' is no directory"):
        find_tasks(["x"], str(tmp_path / "nowhere"))
