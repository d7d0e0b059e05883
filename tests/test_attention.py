"""The public functions, against float64 NumPy: conformance, what must not matter, and errors.

The same tests run on every platform. The grid is small where the CPU is slow and full on the GPU.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import DTYPES, HEAD_DIM, HEAD_DIM_V, INT32_MAX, INT32_MIN, PAGE_SIZE

import flashmla_jax as fm

BORDERS = (0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 320, 511, 513, 1000)
HEADS = tuple(
    (h_q, h_kv)
    for h_kv, h_q in itertools.product((1, 2, 3), (1, 3, 9, 16, 63, 64, 126, 128))
    if h_q % h_kv == 0
)


class Case(NamedTuple):
    batch: int
    s_q: int
    heads: tuple[int, int]
    causal: bool
    dtype: str

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return "b{0}-s{1}-h{2[0]}x{2[1]}-{kind}-{4}".format(*self, kind=kind)


def full_grid() -> list[Case]:
    axes = ((1, 2, 6, 64), (1, 2, 4), HEADS, (False, True), ("bf16", "f16"))
    return [Case(*values) for values in itertools.product(*axes)]


def small_grid() -> list[Case]:
    """Every number of heads with every s_q; the other axes take turns."""
    batches, dtypes = itertools.cycle((1, 2, 6)), itertools.cycle(("bf16", "f32", "f16", "bf16"))
    causal = itertools.cycle((True, False, True, True, False))
    cases = [
        Case(next(batches), s_q, heads, next(causal), next(dtypes))
        for heads, s_q in itertools.product(HEADS, (1, 2, 4))
    ]
    return [*cases, Case(64, 1, (16, 1), False, "bf16"), Case(64, 2, (9, 3), True, "f16")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = full_grid() if metafunc.config.option.grid == "full" else small_grid()
        metafunc.parametrize("case", cases, ids=str)
    if "dtype" in metafunc.fixturenames:
        names = ("bf16", "f16") if jax.devices()[0].platform == "gpu" else tuple(DTYPES)
        metafunc.parametrize("dtype", [DTYPES[name] for name in names], ids=names)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name, so that a test run alone sees the same numbers."""
    return np.random.default_rng(list(request.node.name.encode()))


@functools.partial(jax.jit, static_argnames=("softmax_scale", "causal", "deterministic"))
def run(
    q, k_cache, block_table, cache_seqlens, softmax_scale=None, causal=False, deterministic=True
):
    return fm.flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        deterministic=deterministic,
    )


def check(problem: oracle.Problem, scale: float = HEAD_DIM**-0.5, **arguments: Any) -> None:
    actual = run(*problem, softmax_scale=scale, **arguments)
    oracle.assert_matches(actual, oracle.attend(problem, scale, arguments.get("causal", False)))


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(
            np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
        )


# --- Conformance -----------------------------------------------------------------------------


