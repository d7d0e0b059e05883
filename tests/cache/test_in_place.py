"""A donated cache is updated in place: no program copies a page buffer.

The compiled program is asked, not the clock: a copy of a pool is an instruction of the HLO, and
needs memory of the pool's size. Every check is also made to fail once, without donation.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashmla_jax
from flashmla_jax.cache.layout import HEAD_DIM
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.ops.cache_append import cache_append
from flashmla_jax.ops.dense_decode import _workspace

LAYERS, BATCH, HEADS = 3, 2, 4
# What attention needs on a GPU besides its results, whatever the size of the cache.
WORKSPACE = sum(
    math.prod(x.shape) * x.dtype.itemsize
    for x in _workspace((BATCH, 2, HEADS, HEAD_DIM), 1, max_pages=4, batch_invariant=False)
)
HLO_NAMES = {jnp.bfloat16: "bf16", jnp.float16: "f16", jnp.float32: "f32"}


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """The first device of each platform, as the default."""
    try:
        device = jax.devices(request.param)[0]
    except RuntimeError:
        pytest.skip(f"no {request.param} here")
    with jax.default_device(device):
        yield device


def make_cache(dtype=jnp.bfloat16, **options):
    sizes = {"num_layers": LAYERS, "num_pages": 64, "batch": BATCH, "max_pages_per_seq": 8}
    return PagedKVCache.create(**sizes, dtype=dtype, **options)


def copies(compiled, pool):
    """The instructions that copy an array of `pool`'s shape and dtype."""
    dims = ",".join(map(str, pool.shape))
    pattern = rf"= \(?{HLO_NAMES[pool.dtype.type]}\[{dims}\]\S* copy(-start)?\("
    return [line for line in compiled.as_text().splitlines() if re.search(pattern, line)]


def assert_in_place(function, cache, *args):
    """That `function(cache, *args)` copies no pool if the cache is donated, and does otherwise."""
    pools = [x for x in jax.tree.leaves(cache) if x.ndim == 4]
    pool = pools[0]
    donated = jax.jit(function, donate_argnums=0).lower(cache, *args).compile()
    kept = jax.jit(function).lower(cache, *args).compile()
    assert copies(donated, pool) == []
    assert len(copies(kept, pool)) == len(pools)
    memory = donated.memory_analysis()
    assert memory.alias_size_in_bytes >= len(pools) * pool.nbytes
    workspace = 0 if jax.devices()[0].platform == "cpu" else WORKSPACE
    assert memory.temp_size_in_bytes < pool.nbytes + workspace


def append_everywhere(cache, num_tokens, kv):
    cache, ok = cache.allocate(num_tokens)
    for layer in range(LAYERS):
        cache = cache.append(layer, kv)
    return cache, ok


def decode(cache, num_tokens, kv, q):
    """A step of a model: what a layer attends to includes what it has just written."""
    cache, ok = cache.allocate(num_tokens)
    for layer in range(LAYERS):
        cache = cache.append(layer, kv)
        out, _ = flashmla_jax.flash_mla_with_kvcache(
            q, cache.pages[layer], cache.block_table, cache.cache_seqlens, causal=True
        )
        q = q.at[..., : out.shape[-1]].add(out)
        kv = kv + out.mean()
    return cache, ok, q


def inputs(rows=1, dtype=jnp.bfloat16):
    kv = jnp.ones((BATCH, rows, 1, HEAD_DIM), dtype)
    return jnp.full(BATCH, rows, jnp.int32), kv, jnp.ones((BATCH, rows, HEADS, HEAD_DIM), dtype)


@pytest.mark.usefixtures("device")
def test_op():
    pool = make_cache().pages[0]
    table, start = jnp.zeros((BATCH, 8), jnp.int32), jnp.zeros(BATCH, jnp.int32)
    num_tokens, kv, _ = inputs()
    assert_in_place(cache_append, pool, kv, table, start, num_tokens)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", HLO_NAMES)
@pytest.mark.parametrize("rows", [1, 100])
def test_append(dtype, rows):
    num_tokens, kv, _ = inputs(rows, dtype)
    assert_in_place(append_everywhere, make_cache(dtype), num_tokens, kv)


