"""Measures preparation and the loader against what training needs, and their memory.

`-s` shows what was measured. The bounds hold on a machine that is several times slower than the
one on which they were set.
"""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe.config import DataConfig
from moe.data.loader import make_loader
from moe.data.mixtures import TrainingRows, make_mixture
from moe.data.prepare import prepare
from moe.data.rows import JoinedRows
from moe.data.sources import open_documents

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# The step of configs/dense_tiny.py has 12,100 tokens/s on the 2 cores of docs/training.md.
STEP_TOKENS = 12_100


def test_the_loader_is_far_ahead_of_the_tiny_models_step(tmp_path: Path):
    config = DataConfig(sequence_length=256, directory=str(tmp_path))
    open_documents(config, "train")
    begun = time.process_time()
    rows = prepare(config, "train", num_workers=1)
    megabytes = rows.num_bytes / (time.process_time() - begun) / 1e6
    alone = TrainingRows(JoinedRows({"": rows}), make_mixture(config, 0))
    loader = make_loader(alone, batch_size=16, examples=0, host_rows=slice(None))
    next(loader)
    begun = time.process_time()
    for _ in range(400):
        next(loader)
    speed = 400 * 16 * 256 / (time.process_time() - begun)
    loader.close()
    print(f"prepared {megabytes:.1f} MB/s a core; loaded {speed:,.0f} tokens/s a core")
    # Of processor time, since other processes may take the rest.
    assert megabytes > 3
    assert speed > 20 * STEP_TOKENS


def test_a_million_documents_take_less_than_a_gibibyte(tmp_path: Path):
    """The process that is measured also does a worker's part."""
    program = textwrap.dedent("""
        import resource, sys
        from moe.config import DataConfig
        from moe.data import prepare, shards
        from moe.data.sources import Document

        class Many:
            directory = "/nonexistent"

            def __len__(self):
                return 1_000_000

            def between(self, start, stop):
                for number in range(start, min(stop, len(self))):
                    yield Document(f"document {number}: " + "x" * (number % 50), "", {})

        prepare.source_name = lambda config: "many/1.0.0"
        prepare.open_documents = lambda config, split: Many()
        shards.reopen_documents = lambda config, split, directory: Many()
        packing, directory = sys.argv[1:]
        config = DataConfig(packing=packing, sequence_length=1024, directory=directory)
        rows = prepare.prepare(config, "train", 1)
        rows[0], rows[len(rows) - 1]
        print(rows.num_documents, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for packing in ("concat", "best_fit"):
        done = subprocess.run(
            [sys.executable, "-c", program, packing, str(tmp_path)],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        num_documents, kibibytes = map(int, done.stdout.split())
        print(f"{packing}: {kibibytes / 2**20:.2f} GiB; {done.stderr.splitlines()[-1]}")
        assert num_documents == 1_000_000 and kibibytes < 2**20


def test_two_large_splits_are_read_with_256_open_files(tmp_path: Path):
    """Each had 512 open files once."""
    program = textwrap.dedent("""
        import resource, sys
        from moe.config import DataConfig
        from moe.data import prepare

        config = DataConfig(sequence_length=64, directory=sys.argv[1])
        prepare._DOCUMENTS_PER_SHARD, prepare._MAX_SHARDS = 1, 10**6
        splits = [prepare.prepare(config, split, 1) for split in ("train", "train[:99%]")]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        for rows in splits:
            read = [rows[index]["loss_mask"].any() for index in range(0, len(rows), 97)]
            print(len(rows.rows_per_shard), sum(read))
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for line in done.stdout.splitlines():
        num_shards, num_read = map(int, line.split())
        assert num_shards > 400 and num_read > 100