def test_conformance(case: Case, rng: np.random.Generator) -> None:
    lengths = rng.choice(BORDERS, case.batch)
    if case.batch < 64:
        lengths[rng.integers(case.batch)] = rng.integers(1, 1500)
    h_q, h_kv = case.heads
    problem = oracle.make_problem(
        rng, lengths, s_q=case.s_q, h_q=h_q, h_kv=h_kv, dtype=DTYPES[case.dtype]
    )
    check(problem, causal=case.causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q", [1, 2, 4])
def test_lengths_across_page_borders(rng, s_q, causal) -> None:
    lengths = (0, 1, 2, 3, 4, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1025, 4095, 4096)
    check(oracle.make_problem(rng, lengths, s_q=s_q, h_q=5), causal=causal)


@pytest.mark.parametrize(("h_q", "h_kv"), [(1, 1), (16, 1), (128, 2)])
def test_long_sequences(rng, dtype, h_q, h_kv) -> None:
    check(oracle.make_problem(rng, (4096, 3, 4033), h_q=h_q, h_kv=h_kv, dtype=dtype))


@pytest.mark.parametrize("causal", [False, True])
def test_more_query_tokens_than_a_page(rng, dtype, causal) -> None:
    check(
        oracle.make_problem(rng, (300, 70, 69, 5), s_q=70, h_q=6, h_kv=2, dtype=dtype),
        causal=causal,
    )


@pytest.mark.parametrize("h_q", [5, 9, 40])
@pytest.mark.parametrize("scale", [0.0, -0.05, 1e-6, -1e-30, 0.3, 192**-0.5])
def test_any_scale(rng, dtype, scale, h_q) -> None:
    problem = oracle.make_problem(rng, (130, 0, 700), s_q=2, h_q=h_q, dtype=dtype)
    check(problem, scale, causal=True)


@pytest.mark.parametrize("h_q", [5, 9, 40])
@pytest.mark.parametrize("scale", [64.0, 2.0**20, -(2.0**33), 2.0**100])
def test_giant_logits(rng, dtype, scale, h_q) -> None:
    """Scores are exact in float32 and all different, so that each row is one token's value.

    (Equal ones would be counted by the logarithm of a sum, which is nothing beside such scores.)
    """
    problem = oracle.make_problem(rng, (200, 64, 1), s_q=2, h_q=h_q, dtype=dtype)
    sign = rng.choice([-3, -2, -1, 1, 2, 3], problem.q.shape[:-1])
    problem.q[:] = 0
    problem.q[..., 0], problem.q[..., 1] = sign, 64 * sign
    num_pages, page_size = problem.k_cache.shape[:2]
    problem.k_cache[..., 0] = np.arange(page_size)[:, None]
    problem.k_cache[..., 1] = np.arange(num_pages)[:, None, None]
    check(problem, scale)


def test_large_random_logits(rng, dtype) -> None:
    """Scores near 1e4 carry float32's rounding of 1e-3 into the weights, and nothing worse."""
    problem = oracle.make_problem(rng, (300, 129), h_q=16, dtype=dtype)
    scale = 1e4 / (4 * HEAD_DIM**0.5)
    out, lse = (np.asarray(x, np.float64) for x in run(*problem, softmax_scale=scale))
    want_out, want_lse, *_ = oracle.attend(problem, scale)
    np.testing.assert_allclose(lse, want_lse, rtol=5e-6)
    np.testing.assert_allclose(out, want_out, atol=0.03, rtol=2.01 / 128)


# --- Rows and tokens that do not exist -------------------------------------------------------


@pytest.mark.parametrize("h_q", [8, 40, 128])
@pytest.mark.parametrize("exponent", [-100, -8, 8, 100])
def test_latents_of_any_magnitude(rng, dtype, exponent, h_q) -> None:
    """Partial results in half precision are scaled: what they hold may be anything."""
    if dtype == np.float16 and abs(exponent) > 8:
        pytest.skip("beyond float16")
    magnitude = 2.0**exponent
    problem = oracle.make_problem(rng, (3000, 0, 70, 1300), h_q=h_q, dtype=dtype)
    scaled = problem.replace(k_cache=scale_columns(problem.k_cache, magnitude))
    out, lse = run(*scaled, softmax_scale=HEAD_DIM**-0.5 / magnitude)
    oracle.assert_matches((scale_columns(out, 1 / magnitude), lse), oracle.attend(problem))


@pytest.mark.parametrize("h_q", [8, 40, 128])
def test_columns_of_different_magnitudes(rng, dtype, h_q) -> None:
    """Every number keeps its own precision, next to numbers that are a million times larger."""
    problem = oracle.make_problem(rng, (3000, 70), h_q=h_q, dtype=dtype)
    small = 2.0**-6 if dtype == np.float16 else 2.0**-20
    factors = np.where(np.arange(HEAD_DIM) % 3 == 0, small, 1)
    problem = problem.replace(k_cache=scale_columns(problem.k_cache, factors))
    out, lse = run(*problem, softmax_scale=HEAD_DIM**-0.5)
    expected, enlarged = oracle.attend(problem), 1 / factors[:HEAD_DIM_V]
    oracle.assert_matches(
        (scale_columns(out, enlarged), lse),
        expected._replace(out=expected.out * enlarged, spread=expected.spread * enlarged),
    )


def scale_columns(x: Any, factors: Any) -> np.ndarray:
    """By powers of two: exact, but for float16's subnormal numbers."""
    return (np.asarray(x, np.float32) * np.float32(factors)).astype(x.dtype)


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0), (0, 100, 0, 64), (-1, 65), (INT32_MIN, 7)])
def test_empty_sequences(rng, dtype, lengths) -> None:
    problem = oracle.make_problem(rng, lengths, s_q=2, h_q=3, dtype=dtype)
    out, lse = run(*problem)
    oracle.assert_matches((out, lse), oracle.attend(problem))
    for i, length in enumerate(lengths):
        if length <= 0:
            assert not np.asarray(out[i]).any()
            assert (np.asarray(lse[i]) == -np.inf).all()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 64, 66])
def test_causal_rows_before_the_first_token(rng, length) -> None:
    problem = oracle.make_problem(rng, (length, 10), s_q=4, h_q=16)
    out, lse = run(*problem, causal=True)
    oracle.assert_matches((out, lse), oracle.attend(problem, causal=True))
    assert (np.asarray(lse[0] == -np.inf).all(axis=0) == (length - 4 + np.arange(4) < 0)).all()


