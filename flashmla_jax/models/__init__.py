"""Whole models that decode through the paged cache."""

from flashmla_jax.models.checkpoint import init_params, load_checkpoint, save_checkpoint
from flashmla_jax.models.deepseek import DeepSeekConfig
from flashmla_jax.models.partitioning import tensor_parallel
from flashmla_jax.models.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DeepSeekConfig",
    "Tokenizer",
    "init_params",
    "load_checkpoint",
    "load_tokenizer",
    "save_checkpoint",
    "tensor_parallel",
]
