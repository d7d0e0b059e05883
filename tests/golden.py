"""Small models of Hugging Face transformers, and what it computed (models/goldens/)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.models import DeepSeekConfig, load_checkpoint

GOLDENS = Path(__file__).parent / "models" / "goldens"


class Golden(NamedTuple):
    """A model in float32 and, of two prompts, logits and the first one's cached tokens."""

    config: DeepSeekConfig
    params: dict
    prompts: np.ndarray
    lengths: np.ndarray
    next_ids: np.ndarray
    prefill: np.ndarray
    decode: np.ndarray
    latents: np.ndarray
    index_keys: np.ndarray | None = None
    selected: np.ndarray | None = None

    def cache(self, batch: int = 2, num_pages: int = 3) -> PagedKVCache:
        return PagedKVCache.create(
            num_layers=self.config.num_hidden_layers,
            num_pages=num_pages,
            batch=batch,
            max_pages_per_seq=2,
            dtype=self.params["embed_tokens"]["embedding"].dtype,
            index_head_dim=self.config.index_head_dim,
        )


def load_golden(name: str) -> Golden:
    config, params = load_checkpoint(GOLDENS / name, dtype=jnp.float32)
    with np.load(GOLDENS / name / "goldens.npz") as arrays:
        return Golden(config, params, **arrays)


def cached_tokens(cache: PagedKVCache, layer: int, sequence: int) -> np.ndarray:
    rows = cache.pages[layer][cache.block_table[sequence], :, 0].reshape(-1, 576)
    return np.asarray(rows[: cache.cache_seqlens[sequence]])