@pytest.mark.parametrize("page", [-1, INT32_MIN, INT32_MAX, "num_pages"])
def test_page_outside_the_pool_is_nan_for_its_sequence_only(rng, dtype, page) -> None:
    problem = oracle.make_problem(rng, (200, 200, 128), h_q=3, dtype=dtype)
    problem.block_table[1, 1] = len(problem.k_cache) if page == "num_pages" else page
    out, lse = run(*problem)
    oracle.assert_matches((out, lse), oracle.attend(problem))
    assert np.isnan(np.asarray(lse)).all(axis=(1, 2)).tolist() == [False, True, False]
    assert np.isnan(np.asarray(out, np.float32)).all(axis=(1, 2, 3)).tolist() == [
        False,
        True,
        False,
    ]


def test_page_outside_the_pool_is_nan_for_the_rows_that_see_it_only(rng, dtype) -> None:
    """Tokens 62..65 are the last four; those from 64 on do not exist."""
    problem = oracle.make_problem(rng, (66,), s_q=4, h_q=3, dtype=dtype)
    problem.block_table[0, 1] = -1
    out, lse = run(*problem, causal=True)
    oracle.assert_matches((out, lse), oracle.attend(problem, causal=True))
    assert np.isnan(np.asarray(lse))[0, 0].tolist() == [False, False, True, True]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("excess", [1, 2, 64, 10**6, INT32_MAX - 256])
def test_length_beyond_the_table_is_nan(rng, excess, causal) -> None:
    problem = oracle.make_problem(rng, (256, 256), s_q=3, h_q=5, spare_entries=0)
    problem.cache_seqlens[0] += excess
    out, lse = run(*problem, causal=causal)
    oracle.assert_matches((out, lse), oracle.attend(problem, causal=causal))
    expected = [causal and excess + j - 3 < 0 for j in range(3)]
    assert (~np.isnan(np.asarray(lse))[0, 0]).tolist() == expected
    assert np.isfinite(np.asarray(lse[1])).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_in_real_tokens_reach_the_rows_that_see_them(rng, dtype, value) -> None:
    problem = oracle.make_problem(rng, (100, 100), s_q=4, h_q=3, dtype=dtype)
    page, row = problem.block_table[0, 1], 98 - PAGE_SIZE
    problem.k_cache[page, row, 0, :HEAD_DIM_V] = value  # the last token but one
    problem.q[:] = np.abs(problem.q)
    out, lse = (np.asarray(x, np.float32) for x in run(*problem, causal=True))
    assert np.isnan(out[0]).all(axis=(1, 2)).tolist() == [False, False, True, True]
    assert (~np.isfinite(lse[0])).all(axis=0).tolist() == [False, False, True, True]
    assert np.isfinite(out[0, :2]).all()
    assert np.isfinite(out[1]).all()


# --- What must not matter --------------------------------------------------------------------


def test_same_bits_every_time(rng, dtype) -> None:
    problem = oracle.make_problem(rng, (4000, 1, 0, 777, 64), s_q=2, h_q=16, dtype=dtype)
    first = run(*problem, causal=True)
    for _ in range(5):
        assert_same_bits(run(*problem, causal=True), first)


