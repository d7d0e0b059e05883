"""The examples run, as a user would run them."""

import json
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
    out = run(TRAINING, tmp_path, *arguments, "--record", "tiny.json", JAX_PLATFORMS="cpu")
    losses = losses_of(out)
    assert len(losses) == 10
    check_record(tmp_path / "tiny.json", "cpu", 10, losses)
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

    check_text(out)


@pytest.mark.gpu
def test_training_on_a_gpu(tmp_path):
    """The larger size, of which the Hopper kernels decode."""
    arguments = ["--size", "gpu", "--steps", "5", "--out", "tiny", "--record", "tiny.json"]
    out = run(TRAINING, tmp_path, *arguments, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    losses = losses_of(out)
    assert len(losses) == 5
    assert losses[-1] < np.log(256) - 0.5  # so few steps go up and down on the way
    record = check_record(tmp_path / "tiny.json", "gpu", 5, losses)
    assert record["device"] == jax.devices()[0].device_kind
    check_text(out)


def losses_of(out):
    """On unseen text, of the steps that it was printed for."""
    return [float(line.split()[-3].rstrip(",")) for line in out.splitlines() if "step " in line]


def check_record(path, size, steps, losses):
    """A record of training, which it returns, is that of this run."""
    record = json.loads(path.read_text())
    results = record["results"]
    assert record["command"] == f"python examples/train_tiny.py --size {size} --steps {steps}"
    assert (results["size"], results["steps"]) == (size, steps)
    assert results["seconds"] > 0
    sources = ["examples/train_tiny.py", "flashmla_jax/layers", "flashmla_jax/models"]
    assert record["sources"] == sources
    assert results["loss_on_unseen_text"] == pytest.approx(losses[-1], abs=6e-4)
    assert {"device", "date", "commit", "source_hash", "versions"} <= set(record)
    return record


def check_text(out):
    """A continuation of prompts was printed."""
    for prompt in ("The ", "Return a list of "):
        assert any(line.startswith(prompt) for line in out.splitlines())
