"""Multi-head Latent Attention as pure functions over a dict of arrays.

A token leaves 576 numbers in the cache: a latent of 512, from which every head's key and value can
be expanded, and 64 rotated numbers that all heads share as the positional part of their key.
There are two ways to attend, equal in exact arithmetic:

- The MHA form: expand the latent through `kv_b_proj` into a key and a value per head. Cheap when
  many queries share one expansion: `prefill` for whole sequences without a cache, and
  `prefill_into_cache` for the next tokens of sequences, many of them, that may have a past there
  (to which a few hundred attend in the other form).
- The MQA form, `decode`: move `kv_b_proj` to the other side of the dot product ("absorb" it). The
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

Any projection but `kv_b_proj` may also have a `bias`, `[out]`. For serving, `absorb` replaces the
kernel of `kv_b_proj` by its two halves, in the order in which they are multiplied with:

    kv_b_proj.w_uk             [heads, 512, nope]
    kv_b_proj.w_uv             [heads, v, 512]

Every function takes either form.

A scan over layers, whose number is an array, carries a cache with one pool for all of them
(`PagedKVCache.create(..., one_pool=True)`), and updates it in place.

Sources: DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C; YaRN (arXiv:2309.00071); the
`inference/model.py` of DeepSeek-V3 and `modeling_deepseek_v3.py` of Hugging Face transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from flashmla_jax.attention import flash_mla_with_kvcache, merge_attention_states
from flashmla_jax.cache import layout
from flashmla_jax.cache.layout import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import mha
from flashmla_jax.ops import _ffi

Params = Mapping[str, Any]
Partitioning = Mapping[str, tuple[str | None, str | None]]

_ROPE_DIM = HEAD_DIM - HEAD_DIM_V

# How many cached tokens `prefill_into_cache` expands at a time, unless told: of all sequences
# together, but of each at least so many.
_PREFIX_TOKENS, _LEAST_PREFIX_CHUNK = 4096, 1024
# Up to how many new tokens of each sequence it does not expand them at all, unless told; the same
# for an FP8 cache. (What it is worth on an H200: `python -m benchmarks.prefill`.)
_ABSORBED_TOKENS, _ABSORBED_TOKENS_FP8 = 512, 256


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
                f"factor={self.factor} and "
                f"original_max_position_embeddings={self.original_max_position_embeddings}"
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
                f"model with kv_lora_rank={self.kv_lora_rank} and "
                f"qk_rope_head_dim={self.qk_rope_head_dim} does not fit it"
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


def head_partitioning(config: MLAConfig, axis: str) -> Partitioning:
    """Which axis of which kernel to divide so that each device has some of the heads.

    This is the tensor parallelism of DeepSeek: latents, and with them the cache, are the same on
    all devices, and one all-reduce, after `o_proj`, makes the output of a layer whole.

    Args:
      config: the shape of the layer.
      axis: of the mesh.

    Returns:
      The names of a kernel's two axes, by projection: `kernel_partitioning` of the modules. Weights
      from `absorb` are divided over the first of their three axes.
    """
    query = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    return {query: (None, axis), "kv_b_proj": (None, axis), "o_proj": (axis, None)}


def check_partitioning(
    kernel_partitioning: Partitioning, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> None:
    """Raises a ValueError unless it gives two axes of kernels that are in `parameter_shapes`."""
    kernels = {name for name, leaves in shapes.items() if "kernel" in leaves}
    for name, axes in kernel_partitioning.items():
        if name not in kernels or len(axes) != 2:
            raise ValueError(
                "kernel_partitioning must name two axes for kernels of "
                f"{', '.join(sorted(kernels))}, got {name!r}: {axes!r}"
            )


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Divides `x` [..., dim] by its root mean square over `dim`, and multiplies by `scale` [dim].

    The division is done in float32. Returns `x`'s shape and dtype.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def linear(x: jax.Array, params: Params, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """`x` [..., in] times `params["kernel"]` [in, out], plus `params["bias"]` [out] if any.

    The kernel may also be a `weight` [out, in], see `transpose_kernels`.
    """
    if "weight" in params:
        out = jnp.einsum("...i,oi->...o", x, params["weight"], precision=precision)
    else:
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


def compress_q(
    params: Params, config: MLAConfig, x: jax.Array, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """The normalised latent of the queries of `x` [..., hidden]: [..., q_lora_rank]."""
    q = linear(x, params["q_a_proj"], precision)
    return rms_norm(q, params["q_a_layernorm"]["scale"], config.norm_eps)


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
        q = linear(compress_q(params, config, x, precision), params["q_b_proj"], precision)
    q = q.reshape(*x.shape[:-1], config.num_heads, config.qk_head_dim)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, apply_rope(q_rope, cos[..., None, :], sin[..., None, :])


def absorbed_q(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """The query heads of `x` [batch, s, hidden] for cached tokens as they lie, in MQA form.

    Returns [batch, s, heads, 576].
    """
    q_nope, q_rope = project_q(params, config, x, cos, sin, precision)
    return _absorb_q(params, config, q_nope, q_rope, precision)


def _absorb_q(
    params: Params,
    config: MLAConfig,
    q_nope: jax.Array,
    q_rope: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Query heads as `project_q` gives them, for cached tokens as they lie.

    Returns [batch, s, heads, 576].
    """
    w_uk, _ = split_kv_b(params, config)
    q_latent = jnp.einsum("bshn,hcn->bshc", q_nope, w_uk, precision=precision)
    return jnp.concatenate([q_latent, q_rope], axis=-1)


