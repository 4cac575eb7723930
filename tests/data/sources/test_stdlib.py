"""Tests which files make the stdlib data set, and how they are split."""

from pathlib import Path

import pytest

from moe.data.sources.stdlib import is_validation, python_files


def test_python_files_that_are_not_tests_are_read(tmp_path: Path):
    kept = {"b.py": "b = 1\r\n", "a/z.py": "é", "test.py": "not a directory", "a.py": "x"}
    left_out = [
        "test/c.py",
        "a/tests/d.py",
        "idlelib/idle_test/e.py",
        "site-packages/f.py",
        "__pycache__/g.py",
        "a/h.txt",
    ]
    for name, text in kept.items() | {(name, "left out") for name in left_out} | {("empty.py", "")}:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "latin1.py").write_bytes(b"\xe9")
    assert list(python_files(tmp_path)) == [
        (name, kept[name]) for name in ("a/z.py", "a.py", "b.py", "test.py")
    ]


@pytest.mark.parametrize(("text", "expected"), [("519", True), ("425", False), ("a", False)])
def test_the_split_is_by_contents(text: str, expected: bool):
    # Their SHA-256 begin with 0x0c, 0x0d and 0xca. Those below 0x0d belong to validation.
    assert is_validation(text) == expected


def test_a_twentieth_is_validation():
    assert 0.04 < sum(is_validation(str(i)) for i in range(4000)) / 4000 < 0.06
