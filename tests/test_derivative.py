"""Derivatives of the ops, against those of the formulas in `jax.numpy`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads

import flashmla_jax as fm
from flashmla_jax import reference
from flashmla_jax.ops.cache_append import cache_append

recent = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")
SCALE = 0.05
LENGTHS = (70, 0, 200)
# Kernels multiply float32 on the CPU only.
DTYPE = np.float32 if jax.devices()[0].platform == "cpu" else jnp.bfloat16
TOLERANCE = 1e-5 if np.float32 == DTYPE else 4e-2


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(list(request.node.name.encode()))


def attend(problem: oracle.Problem, op: Any, causal: bool) -> Any:
    """The op as a function of q and the pool."""

    def function(q: jax.Array, k_cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        return op(
            q,
            k_cache,
            problem.block_table,
            problem.cache_seqlens,
            softmax_scale=SCALE,
            causal=causal,
        )

    return function


def assert_close(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max())


def random_like(rng: np.random.Generator, tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32).astype(x.dtype)), tree
    )


@recent
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), [(3, 1), (6, 2), (40, 1)])
def test_forward_and_backward(rng, h_q, h_kv, causal) -> None:
    """What no token holds is NaN in the pool, and has no derivative."""
    problem = oracle.make_problem(rng, LENGTHS, s_q=3, h_q=h_q, h_kv=h_kv, dtype=DTYPE)
    ours = attend(problem, fm.flash_mla_with_kvcache, causal)
    formulas = attend(problem, reference.flash_mla_with_kvcache, causal)
    operands = jnp.asarray(problem.q), jnp.asarray(problem.k_cache)
    clean = operands[0], jnp.nan_to_num(operands[1])

    tangents = random_like(rng, operands)
    results, actual = jax.jit(functools.partial(jax.jvp, ours))(operands, tangents)
    _, expected = jax.jvp(formulas, clean, tangents)
    seen = jax.tree.map(np.isfinite, results)  # rows without a token have an lse of -inf
    zero = functools.partial(jax.tree.map, lambda x, s: np.where(s, np.asarray(x, np.float32), 0))
    assert_close(zero(actual, seen), zero(expected, seen))

    cotangents = random_like(rng, results)
    cotangents = jax.tree.map(lambda c, s: jnp.where(s, c, 0), cotangents, seen)
    actual = jax.jit(lambda *x: jax.vjp(ours, *x)[1](cotangents))(*operands)
    expected = jax.vjp(formulas, *clean)[1](cotangents)
    assert_close(actual, expected)
    assert not np.asarray(actual[1], np.float32)[np.isnan(np.asarray(problem.k_cache))].any()


@recent
@pytest.mark.skipif(np.float32 != DTYPE, reason="differences need float32")
def test_second_derivatives_and_differences(rng) -> None:
    problem = oracle.make_problem(rng, (70,), s_q=2, h_q=2, dtype=DTYPE, spare_pages=0)
    function = attend(problem, fm.flash_mla_with_kvcache, True)
    k_cache = jnp.nan_to_num(problem.k_cache)
    check_grads(function, (problem.q, k_cache), order=2, modes=("fwd", "rev"), atol=0.1, rtol=0.1)


@recent
def test_integers_have_no_derivative(rng) -> None:
    """Lengths and tables: zeros of the dtype that JAX has for that, or JAX's own error."""
    problem = oracle.make_problem(rng, (70, 5), h_q=2, dtype=DTYPE)

    def loss(*operands: jax.Array) -> jax.Array:
        return fm.flash_mla_with_kvcache(*operands)[1].sum()

    table, lengths = jax.grad(loss, argnums=(2, 3), allow_int=True)(*problem)
    assert table.dtype == lengths.dtype == jax.dtypes.float0
    assert (table.shape, lengths.shape) == (problem.block_table.shape, (2,))
    with pytest.raises(TypeError, match="int32"):
        jax.grad(loss, argnums=3)(*problem)


@recent
def test_vmap_of_grad_and_grad_of_vmap(rng) -> None:
    problem = oracle.make_problem(rng, LENGTHS, s_q=2, h_q=4, dtype=DTYPE)
    function = attend(problem, fm.flash_mla_with_kvcache, True)
    k_cache = jnp.nan_to_num(jnp.asarray(problem.k_cache))
    q = jnp.stack([jnp.asarray(problem.q), 2 * jnp.asarray(problem.q)])

    def loss(q: jax.Array) -> jax.Array:
        return (function(q, k_cache)[0].astype(jnp.float32) ** 2).sum()

    one_by_one = jnp.stack([jax.grad(loss)(x) for x in q])
    assert_close(jax.jit(jax.vmap(jax.grad(loss)))(q), one_by_one)
    assert_close(jax.grad(lambda q: jax.vmap(loss)(q).sum())(q), one_by_one)


