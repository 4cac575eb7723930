"""Continues prompts with a run's checkpoint.

Examples:
    python -m launch.generate --workdir=runs/dense_tiny --prompt="def "
    python -m launch.generate --workdir=runs/dense_tiny --prompt="class " --prompt="import " --temperature=0.7 --top_k=40 --seed=1
    python -m launch.generate --workdir=runs/dense_tiny --prompt="" --max_new_tokens=500

Each prompt stands at the start of a document; an empty one lets the model begin. The same flags
give the same text.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import command_line
from moe.config import ConfigError


def generate(
    workdir: Path,
    prompts: Sequence[str],
    *,
    step: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt by a run's checkpoint (the latest). Raises ConfigError for a
    bad run or option.
    """
    from moe.data.tokenizers import make_tokenizer
    from moe.inference.generate import Sampling, check_sampling, generate
    from moe.training import start, trainer  # load JAX, which --help need not wait for

    sampling = Sampling(temperature, top_k, top_p)
    check_sampling(sampling, max_new_tokens)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} is out of range: set it to at least 0 and less than 2**32")
    for prompt in prompts:
        if (
            prompt.encode(errors="ignore").decode() != prompt
        ):  # bytes of the command line that are no text
            raise ConfigError(f"prompt={prompt!r} is not UTF-8: write it in UTF-8")
    config, program, variables, step = trainer.load_run(workdir, step)
    start.check_finite(workdir / "checkpoints" / str(step), variables)
    tokenizer = make_tokenizer(config.data)
    tokens = [[tokenizer.boundary_id, *tokenizer.encode(prompt)] for prompt in prompts]
    continued = generate(
        program.model,
        variables,
        tokens,
        max_new_tokens=max_new_tokens,
        end_id=tokenizer.boundary_id,
        seed=seed,
        sampling=sampling,
    )
    return [tokenizer.decode(new) for new in continued]


def main(values: flags.FlagValues) -> None:
    options = {
        name: values[name].value
        for name in ("step", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    }
    texts = generate(Path(values.workdir), values.prompt, **options)
    for prompt, text in zip(values.prompt, texts, strict=True):
        print(f"{'-' * 80}\n{prompt}{text}")


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    flags.DEFINE_multi_string(
        "prompt", ["def "], "A text to continue; give the flag again for more."
    )
    flags.DEFINE_integer("step", None, "The checkpoint's step; the latest by default.")
    flags.DEFINE_integer("max_new_tokens", 256, "Tokens to add to each prompt at most.")
    flags.DEFINE_float(
        "temperature", 1.0, "0 takes the likeliest token; lower than 1 sharpens, higher flattens."
    )
    flags.DEFINE_integer("top_k", 0, "Draws among the k likeliest tokens; 0 is all.")
    flags.DEFINE_float(
        "top_p", 1.0, "Draws among the likeliest tokens that make up this probability; 1 is all."
    )
    flags.DEFINE_integer("seed", 0, "Seed of the draws.")
    command_line.run(main, __doc__)
