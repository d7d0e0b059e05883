"""`PagedKVCache` against an allocator in plain Python, over random lives of a batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_jax import flash_mla_with_kvcache
from flashmla_jax.cache import layout
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
    poison = 0xFF if cache.is_fp8 else jnp.nan
    pages = tuple(jnp.full_like(pool, poison) for pool in cache.pages)
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
    shape = (LAYERS, BATCH, rows, h_kv, HEAD_DIM)
    if dtype == "fp8":  # which it holds as they are
        return rng.integers(-15, 16, shape).astype(jnp.bfloat16)
    return rng.integers(-128, 128, shape).astype(dtype)


def pages_for(tokens):
    return -(-tokens // PAGE_SIZE)


def snapshot(cache):
    return jax.tree.map(np.array, cache)


def assert_same_bits(actual, wanted):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


class Page:
    """A page of the model: what its rows hold in every layer."""

    def __init__(self, layers, shape):
        self.rows = np.full((layers, PAGE_SIZE, *shape), np.nan, np.float32)


class Model:
    """What a cache should be: per sequence its length and its pages, which others may hold too."""

    def __init__(self, layers=LAYERS, shape=(1, HEAD_DIM)):
        self.layers, self.shape = layers, shape
        self.lengths, self.held = [0] * BATCH, [[] for _ in range(BATCH)]
        self.retained, self.high_water = [], 0
        self.by_number = {}  # what the cache calls a page

    @property
    def used(self):
        return {*self.retained, *(page for pages in self.held for page in pages)}

    @property
    def filled(self):
        lengths = map(pages_for, self.lengths)
        filled = [pages[:n] for pages, n in zip(self.held, lengths, strict=True)]
        return {*self.retained, *(page for pages in filled for page in pages)}

    def refs(self, page):
        return sum(page in pages for pages in self.held) + (page in self.retained)

    def take(self, wishes, fits):
        """Which sequences get so many new pages: the least wish first."""
        free, granted = PAGES - len(self.used), [False] * BATCH
        for i in sorted(range(BATCH), key=lambda i: wishes[i]):
            if fits[i] and wishes[i] <= free:
                granted[i] = True
                free -= wishes[i]
        taken = sum(w for w, got in zip(wishes, granted, strict=True) if got)
        self.high_water = max(self.high_water, len(self.used) + taken)
        return granted

    def fits(self, counts):
        room = [PAGES_PER_SEQ * PAGE_SIZE - n for n in self.lengths]
        return [0 <= n <= most for n, most in zip(counts, room, strict=True)]

    def growth(self, i, count):
        return max(pages_for(self.lengths[i] + count) - len(self.held[i]), 0)

    def step(self, counts, kv):
        fits = self.fits(counts)
        counts = [n if fit else 0 for n, fit in zip(counts, fits, strict=True)]
        tails = [
            self.held[i][n // PAGE_SIZE] if n % PAGE_SIZE and counts[i] else None
            for i, n in enumerate(self.lengths)
        ]
        copies = [tail is not None and self.refs(tail) > 1 for tail in tails]
        wishes = [self.growth(i, n) + copies[i] for i, n in enumerate(counts)]
        granted = self.take(wishes, fits)
        for i in np.flatnonzero(granted):
            start = self.lengths[i]
            if copies[i]:
                copy = Page(self.layers, self.shape)
                copy.rows[:, : start % PAGE_SIZE] = tails[i].rows[:, : start % PAGE_SIZE]
                self.held[i][start // PAGE_SIZE] = copy
            self.held[i] += [
                Page(self.layers, self.shape) for _ in range(self.growth(i, counts[i]))
            ]
            for j in range(counts[i] if self.layers else 0):
                slot, row = divmod(start + j, PAGE_SIZE)
                self.held[i][slot].rows[:, row] = kv[:, i, j]
            self.lengths[i] += counts[i]
        return granted

    def reserve(self, counts):
        fits = self.fits(counts)
        wishes = [self.growth(i, n) if fits[i] else 0 for i, n in enumerate(counts)]
        granted = self.take(wishes, fits)
        for i in np.flatnonzero(granted):
            self.held[i] += [Page(self.layers, self.shape) for _ in range(wishes[i])]
        return granted

    def truncate(self, seqlens):
        for i, n in enumerate(seqlens):
            if max(n, 0) < self.lengths[i]:
                self.lengths[i] = max(n, 0)
                self.held[i] = self.held[i][: pages_for(self.lengths[i])]

    def free(self, mask):
        for i in np.flatnonzero(mask):
            self.lengths[i], self.held[i] = 0, []

    def fork(self, sources):
        lengths, held = list(self.lengths), [list(pages) for pages in self.held]
        for i, source in enumerate(sources):
            if 0 <= source < BATCH and source != i:
                self.lengths[i] = lengths[source]
                self.held[i] = held[source][: pages_for(lengths[source])]

    def adopt(self, mask, pages, seqlens):
        """`pages` are numbers that the cache has given."""
        ok, filled = [True] * BATCH, self.filled
        for i in np.flatnonzero(mask):
            adopted = [self.by_number.get(x) for x in pages[i][: pages_for(max(seqlens[i], 0))]]
            ok[i] = (
                0 <= seqlens[i] <= len(pages[i]) * PAGE_SIZE
                and all(page in filled for page in adopted)
                and len(set(adopted)) == len(adopted)
            )
            if ok[i]:
                self.lengths[i], self.held[i] = seqlens[i], adopted
        return ok

    def retain(self, pages):
        pages = {self.by_number.get(x) for x in pages} & self.filled
        self.retained += [page for page in pages if page not in self.retained]

    def release(self, pages):
        pages = {self.by_number.get(x) for x in pages}
        self.retained = [page for page in self.retained if page not in pages]

    def check(self, cache):
        """That `cache` is the same."""
        dense = [np.asarray(gather(cache, layer)) for layer in range(cache.num_layers)]
        stats, usage, num_free = jax.device_get(figures(cache))
        cache = snapshot(cache)
        cache.check()
        np.testing.assert_array_equal(cache.cache_seqlens, self.lengths)
        numbers = {page: x for x, page in self.by_number.items() if page in self.retained}
        for i, pages in enumerate(self.held):
            row = cache.block_table[i]
            assert (row[len(pages) :] == -1).all()
            for page, x in zip(pages, row.tolist(), strict=False):
                assert numbers.setdefault(page, x) == x
        self.by_number = {x: page for page, x in numbers.items()}
        assert len(self.by_number) == len(numbers) == len(self.used)
        refs = [self.refs(self.by_number[x]) if x in self.by_number else 0 for x in range(PAGES)]
        np.testing.assert_array_equal(cache.page_refs, refs)
        np.testing.assert_array_equal(
            np.flatnonzero(cache.retained), sorted(numbers[page] for page in self.retained)
        )
        assert stats == (
            PAGES,
            len(self.used),
            PAGES - len(self.used),
            sum(n > 1 for n in refs),
            sum(map(len, self.held)) - sum(map(pages_for, self.lengths)),
            len(self.retained),
            self.high_water,
            sum(self.lengths),
        )
        assert num_free == PAGES - len(self.used)
        np.testing.assert_allclose(usage, len(self.used) / PAGES, rtol=1e-6)
        for layer, rows in enumerate(dense):
            for i, pages in enumerate(self.held):
                tokens = [np.zeros((0, *self.shape)), *(page.rows[layer] for page in pages)]
                wanted = np.zeros(rows[i].shape, np.float32)
                wanted[: self.lengths[i]] = np.concatenate(tokens)[: self.lengths[i]]
                np.testing.assert_array_equal(rows[i].astype(np.float32), wanted)


counts = st.one_of(st.integers(0, 3), st.sampled_from([62, 63, 64, 65, 128]), st.integers(-1, ROWS))
flags = st.tuples(*[st.booleans()] * BATCH)
lengths = st.tuples(*[st.integers(-1, PAGES_PER_SEQ * PAGE_SIZE + 1)] * BATCH)
some_pages = st.lists(st.integers(-1, PAGES), min_size=2, max_size=2)
operations = st.one_of(
    st.tuples(st.just("step"), st.tuples(*[counts] * BATCH)),
    st.tuples(st.just("reserve"), st.tuples(*[counts] * BATCH)),
    st.tuples(st.just("truncate"), lengths),
    st.tuples(st.just("free"), flags),
    st.tuples(st.just("fork"), st.tuples(*[st.integers(-1, BATCH)] * BATCH)),
    st.tuples(
        st.just("adopt"), flags, st.tuples(*[some_pages] * BATCH),
        st.tuples(*[st.integers(-1, 2 * PAGE_SIZE + 1)] * BATCH),
    ),
    st.tuples(st.just("retain"), some_pages),
    st.tuples(st.just("release"), some_pages),
)  # fmt: skip


gather = jax.jit(PagedKVCache.gather, static_argnums=1)
figures = jax.jit(lambda cache: (cache.stats(), cache.usage, cache.num_free))


@functools.cache
def compiled(name):
    return jax.jit(getattr(PagedKVCache, name), donate_argnums=0)


def live(cache, model, life, new_kv):
    """Both go through the same life, and are the same after every event of it."""
    for seed, (name, *arguments) in enumerate(life):
        if name == "step":
            before = snapshot(cache)
            (number,) = arguments
            kv = new_kv(seed)
            cache, ok = step(cache, np.int32(number), kv)
            granted = model.step(number, kv.astype(np.float32))
            np.testing.assert_array_equal(ok, granted)
            np.testing.assert_array_equal(cache.num_new, np.where(ok, number, 0))
            if not any(granted):  # nothing was touched, in any layer
                unchanged = dict.fromkeys(("num_new",), np.zeros(BATCH, np.int32))
                unchanged["copy_from"] = np.full(BATCH, -1, np.int32)
                assert_same_bits(cache, dataclasses.replace(before, **unchanged))
        else:
            operands = [np.asarray(x, None if name == "free" else np.int32) for x in arguments]
            if name == "adopt":
                operands[0] = operands[0].astype(bool)
            cache = compiled(name)(cache, *operands)
            expected = getattr(model, name)(*arguments)
            if name in ("reserve", "adopt"):
                cache, ok = cache
                np.testing.assert_array_equal(ok, expected)
        model.check(cache)


@pytest.mark.parametrize(
    "dtype", [*DTYPES, "fp8"], ids=lambda x: x if x == "fp8" else jnp.dtype(x).name
)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(operations, min_size=1, max_size=12))
def test_lives_like_a_plain_cache(dtype, life):
    live(poison(make_cache(dtype=dtype)), Model(), life, functools.partial(random_kv, dtype=dtype))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(operations, min_size=1, max_size=12))
def test_one_pool_lives_like_a_plain_cache(life):
    live(poison(make_cache(one_pool=True)), Model(), life, random_kv)


@jax.jit
def scan_over_layers(cache, num_tokens, kv):
    """Like `step`, with a layer's number that is an array; and what each layer holds then."""

    def body(cache, operands):
        layer, kv = operands
        cache = cache.append(layer, kv)
        return cache, (cache.gather(layer), cache.at_layer(layer).block_table)

    cache, ok = cache.allocate(num_tokens)
    return (ok, *jax.lax.scan(body, cache, (jnp.arange(LAYERS), kv)))


