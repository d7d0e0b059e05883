"""The ops under plain `jit`, on arrays that are divided over a mesh of virtual CPU devices.

Results are the oracle's, and the compiled programs are read: nothing travels between devices, no
pool is copied, and each device has its share of the work. The checks need eight devices. Where
there are fewer, one test runs this file in a process that has them.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from devices import elsewhere, make_mesh, meshes, run_on_eight_devices
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flashmla_jax import cache_append, flash_mla_with_kvcache
from flashmla_jax.cache.paged import PagedKVCache

LENGTHS = (300, 0, 1, 5, 64 * 4, 130, 63, 2)
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")
HLO_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


@elsewhere
def test_on_eight_devices() -> None:
    run_on_eight_devices(__file__)


def put(mesh: Mesh, arrays: Any, specs: Sequence[P]) -> list[jax.Array]:
    return [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]


def collectives(compiled: Any) -> list[str]:
    pattern = rf" ({'|'.join(COLLECTIVES)})"
    return [line for line in compiled.as_text().splitlines() if re.search(pattern, line)]


def pool_copies(compiled: Any, pool: Any) -> list[str]:
    """The instructions that copy an array of the pool's pages, with any number of KV heads."""
    name = HLO_NAMES[str(pool.dtype)]
    pattern = rf"= \(?{name}\[(\d+,)*{pool.shape[-4]},64,\d+,576\]\S* copy(-start)?\("
    return [line for line in compiled.as_text().splitlines() if re.search(pattern, line)]


def assert_sharded(x: jax.Array, mesh: Mesh, spec: P) -> None:
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (x.sharding, spec)
    if mesh.explicit_axes:
        assert jax.typeof(x).sharding.spec == P(*spec, *[None] * (x.ndim - len(spec)))


# --- Attention ----------------------------------------------------------------------------------

# Axes of the mesh for batch and heads, its sizes, KV heads, and how pools are divided.
CASES = {
    "heads": (None, "h", {"h": 8}, 1, P()),
    "batch": ("b", None, {"b": 8}, 1, P()),
    "both": ("b", "h", {"b": 2, "h": 4}, 1, P()),
    "heads over two axes": (None, ("x", "y"), {"x": 2, "y": 4}, 1, P()),
    "heads over two axes, turned": (None, ("y", "x"), {"x": 2, "y": 4}, 1, P()),
    "batch over two axes": (("x", "y"), None, {"x": 4, "y": 2}, 1, P()),
    "an axis that divides nothing": (None, "h", {"b": 2, "h": 4}, 1, P()),
    "KV heads": ("b", "h", {"b": 2, "h": 4}, 4, P(None, None, "h")),
    "KV heads over some of the axes": (None, ("x", "y"), {"x": 2, "y": 4}, 2, P(None, None, "x")),
    "nothing": (None, None, {"h": 8}, 1, P()),
}


