"""`cache_append` against a loop in NumPy: every row, and nothing but the rows, in its place."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax import reference
from flashmla_jax.cache import index_keys
from flashmla_jax.cache.layout import HEAD_DIM, PAGE_SIZE
from flashmla_jax.ops import cache_append as op
from flashmla_jax.ops.cache_append import DTYPES, cache_append

INT32_MIN, INT32_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def expected(k_cache, new_kv, block_table, start, count, copy_from=None):
    """What the docstring says, one row at a time."""
    before, k_cache = k_cache, np.array(k_cache)
    for i, (first, rows) in enumerate(zip(start, count, strict=True)):
        for j in range(min(int(rows), new_kv.shape[1])):
            slot, row = divmod(int(first) + j, PAGE_SIZE)
            if int(first) + j < 0 or slot >= block_table.shape[1]:
                continue
            page = block_table[i, slot]
            if not 0 <= page < k_cache.shape[0]:
                continue
            k_cache[page, row] = new_kv[i, j]
            if j == 0 and copy_from is not None and 0 <= copy_from[i] < k_cache.shape[0]:
                k_cache[page, :row] = before[copy_from[i], :row]
    return k_cache


def problem(seed, *, dtype=jnp.float32, num_pages=12, batch=3, num_tokens=70, pages=3, h_kv=1):
    """Distinct random pages, a pool of NaN, and positions that stay inside the table.

    Sequences copy from pages that none of them has, one from no page.
    """
    rng = np.random.default_rng(seed)
    k_cache = np.full((num_pages, PAGE_SIZE, h_kv, HEAD_DIM), np.nan, dtype)
    new_kv = rng.standard_normal((batch, num_tokens, h_kv, HEAD_DIM)).astype(dtype)
    block_table = rng.permutation(num_pages)[: batch * pages].reshape(batch, pages)
    start = rng.integers(0, pages * PAGE_SIZE - num_tokens + 1, batch)
    count = rng.integers(0, num_tokens + 1, batch)
    spare = np.setdiff1d(np.arange(num_pages), block_table)
    k_cache[spare] = rng.standard_normal((len(spare), PAGE_SIZE, h_kv, HEAD_DIM)).astype(dtype)
    copy_from = rng.choice(spare, batch)
    copy_from[: batch // 3] = -1
    integers = block_table, start, count, copy_from
    return k_cache, new_kv, *(x.astype(np.int32) for x in integers)


def assert_same_bits(actual, wanted):
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    assert actual.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
@pytest.mark.parametrize("h_kv", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 3, 70, 150, 391])  # 391: many in all, for the kernel
def test_matches_numpy(dtype, h_kv, num_tokens):
    sizes = {"num_pages": 27, "pages": 8} if num_tokens > 150 else {}
    args = problem(num_tokens, dtype=dtype, h_kv=h_kv, num_tokens=num_tokens, **sizes)
    assert_same_bits(jax.jit(cache_append)(*args), expected(*args))
    assert_same_bits(jax.jit(reference.cache_append)(*args), expected(*args))


@pytest.mark.parametrize(("dtype", "size"), [(np.uint8, 656), (jnp.bfloat16, 128), (np.uint8, 16)])
@pytest.mark.parametrize("num_tokens", [1, 70, 391])
def test_tokens_of_other_sizes(dtype, size, num_tokens):
    sizes = {"num_pages": 27, "pages": 8} if num_tokens > 150 else {}
    k_cache, new_kv, *tables = problem(size + num_tokens, num_tokens=num_tokens, h_kv=2, **sizes)
    if dtype is np.uint8:
        args = [np.tile(x.view(np.uint8), 2)[..., -size:] for x in (k_cache, new_kv)]
    else:
        args = [x[..., :size].astype(dtype) for x in (k_cache, new_kv)]
    for append in (cache_append, reference.cache_append):
        assert_same_bits(jax.jit(append)(*args, *tables), expected(*args, *tables))


def test_alignment_is_that_of_the_kernels():
    header = (Path(__file__).parents[2] / "csrc" / "params.h").read_text()
    (alignment,) = re.findall(r"kAppendAlignment = (\d+);", header)
    assert int(alignment) == op._ALIGNMENT == index_keys._ALIGNMENT


@pytest.mark.parametrize("append", [cache_append, reference.cache_append])
@pytest.mark.parametrize(
    ("start", "count"),
    [
        ((0, 63, 64), (1, 1, 1)),  # page borders
        ((0, 5, 191), (0, -3, INT32_MIN)),  # nothing to write
        ((0, 60, 122), (70, 71, INT32_MAX)),  # no more rows than there are
        ((-69, -70, INT32_MIN), (70, 70, 70)),  # before the sequence
        ((191, 192, INT32_MAX), (70, 70, 70)),  # beyond the table
        ((INT32_MAX - 1, INT32_MAX - 69, 122), (INT32_MAX, 70, 70)),
    ],
)
def test_drops_rows_without_a_place(append, start, count):
    k_cache, new_kv, block_table, _, _, copy_from = problem(0)
    args = (k_cache, new_kv, block_table, np.int32(start), np.int32(count), copy_from[::-1])
    assert_same_bits(jax.jit(append)(*args), expected(*args))


@pytest.mark.parametrize("append", [cache_append, reference.cache_append])
def test_drops_rows_of_pages_outside_the_pool(append):
    k_cache, new_kv, block_table, _, _, copy_from = problem(1)
    block_table[:, 1] = (-1, 12, INT32_MAX)
    block_table[0, 0] = INT32_MIN
    start, count = np.int32((30, 60, 64)), np.int32((70, 70, 70))
    args = (k_cache, new_kv, block_table, start, count, copy_from)
    assert_same_bits(jax.jit(append)(*args), expected(*args))


@pytest.mark.parametrize("append", [cache_append, reference.cache_append])
@pytest.mark.parametrize(
    ("start", "count"), [((63, 64, 100), (1, 1, 5)), ((10, 1, 190), (0, -1, 1))]
)
@pytest.mark.parametrize("copy_from", [(9, 9, 9), (-1, 12, 11), (INT32_MIN, INT32_MAX, 9)])
def test_copies_what_precedes_the_first_token(append, start, count, copy_from):
    k_cache, new_kv, _, *_ = problem(11)
    k_cache[9:] = np.random.default_rng(0).standard_normal(k_cache[9:].shape)
    block_table = np.arange(9, dtype=np.int32).reshape(3, 3)
    args = (k_cache, new_kv, block_table, *map(np.int32, (start, count, copy_from)))
    assert_same_bits(jax.jit(append)(*args), expected(*args))


def test_copies_a_page_onto_itself():
    k_cache, new_kv, block_table, _, count, _ = problem(12)
    start, count = np.int32((5, 5, 5)), np.maximum(count, 1)
    args = (k_cache, new_kv, block_table, start, count, block_table[:, 0].copy())
    assert_same_bits(jax.jit(cache_append)(*args), expected(*args))


def test_keeps_nan_and_the_rest_of_the_pool():
    k_cache, new_kv, block_table, start, count, _ = problem(2, dtype=jnp.bfloat16)
    new_kv[1, :, :, ::7] = np.nan
    k_cache[::2] = 3
    args = (k_cache, new_kv, block_table, start, np.full_like(count, 5))
    assert_same_bits(cache_append(*args), expected(*args))


@pytest.mark.parametrize(("batch", "num_tokens"), [(0, 3), (3, 0)])
def test_empty(batch, num_tokens):
    args = problem(3, batch=batch, num_tokens=num_tokens)
    assert_same_bits(jax.jit(cache_append)(*args), args[0])


def test_is_our_custom_call():
    hlo = jax.jit(cache_append).lower(*problem(4)).compile().as_text()
    assert 'custom_call_target="flashmla_cache_append_v2"' in hlo


@pytest.mark.parametrize(
    "in_axes",
    [
        (0, 0, 0, 0, 0, 0),
        (1, 2, 1, 1, 1, 1),
        (None, 0, 0, 0, 0, 0),
        (None, None, None, 0, None, None),
        (0, None, None, None, None, 0),
        (3, 0, None, None, 1, None),
    ],
)
def test_vmap(in_axes):
    """Each element of a mapped axis has a pool of its own, also with entries outside of it."""
    problems = [problem(seed) for seed in (5, 6)]
    for _, _, block_table, _, _, copy_from in problems:
        block_table[0] = (12, -1, 17)
        copy_from[1] = 12
    args = [
        first if axis is None else np.stack([first, second], axis)
        for first, second, axis in zip(*problems, in_axes, strict=True)
    ]
    actual = jax.jit(jax.vmap(cache_append, in_axes))(*args)
    for k in range(2):
        own = [
            x if axis is None else np.take(x, k, axis)
            for x, axis in zip(args, in_axes, strict=True)
        ]
        assert_same_bits(actual[k], expected(*own))


def test_nested_vmap():
    args = [np.stack([np.stack(x)] * 2) for x in zip(problem(7), problem(8), strict=True)]
    actual = jax.vmap(jax.vmap(cache_append))(*args)
    for i in range(2):
        for j in range(2):
            assert_same_bits(actual[i, j], expected(*(x[i, j] for x in args)))


def test_vmap_over_nothing():
    k_cache, *rest = (np.stack([x] * 2)[:0] for x in problem(10))
    assert jax.vmap(cache_append)(k_cache, *rest).shape == k_cache.shape
    shared = problem(10)[0]
    pools = jax.vmap(cache_append, (None, 0, 0, 0, 0, 0))(shared, *rest)
    assert pools.shape == (0, *shared.shape)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k_cache", np.zeros((2, 32, 1, 576), np.float32), r"got shape \(2, 32, 1, 576\)"),
        ("k_cache", np.zeros((2, 64, 1, 575), np.float32), r"16 bytes.*got .*\(2, 64, 1, 575\)"),
        ("k_cache", np.zeros((2, 64, 1, 512), np.float32), r"new_kv must .*\(1, 512\)"),
        ("k_cache", np.zeros((64, 1, 576), np.float32), r"k_cache must be \[num_pages, 64"),
        ("k_cache", np.zeros((0, 64, 1, 576), np.float32), "must hold a page"),
        ("k_cache", np.zeros((2, 64, 1, 576), np.int8), "got int8"),
        ("k_cache", np.zeros((2, 64, 1, 576), np.float16), "new_kv must have k_cache's dtype"),
        ("new_kv", np.zeros((3, 1, 2, 576), np.float32), r"got shape \(3, 1, 2, 576\)"),
        ("new_kv", np.zeros((3, 576), np.float32), r"new_kv must be \[batch, num_tokens"),
        ("new_kv", [1.0], "must be an array"),
        ("block_table", np.zeros((4, 3), np.int32), r"got shape \(4, 3\)"),
        ("block_table", np.zeros((3, 0), np.int32), r"at least one page"),
        ("block_table", np.zeros((3, 3), np.int64), "must be int32, got int64"),
        ("start", np.zeros((4,), np.int32), r"start must be \[batch\] with batch=3"),
        ("count", np.zeros((3,), np.float32), "count must be int32, got float32"),
        ("count", np.zeros((3, 1), np.int32), r"count must be \[batch\]"),
        ("copy_from", np.zeros((2,), np.int32), r"copy_from must be \[batch\] with batch=3"),
        ("copy_from", np.zeros((3,), np.int64), "copy_from must be int32, got int64"),
    ],
)
def test_bad_input(name, value, message):
    names = ("k_cache", "new_kv", "block_table", "start", "count", "copy_from")
    args = dict(zip(names, problem(10), strict=True)) | {name: value}
    with pytest.raises(ValueError, match=message):
        cache_append(**args)