def test_one_pool_in_a_scan():
    """Sequences that begin alike, on shared pages, and go on apart: layers have what they have."""
    caches = make_cache(), poison(make_cache(one_pool=True))
    for seed, sources, counts in (
        (0, (-1, -1, -1), (70, 0, 3)),
        (1, (-1, 0, 0), (2, 60, 0)),
        (2, (-1, -1, -1), (1, 1, 64)),
    ):
        plain, pool = (jax.jit(PagedKVCache.fork)(c, np.int32(sources)) for c in caches)
        kv = random_kv(seed)
        plain, ok = step(plain, np.int32(counts), kv)
        ok_too, pool, (dense, tables) = scan_over_layers(pool, np.int32(counts), kv)
        assert ok.all()
        assert ok_too.all()
        caches = plain, pool
        pool.check()
        for layer in range(LAYERS):
            np.testing.assert_array_equal(dense[layer], plain.gather(layer))
            view = pool.at_layer(layer)
            np.testing.assert_array_equal(tables[layer], view.block_table)
            np.testing.assert_array_equal(
                view.block_table,
                np.where(pool.block_table < 0, -1, pool.block_table + layer * PAGES),
            )
            rows = view.pages[0][view.block_table[1]].reshape(-1, 1, HEAD_DIM)
            length = int(pool.cache_seqlens[1])
            np.testing.assert_array_equal(rows[:length], dense[layer][1, :length])


