"""Records of measurements: complete, on target, and a warning when the kernels have changed."""

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


def test_a_whole_models_targets() -> None:
    content = json.loads((record.RESULTS / "nvidia_h200_model.json").read_text())
    rows = {row["batch"]: row for row in content["results"]["decode"]}
    assert sorted(rows) == [1, 32, 128]
    for row in rows.values():
        assert row["context"] == 4096
        assert 0 < row["attention_share"] < 1
    assert rows[1]["of_the_floor"] >= 0.6


def test_targets_of_appending() -> None:
    results = json.loads((record.RESULTS / "nvidia_h200.json").read_text())["results"]
    rows = {row["case"]: row for row in results["cache_append"]}
    prompts = [row for case, row in rows.items() if "prompt" in case]
    assert len(prompts) == 2
    for row in prompts:
        assert row["gbps"] >= 0.7 * results["ceilings"]["copy_gbps"]
    assert rows["b128 decoding step"]["us"] < 5


def test_write_record(tmp_path: Path) -> None:
    path = record.write_record(tmp_path / "new" / "x.json", [{"us": 1.5}], "make bench")
    content = json.loads(path.read_text())
    assert content["results"] == [{"us": 1.5}]
    assert content["command"] == "make bench"
    assert content["source_hash"] == record.source_hash()
    assert content["versions"]["jax"]
