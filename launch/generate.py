"""Continues prompts with a run's checkpoint.

Examples:
    python -m launch.generate --workdir=runs/dense_tiny --prompt="def "
    python -m launch.generate --workdir=runs/dense_tiny --prompt="class " --prompt="import " \\
        --temperature=0.7 --top_k=40 --seed=1
    python -m launch.generate --workdir=runs/dense_tiny --prompt="" --max_new_tokens=500
    python -m launch.generate --workdir=runs/fill_in_the_middle_tiny --prompt="def add(a, b):" \\
        --suffix="    return total"

Each prompt is the start of a document; after an empty one the model writes the document from its
first token on. With --suffix the model writes what stands between the prompt and the suffix, as a
run of task "fill_in_the_middle" has learnt it. To a run that was trained on conversations, a prompt
is what a user says, and its chat template asks for the answer. The same flags give the same text.

The text of the first prompt is shown while it is written, and that of the others after it.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from launch import command_line
from launch.kernel_check import check_kernels
from moe.config import ConfigError, RunConfig
from moe.config.checks import is_unicode, locale_advice
from moe.config.objectives import check_decoder, special_tokens
from moe.inference.sampling import Sampling, check_sampling
from moe.storage.paths import RunPath, run_path
from moe.training.progress import Stream
from moe.workdir.identity import read_config, saved_step, use_stored_tokenizer

if TYPE_CHECKING:
    from moe.data.tokenizers import Tokenizer


def generate(
    workdir: RunPath,
    prompts: Sequence[str],
    *,
    suffix: str | None = None,
    step: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    kernels: Mapping[str, Any] | None = None,
) -> list[str]:
    """Returns the continuation of each prompt by a run's checkpoint (the latest).

    With a `suffix` it is the text between prompt and suffix. `kernels` is what `check_kernels`
    returned. Raises ConfigError for an unknown run or step, and for a bad prompt or option.
    """
    parts = stream(
        workdir,
        prompts,
        suffix=suffix,
        step=step,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        kernels=kernels,
    )
    return ["".join(texts) for texts in zip(*parts, strict=True)]


def stream(
    workdir: RunPath,
    prompts: Sequence[str],
    *,
    suffix: str | None = None,
    step: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    kernels: Mapping[str, Any] | None = None,
) -> Iterator[list[str]]:
    """Yields the next characters of each prompt's continuation while they are sampled.

    All parts of a prompt, one after another, are what `generate` returns for it. A part may be
    empty. The arguments and errors are those of `generate`.
    """
    _check_input(workdir, prompts, suffix, seed, step)
    check_sampling(sampling := Sampling(temperature, top_k, top_p), max_new_tokens)
    # These load JAX, which --help need not wait for.
    from moe.data.tokenizers import make_tokenizer
    from moe.inference.generate import stream as stream_tokens
    from moe.training import start, trainer

    config, program, variables, step = trainer.load_run(workdir, step, kernels=kernels)
    start.check_finite(workdir / "checkpoints" / str(step), variables)
    tokenizer = make_tokenizer(config.data, special_tokens(config.task))
    starts, end_id = _starts_and_end(config, tokenizer, prompts, suffix)
    parts = stream_tokens(
        program.model,
        variables,
        starts,
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        seed=seed,
        sampling=sampling,
    )
    return _decode(tokenizer, starts, parts)


def _decode(
    tokenizer: "Tokenizer", starts: Sequence[np.ndarray], parts: Iterable[Sequence[np.ndarray]]
) -> Iterator[list[str]]:
    """Yields the text of each part of the new tokens, in whole characters."""
    from moe.data.tokenizers import TextStream

    # The prompt says whether a space belongs between it and the first word.
    streams = [TextStream(tokenizer, prompt) for prompt in starts]
    for new in parts:
        yield [stream.push(ids) for stream, ids in zip(streams, new, strict=True)]
    yield [stream.finish() for stream in streams]


def _starts_and_end(
    config: RunConfig, tokenizer: "Tokenizer", prompts: Sequence[str], suffix: str | None
) -> tuple[list[np.ndarray], int]:
    """Returns the tokens after which the model writes, for each prompt, and the token that ends it.

    A prompt to a run with a chat template is what a user says.
    """
    from moe.data.chat import make_chat
    from moe.data.chat.messages import Message
    from moe.tasks.fill_in_the_middle import middle_prompt

    boundary = tokenizer.boundary_id
    if chat := make_chat(config.data, tokenizer):
        starts = [chat.encode_prompt([Message("user", text)], "the prompt") for text in prompts]
        return starts, chat.end_of_turn()
    if suffix is not None:
        return [middle_prompt(config, text, suffix) for text in prompts], boundary
    return [tokenizer.encode_prompt(text) for text in prompts], boundary


def _check_input(
    workdir: RunPath, prompts: Sequence[str], suffix: str | None, seed: int, step: int | None
) -> None:
    """Raises ConfigError for bad input, and for a run that has not learnt what it asks for."""
    _check_texts([*prompts, suffix or ""], seed)
    config = read_config(workdir)
    task = config.task
    check_decoder(f"workdir={workdir}", task)
    if suffix is not None and task != "fill_in_the_middle":
        raise ConfigError(
            f"suffix={suffix!r} needs a run of task 'fill_in_the_middle', and workdir={workdir} "
            f"has task={task!r}: leave suffix out, or give another workdir"
        )
    use_stored_tokenizer(workdir, config, must_match=False)  # which refuses a damaged copy
    saved_step(workdir, step)


def _check_texts(prompts: Sequence[str], seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} is out of range: set it to at least 0 and less than 2**32")
    for prompt in prompts:
        if not is_unicode(prompt):
            raise ConfigError(f"prompt={prompt!r} is not UTF-8: write it in UTF-8{locale_advice()}")


def prepare(values: flags.FlagValues) -> Mapping[str, Any]:
    """Checks the flags, and then the kernels of the run, of which it returns what is known."""
    workdir = run_path(values.workdir)
    _check_input(workdir, values.prompt, values.suffix, values.seed, values.step)
    sampling = Sampling(values.temperature, values.top_k, values.top_p)
    check_sampling(sampling, values.max_new_tokens)
    return check_kernels(read_config(workdir))


def main(values: flags.FlagValues, kernels: Mapping[str, Any]) -> None:
    parts = stream(
        run_path(values.workdir),
        values.prompt,
        suffix=values.suffix,
        step=values.step,
        max_new_tokens=values.max_new_tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
        kernels=kernels,
    )
    # An answer begins a line of its own, and other text continues the prompt.
    between = "\n" if read_config(run_path(values.workdir)).data.chat_template else ""
    heads = [f"{'-' * 80}\n{prompt}{between}" for prompt in values.prompt]
    written = [""] * len(heads)
    print(heads[0], end="")
    for texts in parts:
        print(texts[0], end="", flush=True)
        if isinstance(sys.stdout, Stream) and sys.stdout.is_abandoned:
            print("stopped: nobody reads the text any more", file=sys.stderr)
            return
        written = [text + new for text, new in zip(written, texts, strict=True)]
    tail = values.suffix or ""
    print(tail)
    for head, text in zip(heads[1:], written[1:], strict=True):
        print(f"{head}{text}{tail}")


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    flags.DEFINE_multi_string("prompt", ["def "], "A text to continue")
    flags.DEFINE_string("suffix", None, "The text that follows what the model writes.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; the latest by default.")
    flags.DEFINE_integer("max_new_tokens", 256, "Tokens to add to each prompt at most.")
    flags.DEFINE_float(
        "temperature", 1.0, "0 takes the likeliest token; below 1 likely tokens become more likely."
    )
    flags.DEFINE_integer("top_k", 0, "Draws among the k likeliest tokens; 0 draws among all.")
    flags.DEFINE_float(
        "top_p",
        1.0,
        "Draws among the likeliest tokens that together have this probability; 1 draws among all.",
    )
    flags.DEFINE_integer("seed", 0, "Seed of the draws.")
    command_line.run(main, __doc__, devices=True, prepare=prepare)