def project_latents(
    params: Params,
    config: MLAConfig,
    latents: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """What attention in MQA form results in, [batch, s, heads, 512], to the layer's output.

    Returns [batch, s, hidden].
    """
    return _project_out(params, _expand_latents(params, config, latents, precision), precision)


def _expand_latents(
    params: Params,
    config: MLAConfig,
    latents: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """What attention in MQA form results in, [batch, s, heads, 512], to what it does in MHA form.

    Returns [batch, s, heads, v].
    """
    _, w_uv = split_kv_b(params, config)
    return jnp.einsum("bshc,hvc->bshv", latents, w_uv, precision=precision)


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


def absorb(params: Params, config: MLAConfig) -> dict[str, Any]:
    """Prepares a layer's weights for serving, once, rather than in every step.

    Args:
      params: as in the module's docstring.
      config: the shape of the layer.

    Returns:
      The same parameters, in which `kv_b_proj` is `w_uk` [heads, 512, nope] and `w_uv`
      [heads, v, 512], arrays of their own. Being parameters in place of others, they cannot
      disagree with them; after training, absorb again.
    """
    w_uk, w_uv = split_kv_b(params, config)
    return {**params, "kv_b_proj": {"w_uk": w_uk, "w_uv": w_uv}}


def transpose_kernels(params: Params) -> dict[str, Any]:
    """Nested parameters with a `weight` [out, in] in place of each `kernel` [in, out].

    The product of a single token, which XLA makes a sum on a GPU, then reads the weights in the
    order in which they lie.
    """
    transposed: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            transposed[name] = transpose_kernels(value)
        elif name == "kernel":
            transposed["weight"] = jnp.swapaxes(value, -1, -2)
        else:
            transposed[name] = value
    return transposed


def split_kv_b(params: Params, config: MLAConfig) -> tuple[jax.Array, jax.Array]:
    """The halves of `kv_b_proj`: `w_uk` [heads, 512, nope] and `w_uv` [heads, v, 512].

    Each head's columns are its key's, then its value's; the split is not one of the whole matrix.
    """
    kv_b = params["kv_b_proj"]
    if "w_uk" in kv_b:
        return kv_b["w_uk"], kv_b["w_uv"]
    kernel = kv_b["kernel"].reshape(config.kv_lora_rank, config.num_heads, -1)
    w_uk, w_uv = jnp.split(kernel, [config.qk_nope_head_dim], axis=-1)
    return w_uk.transpose(1, 0, 2), w_uv.transpose(1, 2, 0)


def expand_kv(
    params: Params,
    config: MLAConfig,
    kv: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]:
    """The keys and values of all heads, from cached tokens `kv` [batch, s, 576].

    Returns `k` [batch, s, heads, nope + 64] and `v` [batch, s, heads, v].
    """
    latent, k_rope = jnp.split(kv, [config.kv_lora_rank], axis=-1)
    w_uk, w_uv = split_kv_b(params, config)
    k_nope = jnp.einsum("bsc,hcn->bshn", latent, w_uk, precision=precision)
    v = jnp.einsum("bsc,hvc->bshv", latent, w_uv, precision=precision)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], config.qk_rope_head_dim))
    return jnp.concatenate([k_nope, k_rope], axis=-1), v


