"""Multi-head Latent Attention as a Flax NNX module: a thin holder of the parameters of `mla`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flashmla_jax.layers import mha, mla
from flashmla_jax.layers._methods import Methods

try:
    from flax import nnx
    from flax.typing import Initializer
except ImportError as error:
    raise ImportError(
        "flashmla_jax.layers.nnx needs Flax: pip install flashmla-jax[flax]"
    ) from error

_LECUN_NORMAL = nnx.initializers.lecun_normal()
_ZEROS = nnx.initializers.zeros_init()


class MultiHeadLatentAttention(Methods, nnx.Module):
    """One MLA layer; its parameters carry the names of a DeepSeek checkpoint.

    Calling it attends causally over whole sequences, as in training. `prefill` does the same and
    also returns what to cache. `prefill_into_cache` and `decode` continue from a `PagedKVCache`, by
    many tokens and by a few. A layer that serves is made of a trained one with `absorb`.

    Args:
      config: the shape of the layer.
      dtype: of the computation; by default that of the input and parameters together.
      param_dtype: of the parameters. Where it is not that of the computation, every call converts
        them, each step of decoding too.
      precision: of the products.
      kernel_init: initialises the kernels; may attach metadata (`nnx.with_partitioning`), the same
        to all.
      bias_init: initialises the biases; may do so, too.
      use_bias: whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have a bias
        (`attention_bias` in a Hugging Face config).
      kernel_partitioning: axis names of kernels, by projection, for instance those of
        `mla.head_partitioning`, in place of what `kernel_init` attaches. They become the
        `out_sharding` of the parameters, for which Flax wants a mesh to be set (`jax.set_mesh`). By
        default parameters have no such metadata.
      implementation: of attention in MHA form, see `mha.attention`.
      rngs: the source of randomness for the initialisers.

    Raises:
      ValueError: `kernel_partitioning` names a projection that the layer does not have.
    """

    def __init__(
        self,
        config: mla.MLAConfig,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: Initializer = _LECUN_NORMAL,
        bias_init: Initializer = _ZEROS,
        use_bias: bool = False,
        kernel_partitioning: mla.Partitioning | None = None,
        implementation: mha.Implementation | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.precision = precision
        self.implementation = implementation

        all_shapes = mla.parameter_shapes(config, use_bias)
        partitioning = kernel_partitioning or {}
        mla.check_partitioning(partitioning, all_shapes)
        for name, shapes in all_shapes.items():
            part: nnx.Module
            if "scale" in shapes:
                part = nnx.RMSNorm(*shapes["scale"], param_dtype=param_dtype, rngs=rngs)
            else:
                init = kernel_init
                if name in partitioning:
                    init = nnx.with_partitioning(_without_metadata(init), partitioning[name])
                part = nnx.Linear(
                    *shapes["kernel"],
                    use_bias="bias" in shapes,
                    param_dtype=param_dtype,
                    kernel_init=init,
                    bias_init=bias_init,
                    rngs=rngs,
                )
            setattr(self, name, part)

    def absorb(self) -> MultiHeadLatentAttention:
        """A layer with the same weights, `kv_b_proj` in the form that decoding multiplies with.

        See `mla.absorb`. It is a layer of its own: whatever becomes of this one's parameters, in
        training for instance, changes nothing there. The other arrays are shared, not copied.
        """
        layer = nnx.clone(self)
        if not isinstance(self.kv_b_proj, _AbsorbedKVB):
            layer.kv_b_proj = _AbsorbedKVB(self.kv_b_proj.kernel, self.config)
        return layer

    def _parameters(self) -> Mapping[str, Any]:
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))


def _without_metadata(init: Initializer) -> Initializer:
    def plain(*args: Any) -> Any:
        value = init(*args)
        return value.raw_value if isinstance(value, nnx.VariableMetadata) else value

    return plain


class _AbsorbedKVB(nnx.Module):
    """`kv_b_proj` in two halves, with the metadata of its kernel."""

    def __init__(self, kernel: nnx.Param, config: mla.MLAConfig) -> None:
        metadata = {}
        if axes := kernel.get_metadata().get("out_sharding"):
            metadata["out_sharding"] = (axes[1], None, None)
        w_uk, w_uv = mla.split_kv_b({"kv_b_proj": {"kernel": kernel[...]}}, config)
        self.w_uk = kernel.replace(w_uk, **metadata)
        self.w_uv = kernel.replace(w_uv, **metadata)
