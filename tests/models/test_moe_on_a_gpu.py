"""The mixture of experts where Triton multiplies, against the loop in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.models import moe

pytestmark = pytest.mark.gpu


def make(num_experts, num_tokens, k, hidden, size, dtype):
    keys = jax.random.split(jax.random.key(0), 5)

    def weight(key, *shape):
        return jax.random.normal(key, (num_experts, *shape), dtype) * dtype(shape[-1] ** -0.5)

    weights = moe.Experts(
        weight(keys[0], size, hidden), weight(keys[1], size, hidden), weight(keys[2], hidden, size)
    )
    tokens = jax.random.normal(keys[3], (num_tokens, hidden), dtype)
    shares = jax.random.uniform(keys[4], (num_tokens, k))
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(num_experts)[:k] for _ in range(num_tokens)])
    return weights, tokens, jnp.asarray(experts, jnp.int32), shares


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("num_experts", "num_tokens", "k", "hidden", "size"),
    [
        (64, 1, 6, 2048, 1408),
        (64, 2, 8, 2048, 1408),
        (64, 3, 6, 2048, 1408),
        (64, 128, 6, 2048, 1408),
        (8, 600, 2, 256, 96),
        (8, 3000, 2, 96, 160),
    ],
)
def test_matches_the_loop(num_experts, num_tokens, k, hidden, size, dtype):
    case = make(num_experts, num_tokens, k, hidden, size, dtype)
    run = jax.jit(moe.routed_experts)
    text = run.lower(*case).as_text()
    assert ("triton" in text) == (num_tokens * k > moe._FEW_ROWS)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, case)
    want = jax.jit(functools.partial(moe._loop, precision="highest"))(*exact)
    assert relative_error(run(*case), want) < (8e-3 if dtype == jnp.bfloat16 else 1e-3)


def test_derivative():
    case = make(8, 100, 2, 64, 32, jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, case)

    def loss(run, weights, tokens, experts, shares):
        return jnp.sum(run(weights, tokens, experts, shares).astype(jnp.float32) ** 2)

    def gradient(run, case):
        return jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1, 3)))(*case)

    got = gradient(moe.routed_experts, case)
    want = gradient(functools.partial(moe._loop, precision="highest"), exact)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 3e-2
