"""Measures preparation and the loader against what training needs, and their memory.

`-s` shows what was measured. The bounds hold on a machine that is several times slower than the
one on which they were set.
"""

import gzip
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest
import zstandard

from moe.config import DataConfig, RunConfig
from moe.data.loader import make_loader
from moe.data.mixtures import TrainingRows, make_mixture
from moe.data.prepare import prepare
from moe.data.rows import JoinedRows
from moe.data.sources import open_documents
from moe.data.tokenizers.training import train_bpe

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


@pytest.mark.parametrize(("tokenizer", "least"), [("byte", 1.6), ("bpe", 0.7)])
def test_short_documents_are_prepared_quickly(tmp_path: Path, tokenizer: str, least: float):
    """What is done once for each document must not count: these have 90 bytes."""
    for split in ("train", "validation"):
        (tmp_path / "text" / split).mkdir(parents=True)
        numbers = range(2**16)
        lines = [f"{split} document {number} says {number * 7919 % 1000} " for number in numbers]
        text = "".join(json.dumps({"text": 3 * line}) + "\n" for line in lines)
        (tmp_path / "text" / split / "a.jsonl").write_text(text)
    if tokenizer == "bpe":
        tokenizer = str(tmp_path / "bpe.json")
        library = Path(sysconfig.get_path("stdlib"))
        texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))]
        Path(tokenizer).write_text(train_bpe(texts, 8192).tokenizer_json(8192))
    config = DataConfig(
        dataset=f"text:{tmp_path}/text", tokenizer=tokenizer, directory=str(tmp_path / "cache")
    )
    open_documents(config, "train")
    begun = time.process_time()
    rows = prepare(config, "train", num_workers=1)
    speed = rows.num_bytes / (time.process_time() - begun) / 1e6
    print(f"prepared documents of 90 bytes with {tokenizer}: {speed:.2f} MB/s a core")
    assert speed > least


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_text_is_copied_faster_than_it_is_prepared(tmp_path: Path, ending: str):
    """One process copies the user's files, so this must not be what preparation waits for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))] * 8
    folder = tmp_path / "text" / "train"
    for split in ("train", "validation"):
        (tmp_path / "text" / split).mkdir(parents=True)
    (tmp_path / "text" / "validation" / "held_out.txt").write_text("text")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    match ending:
        case "txt":
            for number, text in enumerate(texts):
                (folder / f"{number}.txt").write_text(text, encoding="utf-8")
        case "parquet":
            pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=200)
        case _:
            compress = {"gz": gzip.compress, "zst": zstandard.compress, "jsonl": lambda text: text}
            (folder / f"a.{ending}").write_bytes(compress[ending.rpartition(".")[2]](lines))
    config = DataConfig(dataset=f"text:{tmp_path}/text", directory=str(tmp_path / "cache"))
    begun = time.process_time()
    open_documents(config, "train")
    seconds = time.process_time() - begun
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{ending}: copied {megabytes:.1f} MB in {seconds:.2f} s, {megabytes / seconds:.0f} MB/s")
    assert megabytes / seconds > 10


def test_a_step_does_not_wait_for_data_after_the_first(tmp_path: Path):
    """The first line of metrics includes the time in which the threads begin to read ahead."""
    from configs import dense_tiny
    from moe.training.trainer import fit
    from moe.workdir.tracking import read_metrics

    config = dense_tiny.get_config()
    config.train.update(steps=40, log_every=5, eval_every=40, eval_batches=1, checkpoint_every=40)
    fit(RunConfig.from_config_dict(config), tmp_path)
    name = "train/data_wait_fraction"
    waited = [line[name] for line in read_metrics(tmp_path) if name in line][1:]
    print(f"the share of a step's time spent waiting for data: {waited}")
    assert len(waited) >= 6 and statistics.median(waited) < 0.02


# Prepares a million documents, and prints their number and the process's peak of memory in KiB.
PREPARE_A_MILLION = r"""
import re, sys
from pathlib import Path

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
# getrusage's ru_maxrss would begin with the peak of the process that started this one.
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
print(rows.num_documents, peak[1])
"""


def test_a_million_documents_take_less_than_a_gibibyte(tmp_path: Path):
    """The process that is measured also does a worker's part."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for packing in ("concat", "best_fit"):
        done = subprocess.run(
            [sys.executable, "-c", PREPARE_A_MILLION, packing, str(tmp_path)],
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
