"""The examples run, as a user would run them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.models import deepseek, load_checkpoint

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "models" / "goldens"
ARGUMENTS = {"decode_checkpoint.py": [GOLDENS / "deepseek_v2_lite", "1,5,7", "2,4"]}
TRAINING = "train_tiny.py"
OTHERS = sorted({path.name for path in (ROOT / "examples").glob("*.py")} - {TRAINING})


def run(name, folder, *arguments, **env):
    argv = [sys.executable, ROOT / "examples" / name, *arguments]
    result = subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=os.environ | env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", OTHERS)
def test_example(name, tmp_path):
    assert run(name, tmp_path, *ARGUMENTS.get(name, []))


def test_training(tmp_path):
    """A few steps: what was learned is in the checkpoint, which loads and generates."""
    arguments = ["--size", "cpu", "--steps", "10", "--seed", "1", "--out", "tiny"]
    out = run(TRAINING, tmp_path, *arguments, JAX_PLATFORMS="cpu")
    losses = [float(line.split()[-3].rstrip(",")) for line in out.splitlines() if "step " in line]
    assert len(losses) == 10
    assert losses[-1] < losses[0] < np.log(256) + 1  # of a guess among all bytes, about

    files = {path.name for path in (tmp_path / "tiny").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}
    with jax.default_device(jax.devices("cpu")[0]):
        config, params = load_checkpoint(tmp_path / "tiny", dtype=jnp.float32)
        text = np.frombuffer(b"Return the name of the file, or None if there is no file.", np.uint8)
        ids = text.astype(np.int32)[None]
        logprobs = jax.nn.log_softmax(deepseek.forward(params, config, ids[:, :-1]))
    loss = -np.mean(np.take_along_axis(np.asarray(logprobs), ids[:, 1:, None], axis=-1))
    assert loss < losses[0] - 0.5

    for prompt in ("The ", "Return a list of "):
        assert any(line.startswith(prompt) for line in out.splitlines())
