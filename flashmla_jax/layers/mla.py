"""Multi-head Latent Attention as pure functions over a dict of arrays.

A token leaves 576 numbers in the cache: a latent of 512, from which every head's key and value can
be expanded, and 64 rotated numbers that all heads share as the positional part of their key.
There are two ways to attend, equal in exact arithmetic:

- `prefill`, the MHA form: expand the latent through `kv_b_proj` into a key and a value per head.
  Cheap when many queries share one expansion.
- `decode`, the MQA form: move `kv_b_proj` to the other side of the dot product ("absorb" it). The
  query enters the latent space through W_UK, attends the cache as it lies, and the result leaves
  through W_UV. Nothing is expanded, so a step reads 576 numbers per cached token for all heads.

Axes: `batch`; `s` or `s_q` tokens; `heads` query heads; `nope`, `rope` (64) and `v` numbers of a
head.

Parameters are nested dicts with the checkpoint's names and Flax's leaves. A kernel is `[in, out]`:

    q_a_proj.kernel            [hidden, q_lora_rank]          these three if q_lora_rank is set,
    q_a_layernorm.scale        [q_lora_rank]
    q_b_proj.kernel            [q_lora_rank, heads * (nope + rope)]
    q_proj.kernel              [hidden, heads * (nope + rope)]          otherwise this one
    kv_a_proj_with_mqa.kernel  [hidden, 512 + rope]
    kv_a_layernorm.scale       [512]
    kv_b_proj.kernel           [512, heads * (nope + v)]
    o_proj.kernel              [heads * v, hidden]

Any projection may also have a `bias`, `[out]`.

Sources: DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C; YaRN (arXiv:2309.00071); the
`inference/model.py` of DeepSeek-V3 and `modeling_deepseek_v3.py` of Hugging Face transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashmla_jax.attention import flash_mla_with_kvcache
from flashmla_jax.cache.layout import HEAD_DIM, HEAD_DIM_V
from flashmla_jax.cache.paged import PagedKVCache

Params = Mapping[str, Any]

_ROPE_DIM = HEAD_DIM - HEAD_DIM_V

# Prefill holds the float32 scores of this many (query, key) pairs at a time: 256 MiB.
_MAX_SCORES = 2**26


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """How YaRN stretches the rotary frequencies beyond the length a model was first trained on.

    Frequencies that turn more than `beta_fast` times within `original_max_position_embeddings`
    stay, those that turn less than `beta_slow` times are divided by `factor`, those between are
    blended. DeepSeek puts the attention temperature of YaRN into the softmax scale
    (`mscale_all_dim`) and what is left of it, `mscale` over `mscale_all_dim`, into the sines and
    cosines.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_max_position_embeddings <= 0:
            raise ValueError(
                "YaRN needs a positive factor and original_max_position_embeddings, got "
                f"{self.factor=} {self.original_max_position_embeddings=}"
            )

    def temperature(self, mscale: float) -> float:
        """`0.1 * mscale * ln(factor) + 1`, or 1 when the context is not stretched."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """The shape of one attention layer; hashable, so it can be a static argument of `jax.jit`.

    Raises:
      NotImplementedError: the cached token would not be 512 + 64 numbers wide.
      ValueError: a size is not positive.
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int = HEAD_DIM_V
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = _ROPE_DIM
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if (self.kv_lora_rank, self.qk_rope_head_dim) != (HEAD_DIM_V, _ROPE_DIM):
            raise NotImplementedError(
                f"the cache holds {HEAD_DIM_V} latent and {_ROPE_DIM} rotary numbers per token; a "
                f"model with {self.kv_lora_rank=} and {self.qk_rope_head_dim=} does not fit it"
            )
        for name in ("hidden_size", "num_heads", "qk_nope_head_dim", "v_head_dim", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise ValueError(f"q_lora_rank must be positive or None, got {self.q_lora_rank}")

    @property
    def qk_head_dim(self) -> int:
        """Numbers of an expanded query or key head: `nope + rope`."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """`(nope + rope) ** -0.5`, times the square of YaRN's temperature.

        Squared because both query and key have it. The 576 of the absorbed form does not enter.
        """
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is None:
            return scale
        return scale * self.rope_scaling.temperature(self.rope_scaling.mscale_all_dim) ** 2


def parameter_shapes(
    config: MLAConfig, use_bias: bool = False
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The parameters of a layer: `kernel` [in, out] and `bias` [out], or the `scale` of a norm.

    Args:
      config: the shape of the layer.
      use_bias: whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have a bias
        (`attention_bias` in a Hugging Face config).

    Returns:
      The shape of each leaf, by the names that a DeepSeek checkpoint has.
    """

    def linear(size: int, out: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
        return {"kernel": (size, out)} | ({"bias": (out,)} if bias else {})

    hidden, heads, latent = config.hidden_size, config.num_heads, config.kv_lora_rank
    q_size = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query = {"q_proj": linear(hidden, q_size)}
    else:
        query = {
            "q_a_proj": linear(hidden, config.q_lora_rank, use_bias),
            "q_a_layernorm": {"scale": (config.q_lora_rank,)},
            "q_b_proj": linear(config.q_lora_rank, q_size),
        }
    return query | {
        "kv_a_proj_with_mqa": linear(hidden, latent + config.qk_rope_head_dim, use_bias),
        "kv_a_layernorm": {"scale": (latent,)},
        "kv_b_proj": linear(latent, heads * (config.qk_nope_head_dim + config.v_head_dim)),
        "o_proj": linear(heads * config.v_head_dim, hidden, use_bias),
    }


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Divides `x` [..., dim] by its root mean square over `dim`, and multiplies by `scale` [dim].

    The division is done in float32. Returns `x`'s shape and dtype.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def linear(x: jax.Array, params: Params, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """`x` [..., in] times `params["kernel"]` [in, out], plus `params["bias"]` [out] if any."""
    out = jnp.dot(x, params["kernel"], precision=precision)
    return out + params["bias"] if "bias" in params else out


def rope_frequencies(config: MLAConfig) -> np.ndarray:
    """The angle by which each of the 32 rotary pairs turns per position: float32[32]."""
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if yarn is None:
        return frequencies.astype(np.float32)

    def pair_that_turns(rotations: float) -> float:
        turn = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turn) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 1e-3), 0.0, 1.0)
    return (frequencies * (1 - ramp) + frequencies / yarn.factor * ramp).astype(np.float32)


