"""Tests how the points of a sweep become checked runs, and how equal runs are found."""

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe.config import ConfigError, DataConfig, MeshConfig, RunConfig, TrainConfig
from moe.scaling.experiments import sweep
from moe.scaling.experiments.sweep import Point, expand, grid, identity, overrides_between, repeat

ROOT = Path(__file__).parents[3]
BASE = RunConfig()


def test_a_point_changes_the_base() -> None:
    (run,) = expand(BASE, [Point("wide", {"model.model_dim": 512, "model.moe.num_experts": 4})])
    model = dataclasses.replace(
        BASE.model, model_dim=512, moe=dataclasses.replace(BASE.model.moe, num_experts=4)
    )
    assert run.config == dataclasses.replace(BASE, model=model)
    assert expand(BASE, [("wide", {"model.model_dim": 512})])[0].config.model.model_dim == 512


def test_paths_and_meshes_do_not_make_another_run() -> None:
    elsewhere = dataclasses.replace(
        BASE, data=DataConfig(directory="/elsewhere"), mesh=MeshConfig(data=1, fsdp=-1)
    )
    assert identity(elsewhere) == identity(BASE)
    others = [
        dataclasses.replace(BASE, seed=1),
        dataclasses.replace(BASE, train=TrainConfig(steps=999)),
        dataclasses.replace(BASE, data=DataConfig(sequence_length=128)),
    ]
    assert len({identity(config) for config in (BASE, *others)}) == 4


def test_a_field_that_is_added_later_makes_no_other_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(dataclasses.replace(BASE, seed=5))
    monkeypatch.setattr(sweep, "_default_fields", sweep._default_fields.__wrapped__)
    as_dict = RunConfig.to_dict
    monkeypatch.setattr(RunConfig, "to_dict", lambda self: as_dict(self) | {"added": 1})
    assert identity(dataclasses.replace(BASE, seed=5)) == before
    assert identity(BASE) != before


