"""Encodes conversations: special tokens where the template writes them, plain text elsewhere."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from moe.config import ConfigError
from moe.config.checks import show
from moe.data.chat.messages import Message, read_messages
from moe.data.chat.template import ChatTemplate, Part
from moe.data.packing.targets import mark_targets
from moe.data.tokenizers import Tokenizer


class Conversation(NamedTuple):
    """Holds what becomes of a conversation."""

    tokens: np.ndarray  # between boundaries, with marks on the targets
    num_bytes: int  # of the text of the targets


class Run(NamedTuple):
    """Holds a plain text, or one special token."""

    text: str
    special_id: int | None
    is_target: bool


class Chat:
    """Writes conversations as tokens, and knows which of them a model learns to predict."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, sequence_length: int):
        self.template = template
        self._tokenizer, self._sequence_length = tokenizer, sequence_length
        names = sorted(tokenizer.special_ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    def encode_document(self, text: str, origin: str) -> Conversation:
        """Returns the tokens of a conversation, and which of them are targets.

        The targets are the answers with the end-of-turn token after each, or what the template has
        in {% generation %} if it has that. `text` is a list of messages in JSON, and `origin` the
        place that it comes from. Raises ConfigError for invalid messages, for a template that fails
        on them or ends no answer, and for a conversation that is longer than a row.
        """
        messages = read_messages(text, origin)
        runs = list(self._runs(messages, self.template.parts(messages, origin), origin))
        self._end_of_last_answer(runs, origin)
        tokens, is_target = self._encode(runs)
        boundary = self._tokenizer.boundary_id
        if tokens[0] != boundary:
            tokens, is_target = np.insert(tokens, 0, boundary), np.insert(is_target, 0, False)
        if tokens[-1] != boundary:
            # Where a template ends with an answer, the boundary is its end-of-turn token.
            ends_answer = runs[-1].is_target and runs[-1].special_id is None
            tokens, is_target = np.append(tokens, boundary), np.append(is_target, ends_answer)
        self._check_length(len(tokens), origin)
        texts = [run.text for run in runs if run.is_target and run.special_id is None]
        return Conversation(mark_targets(tokens, is_target), len("".join(texts).encode()))

    def _check_length(self, num_tokens: int, origin: str) -> None:
        """Raises ConfigError for a conversation that would be cut, and its answer with it."""
        # The last token of a row is only a target, so a row has room for one more.
        if num_tokens > self._sequence_length + 1:
            raise ConfigError(
                f"{origin}: the conversation has {num_tokens} tokens, and a row has room for "
                f"{self._sequence_length + 1}: set data.sequence_length to at least "
                f"{num_tokens - 1}, or shorten it"
            )

    def encode_prompt(self, messages: Sequence[Message], origin: str) -> np.ndarray:
        """Returns the tokens after which a model writes its answer to the messages.

        `origin` names the messages in the text of a ConfigError.
        """
        parts = self.template.parts(messages, origin, add_generation_prompt=True)
        tokens, _ = self._encode(list(self._runs(messages, parts, origin)))
        boundary = self._tokenizer.boundary_id
        starts = len(tokens) and tokens[0] == boundary
        return tokens if starts else np.insert(tokens, 0, boundary)

    def end_of_turn(self) -> int:
        """Returns the id of the token that ends an answer.

        Raises ConfigError if a prompt's tokens are not those before its answer in training: the
        model would then be asked in another way than it was trained.
        """
        messages = [Message("user", "a"), Message("assistant", "b")]
        origin = "a conversation of two messages"
        text = json.dumps([message._asdict() for message in messages])
        marked = self.encode_document(text, origin).tokens
        prompt = self.encode_prompt(messages[:1], origin)
        if not np.array_equal(marked["token"][: len(prompt)], prompt):
            raise ConfigError(
                f"data.chat_template={show(self.template.name)} writes other text with "
                "add_generation_prompt than before an answer: let it write the same"
            )
        runs = list(self._runs(messages, self.template.parts(messages, origin), origin))
        return self._end_of_last_answer(runs, origin)

    def _end_of_last_answer(self, runs: Sequence[Run], origin: str) -> int:
        """Returns the id of the last target that is not white space: a special token.

        It is the boundary where the text ends with an answer. Raises ConfigError if there is no
        target, and for targets that text follows without a special token between.
        """
        end_id = None
        groups = [list(group) for _, group in itertools.groupby(runs, lambda run: run.is_target)]
        for group in groups:
            # A block of the template often holds the line break after the end of a turn as well.
            written = [run for run in group if run.special_id is not None or run.text.strip()]
            if not (written and group[0].is_target):
                continue
            end_id = written[-1].special_id
            if end_id is None and group is not groups[-1]:
                self._fail_without_end(origin, written[-1].text, "in {% generation %}", "after it")
            end_id = self._tokenizer.boundary_id if end_id is None else end_id
        if end_id is None:
            self.template.fail(origin, "writes nothing that is to be learnt")
        return end_id

    def _runs(
        self, messages: Sequence[Message], parts: Sequence[Part], origin: str
    ) -> Iterator[Run]:
        """Yields the template's output as texts and special tokens, and says what is a target."""
        in_block = any(part.mark == "begin" for part in parts)
        is_target = False  # within an answer and its end, or within a block of the template
        for part in parts:
            if part.mark in ("begin", "end"):
                is_target = part.mark == "begin"
            elif part.mark in ("bos", "eos"):
                yield Run("", self._tokenizer.boundary_id, is_target)
                is_target = is_target and in_block
            elif part.mark:
                if is_target and not in_block:
                    self._fail_without_end(origin, part.text)
                is_target |= messages[int(part.mark)].role == "assistant" and not in_block
                yield Run(part.text, None, is_target)
            for text, special_id in self._split(part.after):
                if special_id is None and is_target and not in_block and text.strip():
                    self._fail_without_end(origin, text)
                yield Run(text, special_id, is_target)
                is_target = is_target and (in_block or special_id is None)

    def _split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yields the plain texts and the special tokens of a text that the template writes."""
        pieces = self._special.split(text) if self._special else [text]
        for number, piece in enumerate(pieces):
            if piece:
                yield piece, self._tokenizer.special_ids[piece] if number % 2 else None

    def _fail_without_end(
        self, origin: str, text: str, place: str = "after an answer", missing: str = "first"
    ) -> NoReturn:
        self.template.fail(
            origin,
            f"writes {show(text)} {place} and no special token (such as eos_token) {missing}, "
            "so that a model could not learn where answers end",
        )

    def _encode(self, runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of runs, and which of them are targets, each [tokens].

        Neighbouring texts become one if both are targets or neither is, so that the tokens before
        an answer are the same in training and in a prompt.
        """
        ids = [np.zeros(0, np.uint32)]
        is_target = [np.zeros(0, bool)]
        for (special_id, target), group in itertools.groupby(runs, lambda run: run[1:]):
            texts = [run.text for run in group]
            if special_id is None:
                ids.append(self._tokenizer.encode("".join(texts)).astype(np.uint32))
            else:
                ids.append(np.full(len(texts), special_id, np.uint32))
            is_target.append(np.full(len(ids[-1]), target))
        return np.concatenate(ids), np.concatenate(is_target)
