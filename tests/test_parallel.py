"""Decoding over meshes of virtual CPU devices, against the oracle on one.

The checks need eight devices. Where there are fewer, one test runs this file in a process that has
them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_fp8
from devices import elsewhere, make_mesh, meshes, run_on_eight_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flashmla_jax import PagedKVCache, cache_append, flash_mla_with_kvcache, parallel


@elsewhere
def test_on_eight_devices() -> None:
    run_on_eight_devices(__file__)


def deal_out(problem: oracle.Problem, batch: int, context: int) -> oracle.Problem:
    """The same tokens, in pages of `batch` times `context` devices, one after the other.

    What is in no token is NaN, or its code; and what is in no table is anything.
    """
    sequences = len(problem.cache_seqlens)
    lengths = np.maximum(problem.cache_seqlens, 0)
    width = max(1, -(-int(lengths.max(initial=0)) // (64 * context))) + 1
    share = sequences // batch
    num_pages = share * width + 2
    rng = np.random.default_rng(int(lengths.sum()))
    poison = 0xFF if problem.k_cache.dtype == np.uint8 else np.nan
    pool = np.full((batch, context, num_pages, *problem.k_cache.shape[1:]), poison)
    table = rng.choice(np.array(oracle.GARBAGE, np.int32), (sequences, width))
    for shard in range(batch):
        free = rng.permutation(num_pages)
        for i in range(shard * share, (shard + 1) * share):
            used = -(-int(lengths[i]) // (64 * context))
            table[i, :used], free = free[:used], free[used:]
            for t in range(int(lengths[i])):
                token = problem.k_cache[problem.block_table[i, t // 64], t % 64]
                local = t // context
                pool[shard, t % context, table[i, local // 64], local % 64] = token
    pool = pool.reshape(-1, *problem.k_cache.shape[1:]).astype(problem.k_cache.dtype)
    return problem.replace(k_cache=pool, block_table=table)


def assert_matches(out: jax.Array, lse: jax.Array, expected: oracle.Expected) -> None:
    """As on one device, but for the float32 rounding of a merged `lse`.

    Which is that of the largest part's, not of the result's: the two may differ in size.
    """
    if out.dtype == np.float32:
        np.testing.assert_allclose(lse, expected.lse, rtol=2e-6, atol=4e-6)
        lse = expected.lse.astype(np.float32)
    oracle.assert_matches((out, lse), expected)


SCHEMES = {
    "heads 1": {"head": 1},
    "heads 2": {"head": 2},
    "heads 4": {"head": 4},
    "heads 8": {"head": 8},
    "batch 1": {"batch": 1},
    "batch 2": {"batch": 2},
    "batch 4": {"batch": 4},
    "batch 8": {"batch": 8},
    "context 1": {"context": 1},
    "context 2": {"context": 2},
    "context 4": {"context": 4},
    "context 8": {"context": 8},
    "batch 2, heads 4": {"batch": 2, "head": 4},
    "context 4, heads 2": {"context": 4, "head": 2},
    "batch 2, context 4": {"batch": 2, "context": 4},
    "batch 2, context 2, heads 2": {"batch": 2, "context": 2, "head": 2},
}


def axes_of(scheme: dict[str, int]) -> dict[str, str]:
    return {f"{name}_axis": name for name in scheme}


@meshes
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("s_q", "causal"), [(1, False), (3, True), (2, False)])
@pytest.mark.parametrize("name", SCHEMES)
def test_matches_the_oracle(name: str, s_q: int, causal: bool, dtype: str) -> None:
    """Lengths include those at which some devices of a context axis see no token."""
    scheme = SCHEMES[name]
    rng = np.random.default_rng(list(f"{name}{s_q}{dtype}".encode()))
    lengths = (300, 0, 1, 5, 64 * 8, 130, 63, 2)
    problem = oracle.make_problem(
        rng, lengths, s_q=s_q, h_q=16, dtype=oracle.DTYPES[dtype], spare_entries=0
    )
    dealt = deal_out(problem, scheme.get("batch", 1), scheme.get("context", 1))
    mesh = make_mesh(**scheme)
    attend = jax.jit(
        functools.partial(
            parallel.flash_mla_with_kvcache, mesh=mesh, causal=causal, **axes_of(scheme)
        )
    )
    out, lse = attend(*dealt)
    assert_matches(out, lse, oracle.attend(problem, 576**-0.5, causal))
    batch, head = (axis if axis in scheme else None for axis in ("batch", "head"))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(batch, None, head)), out.ndim)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, P(batch, head)), lse.ndim)


@meshes
@pytest.mark.parametrize(("s_q", "causal"), [(1, False), (3, True)])
@pytest.mark.parametrize("name", SCHEMES)
def test_fp8_pages(name: str, s_q: int, causal: bool) -> None:
    """Appended over the mesh, and attended to."""
    scheme = SCHEMES[name]
    batch, context = scheme.get("batch", 1), scheme.get("context", 1)
    rng = np.random.default_rng(list(f"{name}{s_q}".encode()))
    lengths = (300, 0, 1, 5, 64 * 8, 130, 63, 2)
    fp8, exact = test_fp8.make_problem(rng, lengths, np.float32, s_q=s_q, h_q=16)
    dealt = deal_out(fp8, batch, context)
    tokens = np.full((8, 64 * 8, 1, 656), 0xFF, np.uint8)
    for i, length in enumerate(lengths):
        for t in range(length):
            tokens[i, t] = fp8.k_cache[fp8.block_table[i, t // 64], t % 64]
    axes = {"mesh": make_mesh(**scheme), **axes_of(scheme)}

    @jax.jit
    def append_then_attend(q, pool, tokens, table, lengths):
        start = jnp.zeros_like(lengths)
        pool = parallel.cache_append(pool, tokens, table, start, lengths, **axes)
        result = parallel.flash_mla_with_kvcache(
            q, pool, table, lengths, is_fp8_kvcache=True, causal=causal, **axes
        )
        return pool, result

    pool, (out, lse) = append_then_attend(
        dealt.q,
        np.full_like(dealt.k_cache, 0xFF),
        tokens,
        dealt.block_table,
        dealt.cache_seqlens,
    )
    np.testing.assert_array_equal(pool, dealt.k_cache)
    assert_matches(out, lse, oracle.attend(exact, 576**-0.5, causal))


@meshes
@pytest.mark.parametrize("name", SCHEMES)
def test_batch_invariant(name: str) -> None:
    """A sequence's result keeps its bits when the others have other lengths."""
    scheme = SCHEMES[name]
    rng = np.random.default_rng(0)
    lengths = np.array((1500, 0, 700, 5, 64 * 8, 3000, 63, 2), np.int32)
    problem = oracle.make_problem(rng, lengths, h_q=16, spare_entries=0)
    dealt = deal_out(problem, scheme.get("batch", 1), scheme.get("context", 1))
    attend = jax.jit(
        functools.partial(
            parallel.flash_mla_with_kvcache,
            mesh=make_mesh(**scheme),
            deterministic="batch_invariant",
            **axes_of(scheme),
        )
    )
    # The CPU kernel is invariant in any case; that the GPU's is asked to be shows here.
    assert "batch_invariant=True" in str(jax.make_jaxpr(attend)(*dealt))
    expected = [np.asarray(x) for x in attend(*dealt)]
    for i in (0, 2, 5):
        others = np.where(np.arange(len(lengths)) == i, lengths, lengths // 3)
        actual = attend(*dealt.replace(cache_seqlens=others.astype(np.int32)))
        for a, b in zip(actual, expected, strict=True):
            assert np.asarray(a)[i].tobytes() == b[i].tobytes()


@meshes
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")
@pytest.mark.parametrize("name", SCHEMES)
def test_gradients(name: str) -> None:
    """Of the queries, as on one device. Sequences without a token give none."""
    scheme = SCHEMES[name]
    rng = np.random.default_rng(list(name.encode()))
    lengths = (300, 0, 1, 5, 64 * 8, 130, 63, 2)
    problem = oracle.make_problem(rng, lengths, h_q=16, dtype=np.float32, spare_entries=0)
    dealt = deal_out(problem, scheme.get("batch", 1), scheme.get("context", 1))
    weights = rng.standard_normal((8, 1, 16, 512), np.float32)
    over_mesh = functools.partial(
        parallel.flash_mla_with_kvcache, mesh=make_mesh(**scheme), **axes_of(scheme)
    )

    def gradient(attend, problem: oracle.Problem) -> jax.Array:
        q, *others = problem
        return jax.jit(jax.grad(lambda q: (attend(q, *others)[0] * weights).sum()))(q)

    expected = gradient(flash_mla_with_kvcache, problem)
    actual = gradient(over_mesh, dealt)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert not np.asarray(actual[1]).any()


@meshes
def test_explicit_mesh() -> None:
    """Arrays that carry their sharding in their type go in as they are, and come out so."""
    rng = np.random.default_rng(5)
    problem = oracle.make_problem(rng, (300, 0, 5, 64), h_q=4, dtype=np.float32, spare_entries=0)
    dealt = deal_out(problem, 2, 2)
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("batch", "context"), axis_types=explicit)
    specs = (P("batch"), P(("batch", "context")), P("batch"), P("batch"))
    operands = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(dealt, specs, strict=True)
    ]
    attend = functools.partial(
        parallel.flash_mla_with_kvcache, mesh=mesh, batch_axis="batch", context_axis="context"
    )
    compiled = jax.jit(attend).lower(*operands).compile()
    assert "all-gather" not in compiled.as_text()
    out, lse = compiled(*operands)
    assert jax.typeof(out).sharding.spec[0] == "batch"
    assert_matches(out, lse, oracle.attend(problem))