def rope_tables(config: MLAConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `positions` int32[batch, s]: two of float32[batch, s, 32].

    Angles are float32 whatever the model's dtype: bfloat16 cannot tell position 4096 from 4097.
    """
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(config)
    yarn = config.rope_scaling
    if yarn is None:
        return jnp.cos(angles), jnp.sin(angles)
    factor = yarn.temperature(yarn.mscale) / yarn.temperature(yarn.mscale_all_dim)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the neighbouring pairs (0, 1), (2, 3), ... of `x` [..., 64] by tables [..., 32].

    The tables broadcast against `x`'s leading axes. The pairs stay where they are, as in DeepSeek's
    own code; transformers' V3 moves the even numbers before the odd ones, which changes no dot
    product but makes its cached keys a permutation of these.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def project_q(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]:
    """The query heads of `x` [batch, s, hidden], rotated by tables [batch, s, 32].

    Returns `q_nope` [batch, s, heads, nope] and `q_rope` [batch, s, heads, 64].
    """
    if config.q_lora_rank is None:
        q = linear(x, params["q_proj"], precision)
    else:
        q = linear(x, params["q_a_proj"], precision)
        q = rms_norm(q, params["q_a_layernorm"]["scale"], config.norm_eps)
        q = linear(q, params["q_b_proj"], precision)
    q = q.reshape(*x.shape[:-1], config.num_heads, config.qk_head_dim)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, apply_rope(q_rope, cos[..., None, :], sin[..., None, :])


def compress_kv(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """What the cache keeps of `x` [batch, s, hidden]: the normalised latent, then the rotated key.

    Returns [batch, s, 576].
    """
    kv = linear(x, params["kv_a_proj_with_mqa"], precision)
    latent, k_rope = jnp.split(kv, [config.kv_lora_rank], axis=-1)
    latent = rms_norm(latent, params["kv_a_layernorm"]["scale"], config.norm_eps)
    return jnp.concatenate([latent, apply_rope(k_rope, cos, sin)], axis=-1)


def split_kv_b(params: Params, config: MLAConfig) -> tuple[jax.Array, jax.Array]:
    """Splits `kv_b_proj` per head into `w_uk` [512, heads, nope] and `w_uv` [512, heads, v].

    Each head's columns are its key's, then its value's; the split is not one of the whole matrix.
    """
    kernel = params["kv_b_proj"]["kernel"].reshape(config.kv_lora_rank, config.num_heads, -1)
    w_uk, w_uv = jnp.split(kernel, [config.qk_nope_head_dim], axis=-1)
    return w_uk, w_uv


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    softmax_scale: float,
    *,
    precision: jax.lax.PrecisionLike = None,
    max_scores: int = _MAX_SCORES,
) -> jax.Array:
    """Attention of every token to itself and those before it, a few queries at a time.

    Args:
      q: [batch, s, heads, qk].
      k: [batch, s, heads, qk].
      v: [batch, s, heads, v].
      softmax_scale: multiplies the scores.
      precision: of the two products.
      max_scores: how many float32 scores may exist at once; it bounds the memory of long prompts,
        and one query per sequence is the least that is done at a time.

    Returns:
      [batch, s, heads, v] in `v`'s dtype. Scores and softmax are float32; the probabilities are
      multiplied in `v`'s dtype with float32 accumulation, as in the paged op.
    """
    batch, s, heads, _ = q.shape
    chunk = max(1, min(s, max_scores // max(1, batch * heads * s)))
    starts = jnp.arange(0, s, chunk)
    q = jnp.pad(q, ((0, 0), (0, -s % chunk), (0, 0), (0, 0)))
    key_position = jnp.arange(s)

    def attend(start: jax.Array) -> jax.Array:
        queries = jax.lax.dynamic_slice_in_dim(q, start, chunk, axis=1)
        scores = jnp.einsum(
            "bqhd,bkhd->bhqk", queries, k, precision=precision, preferred_element_type=jnp.float32
        )
        visible = key_position <= (start + jnp.arange(chunk))[:, None]
        weights = jax.nn.softmax(jnp.where(visible, scores * softmax_scale, -jnp.inf), axis=-1)
        out = jnp.einsum(
            "bhqk,bkhd->bqhd",
            weights.astype(v.dtype),
            v,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return out.astype(v.dtype)

    out = jax.lax.map(attend, starts)  # [chunks, batch, chunk, heads, v]
    return jnp.moveaxis(out, 0, 1).reshape(batch, q.shape[1], heads, v.shape[-1])[:, :s]


def prefill(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over whole sequences from their first token on, in MHA form.

    Args:
      params: as in the module's docstring.
      config: the shape of the layer.
      x: [batch, s, hidden]. Sequences shorter than `s` are padded at the end: being causal, no
        token sees the padding after it, so its outputs are not to be used and need no mask.
      precision: of all products.

    Returns:
      The layer's output [batch, s, hidden] and what to cache, [batch, s, 576].
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    cos, sin = rope_tables(config, positions)
    q = jnp.concatenate(project_q(params, config, x, cos, sin, precision), axis=-1)
    kv = compress_kv(params, config, x, cos, sin, precision)
    latent, k_rope = jnp.split(kv, [config.kv_lora_rank], axis=-1)

    w_uk, w_uv = split_kv_b(params, config)
    k_nope = jnp.einsum("bsc,chn->bshn", latent, w_uk, precision=precision)
    v = jnp.einsum("bsc,chv->bshv", latent, w_uv, precision=precision)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], config.qk_rope_head_dim))
    k = jnp.concatenate([k_nope, k_rope], axis=-1)

    out = causal_attention(q, k, v, config.softmax_scale, precision=precision)
    return linear(
        out.reshape(*x.shape[:2], config.num_heads * config.v_head_dim), params["o_proj"], precision
    ), kv


def decode(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    cache: PagedKVCache,
    layer: int,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, PagedKVCache]:
    """Writes the newest tokens to the cache and attends from them to all of it, in MQA form.

    Args:
      params: as in the module's docstring.
      config: the shape of the layer.
      x: [batch, s_q, hidden], the newest `s_q` tokens of every sequence.
      cache: has made room for them, once for all layers: `cache, ok = cache.allocate(...)` with
        `s_q` tokens, or 0 for a sequence that is to be left alone, whose output then means nothing.
      layer: whose pages of the cache are meant.
      precision: of the projections and of W_UK and W_UV.

    Returns:
      The layer's output [batch, s_q, hidden], and the cache with the new tokens in it.
    """
    s_q = x.shape[1]
    positions = cache.cache_seqlens[:, None] - s_q + jnp.arange(s_q, dtype=jnp.int32)
    cos, sin = rope_tables(config, positions)
    kv = compress_kv(params, config, x, cos, sin, precision)
    cache = cache.append(layer, kv[:, :, None].astype(cache.pages[layer].dtype))

    q_nope, q_rope = project_q(params, config, x, cos, sin, precision)
    w_uk, w_uv = split_kv_b(params, config)
    q_latent = jnp.einsum("bshn,chn->bshc", q_nope, w_uk, precision=precision)
    q = jnp.concatenate([q_latent, q_rope], axis=-1).astype(cache.pages[layer].dtype)

    out, _ = flash_mla_with_kvcache(
        q,
        cache.pages[layer],
        cache.block_table,
        cache.cache_seqlens,
        head_dim_v=config.kv_lora_rank,
        softmax_scale=config.softmax_scale,
        causal=True,
    )
    out = jnp.einsum("bshc,chv->bshv", out.astype(x.dtype), w_uv, precision=precision)
    return linear(
        out.reshape(*x.shape[:2], config.num_heads * config.v_head_dim), params["o_proj"], precision
    ), cache