def test_a_layer_of_pools_of_their_own():
    cache, _ = step(make_cache(), np.int32((65, 0, 1)), random_kv(0))
    view = cache.at_layer(1)
    assert view.pages == (cache.pages[1],)
    assert view.block_table is cache.block_table
    np.testing.assert_array_equal(view.gather(0), cache.gather(1))


@functools.cache
def books():
    """Of an empty cache, without its pools."""
    return snapshot(dataclasses.replace(make_cache(), pages=()))


@settings(max_examples=2300, deadline=None, derandomize=True)
@given(st.lists(operations, min_size=5, max_size=15))
def test_books_are_kept(life):
    """The same without pools, so for thousands of lives."""
    nothing = np.zeros((0, BATCH, ROWS, 1, HEAD_DIM), np.float32)
    with jax.default_device(jax.devices("cpu")[0]):  # integers are the same everywhere
        live(jax.tree.map(jnp.array, books()), Model(layers=0), life, lambda seed: nothing)


OPERATIONS = {
    "allocate": ("count",),
    "reserve": ("count",),
    "truncate": ("count",),
    "free": ("flag",),
    "fork": ("count",),
    "adopt": ("flag", "pages", "count"),
    "retain": ("list",),
    "release": ("list",),
}


@pytest.mark.parametrize("name", [*OPERATIONS, "append", "gather", "stats"])
@pytest.mark.parametrize("one_pool", [False, True])
def test_work_does_not_depend_on_the_batch(name, one_pool):
    """No operation goes through sequences one by one: no loop, and as many primitives for all.

    And none makes more numbers of its books than there are pages, or places in the block table.
    """
    pages, row = 1000, 16

    def trace(batch):
        cache = make_cache(batch=batch, one_pool=one_pool, num_pages=pages, max_pages_per_seq=row)
        arguments = {
            "count": np.zeros(batch, np.int32),
            "flag": np.zeros(batch, bool),
            "pages": np.zeros((batch, 2), np.int32),
            "list": np.zeros(2, np.int32),
        }
        operands = [arguments[kind] for kind in OPERATIONS.get(name, ())]
        layer = {"append": (1,), "gather": (1,)}.get(name, ())
        operands += [np.zeros((batch, 2, 1, HEAD_DIM), np.float32)] * (name == "append")
        operation = functools.partial(getattr(PagedKVCache, name), cache, *layer)
        equations = list(all_equations(jax.make_jaxpr(operation)(*operands).jaxpr))
        books = [
            x.aval.size
            for equation in equations
            for x in equation.outvars
            if not jnp.issubdtype(x.aval.dtype, jnp.floating)
        ]
        if name != "gather":  # all tokens are what it is for
            assert max(books, default=0) <= max(pages, batch * row) + batch
        return sorted(equation.primitive.name for equation in equations)

    few = trace(3)
    assert few
    assert not {"scan", "while"} & set(few)
    assert trace(64) == few


