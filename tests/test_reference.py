"""The `jax.numpy` reference, against float64 NumPy: it is an oracle too, and runs on platforms."""

from __future__ import annotations

import functools

import jax
import numpy as np
import oracle
import pytest
from oracle import DTYPES, HEAD_DIM, HEAD_DIM_V, INT32_MAX, PAGE_SIZE

from flashmla_jax import reference

pytestmark = pytest.mark.usefixtures("on_cpu")


@functools.partial(jax.jit, static_argnames=("softmax_scale", "causal"))
def run(q, k_cache, block_table, cache_seqlens, softmax_scale, causal):
    return reference.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, softmax_scale=softmax_scale, causal=causal
    )


def check(problem, scale=HEAD_DIM**-0.5, causal=False):
    actual = run(*problem, softmax_scale=scale, causal=causal)
    oracle.assert_matches(actual, oracle.attend(problem, scale, causal))


@pytest.fixture
def rng(request):
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("s_q", "h_q", "h_kv"), [(1, 1, 1), (1, 16, 1), (2, 9, 3), (4, 6, 2), (70, 2, 1)]
)
def test_matches_the_definition(rng, s_q, h_q, h_kv, causal, dtype):
    lengths = (0, 1, 3, 63, 64, 65, 129, 300)
    problem = oracle.make_problem(rng, lengths, s_q=s_q, h_q=h_q, h_kv=h_kv, dtype=DTYPES[dtype])
    check(problem, causal=causal)


@pytest.mark.parametrize("scale", [0.0, -0.05, 1e-6, 2.0**33])
def test_any_scale(rng, scale):
    problem = oracle.make_problem(rng, (130, 0, 200), s_q=2, h_q=3)
    for array in (problem.q, problem.k_cache):
        array[:] = np.rint(array.astype(np.float32))
    check(problem, scale, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("excess", [1, 3, 64, INT32_MAX - 128])
def test_length_beyond_the_table(rng, excess, causal):
    problem = oracle.make_problem(rng, (128, 128, -5), s_q=3, h_q=2, spare_entries=0)
    problem.cache_seqlens[0] += excess
    check(problem, causal=causal)


@pytest.mark.parametrize("page", [-1, 10**6, INT32_MAX])
def test_page_outside_the_pool(rng, page):
    problem = oracle.make_problem(rng, (66, 66), s_q=4, h_q=3)
    problem.block_table[0, 1] = page
    check(problem, causal=True)


def test_nan_in_a_real_token(rng):
    problem = oracle.make_problem(rng, (100, 100), s_q=4, h_q=3)
    problem.k_cache[problem.block_table[0, 1], 98 - PAGE_SIZE, 0, :HEAD_DIM_V] = np.nan
    check(problem, causal=True)


def test_float32_scores_are_sums_of_sums(rng):
    """One after the other, the worst of so many is off by twice eps x the sum of its products."""
    problem = oracle.make_problem(rng, (500,), s_q=2, h_q=128, dtype=np.float32)
    expected = oracle.attend(problem, softmax_scale=1.0)
    bound = 0.8 * np.finfo(np.float32).eps * expected.terms
    _, lse = run(*problem, softmax_scale=1.0, causal=False)
    assert (abs(lse - expected.lse) < bound).all()

    tokens = problem.k_cache.reshape(-1, HEAD_DIM)
    exists = ~np.isnan(tokens).any(-1)
    _, _, lse = reference.sparse_attention(problem.q[0], tokens, exists, softmax_scale=1.0)
    assert (abs(lse.T - expected.lse[0]) < bound[0]).all()


def test_float32_scores_in_little_memory():
    """The panels' take turns."""
    q, tokens = np.zeros((64, 16, HEAD_DIM), np.float32), np.zeros((1000, HEAD_DIM), np.float32)
    attend = jax.jit(functools.partial(reference.sparse_attention, softmax_scale=1.0))
    compiled = attend.lower(q, tokens, np.ones(1000, bool)).compile()
    scores = 64 * 16 * 1000 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * scores


def test_differentiable(rng):
    """The op's error sends people here."""
    problem = oracle.make_problem(rng, (70, 130), h_q=2, dtype=np.float32)
    q, *rest = map(jax.numpy.asarray, problem)
    step = 1e-2 * jax.random.normal(jax.random.key(0), q.shape)

    def f(x):
        out, lse = run(x, *rest, softmax_scale=HEAD_DIM**-0.5, causal=False)
        return out[..., 0].sum() + lse.sum()

    slope = jax.grad(f)(q)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose((slope * step).sum(), (f(q + step) - f(q - step)) / 2, rtol=2e-2)
