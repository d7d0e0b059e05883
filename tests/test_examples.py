"""The examples run, as a user would run them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "models" / "goldens"
ARGUMENTS = {"decode_checkpoint.py": [GOLDENS / "deepseek_v2_lite", "1,5,7", "2,4"]}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example(name, tmp_path):
    argv = [sys.executable, ROOT / "examples" / name, *ARGUMENTS.get(name, [])]
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout
