"""Multi-head Latent Attention as a Flax NNX module: a thin holder of the parameters of `mla`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import mla

try:
    from flax import nnx
    from flax.typing import Initializer
except ImportError as error:
    raise ImportError(
        "flashmla_jax.layers.nnx needs Flax: pip install flashmla-jax[flax]"
    ) from error

_LECUN_NORMAL = nnx.initializers.lecun_normal()


class MultiHeadLatentAttention(nnx.Module):
    """One MLA layer; its parameters carry the names of a DeepSeek checkpoint.

    Calling it attends causally over whole sequences, as in training. `prefill` does the same and
    also returns what to cache; `decode` continues from a `PagedKVCache`.

    Args:
      config: the shape of the layer.
      dtype: of the computation; by default that of the input and parameters together.
      param_dtype: of the parameters.
      precision: of the products.
      kernel_init: initialises the kernels.
      use_bias: whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have a bias
        (`attention_bias` in a Hugging Face config).
      rngs: the source of randomness for the initialisers.
    """

    def __init__(
        self,
        config: mla.MLAConfig,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: Initializer = _LECUN_NORMAL,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.precision = precision

        for name, shapes in mla.parameter_shapes(config, use_bias).items():
            part: nnx.Module
            if "scale" in shapes:
                part = nnx.RMSNorm(*shapes["scale"], param_dtype=param_dtype, rngs=rngs)
            else:
                part = nnx.Linear(
                    *shapes["kernel"],
                    use_bias="bias" in shapes,
                    param_dtype=param_dtype,
                    kernel_init=kernel_init,
                    rngs=rngs,
                )
            setattr(self, name, part)

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
        params = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        dtype = self.dtype or jnp.result_type(x, *jax.tree.leaves(params))
        return x.astype(dtype), jax.tree.map(lambda p: p.astype(dtype), params)