@meshes
@kinds
@pytest.mark.parametrize(("s_q", "causal", "dtype"), [(1, False, "f32"), (3, True, "bf16")])
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, s_q: int, causal: bool, dtype: str, kind: AxisType) -> None:
    batch, head, sizes, h_kv, pool = CASES[name]
    rng = np.random.default_rng(list(f"{name}{s_q}{kind}".encode()))
    problem = oracle.make_problem(
        rng, LENGTHS, s_q=s_q, h_q=16, h_kv=h_kv, dtype=oracle.DTYPES[dtype]
    )
    mesh = make_mesh(kind, **sizes)
    arrays = put(mesh, problem, (P(batch, None, head), pool, P(batch), P(batch)))
    attend = jax.jit(lambda *x: flash_mla_with_kvcache(*x, causal=causal))
    compiled = attend.lower(*arrays).compile()
    assert collectives(compiled) == []
    assert pool_copies(compiled, problem.k_cache) == []

    out, lse = attend(*arrays)
    oracle.assert_matches((out, lse), oracle.attend(problem, causal=causal))
    assert_sharded(out, mesh, P(batch, None, head))
    assert_sharded(lse, mesh, P(batch, head))

    # Each device has its share of sequences and heads, and of KV heads that are divided.
    names = [(x,) if isinstance(x, str) else x or () for x in (batch, head)]
    parts = [int(np.prod([sizes[x] for x in each])) for each in names]
    local = (len(LENGTHS) // parts[0], s_q, 16 // parts[1], 512)
    call = re.search(r"custom-call\(.*flashmla_dense_decode", compiled.as_text())
    assert call
    result = f"{HLO_NAMES[str(out.dtype)]}[{','.join(map(str, local))}]"
    assert re.search(rf"\({re.escape(result)}\S*, [^)]*\) custom-call\(", compiled.as_text())


@meshes
@kinds
def test_outside_jit(kind: AxisType) -> None:
    problem = oracle.make_problem(np.random.default_rng(1), LENGTHS, dtype=np.float32)
    mesh = make_mesh(kind, b=2, h=4)
    specs = (P("b", None, "h"), P(), P("b"), P("b"))
    out, lse = flash_mla_with_kvcache(*put(mesh, problem, specs))
    oracle.assert_matches((out, lse), oracle.attend(problem))
    assert_sharded(out, mesh, P("b", None, "h"))


@meshes
def test_results_that_are_to_be_whole() -> None:
    """Work is divided as queries are; then results travel."""
    problem = oracle.make_problem(np.random.default_rng(15), LENGTHS, dtype=np.float32)
    mesh = make_mesh(b=2, h=4)
    arrays = put(mesh, problem, (P("b", None, "h"), P(), P("b"), P("b")))
    attend = jax.jit(flash_mla_with_kvcache, out_shardings=NamedSharding(mesh, P()))
    text = attend.lower(*arrays).compile().as_text()
    assert re.search(r"\(f32\[4,1,4,512\]\S*, [^)]*\) custom-call\(", text)
    result = attend(*arrays)
    oracle.assert_matches(result, oracle.attend(problem))
    assert_sharded(result[0], mesh, P())


@meshes
@kinds
def test_a_table_that_is_whole(kind: AxisType) -> None:
    """Or one that is divided, for queries that are not: each device takes its part."""
    problem = oracle.make_problem(np.random.default_rng(2), LENGTHS, dtype=np.float32)
    mesh = make_mesh(kind, b=4, h=2)
    for specs in ((P("b", None, "h"), P(), P(), P()), (P(None, None, "h"), P(), P("b"), P())):
        arrays = put(mesh, problem, specs)
        attend = jax.jit(flash_mla_with_kvcache)
        assert collectives(attend.lower(*arrays).compile()) == []
        out, lse = attend(*arrays)
        oracle.assert_matches((out, lse), oracle.attend(problem))
        assert_sharded(out, mesh, P("b", None, "h"))


@meshes
def test_inside_a_program() -> None:
    """Shardings that XLA infers, through the loop of a scan, and within `jax.set_mesh`."""
    problem = oracle.make_problem(np.random.default_rng(3), LENGTHS, dtype=np.float32)
    mesh = make_mesh(b=2, h=4)

    def program(q: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        def layer(q: jax.Array, _: None) -> tuple[jax.Array, None]:
            out, _ = flash_mla_with_kvcache(q, *rest)
            return q.at[..., :512].add(out), None

        q, _ = jax.lax.scan(layer, q * 0.5, None, length=2)
        return flash_mla_with_kvcache(q, *rest)

    expected = problem.replace(q=problem.q * 0.5)
    for _ in range(2):
        q = expected.q.copy()
        q[..., :512] += oracle.attend(expected).out
        expected = expected.replace(q=q)
    arrays = put(mesh, problem, (P("b", None, "h"), P(), P("b"), P("b")))
    with jax.set_mesh(mesh):
        assert collectives(jax.jit(program).lower(*arrays).compile()) == []
        out, lse = jax.jit(program)(*arrays)
    np.testing.assert_allclose(lse, oracle.attend(expected).lse, rtol=1e-5, atol=1e-5)
    assert_sharded(out, mesh, P("b", None, "h"))


@meshes
@pytest.mark.parametrize("manual", ["b", "h"])
def test_beside_shard_map(manual: str) -> None:
    """Divided by `shard_map` over one axis of the mesh, and by XLA over the other."""
    problem = oracle.make_problem(np.random.default_rng(4), LENGTHS, dtype=np.float32)
    mesh = make_mesh(b=2, h=4)
    arrays = put(mesh, problem, (P("b", None, "h"), P(), P("b"), P("b")))
    rows = P("b") if manual == "b" else P(None, None, "h")
    each = P("b") if manual == "b" else P()
    attend = jax.jit(
        jax.shard_map(
            lambda *x: flash_mla_with_kvcache(*x)[0],
            mesh=mesh,
            in_specs=(rows, P(), each, each),
            out_specs=rows,
            axis_names={manual},
        )
    )
    assert collectives(attend.lower(*arrays).compile()) == []
    out = attend(*arrays)
    np.testing.assert_allclose(out, oracle.attend(problem).out, rtol=1e-4, atol=1e-5)
    assert_sharded(out, mesh, P("b", None, "h"))


@meshes
@pytest.mark.parametrize("check_vma", [True, False])
def test_in_nested_shard_maps(check_vma: bool) -> None:
    problem = oracle.make_problem(np.random.default_rng(18), LENGTHS, dtype=np.float32)
    mesh = make_mesh(b=2, h=4)
    arrays = put(mesh, problem, (P("b", None, "h"), P(), P("b"), P("b")))

    def inner(*x: jax.Array) -> jax.Array:
        rows = P(None, None, "h")
        return jax.shard_map(
            lambda *x: flash_mla_with_kvcache(*x)[0],
            in_specs=(rows, P(), P(), P()),
            out_specs=rows,
            axis_names={"h"},
            check_vma=check_vma,
        )(*x)

    outer = jax.shard_map(
        inner,
        mesh=mesh,
        in_specs=(P("b"), P(), P("b"), P("b")),
        out_specs=P("b"),
        axis_names={"b"},
        check_vma=check_vma,
    )
    out = jax.jit(outer)(*arrays)
    np.testing.assert_allclose(out, oracle.attend(problem).out, rtol=1e-4, atol=1e-5)


# --- vmap ---------------------------------------------------------------------------------------


@meshes
@kinds
@pytest.mark.parametrize("over", [None, "m"])
def test_vmap_of_queries(over: str | None, kind: AxisType) -> None:
    """The mapped axis and the others are divided, or not, independently of each other."""
    rng = np.random.default_rng(5)
    problem = oracle.make_problem(rng, LENGTHS, dtype=np.float32)
    q = rng.standard_normal((2, 4, *problem.q.shape), np.float32)
    mesh = make_mesh(kind, m=2, b=2, h=2)
    specs = (P(None, over, "b", None, "h"), P(), P("b"), P("b"))
    arrays = put(mesh, problem.replace(q=q), specs)
    mapped = jax.vmap(flash_mla_with_kvcache, (0, None, None, None))
    attend = jax.jit(jax.vmap(mapped, (0, None, None, None)))
    assert collectives(attend.lower(*arrays).compile()) == []
    out, lse = attend(*arrays)
    assert_sharded(out, mesh, P(None, over, "b", None, "h"))
    out, lse = np.asarray(out), np.asarray(lse)
    for i, j in np.ndindex(2, 4):
        expected = oracle.attend(problem.replace(q=q[i, j]))
        oracle.assert_matches((out[i, j], lse[i, j]), expected)


@meshes
def test_many_mapped_axes() -> None:
    """More axes than there are letters for Shardy's factors."""
    problem = oracle.make_problem(np.random.default_rng(16), (70, 5), dtype=np.float32)
    depth = 9
    q = problem.q.reshape(*[1] * depth, *problem.q.shape)
    rows, each = P(*[None] * depth, "b", None, "h"), P("b")
    mapped = flash_mla_with_kvcache
    for _ in range(depth):
        mapped = jax.vmap(mapped, (0, None, None, None))
    mesh = make_mesh(b=2, h=4)
    arrays = put(mesh, problem.replace(q=q), (rows, P(), each, each))
    assert collectives(jax.jit(mapped).lower(*arrays).compile()) == []
    out, lse = jax.jit(mapped)(*arrays)
    actual = np.asarray(out).reshape(2, 1, 16, 512), np.asarray(lse).reshape(2, 16, 1)
    oracle.assert_matches(actual, oracle.attend(problem))


@meshes
@kinds
def test_vmap_of_pools(kind: AxisType) -> None:
    """A pool for each device, with pages of its own, is `vmap` over an axis that is divided."""
    rng = np.random.default_rng(6)
    lengths = [rng.permutation(LENGTHS).tolist() for _ in range(4)]
    problems = [oracle.make_problem(rng, x, dtype=np.float32) for x in lengths]
    stacked = [np.stack(x) for x in zip(*problems, strict=True)]
    mesh = make_mesh(kind, b=4, h=2)
    arrays = put(mesh, stacked, (P("b", None, None, "h"), P("b"), P("b"), P("b")))
    attend = jax.jit(jax.vmap(flash_mla_with_kvcache))
    compiled = attend.lower(*arrays).compile()
    assert collectives(compiled) == []
    assert pool_copies(compiled, stacked[1]) == []
    out, lse = attend(*arrays)
    assert_sharded(out, mesh, P("b", None, None, "h"))
    for i, problem in enumerate(problems):
        oracle.assert_matches((np.asarray(out)[i], np.asarray(lse)[i]), oracle.attend(problem))


@meshes
@kinds
def test_vmap_of_appends_in_place(kind: AxisType) -> None:
    """Several pools a device, which stay where they are: also without a mesh."""
    operands, expected = append_problem(1)
    count = 8
    stacked = [np.stack([x] * count) for x in operands]
    stacked[1] = stacked[1] * np.arange(1, count + 1, dtype=np.float32).reshape(-1, 1, 1, 1, 1)
    append = jax.jit(jax.vmap(cache_append), donate_argnums=0)
    written = expected != operands[0]
    for arrays in (
        [jnp.array(x) for x in stacked],
        put(make_mesh(kind, b=4, h=2), stacked, [P("b")] * 5),
    ):
        compiled = append.lower(*arrays).compile()
        assert collectives(compiled) == []
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < operands[0].nbytes
        arrays = [jnp.copy(x) for x in arrays]  # JAX's own buffers, not NumPy's
        places = [x.data.unsafe_buffer_pointer() for x in arrays[0].addressable_shards]
        pools = append(*arrays)
        assert [x.data.unsafe_buffer_pointer() for x in pools.addressable_shards] == places
        for i, pool in enumerate(np.asarray(pools)):
            np.testing.assert_array_equal(pool, np.where(written, expected * (i + 1), expected))


# --- Derivatives ----------------------------------------------------------------------------------


@meshes
@kinds
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")
def test_gradients(kind: AxisType) -> None:
    rng = np.random.default_rng(7)
    problem = oracle.make_problem(rng, (300, 1, 130, 63), dtype=np.float32)
    weight = rng.standard_normal((4, 1, 16, 512), np.float32)

    def loss(q: jax.Array, *rest: jax.Array) -> jax.Array:
        *arrays, weight = rest
        return (flash_mla_with_kvcache(q, *arrays)[0] * weight).sum()

    expected = jax.grad(loss)(*problem, weight)
    mesh = make_mesh(kind, b=2, h=4)
    rows = P("b", None, "h")
    arrays = put(mesh, (*problem, weight), (rows, P(), P("b"), P("b"), rows))
    gradient = jax.jit(jax.grad(loss))
    assert collectives(gradient.lower(*arrays).compile()) == []
    np.testing.assert_allclose(gradient(*arrays), expected, rtol=1e-4, atol=1e-5)


@meshes
@kinds
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")
def test_gradients_of_pools(kind: AxisType) -> None:
    """Of pools of the devices' own: nothing of their size travels."""
    rng = np.random.default_rng(19)
    problems = [oracle.make_problem(rng, (70, 130), h_q=4, dtype=np.float32) for _ in range(4)]
    q, pools, tables, lengths = (np.stack(x) for x in zip(*problems, strict=True))
    pools = np.nan_to_num(pools)

    def loss(pools: jax.Array, q: jax.Array, *rest: jax.Array) -> jax.Array:
        return (jax.vmap(flash_mla_with_kvcache)(q, pools, *rest)[0] ** 2).sum()

    expected = jax.grad(loss)(pools, q, tables, lengths)
    mesh = make_mesh(kind, b=4)
    arrays = put(mesh, (pools, q, tables, lengths), [P("b")] * 4)
    gradient = jax.jit(jax.grad(loss))
    lines = collectives(gradient.lower(*arrays).compile())
    assert all(",576]" not in line for line in lines)
    actual = gradient(*arrays)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert_sharded(actual, mesh, P("b"))


# --- Appending ------------------------------------------------------------------------------------


def append_problem(h_kv: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Operands of cache_append, and the pool afterwards."""
    rng = np.random.default_rng(8)
    pool = rng.standard_normal((24, 64, h_kv, 576), np.float32)
    new = rng.standard_normal((8, 2, h_kv, 576), np.float32)
    table = rng.permutation(24).reshape(8, 3).astype(np.int32)
    start = rng.integers(0, 3 * 64 - 2, 8).astype(np.int32)
    count = np.array([2, 1, 0, 2, 2, 1, 2, 2], np.int32)
    expected = pool.copy()
    for i, j in np.ndindex(8, 2):
        if j < count[i]:
            t = start[i] + j
            expected[table[i, t // 64], t % 64] = new[i, j]
    return [pool, new, table, start, count], expected


@meshes
@kinds
@pytest.mark.parametrize(("h_kv", "heads"), [(1, None), (4, "h")])
def test_append_in_place(h_kv: int, heads: str | None, kind: AxisType) -> None:
    operands, expected = append_problem(h_kv)
    mesh = make_mesh(kind, b=2, h=4)
    spec = P(None, None, heads)
    arrays = put(mesh, operands, (spec, spec, P(), P(), P()))
    append = jax.jit(cache_append, donate_argnums=0)
    compiled = append.lower(*arrays).compile()
    assert collectives(compiled) == []
    assert pool_copies(compiled, operands[0]) == []
    shard = operands[0].nbytes // (4 if heads else 1)
    assert compiled.memory_analysis().alias_size_in_bytes >= shard
    pool = append(*arrays)
    np.testing.assert_array_equal(pool, expected)
    assert_sharded(pool, mesh, spec)


@meshes
def test_tokens_travel_to_a_pool_that_is_whole() -> None:
    """New tokens that are divided go to every device; the pool stays where it is."""
    operands, expected = append_problem(1)
    arrays = put(make_mesh(b=8), operands, (P(), *[P("b")] * 4))
    explicit = put(make_mesh(AxisType.Explicit, b=8), operands, (P(), *[P("b")] * 4))
    with pytest.raises(ValueError, match=r"new_kv is sharded along axis 0 \(batch\)"):
        jax.eval_shape(cache_append, *explicit)
    explicit[1] = put(make_mesh(AxisType.Explicit, b=8), operands[1:2], [P()])[0]
    np.testing.assert_array_equal(jax.jit(cache_append)(*explicit), expected)
    append = jax.jit(cache_append, donate_argnums=0)
    with pytest.warns(UserWarning, match=r"new_kv is sharded along axis 0.* XLA gathers it"):
        compiled = append.lower(*arrays).compile()
    assert pool_copies(compiled, operands[0]) == []
    assert all("24,64,1,576" not in line for line in collectives(compiled))
    np.testing.assert_array_equal(append(*arrays), expected)


@meshes
def test_steps_of_a_cache() -> None:
    """Steps in one program, heads divided: nothing travels, no pool is copied."""
    layers, batch, steps = 2, 8, 3
    mesh = make_mesh(h=8)
    whole = NamedSharding(mesh, P())
    cache = PagedKVCache.create(
        num_layers=layers, num_pages=16, batch=batch, max_pages_per_seq=2, dtype=jnp.float32
    )
    rng = np.random.default_rng(9)
    kv = rng.standard_normal((steps, batch, 1, 1, 576), np.float32)
    q = rng.standard_normal((steps, batch, 1, 16, 576), np.float32)

    def run(cache: PagedKVCache, kv: jax.Array, q: jax.Array) -> tuple[PagedKVCache, jax.Array]:
        def step(cache: PagedKVCache, new: tuple[jax.Array, jax.Array]) -> Any:
            kv, q = new
            cache, _ = cache.allocate(jnp.ones(batch, jnp.int32))
            for layer in range(layers):
                cache = cache.append(layer, kv * (layer + 1))
            out, _ = flash_mla_with_kvcache(
                q, cache.pages[1], cache.block_table, cache.cache_seqlens
            )
            return cache, out

        return jax.lax.scan(step, cache, (kv, q))

    _, expected = jax.jit(run)(cache, kv, q)
    q_sharding = NamedSharding(mesh, P(None, None, None, "h"))
    arguments = (
        jax.device_put(cache, whole),
        jax.device_put(kv, whole),
        jax.device_put(q, q_sharding),
    )
    compiled = jax.jit(run, donate_argnums=0).lower(*arguments).compile()
    assert collectives(compiled) == []
    assert pool_copies(compiled, cache.pages[0]) == []
    _, out = compiled(*arguments)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    assert_sharded(out, mesh, P(None, None, None, "h"))


@meshes
@kinds
def test_a_cache_of_divided_sequences(kind: AxisType) -> None:
    """Tables and lengths along the batch: page ids are counted over all of it."""
    rng = np.random.default_rng(22)
    batch, steps = 8, 3
    create = functools.partial(
        PagedKVCache.create,
        num_layers=1,
        num_pages=20,
        batch=batch,
        max_pages_per_seq=4,
        dtype=jnp.float32,
    )
    kv = rng.standard_normal((steps, batch, 70, 1, 576), np.float32)
    q = rng.standard_normal((batch, 1, 16, 576), np.float32)
    count = rng.integers(0, 71, (steps, batch)).astype(np.int32)
    mask = rng.random((steps, batch)) < 0.3
    sources = rng.integers(-1, batch, (steps, batch)).astype(np.int32)
    seqlens = rng.integers(0, 256, (steps, batch)).astype(np.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        cache: PagedKVCache, kv: Any, q: Any, count: Any, mask: Any, sources: Any, seqlens: Any
    ) -> Any:
        cache = cache.free(mask).fork(sources).truncate(seqlens)
        cache = cache.retain(jnp.arange(2)).release(jnp.arange(2))
        cache, _ = cache.adopt(mask, cache.block_table[:, :1], count % 64)
        cache, _ = cache.reserve(count)
        cache, ok = cache.allocate(count)
        cache = cache.append(0, kv)
        out, _ = flash_mla_with_kvcache(q, cache.pages[0], cache.block_table, cache.cache_seqlens)
        return cache, (out, ok)

    def gather(cache: PagedKVCache) -> jax.Array:
        return cache.gather(0, 100)

    mesh = make_mesh(kind, b=4, h=2)
    along, whole = P("b"), P()
    places = PagedKVCache(
        pages=(whole,),
        block_table=along,
        cache_seqlens=along,
        page_refs=whole,
        retained=whole,
        num_new=along,
        copy_from=along,
        high_water=whole,
    )
    cache, one = create(), create()
    cache = jax.tree.map(lambda x, p: jax.device_put(x, NamedSharding(mesh, p)), cache, places)
    for i in range(steps):
        operands = kv[i], q, count[i], mask[i], sources[i], seqlens[i]
        specs = whole, P("b", None, "h"), along, along, along, along
        cache, (out, ok) = step(cache, *put(mesh, operands, specs))
        one, (wanted, wanted_ok) = step(one, *operands)
        np.testing.assert_array_equal(ok, wanted_ok)
        np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-6)
        assert_sharded(out, mesh, P("b", None, "h"))
        assert_sharded(cache.block_table, mesh, along)
        for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(a, b)
        cache.check()
        np.testing.assert_array_equal(jax.jit(gather)(cache), gather(one))


# --- What cannot be divided -----------------------------------------------------------------------


@meshes
@kinds
@pytest.mark.parametrize(
    ("spec", "axis"),
    [
        (P("d"), r"axis 0 \(num_pages\)"),
        (P(None, "d"), r"axis 1 \(64\)"),
        (P(None, None, None, "d"), r"axis 3 \((576|n)\)"),
    ],
)
def test_pools_that_cannot_be_divided(spec: P, axis: str, kind: AxisType) -> None:
    """Refused, with the axis and what to do: gathering a pool is not what anybody wants."""
    problem = oracle.make_problem(np.random.default_rng(10), LENGTHS, dtype=np.float32)
    pool = np.zeros((16, *problem.k_cache.shape[1:]), np.float32)
    arrays = put(make_mesh(kind, d=8), problem.replace(k_cache=pool), (P(), spec, P(), P()))
    message = rf"(?s)k_cache is sharded along {axis}.* flashmla_jax.parallel"
    error = ValueError if kind == AxisType.Explicit else jax.errors.JaxRuntimeError
    with pytest.raises(error, match=message):
        jax.jit(flash_mla_with_kvcache)(*arrays)
    operands, _ = append_problem(1)
    arrays = put(make_mesh(kind, d=8), operands, (spec, *[P()] * 4))
    with pytest.raises(error, match=message):
        jax.jit(cache_append)(*arrays)


CONFLICTS = {
    "query heads and KV heads": (
        jax.vmap(flash_mla_with_kvcache),
        (P(None, None, None, "x"), P(None, None, None, "y"), P(), P()),
    ),
    "query heads in another order": (
        jax.vmap(flash_mla_with_kvcache),
        (P(None, None, None, ("y", "x")), P(None, None, None, "x"), P(), P()),
    ),
    "queries and pools": (jax.vmap(flash_mla_with_kvcache), (P("x"), P("y"), P(), P())),
    "new tokens and pools": (
        jax.vmap(cache_append),
        (P("y"), P("x"), P(), P(), P()),
    ),
    "heads of new tokens": (
        jax.vmap(cache_append),
        (P(None, None, None, "y"), P(None, None, None, "x"), P(), P(), P()),
    ),
}


@meshes
@pytest.mark.parametrize("name", CONFLICTS)
def test_pools_do_not_move_between_devices(name: str) -> None:
    function, specs = CONFLICTS[name]
    if len(specs) == 4:
        problem = oracle.make_problem(np.random.default_rng(20), (70, 5), h_kv=2, dtype=np.float32)
        operands = list(problem)
    else:
        operands, _ = append_problem(2)
    stacked = [np.stack([x, x]) for x in operands]
    arrays = put(make_mesh(x=2, y=2), stacked, specs)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"k_cache is divided along .* alike"):
        jax.jit(function)(*arrays)


@meshes
def test_unreduced_operands_are_refused() -> None:
    problem = oracle.make_problem(np.random.default_rng(21), (70, 5), dtype=np.float32)
    mesh = make_mesh(AxisType.Explicit, d=2)
    unreduced = NamedSharding(mesh, P(unreduced={"d"}))
    arrays = put(mesh, problem, [P()] * 4)

    def attend(q: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        return flash_mla_with_kvcache(jax.sharding.reshard(q, unreduced), *rest)

    with pytest.raises(ValueError, match=r"q is unreduced over \['d'\]: reduce it first"):
        jax.eval_shape(attend, *arrays)


@meshes
def test_queries_that_cannot_be_divided_are_gathered_knowingly() -> None:
    problem = oracle.make_problem(np.random.default_rng(11), LENGTHS, dtype=np.float32)
    arrays = put(make_mesh(d=8), problem, (P(None, None, None, "d"), P(), P(), P()))
    with pytest.warns(UserWarning, match=r"q is sharded along axis 3 \(576\).* XLA gathers it"):
        result = jax.jit(flash_mla_with_kvcache)(*arrays)
    oracle.assert_matches(result, oracle.attend(problem))


@meshes
def test_heads_that_do_not_come_out_even_are_gathered_knowingly() -> None:
    """Three KV heads on four devices: a device's query heads would need two of them."""
    problem = oracle.make_problem(
        np.random.default_rng(12), LENGTHS, h_q=12, h_kv=3, dtype=np.float32
    )
    arrays = put(make_mesh(d=4), problem, (P(None, None, "d"), P(), P(), P()))
    with pytest.warns(UserWarning, match=r"h_q = 12, 3 KV heads .* cannot be divided"):
        result = jax.jit(flash_mla_with_kvcache)(*arrays)
    oracle.assert_matches(result, oracle.attend(problem))


@meshes
@kinds
def test_a_pool_whose_heads_are_not_divided_is_copied_knowingly(kind: AxisType) -> None:
    problem = oracle.make_problem(np.random.default_rng(17), LENGTHS, h_kv=4, dtype=np.float32)
    arrays = put(make_mesh(kind, d=4), problem, (P(None, None, "d"), P(), P(), P()))
    with pytest.warns(UserWarning, match=r"k_cache is not divided along axis 2 \(h_kv\)"):
        result = jax.jit(flash_mla_with_kvcache)(*arrays)
    oracle.assert_matches(result, oracle.attend(problem))


@meshes
@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((P(None, "d"), P(), P(), P()), r"q is sharded along axis 1 \(s_q\)"),
        ((P("d"), P(), P("e"), P()), r"block_table is sharded along batch over \('e',\), others"),
        ((P(None, None, "e"), P(None, None, "d"), P(), P()), r"k_cache is sharded along h_kv"),
        ((P(None, None, "d"), P(), P("d"), P()), r"a mesh axis can divide one of them"),
    ],
)
def test_explicit_shardings_that_contradict(specs: tuple[P, ...], message: str) -> None:
    """While tracing, on an explicit mesh, where nothing is gathered unless it is asked for."""
    problem = oracle.make_problem(
        np.random.default_rng(13), LENGTHS, s_q=2, h_kv=4, dtype=np.float32, spare_entries=3
    )
    problem = problem.replace(block_table=problem.block_table[:, :4])
    arrays = put(make_mesh(AxisType.Explicit, d=2, e=4), problem, specs)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(flash_mla_with_kvcache, *arrays)


@meshes
def test_no_warnings() -> None:
    problem = oracle.make_problem(np.random.default_rng(14), LENGTHS, dtype=np.float32)
    arrays = put(make_mesh(b=2, h=4), problem, (P("b", None, "h"), P(), P("b"), P("b")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.block_until_ready(jax.jit(lambda *x: flash_mla_with_kvcache(*x))(*arrays))
