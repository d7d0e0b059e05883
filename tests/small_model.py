"""A small model to run in bfloat16, and whether its tokens are the best up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashmla_jax.generate import GREEDY, Sampling
from flashmla_jax.models import DeepSeekConfig, deepseek, init_params

CONFIG = DeepSeekConfig(
    model_type="deepseek_v3",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=8,
    q_lora_rank=128,
    moe_intermediate_size=64,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)
# Of their standard deviation: how much less likely than the best a chosen token's logit may be.
TOLERANCES = {"fp8": 0.2, "bfloat16": 0.1, "float32": 1e-4}


def make_params(strength: float, dtype: Any) -> dict[str, Any]:
    """Parameters with which guesses come true the more often, the less the layers add.

    Experts are chosen by biases, so that rounding changes none.
    """
    params = init_params(CONFIG, jax.random.key(0), dtype)
    module, size = params["mtp"], CONFIG.hidden_size
    params["embed_tokens"]["embedding"] /= strength
    # Of what the module reads, it passes on the embedding of the newest token.
    module["eh_proj"]["kernel"] = jnp.eye(2 * size, size, dtype=dtype) / strength
    for layer in (*params["layers"][1:], module):
        layer["mlp"]["gate"]["e_score_correction_bias"] = 2 * jnp.arange(8.0)
    return params


def check_best(
    params: Any,
    config: DeepSeekConfig,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    samplings: Sequence[Sampling] | None = None,
    is_fp8: bool = False,
) -> None:
    """All are, up to rounding, the best after those before them, for float32 without a cache.

    Args:
      params: of the model, in the dtype in which it ran.
      config: of the model.
      prompts: token ids.
      tokens: that each of them was continued with.
      samplings: how each was, with `top_p=1`; by default greedily.
      is_fp8: whether the cache was.
    """
    dtype = params["embed_tokens"]["embedding"].dtype.name
    cpu = jax.devices("cpu")[0]
    rows = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, sequence in zip(ids, rows, strict=True):
        row[: len(sequence)] = sequence
    with jax.default_device(cpu):
        exact = jax.device_put(jax.tree.map(lambda x: x.astype(jnp.float32), params), cpu)
        logits = np.asarray(deepseek.forward(exact, config, ids))
    for i, (prompt, new) in enumerate(zip(prompts, tokens, strict=True)):
        scores = logits[i, len(prompt) - 1 :][: len(new)].copy()
        allowed = TOLERANCES["fp8" if is_fp8 else dtype] * scores.std()
        sampling = GREEDY if samplings is None else samplings[i]
        if sampling.temperature > 0:  # the best after noise was added
            assert sampling.top_p == 1
            with jax.default_device(cpu):
                key = jax.random.key(sampling.seed)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(scores)))
                noise = jax.vmap(lambda key: jax.random.gumbel(key, config.vocab_size))(keys)
            scores += sampling.temperature * np.asarray(noise)
        chosen = scores[np.arange(len(scores)), new]
        assert np.max(scores.max(-1) - chosen) <= allowed
