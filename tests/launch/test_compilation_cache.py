"""Where compiled programs are kept between starts."""

import stat
from pathlib import Path

import pytest

from launch import compilation_cache
from launch.compilation_cache import VARIABLE, cpu_kind, use_cache


def test_it_is_in_the_users_cache_by_kind_of_cpu(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    use_cache(environment)
    folder = Path(environment[VARIABLE])
    assert folder.parent == tmp_path / "cache" / "moe" / "compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("directory", ["", "/elsewhere", "gs://bucket/cache"])
def test_a_directory_that_is_set_stays(directory: str) -> None:
    environment = {VARIABLE: directory}
    use_cache(environment)
    assert environment == {VARIABLE: directory}


def test_without_a_home_that_can_be_written_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    use_cache(environment)
    assert VARIABLE not in environment


def test_another_cpu_has_another_folder() -> None:
    first = "processor : 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor : 1\nflags\t\t: fpu\n"
    assert cpu_kind(first) == cpu_kind("model name: another\nflags\t\t: avx512f fpu avx2\n")
    assert cpu_kind(first) != cpu_kind("flags\t\t: fpu avx2\n")
    assert cpu_kind("Features\t: fp asimd sve\n") != cpu_kind("Features\t: fp asimd\n")


def test_a_machine_without_cpuinfo_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation_cache, "_CPU_INFO", tmp_path / "missing")
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    use_cache(environment)
    assert Path(environment[VARIABLE]).is_dir()
