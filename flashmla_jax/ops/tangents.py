"""The derivative of dense decode, a page at a time.

The op is softmax attention: with the probabilities p of a row's visible tokens, scores s, and a dot
for what is differentiated,

    s.   = scale (q . k + q k.)
    lse. = sum p s.
    out. = sum p s. v + sum p v.  -  lse. out

which is linear in q. and k. and needs of the forward pass its results alone. JAX transposes it for
`jax.grad`. Probabilities are computed anew for each page, then as here: no pass holds those of all
tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flashmla_jax.cache.layout import HEAD_DIM_V

_product = functools.partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def dense_decode(
    operands: Sequence[jax.Array],
    results: Sequence[jax.Array],
    q_tangent: jax.Array,
    k_tangent: jax.Array,
    *,
    softmax_scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """The tangents of `out` and `lse`, the op's results.

    Args:
      operands: q, k_cache, block_table and cache_seqlens, as `flash_mla_with_kvcache` takes them.
      results: its out and lse.
      q_tangent: of q, like q.
      k_tangent: of k_cache, like k_cache.
      softmax_scale: factor of the scores.
      causal: whether query j sees only tokens `t <= cache_seqlens - s_q + j`.

    Returns:
      The tangents [batch, s_q, h_q, 512] in q's dtype and float32 [batch, h_q, s_q].
    """
    q, k_cache, block_table, cache_seqlens = operands
    out, lse = results
    batch, s_q, h_q, _ = q.shape
    num_pages, page_size, h_kv, _ = k_cache.shape
    group = h_q // h_kv

    # As in the reference: tokens beyond the table are in pages that do not exist.
    overhang = -(-s_q // page_size)
    table = jnp.pad(block_table, ((0, 0), (0, overhang)), constant_values=-1)
    lengths = jnp.clip(cache_seqlens, 0, block_table.shape[1] * page_size + s_q)
    in_pool = (table >= 0) & (table < num_pages)
    pages = jnp.where(in_pool, table, 0)
    last = lengths[:, None] - (s_q - jnp.arange(s_q) if causal else jnp.ones(s_q, jnp.int32))

    def grouped(x: jax.Array) -> jax.Array:  # [batch, h_kv, group, s_q, ...]
        return x.reshape(batch, s_q, h_kv, group, -1).transpose(0, 2, 3, 1, 4)

    rows, row_tangents = grouped(q), grouped(q_tangent)
    log_total = lse.reshape(batch, h_kv, group, s_q, 1)

    def of_page(sums: Any, inputs: Any) -> tuple[Any, None]:
        """Adds what a page of each sequence gives to (lse., sum p s. v + sum p v.)."""
        first, page, exists_in_pool, tangent = inputs
        position = first + jnp.arange(page_size)
        exists = (position < lengths[:, None])[..., None, None]
        known = exists_in_pool[:, None, None, None]
        k = jnp.where(exists, jnp.where(known, k_cache[page], jnp.nan), 0)
        tangent = jnp.where(exists, tangent, 0)
        finite = jnp.isfinite(k[..., :HEAD_DIM_V])
        v, v_tangent = (jnp.where(finite, x[..., :HEAD_DIM_V], 0) for x in (k, tangent))

        visible = (position <= last[..., None])[:, None, None]  # [batch, 1, 1, s_q, token]
        scores = softmax_scale * _product("bkgsd,btkd->bkgst", rows, k)
        p = jnp.where(visible, jnp.exp(jnp.where(visible, scores - log_total, 0)), 0)
        score_tangents = softmax_scale * (
            _product("bkgsd,btkd->bkgst", row_tangents, k)
            + _product("bkgsd,btkd->bkgst", rows, tangent)
        )
        weights = p * jnp.where(visible, score_tangents, 0)
        of_lse, of_out = sums
        of_lse = of_lse + weights.sum(axis=-1, keepdims=True)
        of_out = of_out + _product("bkgst,btkd->bkgsd", weights, v.astype(jnp.float32))
        of_out = of_out + _product("bkgst,btkd->bkgsd", p, v_tangent.astype(jnp.float32))
        return (of_lse, of_out), None

    count = table.shape[1]
    # One gather, whose transpose is one scatter into a pool, and not one for every page.
    tangents = jnp.where(in_pool[..., None, None, None], k_tangent[pages], 0)
    inputs = (
        jnp.arange(count, dtype=jnp.int32) * page_size,
        pages.T,
        in_pool.T,
        jnp.moveaxis(tangents, 1, 0),
    )
    # The first page gives the sums the type that they have inside `shard_map`.
    sums, _ = of_page((jnp.float32(0), jnp.float32(0)), [x[0] for x in inputs])
    anew = jax.checkpoint(of_page, policy=jax.checkpoint_policies.nothing_saveable)
    (of_lse, of_out), _ = jax.lax.scan(anew, sums, [x[1:] for x in inputs])
    of_out = of_out - of_lse * grouped(out).astype(jnp.float32)
    of_out = of_out.transpose(0, 3, 1, 2, 4).reshape(batch, s_q, h_q, HEAD_DIM_V)
    return of_out.astype(q.dtype), of_lse.reshape(batch, h_q, s_q)
