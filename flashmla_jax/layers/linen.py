"""Multi-head Latent Attention as a Flax Linen module: a thin holder of the parameters of `mla`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import mla

try:
    from flax import linen as nn
    from flax.typing import Initializer
except ImportError as error:
    raise ImportError(
        "flashmla_jax.layers.linen needs Flax: pip install flashmla-jax[flax]"
    ) from error


class MultiHeadLatentAttention(nn.Module):
    """One MLA layer; its parameters carry the names of a DeepSeek checkpoint.

    Calling it attends causally over whole sequences, as in training. `prefill` does the same and
    also returns what to cache; `decode` continues from a `PagedKVCache`, which is an argument and a
    result, not a variable of the module:

        out, cache = layer.apply(variables, x, cache, method=layer.decode)

    Attributes:
      config: the shape of the layer.
      dtype: of the computation; by default that of the input and parameters together.
      param_dtype: of the parameters.
      precision: of the products.
      kernel_init: initialises the kernels; may attach partitioning metadata.
      use_bias: whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have a bias
        (`attention_bias` in a Hugging Face config).
    """

    config: mla.MLAConfig
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    use_bias: bool = False

    def setup(self) -> None:
        """Declares the parameters."""
        initializers = {
            "kernel": self.kernel_init,
            "bias": nn.initializers.zeros_init(),
            "scale": nn.initializers.ones_init(),
        }

        def init(key: jax.Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
            return {
                leaf: initializers[leaf](jax.random.fold_in(key, i), shape, self.param_dtype)
                for i, (leaf, shape) in enumerate(shapes.items())
            }

        shapes = mla.parameter_shapes(self.config, self.use_bias)
        self.params = {name: self.param(name, init, leaves) for name, leaves in shapes.items()}

    def __call__(self, x: jax.Array) -> jax.Array:
        """Causal attention over `x` [batch, s, hidden], sequences starting at position 0."""
        return self.prefill(x)[0]

    def prefill(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The output [batch, s, hidden] for `x` of that shape, and what to cache [batch, s, 576].

        See `mla.prefill`; the second result goes to `PagedKVCache.append` as `kv[:, :, None]`.
        """
        x, params = self._promote(x)
        return mla.prefill(params, self.config, x, self.precision)

    def decode(
        self, x: jax.Array, cache: PagedKVCache, layer: int = 0
    ) -> tuple[jax.Array, PagedKVCache]:
        """Appends the newest tokens `x` [batch, s_q, hidden] to the cache and attends from them.

        See `mla.decode`: the cache has made room for the tokens with `allocate`.
        """
        x, params = self._promote(x)
        return mla.decode(params, self.config, x, cache, layer, self.precision)

    def _promote(self, x: jax.Array) -> tuple[jax.Array, Any]:
        """`x` and the parameters, in one dtype."""
        dtype = self.dtype or jnp.result_type(x, *jax.tree.leaves(self.params))
        return x.astype(dtype), jax.tree.map(lambda p: p.astype(dtype), self.params)
