"""Multi-head Latent Attention for models.

`flashmla_jax.layers.mla` holds the mathematics as pure functions, and `flashmla_jax.layers.mha` the
attention of its prefill; `flashmla_jax.layers.nnx` and `flashmla_jax.layers.linen` wrap it in Flax
modules (they need the `flax` extra, so they are not imported here).
"""

from flashmla_jax.layers.mla import MLAConfig, YarnScaling

__all__ = ["MLAConfig", "YarnScaling"]
