"""`flashmla_jax.layers.mla` against its definition, written out in float64 NumPy."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import mla

pytestmark = pytest.mark.usefixtures("on_cpu")

V3_YARN = mla.YarnScaling(
    factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
)
# Stretched from position 8 on, with a factor on sines and cosines, and sizes that all differ.
SMALL = mla.MLAConfig(
    hidden_size=20,
    num_heads=3,
    q_lora_rank=28,
    qk_nope_head_dim=12,
    v_head_dim=36,
    rope_scaling=mla.YarnScaling(
        factor=8, original_max_position_embeddings=8, mscale=1.3, mscale_all_dim=0.6
    ),
)
WITHOUT_Q_LORA = dataclasses.replace(SMALL, q_lora_rank=None, rope_scaling=None)


def make_params(config: mla.MLAConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def kernel(n_in: int, n_out: int) -> dict:
        return {"kernel": (rng.standard_normal((n_in, n_out)) * n_in**-0.5).astype(np.float32)}

    def norm(n: int) -> dict:
        return {"scale": (1 + 0.3 * rng.standard_normal(n)).astype(np.float32)}

    q_size = config.num_heads * config.qk_head_dim
    params = {
        "kv_a_proj_with_mqa": kernel(config.hidden_size, 576),
        "kv_a_layernorm": norm(512),
        "kv_b_proj": kernel(512, config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)),
        "o_proj": kernel(config.num_heads * config.v_head_dim, config.hidden_size),
    }
    if config.q_lora_rank is None:
        params["q_proj"] = kernel(config.hidden_size, q_size)
    else:
        params["q_a_proj"] = kernel(config.hidden_size, config.q_lora_rank)
        params["q_a_layernorm"] = norm(config.q_lora_rank)
        params["q_b_proj"] = kernel(config.q_lora_rank, q_size)
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            size = params[name]["kernel"].shape[1]
            params[name]["bias"] = (0.1 * rng.standard_normal(size)).astype(np.float32)
    return params


# --- The oracle: one token and one head at a time ------------------------------------------------


def oracle_inv_freq(config: mla.MLAConfig) -> list[float]:
    """Frequencies by DeepSeek's rule, pair by pair."""
    yarn, out = config.rope_scaling, []

    def correction(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return 64 * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    for pair in range(32):
        frequency = config.rope_theta ** (-2 * pair / 64)
        if yarn is not None:
            low = max(math.floor(correction(yarn.beta_fast)), 0)
            high = min(math.ceil(correction(yarn.beta_slow)), 63)
            keep = 1 - min(max((pair - low) / (high - low), 0.0), 1.0)
            frequency = frequency / yarn.factor * (1 - keep) + frequency * keep
        out.append(frequency)
    return out


def oracle_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def oracle_rotate(config: mla.MLAConfig, x: np.ndarray, position: int) -> np.ndarray:
    """Rotation of 64 numbers, as a product of complex numbers."""
    yarn, magnitude = config.rope_scaling, 1.0
    if yarn is not None:
        magnitude = oracle_mscale(yarn.factor, yarn.mscale)
        magnitude /= oracle_mscale(yarn.factor, yarn.mscale_all_dim)
    pairs = x[0::2] + 1j * x[1::2]
    pairs = pairs * magnitude * np.exp(1j * position * np.array(oracle_inv_freq(config)))
    out = np.empty(64)
    out[0::2], out[1::2] = pairs.real, pairs.imag
    return out


def oracle_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def oracle_layer(params: dict, config: mla.MLAConfig, x: np.ndarray) -> tuple:
    """The output [s, hidden] and cached tokens [s, 576] of one sequence `x` [s, hidden]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = x.astype(np.float64)
    nope, v_dim, s = config.qk_nope_head_dim, config.v_head_dim, len(x)

    def linear(y: np.ndarray, name: str) -> np.ndarray:
        return y @ p[name]["kernel"] + p[name].get("bias", 0.0)

    if config.q_lora_rank is None:
        q = linear(x, "q_proj")
    else:
        q = linear(oracle_norm(linear(x, "q_a_proj"), p["q_a_layernorm"]["scale"]), "q_b_proj")
    q = q.reshape(s, config.num_heads, nope + 64)
    compressed = linear(x, "kv_a_proj_with_mqa")
    latent = oracle_norm(compressed[:, :512], p["kv_a_layernorm"]["scale"])
    k_rope = np.stack([oracle_rotate(config, compressed[t, 512:], t) for t in range(s)])
    kv = linear(latent, "kv_b_proj")

    scale = (nope + 64) ** -0.5
    if config.rope_scaling is not None:
        yarn = config.rope_scaling
        scale *= oracle_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    heads = np.zeros((s, config.num_heads, v_dim))
    for head in range(config.num_heads):
        begin = head * (nope + v_dim)
        k_nope, v = kv[:, begin : begin + nope], kv[:, begin + nope : begin + nope + v_dim]
        for t in range(s):
            q_rope = oracle_rotate(config, q[t, head, nope:], t)
            scores = scale * (k_nope[: t + 1] @ q[t, head, :nope] + k_rope[: t + 1] @ q_rope)
            weights = np.exp(scores - scores.max())
            heads[t, head] = weights @ v[: t + 1] / weights.sum()
    return linear(heads.reshape(s, -1), "o_proj"), np.concatenate([latent, k_rope], axis=-1)


# --- Tests ---------------------------------------------------------------------------------------


def test_softmax_scale_is_that_of_the_published_models():
    v3 = mla.MLAConfig(hidden_size=7168, num_heads=128, q_lora_rank=1536, rope_scaling=V3_YARN)
    assert v3.softmax_scale == pytest.approx(192**-0.5 * 1.8738542)
    yarn = dataclasses.replace(V3_YARN, mscale=0.707, mscale_all_dim=0.707)
    v2 = dataclasses.replace(v3, rope_scaling=yarn)
    assert v2.softmax_scale == pytest.approx(192**-0.5 * 1.5896262, rel=1e-5)
    assert dataclasses.replace(v3, rope_scaling=None).softmax_scale == 192**-0.5


@pytest.mark.parametrize(
    "yarn",
    [
        None,
        V3_YARN,
        SMALL.rope_scaling,
        dataclasses.replace(V3_YARN, factor=32, beta_fast=1.0, beta_slow=0.5),
    ],
)
def test_rope_frequencies(yarn):
    config = dataclasses.replace(SMALL, rope_scaling=yarn, rope_theta=50000.0)
    frequencies = mla.rope_frequencies(config)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, oracle_inv_freq(config), rtol=1e-6)


def test_rope_angles_are_float32_at_long_positions():
    config = mla.MLAConfig(hidden_size=8, num_heads=1, rope_scaling=V3_YARN)
    position = 100_003
    cos, sin = mla.rope_tables(config, jnp.array([[position]], jnp.int32))
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    for dtype, atol in ((jnp.float32, 2e-2), (jnp.bfloat16, 5e-2)):
        rotated = mla.apply_rope(jnp.asarray(x, dtype), cos[0, 0], sin[0, 0])
        assert rotated.dtype == dtype
        np.testing.assert_allclose(
            rotated.astype(np.float32), oracle_rotate(config, x, position), atol=atol
        )


def test_rms_norm_is_float32_inside():
    x = np.random.default_rng(0).standard_normal((5, 300)) * 300.0  # squares overflow float16
    scale = np.linspace(0.5, 1.5, 300)
    out = mla.rms_norm(jnp.asarray(x, jnp.float16), jnp.asarray(scale, jnp.float16), 1e-6)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(out, np.float64), oracle_norm(x, scale), atol=5e-3)


@pytest.mark.parametrize("config", [SMALL, WITHOUT_Q_LORA], ids=["q_lora", "no_q_lora"])
def test_prefill_matches_float64(config):
    params = make_params(config)
    x = np.random.default_rng(1).standard_normal((2, 21, config.hidden_size)).astype(np.float32)
    out, kv = jax.jit(mla.prefill, static_argnums=1)(params, config, x)
    for i in range(len(x)):
        want_out, want_kv = oracle_layer(params, config, x[i])
        np.testing.assert_allclose(out[i], want_out, atol=5e-6)
        np.testing.assert_allclose(kv[i], want_kv, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, WITHOUT_Q_LORA], ids=["q_lora", "no_q_lora"])
def test_decode_matches_float64_across_a_page_border(config):
    """Ragged sequences around the end of a page, continued by 1, 3 and 1 tokens."""
    params, lengths, steps = make_params(config), [60, 17], [1, 3, 1]
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, max(lengths) + sum(steps), config.hidden_size)).astype(np.float32)
    want = [oracle_layer(params, config, x[i]) for i in range(2)]

    cache = PagedKVCache.create(
        num_layers=2, num_pages=3, batch=2, max_pages_per_seq=2, dtype=jnp.float32
    )
    cache, ok = cache.allocate(jnp.array(lengths))
    assert ok
    _, kv = jax.jit(mla.prefill, static_argnums=1)(params, config, x[:, : max(lengths)])
    cache = cache.append(1, kv[:, :, None])

    decode = jax.jit(mla.decode, static_argnums=(1, 4))
    position = np.array(lengths)
    for step in steps:
        tokens = np.stack([x[i, p : p + step] for i, p in enumerate(position)])
        cache, ok = cache.allocate(jnp.full(2, step))
        assert ok
        out, cache = decode(params, config, tokens, cache, 1)
        for i, p in enumerate(position):
            np.testing.assert_allclose(out[i], want[i][0][p : p + step], atol=5e-6)
        position += step
    for i, p in enumerate(position):
        rows = cache.pages[1][cache.block_table[i], :, 0].reshape(-1, 576)[:p]
        np.testing.assert_allclose(rows, want[i][1][:p], atol=1e-5)
    assert not cache.pages[0].any()  # the other layer's


@pytest.mark.parametrize("max_scores", [1, 2 * 3 * 19 * 4, 2 * 3 * 19 * 19 * 10])
def test_causal_attention_in_chunks(max_scores):
    """One query at a time, four at a time with a remainder, and all at once."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 2, 19, 3, 10)).astype(np.float32)
    v = rng.standard_normal((2, 19, 3, 7)).astype(np.float32)
    out = mla.causal_attention(q, k, v, 0.7, max_scores=max_scores)
    scores = 0.7 * np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64)
    scores = np.where(np.tri(19, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bhqk,bkhd->bqhd", weights, v), atol=1e-6)


def test_memory_of_long_prompts_is_bounded():
    shape = jax.ShapeDtypeStruct((1, 8192, 4, 32), jnp.float32)
    attention = jax.jit(lambda q, k, v: mla.causal_attention(q, k, v, 1.0, max_scores=2**20))
    memory = attention.lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2**20 * 8  # all the scores would be 1 GiB


def test_padding_does_not_reach_shorter_sequences():
    params = make_params(SMALL)
    x = np.random.default_rng(4).standard_normal((1, 9, SMALL.hidden_size)).astype(np.float32)
    out, _ = mla.prefill(params, SMALL, x)
    x[:, 6:] = 1e4
    padded, _ = mla.prefill(params, SMALL, x)
    np.testing.assert_allclose(padded[:, :6], out[:, :6], atol=1e-6)


def test_bfloat16_prefill_and_decode_agree():
    config = SMALL
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), make_params(config))
    x = jax.random.normal(jax.random.key(0), (1, 12, config.hidden_size), jnp.bfloat16)
    out, kv = mla.prefill(params, config, x)
    assert out.dtype == kv.dtype == jnp.bfloat16
    cache = PagedKVCache.create(num_layers=1, num_pages=1, batch=1, max_pages_per_seq=1)
    cache, _ = cache.allocate(jnp.array([12]))
    decoded, _ = mla.decode(params, config, x, cache, 0)
    assert decoded.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        decoded.astype(np.float32), out.astype(np.float32), atol=0.05, rtol=0.05
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kv_lora_rank": 256}, NotImplementedError, r"kv_lora_rank=256"),
        ({"qk_rope_head_dim": 32}, NotImplementedError, r"qk_rope_head_dim=32"),
        ({"num_heads": 0}, ValueError, "num_heads must be positive, got 0"),
        ({"q_lora_rank": 0}, ValueError, "q_lora_rank must be positive or None, got 0"),
    ],
)
def test_config_errors(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SMALL, **changes)


def test_yarn_errors():
    with pytest.raises(ValueError, match=r"positive factor.*factor=0"):
        mla.YarnScaling(factor=0, original_max_position_embeddings=4096)
