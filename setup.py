"""What the package requires, from requirements.txt: its first paragraph to import it, the second
for the extra `run`.
"""

from pathlib import Path

from setuptools import setup

TEXT = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8")
LINES = [[line.split("#")[0].strip() for line in part.splitlines()] for part in TEXT.split("\n\n")]
IMPORT, RUN = ([line for line in part if line] for part in LINES)

setup(
    install_requires=IMPORT,
    extras_require={
        "run": RUN,
        "cpu": [],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # The compilers of chips that are not here, for `pytest -m aot`.
        "aot": ["jax-cuda13-plugin<0.12", "jax[tpu]"],
        "test": [
            "build>=1.2",
            "equinox>=0.13",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff==0.17.*",
            "safetensors>=0.5",
            "setuptools>=77",
        ],
    },
)
