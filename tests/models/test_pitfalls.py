"""Each way in which models like these are got wrong, and that the goldens would tell.

Every mistake is made on purpose, in the function that knows better. The error that it causes has to
be far beyond what the tests against Hugging Face allow, or those would not prove anything about it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import load_golden

from flashmla_jax.layers import mha, mla
from flashmla_jax.layers.mla import MLAConfig, YarnScaling
from flashmla_jax.models import deepseek
from flashmla_jax.models.deepseek import DeepSeekConfig

pytestmark = pytest.mark.usefixtures("on_cpu")

TOLERANCE = 1e-5  # of the tests against Hugging Face

right_split_kv_b, right_rms_norm, right_rope_tables = mla.split_kv_b, mla.rms_norm, mla.rope_tables


@pytest.fixture(scope="module")
def goldens() -> dict:
    """Per model its configuration and parameters, a prompt, and the right logits."""
    loaded = {}
    for name in ("deepseek_v3", "deepseek_v2"):
        golden = load_golden(name)
        loaded[name] = golden.config, golden.params, golden.prompts[:1], golden.prefill[0]
    return loaded


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    """Experts and attention in forms that compile nothing; other tests are about the right ones."""

    def experts(weights, tokens, chosen, shares, precision):
        gate, up, down = weights
        hidden = jax.nn.silu(jnp.einsum("th,eih->tei", tokens, gate))
        hidden = hidden * jnp.einsum("th,eih->tei", tokens, up)
        share = (jax.nn.one_hot(chosen, len(gate)) * shares[..., None]).sum(axis=1)
        return jnp.einsum("tei,ehi,te->th", hidden, down, share)

    def attention(q, k, v, softmax_scale, **kwargs):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
        visible = jnp.tri(q.shape[1], k.shape[1], dtype=bool)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v), None

    monkeypatch.setattr(deepseek, "routed_experts", experts)
    monkeypatch.setattr(mha, "attention", attention)


def error(golden, **changes) -> float:
    """How far the logits are from the right ones, with fields of the configuration changed."""
    config, params, ids, expected = golden
    config = dataclasses.replace(config, **changes)
    forward = deepseek.forward.__wrapped__  # what jit has compiled makes no mistakes any more
    return float(np.abs(forward(params, config, ids)[0] - expected).max())


def plain_scale(self: MLAConfig) -> float:
    return self.qk_head_dim**-0.5


def scale_once(self: MLAConfig) -> float:
    return self.qk_head_dim**-0.5 * self.rope_scaling.temperature(self.rope_scaling.mscale_all_dim)


def scale_of_576(self: MLAConfig) -> float:
    yarn = self.rope_scaling
    return 576**-0.5 * yarn.temperature(yarn.mscale_all_dim) ** 2


def scale_of_mscale(self: MLAConfig) -> float:
    return self.qk_head_dim**-0.5 * self.rope_scaling.temperature(self.rope_scaling.mscale) ** 2


def half_split(x, cos, sin):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def plain_frequencies(config: MLAConfig) -> np.ndarray:
    return (config.rope_theta ** -(np.arange(0, 64, 2) / 64)).astype(np.float32)


def tables_with(factor):
    """Sines and cosines with another factor than the ratio of the two temperatures."""

    def tables(config: MLAConfig, positions):
        plain = dataclasses.replace(config.rope_scaling, mscale=1.0, mscale_all_dim=1.0)
        cos, sin = right_rope_tables(dataclasses.replace(config, rope_scaling=plain), positions)
        return cos * factor(config.rope_scaling), sin * factor(config.rope_scaling)

    return tables


def split_globally(params, config: MLAConfig):
    """All heads' keys, then all heads' values."""
    kernel = params["kv_b_proj"]["kernel"].T
    keys, values = jnp.split(kernel, [config.num_heads * config.qk_nope_head_dim])
    keys = keys.reshape(config.num_heads, -1, 512)
    return keys.transpose(0, 2, 1), values.reshape(config.num_heads, -1, 512)


def no_latent_norm(x, scale, eps):
    return x if scale.shape == (512,) else right_rms_norm(x, scale, eps)


def no_query_norm(x, scale, eps):
    return x if scale.shape == (48,) else right_rms_norm(x, scale, eps)


def eps_of_the_file(x, scale, eps):
    return right_rms_norm(x, scale, 1e-3)


def rounded_tables(config: MLAConfig, positions):
    """Angles in bfloat16."""
    angles = positions[..., None] * mla.rope_frequencies(config)
    angles = angles.astype(jnp.bfloat16).astype(jnp.float32)
    yarn = config.rope_scaling
    factor = yarn.temperature(yarn.mscale) / yarn.temperature(yarn.mscale_all_dim)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_without_a_mistake(goldens, name):
    assert error(goldens[name]) < TOLERANCE


@pytest.mark.parametrize(
    ("owner", "attribute", "mistake"),
    [
        (MLAConfig, "softmax_scale", property(plain_scale)),
        (MLAConfig, "softmax_scale", property(scale_once)),
        (MLAConfig, "softmax_scale", property(scale_of_576)),
        (mla, "apply_rope", half_split),
        (mla, "rope_frequencies", plain_frequencies),
        (mla, "rope_tables", tables_with(lambda yarn: yarn.temperature(yarn.mscale))),
        (mla, "rope_tables", rounded_tables),
        (mla, "split_kv_b", split_globally),
        (mla, "rms_norm", no_latent_norm),
        (mla, "rms_norm", no_query_norm),
        (mla, "rms_norm", eps_of_the_file),
    ],
    ids=[
        "no mscale in the softmax scale",
        "mscale not squared",
        "scale of the absorbed head",
        "half-split RoPE",
        "no YaRN",
        "mscale in sines and cosines",
        "bfloat16 angles",
        "kv_b_proj split globally",
        "no kv_a_layernorm",
        "no q_a_layernorm",
        "rms_norm_eps inside attention",
    ],
)
def test_mistakes_of_attention(goldens, monkeypatch, owner, attribute, mistake):
    monkeypatch.setattr(owner, attribute, mistake)
    assert error(goldens["deepseek_v3"]) > 10 * TOLERANCE


def test_no_mscale_in_the_softmax_scale_of_v2(goldens, monkeypatch):
    """Its `mscale` and `mscale_all_dim` are alike, so this is the only place of theirs."""
    monkeypatch.setattr(MLAConfig, "softmax_scale", property(plain_scale))
    assert error(goldens["deepseek_v2"]) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("owner", "attribute", "mistake"),
    [
        (MLAConfig, "softmax_scale", property(scale_of_mscale)),
        (mla, "rope_tables", tables_with(lambda yarn: 1.0)),
    ],
    ids=["mscale in place of mscale_all_dim", "no factor of sines and cosines"],
)
def test_mistakes_that_show_where_mscale_is_not_mscale_all_dim(
    goldens, monkeypatch, owner, attribute, mistake
):
    """In all published models they are alike."""
    monkeypatch.setattr(owner, attribute, mistake)
    assert error(goldens["deepseek_v3"]) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek_v3", {"routed_scaling_factor": 1.0}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
        ("deepseek_v3", {"rms_norm_eps": 1e-6}),
        ("deepseek_v3", {"rope_theta": 50000.0}),
        ("deepseek_v2", {"routed_scaling_factor": 1.0}),
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v2", {"topk_group": 3}),
    ],
)
def test_mistakes_of_configuration(goldens, name, changes):
    assert error(goldens[name], **changes) > 10 * TOLERANCE


def test_no_correction_bias(goldens):
    config, params, *rest = goldens["deepseek_v3"]
    layers = [dict(layer) for layer in params["layers"]]
    for layer in layers[1:]:
        gate = layer["mlp"]["gate"]
        gate = {**gate, "e_score_correction_bias": jnp.zeros(config.n_routed_experts)}
        layer["mlp"] = {**layer["mlp"], "gate": gate}
    assert error((config, {**params, "layers": layers}, *rest)) > 10 * TOLERANCE


# --- Against formulas -----------------------------------------------------------------------------


def config_with(yarn: YarnScaling | None) -> MLAConfig:
    config = {"model_type": "deepseek_v2", "vocab_size": 8, "hidden_size": 8}
    config |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return dataclasses.replace(DeepSeekConfig.from_dict(config).mla, rope_scaling=yarn)


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), [(1, 1), (0.707, 0.707), (1.4, 1), (1, 0)])
def test_where_the_temperature_goes(mscale, mscale_all_dim):
    """Squared into the softmax scale; what is left of it into sines and cosines."""
    config = config_with(YarnScaling(40, 4096, mscale=mscale, mscale_all_dim=mscale_all_dim))
    all_dim = 0.1 * mscale_all_dim * math.log(40) + 1
    assert config.softmax_scale == pytest.approx(192**-0.5 * all_dim**2, rel=1e-12)
    cos, sin = mla.rope_tables(config, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, (0.1 * mscale * math.log(40) + 1) / all_dim, rtol=1e-6)
    np.testing.assert_array_equal(sin, 0)


def test_a_position_that_bfloat16_does_not_have():
    """4097 would be 4096."""
    config = config_with(None)
    cos, sin = mla.rope_tables(config, jnp.array([[4096, 4097]], jnp.int32))
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, :, 0], np.cos([4096.0, 4097.0]), atol=1e-4)
    assert abs(float(cos[0, 0, 0] - cos[0, 1, 0])) > 0.1


def test_yarn_of_kimi_k2_has_one_border():
    """With beta_fast and beta_slow alike, frequencies turn from kept to divided within a pair."""
    yarn = YarnScaling(32.0, 4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    config = dataclasses.replace(config_with(yarn), rope_theta=50000.0)
    ratio = mla.rope_frequencies(config) / plain_frequencies(config)
    turns = 4096 * plain_frequencies(config) / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 1.5], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.7], 1 / 32, rtol=1e-6)
