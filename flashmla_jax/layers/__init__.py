"""Multi-head Latent Attention for models.

`flashmla_jax.layers.mla` holds the mathematics as pure functions; `flashmla_jax.layers.nnx` wraps
it in a Flax module (and needs the `flax` extra, so it is not imported here).
"""

from flashmla_jax.layers.mla import MLAConfig, YarnScaling

__all__ = ["MLAConfig", "YarnScaling"]