@meshes
def test_kv_heads_are_divided_with_query_heads() -> None:
    rng = np.random.default_rng(3)
    problem = oracle.make_problem(rng, (100, 3), h_q=12, h_kv=4, dtype=np.float32)
    attend = functools.partial(
        parallel.flash_mla_with_kvcache, mesh=make_mesh(head=2), head_axis="head"
    )
    oracle.assert_matches(jax.jit(attend)(*problem), oracle.attend(problem))


@meshes
def test_pages_that_do_not_exist_give_nan_wherever_they_are_missing() -> None:
    rng = np.random.default_rng(4)
    problem = oracle.make_problem(rng, (600, 50), h_q=4, dtype=np.float32)
    dealt = deal_out(problem, 1, 4)
    dealt.block_table[0, 1] = -5
    attend = functools.partial(
        parallel.flash_mla_with_kvcache, mesh=make_mesh(context=4), context_axis="context"
    )
    out, lse = jax.jit(attend)(*dealt)
    assert np.isnan(out[0]).all()
    assert np.isnan(lse[0]).all()
    expected = oracle.attend(problem)
    np.testing.assert_allclose(out[1], expected.out[1], atol=1e-5)


@meshes
@pytest.mark.parametrize("name", SCHEMES)
def test_append_then_attend(name: str) -> None:
    """Tokens appended over a mesh are where attention over it looks for them."""
    scheme = SCHEMES[name]
    batch, context = scheme.get("batch", 1), scheme.get("context", 1)
    rng = np.random.default_rng(list(name.encode()))
    before = np.array([0, 1, 62, 63, 127, 200, 7, 300], np.int32)
    count = np.array([5, 0, 9, 9, 1, 70, 3, 2], np.int32)
    problem = oracle.make_problem(
        rng, tuple(before + count), h_q=8, dtype=np.float32, spare_entries=0
    )
    dealt = deal_out(problem, batch, context)
    new_kv = np.full((8, 70, 1, 576), np.nan, np.float32)
    pool = dealt.k_cache.reshape(batch, context, -1, *dealt.k_cache.shape[1:]).copy()
    for i in range(8):
        for j in range(count[i]):  # take the new tokens out of the pool
            t = int(before[i]) + j
            page, row = dealt.block_table[i, t // context // 64], t // context % 64
            place = i // (8 // batch), t % context, page, row
            new_kv[i, j] = pool[place]
            pool[place] = np.nan
    mesh = make_mesh(**scheme)
    append = functools.partial(parallel.cache_append, mesh=mesh, **axes_of(scheme))
    appended = jax.jit(append)(
        pool.reshape(dealt.k_cache.shape), new_kv, dealt.block_table, before, count
    )
    np.testing.assert_array_equal(appended, dealt.k_cache)


@meshes
@pytest.mark.parametrize("name", ["batch 4", "context 4", "batch 2, context 4"])
def test_caches_of_the_devices(name: str) -> None:
    """Each device allocates pages for its own tokens, appends and attends; only results travel."""
    scheme = SCHEMES[name]
    batch, context = (axis if axis in scheme else None for axis in ("batch", "context"))
    mesh = make_mesh(**scheme)
    local_batch, steps = 8 // scheme.get("batch", 1), 3
    rng = np.random.default_rng(list(name.encode()))
    kv = rng.standard_normal((steps, 8, 70, 1, 576), np.float32)
    q = rng.standard_normal((8, 1, 4, 576), np.float32)
    count = rng.integers(0, 71, (steps, 8)).astype(np.int32)
    devices = P(tuple(axis for axis in (batch, context) if axis))
    each = P(batch)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(), out_specs=devices)
    def create() -> PagedKVCache:
        cache = PagedKVCache.create(
            num_layers=1,
            num_pages=4 * local_batch,
            batch=local_batch,
            max_pages_per_seq=4,
            dtype=jnp.float32,
        )
        cache = jax.lax.pcast(cache, tuple(scheme), to="varying")
        return dataclasses.replace(cache, high_water=cache.high_water[None])

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(devices, each, each, each, each),
        out_specs=(devices, each, devices),
    )
    def step(cache, kv, q, before, count):
        cache = dataclasses.replace(cache, high_water=cache.high_water[0])
        if context is None:
            cache, ok = cache.allocate(count)
            pool = cache_append(cache.pages[0], kv, cache.block_table, before, count)
            out, _ = flash_mla_with_kvcache(q, pool, cache.block_table, before + count)
        else:
            own = functools.partial(parallel.context_length, axis_name=context)
            cache, ok = cache.allocate(own(before + count) - own(before))
            operands = cache.pages[0], kv, cache.block_table, before, count
            pool = parallel.context_append(*operands, axis_name=context)
            out, _ = parallel.context_attention(
                q, pool, cache.block_table, before + count, axis_name=context
            )
        cache = dataclasses.replace(cache, pages=(pool,), high_water=cache.high_water[None])
        return cache, out, ok

    cache, before = jax.jit(create)(), np.zeros(8, np.int32)
    step = jax.jit(step, donate_argnums=0)
    compiled = step.lower(cache, kv[0], q, before, count[0]).compile()
    for operation in ("all-gather", "all-to-all", "collective-permute"):
        assert operation not in compiled.as_text()
    pages = 4 * local_batch
    assert not re.search(rf"f32\[{pages},64,1,576\]\S* copy\(", compiled.as_text())
    for i in range(steps):
        cache, out, ok = step(cache, kv[i], q, before, count[i])
        assert np.all(ok)
        before = before + count[i]
    tokens = [np.concatenate([kv[i, b, : count[i, b], 0] for i in range(steps)]) for b in range(8)]
    expected = []
    for b in range(8):
        pool = np.zeros((4, 64, 1, 576), np.float32)
        pool.reshape(-1, 576)[: len(tokens[b])] = tokens[b]
        table, length = np.arange(4, dtype=np.int32)[None], np.array([len(tokens[b])], np.int32)
        expected.append(oracle.attend(oracle.Problem(q[b : b + 1], pool, table, length)).out)
    np.testing.assert_allclose(out, np.concatenate(expected), rtol=1e-4, atol=1e-5)


