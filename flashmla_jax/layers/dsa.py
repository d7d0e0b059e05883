"""DeepSeek sparse attention (DSA): MLA that attends to the tokens which an indexer chooses.

The functions are those of `flashmla_jax.layers.mla`, for layers that have an indexer
(`flashmla_jax.layers.indexer`) among their parameters, as `indexer`:

- `prefill` for whole sequences without a cache; differentiable, with the choice as a constant;
- `prefill_into_cache` for the next tokens of sequences that may have a past in the cache;
- `decode` for the newest tokens, a few of each sequence.

Each token attends to no more than `topk` tokens, itself among those to choose from. All attend in
MQA form, to latents as they lie, for every query has a choice of its own. Where there cannot be
more than `topk` tokens, all are chosen: that is decided from shapes, and `mla`'s dense attention
runs.

The cache holds the indexers' keys beside the latents (`PagedKVCache.create(...,
index_head_dim=...)`).

Source: DeepSeek-V3.2-Exp (github.com/deepseek-ai/DeepSeek-V3.2-Exp).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from flashmla_jax.attention import flash_mla_sparse_fwd, flash_mla_with_kvcache
from flashmla_jax.cache import layout
from flashmla_jax.cache.layout import HEAD_DIM, PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import indexer, mla
from flashmla_jax.layers.indexer import IndexerConfig
from flashmla_jax.layers.mla import MLAConfig, Params


def prefill(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    precision: jax.lax.PrecisionLike = None,
    *,
    index: IndexerConfig,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention over whole sequences from their first token on, without a cache.

    Args:
      params: as `mla` and `indexer` describe them.
      config: the shape of the layer.
      x: [batch, s, hidden], padded at the end with anything finite.
      precision: of all products.
      index: the shape of the indexer.

    Returns:
      The layer's output [batch, s, hidden], and what to cache: [batch, s, 576] and the index keys
      [batch, s, index_head_dim].
    """
    batch, s, _ = x.shape
    token = jnp.arange(s, dtype=jnp.int32)
    cos, sin = mla.rope_tables(config, jnp.broadcast_to(token, (batch, s)))
    keys = indexer.project_k(params["indexer"], index, x, cos, sin, precision)
    if s <= index.topk or batch == 0:
        out, kv = mla.prefill(params, config, x, precision)
        return out, (kv, keys)

    kv = mla.compress_kv(params, config, x, cos, sin, precision)
    q_index, weights = _project_index(params, config, index, x, cos, sin, precision)
    num_visible = jnp.broadcast_to(token + 1, (batch, s))
    chosen = indexer.choose(q_index, weights, keys, num_visible, index.topk, precision)
    # All sequences are one for the kernel, which looks at nothing but what is chosen.
    start = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * s
    chosen = jnp.where(chosen >= 0, chosen + start, -1)
    params = mla.absorb(params, config)
    q = mla.absorbed_q(params, config, x, cos, sin, precision)
    out = _attend(q, kv.reshape(batch * s, 1, HEAD_DIM), chosen, config.softmax_scale)
    return mla.project_latents(params, config, out, precision), (kv, keys)


def prefill_into_cache(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    cache: PagedKVCache,
    layer: int | jax.Array,
    precision: jax.lax.PrecisionLike = None,
    *,
    index: IndexerConfig,
) -> tuple[jax.Array, PagedKVCache]:
    """Writes the next tokens to the cache and attends from them to what is chosen of all before.

    Args:
      params: as `mla` and `indexer` describe them.
      config: the shape of the layer.
      x: [batch, s, hidden], of which the first `cache.num_new[i]` are sequence `i`'s next tokens;
        the rest is padding and may hold anything.
      cache: has made room for them, and has index keys; see `mla.prefill_into_cache`.
      layer: whose pages of the cache are meant, see `PagedKVCache.at_layer`.
      precision: of all products.
      index: the shape of the indexer.

    Returns:
      The layer's output [batch, s, hidden], in which rows of padding mean nothing but are finite,
      and the cache with the new tokens in it.

    Raises:
      ValueError: for `x` of another batch than the cache's, or a cache without such index keys.
    """
    _check(cache, x, index)
    token = jnp.arange(x.shape[1], dtype=jnp.int32)
    is_new = token < cache.num_new[:, None]
    positions = (cache.cache_seqlens - cache.num_new)[:, None] + token
    cos, sin = mla.rope_tables(config, positions)
    keys = indexer.project_k(params["indexer"], index, x, cos, sin, precision)
    cache = cache.append_index(layer, keys)
    if _sees_all(cache, index):
        return mla.prefill_into_cache(params, config, x, cache, layer, precision)

    kv = mla.compress_kv(params, config, x, cos, sin, precision)
    cache = cache.append(layer, kv[:, :, None].astype(cache.dtype))
    view = cache.at_layer(layer)
    num_visible = jnp.where(is_new, positions + 1, 0)  # so that padding attends to nothing
    chosen = _choose(params, config, index, x, view, num_visible, cos, sin, precision)
    params = mla.absorb(params, config)
    q = mla.absorbed_q(params, config, x, cos, sin, precision).astype(mla.query_dtype(cache, x))
    if cache.is_fp8:
        # To all tokens of these sequences, side by side: what is chosen by many is made once.
        capacity = cache.max_pages_per_seq * PAGE_SIZE
        tokens = view.pages[0].at[view.block_table].get(mode="clip")
        tokens = layout.dequantize(tokens, dtype=q.dtype)
        start = jnp.arange(cache.batch, dtype=jnp.int32)[:, None, None] * capacity
        places = jnp.where(chosen >= 0, chosen + start, -1)
    else:
        tokens, places = view.pages[0], indexer.pool_indices(chosen, view.block_table)
    out = _attend(q, tokens.reshape(-1, 1, HEAD_DIM), places, config.softmax_scale)
    return mla.project_latents(params, config, out.astype(x.dtype), precision), cache


