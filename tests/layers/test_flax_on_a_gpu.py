"""The Flax modules where they are to serve, with what a GPU's kernels take: bfloat16."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import nnx

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import MLAConfig, linen
from flashmla_jax.layers.nnx import MultiHeadLatentAttention

CONFIG = MLAConfig(hidden_size=128, num_heads=4, q_lora_rank=64, qk_nope_head_dim=64, v_head_dim=64)
LAYERS, TOKENS = 2, 100


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    device = jax.devices(request.param)[0]
    with jax.default_device(device):
        yield device


def make_cache(**options):
    return PagedKVCache.create(num_pages=70, batch=2, max_pages_per_seq=2, **options)


def make_input():
    return jax.random.normal(jax.random.key(1), (2, TOKENS, CONFIG.hidden_size), jnp.bfloat16)


def assert_close(got, want):
    """To the norm, as bfloat16 is: values are rounded some ten times on the way."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.usefixtures("device")
def test_layers_in_a_scan_decode_what_they_attend_to_without_a_cache():
    """From one pool for all, of which no program makes a copy."""

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def without_cache(x, layer):
        return x + layer(x)

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    def prefill(carry, layer, number):
        x, cache = carry
        out, cache = layer.prefill_into_cache(x, cache, number)
        return x + out, cache

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    def decode(carry, layer, number):
        x, cache = carry
        out, cache = layer.decode(x, cache, number)
        return x + out, cache

    def step(scan, stack, x, cache):
        cache, ok = cache.allocate(jnp.full(2, x.shape[1]))
        x, cache = scan((x, cache), stack, jnp.arange(LAYERS))
        return x, cache, ok

    make = nnx.vmap(
        lambda rngs: MultiHeadLatentAttention(CONFIG, param_dtype=jnp.bfloat16, rngs=rngs)
    )
    stack, x = nnx.jit(make)(nnx.Rngs(0).split(LAYERS)), make_input()
    want = nnx.jit(without_cache)(x, stack)
    stack = nnx.jit(nnx.vmap(lambda layer: layer.absorb()))(stack)
    cache = make_cache(num_layers=LAYERS, one_pool=True)
    pool, dims = cache.pages[0], ",".join(map(str, cache.pages[0].shape))
    address = pool.unsafe_buffer_pointer()
    for scan, begin, end in (
        (prefill, 0, 63),
        (prefill, 63, TOKENS - 3),
        (decode, TOKENS - 3, TOKENS - 2),
        (decode, TOKENS - 2, TOKENS),
    ):
        jitted = nnx.jit(step, static_argnums=0, donate_argnums=3)
        program = jitted.lower(scan, stack, x[:, begin:end], cache).compile()
        assert not re.search(rf"= \(?bf16\[{dims}\]\S* copy(-start)?\(", program.as_text())
        out, cache, ok = program(stack, x[:, begin:end], cache)
        assert ok.all()
        assert cache.pages[0].unsafe_buffer_pointer() == address
        assert_close(out, want[:, begin:end])


@pytest.mark.usefixtures("device")
def test_linen_decodes_what_nnx_does():
    layer = MultiHeadLatentAttention(CONFIG, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    module = linen.MultiHeadLatentAttention(CONFIG, param_dtype=jnp.bfloat16)
    params = {"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}
    x = make_input()
    cache, _ = make_cache(num_layers=1).allocate(jnp.array([90, 30]))
    _, cache = layer.prefill_into_cache(x[:, :90], cache)
    cache, _ = cache.allocate(jnp.array([2, 2]))
    want, cache_of_nnx = layer.decode(x[:, 90:92], cache)

    @jax.jit
    def decode(params, x, cache):
        return module.apply(params, x, cache, method="decode")

    got, cache = decode(params, x[:, 90:92], cache)
    assert_close(got, want)
    jax.tree.map(np.testing.assert_array_equal, cache.cache_seqlens, cache_of_nnx.cache_seqlens)
