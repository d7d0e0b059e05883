"""`PagedKVCache` against an allocator in plain Python, over random lives of a batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_jax.cache.layout import HEAD_DIM, PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.ops.cache_append import DTYPES

LAYERS, PAGES, BATCH, PAGES_PER_SEQ, ROWS = 2, 7, 3, 4, 3 * PAGE_SIZE


def make_cache(**changes):
    sizes = {
        "num_layers": LAYERS,
        "num_pages": PAGES,
        "batch": BATCH,
        "max_pages_per_seq": PAGES_PER_SEQ,
        "dtype": jnp.float32,
    }
    return PagedKVCache.create(**sizes | changes)


def poison(cache):
    """The same cache with NaN wherever nothing was written."""
    pages = tuple(jnp.full_like(pool, jnp.nan) for pool in cache.pages)
    return dataclasses.replace(cache, pages=pages)


@functools.partial(jax.jit, donate_argnames="cache")
def step(cache, num_tokens, kv):
    """Room for new tokens, then one append per layer; kv [layers, batch, rows, h_kv, HEAD_DIM]."""
    cache, ok = cache.allocate(num_tokens)
    for layer in range(cache.num_layers):
        cache = cache.append(layer, kv[layer])
    return cache, ok


free = jax.jit(PagedKVCache.free, donate_argnums=0)


def random_kv(seed, dtype=jnp.float32, rows=ROWS, h_kv=1):
    rng = np.random.default_rng(seed)
    return rng.integers(-128, 128, (LAYERS, BATCH, rows, h_kv, HEAD_DIM)).astype(dtype)


def pages_for(tokens):
    return -(-tokens // PAGE_SIZE)


def snapshot(cache):
    return jax.tree.map(np.array, cache)


def assert_same_bits(actual, wanted):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


class Model:
    """What a cache should hold: per sequence and layer, the list of its tokens."""

    def __init__(self, shape):
        self.tokens = [np.zeros((LAYERS, 0, *shape), np.float32) for _ in range(BATCH)]

    @property
    def lengths(self):
        return [tokens.shape[1] for tokens in self.tokens]

    def step(self, num_tokens, kv):
        lengths = [n + new for n, new in zip(self.lengths, num_tokens, strict=True)]
        if (
            min(num_tokens) < 0
            or max(lengths) > PAGES_PER_SEQ * PAGE_SIZE
            or sum(map(pages_for, lengths)) > PAGES
        ):
            return False
        for i, new in enumerate(num_tokens):
            self.tokens[i] = np.concatenate([self.tokens[i], kv[:, i, :new]], axis=1)
        return True

    def free(self, mask):
        self.tokens = [t[:, :0] if m else t for t, m in zip(self.tokens, mask, strict=True)]

    def check(self, cache):
        """That `cache`, on the host, holds these tokens, and that every page has one owner."""
        np.testing.assert_array_equal(cache.cache_seqlens, self.lengths)
        used = list(map(pages_for, self.lengths))
        assert cache.num_free == PAGES - sum(used)
        assert cache.num_used == sum(used)
        np.testing.assert_allclose(cache.usage, sum(used) / PAGES, rtol=1e-6)
        owned = [cache.block_table[i, :n] for i, n in enumerate(used)]
        everything = np.concatenate([*owned, cache.free_pages[: cache.num_free]])
        assert sorted(everything) == list(range(PAGES))
        for i, tokens in enumerate(self.tokens):
            assert (cache.block_table[i, used[i] :] == -1).all()
            for layer, pool in enumerate(cache.pages):
                held = pool[owned[i]].reshape(-1, *pool.shape[2:])[: self.lengths[i]]
                np.testing.assert_array_equal(held.astype(np.float32), tokens[layer])


counts = st.one_of(st.integers(0, 3), st.sampled_from([62, 63, 64, 65, 128]), st.integers(-1, ROWS))
operations = st.one_of(
    st.tuples(st.just("step"), st.tuples(*[counts] * BATCH)),
    st.tuples(st.just("free"), st.tuples(*[st.booleans()] * BATCH)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(operations, min_size=1, max_size=12))
def test_lives_like_a_plain_allocator(dtype, life):
    cache, model = poison(make_cache(dtype=dtype)), Model((1, HEAD_DIM))
    for seed, (operation, argument) in enumerate(life):
        if operation == "step":
            before = snapshot(cache)
            kv = random_kv(seed, dtype)
            cache, ok = step(cache, np.int32(argument), kv)
            assert bool(ok) == model.step(argument, kv.astype(np.float32))
            np.testing.assert_array_equal(cache.num_new, argument if ok else [0] * BATCH)
            if not ok:  # nothing was touched, in any layer
                unchanged = dataclasses.replace(before, num_new=np.zeros(BATCH, np.int32))
                assert_same_bits(cache, unchanged)
        else:
            cache = free(cache, np.array(argument))
            model.free(argument)
        model.check(snapshot(cache))


def test_one_program_for_a_whole_life():
    traces = 0

    def counted(cache, num_tokens, kv):
        nonlocal traces
        traces += 1
        return step(cache, num_tokens, kv)

    cache, advance = make_cache(), jax.jit(counted, donate_argnums=0)
    for i in range(30):
        cache, ok = advance(cache, np.int32((1, 0, i % 9)), random_kv(i, rows=8))
        assert ok
        cache = free(cache, np.array((False, False, i % 10 == 9)))
    assert traces == 1


def test_scan_keeps_the_pytree():
    """Every field keeps its shape and dtype, with 64-bit types enabled too."""

    def body(cache, num_tokens):
        cache, ok = cache.allocate(num_tokens)
        return cache.free(cache.cache_seqlens > 100), ok

    lengths = np.int32([(1, 60, 0), (0, 41, 1), (64, 0, 5)])
    with jax.enable_x64(True):
        cache, ok = jax.jit(lambda c: jax.lax.scan(body, c, lengths))(make_cache())
    assert ok.all()
    np.testing.assert_array_equal(cache.cache_seqlens, [65, 0, 6])
    assert cache.num_used == 3


def test_exhaustion_then_room_again():
    cache, kv = make_cache(), random_kv(0)
    cache, ok = step(cache, np.int32((192, 128, 64)), kv)
    assert ok
    assert cache.num_free == 1
    np.testing.assert_allclose(cache.usage, 6 / 7, rtol=1e-6)
    cache, ok = step(cache, np.int32((0, 1, 1)), kv)  # two pages wanted, one left
    assert not ok
    cache, ok = step(cache, np.int32((0, 0, 1)), kv)
    assert ok
    assert cache.num_free == 0
    cache, ok = step(cache, np.int32((0, 0, 63)), kv)  # in the page it has
    assert ok
    cache, ok = step(cache, np.int32((0, 0, 1)), kv)
    assert not ok
    cache, ok = step(free(cache, np.array((False, True, False))), np.int32((0, 0, 1)), kv)
    assert ok
    np.testing.assert_array_equal(cache.cache_seqlens, [192, 0, 129])


@pytest.mark.parametrize("num_tokens", [257, 2**31 - 1, -1, -(2**31)])
def test_a_sequence_that_cannot_be(num_tokens):
    """Longer than its table or negative: refused, also where adding the length would overflow."""
    cache, _ = step(make_cache(num_pages=100), np.int32((7, 0, 0)), random_kv(0))
    before = snapshot(cache)
    cache, ok = step(cache, np.int32((1, num_tokens, 1)), random_kv(1))
    assert not ok
    assert_same_bits(cache, dataclasses.replace(before, num_new=np.zeros(BATCH, np.int32)))


def test_rows_beyond_the_new_tokens_are_padding():
    cache, _ = poison(make_cache()).allocate(np.int32((2, 0, 1)))
    cache = cache.append(1, random_kv(0, rows=5)[1])
    assert np.isnan(cache.pages[0]).all()
    written = ~np.isnan(np.asarray(cache.pages[1])).all(axis=(2, 3))
    assert written.sum() == 3


def test_append_after_free_writes_nothing():
    cache, _ = poison(make_cache()).allocate(np.int32((2, 3, 1)))
    cache = cache.free(np.array([True] * BATCH)).append(0, random_kv(0, rows=5)[0])
    assert np.isnan(cache.pages[0]).all()


def test_vmap_over_caches():
    """Independent caches, each with its own pool and free list."""
    caches = jax.tree.map(lambda *x: jnp.stack(x), make_cache(), make_cache())
    num_tokens = np.int32([(1, 0, 70), (64, 65, 3)])
    kv = np.stack([random_kv(0), random_kv(1)])
    caches, ok = jax.jit(jax.vmap(step.__wrapped__))(caches, num_tokens, kv)
    assert ok.all()
    for k in range(2):
        model = Model((1, HEAD_DIM))
        model.step(num_tokens[k], kv[k])
        model.check(jax.tree.map(lambda x, k=k: np.asarray(x[k]), caches))


def test_properties():
    cache = make_cache(num_kv_heads=2, dtype=jnp.bfloat16)
    assert cache.num_layers == LAYERS
    assert cache.num_pages == PAGES
    assert cache.page_size == PAGE_SIZE
    assert cache.batch == BATCH
    assert cache.max_pages_per_seq == PAGES_PER_SEQ
    assert cache.max_seqlen == 256
    assert cache.num_kv_heads == 2
    assert cache.dtype == jnp.bfloat16
    assert cache.nbytes == LAYERS * PAGES * 64 * 2 * 576 * 2
    assert cache.usage == 0


def test_several_kv_heads():
    cache, model = poison(make_cache(num_kv_heads=2)), Model((2, HEAD_DIM))
    kv = random_kv(0, h_kv=2)
    cache, ok = step(cache, np.int32((65, 2, 130)), kv)
    assert ok
    model.step((65, 2, 130), kv)
    model.check(snapshot(cache))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"max_pages_per_seq": -1}, "max_pages_per_seq must be at least 1, got -1"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"batch": -1}, "batch must not be negative, got -1"),
        ({"max_pages_per_seq": 2**25}, "longer than int32 can count"),
        ({"dtype": jnp.int8}, "got int8"),
        ({"dtype": jnp.float8_e4m3fn}, "got float8_e4m3fn"),
    ],
)
def test_create_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        make_cache(**changes)


def test_methods_refuse():
    cache = make_cache()
    with pytest.raises(ValueError, match=r"num_tokens must have shape \[batch\] = \(3,\), got"):
        cache.allocate(np.int32((1, 2)))
    with pytest.raises(ValueError, match="num_tokens must be integers, got float32"):
        cache.allocate(np.float32((1, 2, 3)))
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\), got 2"):
        cache.append(2, random_kv(0)[0])
    with pytest.raises(ValueError, match="new_kv must have k_cache's dtype float32, got float16"):
        cache.append(0, random_kv(0)[0].astype(np.float16))
    with pytest.raises(ValueError, match=r"mask must be bool\[batch\] = bool\[3\], got int32\[3\]"):
        cache.free(np.int32((0, 1, 0)))


def test_empty_batch():
    cache, ok = make_cache(batch=0).allocate(np.zeros(0, np.int32))
    assert ok
    cache = cache.append(0, np.zeros((0, 1, 1, HEAD_DIM), np.float32)).free(np.zeros(0, bool))
    assert cache.num_free == PAGES
