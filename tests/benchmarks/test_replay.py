"""The benchmarks of the kernels alone: that they compile, as their first lines say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", ["benchmarks/replay.cu", "benchmarks/replay_few.cu"])
def test_replay_compiles(source: str, tmp_path: Path) -> None:
    text = (ROOT / source).read_text()
    (flags,) = re.findall(rf"nvcc (-.*?)\s*\n//\s+{re.escape(source)}", text)
    command = ["nvcc", *flags.split(), "-c", source, "-o", str(tmp_path / "o")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