@meshes
def test_threads_of_different_devices() -> None:
    """Two Python threads, each with compiled steps on a device of its own."""
    problems = [
        oracle.make_problem(np.random.default_rng(i), (700, 80), h_q=8, dtype=np.float32)
        for i in range(2)
    ]
    attend = jax.jit(flash_mla_with_kvcache)

    def run(i: int) -> list[tuple[jax.Array, jax.Array]]:
        operands = jax.device_put(tuple(problems[i]), jax.devices()[i])
        return [jax.block_until_ready(attend(*operands)) for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        results = list(threads.map(run, range(2)))
    for i, problem in enumerate(problems):
        expected = oracle.attend(problem)
        for out, lse in results[i]:
            assert out.devices() == {jax.devices()[i]}
            oracle.assert_matches((out, lse), expected)


# --- What moves between devices, and what is copied --------------------------------------------


def compile_on(mesh, function, specs, arrays, **options):
    shaped = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(arrays, specs, strict=True)
    ]
    return jax.jit(function, **options).lower(*shaped).compile()


@meshes
@pytest.mark.parametrize("name", SCHEMES)
def test_only_results_travel(name: str) -> None:
    scheme = SCHEMES[name]
    axes = axes_of(scheme)
    mesh = make_mesh(**scheme)
    batch, context, head = (
        axis if axis in scheme else None for axis in ("batch", "context", "head")
    )
    pages = tuple(axis for axis in (batch, context) if axis)
    q = np.zeros((8, 1, 16, 576), jnp.bfloat16)
    pool = np.zeros((64, 64, 1, 576), jnp.bfloat16)
    table, lengths = np.zeros((8, 4), np.int32), np.zeros(8, np.int32)
    specs = (P(batch, None, head), P(pages or None), P(batch), P(batch))
    attend = functools.partial(parallel.flash_mla_with_kvcache, mesh=mesh, **axes)
    text = compile_on(mesh, attend, specs, (q, pool, table, lengths)).as_text()
    for operation in ("all-gather", "all-to-all", "collective-permute"):
        assert operation not in text
    if context is None:
        assert "all-reduce" not in text

    append = functools.partial(parallel.cache_append, mesh=mesh, **axes)
    operands = (pool, np.zeros((8, 2, 1, 576), jnp.bfloat16), table, lengths, lengths)
    specs = (specs[1], P(batch), P(batch), P(batch), P(batch))
    compiled = compile_on(mesh, append, specs, operands, donate_argnums=0)
    for operation in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert operation not in compiled.as_text()
    local = 64 // (scheme.get("batch", 1) * scheme.get("context", 1))
    assert not re.search(rf"bf16\[{local},64,1,576\]\S* copy\(", compiled.as_text())
    assert compiled.memory_analysis().alias_size_in_bytes >= local * 64 * 576 * 2


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"batch_axis": "y"}, "batch_axis 'y' is not an axis of the mesh"),
        ({"batch_axis": "x", "head_axis": "x"}, "head_axis 'x' is already used"),
    ],
)
def test_axes(axes, message) -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    problem = oracle.make_problem(np.random.default_rng(0), (3,), h_q=1)
    with pytest.raises(ValueError, match=message):
        parallel.flash_mla_with_kvcache(*problem, mesh=mesh, **axes)
    rows = np.zeros((1, 1, 1, 576), problem.k_cache.dtype)
    zero = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match=message):
        parallel.cache_append(
            problem.k_cache, rows, problem.block_table, zero, zero, mesh=mesh, **axes
        )


