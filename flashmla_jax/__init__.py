"""Multi-head Latent Attention decoding for JAX."""

from flashmla_jax.attention import (
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    merge_attention_states,
)
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.config import show_config
from flashmla_jax.export import export_disabled_checks
from flashmla_jax.ops.cache_append import cache_append

__all__ = [
    "PagedKVCache",
    "cache_append",
    "export_disabled_checks",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "merge_attention_states",
    "show_config",
]