def test_where_pages_lie_does_not_show(rng, dtype) -> None:
    problem = oracle.make_problem(rng, (700, 64, 130), h_q=16, dtype=dtype)
    order = rng.permutation(len(problem.k_cache))  # new page i is old page order[i]
    where = np.argsort(order)
    used = -(-problem.cache_seqlens // PAGE_SIZE)
    table = problem.block_table.copy()
    for i, pages in enumerate(used):
        table[i, :pages] = where[table[i, :pages]]
    moved = problem.replace(k_cache=problem.k_cache[order], block_table=table)
    assert_same_bits(run(*moved), run(*problem))


def test_sequences_may_share_pages(rng) -> None:
    problem = oracle.make_problem(rng, (300, 300, 300), h_q=16, spare_entries=0)
    problem.block_table[1] = problem.block_table[0]
    problem.block_table[2, :2] = problem.block_table[0, 0]
    check(problem)


@pytest.mark.parametrize(("h_q", "h_kv"), [(1, 1), (7, 1), (20, 1), (32, 2), (128, 1)])
def test_batch_invariant(rng, dtype, h_q, h_kv, platform) -> None:
    """A sequence's result is the same bits alone, in its batch, and in another order and table."""
    lengths = (1500, 64, 6300, 0, 5, 2048, 2049) if platform == "gpu" else (1500, 64, 3000, 0, 5)
    problem = oracle.make_problem(rng, lengths, s_q=2, h_q=h_q, h_kv=h_kv, dtype=dtype)
    attend = functools.partial(run, causal=True, deterministic="batch_invariant")
    out, lse = map(np.asarray, attend(*problem))

    def of(rows: Any, pages: int) -> oracle.Problem:
        return problem.replace(
            q=problem.q[rows],
            block_table=problem.block_table[rows, :pages],
            cache_seqlens=problem.cache_seqlens[rows],
        )

    for i, length in enumerate(lengths):
        alone = attend(*of([i], max(1, -(-length // PAGE_SIZE))))
        assert_same_bits(alone, (out[[i]], lse[[i]]))
    order = rng.choice(len(lengths), 4 * len(lengths))
    assert_same_bits(attend(*of(order, problem.block_table.shape[1])), (out[order], lse[order]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), [(1, 1), (16, 1), (40, 2), (64, 1), (128, 1)])
def test_batch_invariant_conformance(rng, h_q, h_kv, causal) -> None:
    lengths = (0, 1, 2047, 2048, 2049, 300, 5000, 4097)
    problem = oracle.make_problem(rng, lengths, s_q=2, h_q=h_q, h_kv=h_kv)
    check(problem, causal=causal, deterministic="batch_invariant")


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [3, 64])
def test_batch_invariant_beyond_the_most_chunks(rng, h_q) -> None:
    """Longer sequences have longer chunks: here of 8192 tokens. Few of the pages are distinct."""
    problem = oracle.make_problem(rng, (5000,), h_q=h_q, spare_entries=0)
    table = np.resize(problem.block_table[:, :70], (1, 9000))
    long = problem.replace(block_table=table, cache_seqlens=np.array([9000 * 64 - 5], np.int32))
    actual = [np.asarray(x, np.float32) for x in run(*long, deterministic="batch_invariant")]
    expected = [np.asarray(x, np.float32) for x in run(*long)]
    np.testing.assert_allclose(actual[0], expected[0], atol=2e-2 * np.abs(expected[0]).max())
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-4)


def test_concurrent_calls(rng) -> None:
    """Several Python threads, each waiting for the same pool of XLA threads."""
    problem = oracle.make_problem(rng, (2000, 300, 1), h_q=16)
    expected = run(*problem)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.extend(run(*problem) for _ in range(5)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 30
    for result in results:
        assert_same_bits(result, expected)


def test_without_jit(rng) -> None:
    """Under `jax.disable_jit`, for debugging, the kernels run all the same."""
    problem = oracle.make_problem(rng, (70, 5), h_q=4)
    with jax.disable_jit():
        assert_same_bits(fm.flash_mla_with_kvcache(*problem), run(*problem))


def test_non_contiguous_operands(rng) -> None:
    problem = oracle.make_problem(rng, (70, 130), s_q=2, h_q=4, h_kv=2)

    @jax.jit
    def transposed(q, k_cache, block_table, cache_seqlens):
        return fm.flash_mla_with_kvcache(
            q.transpose(3, 1, 0, 2), k_cache.swapaxes(0, 2), block_table.T, cache_seqlens[::-1]
        )

    q, k_cache, block_table, cache_seqlens = problem
    operands = (q.transpose(2, 1, 3, 0), k_cache.swapaxes(0, 2), block_table.T, cache_seqlens[::-1])
    assert_same_bits(transposed(*map(jnp.asarray, operands)), run(*problem))


def test_numpy_operands_outside_jit(rng) -> None:
    problem = oracle.make_problem(rng, (70, 130))
    assert_same_bits(fm.flash_mla_with_kvcache(*problem), run(*problem))


def test_pool_beyond_two_billion_numbers(rng, platform) -> None:
    """58,255 pages hold 2^31 numbers. On the CPU only the pages in use ever become memory."""
    problem = oracle.make_problem(rng, (130, 65), h_q=3, dtype=np.float16)
    num_pages = 2**31 // (PAGE_SIZE * HEAD_DIM) + 10
    homes = num_pages - len(problem.k_cache) + np.arange(len(problem.k_cache))
    used = -(-problem.cache_seqlens // PAGE_SIZE)
    table = problem.block_table.copy()
    for i, pages in enumerate(used):
        table[i, :pages] = homes[table[i, :pages]]
    shape = (num_pages, *problem.k_cache.shape[1:])
    if platform == "cpu":
        raw = np.zeros(int(np.prod(shape)) + 32, np.float16)
        skip = -raw.ctypes.data % 64 // 2
        pool = raw[skip : skip + int(np.prod(shape))].reshape(shape)
        pool[homes] = problem.k_cache
        k_cache = jnp.from_dlpack(pool)
        assert k_cache.unsafe_buffer_pointer() == pool.ctypes.data
    else:
        k_cache = jnp.zeros(shape, jnp.float16).at[homes].set(problem.k_cache)
    actual = run(problem.q, k_cache, table, problem.cache_seqlens)
    assert_same_bits(actual, run(*problem))


# --- Inside JAX ------------------------------------------------------------------------------


def test_lengths_and_tables_change_without_recompilation(rng) -> None:
    traces = []

    @jax.jit
    def step(*operands):
        traces.append(operands)
        return fm.flash_mla_with_kvcache(*operands)

    problem = oracle.make_problem(rng, (250, 130, 64), h_q=3, spare_entries=0)
    for lengths in ((250, 130, 64), (0, 0, 0), (1, 129, 63), (65, 64, 2)):
        changed = problem.replace(
            cache_seqlens=np.array(lengths, np.int32),
            block_table=rng.permuted(problem.block_table, axis=0),
        )
        # A sequence may now see another's poison: rows with NaN are part of the comparison.
        oracle.assert_matches(step(*changed), oracle.attend(changed))
    assert len(traces) == 1
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "mapped", [m for n in range(1, 5) for m in itertools.combinations(range(4), n)], ids=str
)
def test_vmap(rng, mapped) -> None:
    """Over every subset of the operands, each along another axis, against a Python loop."""
    size, lengths = 3, (70, 0, 130)
    problems = [oracle.make_problem(rng, lengths, s_q=2, h_q=4, h_kv=2) for _ in range(size)]
    base = list(problems[0])
    if 1 in mapped and 2 not in mapped:  # one table for all pools: they must be as large
        problems = [p.replace(block_table=base[2]) for p in problems]
    axes = (1, 2, 1, 0)
    operands, in_axes = [], []
    for i, axis in enumerate(axes):
        stacked = np.stack([list(p)[i] for p in problems], axis)
        if i == 3:
            stacked = np.stack([p.cache_seqlens - k for k, p in enumerate(problems)])
        operands.append(jnp.asarray(stacked if i in mapped else base[i]))
        in_axes.append(axis if i in mapped else None)

    def attend(*args):
        return fm.flash_mla_with_kvcache(*args, causal=True)

    out, lse = jax.jit(jax.vmap(attend, in_axes))(*operands)
    for k in range(size):
        args = [
            x if a is None else jnp.take(x, k, a) for x, a in zip(operands, in_axes, strict=True)
        ]
        expected = oracle.attend(oracle.Problem(*map(np.asarray, args)), causal=True)
        oracle.assert_matches((out[k], lse[k]), expected)


def test_nested_vmap(rng) -> None:
    problem = oracle.make_problem(rng, (70, 130), h_q=2)
    q = jnp.stack([jnp.stack([problem.q * (1 + i + j) for i in range(2)]) for j in range(3)])
    rest = tuple(problem)[1:]
    out, lse = jax.vmap(jax.vmap(lambda x: run(x, *rest)))(q)
    for j, i in itertools.product(range(3), range(2)):
        oracle.assert_matches(
            (out[j, i], lse[j, i]), oracle.attend(problem.replace(q=np.asarray(q[j, i])))
        )


@pytest.mark.parametrize("mapped", [(0,), (1, 2), (3,), (0, 1, 2, 3)], ids=str)
def test_vmap_over_nothing(rng, mapped) -> None:
    problem = oracle.make_problem(rng, (70, 130), h_q=2)
    operands = [jnp.stack([x] * 2)[:0] if i in mapped else x for i, x in enumerate(problem)]
    in_axes = [0 if i in mapped else None for i in range(4)]
    out, lse = jax.vmap(run, in_axes)(*operands)
    assert out.shape == (0, *problem.q.shape[:-1], 512)
    assert lse.shape == (0, 2, 2, 1)
    assert (out.dtype, lse.dtype) == (problem.q.dtype, np.float32)


def test_vmapped_pools_do_not_reach_each_other(rng) -> None:
    """A page id past the end of one pool is not the first page of the next."""
    problem = oracle.make_problem(rng, (100,), h_q=2, spare_entries=0)
    k_cache = jnp.stack([problem.k_cache, problem.k_cache])
    for page in (len(problem.k_cache), -1):
        problem.block_table[0, 0] = page
        _, lse = jax.vmap(lambda x: run(problem.q, x, *tuple(problem)[2:]))(k_cache)
        assert np.isnan(np.asarray(lse)).all()


def test_scan(rng) -> None:
    """Decode steps under one scan: lengths grow, and the op sees what was written before."""
    problem = oracle.make_problem(rng, (130, 63), h_q=3, spare_entries=0)

    def step(lengths, _):
        return lengths + 1, fm.flash_mla_with_kvcache(*tuple(problem)[:3], lengths)

    start = problem.cache_seqlens - 5
    _, (out, lse) = jax.jit(lambda lengths: jax.lax.scan(step, lengths, length=5))(start)
    for k in range(5):
        expected = oracle.attend(problem.replace(cache_seqlens=start + k))
        oracle.assert_matches((out[k], lse[k]), expected)


def in_while_loop(f, q, *rest):
    """Three times, the last of which counts."""
    start = 0, *jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), f(q, *rest))
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, *f(q, *rest)), start)[1:]