def test_ranks() -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k_cache, *rest = oracle.make_problem(np.random.default_rng(0), (3,), h_q=1)
    with pytest.raises(ValueError, match=r"q must be \[batch, s_q, h_q, 576\], got shape \(1, 1"):
        parallel.flash_mla_with_kvcache(q[0], k_cache, *rest, mesh=mesh)
    with pytest.raises(ValueError, match=r"k_cache must be \[num_pages, 64, h_kv, n\]"):
        parallel.flash_mla_with_kvcache(q, k_cache[0], *rest, mesh=mesh)
    zero = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match=r"new_kv must be \[batch, num_tokens, h_kv, n\]"):
        parallel.cache_append(k_cache, q[0], rest[0], zero, zero, mesh=mesh)


@meshes
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"batch_axis": "x"}, r"batch = 3 does not divide among the 2 devices of batch_axis"),
        ({"head_axis": "x"}, r"h_q = 15 does not divide among the 2 devices of head_axis"),
        ({"context_axis": "x"}, r"num_pages = 7 does not divide among the 2 devices"),
    ],
)
def test_sizes(axes, message) -> None:
    mesh = make_mesh(x=2)
    q = np.zeros((3, 1, 15, 576), np.float32)
    pool = np.zeros((7, 64, 1, 576), np.float32)
    table, lengths = np.zeros((3, 1), np.int32), np.zeros(3, np.int32)
    with pytest.raises(ValueError, match=message):
        parallel.flash_mla_with_kvcache(q, pool, table, lengths, mesh=mesh, **axes)
    with pytest.raises(ValueError, match=r"h_kv = 3 does not divide"):
        parallel.flash_mla_with_kvcache(
            np.zeros((2, 1, 6, 576), np.float32),
            np.zeros((2, 64, 3, 576), np.float32),
            table[:2],
            lengths[:2],
            mesh=mesh,
            head_axis="x",
        )
