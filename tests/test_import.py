"""What `import flashmla_jax` does, and what it leaves to those who ask for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import flashmla_jax
from flashmla_jax.ops import _ffi

OPTIONAL = ("flax", "matplotlib", "rich", "safetensors", "tokenizers", "tqdm", "transformers")
PROGRAM = """
import json, sys
import flashmla_jax
from jax._src import xla_bridge
packages = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([xla_bridge.backends_are_initialized(), packages]))
"""


REFERENCE = """
import sys, warnings
sys.modules["flashmla_jax._flashmla"] = None  # as if it were not there, or did not load
import numpy as np
import jax
import flashmla_jax

q, pool = np.ones((1, 1, 2, 576), np.float32), np.ones((1, 64, 1, 576), np.float32)
table, lengths = np.zeros((1, 1), np.int32), np.array([3], np.int32)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    out, lse = flashmla_jax.flash_mla_with_kvcache(q, pool, table, lengths)
    flashmla_jax.cache_append(pool, pool[:, :1], table, lengths, lengths)
np.testing.assert_allclose(out, 1, rtol=1e-6)
np.testing.assert_allclose(lse, 24 + np.log(3), rtol=1e-6)
print([str(x.message) for x in seen if "flashmla_jax" in str(x.message)])
flashmla_jax.show_config()
"""


def test_without_the_compiled_module_the_reference_runs_after_one_warning() -> None:
    command = [sys.executable, "-P", "-c", REFERENCE]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    messages, *config = ran.stdout.splitlines()
    assert messages.count("flashmla_jax runs the much slower jax.numpy reference here") == 1
    assert "its compiled module did not load" in messages
    assert any(line.startswith("module") and "not loaded" in line for line in config)


def test_on_an_unsupported_gpu_the_reference_runs_after_one_warning(monkeypatch) -> None:
    """As far as one can see without such a GPU: what is lowered for it, and what is said."""
    if "cuda" not in _ffi._PLATFORMS:
        pytest.skip("built without CUDA")
    monkeypatch.setattr(_ffi, "_foreign_gpus", lambda: ("8.0",))
    _ffi._warn_once.cache_clear()
    shapes = (
        jax.ShapeDtypeStruct((1, 1, 2, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 64, 1, 576), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    traced = jax.jit(flashmla_jax.flash_mla_with_kvcache).trace(*shapes)
    with pytest.warns(UserWarning, match="compute capability 9.0, and a GPU here has 8.0") as seen:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(seen) == 1
    assert "flashmla_dense_decode" not in text
    _ffi._warn_once.cache_clear()


def test_import_creates_no_backend_and_needs_no_optional_package() -> None:
    command = [sys.executable, "-P", "-c", PROGRAM]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    initialised, packages = json.loads(ran.stdout)
    assert not initialised
    assert "flashmla_jax" in packages
    assert not set(OPTIONAL) & set(packages)
