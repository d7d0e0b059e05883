"""The benchmark of the kernels alone: that it compiles, as its first lines say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_replay_compiles(tmp_path: Path) -> None:
    text = (ROOT / "benchmarks/replay.cu").read_text()
    (flags,) = re.findall(r"nvcc (-.*?)\s*\n//\s+benchmarks/replay\.cu", text)
    command = ["nvcc", *flags.split(), "-c", "benchmarks/replay.cu", "-o", str(tmp_path / "o")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
