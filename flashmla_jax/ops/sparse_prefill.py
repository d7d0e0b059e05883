"""Sparse prefill: attention of many query tokens to chosen tokens of one sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flashmla_jax import reference

# Query tokens whose own tokens are gathered at a time.
_CHUNK = 64


def sparse_prefill(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    topk_length: jax.Array | None,
    *,
    softmax_scale: float,
    attn_sink: jax.Array | None,
    head_dim_v: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`flashmla_jax.flash_mla_sparse_fwd` checks the arguments.

    Args:
      q: [s_q, h_q, head_dim].
      kv: [s_kv, head_dim].
      indices: int32[s_q, topk].
      topk_length: int32[s_q] or None.
      softmax_scale: factor of the scores.
      attn_sink: float32[h_q] or None.
      head_dim_v: 512.

    Returns:
      out [s_q, h_q, head_dim_v] in q's dtype; max_logits and lse, float32[s_q, h_q].
    """
    exists = (indices >= 0) & (indices < kv.shape[0])
    if topk_length is not None:
        number = jnp.arange(indices.shape[-1], dtype=jnp.int32)
        exists &= number < topk_length[:, None]

    def attend(query: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, indices, exists = query
        tokens = kv.at[jnp.where(exists, indices, 0)].get(mode="clip")
        return reference.sparse_attention(
            q,
            tokens,
            exists,
            softmax_scale=softmax_scale,
            attn_sink=attn_sink,
            head_dim_v=head_dim_v,
        )

    return jax.lax.map(attend, (q, indices, exists), batch_size=_CHUNK)
