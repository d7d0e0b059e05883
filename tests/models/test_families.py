"""Models beside DeepSeek-V3 and V2-Lite against Hugging Face: goldens/make_goldens.py has them all.

DeepSeek-V2 chooses among groups of experts; Kimi-K2 has one group, another theta and YaRN with
beta_fast 1; GLM-4.7-Flash has plain RoPE and other head sizes; LongCat-Flash runs experts beside
pairs of layers; DeepSeek-V3.2 and GLM-5 have indexers (test_dsa.py has more about them).
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import GOLDENS, Golden, cached_tokens, load_golden

from flashmla_jax.models import deepseek, load_checkpoint, save_checkpoint
from flashmla_jax.models.deepseek import DeepSeekConfig

pytestmark = pytest.mark.usefixtures("on_cpu")

MODELS = [
    "deepseek_v2",
    "kimi_k2",
    "glm4_moe_lite",
    "longcat_flash",
    "deepseek_v32",
    "glm_moe_dsa",
]
TOLERANCE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module", params=MODELS)
def golden(request) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="module")
def longcat() -> Golden:
    return load_golden("longcat_flash")


def test_prefill_and_decode_match_hugging_face(golden):
    params, config = golden.params, golden.config
    logits, cache, _ = deepseek.prefill(
        params, config, golden.prompts, golden.lengths, golden.cache(), all_positions=True
    )
    for i, length in enumerate(golden.lengths):
        np.testing.assert_allclose(logits[i, :length], golden.prefill[i, :length], **TOLERANCE)
    for step in range(golden.next_ids.shape[1]):
        ids = golden.next_ids[:, step : step + 1]
        logits, cache, _ = deepseek.decode_step(params, config, ids, cache)
        np.testing.assert_allclose(logits[:, 0], golden.decode[:, step], **TOLERANCE)
    for layer, latents in enumerate(golden.latents):
        np.testing.assert_allclose(cached_tokens(cache, layer, 0), latents, atol=5e-5)


def test_a_saved_checkpoint_has_the_same_names_and_numbers(golden, tmp_path):
    name = golden.config.model_type
    save_checkpoint(tmp_path / "model", golden.config, golden.params)
    config, params = load_checkpoint(tmp_path / "model", dtype=jnp.float32)
    assert config == golden.config
    jax.tree.map(np.testing.assert_array_equal, params, golden.params)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    original = json.loads((GOLDENS / name / "config.json").read_text())
    assert written["architectures"] == original["architectures"]
    same = {key for key in original if written.get(key) == original[key]}
    assert original.keys() - same <= {
        "partial_rotary_factor",
        "attention_method",
        "zero_expert_type",
        "router_bias",
        "rope_scaling",
        "rope_parameters",
    }


# --- LongCat --------------------------------------------------------------------------------------


def error(golden: Golden, config: DeepSeekConfig) -> float:
    """How far its logits are from the right ones."""
    logits = deepseek.forward(golden.params, config, golden.prompts[:1, :12])
    return float(np.abs(logits - golden.prefill[:1, :12]).max())


@pytest.mark.parametrize("field", ["mla_scale_q_lora", "mla_scale_kv_lora"])
def test_longcat_without_its_factors_is_another_model(longcat, field):
    assert error(longcat, dataclasses.replace(longcat.config, **{field: False})) > 0.01


def test_longcat_routes_some_tokens_to_identities(longcat):
    """Those experts have no kernels, and give the token back."""
    layer = longcat.params["layers"][0]["shortcut"]
    assert layer["gate"]["kernel"].shape == (60, 12)
    assert layer["experts"]["up_proj"]["weight"].shape == (8, 24, 60)
    tokens = jnp.asarray(np.random.default_rng(0).standard_normal((50, 60)), jnp.float32)
    experts, weights = deepseek._route(layer["gate"], longcat.config, tokens)
    assert (experts >= 8).any(axis=1).sum() > 10
    nothing = jax.tree.map(jnp.zeros_like, layer["experts"])
    out = deepseek._moe({**layer, "experts": nothing}, longcat.config, tokens[None])[0]
    share = np.where(experts >= 8, weights, 0).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out, share * tokens, atol=1e-5)


def test_longcat_ignores_multi_token_prediction(longcat, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(GOLDENS / "longcat_flash", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.mtp.layers.0.eh_proj.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, file)
    _, params = load_checkpoint(tmp_path / "model", dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, longcat.params)


# --- GLM ------------------------------------------------------------------------------------------


def test_glm_without_a_rotation_is_another_model():
    golden = load_golden("glm4_moe_lite")
    assert error(golden, dataclasses.replace(golden.config, rope_theta=10000.0)) > 1e-3