def decode(
    params: Params,
    config: MLAConfig,
    x: jax.Array,
    cache: PagedKVCache,
    layer: int | jax.Array,
    precision: jax.lax.PrecisionLike = None,
    *,
    index: IndexerConfig,
) -> tuple[jax.Array, PagedKVCache]:
    """Writes the newest tokens to the cache and attends from them to what is chosen of all.

    Args:
      params: as `mla` and `indexer` describe them.
      config: the shape of the layer.
      x: [batch, s_q, hidden], the newest `s_q` tokens of every sequence.
      cache: has made room for them, and has index keys; see `mla.decode`.
      layer: whose pages of the cache are meant, see `PagedKVCache.at_layer`.
      precision: of the projections, of W_UK and W_UV, and of the indexer's products.
      index: the shape of the indexer.

    Returns:
      The layer's output [batch, s_q, hidden], and the cache with the new tokens in it.

    Raises:
      ValueError: for `x` of another batch than the cache's, or a cache without such index keys.
    """
    _check(cache, x, index)
    s_q = x.shape[1]
    positions = cache.cache_seqlens[:, None] - s_q + jnp.arange(s_q, dtype=jnp.int32)
    cos, sin = mla.rope_tables(config, positions)
    keys = indexer.project_k(params["indexer"], index, x, cos, sin, precision)
    cache = cache.append_index(layer, keys)
    if _sees_all(cache, index):
        return mla.decode(params, config, x, cache, layer, precision)

    kv = mla.compress_kv(params, config, x, cos, sin, precision)
    cache = cache.append(layer, kv[:, :, None].astype(cache.dtype))
    view = cache.at_layer(layer)
    chosen = _choose(params, config, index, x, view, positions + 1, cos, sin, precision)
    params = mla.absorb(params, config)
    q = mla.absorbed_q(params, config, x, cos, sin, precision).astype(mla.query_dtype(cache, x))
    out, _ = flash_mla_with_kvcache(
        q,
        view.pages[0],
        None,
        None,
        head_dim_v=config.kv_lora_rank,
        softmax_scale=config.softmax_scale,
        is_fp8_kvcache=cache.is_fp8,
        indices=indexer.pool_indices(chosen, view.block_table),
    )
    return mla.project_latents(params, config, out.astype(x.dtype), precision), cache


def _project_index(
    params: Params,
    config: MLAConfig,
    index: IndexerConfig,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    precision: jax.lax.PrecisionLike,
) -> tuple[jax.Array, jax.Array]:
    q_latent = mla.compress_q(params, config, x, precision)
    return indexer.project_q(params["indexer"], index, x, q_latent, cos, sin, precision)


def _choose(
    params: Params,
    config: MLAConfig,
    index: IndexerConfig,
    x: jax.Array,
    view: PagedKVCache,
    num_visible: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    """The positions of the cached tokens that `x` attends to, int32[batch, s, topk] or -1."""
    q, weights = _project_index(params, config, index, x, cos, sin, precision)
    return indexer.choose_cached(
        q, weights, view.index_pages[0], view.block_table, num_visible, index.topk, precision
    )


def _attend(q: jax.Array, tokens: jax.Array, chosen: jax.Array, softmax_scale: float) -> jax.Array:
    """From q [batch, s, heads, 576] to `chosen` int32[batch, s, topk] of tokens [any, 1, 576].

    Returns [batch, s, heads, 512].
    """
    batch, s, heads, _ = q.shape
    rows = batch * s
    out, _, _ = flash_mla_sparse_fwd(
        q.reshape(rows, heads, HEAD_DIM), tokens, chosen.reshape(rows, 1, -1), softmax_scale
    )
    return out.reshape(batch, s, heads, out.shape[-1])


def _sees_all(cache: PagedKVCache, index: IndexerConfig) -> bool:
    """Whether no sequence can have more tokens than are chosen."""
    pages = cache.max_pages_per_seq
    return not is_symbolic_dim(pages) and pages * PAGE_SIZE <= index.topk


def _check(cache: PagedKVCache, x: jax.Array, index: IndexerConfig) -> None:
    mla.check_batch(cache, x)
    if cache.index_head_dim != index.head_dim:
        raise ValueError(
            f"the cache must hold index keys of {index.head_dim} numbers, created with "
            f"index_head_dim={index.head_dim}, it has index_head_dim={cache.index_head_dim}"
        )
