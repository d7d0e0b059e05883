"""The command line with a model that is divided over devices."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import elsewhere, meshes, run_on_eight_devices
from small_model import CONFIG

from flashmla_jax import cli
from flashmla_jax.models import init_params, save_checkpoint


@elsewhere
def test_on_eight_devices() -> None:
    run_on_eight_devices(__file__)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(path, config, init_params(config, jax.random.key(0), jnp.float32))
    return path


@meshes
def test_score(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read at once, and then one by one."""
    printed = []
    for devices in ("1", "4"):
        command = ["score", "--checkpoint", str(checkpoint), "--devices", devices]
        assert cli.main([*command, "--ids", "1,5,7,9,300,2", "--prefill", "3", "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out)["logprobs"])
    np.testing.assert_allclose(printed[1], printed[0], atol=1e-4)


@meshes
def test_generate(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the engine, and as one batch, which is compared with a pass without a cache."""
    command = ["generate", "--checkpoint", str(checkpoint), "--max-new-tokens", "5"]
    command += ["--prompt-ids", "1,5,7", "2,300"]
    printed = []
    for options in (["--devices", "1"], ["--devices", "8"], ["--devices", "2", "--check"]):
        assert cli.main([*command, *options]) == 0
        output = capsys.readouterr().out
        printed.append(re.findall(r"(?:\b\d+,)+\d+\b|(?:\d+, )+\d+", output))
    assert printed[0]
    assert printed[1] == printed[0]
    assert printed[2] == printed[0]


@meshes
@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("9", "--devices 9 is not from 1 to 8, as many as there are"),
        ("0", "--devices 0 is not from 1 to 8"),
        ("3", "num_attention_heads=8 does not divide into devices=3 parts"),
    ],
)
def test_what_cannot_be(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], devices: str, message: str
) -> None:
    command = ["score", "--checkpoint", str(checkpoint), "--ids", "1,2", "--devices", devices]
    assert cli.main(command) != 0
    assert message in capsys.readouterr().err
