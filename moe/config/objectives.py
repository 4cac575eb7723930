"""States what each task adds to the vocabulary, and how long the rows of span corruption are.

The special tokens have the names by which published tokenizers declare them, so that such a
tokenizer's own ids are used.
"""

from typing import Literal, NamedTuple

from moe.config.checks import ConfigError

TaskName = Literal[
    "language_modelling", "fill_in_the_middle", "masked_tokens", "span_corruption", "custom"
]

MASK_TOKEN = "[MASK]"
# The tokens before a prefix, before a suffix and before a middle, in this order.
MIDDLE_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
MAX_SENTINELS = 100
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(MAX_SENTINELS))

TASK_TOKENS = (MASK_TOKEN, *MIDDLE_TOKENS, *SENTINELS)  # of all tasks

NOISE_DENSITY = 0.15  # the share of tokens that masking and span corruption hide
_MEAN_SPAN_LENGTH = 3.0


def special_tokens(task: TaskName) -> tuple[str, ...]:
    """Returns the tokens that a task adds to the vocabulary of the run's tokenizer."""
    match task:
        case "fill_in_the_middle":
            return MIDDLE_TOKENS
        case "masked_tokens":
            return (MASK_TOKEN,)
        case "span_corruption":
            return SENTINELS
        case "language_modelling" | "custom":
            return ()


def causal_kinds(task: TaskName) -> tuple[bool, ...]:
    """Returns whether the attention of a task's model is causal: both where its parts differ."""
    match task:
        case "language_modelling" | "fill_in_the_middle":
            return (True,)
        case "masked_tokens":
            return (False,)
        case "span_corruption" | "custom":
            return (True, False)


def check_decoder(name: str, task: TaskName) -> None:
    """Raises ConfigError for a task whose model cannot continue text, which only decoders can.

    `name` is that of the run with the task, for the message.
    """
    if task in ("masked_tokens", "span_corruption"):
        raise ConfigError(
            f"{name} has task={task!r}, whose model does not continue text: give the run of a "
            "decoder, whose task is 'language_modelling' or 'fill_in_the_middle'"
        )


class SpanCounts(NamedTuple):
    """Counts what becomes of a text of one document under span corruption."""

    tokens: int  # of the text
    noise: int  # tokens that are hidden
    spans: int  # spans of neighbouring tokens into which the hidden ones are divided

    @property
    def inputs(self) -> int:
        """Returns the tokens of the encoder: those left, a sentinel for each span, and an end."""
        return self.tokens - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """Returns the tokens of the decoder: each span after its sentinel, and an end."""
        return self.noise + self.spans + 1


def span_counts(tokens: int) -> SpanCounts:
    """Counts the hidden tokens and spans of a text (Raffel et al. 2020, section 3.1.4).

    A text of one token has nothing to hide, as what is left must not be empty.
    """
    noise = min(max(round(NOISE_DENSITY * tokens), 1), tokens - 1)
    if noise < 1:
        return SpanCounts(tokens, 0, 0)
    return SpanCounts(tokens, noise, max(round(noise / _MEAN_SPAN_LENGTH), 1))


def corrupted_row(inputs: int) -> SpanCounts:
    """Returns the counts of the longest text that becomes at most so many tokens of the encoder.

    A token more makes the encoder's row longer by one token or by none, so every length from 3 on
    is reached. Raises ConfigError for a row that has too few tokens, or needs too many sentinels.
    """
    if inputs < 3:
        raise ConfigError(
            f"data.sequence_length={inputs} has no room for a token, a sentinel and an end: "
            "set data.sequence_length to at least 3"
        )
    # A row of many tokens becomes nine tenths as long. The search begins a little below that.
    counts = span_counts(max(inputs - 1, int(inputs / 0.9) - 4))
    while (longer := span_counts(counts.tokens + 1)).inputs <= inputs:
        counts = longer
    if counts.spans > MAX_SENTINELS:
        raise ConfigError(
            f"data.sequence_length={inputs} needs {counts.spans} sentinels for its spans, and "
            f"there are {MAX_SENTINELS}: set data.sequence_length to at most {_longest_row()}"
        )
    return counts


def _longest_row() -> int:
    """Returns the longest row of the encoder whose spans do not need too many sentinels."""
    tokens = 1
    while span_counts(tokens + 1).spans <= MAX_SENTINELS:
        tokens += 1
    return span_counts(tokens).inputs