def test_equal_runs_are_found_by_content() -> None:
    points = [
        Point("a", {"seed": 1}),
        Point("b", {"seed": 1, "data.directory": "/elsewhere"}),
        Point("c", {"seed": 2}),
        Point("d", {"seed": 1, "train.steps": 1000}),  # which is the default
    ]
    assert [run.same_as for run in expand(BASE, points)] == [None, "a", None, "a"]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([Point("a", {"model.model_dims": 4})], "a: model.model_dims=4 is not a field: did you"),
        ([Point("a", {"train.steps": "9"})], "a: train.steps='9' has type str"),
        ([Point("a", {}), Point("a", {"seed": 1})], "a names two runs"),
        (
            [Point("a", {}), Point("a/b", {"seed": 1})],
            "a/b would lie in the directory of the run a",
        ),
        ([Point("../a", {})], "'../a' cannot name a run's directory"),
        ([Point("a//b", {})], "'a//b' cannot name a run's directory"),
        ([Point(f"a/{'b' * 256}", {})], "b' cannot name a run's directory"),
        (["a"], "get_sweep() yielded 'a': yield Point"),
        ([Point("a", None)], "get_sweep() yielded Point(name='a', overrides=None"),
        ([Point("a", {"seed": 1}, "b", 10)], "a: fork_from=b is no run of the sweep"),
        ([Point("a", {"seed": 1}, ["b"], 10)], "fork_from=['b'], fork_step=10): yield Point"),
        ([Point("a", {"seed": 1}, "b", "10")], "fork_from='b', fork_step='10'): yield Point"),
        (
            [Point("t", {}), Point("a", {"train.steps": 9}, "t", 9)],
            "a: fork_step=9 is not a step before the end of this run and of t",
        ),
        (
            [
                Point("t", {}),
                Point("a", {"train.steps": 90}, "t", 9),
                Point("b", {"train.steps": 80}, "a", 9),
            ],
            "b: fork_from=a is a fork itself",
        ),
    ],
)
def test_a_mistake_gets_one_line(points: Sequence[Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(BASE, points)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_fork_of_an_equal_run_starts_from_the_one_that_is_trained() -> None:
    points = [
        Point("trunk", {}),
        Point("again", {}),
        Point("fork", {"train.steps": 900}, "again", 5),
    ]
    assert expand(BASE, points)[2].fork_from == "trunk"


def test_a_trunk_is_trained_rather_than_an_equal_fork() -> None:
    points = [Point("fork", {"train.steps": 80}, "trunk", 40), Point("trunk", {"train.steps": 80})]
    fork, trunk = expand(BASE, points)
    assert (fork.same_as, trunk.same_as) == ("trunk", None)
    points = [
        Point("long", {"train.steps": 100}),
        Point("fork", {"train.steps": 80}, "long", 50),
        Point("trunk", {"train.steps": 80}),
        Point("short", {"train.steps": 60}, "trunk", 40),
    ]
    assert [run.same_as for run in expand(BASE, points)] == [None, "trunk", None, None]
    assert expand(BASE, points)[3].fork_from == "trunk"


def test_a_grid_has_every_combination() -> None:
    points = list(grid({"optimizer.learning_rate": [0.1, 0.2], "train.batch_size": [8, 16]}))
    assert [point.name for point in points] == [
        "learning_rate=0.1/batch_size=8",
        "learning_rate=0.1/batch_size=16",
        "learning_rate=0.2/batch_size=8",
        "learning_rate=0.2/batch_size=16",
    ]
    assert points[1].overrides == {"optimizer.learning_rate": 0.1, "train.batch_size": 16}
    assert len(expand(BASE, points)) == 4


def test_points_are_repeated_seed_by_seed() -> None:
    points = [Point("a", {"train.steps": 9}), Point("b", {"train.steps": 8}, "a", 2)]
    repeated = list(repeat(points, (3, 5)))
    assert [point.name for point in repeated] == ["a/seed_3", "b/seed_3", "a/seed_5", "b/seed_5"]
    assert repeated[3] == Point("b/seed_5", {"train.steps": 8, "seed": 5}, "a/seed_5", 2)
    with pytest.raises(ConfigError, match=r"seeds=\(1, 1\) has a seed twice"):
        list(repeat(points, (1, 1)))


@pytest.mark.parametrize("value", [3, 0.5, "stdlib", None])
def test_one_value_in_the_place_of_several_is_refused_at_the_call(value: Any) -> None:
    """Not later, when nobody knows any more which line of a user's file has made the call."""
    for make in (lambda: grid({"seeds": value}), lambda: repeat([], value)):
        with pytest.raises(ConfigError, match=rf"^seeds={value!r} is one value, .*\[{value!r}\]$"):
            make()


def test_overrides_lead_from_the_base_to_the_config() -> None:
    changes = {"optimizer.learning_rate": 0.5, "model.moe.num_experts": 8, "seed": 3}
    (run,) = expand(BASE, [Point("a", changes)])
    assert overrides_between(BASE, run.config) == changes
    assert overrides_between(BASE, BASE) == {}


@pytest.mark.slow
def test_ten_thousand_runs_are_specified_within_ten_seconds() -> None:
    """In a process of its own, which must not import JAX. The time is the processor's.

    A slow machine may take longer: four times as long as for building so many configs.
    """
    program = """
        import sys, time
        begin = time.process_time()
        from launch.sweep import describe
        from launch.sweep_file import plan
        from moe.config import RunConfig
        from moe.scaling.experiments.sweep import grid
        from pathlib import Path
        rates = [0.001 * (1 + n) for n in range(100)]
        points = list(grid({"optimizer.learning_rate": rates, "seed": range(100)}))
        points += [point._replace(name="again/" + point.name) for point in points[:5]]
        text = describe(plan("x.py", RunConfig(), points, []), Path("/nowhere"), 1e9)
        assert text.count("learning_rate=") == 10_010, text[-2000:]
        assert "10005 runs, 10000 of them different" in text, text[-500:]
        assert "jax" not in sys.modules
        seconds, values = time.process_time() - begin, RunConfig().to_dict()
        begin = time.process_time()
        for _ in range(1000):
            RunConfig.from_config_dict(values)
        building = 10 * (time.process_time() - begin)
        assert seconds < max(10, 4 * building), (seconds, building)
        print(seconds, building)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True, timeout=200
    )
