"""`flashmla_jax.layers.indexer` against its definition, written out in float64 NumPy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.cache import index_keys
from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.layers import indexer, mla
from flashmla_jax.layers.indexer import IndexerConfig
from flashmla_jax.ops import index_topk

pytestmark = pytest.mark.usefixtures("on_cpu")

HEADS, DIM, TOPK = 64, 80, 24
CONFIG = IndexerConfig(num_heads=HEADS, head_dim=DIM, topk=TOPK)
ROPE = mla.MLAConfig(hidden_size=20, num_heads=3, q_lora_rank=12)
HIGHEST = jax.lax.Precision.HIGHEST


# --- The definition ------------------------------------------------------------------------------


def wanted_scores(q, weights, keys):
    """float64[s, t] for q [s, heads, dim], weights [s, heads] and keys [t, dim]."""
    products = np.einsum("shd,td->sht", np.float64(q), np.float64(keys))
    return np.einsum("sht,sh->st", np.maximum(products, 0), np.float64(weights))


def wanted_positions(scores, num_visible, topk=TOPK):
    """int32[s, topk]: the best, of equal ones the first, in the order of their positions."""
    positions = np.full((len(scores), topk), -1, np.int32)
    for row, (score, visible) in enumerate(zip(scores, num_visible, strict=True)):
        order = sorted(range(max(visible, 0)), key=lambda t, score=score: (-score[t], t))[:topk]
        positions[row, : len(order)] = sorted(order)
    return positions


def rotate(x, positions, interleave):
    """The first 64 numbers of float64 [s, ..., dim] turned by theta 10000."""
    x = np.array(x, np.float64)
    for pair in range(32):
        i, j = (2 * pair, 2 * pair + 1) if interleave else (pair, pair + 32)
        angle = np.reshape(positions * 10000.0 ** (-pair / 32), (-1,) + (1,) * (x.ndim - 2))
        x[..., i], x[..., j] = (
            x[..., i] * np.cos(angle) - x[..., j] * np.sin(angle),
            x[..., j] * np.cos(angle) + x[..., i] * np.sin(angle),
        )
    return x


# --- Projections ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def kernel(*shape):
        return {"kernel": (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)}

    return {
        "wq_b": kernel(12, HEADS * DIM),
        "wk": kernel(20, DIM),
        "k_norm": {
            "scale": (1 + 0.3 * rng.standard_normal(DIM)).astype(np.float32),
            "bias": (0.3 * rng.standard_normal(DIM)).astype(np.float32),
        },
        "weights_proj": kernel(20, HEADS),
    }


@pytest.mark.parametrize("interleave", [False, True])
def test_projections(params, interleave):
    rng = np.random.default_rng(1)
    config = dataclasses.replace(CONFIG, rope_interleave=interleave)
    x = rng.standard_normal((1, 7, 20)).astype(np.float32)
    x[0, 3] *= 1e-3  # so small that the norm's epsilon counts
    q_latent = rng.standard_normal((1, 7, 12)).astype(np.float32)
    positions = np.array([0, 1, 5, 100, 900, 901, 2000])
    tables = mla.rope_tables(ROPE, positions[None])
    q, weights = indexer.project_q(params, config, x, q_latent, *tables, HIGHEST)
    keys = indexer.project_k(params, config, x, *tables, HIGHEST)

    heads = (np.float64(q_latent[0]) @ params["wq_b"]["kernel"]).reshape(7, HEADS, DIM)
    np.testing.assert_allclose(q[0], rotate(heads, positions, interleave), atol=1e-3)
    scale = HEADS**-0.5 * DIM**-0.5
    wanted = np.float64(x[0]) @ params["weights_proj"]["kernel"] * scale
    np.testing.assert_allclose(weights[0], wanted, atol=1e-6)
    key = np.float64(x[0]) @ params["wk"]["kernel"]
    key = (key - key.mean(-1, keepdims=True)) / np.sqrt(key.var(-1, keepdims=True) + 1e-6)
    key = key * params["k_norm"]["scale"] + params["k_norm"]["bias"]
    np.testing.assert_allclose(keys[0], rotate(key, positions, interleave), atol=1e-3)


def test_weights_are_float32_in_a_bfloat16_model(params):
    x = jnp.ones((1, 2, 20), jnp.bfloat16)
    tables = mla.rope_tables(ROPE, np.arange(2)[None])
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    low["weights_proj"] = params["weights_proj"]
    q, weights = indexer.project_q(low, CONFIG, x, x[..., :12], *tables)
    keys = indexer.project_k(low, CONFIG, x, *tables)
    assert (q.dtype, keys.dtype, weights.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wanted = params["weights_proj"]["kernel"].sum(axis=0) * (HEADS * DIM) ** -0.5
    np.testing.assert_allclose(weights[0, 0], wanted, rtol=1e-5, atol=1e-7)


# --- The choice ----------------------------------------------------------------------------------


def whole_numbers(seed, queries, tokens, batch=2):
    """Numbers whose scores are exact in float32, and of which many are equal."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-1, 2, (batch, queries, HEADS, DIM)).astype(np.float32)
    weights = rng.integers(-2, 3, (batch, queries, HEADS)).astype(np.float32)
    few = rng.integers(-1, 2, (batch, 11, DIM)).astype(np.float32)  # different keys
    few[:, 0] = 0  # of score 0, or -0
    keys = np.take_along_axis(few, rng.integers(0, 11, (batch, tokens, 1)), axis=1)
    return q, weights, keys


