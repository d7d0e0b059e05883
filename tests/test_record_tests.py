"""The record that `make test-gpu` makes of a test run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record_tests


def test_summary_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        """
import pytest

@pytest.mark.parametrize("x", [1, 2, 3])
def test_numbers(x):
    assert x < 3

@pytest.mark.skip(reason="for the record")
def test_skipped():
    pass

def test_with_broken_setup(no_such_fixture):
    pass
"""
    )
    command = ["-m", "pytest", "-q", "--junitxml=junit.xml", "-p", "no:cacheprovider", "test_x.py"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=False, capture_output=True)
    summary = record_tests.summarize(tmp_path / "junit.xml")
    outcomes = {"passed": 2, "failed": 1, "skipped": 1, "error": 1}
    assert summary["outcomes"] == outcomes
    assert summary["modules"] == {"test_x": outcomes}
    assert summary["not_passed"] == {
        "failed": ["test_x::test_numbers[3]"],
        "skipped": ["test_x::test_skipped"],
        "error": ["test_x::test_with_broken_setup"],
    }


def test_the_slowest_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = "".join(
        f'<testcase classname="test_x" name="test_{name}" time="{seconds}"/>'
        for name, seconds in {"a": 0.25, "b": 30.04, "c": 7, "d": 0}.items()
    )
    (tmp_path / "junit.xml").write_text(f"<testsuite>{cases}</testsuite>")
    monkeypatch.setattr(record_tests, "SLOWEST", 2)
    summary = record_tests.summarize(tmp_path / "junit.xml")
    assert list(summary["slowest"].items()) == [("test_x::test_b", 30.0), ("test_x::test_c", 7.0)]
    assert summary["seconds"] == 37.3
