"""Multi-head Latent Attention decoding for JAX."""

from flashmla_jax.attention import (
    flash_mla_with_kvcache,
    get_mla_metadata,
    merge_attention_states,
)

__all__ = [
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "merge_attention_states",
]