def test_scores():
    rng = np.random.default_rng(2)
    q, weights, keys = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((5, HEADS, DIM), (5, HEADS), (30, DIM))
    )
    scores = index_topk.index_scores(q, weights, keys, HIGHEST)
    wanted = wanted_scores(q, weights, keys)
    assert (wanted < 0).any()
    np.testing.assert_allclose(scores, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("tokens", [5, 24, 25, 300])
def test_top_k_is_exact_and_ties_are_broken_by_position(tokens):
    rng = np.random.default_rng(tokens)
    scores = rng.integers(-3, 4, (40, tokens)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -0.0  # is no less than 0
    num_visible = rng.integers(-1, tokens + 1, 40)
    num_visible[:2] = 0, tokens
    hidden = np.arange(tokens) >= num_visible[:, None]
    scores[~hidden & (scores == -3)] = -np.inf  # is no less visible
    noise = np.where(rng.random(scores.shape) < 0.5, np.nan, np.inf)
    positions = index_topk.top_k(np.where(hidden, noise, scores), num_visible, TOPK)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, wanted_positions(scores, num_visible))


def test_nan_is_higher_than_all():
    """Whatever its sign, so that what is hidden is never chosen instead."""
    bits = np.zeros((1, 40), np.float32).view(np.uint32)
    bits[0, [5, 30]], bits[0, [9, 31]] = 0xFFC00000, 0x7FC00000
    scores = bits.view(np.float32)
    scores[0, 7], scores[0, 8] = np.inf, -np.inf
    chosen = jax.jit(index_topk.top_k, static_argnums=2)
    for topk, wanted in ((1, [5]), (3, [5, 7, 9]), (10, [*range(8), 9, 10]), (20, range(20))):
        np.testing.assert_array_equal(chosen(scores, np.array([20]), topk), [list(wanted)])


def test_keys_whose_scores_are_not_finite():
    """Of two heads, one gives inf and one -inf: that is NaN, of which x86 makes one with a sign."""
    q = np.zeros((1, 1, 2, DIM), np.float32)
    q[..., 0] = 1
    keys = np.zeros((1, 60, DIM), np.float32)
    keys[0, [3, 20], 0] = np.inf
    weights = np.array([[[1, -1]]], np.float32)
    visible = np.array([[24]])
    chosen = jax.jit(indexer.choose, static_argnums=4)(q, weights, keys, visible, 2)
    np.testing.assert_array_equal(chosen[0, 0], [3, 20])
    chosen = jax.jit(indexer.choose, static_argnums=4)(q, weights, keys, visible, 24)
    np.testing.assert_array_equal(chosen[0, 0], np.arange(24))


def test_more_visible_than_there_are():
    scores = np.zeros((1, 64), np.float32)
    for topk in (64, 70, 300):
        positions = index_topk.top_k(scores, np.array([200]), topk)
        np.testing.assert_array_equal(positions, [[*range(64), *[-1] * (topk - 64)]])


@pytest.mark.parametrize("at_a_time", [None, 1, HEADS * 100, 3 * HEADS * 100, 100 * HEADS * 100])
def test_choose_is_exact(monkeypatch, at_a_time):
    """Whether all queries are looked at together, or some, or one, or some sequences."""
    if at_a_time is not None:
        monkeypatch.setattr(index_topk, "_AT_A_TIME", at_a_time)
    q, weights, keys = whole_numbers(3, 50, 100, batch=3)
    num_visible = np.random.default_rng(4).integers(0, 101, (3, 50))
    num_visible[0] = 51 + np.arange(50)
    for i, row in enumerate(num_visible):
        keys[i, row.max() :] = np.nan
    chosen = indexer.choose(q, weights, keys, num_visible, TOPK, HIGHEST)
    for i in range(3):
        scores = wanted_scores(q[i], weights[i], np.nan_to_num(keys[i]))
        kth = np.sort(scores[0, :51])[-TOPK]
        assert (scores[0, :51] == kth).sum() > 1  # there are ties to be broken
        np.testing.assert_array_equal(chosen[i], wanted_positions(scores, num_visible[i]))


def test_equal_scores_are_chosen_from_the_front():
    """All keys are the same, so the first tokens win, whatever the heads say."""
    rng = np.random.default_rng(5)
    q = rng.integers(-3, 4, (1, 2, HEADS, DIM)).astype(np.float32)
    weights = np.abs(rng.integers(-3, 4, (1, 2, HEADS))).astype(np.float32)
    keys = np.broadcast_to(rng.integers(-3, 4, DIM).astype(np.float32), (1, 200, DIM))
    chosen = indexer.choose(q, weights, keys, np.array([[200, 7]]), TOPK, HIGHEST)
    np.testing.assert_array_equal(chosen[0, 0], np.arange(TOPK))
    np.testing.assert_array_equal(chosen[0, 1], [*range(7), *[-1] * (TOPK - 7)])


# --- In pages ------------------------------------------------------------------------------------


def in_pages(keys, lengths, seed=0, num_pages=20):
    """A pool with the keys [batch, t, dim] in random pages, and NaN in all that is no token."""
    rng = np.random.default_rng(seed)
    batch, tokens, dim = keys.shape
    table = rng.permutation(num_pages)[: batch * (tokens // PAGE_SIZE)].reshape(batch, -1)
    pool = np.full((num_pages, PAGE_SIZE, 1, dim), np.nan, np.float32)
    for i, length in enumerate(lengths):
        for t in range(length):
            pool[table[i, t // PAGE_SIZE], t % PAGE_SIZE, 0] = keys[i, t]
    unused = np.arange(table.shape[1]) * PAGE_SIZE >= np.array(lengths)[:, None]
    rubbish = rng.choice([-1, -7, num_pages, 2**31 - 1], table.shape)
    return pool, np.where(unused, rubbish, table).astype(np.int32)


@functools.partial(jax.jit, static_argnames="topk")
def choose_cached(q, weights, pool, table, num_visible, topk=TOPK):
    return indexer.choose_cached(q, weights, pool, table, num_visible, topk, HIGHEST)


@pytest.mark.parametrize("at_a_time", [None, 1, 3 * HEADS * 256, 2 * 3 * HEADS * 256])
def test_choose_from_pages(monkeypatch, at_a_time):
    """Only tokens count: not unused pages, not the tail of the last, not unused table entries."""
    if at_a_time is not None:
        monkeypatch.setattr(index_topk, "_AT_A_TIME", at_a_time)
    jax.clear_caches()
    q, weights, keys = whole_numbers(6, 3, 256, batch=5)
    for lengths in ([0, 1, 65, 256, 192], [256, 64, 2, 23, 24]):
        pool, table = in_pages(keys, lengths)
        num_visible = np.array(lengths)[:, None] - 3 + np.arange(1, 4)
        chosen = choose_cached(q, weights, pool, table, num_visible)
        for i in range(5):
            scores = wanted_scores(q[i], weights[i], keys[i])
            np.testing.assert_array_equal(chosen[i], wanted_positions(scores, num_visible[i]))
    assert choose_cached._cache_size() == 1  # lengths and tables are data


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_choose_from_fp8_pages(dtype):
    """Whole numbers of few digits are e4m3, and scales are powers of two: nothing is rounded."""
    q, weights, keys = whole_numbers(9, 3, 256)
    keys *= 2.0 ** np.arange(-2, 2)[np.arange(256) % 4][:, None]  # tokens have different scales
    lengths = [256, 70]
    pool, table = in_pages(keys, lengths)
    packed = index_keys.pack(jnp.asarray(pool), jnp.uint8)
    num_visible = np.array(lengths)[:, None] - 3 + np.arange(1, 4)
    chosen = choose_cached(q.astype(dtype), weights, packed, table, num_visible)
    for i in range(2):
        scores = wanted_scores(q[i], weights[i], keys[i])
        np.testing.assert_array_equal(chosen[i], wanted_positions(scores, num_visible[i]))


def test_more_tokens_are_chosen_than_there_is_room_for():
    q, weights, keys = whole_numbers(7, 1, 64)
    pool, table = in_pages(keys, [64, 10])
    chosen = choose_cached(q, weights, pool, table, np.array([[64], [10]]), topk=100)
    assert chosen.shape == (2, 1, 100)
    np.testing.assert_array_equal(np.sort(chosen[0, 0, :64]), np.arange(64))
    np.testing.assert_array_equal(np.sort(chosen[1, 0, :10]), np.arange(10))
    assert (np.asarray(chosen[0, 0, 64:]) == -1).all()
    assert (np.asarray(chosen[1, 0, 10:]) == -1).all()


def test_no_sequences():
    q, weights, keys = whole_numbers(8, 2, 64)
    pool, table = in_pages(keys, [3, 3])
    none = np.zeros((0, 2), np.int32)
    chosen = choose_cached(q[:0], weights[:0], pool, table[:0], none)
    assert chosen.shape == (0, 2, TOPK)
    assert indexer.choose(q[:0], weights[:0], keys[:0], none, 5).shape == (0, 2, 5)


def test_pool_indices():
    table = np.array([[7, 2, -1], [0, 5, 9]], np.int32)
    positions = np.array([[[0, 63, 64, -1, 127, 128]], [[1, 130, -1, -1, 70, 191]]])
    indices = indexer.pool_indices(positions, table)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices[0, 0], [448, 511, 128, -1, 191, -1])
    np.testing.assert_array_equal(indices[1, 0], [1, 578, -1, -1, 326, 639])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_dim": 63}, "head_dim must be at least 64, got 63"),
        ({"topk": 0}, "topk must be at least 1, got 0"),
    ],
)
def test_sizes_that_are_too_small(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
