"""Dense attention over FP8 caches."""

from __future__ import annotations

import functools
from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import flashmla_jax as fm
from flashmla_jax import reference
from flashmla_jax.cache import layout


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(list(request.node.name.encode()))


def make_problem(
    rng: np.random.Generator, lengths: tuple[int, ...], dtype: Any, **sizes: int
) -> tuple[oracle.Problem, oracle.Problem]:
    """A problem with an FP8 cache, and the same with the numbers that it stands for.

    What is NaN in the one has NaN's code, and scales and RoPE keys that are NaN, in the other.
    """
    exact = oracle.make_problem(rng, lengths, dtype=dtype, **sizes)
    poison = np.isnan(exact.k_cache.astype(np.float32)).any(-1)
    kv = np.where(poison[..., None], 1, exact.k_cache.astype(np.float32))
    kv *= np.exp2(rng.integers(-3, 1, (*kv.shape[:-1], 1)))  # tokens of several sizes
    pages = fp8_oracle.quantize_656(kv, powers_of_two=bool(rng.integers(2)))
    pages[poison] = 0xFF
    rows = exact.q.shape[1] * exact.q.shape[2] // kv.shape[2]
    numbers = np.where(poison[..., None], np.nan, fp8_oracle.numbers_of(pages, dtype, rows))
    return exact.replace(k_cache=pages), exact.replace(k_cache=numbers)


def run(problem: oracle.Problem, **options: Any) -> tuple[jax.Array, jax.Array]:
    call = jax.jit(lambda *args: fm.flash_mla_with_kvcache(*args, is_fp8_kvcache=True, **options))
    return call(*problem)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ((300,), {"h_q": 3}),
        ((0, 1, 63, 64, 65, 130), {"s_q": 2, "h_q": 4}),
        ((70, 129), {"s_q": 3, "h_q": 6, "h_kv": 2}),
        ((4100, 0, 129, 2500), {"h_q": 16}),
        ((3000, 64), {"s_q": 2, "h_q": 16}),
        ((2500, 700), {"h_q": 128}),
        ((70,) * 150, {"h_q": 8}),
        # More sequences than a GPU has multiprocessors, and odd numbers of pages.
        ((130, 1, 0, 200, 320) * 50, {"h_q": 8}),
        ((130, 1, 0, 200, 320) * 50, {"s_q": 3, "h_q": 10}),
        ((40000,), {"s_q": 2, "h_q": 4}),
    ],
    ids=lambda x: str(x)[:20],
)
@pytest.mark.parametrize("causal", [False, True])
def test_matches_float64(
    rng: np.random.Generator, dtype: Any, lengths: Any, sizes: Any, causal: bool
) -> None:
    fp8, exact = make_problem(rng, lengths, dtype, **sizes)
    expected = oracle.attend(exact, 0.1, causal)
    oracle.assert_matches(run(fp8, softmax_scale=0.1, causal=causal), expected)
    as_codes = fp8.replace(k_cache=fp8.k_cache.view(ml_dtypes.float8_e4m3fn))
    again = run(as_codes, softmax_scale=0.1, causal=causal)
    np.testing.assert_array_equal(again[0], run(fp8, softmax_scale=0.1, causal=causal)[0])


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ((2500, 0, 1, 700), {"s_q": 2, "h_q": 128}),
        ((130, 1, 0, 200, 320) * 20, {"s_q": 2, "h_q": 63}),
        ((70, 129, 600, 0), {"s_q": 3, "h_q": 84, "h_kv": 2}),
    ],
    ids=["several pairs", "many sequences", "kv heads"],
)
@pytest.mark.parametrize("causal", [False, True])
def test_pairs_of_64_rows(rng: np.random.Generator, lengths: Any, sizes: Any, causal: bool) -> None:
    """Which have a kernel of their own; and rows that do not fill them."""
    fp8, exact = make_problem(rng, lengths, ml_dtypes.bfloat16, **sizes)
    expected = oracle.attend(exact, 0.1, causal)
    oracle.assert_matches(run(fp8, softmax_scale=0.1, causal=causal), expected)


