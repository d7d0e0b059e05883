"""What the Flax modules have in common: methods that call `mla` with a layer's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import mha, mla


class Methods:
    """Of a layer that has these; `_parameters` are as `mla` takes them."""

    config: mla.MLAConfig
    dtype: jax.typing.DTypeLike | None
    precision: jax.lax.PrecisionLike
    implementation: mha.Implementation | None
    _parameters: Callable[[], Mapping[str, Any]]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Causal attention over `x` [batch, s, hidden], sequences starting at position 0."""
        return self.prefill(x)[0]

    def prefill(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The output [batch, s, hidden] for `x` of that shape, and what to cache [batch, s, 576].

        See `mla.prefill`; the second result goes to `PagedKVCache.append` as `kv[:, :, None]`.
        """
        x, params = self._promote(x)
        return mla.prefill(
            params, self.config, x, self.precision, implementation=self.implementation
        )

    def prefill_into_cache(
        self,
        x: jax.Array,
        cache: PagedKVCache,
        layer: int | jax.Array = 0,
        *,
        absorb_prefix: bool | None = None,
    ) -> tuple[jax.Array, PagedKVCache]:
        """Appends the next tokens, many of them, to the cache and attends to all before.

        `x` is [batch, s, hidden], of which the cache's `num_new` count. See
        `mla.prefill_into_cache`: the cache has made room for the tokens with `allocate`, and in a
        scan over layers, whose number is an array, it is one with `one_pool`. What was cached
        before is expanded, or attended to as it lies (`absorb_prefix`).
        """
        x, params = self._promote(x)
        return mla.prefill_into_cache(
            params,
            self.config,
            x,
            cache,
            layer,
            self.precision,
            absorb_prefix=absorb_prefix,
            implementation=self.implementation,
        )

    def decode(
        self, x: jax.Array, cache: PagedKVCache, layer: int | jax.Array = 0
    ) -> tuple[jax.Array, PagedKVCache]:
        """Appends the newest tokens `x` [batch, s_q, hidden] to the cache and attends from them.

        See `mla.decode`: the cache has made room for the tokens with `allocate`, and in a scan over
        layers, whose number is an array, it is one with `one_pool`.
        """
        x, params = self._promote(x)
        return mla.decode(params, self.config, x, cache, layer, self.precision)

    def _promote(self, x: jax.Array) -> tuple[jax.Array, Any]:
        """`x` and the parameters, in one dtype."""
        params = self._parameters()
        dtype = self.dtype or jnp.result_type(x, *jax.tree.leaves(params))
        return x.astype(dtype), jax.tree.map(lambda p: p.astype(dtype), params)