@pytest.mark.usefixtures("device")
def test_sharing():
    """Copies on write, too, are made in place, of single pages."""

    def step(cache, num_tokens, kv):
        cache = cache.fork(jnp.arange(BATCH)[::-1]).retain(jnp.arange(2))
        cache, _ = cache.reserve(num_tokens + 64)
        cache, ok = append_everywhere(cache, num_tokens, kv)
        return cache.truncate(cache.cache_seqlens - 1).release(jnp.arange(2)), ok

    assert_in_place(step, make_cache(), *inputs()[:2])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 2])
def test_append_and_attend(dtype, rows):
    assert_in_place(decode, make_cache(dtype), *inputs(rows, dtype))


@pytest.mark.usefixtures("device")
def test_many_steps_in_one_program():
    """A loop over steps, inside the program, with the cache as its state."""

    def steps(cache, num_tokens, kv, q):
        return jax.lax.fori_loop(0, 5, lambda _, c: decode(c, num_tokens, kv, q)[0], cache)

    assert_in_place(steps, make_cache(), *inputs())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("rows", [1, 2])
def test_scan_over_layers(rows):
    """Which carries one pool for all of them."""

    def step(cache, num_tokens, kv, q):
        def layer(carry, number):
            cache, q = carry
            cache = cache.append(number, kv)
            view = cache.at_layer(number)
            out, _ = flashmla_jax.flash_mla_with_kvcache(
                q, view.pages[0], view.block_table, view.cache_seqlens, causal=True
            )
            return (cache, q.at[..., : out.shape[-1]].add(out)), None

        cache, ok = cache.allocate(num_tokens)
        (cache, q), _ = jax.lax.scan(layer, (cache, q), jnp.arange(LAYERS))
        return cache, ok, q

    assert_in_place(step, make_cache(one_pool=True), *inputs(rows))


def attend_from(holder, put, cache, args):
    """A step whose cache is state of another kind: what to return, when it is put back."""
    new, ok, q = decode(cache, *args)
    put(holder, new)
    return ok, q


@pytest.mark.usefixtures("device")
def test_in_references():
    """Pools that are `jax.Ref`s need no donation."""

    def put(refs, cache):
        for ref, pool in zip(refs, cache.pages, strict=True):
            ref[...] = pool

    @jax.jit
    def step(refs, rest, *args):
        cache = dataclasses.replace(rest, pages=tuple(ref[...] for ref in refs))
        return attend_from(refs, put, cache, args)

    cache = make_cache()
    pool = cache.pages[0]
    refs, rest = [jax.new_ref(x) for x in cache.pages], dataclasses.replace(cache, pages=())
    compiled = step.lower(refs, rest, *inputs()).compile()
    assert copies(compiled, pool) == []
    assert compiled.memory_analysis().alias_size_in_bytes >= LAYERS * pool.nbytes


@pytest.mark.usefixtures("device")
def test_in_an_nnx_module():
    """A cache that is a variable of a module which `nnx.jit` is allowed to update in place."""

    class Model(nnx.Module):
        def __init__(self):
            self.cache = nnx.Variable(make_cache())

    def put(model, cache):
        model.cache.set_value(cache)

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(model, *args):
        return attend_from(model, put, model.cache.get_value(), args)

    model = Model()
    addresses = [pool.unsafe_buffer_pointer() for pool in model.cache.get_value().pages]
    for _ in range(2):
        ok, _ = step(model, *inputs())
        assert ok.all()
        pools = model.cache.get_value().pages
        assert [pool.unsafe_buffer_pointer() for pool in pools] == addresses
    assert int(model.cache.get_value().cache_seqlens[0]) == 2
    assert pools[0].any()


@pytest.mark.usefixtures("device")
def test_addresses_stay():
    step = jax.jit(decode, donate_argnums=0)
    cache, args = make_cache(), inputs()
    addresses = [pool.unsafe_buffer_pointer() for pool in cache.pages]
    assert len(set(addresses)) == LAYERS
    for _ in range(3):
        before = cache
        cache, _, _ = step(cache, *args)
        assert [pool.unsafe_buffer_pointer() for pool in cache.pages] == addresses
        assert all(pool.is_deleted() for pool in before.pages)
    cache = jax.jit(PagedKVCache.free, donate_argnums=0)(cache, np.array([True, False]))
    assert [pool.unsafe_buffer_pointer() for pool in cache.pages] == addresses


def test_without_donation_the_old_cache_lives():
    cache = make_cache()
    new, ok = jax.jit(append_everywhere)(cache, *inputs()[:2])
    assert ok.all()
    assert cache.num_used == 0
    assert not cache.pages[0].any()
    assert new.pages[0].any()
