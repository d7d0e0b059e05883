"""The engine on a Hopper GPU, in bfloat16: steps that are one call for all layers, and others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from small_model import CONFIG, check_best, make_params
from test_engine import make_engine, prompt_of, run_streamed

from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.engine import Engine, Request, _copy, _decode, _move_pages, _read
from flashmla_jax.generate import GREEDY, Sampling
from flashmla_jax.models import deepseek, few_tokens

CPU = jax.devices("cpu")[0]


def check_tokens(params: Any, requests: list[Request], is_fp8: bool) -> None:
    """All tokens that were asked for are there, and the best up to rounding."""
    for request in requests:
        assert len(request.tokens) == request.max_new_tokens
    prompts, tokens, samplings = zip(
        *((request.prompt, request.tokens, request.sampling) for request in requests), strict=True
    )
    check_best(params, CONFIG, prompts, tokens, samplings, is_fp8)


def addresses(engine: Engine) -> list[int]:
    return [pool.unsafe_buffer_pointer() for pool in engine.cache.pages]


def check(dtype: Any, slots: int, draft: int, drafter: Any, cache_dtype: Any = None) -> None:
    """Requests with beginnings in common, and too few pages for all of them.

    Who is preempted goes on from the tokens that it has, which nothing changes any more. All are
    the best up to rounding: whether a token is read alone or among others, sums have another order.

    On a CPU this runs too, in float32.
    """
    device = jax.devices()[0]
    with jax.default_device(CPU):
        params = make_params(0.25 if draft else 2.0, dtype)
        model = deepseek.absorb(jax.device_put(params, device), CONFIG), CONFIG
    engine = make_engine(
        model, num_pages=6, slots=slots, draft=draft, drafter=drafter, cache_dtype=cache_dtype
    ).compile()
    ids = jnp.zeros((slots, 1 + draft), jnp.int32)
    is_one_call = dtype == jnp.bfloat16 and ids.size <= few_tokens.MAX_TOKENS
    assert few_tokens.applies(*model, ids, engine.cache) == is_one_call

    programs = (_read, _decode, _move_pages, _copy)
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
    check_tokens(params, requests, cache_dtype == "fp8")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("slots", "draft", "drafter"),
    [(3, 0, None), (2, 1, "ngram"), (2, 1, "mtp"), (3, 2, "ngram"), (3, 2, "mtp")],
)
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "fp8"])
def test_requests(slots: int, draft: int, drafter: Any, cache_dtype: str) -> None:
    check(jnp.bfloat16, slots, draft, drafter, cache_dtype)
