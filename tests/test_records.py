"""Records of measurements: complete, and a warning when the kernels have changed since."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from benchmarks import record

RECORDS = sorted(record.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_record(path: Path) -> None:
    content = json.loads(path.read_text())
    for key in ("device", "date", "command", "commit", "source_hash", "versions", "results"):
        assert key in content
    if content["source_hash"] != record.source_hash():
        warnings.warn(
            f"{path.name} was measured with other kernels; run `{content['command']}` again",
            pytest.PytestWarning,
            stacklevel=1,
        )


def test_write_record(tmp_path: Path) -> None:
    path = record.write_record(tmp_path / "new" / "x.json", [{"us": 1.5}], "make bench")
    content = json.loads(path.read_text())
    assert content["results"] == [{"us": 1.5}]
    assert content["command"] == "make bench"
    assert content["source_hash"] == record.source_hash()
    assert content["versions"]["jax"]
