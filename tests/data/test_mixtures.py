"""Tests that a mixture's examples follow from their numbers, with exact shares of each source."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import MIXTURE_BLOCK, ConfigError, DataConfig, RunConfig, SourceConfig, TrainConfig
from moe.data.loader import make_loader
from moe.data.mixtures import (
    Mixture,
    TrainingRows,
    describe_sources,
    make_mixture,
    open_training,
    open_validation,
    row_of_example,
)
from moe.data.rows import JoinedRows
from moe.data.sources import check_dataset

BLOCK = MIXTURE_BLOCK


@dataclasses.dataclass(frozen=True)
class FakeRows:
    """Has rows that say who they are, as many as are asked for, without any memory."""

    source: str
    num_rows: int
    sha256: str = "0"

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        return {"row": np.array([sum(self.source.encode()), index], np.int64)}


def data(stages: tuple[int, ...] = (0,), **weights: tuple[float, ...]) -> DataConfig:
    sources = [SourceConfig(name, dataset=name, weights=weights[name]) for name in weights]
    return DataConfig(mixture=tuple(sources), stages=stages)


def rows_of(config: DataConfig, seed: int = 0, **num_rows: int) -> TrainingRows:
    sources = {
        source.name: FakeRows(source.name, num_rows[source.name]) for source in config.sources
    }
    return TrainingRows(JoinedRows(sources), make_mixture(config, seed))


def places(mixture: Mixture, examples: range) -> list[tuple[int, int]]:
    return [mixture.locate(example) for example in examples]


def test_a_block_has_the_exact_quotas_by_largest_remainder():
    mixture = make_mixture(data(a=(3.0,), b=(2.0,), c=(2.0,)), seed=0)
    # 65,536 / 7 is 9,362.29: the shares are 28,086.86, 18,724.57 and 18,724.57.
    assert mixture.quotas == ((28_087, 18_725, 18_724),)
    for first in (0, 3 * BLOCK):
        found = Counter(source for source, _ in places(mixture, range(first, first + BLOCK)))
        assert [found[source] for source in range(3)] == [28_087, 18_725, 18_724]


def test_the_order_never_changes():
    """Runs that were started with an older version must go on with the same rows."""
    config = data((0, 100), a=(3.0, 1.0), b=(1.0, 1.0))
    order = [source for source, _ in places(make_mixture(config, seed=5), range(90, 120))]
    assert "".join("ab"[source] for source in order) == "abaaababbabaabbbbababbabaaaaba"


@pytest.mark.parametrize("stages", [(0,), (0, 70_000), (0, 1, 2), (0, BLOCK, 2 * BLOCK + 9)])
def test_each_source_counts_its_own_examples(stages: tuple[int, ...]):
    weights = [
        tuple((1.0, 2.0, 5.0)[(stage + i) % 3] for stage in range(len(stages))) for i in range(3)
    ]
    mixture = make_mixture(data(stages, **dict(zip("abc", weights, strict=True))), seed=1)
    found = [0, 0, 0]
    for example in range(2 * BLOCK + 100):
        source, number = mixture.locate(example)
        assert number == found[source]
        if example % 9_973 == 0:
            assert mixture.counts(example) == found
        found[source] += 1
    assert mixture.counts(2 * BLOCK + 100) == found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_example_is_found_without_those_before_it(draw: st.DataObject):
    """The last one before an example that is of the same source has the number before it."""
    starts = draw.draw(st.lists(st.integers(1, 2**50), max_size=3, unique=True).map(sorted))
    count = draw.draw(st.integers(1, 4))
    weights = st.lists(st.floats(0.01, 1), min_size=len(starts) + 1, max_size=len(starts) + 1)
    sources = {name: tuple(draw.draw(weights)) for name in "abcd"[:count]}
    mixture = make_mixture(data((0, *starts), **sources), seed=draw.draw(st.integers(0, 2**32 - 1)))
    near = draw.draw(st.sampled_from([0, *starts])) + draw.draw(st.integers(0, BLOCK))
    counts = mixture.counts(near)
    assert sum(counts) == near
    for example in range(near, near + 50):
        source, number = mixture.locate(example)
        assert number == counts[source]
        counts[source] += 1


def test_a_stage_has_its_own_weights_from_its_first_example_on():
    mixture = make_mixture(data((0, 1000), a=(1.0, 0.001), b=(0.001, 1.0)), seed=0)
    first = [source for source, _ in places(mixture, range(1000))]
    second = [source for source, _ in places(mixture, range(1000, 2000))]
    assert sum(first) < 20 and sum(second) > 980


def test_seed_stage_and_block_each_have_an_order_of_their_own():
    mixtures = [
        make_mixture(data((0, 2 * BLOCK), a=(1.0, 1.0), b=(1.0, 1.0)), seed) for seed in (0, 1)
    ]
    orders = {
        tuple(source for source, _ in places(mixture, range(first, first + 64)))
        for mixture in mixtures
        for first in (0, BLOCK, 2 * BLOCK)
    }
    assert len(orders) == 6


def test_the_order_in_which_sources_are_named_makes_no_difference():
    assert data(a=(1.0,), b=(2.0,)) == data(b=(2.0,), a=(1.0,))


@pytest.mark.parametrize("config", [DataConfig(), data(only=(0.3,))])
def test_a_single_source_has_the_order_of_a_run_without_a_mixture(config: DataConfig):
    name = config.sources[0].name
    rows = TrainingRows(JoinedRows({name: FakeRows("a", 11)}), make_mixture(config, seed=7))
    for example in (0, 5, 11, 300, 2**40):
        assert rows.example(example)["row"][1] == row_of_example(example, 11, seed=7)


def test_a_source_is_read_in_epochs_of_its_own():
    rows = rows_of(data(a=(3.0,), b=(1.0,)), a=7, b=50)
    read: dict[int, list[int]] = {97: [], 98: []}
    for example in range(BLOCK // 64):
        source, index = rows.example(example)["row"].tolist()
        read[source].append(index)
    for epoch in range(len(read[97]) // 7):
        assert sorted(read[97][7 * epoch : 7 * epoch + 7]) == list(range(7))
    for epoch in range(len(read[98]) // 50):
        assert sorted(read[98][50 * epoch : 50 * epoch + 50]) == list(range(50))


def test_rows_and_examples_beyond_32_bits():
    """14.8e12 tokens in rows of 4,096 are 3.6e9 rows."""
    num_rows, first = 3_600_000_000, 5_000_000_000
    rows = rows_of(data(a=(1.0,), b=(1.0,)), a=num_rows, b=num_rows)
    loader = make_loader(rows, batch_size=512, examples=first, host_rows=slice(None))
    sources, numbers = next(loader)["row"].T
    loader.close()
    assert len({*zip(sources.tolist(), numbers.tolist(), strict=True)}) == 512
    assert numbers.min() >= 0 and numbers.max() > 2**31
    assert numbers.tolist() == [rows.example(first + i)["row"][1] for i in range(512)]
    alone = TrainingRows(JoinedRows({"": FakeRows("a", num_rows)}), make_mixture(DataConfig(), 0))
    assert max(alone.example(i)["row"][1] for i in range(100)) > 2**31
    joined = JoinedRows({"a": FakeRows("a", num_rows), "b": FakeRows("b", 3)})
    assert len(joined) == num_rows + 3
    assert joined[num_rows + 1]["row"].tolist() == [98, 1]


@pytest.mark.parametrize(
    "hosts", [[slice(0, 4), slice(4, 8)], [slice(i, i + 2) for i in (0, 2, 4, 6)]]
)
def test_hosts_and_restarts_read_the_same_mixture(hosts: list[slice]):
    rows = rows_of(data((0, 50), a=(3.0, 1.0), b=(1.0, 2.0), c=(1.0, 1.0)), a=7, b=90, c=20)

    def read(examples: int, batches: int, host: slice) -> np.ndarray:
        loader = make_loader(rows, batch_size=8, examples=examples, host_rows=host)
        taken = [batch["row"] for batch in itertools.islice(loader, batches)]
        loader.close()
        return np.stack(taken)

    whole = read(0, 12, slice(None))
    parts = [np.concatenate([read(0, 5, host), read(40, 7, host)]) for host in hosts]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_joined_rows_are_those_of_the_sources_in_order():
    joined = JoinedRows({"a": FakeRows("a", 2), "b": FakeRows("b", 3)})
    assert [joined[i]["row"].tolist() for i in range(5)] == [
        [97, 0],
        [97, 1],
        [98, 0],
        [98, 1],
        [98, 2],
    ]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            joined[index]


def test_the_checksum_covers_all_sources():
    def checksum(**checksums: str) -> str:
        return JoinedRows({name: FakeRows(name, 1, checksums[name]) for name in checksums}).sha256

    assert checksum(a="1", b="2") == checksum(a="1", b="2")
    different = [
        checksum(a="1", b="2"),
        checksum(a="2", b="1"),
        checksum(a="1", b="3"),
        checksum(a="1"),
    ]
    assert len(set(different)) == 4
    assert JoinedRows({"": FakeRows("", 1, "1")}).sha256 == "1"


def run_config(**max_epochs: float) -> RunConfig:
    sources = [
        SourceConfig(name, dataset=name, weights=(1.0,), max_epochs=limit)
        for name, limit in max_epochs.items()
    ]
    train = TrainConfig(steps=100, batch_size=16)
    return RunConfig(data=DataConfig(mixture=tuple(sources)), train=train)


def open_fake(config: RunConfig, split: str) -> FakeRows:
    assert not config.data.mixture
    return FakeRows(f"{config.data.dataset}/{split}", 100)


def test_a_source_that_would_be_read_too_often_is_refused_in_one_line():
    open_training(run_config(a=9.0, b=0.0), open_fake)
    with pytest.raises(ConfigError) as error:
        open_training(run_config(a=4.0, b=0.0), open_fake)
    found = str(error.value)
    assert found.startswith("data.mixture.a.max_epochs=4 is less than the 8.0")
    assert "100 steps of 16 rows" in found and "100 rows" in found and "\n" not in found
    assert "set train.steps to about 49" in found or "set train.steps to about 50" in found
    with pytest.raises(ConfigError, match=r"lower its weights, or raise max_epochs$"):
        open_training(run_config(a=0.01, b=0.0), open_fake)  # one step is too many


def test_shares_and_epochs_are_described():
    config = run_config(a=9.0, b=0.0)
    first, second = describe_sources(config, open_training(config, open_fake))
    assert (first["name"], first["source"], first["num_rows"]) == ("a", "a/train", 100)
    assert first["share"] + second["share"] == pytest.approx(1)
    assert first["epochs"] == pytest.approx(8, rel=0.1)
    assert first["fullness"] is None


def test_a_mistake_names_the_source(tmp_path: Path):
    config = RunConfig(
        data=dataclasses.replace(data(good=(1.0,), bad=(1.0,)), directory=str(tmp_path))
    )

    def refuse(config: RunConfig, split: str) -> FakeRows:
        if config.data.dataset == "bad":
            raise ConfigError("it is bad: take another")
        return FakeRows("good", 3)

    for opened in (open_training, open_validation):
        with pytest.raises(ConfigError, match=r"^data\.mixture\.bad: it is bad: take another$"):
            opened(config, refuse)
    with pytest.raises(ConfigError, match=r"^data\.mixture\.bad: data\.dataset='bad'"):
        check_dataset(config.data)
