"""Sequences that leave a cache and come back: bit for bit, or not at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.cache import layout
from flashmla_jax.cache.layout import DTYPES, HEAD_DIM
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.cache.snapshot import Snapshot, restore, snapshot

LAYERS, LENGTHS = 2, (70, 0, 200, 64)


def make_cache(num_pages=12, batch=4, **changes):
    sizes = {"num_layers": LAYERS, "num_pages": num_pages, "batch": batch, "max_pages_per_seq": 4}
    return PagedKVCache.create(**sizes | changes)


def fill(cache, lengths=LENGTHS, seed=0):
    """The cache with random bits in its sequences, NaN among them; and these, as bytes."""
    rng = np.random.default_rng(seed)
    cache, ok = cache.allocate(np.int32(lengths))
    assert ok.all()
    itemsize = cache.dtype.itemsize
    shape = (LAYERS, cache.batch, max(lengths), cache.num_kv_heads, HEAD_DIM * itemsize)
    bits = rng.integers(0, 256, shape, np.uint8)
    if cache.is_fp8:
        tokens = jnp.asarray(bits.view(np.int8)[..., ::2], jnp.bfloat16)
        bits = np.asarray(layout.quantize(tokens))
    else:
        tokens = jnp.asarray(bits.view(cache.dtype))
    for layer in range(LAYERS):
        cache = cache.append(layer, tokens[layer])
    return cache, [bits[:, i, :n] for i, n in enumerate(lengths)]


def bits_of(cache, i):
    """What sequence i holds, as bytes."""
    table = np.asarray(cache.block_table)[i]
    pools = np.concatenate([np.asarray(pool) for pool in cache.pages])
    pools = pools.reshape(LAYERS, cache.num_pages, *pools.shape[1:])
    rows = pools[:, table].reshape(LAYERS, -1, *pools.shape[3:])
    return rows[:, : int(cache.cache_seqlens[i])].view(np.uint8)


@pytest.mark.parametrize(
    "dtype", [*DTYPES, "fp8"], ids=lambda x: x if x == "fp8" else jnp.dtype(x).name
)
@pytest.mark.parametrize(("num_kv_heads", "one_pool"), [(1, False), (1, True), (2, False)])
def test_there_and_back(tmp_path, dtype, num_kv_heads, one_pool):
    kind = {"dtype": dtype, "num_kv_heads": num_kv_heads}
    cache, bits = fill(make_cache(**kind, one_pool=one_pool))
    before = jax.tree.map(np.array, cache)
    saved = snapshot(cache, [2, 0, 1])
    assert saved.seqlens == (200, 70, 0)
    token = 656 if dtype == "fp8" else HEAD_DIM * cache.dtype.itemsize
    assert saved.nbytes == LAYERS * 270 * num_kv_heads * token
    for x, y in zip(jax.tree.leaves(cache), jax.tree.leaves(before), strict=True):
        assert np.asarray(x).tobytes() == y.tobytes()

    saved.save(tmp_path / "saved.npz")
    loaded = Snapshot.load(tmp_path / "saved.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["saved.npz"]
    wanted = (bits[2], bits[0], bits[1])
    for x, y, z in zip(saved.tokens, loaded.tokens, wanted, strict=True):
        assert x.dtype == y.dtype == (np.uint8 if dtype == "fp8" else dtype)
        assert x.tobytes() == y.tobytes() == z.tobytes()

    other = make_cache(20, 5, **kind, one_pool=not one_pool)  # as pools lie is no matter
    other, old = fill(other, (0, 9, 0, 130, 0))
    other, ok = restore(other, loaded, [4, 0, 2])
    assert ok.tolist() == [True, True, True]
    other.check()
    assert other.cache_seqlens.tolist() == [70, 9, 0, 130, 200]
    assert other.num_new.tolist() == [0] * 5
    for i, wanted in enumerate((bits[0], old[1], bits[1], old[3], bits[2])):
        assert bits_of(other, i).tobytes() == wanted.tobytes()


def test_a_fork_is_saved_whole_and_restored_apart():
    cache, bits = fill(make_cache())
    cache = cache.fork(np.int32((-1, 0, -1, -1)))
    saved = snapshot(cache, [0, 1])
    cache, ok = restore(cache.free(np.array([True, True, False, False])), saved, [0, 1])
    assert ok.all()
    cache.check()
    assert not set(cache.block_table[0, :2].tolist()) & set(cache.block_table[1, :2].tolist())
    assert bits_of(cache, 0).tobytes() == bits_of(cache, 1).tobytes() == bits[0].tobytes()


def test_too_few_pages():
    """The longest sequence finds no room, and the others do."""
    saved = snapshot(fill(make_cache())[0], [2, 0, 3])
    cache, ok = restore(make_cache(num_pages=4), saved, [0, 1, 2])
    assert ok.tolist() == [False, True, True]
    cache.check()
    assert cache.cache_seqlens.tolist() == [0, 70, 64, 0]


def test_nothing(tmp_path):
    cache, _ = fill(make_cache())
    snapshot(cache, []).save(tmp_path / "nothing.npz")
    cache, ok = restore(cache, Snapshot.load(tmp_path / "nothing.npz"), [])
    assert ok.shape == (0,)
    assert cache.cache_seqlens.tolist() == list(LENGTHS)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([0, 4], r"sequences must be in \[0, 4\), got 4"),
        ([-1, 0], r"sequences must be in \[0, 4\), got -1"),
        ([0], "as many as the snapshot's 2, got 1"),
        ([1, 1], r"sequences must be different, got \[1, 1\]"),
        ([1, 2], r"must be empty, and of \[1, 2\] there are tokens in \[2\]"),
    ],
)
def test_restore_refuses_sequences(sequences, message):
    cache, bits = fill(make_cache())
    saved = snapshot(cache, [0, 1])
    with pytest.raises(ValueError, match=message):
        restore(cache, saved, sequences)
    assert bits_of(cache, 2).tobytes() == bits[2].tobytes()  # it was not donated


@pytest.mark.parametrize(
    "changes", [{"num_layers": 3}, {"num_kv_heads": 2}, {"dtype": jnp.float16}], ids=str
)
def test_restore_refuses_another_kind_of_cache(changes):
    saved = snapshot(fill(make_cache())[0], [0])
    with pytest.raises(ValueError, match=r"the snapshot has bfloat16\[2, 70, 1, 576\]"):
        restore(make_cache(**changes), saved, [0])


def test_snapshot_refuses():
    with pytest.raises(ValueError, match=r"sequences must be in \[0, 4\), got 7"):
        snapshot(make_cache(), [7])


def test_files_that_are_none(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"x\.npz is not a snapshot of a cache"):
        Snapshot.load(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ValueError, match=r"x\.npz is not a snapshot of a cache"):
        Snapshot.load(path)
    np.savez(path, format=np.array("flashmla_jax.cache.Snapshot 0"), dtype=np.array("bfloat16"))
    with pytest.raises(ValueError, match=r"of another format: flashmla_jax\.cache\.Snapshot 0"):
        Snapshot.load(path)
    saved = snapshot(fill(make_cache())[0], [0])
    saved.save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"x\.npz is not a snapshot of a cache"):
        Snapshot.load(path)


def test_what_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    saved = snapshot(fill(make_cache())[0], [0])
    saved.save(path)
    before = path.read_bytes()

    def fails(file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        dataclasses.replace(saved, tokens=()).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
