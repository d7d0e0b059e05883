"""Index keys in a `PagedKVCache`: wherever its tokens are, there are their keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.cache import index_keys, paged
from flashmla_jax.cache.layout import HEAD_DIM, PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.cache.snapshot import Snapshot, restore, snapshot

LAYERS, BATCH, ROWS, DIM = 2, 3, 100, 80


def make_cache(**changes):
    sizes = {"num_layers": LAYERS, "num_pages": 9, "batch": BATCH, "max_pages_per_seq": 4}
    cache = PagedKVCache.create(**sizes | {"dtype": jnp.float32, "index_head_dim": DIM} | changes)
    return dataclasses.replace(
        cache,
        pages=tuple(
            jnp.full_like(pool, 255 if pool.dtype == jnp.uint8 else jnp.nan) for pool in cache.pages
        ),
        index_pages=tuple(
            jnp.full_like(pool, 255 if pool.dtype == jnp.uint8 else jnp.nan)
            for pool in cache.index_pages
        ),
    )


@functools.partial(jax.jit, donate_argnames="cache")
def step(cache, num_tokens, numbers):
    """Appends tokens that say their number [batch, rows], and keys with the same and the layer."""
    cache, ok = cache.allocate(num_tokens)
    kv = jnp.broadcast_to(numbers[..., None, None], (*numbers.shape, 1, HEAD_DIM))
    keys = jnp.broadcast_to(numbers[..., None], (*numbers.shape, DIM))
    for layer in range(cache.num_layers):
        cache = cache.append_index(layer, (keys + 1000 * layer).astype(cache.dtype))
        cache = cache.append(layer, kv.astype(cache.dtype))
    return cache, ok


def check_keys_are_where_tokens_are(cache):
    cache.check()
    tokens = 0
    for layer in range(LAYERS):
        view = cache.at_layer(layer)
        for table, length in zip(view.block_table, cache.cache_seqlens, strict=True):
            numbers = np.asarray(view.pages[0])[table, :, 0].reshape(-1, HEAD_DIM)[:length, :1]
            keys = np.asarray(view.index_pages[0])[table, :, 0].reshape(-1, DIM)[:length]
            assert np.isfinite(numbers).all()
            np.testing.assert_array_equal(keys, np.broadcast_to(numbers + 1000 * layer, keys.shape))
            tokens += int(length)
    assert tokens


@pytest.mark.parametrize("one_pool", [False, True])
def test_through_a_life(one_pool):
    """Growth over pages, forks that are written to, truncation, pages that are used again."""
    rng = np.random.default_rng(0)
    cache = make_cache(one_pool=one_pool)

    def grow(cache, num_tokens):
        numbers = rng.integers(0, 900, (BATCH, ROWS)).astype(np.float32)
        cache, ok = step(cache, np.int32(num_tokens), numbers)
        assert ok.all()
        check_keys_are_where_tokens_are(cache)
        return cache

    cache = grow(cache, [70, 0, 100])
    cache = grow(cache, [1, 3, 60])
    cache = cache.fork(np.int32([-1, 0, -1]))
    check_keys_are_where_tokens_are(cache)
    cache = grow(cache, [2, 5, 0])  # both copy the page that they share, in part
    copied = np.asarray(cache.block_table)[:2, 1]
    assert copied[0] != copied[1]
    cache = grow(cache.truncate(np.int32([10, 66, 999])), [60, 60, 1])
    cache = grow(cache.free(np.array([True, False, False])), [100, 0, 0])


def test_a_layer_can_be_an_array_in_one_pool():
    cache, _ = make_cache(one_pool=True).allocate(jnp.int32([5, 0, 1]))

    def body(cache, layer):
        keys = jnp.full((BATCH, 5, DIM), 7.0) + layer
        return cache.append_index(layer, keys), None

    cache, _ = jax.lax.scan(body, cache, jnp.arange(LAYERS))
    for layer in range(LAYERS):
        view = cache.at_layer(layer)
        rows = np.asarray(view.index_pages[0])[view.block_table[0, 0], :5]
        np.testing.assert_array_equal(rows, 7.0 + layer)


@pytest.mark.parametrize("index_dtype", [jnp.float32, jnp.bfloat16, "fp8"])
def test_there_and_back_through_a_snapshot(tmp_path, index_dtype):
    numbers = np.random.default_rng(1).integers(0, 200, (BATCH, ROWS)).astype(np.float32)
    cache, ok = step(make_cache(index_dtype=index_dtype), np.int32([70, 0, 33]), numbers)
    assert ok.all()
    saved = snapshot(cache, [2, 0])
    key = DIM + 16 if index_dtype == "fp8" else DIM * jnp.dtype(index_dtype).itemsize
    assert saved.nbytes == LAYERS * 103 * (HEAD_DIM * 4 + key)
    saved.save(tmp_path / "saved.npz")
    loaded = Snapshot.load(tmp_path / "saved.npz")
    other, ok = restore(make_cache(index_dtype=index_dtype, one_pool=True), loaded, [1, 2])
    assert ok.all()
    for layer in range(LAYERS):
        for old, new in ((2, 1), (0, 2)):
            rows = [
                np.asarray(view.index_pages[0])[view.block_table[i]].reshape(256, -1)[:n]
                for view, i, n in (
                    (cache.at_layer(layer), old, cache.cache_seqlens[old]),
                    (other.at_layer(layer), new, other.cache_seqlens[new]),
                )
            ]
            assert len(rows[0]) > 30
            np.testing.assert_array_equal(*rows)
            assert rows[0].any()


def test_a_snapshot_without_keys_does_not_fit():
    without, ok = make_cache(index_head_dim=0).allocate(jnp.int32([3, 0, 0]))
    assert ok.all()
    with pytest.raises(ValueError, match=r"holds float32\[80\] .* the snapshot has no"):
        restore(make_cache(), snapshot(without, [0]), [0])
    with_keys, _ = make_cache().allocate(jnp.int32([3, 0, 0]))
    with pytest.raises(ValueError, match=r"holds no .* the snapshot has float32\[80\]"):
        restore(make_cache(index_head_dim=0), snapshot(with_keys, [0]), [0])


# --- In FP8 --------------------------------------------------------------------------------------


def test_fp8_keys_are_codes_and_a_power_of_two():
    rng = np.random.default_rng(2)
    sizes = np.float32([[1e-9], [1e-3], [1], [50], [3e4], [0]])
    keys = rng.standard_normal((6, DIM)).astype(np.float32) * sizes
    keys[2, 0] = np.abs(keys[2]).max() * 2  # the largest has another exponent than others
    keys[3] = np.clip(keys[3], -56, 56)
    keys[3, 0] = 56  # 448 / 8
    rows = index_keys.pack(jnp.asarray(keys), jnp.uint8)
    assert rows.shape == (6, DIM + 16)
    codes, scales = index_keys.unpack(rows, jnp.float32)
    codes, scales = np.asarray(codes, np.float64), np.asarray(scales, np.float64)
    largest = np.abs(keys).max(axis=-1)
    wanted = 2.0 ** np.ceil(np.log2(np.maximum(largest.astype(np.float64) / 448, 1e-4)))
    np.testing.assert_array_equal(scales, wanted)
    assert scales[3] == 2.0**-3
    assert np.abs(codes).max() == 448
    near = np.abs(codes * scales[:, None] - keys) <= np.maximum(
        np.abs(keys) * 2.0**-4, scales[:, None] * 2.0**-10
    )
    assert near.all()


def test_fp8_keys_in_a_cache():
    keys = np.random.default_rng(3).standard_normal((BATCH, 5, DIM)).astype(np.float32)
    cache = make_cache(dtype="fp8")
    assert (cache.index_pages[0].dtype, cache.index_pages[0].shape[-1]) == (jnp.uint8, DIM + 16)
    assert cache.index_head_dim == DIM
    cache, _ = cache.allocate(jnp.int32([5, 0, 3]))
    cache = cache.append_index(1, jnp.asarray(keys))
    rows = cache.index_pages[1][cache.block_table[2, 0], :3, 0]
    np.testing.assert_array_equal(rows, index_keys.pack(jnp.asarray(keys[2, :3]), jnp.uint8))
    with pytest.raises(ValueError, match=r'index_dtype must be .* or "fp8", got int8'):
        make_cache(index_dtype=jnp.int8)
    for dtype, size in (("fp8", 72), (jnp.bfloat16, 68), (jnp.float32, 67)):
        with pytest.raises(ValueError, match=f"multiple of 16 bytes, got {size} of"):
            make_cache(index_dtype=dtype, index_head_dim=size)


def test_the_pools_are_updated_in_place():
    cache = make_cache()
    step(cache, np.int32([1, 0, 0]), np.zeros((BATCH, ROWS), np.float32))
    assert all(pool.is_deleted() for pool in cache.index_pages)
    tokens = step.lower(
        make_cache(num_pages=500), np.int32([1, 0, 0]), np.zeros((BATCH, ROWS), np.float32)
    )
    memory = tokens.compile().memory_analysis()
    pool = 500 * PAGE_SIZE * DIM * 4
    assert memory.temp_size_in_bytes < pool


def test_sizes():
    cache = make_cache(dtype=jnp.bfloat16)
    assert cache.index_head_dim == DIM
    assert [pool.shape for pool in cache.index_pages] == [(9, PAGE_SIZE, 1, DIM)] * LAYERS
    assert cache.nbytes == LAYERS * 9 * PAGE_SIZE * (HEAD_DIM + DIM) * 2
    assert make_cache(index_head_dim=0).index_pages == ()
    assert make_cache(index_head_dim=0).index_head_dim == 0
    assert [pool.shape[0] for pool in make_cache(one_pool=True).index_pages] == [9 * LAYERS]
    assert len(cache.at_layer(1).index_pages) == 1


@pytest.mark.parametrize(
    ("shape", "index_head_dim"),
    [((BATCH, 1, DIM), 0), ((BATCH, 1, 64), DIM), ((1, 1, DIM), DIM), ((BATCH, 1, 1, DIM), DIM)],
)
def test_keys_that_do_not_fit(shape, index_head_dim):
    cache = make_cache(index_head_dim=index_head_dim)
    with pytest.raises(ValueError, match=r"keys must be \[batch, s, index_head_dim\] with batch=3"):
        cache.append_index(0, jnp.zeros(shape))
    with pytest.raises(ValueError, match="index_head_dim must not be negative, got -1"):
        make_cache(index_head_dim=-1)


def test_programs_from_before_there_were_index_keys():
    """Their caches have the fields but the last, and none of those is a program's argument."""
    fields = [field.name for field in dataclasses.fields(PagedKVCache)]
    assert fields[-1] == "index_pages"
    assert paged._check_fields(" ".join(fields[:-1]).encode()) == ()
    with pytest.raises(ValueError, match="export it again"):
        paged._check_fields(" ".join(fields[:-2]).encode())
