"""The definition of an MLA layer in float64 NumPy, one token and one head at a time."""

from __future__ import annotations

import math

import jax
import numpy as np

from flashmla_jax.layers import mla


def inv_freq(config: mla.MLAConfig) -> list[float]:
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


def temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(config: mla.MLAConfig, x: np.ndarray, position: int) -> np.ndarray:
    """Rotation of 64 numbers, as a product of complex numbers."""
    yarn, magnitude = config.rope_scaling, 1.0
    if yarn is not None:
        magnitude = temperature(yarn.factor, yarn.mscale)
        magnitude /= temperature(yarn.factor, yarn.mscale_all_dim)
    pairs = x[0::2] + 1j * x[1::2]
    pairs = pairs * magnitude * np.exp(1j * position * np.array(inv_freq(config)))
    out = np.empty(64)
    out[0::2], out[1::2] = pairs.real, pairs.imag
    return out


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def layer(params: dict, config: mla.MLAConfig, x: np.ndarray) -> tuple:
    """The output [s, hidden] and cached tokens [s, 576] of one sequence `x` [s, hidden]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = x.astype(np.float64)
    nope, v_dim, s = config.qk_nope_head_dim, config.v_head_dim, len(x)

    def linear(y: np.ndarray, name: str) -> np.ndarray:
        return y @ p[name]["kernel"] + p[name].get("bias", 0.0)

    if config.q_lora_rank is None:
        q = linear(x, "q_proj")
    else:
        q = linear(norm(linear(x, "q_a_proj"), p["q_a_layernorm"]["scale"]), "q_b_proj")
    q = q.reshape(s, config.num_heads, nope + 64)
    compressed = linear(x, "kv_a_proj_with_mqa")
    latent = norm(compressed[:, :512], p["kv_a_layernorm"]["scale"])
    k_rope = np.stack([rotate(config, compressed[t, 512:], t) for t in range(s)])
    kv = linear(latent, "kv_b_proj")

    scale = (nope + 64) ** -0.5
    if config.rope_scaling is not None:
        yarn = config.rope_scaling
        scale *= temperature(yarn.factor, yarn.mscale_all_dim) ** 2
    heads = np.zeros((s, config.num_heads, v_dim))
    for head in range(config.num_heads):
        begin = head * (nope + v_dim)
        k_nope, v = kv[:, begin : begin + nope], kv[:, begin + nope : begin + nope + v_dim]
        for t in range(s):
            q_rope = rotate(config, q[t, head, nope:], t)
            scores = scale * (k_nope[: t + 1] @ q[t, head, :nope] + k_rope[: t + 1] @ q_rope)
            weights = np.exp(scores - scores.max())
            heads[t, head] = weights @ v[: t + 1] / weights.sum()
    return linear(heads.reshape(s, -1), "o_proj"), np.concatenate([latent, k_rope], axis=-1)