def test_lengths_and_tables_are_data(rng: np.random.Generator) -> None:
    call = jax.jit(lambda *args: fm.flash_mla_with_kvcache(*args, is_fp8_kvcache=True))
    fp8, exact = make_problem(rng, (200, 90), np.float32, h_q=2)
    for lengths in ((200, 90), (1, 0), (65, 64)):
        cache_seqlens = np.array(lengths, np.int32)
        actual = call(*fp8.replace(cache_seqlens=cache_seqlens))
        oracle.assert_matches(actual, oracle.attend(exact.replace(cache_seqlens=cache_seqlens)))
    assert call._cache_size() == 1


def test_the_reference(rng: np.random.Generator) -> None:
    """What runs where there is no kernel."""
    fp8, exact = make_problem(rng, (0, 65, 130), np.float32, s_q=2, h_q=4)
    dequantize = functools.partial(layout.dequantize, dtype=np.float32)
    call = functools.partial(
        reference.flash_mla_with_kvcache, softmax_scale=0.1, causal=True, dequantize=dequantize
    )
    oracle.assert_matches(jax.jit(call)(*fp8), oracle.attend(exact, 0.1, causal=True))


KERNELS = pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (np.float32, 2),
        *((ml_dtypes.bfloat16, rows) for rows in (16, 32, 64, 128)),
    ],
    ids=lambda x: x if isinstance(x, int) else np.dtype(x).name,
)
"""As many query rows as each of the GPU's shapes takes, which has a way of its own to read FP8."""


@KERNELS
def test_all_codes(rng: np.random.Generator, dtype: Any, rows: int) -> None:
    """A token for each code. Every query picks one, and has its numbers for a result."""
    pages = np.zeros((4, 64, 1, 656), np.uint8)
    pages[..., :512] = np.arange(256, dtype=np.uint8).reshape(4, 64, 1, 1)
    scales = np.array([2.0**-3, 0.37, 1, 2.0**9], np.float32)
    pages[..., 512:528] = scales.view(np.uint8)
    rope = np.zeros((256, 64), np.float32)
    rope[:, :8] = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 1, -1)
    pages[..., 528:] = rope.astype(ml_dtypes.bfloat16).view(np.uint8).reshape(4, 64, 1, 128)
    nan = np.isnan(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(float))
    assert nan.sum() == 2
    pages.reshape(256, 656)[nan, :512] = 0  # any other row would be NaN
    batch = 256 // rows
    q = np.zeros((batch, rows, 1, 576), dtype)
    q[..., 512:] = rope.reshape(batch, rows, 1, 64)
    table = np.tile(np.arange(4, dtype=np.int32), (batch, 1))
    lengths = np.full(batch, 256, np.int32)
    out, _ = run(oracle.Problem(q, pages, table, lengths), softmax_scale=100.0)
    numbers = fp8_oracle.numbers_of(pages, dtype, rows)[..., :512].reshape(batch, rows, 1, 512)
    np.testing.assert_array_equal(out, numbers.astype(dtype))


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("of_queries", [1e-6, 1.0, 3e5], ids=lambda x: f"q{x:g}")
def test_sizes(rng: np.random.Generator, rows: int, of_queries: float) -> None:
    """Tokens, and queries, that are larger or smaller than half precision holds; or nothing."""
    fp8, _ = make_problem(rng, (130, 70), ml_dtypes.bfloat16, h_q=rows)
    pages = fp8.k_cache.copy()
    sizes = np.exp2(rng.integers(-40, 40, pages.shape[:-1])).astype(np.float32)
    sizes[rng.random(sizes.shape) < 0.1] = 0
    scales = sizes[..., None] * rng.uniform(0.5, 2, (*sizes.shape, 4)).astype(np.float32)
    pages[..., 512:528] = scales.astype(np.float32).view(np.uint8)
    poison = (fp8.k_cache == 0xFF).all(-1)
    pages[poison] = 0xFF
    numbers = np.where(
        poison[..., None], np.nan, fp8_oracle.numbers_of(pages, ml_dtypes.bfloat16, rows)
    )
    q = (fp8.q.astype(np.float32) * of_queries).astype(ml_dtypes.bfloat16)
    fp8, exact = fp8.replace(q=q, k_cache=pages), fp8.replace(q=q, k_cache=numbers)
    scale = 2.0**-48 / of_queries  # the highest scores are a few units
    oracle.assert_matches(run(fp8, softmax_scale=scale), oracle.attend(exact, scale))