@recent
def test_backward_pass_does_not_hold_all_probabilities(rng) -> None:
    tokens, s_q, h_q = 4096, 16, 128
    problem = oracle.make_problem(rng, (tokens,), s_q=s_q, h_q=h_q, dtype=DTYPE)
    function = attend(problem, fm.flash_mla_with_kvcache, True)

    @jax.jit
    def gradients(q: jax.Array, k_cache: jax.Array) -> Any:
        return jax.grad(lambda *x: function(*x)[0].astype(jnp.float32).sum(), (0, 1))(q, k_cache)

    memory = gradients.lower(problem.q, problem.k_cache).compile().memory_analysis()
    # In units of all probabilities, 1.07 on a CPU, and 2.99 if they are kept.
    assert memory.temp_size_in_bytes < 2 * tokens * s_q * h_q * 4


@recent
@pytest.mark.parametrize("arguments", [(0,), (1,), (0, 1)])
def test_appended_tokens(rng, arguments) -> None:
    """Through the pool: tokens that were written get what reads them, those before do not.

    What was copied passes it on to the page that it came from.
    """
    before, count = np.array([60, 3, 0, 126], np.int32), np.array([10, 0, 5, 4], np.int32)
    problem = oracle.make_problem(
        rng, tuple(before + count), s_q=1, h_q=4, dtype=DTYPE, spare_entries=0
    )
    problem.block_table[3, 2] = -1  # a page outside the pool: its tokens are dropped
    k_cache = jnp.nan_to_num(jnp.asarray(problem.k_cache))
    new_kv = jnp.asarray(rng.standard_normal((4, 12, 1, 576), np.float32)).astype(DTYPE)
    cotangent = random_like(rng, k_cache)
    shared = problem.block_table[1, 0]  # nothing is written there
    copy_from = np.array([shared, shared, -1, shared], np.int32)

    def weighted(append: Any, k_cache: jax.Array, new_kv: jax.Array) -> jax.Array:
        pool = append(k_cache, new_kv, problem.block_table, before, count, copy_from)
        return (pool * cotangent).astype(jnp.float32).sum()

    actual, expected = (
        jax.grad(functools.partial(weighted, append), arguments)(k_cache, new_kv)
        for append in (cache_append, reference.cache_append)
    )
    assert_close(actual, expected)
    tangents = random_like(rng, (k_cache, new_kv))
    actual, expected = (
        jax.jvp(functools.partial(weighted, append), (k_cache, new_kv), tangents)[1]
        for append in (cache_append, reference.cache_append)
    )
    assert float(actual) == pytest.approx(float(expected), rel=1e-2)


@recent
def test_a_step_of_training(rng) -> None:
    """Append, then attend: the gradient reaches the new tokens."""
    before, count = np.array([60, 3], np.int32), np.array([2, 2], np.int32)
    problem = oracle.make_problem(rng, tuple(before + count), s_q=2, h_q=4, dtype=DTYPE)
    k_cache = jnp.nan_to_num(jnp.asarray(problem.k_cache))
    new_kv = jnp.asarray(rng.standard_normal((2, 2, 1, 576), np.float32)).astype(DTYPE)

    def loss(append: Any, op: Any, new_kv: jax.Array) -> jax.Array:
        pool = append(k_cache, new_kv, problem.block_table, before, count)
        out, _ = attend(problem, op, True)(jnp.asarray(problem.q), pool)
        return (out.astype(jnp.float32) ** 2).sum()

    ours = functools.partial(loss, cache_append, fm.flash_mla_with_kvcache)
    formulas = functools.partial(loss, reference.cache_append, reference.flash_mla_with_kvcache)
    assert_close(jax.jit(jax.grad(ours))(new_kv), jax.grad(formulas)(new_kv))


@pytest.mark.skipif(jax.__version_info__ >= (0, 10), reason="of older versions")
def test_older_versions_say_what_they_need(rng) -> None:
    q, *rest = oracle.make_problem(rng, (70,), h_q=2)
    with pytest.raises(NotImplementedError, match=r"needs jax 0\.10 or later, this is 0\.9"):
        jax.grad(lambda x: fm.flash_mla_with_kvcache(x, *rest)[1].sum())(jnp.asarray(q))
