"""Tests of the settings that all tests run with."""

import os

import pytest

from tests.conftest import xla_flags


def test_the_given_flags_come_after_those_of_the_tests() -> None:
    ours = xla_flags("")
    given = "--xla_cpu_max_isa=AVX2 --xla_backend_optimization_level=1"
    assert "--xla_backend_optimization_level=0" in ours
    assert xla_flags(given) == f"{ours} {given}"  # XLA takes the last of two equal flags


@pytest.mark.parametrize("flag", xla_flags("").split())
def test_processes_that_a_test_starts_inherit_the_flags(flag: str) -> None:
    assert flag in os.environ["XLA_FLAGS"].split()
