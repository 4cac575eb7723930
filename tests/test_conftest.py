"""The settings that all tests run with."""

import os

import pytest

from tests.conftest import xla_flags


def test_the_tests_flags_are_added_to_those_given() -> None:
    ours = xla_flags("")
    given = "--xla_cpu_max_isa=AVX2 --xla_backend_optimization_level=1"
    assert "--xla_backend_optimization_level=0" in ours
    assert xla_flags(given) == f"{ours} {given}"  # of a flag that stands twice XLA takes the last


@pytest.mark.parametrize("flag", xla_flags("").split())
def test_every_process_that_a_test_starts_finds_them(flag: str) -> None:
    assert flag in os.environ["XLA_FLAGS"].split()
