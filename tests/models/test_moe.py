"""The routers against NumPy in float64."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import calls, has_precision, products

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.models import deepseek, init_params
from flashmla_jax.models.deepseek import DeepSeekConfig

pytestmark = pytest.mark.usefixtures("on_cpu")

GOLDENS = Path(__file__).parent / "goldens"
V3_JSON = json.loads((GOLDENS / "deepseek_v3" / "config.json").read_text())
V2_JSON = json.loads((GOLDENS / "deepseek_v2_lite" / "config.json").read_text())
LONGCAT_JSON = json.loads((GOLDENS / "longcat_flash" / "config.json").read_text())


# --- The routers ---------------------------------------------------------------------------------


def oracle_route(config: DeepSeekConfig, logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    """The weights of the chosen experts of one token, in float64."""
    is_v3 = config.topk_method == "noaux_tc"
    if config.scoring_func == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    choice = scores + bias if is_v3 else scores
    candidates = range(len(logits))
    if config.topk_method != "greedy":
        size = len(logits) // config.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
        best = 2 if is_v3 else 1
        groups.sort(key=lambda g: -sum(sorted(choice[e] for e in g)[-best:]))
        candidates = [e for g in groups[: config.topk_group] for e in g]
    chosen = sorted(candidates, key=lambda e: -choice[e])[: config.num_experts_per_tok]
    weights = {e: scores[e] for e in chosen}
    total = sum(weights.values())
    if config.norm_topk_prob:
        weights = {e: w / total for e, w in weights.items()}
    if is_v3 or not config.norm_topk_prob:
        weights = {e: w * config.routed_scaling_factor for e, w in weights.items()}
    return weights


def routed(config: DeepSeekConfig, num_experts: int, bias: np.ndarray, num_tokens: int = 50):
    """What the router chose for random tokens, beside the oracle's choice."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((num_tokens, 60)).astype(np.float32)
    kernel = rng.standard_normal((60, num_experts)).astype(np.float32) * 60**-0.5
    params = {"kernel": kernel, "e_score_correction_bias": bias}
    experts, weights = deepseek._route(params, config, tokens)
    assert weights.dtype == jnp.float32
    logits = tokens.astype(np.float64) @ kernel
    for t in range(num_tokens):
        got = dict(zip(experts[t].tolist(), weights[t].tolist(), strict=True))
        yield got, oracle_route(config, logits[t], bias)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("lift", [0.0, -3.0], ids=["", "negative"])
@pytest.mark.parametrize(
    ("json_config", "topk_method", "n_group"),
    [
        (V3_JSON, "noaux_tc", 4),
        (V3_JSON, "noaux_tc", 1),
        (V2_JSON, "greedy", 4),
        (V2_JSON, "group_limited_greedy", 4),
    ],
)
def test_routers_match_float64(json_config, topk_method, n_group, norm, lift):
    """Where all biased scores are negative, 0 for experts of other groups would win."""
    changes = {
        "topk_method": topk_method,
        "n_group": n_group,
        "topk_group": min(n_group, 2),
        "n_routed_experts": 16,
        "norm_topk_prob": norm,
    }
    config = DeepSeekConfig.from_dict({**json_config, **changes})
    bias = lift + 0.3 * np.random.default_rng(1).standard_normal(16).astype(np.float32)
    for got, expected in routed(config, 16, bias):
        assert got == pytest.approx(expected, abs=1e-6)


def test_the_router_of_longcat_matches_float64():
    config = DeepSeekConfig.from_dict(LONGCAT_JSON)
    bias = 0.05 * np.random.default_rng(1).standard_normal(12).astype(np.float32)
    for got, expected in routed(config, 12, bias):
        assert got == pytest.approx(expected, abs=1e-6)


def test_the_bias_chooses_and_does_not_weigh():
    config = DeepSeekConfig.from_dict({**V3_JSON, "n_group": 1, "topk_group": 1})
    bias = np.zeros(8, np.float32)
    plain = [got for got, _ in routed(config, 8, bias)]
    bias[3] = 10
    for before, (got, _) in zip(plain, routed(config, 8, bias), strict=True):
        assert 3 in got
        assert sum(got.values()) == pytest.approx(config.routed_scaling_factor)
        if 3 in before:
            assert got == pytest.approx(before)


def test_a_group_of_v3_is_worth_its_two_best_and_one_of_v2_its_best():
    """The first group has the best expert, the second the best two."""
    scores = np.array([0.9, 0.1, 0.1, 0.1, 0.7, 0.6, 0.1, 0.1])
    changes = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 1}
    v3 = DeepSeekConfig.from_dict({**V3_JSON, **changes})
    v2 = {**V2_JSON, **changes, "topk_method": "group_limited_greedy"}
    logits = np.log(scores / (1 - scores)).astype(np.float32)[None]
    params = {"kernel": np.eye(8, dtype=np.float32), "e_score_correction_bias": np.zeros(8)}
    assert deepseek._route(params, v3, logits)[0].item() == 4
    assert deepseek._route(params, DeepSeekConfig.from_dict(v2), logits)[0].item() == 0


def test_weights_that_vanish_are_divided_safely():
    config = DeepSeekConfig.from_dict({**V3_JSON, "n_group": 1, "topk_group": 1})
    params = {"kernel": np.full((1, 8), -200, np.float32), "e_score_correction_bias": np.zeros(8)}
    _, weights = deepseek._route(params, config, np.ones((3, 1), np.float32))
    np.testing.assert_array_equal(weights, 0)


# --- Float32 is exact ----------------------------------------------------------------------------


def test_a_float32_model_asks_for_float32_products():
    """Without being told, a GPU would round the factors to TF32."""
    config = DeepSeekConfig.from_dict({**V3_JSON, "num_hidden_layers": 2})
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), jnp.float32))
    cache = jax.eval_shape(
        functools.partial(
            PagedKVCache.create,
            num_layers=2,
            num_pages=2,
            batch=1,
            max_pages_per_seq=2,
            dtype=jnp.float32,
        )
    )
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    decode_step = functools.partial(deepseek.decode_step, config=config)
    forward = functools.partial(deepseek.forward, config=config)
    for jaxpr, least in (
        (jax.make_jaxpr(lambda p, i: forward(p, ids=i))(params, ids), 20),
        (jax.make_jaxpr(lambda p, i, c: decode_step(p, ids=i, cache=c))(params, ids, cache), 20),
    ):
        eqns = products(jaxpr.jaxpr)
        assert len(eqns) >= least
        (experts,) = calls(jaxpr.jaxpr, "routed_experts")
        assert experts.params["precision"] == "highest"
        for eqn in eqns:
            if eqn.invars[0].aval.dtype == jnp.float32:
                assert has_precision(eqn, jax.lax.Precision.HIGHEST), eqn


def test_float32_routing_of_a_bfloat16_model():
    """Logits that bfloat16 could not tell apart decide."""
    config = dataclasses.replace(
        DeepSeekConfig.from_dict({**V3_JSON, "n_group": 1, "topk_group": 1}),
        num_experts_per_tok=1,
    )
    kernel = np.full((1, 8), 1, np.float32)
    kernel[0, 5] += 1e-4
    params = {"kernel": kernel, "e_score_correction_bias": np.zeros(8, np.float32)}
    experts, weights = deepseek._route(params, config, jnp.ones((4, 1), jnp.bfloat16))
    np.testing.assert_array_equal(experts, 5)
    assert weights.dtype == jnp.float32
