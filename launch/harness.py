"""Evaluates a run on the tasks of EleutherAI's lm-evaluation-harness, as a Model of the harness."""

import contextlib
import difflib
import io
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moe.config import ConfigError
from moe.config.checks import show
from moe.data.chat import Chat
from moe.data.chat.messages import Message
from moe.data.tokenizers import Tokenizer
from moe.inference.generate import Sampling, generate
from moe.inference.scoring import Part, Score, padded_length, score_parts

_MAX_NEW_TOKENS = 256  # what the harness takes where a task does not say it
_GENERATION_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class LoadedRun(NamedTuple):
    """Holds what the harness needs of a run's checkpoint."""

    model: nn.Module
    variables: Any
    mesh: jax.sharding.Mesh
    batch_size: int
    max_length: int  # the tokens of a row that the model was trained on
    tokenizer: Tokenizer
    chat: Chat | None  # of a run that was trained on conversations


class RunModel(LM):
    """Answers the harness's requests with a run's checkpoint.

    A context begins with a boundary, as documents do. A context that is too long loses its
    beginning, as the harness asks for, and `num_cut` counts those.
    """

    def __init__(self, run: LoadedRun):
        super().__init__()
        self._run = run
        self._prompts: dict[str, np.ndarray] = {}  # the tokens of prompts by their texts
        self.num_cut = 0

    @property
    def tokenizer_name(self) -> str:
        """Returns a name by which the harness tells cached requests apart."""
        return "moe"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns each continuation's log-probability, and whether it is the greedy one."""
        parts = [self._part(*request.args) for request in requests]
        return [(score.log_prob, score.is_greedy) for score in self._scores(parts)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Returns each text's log-probability.

        A text that is longer than a row is scored in rows, of which the last one reaches back.
        """
        parts, owners = [], []
        for number, request in enumerate(requests):
            tokens = self._run.tokenizer.encode(request.args[0]).tolist()
            for window in get_rolling_token_windows(
                tokens, self._run.tokenizer.boundary_id, self._run.max_length, context_len=1
            ):
                before, scored = make_disjoint_window(window)
                parts.append(Part(np.array([*before, *scored]), len(before)))
                owners.append(number)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [score.log_prob for score in self._scores(parts)])
        return sums.tolist()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns what the model writes after each context, up to the first of its stops."""
        groups: dict[str, list[int]] = defaultdict(list)
        arguments: list[Any] = [request.args for request in requests]
        for number, (_, options) in enumerate(arguments):
            groups[json.dumps(options, sort_keys=True)].append(number)
        texts = [""] * len(requests)
        with _bar("generating", len(requests)) as bar:
            for options, numbers in groups.items():
                contexts = [self._context(arguments[number][0]) for number in numbers]
                written = self._generate(contexts, json.loads(options), bar.update)
                for number, text in zip(numbers, written, strict=True):
                    texts[number] = text
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as one text, which stands for its tokens in later requests."""
        if self._run.chat is None or not add_generation_prompt:
            raise ConfigError(
                "--tasks: a task prescribes how answers begin, which chat templates cannot write: "
                "leave out its gen_prefix"
            )
        messages = [Message(message["role"], message["content"]) for message in chat_history]
        text = json.dumps(chat_history, ensure_ascii=False)
        self._prompts[text] = self._run.chat.encode_prompt(messages, "a prompt of the harness")
        return text

    def _context(self, context: str) -> np.ndarray:
        """Returns the tokens of a context, at most as many as a row has."""
        if context in self._prompts:
            tokens = self._prompts[context]
        else:
            tokens = self._run.tokenizer.encode_prompt(context)
        self.num_cut += len(tokens) > self._run.max_length
        return tokens[-self._run.max_length :]

    def _part(self, context: str, continuation: str) -> Part:
        """Returns the tokens of a context and its continuation, which is to be scored."""
        if context in self._prompts:
            before, scored = self._prompts[context], self._run.tokenizer.encode(continuation)
        else:
            # As everywhere in the harness, spaces belong to the word behind them, and the
            # continuation's tokens are those that it adds to the context's.
            bare = context.rstrip()
            before = self._run.tokenizer.encode_prompt(bare)
            scored = self._run.tokenizer.encode_prompt(context + continuation)[len(before) :]
            if not len(scored):  # the tokenizer has joined it with the context's last token
                scored = self._run.tokenizer.encode(context[len(bare) :] + continuation)
        longest = self._run.max_length
        if len(scored) > longest:
            raise ConfigError(
                f"--tasks: the answer {show(continuation)} has {len(scored)} tokens, and the "
                f"run's rows have {longest}: take another task"
            )
        tokens = np.concatenate([before, scored])
        # The last token is only predicted, so a row has room for one more.
        self.num_cut += len(tokens) > longest + 1
        tokens = tokens[-longest - 1 :]
        return Part(tokens, len(tokens) - len(scored))

    def _scores(self, parts: Sequence[Part]) -> list[Score]:
        run = self._run
        scores = score_parts(
            run.model, run.variables, parts, batch_size=run.batch_size, mesh=run.mesh
        )
        found = dict(_bar("scoring", len(parts), scores))
        return [found[number] for number in range(len(parts))]

    def _generate(
        self,
        contexts: Sequence[np.ndarray],
        options: Mapping[str, Any],
        advance: Callable[[int], Any],
    ) -> list[str]:
        """Returns what follows each context under the same options."""
        sampling, max_new_tokens, stops = read_generation_options(options)
        run = self._run
        end_id = run.chat.end_of_turn() if run.chat else run.tokenizer.boundary_id
        texts = [""] * len(contexts)
        order = sorted(range(len(contexts)), key=lambda number: -len(contexts[number]))
        for first in range(0, len(order), run.batch_size):
            numbers = order[first : first + run.batch_size]
            batch = [contexts[number] for number in numbers]
            written = generate(
                run.model,
                run.variables,
                # The last batch is filled up, so that it needs no other program.
                batch + batch[:1] * (run.batch_size - len(batch)),
                max_new_tokens=max_new_tokens,
                end_id=end_id,
                sampling=sampling,
                pad_to=padded_length(len(batch[0])),
            )
            for number, tokens in zip(numbers, written, strict=False):
                texts[number] = cut_at(run.tokenizer.decode(tokens), stops)
            advance(len(numbers))
        return texts


def read_generation_options(options: Mapping[str, Any]) -> tuple[Sampling, int, list[str]]:
    """Returns how to sample, how many tokens, and the texts at which an answer ends.

    Raises ConfigError for an option of a task that this project's sampling does not have.
    """
    unknown = sorted(options.keys() - set(_GENERATION_OPTIONS))
    if unknown:
        raise ConfigError(
            f"--tasks: a task sets {unknown[0]}={show(options[unknown[0]])} for generation, and "
            f"there are only {', '.join(_GENERATION_OPTIONS)}: change the task's file"
        )
    defaults = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_gen_toks": _MAX_NEW_TOKENS}
    values = {**defaults, "until": [], **options}
    if options.keys() >= {"do_sample"}:
        values["temperature"] = options.get("temperature", 1.0) if options["do_sample"] else 0.0
    until = values["until"]
    # A task may write "" or null where nothing ends an answer.
    stops = [stop for stop in ([until] if isinstance(until, str) else until or []) if stop]
    sampling = Sampling(float(values["temperature"]), int(values["top_k"]), float(values["top_p"]))
    return sampling, int(values["max_gen_toks"]), stops


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Returns the text before the first of the stops."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def find_tasks(names: Sequence[str], directory: str | None) -> TaskManager:
    """Returns the harness's index of tasks: those of `directory`, or all if it lacks one of them.

    The harness takes ten seconds to read its own tasks. Raises ConfigError for an unknown task.
    """
    if directory is not None:
        if not Path(directory).is_dir():
            raise ConfigError(
                f"--task_directory={show(directory)} is no directory: set it to one with task files"
            )
        manager = TaskManager(include_path=directory, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=directory)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"--tasks: {show(name)} is not a task of the harness: {hint}")
    return manager


def evaluate_tasks(
    run: LoadedRun,
    names: Sequence[str],
    manager: TaskManager,
    *,
    limit: int | None,
    num_fewshot: int | None,
) -> Mapping[str, Mapping[str, Any]]:
    """Returns the harness's results of each task, by the task's name.

    Conversations go through the run's chat template, if it has one. Raises ConfigError for a task
    that cannot be loaded, as without a network.
    """
    model = RunModel(run)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the harness's own prints
            results: Any = simple_evaluate(
                model,
                tasks=list(names),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=0,
                apply_chat_template=run.chat is not None,
            )
    except (ImportError, ConnectionError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--tasks={','.join(names)} could not be loaded ({reason}): "
            "give a task whose data is on this machine"
        ) from error
    if model.num_cut:
        print(
            f"{model.num_cut:,} contexts were cut to their last {run.max_length} tokens",
            file=sys.stderr,
        )
    return results["results"]


def _bar(text: str, total: int, items: Any = None) -> Any:
    """Returns a progress bar, which is shown where stderr is a terminal."""
    return tqdm(items, text, total, disable=None)