def prefill(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    precision: jax.lax.PrecisionLike = None,
    *,
    implementation: mha.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over whole sequences from their first token on, in MHA form, without a cache.

    Differentiable, in memory that grows with `s` and not with its square.

    Args:
      params: as in the module's docstring.
      config: the shape of the layer.
      x: [batch, s, hidden]. Sequences shorter than `s` are padded at the end, with anything finite:
        being causal, no token sees the padding after it, so its outputs are not to be used and need
        no mask.
      precision: of all products.
      implementation: of attention, see `mha.attention`.

    Returns:
      The layer's output [batch, s, hidden] and what to cache, [batch, s, 576].
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    cos, sin = rope_tables(config, positions)
    q = jnp.concatenate(project_q(params, config, x, cos, sin, precision), axis=-1)
    kv = compress_kv(params, config, x, cos, sin, precision)
    k, v = expand_kv(params, config, kv, precision)
    out, _ = mha.attention(
        q,
        k,
        v,
        config.softmax_scale,
        causal=True,
        precision=precision,
        implementation=implementation,
    )
    return _project_out(params, out, precision), kv


def prefill_into_cache(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    cache: PagedKVCache,
    layer: int | jax.Array,
    precision: jax.lax.PrecisionLike = None,
    *,
    absorb_prefix: bool | None = None,
    prefix_chunk: int | None = None,
    implementation: mha.Implementation | None = None,
) -> tuple[jax.Array, PagedKVCache]:
    """Writes the next tokens to the cache and attends from them to all before.

    The new tokens attend to each other in MHA form. What a sequence had in the cache before, its
    prefix (an earlier chunk of a long prompt, or pages it shares with another sequence), is read
    from there, until the end of the batch's longest prefix: without one, nothing is read. Either it
    is expanded and attended to `prefix_chunk` tokens at a time, or, if the new tokens are too few
    to pay for that, they attend to it in MQA form, as it lies. The parts are merged by their
    log-sum-exp, in float32. Not differentiable; `prefill` is.

    Args:
      params: as in the module's docstring.
      config: the shape of the layer.
      x: [batch, s, hidden], of which the first `cache.num_new[i]` are sequence `i`'s next tokens;
        the rest is padding and may hold anything.
      cache: has made room for them, once for all layers: `cache, ok = cache.allocate(...)` with at
        most `s` tokens, and 0 for a sequence that is to be left alone.
      layer: whose pages of the cache are meant, see `PagedKVCache.at_layer`.
      precision: of all products, but that of attention in MQA form.
      absorb_prefix: whether to attend to prefixes in MQA form, as `flash_mla_with_kvcache` can
        (float32 not on a GPU, and slowly where it has no kernel). By default up to 512 new tokens
        of each sequence do, of two bytes a number, in a cache of the same type; up to 256 in one of
        FP8 tokens; on platforms for which this process has a kernel.
      prefix_chunk: cached tokens of a sequence that are expanded at a time, a multiple of the page
        size, 64. By default 4096 divided by the batch, and at least 1024. More are faster, and take
        memory for their keys and values. Without effect in MQA form.
      implementation: of attention in MHA form, see `mha.attention`.

    Returns:
      The layer's output [batch, s, hidden], in which rows of padding mean nothing but are finite,
      and the cache with the new tokens in it.

    Raises:
      ValueError: for `x` of another batch than the cache's, or a `prefix_chunk` that is no multiple
        of 64.

    Source: chunked prefill of vLLM's `mla_attention.py`.
    """
    if prefix_chunk is None:
        prefix_chunk = _LEAST_PREFIX_CHUNK
        if not is_symbolic_dim(cache.batch) and cache.batch > 0:
            share = _PREFIX_TOKENS // cache.batch // PAGE_SIZE * PAGE_SIZE
            prefix_chunk = max(prefix_chunk, share)
    if prefix_chunk < 1 or prefix_chunk % PAGE_SIZE:
        raise ValueError(f"prefix_chunk must be a multiple of {PAGE_SIZE}, got {prefix_chunk}")
    if not is_symbolic_dim(cache.max_pages_per_seq):
        prefix_chunk = min(prefix_chunk, cache.max_seqlen)
    check_batch(cache, x)
    token = jnp.arange(x.shape[1], dtype=jnp.int32)
    # What padding holds, NaN say, would pass the mask as 0 * NaN.
    x = jnp.where((token < cache.num_new[:, None])[..., None], x, 0)

    start = cache.cache_seqlens - cache.num_new
    cos, sin = rope_tables(config, start[:, None] + token)
    q_nope, q_rope = project_q(params, config, x, cos, sin, precision)
    kv = compress_kv(params, config, x, cos, sin, precision)
    cache = cache.append(layer, kv[:, :, None].astype(cache.dtype))
    if cache.is_fp8:
        # As who reads the cache will see them: it is no matter which tokens are read together.
        rounded = layout.quantize(kv.astype(cache.dtype))
        kv = layout.dequantize(rounded, dtype=kv.dtype)
    view = cache.at_layer(layer)
    attend = functools.partial(
        mha.attention,
        jnp.concatenate([q_nope, q_rope], axis=-1),
        softmax_scale=config.softmax_scale,
        precision=precision,
        implementation=implementation,
    )
    out, lse = attend(*expand_kv(params, config, kv, precision), causal=True)
    state = out.astype(jnp.float32), lse
    prefix = jnp.where(cache.num_new > 0, start, 0)

    def attend_to_chunk(chunk: jax.Array, state: _State) -> _State:
        begin = chunk * prefix_chunk
        lengths = jnp.clip(prefix - begin, 0, prefix_chunk)
        cached = _gather(view, begin // PAGE_SIZE, prefix_chunk // PAGE_SIZE)
        cached = jnp.where((jnp.arange(prefix_chunk) < lengths[:, None])[..., None], cached, 0)
        k, v = expand_kv(params, config, cached.astype(x.dtype), precision)
        return _merge(state, attend(k, v, kv_lengths=lengths))

    def expanded(state: _State) -> _State:
        num_chunks = -(-jnp.max(prefix, initial=0) // prefix_chunk)
        return jax.lax.fori_loop(0, num_chunks, attend_to_chunk, state)

    def absorbed(state: _State) -> _State:
        q = _absorb_q(params, config, q_nope, q_rope, precision)
        latents, lse = _attend_to_cache(config, q.astype(query_dtype(cache, x)), view, prefix)
        out = _expand_latents(params, config, latents.astype(x.dtype), precision)
        return _merge(state, (out, lse))

    def absorbed_if_any(state: _State) -> _State:
        return jax.lax.cond(jnp.any(prefix > 0), absorbed, lambda state: state, state)

    if absorb_prefix is None:
        # On a GPU the host would have to wait for the condition.
        forms = {_ffi.CPU: absorbed_if_any, _ffi.CUDA: absorbed}
        forms = {name: forms[name] for name in _where_absorbed(cache, x)}
        state = jax.lax.platform_dependent(state, **forms, default=expanded)
    else:
        state = absorbed(state) if absorb_prefix else expanded(state)
    return _project_out(params, state[0].astype(x.dtype), precision), cache


def decode(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    cache: PagedKVCache,
    layer: int | jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, PagedKVCache]:
    """Writes the newest tokens to the cache and attends from them to all of it, in MQA form.

    Args:
      params: as in the module's docstring; those of `absorb` save a step the preparation.
      config: the shape of the layer.
      x: [batch, s_q, hidden], the newest `s_q` tokens of every sequence.
      cache: has made room for them, once for all layers: `cache, ok = cache.allocate(...)` with
        `s_q` tokens, or 0 for a sequence that is to be left alone, whose output then means nothing.
      layer: whose pages of the cache are meant, see `PagedKVCache.at_layer`.
      precision: of the projections and of W_UK and W_UV.

    Returns:
      The layer's output [batch, s_q, hidden], and the cache with the new tokens in it.

    Raises:
      ValueError: for `x` of another batch than the cache's.
    """
    check_batch(cache, x)
    s_q = x.shape[1]
    positions = cache.cache_seqlens[:, None] - s_q + jnp.arange(s_q, dtype=jnp.int32)
    cos, sin = rope_tables(config, positions)
    kv = compress_kv(params, config, x, cos, sin, precision)
    cache = cache.append(layer, kv[:, :, None].astype(cache.dtype))
    view = cache.at_layer(layer)

    params = absorb(params, config)
    q = absorbed_q(params, config, x, cos, sin, precision).astype(query_dtype(cache, x))

    out, _ = _attend_to_cache(config, q, view, view.cache_seqlens, causal=True)
    return project_latents(params, config, out.astype(x.dtype), precision), cache


# Attention to some of the tokens: float32 out [batch, s, heads, v], and lse [batch, heads, s].
_State = tuple[jax.Array, jax.Array]


def _merge(state: _State, more: tuple[jax.Array, jax.Array]) -> _State:
    """Attention to more tokens; that may be less exact."""
    outs = jnp.stack([state[0], more[0].astype(jnp.float32)])
    return merge_attention_states(outs, jnp.stack([state[1], more[1]]))


def _attend_to_cache(
    config: MLAConfig, q: jax.Array, view: PagedKVCache, lengths: jax.Array, causal: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Attention in MQA form, to so many tokens of each sequence of the layer `view` is for.

    Returns out [batch, s, heads, 512] in q's dtype and lse float32[batch, heads, s].
    """
    return flash_mla_with_kvcache(
        q,
        view.pages[0],
        view.block_table,
        lengths,
        head_dim_v=config.kv_lora_rank,
        softmax_scale=config.softmax_scale,
        causal=causal,
        is_fp8_kvcache=view.is_fp8,
    )


def _where_absorbed(cache: PagedKVCache, x: jax.Array) -> tuple[str, ...]:
    """The platforms on which `x` is to attend to prefixes in MQA form, rather than expand them."""
    most = _ABSORBED_TOKENS_FP8 if cache.is_fp8 else _ABSORBED_TOKENS
    if is_symbolic_dim(x.shape[1]) or x.shape[1] > most:
        return ()
    if x.dtype.itemsize != 2 or (not cache.is_fp8 and cache.dtype != x.dtype):
        return ()
    return tuple(name for name in (_ffi.CPU, _ffi.CUDA) if _ffi.why_no_kernel(name) is None)


def _project_out(params: Params, out: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """The heads' results [batch, s, heads, v] to the layer's output [batch, s, hidden]."""
    heads, size = out.shape[2:]
    return linear(out.reshape(*out.shape[:2], heads * size), params["o_proj"], precision)


def query_dtype(cache: PagedKVCache, x: jax.Array) -> jnp.dtype:
    """The dtype in which `x` attends to a cache: the cache's, but float32 in float32 to FP8."""
    return x.dtype if cache.is_fp8 and x.dtype == jnp.float32 else cache.dtype


def check_batch(cache: PagedKVCache, x: jax.Array) -> None:
    """Raises a ValueError unless `x` is [batch, s, hidden] for a cache of MLA."""
    if x.ndim != 3 or x.shape[0] != cache.batch:
        raise ValueError(
            f"x must be [batch, s, hidden] with the cache's batch {cache.batch}, got {x.shape}"
        )
    if cache.num_kv_heads != 1:
        raise ValueError(f"MLA caches one KV head per token, the cache has {cache.num_kv_heads}")


def _gather(view: PagedKVCache, first: jax.Array, num_pages: int) -> jax.Array:
    """The tokens of `num_pages` pages of each sequence from its page `first` on, [batch, s, 576].

    Of the layer that `view` is for; anything where a sequence has no such page.
    """
    slots = first + jnp.arange(num_pages, dtype=jnp.int32)
    pages = view.block_table.at[:, slots].get(mode="clip")
    tokens = view.pages[0].at[pages].get(mode="clip")
    if view.is_fp8:
        tokens = layout.dequantize(tokens)
    return tokens.reshape(view.batch, num_pages * PAGE_SIZE, HEAD_DIM)
