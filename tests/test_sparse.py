"""Sparse attention: decoding over pages, and prefill."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import fp8_oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import flashmla_jax as fm
from flashmla_jax.ops import sparse_attention
from flashmla_jax.ops.sparse_attention import sparse_attention_p

BF16 = ml_dtypes.bfloat16
OUTSIDE = np.array([-1, -(2**31), 2**31 - 1, -64, 123_456_789])
FORMATS = ("bf16", "f32", "fp8", "fp8 in f32")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(list(request.node.name.encode()))


class Scope:
    """A pool with indices into it; all that is not attended to is NaN."""

    def __init__(
        self,
        rng: np.random.Generator,
        head_dim: int,
        fmt: str,
        shape: tuple[int, int, int],
        page_size: int,
        counted: np.ndarray | None = None,
        h_q: int = 64,
    ) -> None:
        topk = shape[-1]
        num_pages = 7
        size = num_pages * page_size
        self.indices = rng.integers(0, size // 2, shape).astype(np.int32)  # some of them twice
        self.indices = np.where(rng.random(shape) < 0.2, size + 3, self.indices)
        junk = rng.choice(OUTSIDE, shape)
        self.indices = np.where(rng.random(shape) < 0.2, junk, self.indices).astype(np.int32)
        self.topk_length = counted
        exists = (self.indices >= 0) & (self.indices < size)
        if counted is not None:
            exists &= np.arange(topk) < counted[:, None, None]
        self.named = [
            row[is_token]
            for row, is_token in zip(
                self.indices.reshape(-1, topk), exists.reshape(-1, topk), strict=True
            )
        ]
        used = np.zeros(size, bool)
        for places in self.named:
            used[places] = True
        used = used.reshape(num_pages, page_size)

        kv = rng.standard_normal((num_pages, page_size, 1, head_dim), np.float32).astype(BF16)
        if fmt in ("bf16", "f32"):
            dtype = BF16 if fmt == "bf16" else np.float32
            self.pool = np.where(used[..., None, None], kv.astype(np.float32), np.nan).astype(dtype)
            numbers = self.pool.astype(np.float64)
        else:
            dtype = BF16 if fmt == "fp8" else np.float32
            if head_dim == 576:
                pool = fp8_oracle.quantize_656(kv)
                numbers = fp8_oracle.numbers_of(pool, dtype, h_q)
                pool[~used] = 0xFF
            else:  # the bytes of a page that are an unused token's
                pool = fp8_oracle.quantize_584(kv)
                numbers = fp8_oracle.dequantize_584(pool).astype(dtype).astype(np.float64)
                flat = pool.reshape(num_pages, -1)
                for page, row in np.argwhere(~used):
                    flat[page, 576 * row : 576 * (row + 1)] = 0xFF
                    flat[page, 576 * page_size + 8 * row :][:8] = 0xFF
            self.pool = pool
        self.numbers = numbers.reshape(size, head_dim)

    def tokens(self) -> list[np.ndarray]:
        return [self.numbers[places] for places in self.named]


def assert_matches(actual: Any, expected: fp8_oracle.Sparse, batch: int) -> None:
    out, lse = actual
    by_batch = [x.reshape(batch, -1, *x.shape[1:]) for x in expected]
    expected_lse, terms = (np.swapaxes(by_batch[i], 1, 2) for i in (2, 4))
    oracle.assert_matches(
        (out, lse), oracle.Expected(by_batch[0], expected_lse, by_batch[3], terms)
    )


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("head_dim", [576, 512])
@pytest.mark.parametrize(
    ("extra", "sink", "lengths"), [(0, 0, 0), (1, 1, 1), (0, 1, 1), (1, 0, 0)], ids=str
)
@pytest.mark.parametrize(
    ("s_q", "h_q", "page_size", "topk"),
    [
        (1, 3, 64, 37),
        (2, 5, 16, 37),
        (1, 16, 64, 700),
        (3, 30, 48, 300),
        (1, 70, 64, 200),
        (1, 128, 130, 400),
    ],
)
def test_decode_matches_float64(
    rng: np.random.Generator,
    fmt: str,
    head_dim: int,
    extra: int,
    sink: int,
    lengths: int,
    s_q: int,
    h_q: int,
    page_size: int,
    topk: int,
) -> None:
    batch = 4
    dtype = BF16 if fmt in ("bf16", "fp8") else np.float32
    q = rng.standard_normal((batch, s_q, h_q, head_dim), np.float32).astype(dtype)
    counted = np.array([topk, 20, 0, 2 * topk], np.int32) if lengths else None
    scopes = [Scope(rng, head_dim, fmt, (batch, s_q, topk), page_size, counted, h_q)]
    options: dict[str, Any] = {}
    if extra:
        few = np.array([-3, 5, 11, 1], np.int32) if lengths else None
        scopes.append(Scope(rng, head_dim, fmt, (batch, s_q, 11), 5, few, h_q))
        options["extra_k_cache"] = scopes[1].pool
        options["extra_indices_in_kvcache"] = scopes[1].indices
        options["extra_topk_length"] = few
    if sink:
        options["attn_sink"] = rng.standard_normal(h_q).astype(np.float32)
        options["attn_sink"][:2] = np.inf, -np.inf
    tokens = [np.concatenate(x) for x in zip(*(scope.tokens() for scope in scopes), strict=True)]
    expected = fp8_oracle.attend_sparse(
        q.reshape(-1, h_q, head_dim), tokens, 0.07, options.get("attn_sink")
    )
    call = jax.jit(
        lambda q, pool, **args: fm.flash_mla_with_kvcache(
            q, pool, None, None, softmax_scale=0.07, is_fp8_kvcache=fmt.startswith("fp8"), **args
        )
    )
    arrays = {k: v for k, v in options.items() if v is not None}
    if counted is not None:
        arrays["topk_length"] = counted
    actual = call(q, scopes[0].pool, indices=scopes[0].indices, **arrays)
    assert actual[0].dtype == dtype
    assert_matches(actual, expected, batch)


@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
@pytest.mark.parametrize("h_q", [4, 16, 30, 64, 126])
def test_more_query_tokens_than_multiprocessors(
    rng: np.random.Generator, fmt: str, h_q: int
) -> None:
    """Of lists of all lengths, the longest of which are divided."""
    batch, s_q, topk = 150, 2, 2000
    q = rng.standard_normal((batch, s_q, h_q, 576), np.float32).astype(BF16)
    counted = rng.integers(0, 200, batch).astype(np.int32)
    counted[rng.integers(0, batch, 5)] = topk
    few = rng.integers(0, 90, batch).astype(np.int32)
    scope = Scope(rng, 576, fmt, (batch, s_q, topk), 64, counted, h_q)
    extra = Scope(rng, 576, fmt, (batch, s_q, 80), 16, few, h_q)
    sink = rng.standard_normal(h_q).astype(np.float32)
    tokens = [np.concatenate(x) for x in zip(scope.tokens(), extra.tokens(), strict=True)]
    expected = fp8_oracle.attend_sparse(q.reshape(-1, h_q, 576), tokens, 0.07, sink)
    call = jax.jit(
        lambda q, pool, **arrays: fm.flash_mla_with_kvcache(
            q, pool, None, None, softmax_scale=0.07, is_fp8_kvcache=fmt == "fp8", **arrays
        )
    )
    actual = call(
        q,
        scope.pool,
        indices=scope.indices,
        topk_length=counted,
        extra_k_cache=extra.pool,
        extra_indices_in_kvcache=extra.indices,
        extra_topk_length=few,
        attn_sink=sink,
    )
    assert_matches(actual, expected, batch)


def test_scale_by_default(rng: np.random.Generator) -> None:
    for head_dim in (576, 512):
        scope = Scope(rng, head_dim, "f32", (1, 1, 9), 64)
        q = rng.standard_normal((1, 1, 2, head_dim), np.float32)
        actual = fm.flash_mla_with_kvcache(q, scope.pool, None, None, indices=scope.indices)
        expected = fp8_oracle.attend_sparse(q[0], scope.tokens(), head_dim**-0.5)
        assert_matches(actual, expected, 1)


def test_table_and_lengths_are_ignored(rng: np.random.Generator) -> None:
    scope = Scope(rng, 576, "f32", (2, 1, 9), 64)
    q = rng.standard_normal((2, 1, 2, 576), np.float32)
    without = fm.flash_mla_with_kvcache(q, scope.pool, None, None, indices=scope.indices)
    table, lengths = np.full((2, 1), 77, np.int32), np.zeros(2, np.int32)
    beside = fm.flash_mla_with_kvcache(q, scope.pool, table, lengths, indices=scope.indices)
    jax.tree.map(np.testing.assert_array_equal, without, beside)


@pytest.mark.parametrize("dtype", [BF16, np.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("head_dim", [576, 512])
@pytest.mark.parametrize(
    ("s_q", "h_q", "topk"), [(1, 3, 21), (70, 3, 21), (5, 66, 300), (300, 4, 130)]
)
def test_prefill_matches_float64(
    rng: np.random.Generator, dtype: Any, head_dim: int, s_q: int, h_q: int, topk: int
) -> None:
    s_kv = 50
    kv = rng.standard_normal((s_kv, 1, head_dim), np.float32).astype(dtype)
    kv[30:] = np.nan
    indices = rng.integers(0, 30, (s_q, 1, topk))
    indices = np.where(rng.random(indices.shape) < 0.2, s_kv, indices)
    junk = rng.choice(OUTSIDE, indices.shape)
    indices = np.where(rng.random(indices.shape) < 0.2, junk, indices).astype(np.int32)
    indices[s_q // 2] = -1
    q = rng.standard_normal((s_q, h_q, head_dim), np.float32).astype(dtype)
    sink = rng.standard_normal(h_q).astype(np.float32)
    sink[:3] = 0.3, np.inf, -np.inf
    counted = rng.integers(-1, topk + 3, s_q).astype(np.int32)
    for options in ({}, {"attn_sink": sink}, {"topk_length": counted, "attn_sink": sink}):
        in_length = np.arange(topk) < options.get("topk_length", np.full(s_q, topk))[:, None]
        named = [
            row[(row >= 0) & (row < s_kv) & counts]
            for row, counts in zip(indices[:, 0], in_length, strict=True)
        ]
        tokens = [kv[places, 0].astype(np.float64) for places in named]
        expected = fp8_oracle.attend_sparse(q, tokens, 0.08, options.get("attn_sink"))
        call = jax.jit(lambda *args, **kw: fm.flash_mla_sparse_fwd(*args, sm_scale=0.08, **kw))
        out, max_logits, lse = call(q, kv, indices, **options)
        assert out.dtype == dtype
        oracle.assert_matches(
            (out[None], lse.T[None]),
            oracle.Expected(
                expected.out[None],
                expected.lse.T[None],
                expected.spread[None],
                expected.terms.T[None],
            ),
        )
        np.testing.assert_allclose(max_logits, expected.max_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
@pytest.mark.parametrize("head_dim", [576, 512])
@pytest.mark.parametrize("h_q", [5, 30, 128])
def test_nan_in_a_listed_token_shows(
    rng: np.random.Generator, fmt: str, head_dim: int, h_q: int
) -> None:
    """In the rows of the query tokens that list it, and in those alone."""
    scope = Scope(rng, head_dim, fmt, (1, 4, 150), 64)
    q = rng.standard_normal((1, 4, h_q, head_dim), np.float32).astype(BF16)
    attend = jax.jit(
        lambda pool: fm.flash_mla_with_kvcache(
            q, pool, None, None, indices=scope.indices, is_fp8_kvcache=fmt == "fp8"
        )
    )
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in attend(scope.pool))
    bad = scope.named[1][7]
    page, row = divmod(int(bad), 64)
    pool = scope.pool.copy()
    if fmt == "bf16":
        pool[page, row, 0, 300] = np.nan
    else:  # a code that stands for NaN
        width = 656 if head_dim == 576 else 576
        pool[page].reshape(-1)[width * row + 300] = 0xFF
    out, lse = (np.asarray(x, np.float32) for x in attend(pool))
    for i, named in enumerate(scope.named):
        assert np.isnan(lse[0, :, i]).all() == (bad in named)
        assert np.isnan(out[0, i, :, 300]).all() == (bad in named)
        assert np.isfinite(out[0, i]).all() == (bad not in named)


def make_calls(rng: np.random.Generator, fmt: str = "f32") -> tuple[np.ndarray, Scope, Scope]:
    q = rng.standard_normal((4, 2, 6, 576), np.float32)
    scope = Scope(rng, 576, fmt, (4, 2, 90), 64)
    extra = Scope(rng, 576, fmt, (4, 2, 11), 5)
    return q, scope, extra


def attend(
    q: Any, pool: Any, indices: Any, extra_pool: Any, extra_indices: Any, sink: Any, **options: Any
) -> tuple[jax.Array, jax.Array]:
    return fm.flash_mla_with_kvcache(
        *(q, pool, None, None),
        indices=indices,
        attn_sink=sink,
        extra_k_cache=extra_pool,
        extra_indices_in_kvcache=extra_indices,
        **options,
    )


@pytest.mark.parametrize("fmt", ["f32", "fp8 in f32"])
def test_the_reference(rng: np.random.Generator, fmt: str) -> None:
    """What runs where there is no kernel."""
    q, scope, extra = make_calls(rng, fmt)
    counted = np.array([90, 3, 0, 77], np.int32)
    few = np.array([0, 11, 5, 2], np.int32)
    sink = rng.standard_normal(6).astype(np.float32)
    operands = q, scope.pool, scope.indices, counted, extra.pool, extra.indices, few, sink
    expected = sparse_attention_p.bind(*map(jnp.asarray, operands), softmax_scale=0.1, mapped=())
    by_xla = jax.jit(functools.partial(sparse_attention._reference, softmax_scale=0.1))
    for x, y in zip(by_xla(*operands), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_vmap(rng: np.random.Generator) -> None:
    q, scope, extra = make_calls(rng)
    sinks = rng.standard_normal((2, 6)).astype(np.float32)
    pools = scope.pool, extra.pool
    halves = [x.reshape(2, 2, *x.shape[1:]) for x in (q, scope.indices, extra.indices)]
    flat = q, pools[0], scope.indices, pools[1], extra.indices, sinks[0]

    shared = jax.jit(jax.vmap(attend, (0, None, 0, None, 0, None)))
    out, lse = shared(halves[0], pools[0], halves[1], pools[1], halves[2], sinks[0])
    for x, y in zip((out, lse), attend(*flat), strict=True):
        np.testing.assert_allclose(x.reshape(y.shape), y, rtol=1e-5, atol=1e-5)

    # A pool and a sink for each.
    others = np.stack([pools[0], pools[0] * 2])
    own = jax.jit(jax.vmap(attend, (0, 0, 0, None, 0, 0)))
    out, lse = own(halves[0], others, halves[1], pools[1], halves[2], sinks)
    for i in range(2):
        args = halves[0][i], others[i], halves[1][i], pools[1], halves[2][i], sinks[i]
        for x, y in zip((out[i], lse[i]), attend(*args), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_gradients(rng: np.random.Generator) -> None:
    """Against those of the definition, written out."""
    if jax.__version_info__ < (0, 10):
        pytest.skip("needs jax 0.10")
    q, scope, extra = make_calls(rng)
    pool, extra_pool = (np.nan_to_num(x.pool) for x in (scope, extra))
    sink = rng.standard_normal(6).astype(np.float32)
    weights = rng.standard_normal((4, 2, 6, 512)).astype(np.float32)

    def loss(q: Any, pool: Any, extra_pool: Any, sink: Any) -> jax.Array:
        out, lse = attend(q, pool, scope.indices, extra_pool, extra.indices, sink)
        return jnp.sum(out * weights) + jnp.sum(jnp.sin(lse))

    def written_out(q: Any, pool: Any, extra_pool: Any, sink: Any) -> jax.Array:
        tokens, exists = [], []
        for x, indices in ((pool, scope.indices), (extra_pool, extra.indices)):
            size = x.shape[0] * x.shape[1]
            is_token = (indices >= 0) & (indices < size)
            tokens.append(x.reshape(size, 576)[np.where(is_token, indices, 0)])
            exists.append(is_token)
        k, visible = jnp.concatenate(tokens, 2), np.concatenate(exists, 2)
        scores = jnp.einsum("bshd,bstd->bsht", q, k, precision="highest") * 576**-0.5
        scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        p = jnp.exp(scores - jnp.logaddexp(lse, sink)[..., None])
        out = jnp.einsum("bsht,bstd->bshd", p, k[..., :512], precision="highest")
        return jnp.sum(out * weights) + jnp.sum(jnp.sin(lse))

    arguments = q, pool, extra_pool, sink
    actual = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arguments)
    expected = jax.jit(jax.grad(written_out, (0, 1, 2, 3)))(*arguments)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4 * float(np.abs(y).max()))


def test_nobody_and_nothing() -> None:
    """Empty batches, and no indices at all."""
    q = jnp.ones((2, 1, 3, 576))
    pool = jnp.full((2, 64, 1, 576), jnp.nan)
    none = jnp.zeros((2, 1, 0), jnp.int32)
    out, lse = fm.flash_mla_with_kvcache(q, pool, None, None, indices=none)
    np.testing.assert_array_equal(out, np.zeros((2, 1, 3, 512)))
    np.testing.assert_array_equal(lse, np.full((2, 3, 1), -np.inf))
    out, lse = fm.flash_mla_with_kvcache(q[:0], pool, None, None, indices=none[:0])
    assert out.shape == (0, 1, 3, 512)
    assert lse.shape == (0, 3, 1)
    out, top, lse = fm.flash_mla_sparse_fwd(q[:0, 0], pool[0], none[:0], 1.0)
    assert (out.shape, top.shape, lse.shape) == ((0, 3, 512), (0, 3), (0, 3))


GOOD = {
    "q": np.zeros((2, 1, 4, 576), BF16),
    "k_cache": np.zeros((5, 16, 1, 576), BF16),
    "block_table": None,
    "cache_seqlens": None,
    "indices": np.zeros((2, 1, 8), np.int32),
}
FP8 = {"is_fp8_kvcache": True, "k_cache": np.zeros((5, 16, 1, 656), np.uint8)}


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"causal": True}, "causal must be False"
    yield {"head_dim_v": 576}, "head_dim_v must be 512"
    yield {"q": np.zeros((2, 1, 4, 640), BF16)}, "q must have head dimension 576 or 512"
    yield {"q": np.zeros((2, 0, 4, 576), BF16)}, "q must hold a token"
    yield {"q": np.zeros((2, 1, 4, 576), np.int32)}, "q must be bfloat16"
    yield {"k_cache": np.zeros((5, 16, 2, 576), BF16)}, r"k_cache must be .*\(5, 16, 2, 576\)"
    yield {"k_cache": np.zeros((5, 16, 1, 512), BF16)}, r"k_cache must be .*\(5, 16, 1, 512\)"
    yield {"k_cache": np.zeros((0, 16, 1, 576), BF16)}, r"k_cache must be .*\(0, 16, 1, 576\)"
    yield {"k_cache": np.zeros((5, 16, 1, 576), np.float32)}, "k_cache must have q's dtype"
    yield {"indices": np.zeros((2, 8), np.int32)}, r"indices must be .*\(2, 8\)"
    yield {"indices": np.zeros((2, 2, 8), np.int32)}, r"indices must be .*\(2, 2, 8\)"
    yield {"indices": np.zeros((2, 1, 8), np.int64)}, "indices must be int32"
    yield {"topk_length": np.zeros(3, np.int32)}, r"topk_length must be .*\(3,\)"
    yield {"attn_sink": np.zeros(3, np.float32)}, r"attn_sink must be .*\(3,\)"
    yield {"attn_sink": np.zeros(4, BF16)}, "attn_sink must be float32"
    yield {"softmax_scale": np.nan}, "softmax_scale must be finite"
    yield {"extra_k_cache": GOOD["k_cache"]}, "extra_indices_in_kvcache is missing"
    yield {"extra_indices_in_kvcache": GOOD["indices"]}, "extra_k_cache is missing"
    yield {"extra_topk_length": np.zeros(2, np.int32)}, "extra_k_cache is missing"
    yield {**FP8, "q": np.zeros((2, 1, 4, 512), BF16)}, r"k_cache must be .*584.*656"
    yield {**FP8, "k_cache": GOOD["k_cache"]}, "k_cache must be uint8 or float8_e4m3fn"
    yield {**FP8, "q": np.zeros((2, 1, 4, 576), np.float16)}, "q must be bfloat16 or float32"


@pytest.mark.parametrize(("changes", "message"), list(refusals()))
def test_decode_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fm.flash_mla_with_kvcache(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": np.zeros((4, 576), BF16)}, "q must be"),
        ({"q": np.zeros((6, 4, 640), BF16)}, "q must be .*640"),
        ({"q": np.zeros((6, 0, 576), BF16)}, "q must be .*with a head"),
        ({"kv": np.zeros((9, 2, 576), BF16)}, r"kv must be .*\(9, 2, 576\)"),
        ({"kv": np.zeros((9, 1, 576), np.float16)}, "kv must be bfloat16"),
        ({"kv": np.zeros((0, 1, 576), BF16)}, "kv must be .*with a token"),
        ({"indices": np.zeros((6, 2, 8), np.int32)}, r"indices must be .*\(6, 2, 8\)"),
        ({"topk_length": np.zeros(9, np.int32)}, r"topk_length must be .*\(9,\)"),
        ({"attn_sink": np.zeros((1, 4), np.float32)}, "attn_sink must be"),
        ({"d_v": 576}, "d_v must be 512, got 576"),
        ({"sm_scale": np.inf}, "sm_scale must be finite"),
    ],
)
def test_prefill_refuses(changes: dict[str, Any], message: str) -> None:
    good = {
        "q": np.zeros((6, 4, 576), BF16),
        "kv": np.zeros((9, 1, 576), BF16),
        "indices": np.zeros((6, 1, 8), np.int32),
        "sm_scale": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        fm.flash_mla_sparse_fwd(**{**good, **changes})
