"""The benchmark of routed experts: what its calls compute, on any device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks import experts, model
from flashmla_jax.ops import routed_experts as moe


def test_the_published_sizes() -> None:
    """Those of the model whose steps are measured, too."""
    config = model.CONFIG
    sizes = experts.EXPERTS, experts.CHOSEN, experts.HIDDEN, experts.SIZE
    published = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size
    assert sizes == (*published, config.moe_intermediate_size)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EXPERTS": 5, "CHOSEN": 3, "HIDDEN": 32, "SIZE": 48}.items():
        monkeypatch.setattr(experts, name, value)


@pytest.mark.usefixtures("small")
def test_what_is_measured_are_the_experts() -> None:
    layers = experts.weights()
    assert len(layers) == experts.LAYERS
    tokens, chosen, shares = experts.inputs(experts.Case(20))
    assert chosen.shape == (experts.LAYERS, 20, 3)
    assert all(len(set(token)) == 3 for token in np.asarray(chosen).reshape(-1, 3).tolist())
    x = np.asarray(tokens, np.float64)
    for weights, of_layer in zip(layers, chosen, strict=True):
        gate, up, down = (np.asarray(weight, np.float64) for weight in weights)
        exact = np.zeros_like(x)
        for t, e in np.ndindex(20, 3):
            expert = int(of_layer[t, e])
            g = gate[expert] @ x[t]
            act = g / (1 + np.exp(-g)) * (up[expert] @ x[t])
            exact[t] += down[expert] @ act * float(shares[t, e])
        for layer in (moe.routed_experts, experts.ragged):
            out = np.asarray(jax.jit(layer)(weights, tokens, of_layer, shares), np.float64)
            assert np.linalg.norm(out - exact) < 1e-2 * np.linalg.norm(exact)


def test_calls_read_from_memory() -> None:
    """A layer's weights are more than an L2 cache of 50 MiB holds, even those of few tokens."""
    of_an_expert = 3 * experts.HIDDEN * experts.SIZE * 2
    least = min(case.tokens for case in experts.CASES) * experts.CHOSEN // 4
    assert min(least, experts.EXPERTS) * of_an_expert > 60 * 2**20


def test_flops() -> None:
    assert experts.Case(7).flops() == 7 * 6 * 3 * 2 * 2048 * 1408
