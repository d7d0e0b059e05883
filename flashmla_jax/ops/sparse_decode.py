"""Sparse decode: attention of a few query tokens to chosen tokens of a paged latent cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flashmla_jax import reference
from flashmla_jax.cache.layout import HEAD_DIM_V, FP8Format, take_tokens


def sparse_decode(
    q: jax.Array,
    scopes: list[tuple[jax.Array, jax.Array, jax.Array | None]],
    fmt: FP8Format | None,
    *,
    softmax_scale: float,
    attn_sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`flashmla_jax.flash_mla_with_kvcache` checks the arguments.

    Args:
      q: [batch, s_q, h_q, head_dim].
      scopes: pools with the tokens that are attended to in each: the pool, indices
        int32[batch, s_q, topk], and how many of them count, int32[batch] or None.
      fmt: the pools' format; None for numbers.
      softmax_scale: factor of the scores.
      attn_sink: float32[h_q] or None.

    Returns:
      out [batch, s_q, h_q, 512] in q's dtype, lse float32[batch, h_q, s_q].
    """
    tokens, exists = [], []
    for pool, indices, length in scopes:
        is_token = (indices >= 0) & (indices < pool.shape[0] * pool.shape[1])
        if length is not None:
            number = jnp.arange(indices.shape[-1], dtype=jnp.int32)
            is_token &= number < length[:, None, None]
        tokens.append(take_tokens(pool, jnp.where(is_token, indices, 0), fmt, q.dtype))
        exists.append(is_token)
    out, _, lse = reference.sparse_attention(
        q,
        jnp.concatenate(tokens, axis=2),
        jnp.concatenate(exists, axis=2),
        softmax_scale=softmax_scale,
        attn_sink=attn_sink,
        head_dim_v=HEAD_DIM_V,
    )
    return out, jnp.swapaxes(lse, 1, 2)