def in_cond(f, q, k_cache, block_table, cache_seqlens):
    def neither(q, *_):
        batch, s_q, h_q, _ = q.shape
        return jnp.zeros((batch, s_q, h_q, HEAD_DIM_V), q.dtype), jnp.zeros((batch, h_q, s_q))

    some = cache_seqlens.sum() > 0
    return jax.lax.cond(some, f, neither, q, k_cache, block_table, cache_seqlens)


def in_map(f, q, k_cache, block_table, cache_seqlens):
    """One sequence after the other."""

    def one(x):
        q, table, length = x
        out, lse = f(q[None], k_cache, table[None], length[None])
        return out[0], lse[0]

    return jax.lax.map(one, (q, block_table, cache_seqlens))


def in_checkpoint(f, *operands):
    return jax.checkpoint(f)(*operands)


@pytest.mark.parametrize("form", [in_while_loop, in_cond, in_map, in_checkpoint])
def test_control_flow(rng, form) -> None:
    problem = oracle.make_problem(rng, (70, 0, 300), s_q=2, h_q=16)
    attend = functools.partial(fm.flash_mla_with_kvcache, causal=True)
    actual = jax.jit(functools.partial(form, attend))(*map(jnp.asarray, problem))
    oracle.assert_matches(actual, oracle.attend(problem, HEAD_DIM**-0.5, causal=True))
    shapes = jax.eval_shape(functools.partial(form, attend), *map(jnp.asarray, problem))
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in actual]