def all_equations(jaxpr):
    """Those of functions that they call included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from all_equations(inner)


def test_one_program_for_a_whole_life():
    traces = 0

    def counted(cache, num_tokens, kv):
        nonlocal traces
        traces += 1
        return step(cache, num_tokens, kv)

    cache, advance = make_cache(), jax.jit(counted, donate_argnums=0)
    for i in range(30):
        cache, ok = advance(cache, np.int32((1, 0, i % 9)), random_kv(i, rows=8))
        assert ok.all()
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
    assert ok.all()
    assert cache.num_free == 1
    np.testing.assert_allclose(cache.usage, 6 / 7, rtol=1e-6)
    cache, ok = step(cache, np.int32((65, 1, 1)), kv)  # pages wanted: two, one, one
    assert ok.tolist() == [False, True, False]
    assert cache.num_free == 0
    cache, ok = step(cache, np.int32((0, 63, 0)), kv)  # in the page it has
    assert ok.all()
    cache, ok = step(cache, np.int32((0, 0, 1)), kv)
    assert ok.tolist() == [True, True, False]
    cache, ok = step(free(cache, np.array((False, True, False))), np.int32((0, 0, 65)), kv)
    assert ok.all()
    np.testing.assert_array_equal(cache.cache_seqlens, [192, 0, 129])


@pytest.mark.parametrize("num_tokens", [257, 2**31 - 1, -1, -(2**31)])
def test_a_sequence_that_cannot_be(num_tokens):
    """Longer than its table or negative: refused, also where adding the length would overflow."""
    cache, _ = step(make_cache(num_pages=100), np.int32((7, 7, 7)), random_kv(0))
    reserved, ok = cache.reserve(np.int32((1, num_tokens, 1)))
    assert ok.tolist() == [True, False, True]
    assert_same_bits(reserved, cache)
    cache, ok = step(cache, np.int32((1, num_tokens, 1)), random_kv(1))
    assert ok.tolist() == [True, False, True]
    assert cache.cache_seqlens.tolist() == [8, 7, 8]
    assert cache.num_new.tolist() == [1, 0, 1]
    assert cache.num_used == 3
    cache.check()


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


def test_forks_append_apart():
    """One of two that share all pages takes a page of its own, and the other keeps them."""
    cache, kv = poison(make_cache()), random_kv(0)
    cache, _ = step(cache, np.int32((70, 0, 0)), kv)
    cache = cache.fork(np.int32((-1, 0, -1)))
    assert cache.num_used == 2
    assert cache.block_table[1].tolist() == cache.block_table[0].tolist()
    cache, ok = step(cache, np.int32((0, 1, 0)), random_kv(1))
    assert ok.all()
    assert cache.copy_from.tolist() == [-1, int(cache.block_table[0, 1]), -1]
    assert cache.num_used == 3
    cache, _ = step(cache, np.int32((1, 1, 0)), random_kv(2))
    assert cache.copy_from.tolist() == [-1, -1, -1]  # neither page is shared any more
    for layer in range(LAYERS):
        first, second, _ = np.asarray(cache.gather(layer, 72))
        wanted = kv[layer, 0, :70]
        np.testing.assert_array_equal(first[:70], wanted)
        np.testing.assert_array_equal(second[:70], wanted)
        np.testing.assert_array_equal(first[70], random_kv(2)[layer, 0, 0])
        np.testing.assert_array_equal(second[70], random_kv(1)[layer, 1, 0])
        np.testing.assert_array_equal(second[71], random_kv(2)[layer, 1, 0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_table", [[0, 1, 2, -1], [3, -1, -1, -1], [0, -1, -1, -1]], r"pages \[0, 5\]"),
        ("block_table", [[0, 1, 2, -1], [-1, 3, -1, -1], [5, -1, -1, -1]], r"left .* \[1\]"),
        ("block_table", [[0, 1, 2, -1], [7, -1, -1, -1], [5, -1, -1, -1]], "not of the pool"),
        ("block_table", [[0, 1, 1, -1], [3, -1, -1, -1], [5, -1, -1, -1]], "hold a page twice"),
        ("cache_seqlens", [193, 1, 1], r"lengths are beyond the pages \(sequences \[0\]\)"),
        ("cache_seqlens", [130, 1, -1], r"lengths are beyond the pages \(sequences \[2\]\)"),
        ("page_refs", [1, 1, 2, 1, 0, 1, 0], r"pages are miscounted \(pages \[2\]\)"),
        ("retained", [False] * 6 + [True], r"miscounted \(pages \[6\]\)"),
        ("num_new", [131, 0, 0], "num_new is beyond the lengths"),
        ("copy_from", [-1, 7, -1], "copy_from is not of the pool"),
        ("high_water", 4, "high_water is below what is used"),
    ],
)
def test_check_tells_what_is_wrong(field, value, message):
    good = dataclasses.replace(
        make_cache(),
        block_table=np.int32([[0, 1, 2, -1], [3, -1, -1, -1], [5, -1, -1, -1]]),
        cache_seqlens=np.int32([130, 1, 1]),
        page_refs=np.int32([1, 1, 1, 1, 0, 1, 0]),
        high_water=np.int32(5),
    )
    good.check()
    dtype = getattr(good, field).dtype
    with pytest.raises(RuntimeError, match=message):
        dataclasses.replace(good, **{field: np.array(value, dtype)}).check()


def test_check_tells_of_reserved_pages_that_are_shared():
    cache, _ = make_cache().reserve(np.int32((65, 0, 0)))
    cache.check()
    table = cache.block_table.at[1, :2].set(cache.block_table[0, :2])
    shared = dataclasses.replace(cache, block_table=table, page_refs=cache.page_refs * 2)
    with pytest.raises(RuntimeError, match=r"reserved pages are shared \(sequences \[0, 1\]\)"):
        shared.check()


def test_vmap_over_caches():
    """Independent caches, each with its own pool and free list."""
    caches = jax.tree.map(lambda *x: jnp.stack(x), make_cache(), make_cache())
    num_tokens = np.int32([(1, 0, 70), (64, 65, 3)])
    kv = np.stack([random_kv(0), random_kv(1)])
    caches, ok = jax.jit(jax.vmap(step.__wrapped__))(caches, num_tokens, kv)
    assert ok.all()
    for k in range(2):
        model = Model()
        model.step(num_tokens[k], kv[k])
        model.check(jax.tree.map(lambda x, k=k: x[k], caches))


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
    together = make_cache(num_kv_heads=2, dtype=jnp.bfloat16, one_pool=True)
    assert len(together.pages) == 1
    for name in ("num_layers", "num_pages", "max_seqlen", "num_kv_heads", "dtype", "nbytes"):
        assert getattr(together, name) == getattr(cache, name)
    assert together.num_free == PAGES
    fp8 = make_cache(dtype="fp8")
    assert fp8.is_fp8
    assert not cache.is_fp8
    assert fp8.dtype == jnp.bfloat16
    assert fp8.nbytes == LAYERS * PAGES * 64 * 656


def test_fp8_tokens_are_rounded_and_attended_to():
    """What is appended is what `layout.quantize` makes of it; what is gathered, its numbers."""
    rng = np.random.default_rng(7)
    cache = poison(make_cache(dtype="fp8", one_pool=True))
    kv = rng.standard_normal((LAYERS, BATCH, 90, 1, HEAD_DIM), np.float32).astype(jnp.bfloat16)
    cache, ok = step(cache, np.int32((90, 0, 70)), kv)
    assert ok.all()
    q = rng.standard_normal((BATCH, 1, 4, HEAD_DIM), np.float32).astype(jnp.bfloat16)
    for layer in range(LAYERS):
        bits = np.asarray(layout.quantize(kv[layer]))
        numbers = np.asarray(layout.dequantize(bits))
        view, dense = cache.at_layer(layer), np.asarray(cache.gather(layer, 90))
        for i, length in enumerate((90, 0, 70)):
            rows = np.asarray(view.pages[0])[np.asarray(view.block_table)[i]].reshape(-1, 1, 656)
            np.testing.assert_array_equal(rows[:length], bits[i, :length])
            np.testing.assert_array_equal(dense[i, :length], numbers[i, :length])
            np.testing.assert_array_equal(dense[i, length:], 0)
        pages = np.full((2 * BATCH, PAGE_SIZE, 1, HEAD_DIM), np.nan, jnp.bfloat16)
        for i, length in enumerate((90, 0, 70)):
            pages[2 * i : 2 * i + 2].reshape(-1, 1, HEAD_DIM)[:length] = numbers[i, :length]
        table = np.arange(2 * BATCH, dtype=np.int32).reshape(BATCH, 2)
        expected = oracle.attend(oracle.Problem(q, pages, table, np.int32((90, 0, 70))))
        actual = flash_mla_with_kvcache(
            q, view.pages[0], view.block_table, view.cache_seqlens, is_fp8_kvcache=True
        )
        oracle.assert_matches(actual, expected)


def test_fp8_takes_bfloat16():
    cache, _ = make_cache(dtype="fp8").allocate(np.int32((1, 1, 1)))
    with pytest.raises(ValueError, match=r"kv must be bfloat16 .*float32"):
        cache.append(0, random_kv(0, rows=1)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, "fp8"])
def test_several_kv_heads(dtype):
    cache, model = poison(make_cache(num_kv_heads=2, dtype=dtype)), Model(shape=(2, HEAD_DIM))
    kv = random_kv(0, h_kv=2, dtype=dtype)
    cache, ok = step(cache, np.int32((65, 2, 130)), kv)
    assert ok.all()
    model.step((65, 2, 130), kv)
    model.check(cache)


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
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\), got 2"):
        make_cache(one_pool=True).at_layer(2)
    with pytest.raises(ValueError, match=r"layer must be an int .* needs one pool .*one_pool=True"):
        cache.append(jnp.int32(0), random_kv(0)[0])
    with pytest.raises(ValueError, match="new_kv must have k_cache's dtype float32, got float16"):
        cache.append(0, random_kv(0)[0].astype(np.float16))
    with pytest.raises(ValueError, match="mask must be bool, got int32"):
        cache.free(np.int32((0, 1, 0)))
    with pytest.raises(ValueError, match=r"sources must have shape \[batch\] = \(3,\), got \(2,\)"):
        cache.fork(np.int32((0, 1)))
    with pytest.raises(ValueError, match="seqlens must be integers, got bool"):
        cache.truncate(np.array((True, False, True)))
    mask, seqlens = np.ones(BATCH, bool), np.zeros(BATCH, np.int32)
    with pytest.raises(
        ValueError, match=r"batch=3 and n at most max_pages_per_seq=4, got \(3, 5\)"
    ):
        cache.adopt(mask, np.zeros((3, 5), np.int32), seqlens)
    with pytest.raises(ValueError, match="pages must be integers, got float32"):
        cache.adopt(mask, np.zeros((3, 2), np.float32), seqlens)
    with pytest.raises(ValueError, match=r"pages must have one axis, got shape \(\)"):
        cache.retain(np.int32(1))
    with pytest.raises(ValueError, match="max_seqlen must not be negative, got -1"):
        cache.gather(0, -1)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\), got -1"):
        cache.gather(-1)


def test_empty_batch():
    cache, ok = make_cache(batch=0).allocate(np.zeros(0, np.int32))
    assert ok.shape == (0,)
    cache = cache.append(0, np.zeros((0, 1, 1, HEAD_DIM), np.float32)).free(np.zeros(0, bool))
    assert cache.num_free == PAGES
