"""When a run stops before the end of its job: early enough for its longest save."""

import time

import pytest

from moe.training.vote import asks_to_stop, time_to_stop


@pytest.mark.parametrize(
    ("length", "save_seconds", "spare"),
    [
        (36_000, 0, 120),
        (36_000, 30, 120),
        (36_000, 100, 200),
        (600, 10, 60),  # a short job: a tenth of it
        (600, 100, 200),
        (600, 400, 300),  # never more than half of it, or it would not get further
    ],
)
def test_a_run_leaves_twice_the_time_of_its_longest_save(
    length: int, save_seconds: float, spare: int
) -> None:
    environment = {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": str(1000 + length)}
    assert time_to_stop(environment, save_seconds) == 1000 + length - spare


def test_without_a_start_the_time_of_the_job_is_not_known() -> None:
    assert time_to_stop({"SLURM_JOB_END_TIME": "5000"}, 400) == 5000 - 800
    assert time_to_stop({}, 400) is None


def test_a_run_is_asked_to_stop_once_a_save_has_taken_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saves = [1.0]
    environment = {"SLURM_JOB_END_TIME": str(int(time.time()) + 10_000)}
    asked = asks_to_stop(lambda: False, environment, lambda: max(saves))
    assert not asked()
    saves.append(6000.0)
    assert asked() and asked()
    assert caplog.text.count("SLURM's time limit is near") == 1