def test_empty_batch(dtype) -> None:
    q = jnp.zeros((0, 2, 16, HEAD_DIM), dtype)
    k_cache = jnp.zeros((4, PAGE_SIZE, 1, HEAD_DIM), dtype)
    out, lse = run(q, k_cache, jnp.zeros((0, 3), jnp.int32), jnp.zeros(0, jnp.int32))
    assert out.shape == (0, 2, 16, HEAD_DIM_V)
    assert out.dtype == dtype
    assert lse.shape == (0, 16, 2)
    assert lse.dtype == jnp.float32


def test_result_shapes_and_dtypes(rng, dtype) -> None:
    problem = oracle.make_problem(rng, (70, 130), s_q=2, h_q=6, h_kv=3, dtype=dtype)
    out, lse = jax.eval_shape(fm.flash_mla_with_kvcache, *problem)
    assert (out.shape, out.dtype) == ((2, 2, 6, HEAD_DIM_V), dtype)
    assert (lse.shape, lse.dtype) == ((2, 6, 2), jnp.float32)


# --- get_mla_metadata ------------------------------------------------------------------------


def test_metadata_changes_nothing(rng) -> None:
    problem = oracle.make_problem(rng, (250, 0, 64), s_q=2, h_q=16)

    @jax.jit
    def scheduled(q, k_cache, block_table, cache_seqlens):
        metadata, num_splits = fm.get_mla_metadata(cache_seqlens, 2 * 16, 1)
        return fm.flash_mla_with_kvcache(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            512,
            metadata,
            num_splits,
        )

    assert_same_bits(scheduled(*problem), run(*problem))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_q_tokens_per_head_k": 0},
        {"num_heads_k": -1},
        {"num_heads_q": 5, "num_heads_k": 2},
        {"cache_seqlens": np.zeros((2, 2), np.int32)},
        {"cache_seqlens": np.zeros(2, np.float32)},
    ],
    ids=lambda a: ",".join(a),
)
def test_metadata_refuses(arguments) -> None:
    good = {
        "cache_seqlens": np.zeros(2, np.int32),
        "num_q_tokens_per_head_k": 16,
        "num_heads_k": 1,
    }
    with pytest.raises(ValueError, match=next(iter(arguments))):
        fm.get_mla_metadata(**{**good, **arguments})


def test_metadata_is_the_same_for_all_caches() -> None:
    lengths = np.array([70, 0, 64], np.int32)
    for arguments in ({}, {"is_fp8_kvcache": True}, {"topk": 64}):
        metadata, num_splits = fm.get_mla_metadata(lengths, 16, 1, **arguments)
        assert metadata.tolist() == [0, 2, 2, 3]
        assert num_splits is None
    with pytest.raises(ValueError, match="topk"):
        fm.get_mla_metadata(lengths, 16, 1, topk=0)


