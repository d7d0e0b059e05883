"""Multi-head Latent Attention as a Flax Linen module: a thin holder of the parameters of `mla`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flashmla_jax.layers import mha, mla
from flashmla_jax.layers._methods import Methods

try:
    from flax import linen as nn
    from flax.typing import Initializer
except ImportError as error:
    raise ImportError(
        "flashmla_jax.layers.linen needs Flax: pip install flashmla-jax[flax]"
    ) from error


class MultiHeadLatentAttention(Methods, nn.Module):
    """One MLA layer; its parameters carry the names of a DeepSeek checkpoint.

    Calling it attends causally over whole sequences, as in training. `prefill` does the same and
    also returns what to cache. `prefill_into_cache` and `decode` continue from a `PagedKVCache`, by
    many tokens and by a few; it is an argument and a result, not a variable of the module:

        out, cache = layer.apply(variables, x, cache, method=layer.decode)

    A layer that serves is made of a trained one with `absorb`, which prepares its weights once:

        layer = layer.clone(absorbed=True)
        variables = {"params": mla.absorb(nn.unbox(variables["params"]), layer.config)}

    Attributes:
      config: the shape of the layer.
      dtype: of the computation; by default that of the input and parameters together.
      param_dtype: of the parameters. Where it is not that of the computation, every call converts
        them, each step of decoding too.
      precision: of the products.
      kernel_init: initialises the kernels; may attach metadata (`nn.with_partitioning`), the same
        to all.
      bias_init: initialises the biases; may do so, too.
      use_bias: whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have a bias
        (`attention_bias` in a Hugging Face config).
      kernel_partitioning: axis names of kernels, by projection, for instance those of
        `mla.head_partitioning`, in place of what `kernel_init` attaches; such kernels are
        `nn.Partitioned`. By default none is.
      implementation: of attention in MHA form, see `mha.attention`.
      absorbed: whether the parameters are those of `mla.absorb`.

    Raises:
      ValueError: `kernel_partitioning` names a projection that the layer does not have.
    """

    config: mla.MLAConfig
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    use_bias: bool = False
    kernel_partitioning: mla.Partitioning | None = None
    implementation: mha.Implementation | None = None
    absorbed: bool = False

    def setup(self) -> None:
        """Declares the parameters."""
        shapes = mla.parameter_shapes(self.config, self.use_bias)
        partitioning = self.kernel_partitioning or {}
        mla.check_partitioning(partitioning, shapes)
        initializers = {"bias": self.bias_init, "scale": nn.initializers.ones_init()}

        def init(key: jax.Array, name: str) -> dict[str, Any]:
            kernel_init = self.kernel_init
            if name in partitioning:
                kernel_init = nn.with_partitioning(
                    lambda *args: nn.unbox(self.kernel_init(*args)), partitioning[name]
                )
            params = {
                leaf: initializers.get(leaf, kernel_init)(
                    jax.random.fold_in(key, i), shape, self.param_dtype
                )
                for i, (leaf, shape) in enumerate(shapes[name].items())
            }
            if self.absorbed and name == "kv_b_proj":
                return mla.absorb({name: nn.unbox(params)}, self.config)[name]
            return params

        self.params = {name: self.param(name, init, name) for name in shapes}

    # Linen names and captures what a class's own methods do, not what it inherits.
    __call__ = Methods.__call__
    prefill = Methods.prefill
    prefill_into_cache = Methods.prefill_into_cache
    decode = Methods.decode

    def _parameters(self) -> Mapping[str, Any]:
        return self.params
