"""The engine on a Hopper GPU, in bfloat16: steps that are one call for all layers, and others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import make_engine, prompt_of, run_streamed

from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.engine import Engine, Request, _decode, _move_pages, _read
from flashmla_jax.generate import GREEDY, Sampling
from flashmla_jax.models import DeepSeekConfig, deepseek, few_tokens, init_params

CPU = jax.devices("cpu")[0]
CONFIG = DeepSeekConfig(
    model_type="deepseek_v3",
    vocab_size=512,  # those of `prompt_of`
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
TOLERANCES = {"bfloat16": 0.1, "float32": 1e-4}


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


def check_tokens(params: Any, requests: list[Request]) -> None:
    """All are, up to rounding, the best after those before them, for float32 without a cache."""
    dtype = params["embed_tokens"]["embedding"].dtype.name
    exact = jax.device_put(jax.tree.map(lambda x: x.astype(jnp.float32), params), CPU)
    ids = np.zeros((len(requests), max(len(request.ids) for request in requests)), np.int32)
    for row, request in zip(ids, requests, strict=True):
        row[: len(request.ids)] = request.ids
    logits = deepseek.forward(exact, CONFIG, ids)
    for rows, request in zip(logits, requests, strict=True):
        assert len(request.tokens) == request.max_new_tokens
        scores = np.array(rows[len(request.prompt) - 1 :][: len(request.tokens)])
        allowed = TOLERANCES[dtype] * scores.std()
        if request.sampling.temperature > 0:  # with top_p = 1, the best after noise was added
            key = jax.random.key(request.sampling.seed)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(scores)))
            noise = jax.vmap(lambda key: jax.random.gumbel(key, CONFIG.vocab_size))(keys)
            scores += request.sampling.temperature * np.asarray(noise)
        chosen = scores[np.arange(len(scores)), request.tokens]
        assert np.max(scores.max(-1) - chosen) <= allowed


def addresses(engine: Engine) -> list[int]:
    return [pool.unsafe_buffer_pointer() for pool in engine.cache.pages]


def check(dtype: Any, slots: int, draft: int, drafter: Any) -> None:
    """Requests with beginnings in common, and too few pages for all of them.

    Who is preempted goes on from the tokens that it has, which nothing changes any more. All are
    the best up to rounding: whether a token is read alone or among others, sums have another order.

    On a CPU this runs too, in float32.
    """
    device = jax.devices()[0]
    with jax.default_device(CPU):
        params = make_params(0.25 if draft else 2.0, dtype)
        model = deepseek.absorb(jax.device_put(params, device), CONFIG), CONFIG
    engine = make_engine(model, num_pages=6, slots=slots, draft=draft, drafter=drafter).compile()
    ids = jnp.zeros((slots, 1 + draft), jnp.int32)
    is_one_call = dtype == jnp.bfloat16 and ids.size <= few_tokens.MAX_TOKENS
    assert few_tokens.applies(*model, ids, engine.cache) == is_one_call

    programs = (_read, _decode, _move_pages)
    compiled = [program._cache_size() for program in programs]
    pools = addresses(engine)
    shared, wanted = prompt_of(0, 2 * PAGE_SIZE), []
    for i, (common, own, new) in enumerate(
        [(128, 30, 100), (70, 1, 90), (128, 5, 120), (0, 200, 60), (128, 60, 40), (0, 3, 150)]
    ):
        sampling = Sampling(0.7, seed=i) if i % 3 == 2 else GREEDY
        prompt = shared[:common] + prompt_of(1 + i, own)
        wanted.append((prompt, new, sampling))

    def check_pools() -> None:
        assert addresses(engine) == pools

    requests, victims = run_streamed(engine, wanted, check_pools)
    assert [program._cache_size() for program in programs] == compiled
    assert any(0 < len(tokens) < len(requests[i].tokens) for i, tokens in victims)
    assert engine.stats.prefix_tokens > 0
    assert 0 < engine.stats.accepted < engine.stats.drafted or not draft
    with jax.default_device(CPU):
        check_tokens(params, requests)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("slots", "draft", "drafter"),
    [(3, 0, None), (2, 1, "ngram"), (2, 1, "mtp"), (3, 2, "ngram"), (3, 2, "mtp")],
)
def test_requests(slots: int, draft: int, drafter: Any) -> None:
    check(jnp.bfloat16, slots, draft, drafter)