@KERNELS
def test_nan_codes_and_scales_show(rng: np.random.Generator, dtype: Any, rows: int) -> None:
    """In the sequences that have such a token, and in those alone."""
    fp8, _ = make_problem(rng, (100, 100, 100, 100), dtype, h_q=rows)
    pages, table = fp8.k_cache.copy(), fp8.block_table
    pages[table[0, 1], 3, 0, 17] = 0x7F
    pages[table[1, 0], 63, 0, 516:520] = np.array(np.nan, np.float32).reshape(1).view(np.uint8)
    pages[table[2, 0], 0, 0, 654:656] = np.array([0xC0, 0x7F], np.uint8)  # the RoPE key's last
    out, lse = run(fp8.replace(k_cache=pages))
    out = np.asarray(out, np.float32)
    for i in range(4):
        assert np.isnan(lse[i]).all() == (i < 3)
        assert np.isnan(out[i]).any() == (i < 3)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("rising", [False, True], ids=["falling", "rising"])
def test_rescaling(rng: np.random.Generator, rows: int, rising: bool) -> None:
    """Scores that grow, or shrink, by many powers of two from one page to the next."""
    lengths = (450, 70, 200) * 60
    fp8, _ = make_problem(rng, lengths, ml_dtypes.bfloat16, h_q=rows)
    pages = fp8.k_cache.copy()
    for table, length in zip(fp8.block_table, lengths, strict=True):
        for first in range(0, length, 64):
            at = np.arange(first, min(first + 64, length))
            score = (at if rising else length - at) * rng.uniform(0.1, 0.3)
            key = score.astype(ml_dtypes.bfloat16)[:, None].view(np.uint8)
            pages[table[first // 64], : len(at), 0, 528:530] = key
    q = fp8.q.copy()
    q[..., 512] = 16  # against noise of about three
    poison = (fp8.k_cache == 0xFF).all(-1)
    numbers = np.where(
        poison[..., None], np.nan, fp8_oracle.numbers_of(pages, ml_dtypes.bfloat16, rows)
    )
    fp8, exact = fp8.replace(q=q, k_cache=pages), fp8.replace(q=q, k_cache=numbers)
    oracle.assert_matches(run(fp8, softmax_scale=1 / 16), oracle.attend(exact, 1 / 16))


@pytest.mark.parametrize(("h_q", "h_kv"), [(8, 1), (16, 1), (32, 2), (64, 1)])
def test_batch_invariance(rng: np.random.Generator, h_q: int, h_kv: int) -> None:
    """A sequence has the same bits alone, and among others in any order; and the right ones."""
    lengths = (2500, 64, 0, 5, 2049)
    sizes = {"s_q": 2, "h_q": h_q, "h_kv": h_kv}
    fp8, exact = make_problem(rng, lengths, ml_dtypes.bfloat16, **sizes)
    attend = functools.partial(run, causal=True, deterministic="batch_invariant")

    def of(rows: Any) -> oracle.Problem:
        names = "q", "block_table", "cache_seqlens"
        return fp8.replace(**{name: getattr(fp8, name)[rows] for name in names})

    out, lse = map(np.asarray, attend(fp8))
    oracle.assert_matches((out, lse), oracle.attend(exact, causal=True))
    order = rng.choice(len(lengths), 40 * len(lengths))  # more than there are multiprocessors
    for rows in (*([i] for i in range(len(lengths))), order):
        again = attend(of(rows))
        np.testing.assert_array_equal(again[0], out[rows])
        np.testing.assert_array_equal(again[1], lse[rows])


@pytest.mark.skipif(jax.devices()[0].platform == "cpu", reason="the CPU's kernel can")
def test_batch_invariance_in_float32_is_refused(rng: np.random.Generator) -> None:
    fp8, _ = make_problem(rng, (70,), np.float32, h_q=2)
    with pytest.raises(NotImplementedError, match="but for float32"):
        run(fp8, deterministic="batch_invariant")


def test_vmap(rng: np.random.Generator) -> None:
    """Over sequences that share the pool."""
    fp8, _ = make_problem(rng, (70, 1, 0, 130), np.float32, h_q=2)
    parts = [x.reshape(2, 2, *x.shape[1:]) for x in (fp8.q, fp8.block_table, fp8.cache_seqlens)]
    attend = functools.partial(fm.flash_mla_with_kvcache, is_fp8_kvcache=True)
    mapped = jax.jit(jax.vmap(attend, (0, None, 0, 0)))
    for x, y in zip(mapped(parts[0], fp8.k_cache, *parts[1:]), run(fp8), strict=True):
        np.testing.assert_allclose(x.reshape(y.shape), y, rtol=1e-5, atol=1e-5)


def test_not_differentiable() -> None:
    arrays = [jnp.asarray(GOOD[k]) for k in ("k_cache", "block_table", "cache_seqlens")]
    attend = functools.partial(fm.flash_mla_with_kvcache, is_fp8_kvcache=True)
    with pytest.raises(NotImplementedError, match=r"FP8|needs jax 0\.10"):
        jax.grad(lambda q: attend(q, *arrays)[0].sum().astype(jnp.float32))(jnp.asarray(GOOD["q"]))


@KERNELS
def test_a_page_that_does_not_exist_gives_nan(
    rng: np.random.Generator, dtype: Any, rows: int
) -> None:
    fp8, _ = make_problem(rng, (200, 90), dtype, h_q=rows)
    table = fp8.block_table.copy()
    table[0, 1] = len(fp8.k_cache)
    out, lse = run(fp8.replace(block_table=table))
    for x in (np.asarray(out, np.float32), lse):
        assert np.isnan(x[0]).all()
        assert np.isfinite(x[1]).all()


def test_accuracy_against_bfloat16(rng: np.random.Generator) -> None:
    """Of random tokens, and of those with a few large numbers, which a scale is made for."""
    exact = oracle.make_problem(rng, (500,), h_q=8)
    tails = rng.standard_t(3, exact.k_cache.shape).astype(ml_dtypes.bfloat16)
    tails = np.where(np.isnan(exact.k_cache.astype(np.float32)), np.nan, tails)
    for k_cache in (exact.k_cache, tails.astype(ml_dtypes.bfloat16)):
        expected = oracle.attend(exact.replace(k_cache=k_cache))
        clean = np.nan_to_num(k_cache.astype(np.float32)).astype(ml_dtypes.bfloat16)
        pages = np.asarray(layout.quantize(jnp.asarray(clean)))
        out, lse = run(exact.replace(k_cache=pages))
        error = np.linalg.norm(np.asarray(out, np.float64) - expected.out)
        assert 1e-3 < error / np.linalg.norm(expected.out) < 0.3
        # The logarithm moves no further than the score that moves furthest.
        moved = fp8_oracle.dequantize_656(pages) - clean.astype(np.float64)
        scores = exact.q[0, 0].astype(np.float64) @ moved.reshape(-1, 576).T * 576**-0.5
        assert np.abs(lse - expected.lse).max() < np.abs(scores).max() + 1e-3


GOOD = {
    "q": np.zeros((2, 1, 4, 576), ml_dtypes.bfloat16),
    "k_cache": np.zeros((5, 64, 2, 656), np.uint8),
    "block_table": np.zeros((2, 3), np.int32),
    "cache_seqlens": np.zeros(2, np.int32),
    "is_fp8_kvcache": True,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_cache": GOOD["k_cache"].view(np.int8)}, "k_cache must be uint8 or float8_e4m3fn"),
        ({"k_cache": np.zeros((5, 64, 2, 576), np.uint8)}, "k_cache .*656 bytes.*576"),
        ({"k_cache": np.zeros((5, 32, 2, 656), np.uint8)}, "k_cache .*64 tokens.*32"),
        ({"is_fp8_kvcache": False, "k_cache": np.zeros((5, 64, 2, 576), np.uint8)}, "is_fp8"),
        ({"q": GOOD["q"].astype(np.float16)}, "q must be bfloat16 or float32 .*float16"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fm.flash_mla_with_kvcache(**{**GOOD, **changes})
