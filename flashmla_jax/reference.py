"""What every op means, in plain `jax.numpy`.

The oracle of the tests, and what runs on platforms that have no kernel. Nothing here is fast: the
pages of a whole batch are gathered before the first product.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST
_PANEL = 64  # columns; what head_dim is a multiple of


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    softmax_scale: float,
    causal: bool,
    head_dim_v: int = 512,
    dequantize: Callable[[jax.Array], jax.Array] | None = None,
    in_panels: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Dense MLA decoding; `flashmla_jax.flash_mla_with_kvcache` says what it means.

    Args:
      q: [batch, s_q, h_q, head_dim].
      k_cache: [num_pages, page_size, h_kv, head_dim], or what `dequantize` takes.
      block_table: int32[batch, max_pages_per_seq].
      cache_seqlens: int32[batch].
      softmax_scale: factor of the scores.
      causal: whether query j sees only tokens `t <= cache_seqlens - s_q + j`.
      head_dim_v: how many leading numbers of a token are its value.
      dequantize: makes numbers in q's dtype [..., head_dim] of pages in another format.
      in_panels: whether float32 scores are summed in pieces: closer, and slower.

    Returns:
      out [batch, s_q, h_q, head_dim_v] in q's dtype and lse float32 [batch, h_q, s_q].
    """
    batch, s_q, h_q, head_dim = q.shape
    num_pages, page_size, h_kv, _ = k_cache.shape

    # Tokens beyond the table are read from a page that does not exist, like any other bad page id.
    overhang = -(-s_q // page_size)
    table = jnp.pad(block_table, ((0, 0), (0, overhang)), constant_values=-1)
    capacity = block_table.shape[1] * page_size
    lengths = jnp.clip(cache_seqlens, 0, capacity + s_q)

    in_pool = (table >= 0) & (table < num_pages)
    tokens = k_cache[jnp.where(in_pool, table, 0)]
    if dequantize is not None:
        tokens = dequantize(tokens)
    tokens = tokens.reshape(batch, -1, h_kv, head_dim)
    in_pool = jnp.repeat(in_pool, page_size, axis=1)[..., None, None]
    position = jnp.arange(tokens.shape[1])
    exists = (position < lengths[:, None])[..., None, None]

    k = jnp.where(exists, jnp.where(in_pool, tokens, jnp.nan), 0)
    # What is not finite reaches the rows that see it by its score; 0 x NaN would reach the others.
    v = k[..., :head_dim_v]
    v = jnp.where(jnp.isfinite(v), v, 0)

    rows = q.reshape(batch, s_q, h_kv, h_q // h_kv, head_dim)
    scores = softmax_scale * _scores("bskgd,btkd->bkgst", rows, k, in_panels)
    last = lengths[:, None] - (s_q - jnp.arange(s_q) if causal else jnp.ones(s_q, jnp.int32))
    visible = position <= last[..., None]  # [batch, s_q, token]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)

    row_max = jnp.max(scores, axis=-1, keepdims=True)
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    p = jnp.exp(scores - row_max)
    total = jnp.sum(p, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkgst,btkd->bkgsd",
        p.astype(q.dtype),
        v,
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )
    out = out / jnp.where(total == 0, 1, total)
    lse = row_max[..., 0] + jnp.log(total[..., 0])
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, s_q, h_q, head_dim_v)
    return out.astype(q.dtype), lse.reshape(batch, h_q, s_q)


def sparse_attention(
    q: jax.Array,
    tokens: jax.Array,
    exists: jax.Array,
    *,
    softmax_scale: float,
    attn_sink: jax.Array | None = None,
    head_dim_v: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of each query token to tokens of its own; `flashmla_jax.flash_mla_sparse_fwd`.

    Args:
      q: [..., h_q, head_dim].
      tokens: [..., topk, head_dim] in q's dtype: keys, whose first numbers are the values.
      exists: bool[..., topk]. The others may hold anything.
      softmax_scale: factor of the scores.
      attn_sink: float32[h_q], a score that takes its share of the output and gives nothing.
      head_dim_v: how many leading numbers of a token are its value.

    Returns:
      out [..., h_q, head_dim_v] in q's dtype; and, of the scores without the sink, the largest and
      the logarithm of the sum of exponentials, float32[..., h_q].
    """
    k = jnp.where(exists[..., None], tokens, 0)
    scores = softmax_scale * _scores("...hd,...td->...ht", q, k)
    scores = jnp.where(exists[..., None, :], scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, initial=-jnp.inf)
    shift = jnp.where(largest == -jnp.inf, 0, largest)
    p = jnp.exp(scores - shift[..., None])
    total = jnp.sum(p, axis=-1)
    out = jnp.einsum(
        "...ht,...td->...hd",
        p.astype(q.dtype),
        k[..., :head_dim_v],
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )
    lse = shift + jnp.log(total)
    share = jnp.where(total == 0, 0, 1 / total)
    if attn_sink is not None:
        share *= jnp.where(total == 0, 0, jax.nn.sigmoid(lse - attn_sink))
    return (out * share[..., None]).astype(q.dtype), largest, lse


def merge_attention_states(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combines attention over disjoint sets of keys; see `flashmla_jax.merge_attention_states`.

    Args:
      outs: [parts, batch, s_q, h_q, head_dim_v].
      lses: float32 [parts, batch, h_q, s_q], natural logarithm, -inf for an empty part.

    Returns:
      out [batch, s_q, h_q, head_dim_v] in the dtype of `outs` and lse float32 [batch, h_q, s_q].
    """
    top = jnp.max(lses, axis=0)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lses - top)
    total = jnp.sum(weights, axis=0)
    weights = weights / jnp.where(total == 0, 1, total)
    weights = jnp.swapaxes(weights, -1, -2)[..., None]
    # An empty part has no say, whatever its output holds.
    parts = jnp.where(weights == 0, 0, outs.astype(jnp.float32) * weights)
    return jnp.sum(parts, axis=0).astype(outs.dtype), top + jnp.log(total)


def cache_append(
    k_cache: jax.Array,
    new_kv: jax.Array,
    block_table: jax.Array,
    start: jax.Array,
    count: jax.Array,
    copy_from: jax.Array | None = None,
) -> jax.Array:
    """Writes new tokens into their pages; `flashmla_jax.ops.cache_append` says what it means.

    Args:
      k_cache: [num_pages, page_size, h_kv, head_dim].
      new_kv: [batch, num_tokens, h_kv, head_dim].
      block_table: int32[batch, max_pages_per_seq].
      start: int32[batch], the position of each sequence's first new token.
      count: int32[batch], how many of its rows are written.
      copy_from: int32[batch], the page whose rows come before the first new token's; -1, or None
        for all, where there is none.

    Returns:
      The pool [num_pages, page_size, h_kv, head_dim] with the tokens in it.
    """
    page, row = _places(k_cache, block_table, start, count, new_kv.shape[1])
    if copy_from is not None:
        source, target = _heads(k_cache, page, row, copy_from)
        k_cache = k_cache.at[target].set(k_cache.at[source].get(mode="clip"), mode="drop")
    return k_cache.at[page, row].set(new_kv, mode="drop")


def cache_append_transpose(
    cotangent: jax.Array,
    block_table: jax.Array,
    start: jax.Array,
    count: jax.Array,
    copy_from: jax.Array,
    *,
    num_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """The cotangents of `cache_append`'s pool and new tokens, from that of its result."""
    page, row = _places(cotangent, block_table, start, count, num_tokens)
    new_kv = cotangent.at[page, row].get(mode="fill", fill_value=0)
    pool = cotangent.at[page, row].set(0, mode="drop")
    source, target = _heads(pool, page, row, copy_from)
    copied = pool.at[target].get(mode="fill", fill_value=0)
    return pool.at[target].set(0, mode="drop").at[source].add(copied, mode="drop"), new_kv


def _scores(subscripts: str, q: jax.Array, k: jax.Array, in_panels: bool = True) -> jax.Array:
    """The products of queries and keys, whose last axis is summed over.

    XLA on a GPU sums them one after the other, which in float32 shows: hence sums over panels of
    columns, and their sum. Panels take turns, as the scores of all at once take too much memory.
    """

    def product(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, q, k, precision=_HIGHEST, preferred_element_type=jnp.float32)

    def of_panel(i: jax.Array | int) -> jax.Array:
        start = i * _PANEL
        return product(*(jax.lax.dynamic_slice_in_dim(x, start, _PANEL, -1) for x in (q, k)))

    panels, rest = divmod(q.shape[-1], _PANEL)
    if not in_panels or q.dtype != jnp.float32 or rest:
        return product(q, k)
    return jax.lax.fori_loop(1, panels, lambda i, total: total + of_panel(i), of_panel(0))


def _heads(
    k_cache: jax.Array, page: jax.Array, row: jax.Array, copy_from: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(page, row) of all that is copied before the first new token, and where it goes.

    Both [batch, page_size] each; the pages are num_pages where nothing is copied.
    """
    num_pages, page_size = k_cache.shape[:2]
    copies = (copy_from >= 0) & (copy_from < num_pages) & (page[:, 0] < num_pages)
    rows = jnp.arange(page_size, dtype=jnp.int32)
    copied = copies[:, None] & (rows < row[:, :1])
    rows = jnp.broadcast_to(rows, copied.shape)
    source = jnp.where(copied, copy_from[:, None], num_pages)
    return (source, rows), (jnp.where(copied, page[:, :1], num_pages), rows)


def _places(
    k_cache: jax.Array, block_table: jax.Array, start: jax.Array, count: jax.Array, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """The page of each new token, num_pages where it has none, and its row there."""
    num_pages, page_size = k_cache.shape[:2]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    position = start[:, None] + token
    slot = position // page_size
    has_place = (token < count[:, None]) & (position >= 0) & (slot < block_table.shape[1])
    page = jnp.take_along_axis(block_table, slot, axis=1, mode="clip")
    # A page id past the end of the pool is dropped; a negative one would count from the end.
    return jnp.where(has_place & (page >= 0), page, num_pages), position % page_size
