"""Whole models that decode through the paged cache."""

from flashmla_jax.models.checkpoint import init_params, load_checkpoint, save_checkpoint
from flashmla_jax.models.deepseek import DeepSeekConfig

__all__ = ["DeepSeekConfig", "init_params", "load_checkpoint", "save_checkpoint"]