# --- merge_attention_states ------------------------------------------------------------------


def split_tokens(problem: oracle.Problem, pages: int) -> tuple[oracle.Problem, oracle.Problem]:
    """The first `pages` pages of each sequence, and the rest."""
    border = pages * PAGE_SIZE
    head = problem.replace(cache_seqlens=np.minimum(problem.cache_seqlens, border))
    tail = problem.replace(
        cache_seqlens=np.maximum(problem.cache_seqlens - border, 0),
        block_table=problem.block_table[:, pages:],
    )
    return head, tail


def test_merging_parts_equals_the_whole(rng, dtype) -> None:
    problem = oracle.make_problem(rng, (500, 128, 60, 0, 129), s_q=2, h_q=9, dtype=dtype)
    head, tail = split_tokens(problem, 2)
    middle, end = split_tokens(tail, 1)
    outs, lses = zip(*(run(*part) for part in (head, middle, end)), strict=True)
    merged = jax.jit(fm.merge_attention_states)(jnp.stack(outs), jnp.stack(lses))
    assert merged[0].dtype == dtype
    oracle.assert_matches(merged, oracle.attend(problem))


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merging_empty_states(parts) -> None:
    """Whatever an empty part's output holds, it has no say."""
    outs = jnp.full((parts, 2, 1, 3, HEAD_DIM_V), jnp.nan, jnp.bfloat16)
    lses = jnp.full((parts, 2, 3, 1), -jnp.inf)
    out, lse = fm.merge_attention_states(outs, lses)
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == -np.inf).all()
    out, lse = fm.merge_attention_states(outs.at[-1].set(2), lses.at[-1].set(1.5))
    assert (np.asarray(out) == 2).all()
    np.testing.assert_allclose(lse, 1.5, rtol=1e-6)


@pytest.mark.parametrize("lse", [-1e4, -200.0, 0.0, 200.0, 1e4, 1e30])
def test_merging_far_from_zero(rng, lse) -> None:
    outs = rng.standard_normal((2, 1, 2, 3, HEAD_DIM_V)).astype(np.float32)
    out, merged = fm.merge_attention_states(outs, jnp.full((2, 1, 3, 2), lse, jnp.float32))
    np.testing.assert_allclose(out, outs.mean(0), atol=1e-6)
    np.testing.assert_allclose(merged, lse + np.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        (np.zeros((2, 3, 1, 4, 8), np.float32), np.zeros((2, 3, 1, 4), np.float32), "lses"),
        (np.zeros((2, 3, 1, 4, 8), np.float32), np.zeros((2, 3, 4, 1), np.float64), "lses"),
        (np.zeros((2, 3, 1, 4), np.float32), np.zeros((2, 3, 4, 1), np.float32), "outs"),
        (np.zeros((2, 3, 1, 4, 8), np.int32), np.zeros((2, 3, 4, 1), np.float32), "outs"),
        (np.zeros((0, 3, 1, 4, 8), np.float32), np.zeros((0, 3, 4, 1), np.float32), "outs"),
    ],
)
def test_merging_refuses(outs, lses, message) -> None:
    with pytest.raises(ValueError, match=message):
        fm.merge_attention_states(outs, lses)


# --- Bad input -------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = jnp.bfloat16) -> np.ndarray:
    return np.zeros(shape, dtype)


