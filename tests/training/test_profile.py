"""Traces of some steps: the file that Perfetto opens, and the flag that names the steps."""

import gzip
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from launch.train import read_profile_steps
from moe.config import ConfigError
from moe.training.profile import open_profile


def take_steps(profile, count):
    step = jax.jit(lambda x: x @ x)
    x = jnp.ones((64, 64))
    for number in range(1, count + 1):
        profile.begin(number)
        x = step(x)
        profile.end(number, x)


def traced(path):
    """Returns the names of what happened, from a file in the format of Chrome's traces."""
    with gzip.open(path) as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


def test_the_trace_of_the_steps_is_written(tmp_path):
    with open_profile(tmp_path, range(2, 4), 0) as profile:
        take_steps(profile, 5)
        path = tmp_path / "profile" / "steps-2-3-process-00000.json.gz"
        assert list(path.parent.iterdir()) == [path]
    assert any("PjitFunction" in str(name) for name in traced(path))


def test_a_run_that_stops_in_between_writes_what_was_traced(tmp_path):
    with open_profile(tmp_path, range(2, 9), 0) as profile:
        take_steps(profile, 3)
    (path,) = (tmp_path / "profile").iterdir()
    assert traced(path)


def test_steps_that_are_done_already_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), open_profile(tmp_path, range(2, 4), 2):
        pass
    assert caplog.messages == ["step 2 is done already: nothing is traced"]
    with open_profile(tmp_path, None, 2) as profile:
        assert profile is None
    assert list(tmp_path.iterdir()) == []


def test_the_flag_is_a_slice():
    assert read_profile_steps("10:13", 100) == range(10, 13)
    assert read_profile_steps("100:101", 100) == range(100, 101)
    assert read_profile_steps(None, 100) is None


@pytest.mark.parametrize("text", ["", "10", "10:", "13:10", "10:10", "0:3", "a:b", "-1:2", "1:2:3"])
def test_a_flag_that_names_no_steps_is_refused(text):
    with pytest.raises(
        ConfigError, match=f"--profile_steps={text} names no steps: write FIRST:END"
    ):
        read_profile_steps(text, 100)


def test_steps_beyond_the_last_one_are_refused():
    with pytest.raises(ConfigError, match="10:12 goes beyond the last step: set its end to at"):
        read_profile_steps("10:12", 10)