GOOD = {
    "q": zeros(2, 1, 4, 576),
    "k_cache": zeros(5, 64, 2, 576),
    "block_table": zeros(2, 3, dtype=np.int32),
    "cache_seqlens": zeros(2, dtype=np.int32),
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": zeros(2, 4, 576)}, ["q", "(2, 4, 576)"]),
        ({"q": zeros(2, 1, 4, 512)}, ["q", "576", "(2, 1, 4, 512)"]),
        ({"q": zeros(2, 1, 3, 576)}, ["h_q=3", "h_kv=2"]),
        ({"q": zeros(2, 0, 4, 576)}, ["q", "(2, 0, 4, 576)"]),
        ({"q": zeros(2, 1, 0, 576)}, ["q", "(2, 1, 0, 576)"]),
        ({"q": zeros(2, 1, 4, 576, dtype=np.int32)}, ["q", "int32"]),
        ({"q": [[1.0]]}, ["q", "list"]),
        ({"q": None}, ["q", "NoneType"]),
        ({"k_cache": zeros(5, 64, 576)}, ["k_cache", "(5, 64, 576)"]),
        ({"k_cache": zeros(5, 32, 2, 576)}, ["k_cache", "64", "(5, 32, 2, 576)"]),
        ({"k_cache": zeros(5, 64, 2, 656)}, ["k_cache", "576", "(5, 64, 2, 656)"]),
        ({"k_cache": zeros(5, 64, 0, 576)}, ["k_cache", "(5, 64, 0, 576)"]),
        ({"k_cache": zeros(0, 64, 2, 576)}, ["k_cache", "(0, 64, 2, 576)"]),
        ({"k_cache": zeros(5, 64, 2, 576, dtype=np.float16)}, ["k_cache", "bfloat16", "float16"]),
        ({"k_cache": zeros(5, 64, 2, 576, dtype=np.uint8)}, ["k_cache", "uint8"]),
        ({"block_table": zeros(3, 3, dtype=np.int32)}, ["block_table", "(3, 3)"]),
        ({"block_table": zeros(2, 0, dtype=np.int32)}, ["block_table", "(2, 0)"]),
        ({"block_table": zeros(6, dtype=np.int32)}, ["block_table", "(6,)"]),
        ({"block_table": zeros(2, 3, dtype=np.int64)}, ["block_table", "int32", "int64"]),
        ({"block_table": zeros(2, 3, dtype=np.float32)}, ["block_table", "float32"]),
        ({"cache_seqlens": zeros(3, dtype=np.int32)}, ["cache_seqlens", "(3,)"]),
        ({"cache_seqlens": zeros(2, 1, dtype=np.int32)}, ["cache_seqlens", "(2, 1)"]),
        ({"cache_seqlens": zeros(2, dtype=np.uint32)}, ["cache_seqlens", "uint32"]),
        ({"cache_seqlens": 7}, ["cache_seqlens", "int"]),
        ({"head_dim_v": 576}, ["head_dim_v", "576"]),
        ({"softmax_scale": float("nan")}, ["softmax_scale", "nan"]),
        ({"softmax_scale": float("-inf")}, ["softmax_scale", "-inf"]),
        (
            {"tile_scheduler_metadata": zeros(5, dtype=np.int32)},
            ["tile_scheduler_metadata", "(5,)"],
        ),
        ({"num_splits": zeros(3, dtype=np.int32)}, ["num_splits"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input_gets_its_message(changes, words) -> None:
    with pytest.raises(ValueError, match=words[0]) as caught:
        fm.flash_mla_with_kvcache(**{**GOOD, **changes})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("scale", [1e39, -1e39, 3e38, float("inf"), float("nan")])
def test_scale_beyond_float32_gets_its_message(scale) -> None:
    with pytest.raises(ValueError, match=r"softmax_scale must be finite.*" + re.escape(str(scale))):
        fm.flash_mla_with_kvcache(**GOOD, softmax_scale=scale)


def test_float64_is_not_narrowed_in_silence() -> None:
    with pytest.raises(ValueError, match="q is float64"):
        fm.flash_mla_with_kvcache(**{**GOOD, "q": np.zeros(GOOD["q"].shape)})


def test_traced_scale_gets_its_message() -> None:
    with pytest.raises(ValueError, match="softmax_scale"):
        jax.jit(lambda scale: fm.flash_mla_with_kvcache(**GOOD, softmax_scale=scale))(0.1)


@pytest.mark.parametrize("value", [False, None, "batch", 1.5])
def test_unknown_determinism_gets_its_message(value) -> None:
    with pytest.raises(ValueError, match=f"^deterministic .*{value!r}"):
        fm.flash_mla_with_kvcache(**GOOD, deterministic=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_sink", zeros(4, dtype=np.float32)),
        ("extra_k_cache", GOOD["k_cache"]),
        ("extra_indices_in_kvcache", zeros(2, 1, 64, dtype=np.int32)),
        ("topk_length", zeros(2, dtype=np.int32)),
        ("extra_topk_length", zeros(2, dtype=np.int32)),
    ],
)
def test_arguments_of_sparse_attention_need_indices(name, value) -> None:
    with pytest.raises(ValueError, match=f"^{name} .*needs indices"):
        fm.flash_mla_with_kvcache(**GOOD, **{name: value})


def test_batch_invariance_is_for_the_kernels() -> None:
    indices = zeros(2, 1, 64, dtype=np.int32)
    with pytest.raises(NotImplementedError, match="batch_invariant"):
        fm.flash_mla_with_kvcache(**GOOD, indices=indices, deterministic="batch_invariant")


@pytest.mark.gpu
def test_float32_is_refused_on_the_gpu(rng) -> None:
    problem = oracle.make_problem(rng, (70,), h_q=2, dtype=np.float32)
    with pytest.raises(NotImplementedError, match="float32"):
        run(*problem)
