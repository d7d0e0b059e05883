"""MLA in bfloat16 where cuDNN and the Hopper kernels compute it, against the CPU in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import MLAConfig, mla

pytestmark = pytest.mark.gpu

# Heads as DeepSeek-V3 has them.
CONFIG = MLAConfig(hidden_size=256, num_heads=16, q_lora_rank=96)
BATCH, HIGHEST = 3, jax.lax.Precision.HIGHEST
# New tokens of each sequence, call by call.
CALLS = [(300, 64, 0), (130, 1, 200), (0, 300, 70)]


def make_params(dtype):
    rng = np.random.default_rng(0)
    return {
        name: {
            leaf: jnp.asarray(
                rng.standard_normal(shape) * shape[0] ** -0.5 if leaf == "kernel" else 1, dtype
            )
            * jnp.ones(shape, dtype)
            for leaf, shape in leaves.items()
        }
        for name, leaves in mla.parameter_shapes(CONFIG).items()
    }


def make_cache(dtype):
    return PagedKVCache.create(
        num_layers=1, num_pages=24, batch=BATCH, max_pages_per_seq=8, dtype=dtype
    )


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def inputs():
    """Parameters and tokens, in bfloat16; and the same in float32, on the CPU."""
    small = make_params(jnp.bfloat16), jax.random.normal(jax.random.key(1), (BATCH, 512, 256))
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), small)
    return small, jax.device_put(exact, jax.devices("cpu")[0])


@pytest.mark.parametrize(
    ("dtype", "tolerance", "absorb_prefix"),
    [
        (jnp.bfloat16, 1.5e-2, False),
        (jnp.bfloat16, 1.5e-2, None),
        ("fp8", 6e-2, False),
        ("fp8", 6e-2, True),
    ],
)
def test_prefill_into_cache_and_decode(dtype, tolerance, absorb_prefix):
    (params, x), (exact_params, exact_x) = inputs()
    want, _ = jax.jit(
        functools.partial(mla.prefill, precision=HIGHEST, implementation="xla"), static_argnums=1
    )(exact_params, CONFIG, exact_x)
    params = mla.absorb(params, CONFIG)
    allocate = jax.jit(PagedKVCache.allocate)

    @functools.partial(jax.jit, donate_argnums=1)
    def prefill(x, cache):
        options = {"prefix_chunk": 128, "absorb_prefix": absorb_prefix}
        return mla.prefill_into_cache(params, CONFIG, x, cache, 0, **options)

    cache, begin = make_cache(dtype), np.zeros(BATCH, int)
    for counts in CALLS:
        tokens = np.zeros((BATCH, 300, 256), np.float32)
        for i, count in enumerate(counts):
            tokens[i, :count] = exact_x[i, begin[i] : begin[i] + count]
        tokens = jnp.asarray(tokens, jnp.bfloat16)
        cache, ok = allocate(cache, jnp.array(counts))
        assert ok.all()
        if not begin.any():
            prefill = prefill.lower(tokens, cache).compile()
            # To new tokens, and to those in the cache: one way or the other.
            text = prefill.as_text()
            assert text.count('target="__cudnn$fmhaSoftmax') == 1 + (absorb_prefix is False)
            assert ("flashmla_dense_decode" in text) == (absorb_prefix is not False)
        out, cache = prefill(tokens, cache)
        for i, count in enumerate(counts):
            if count:
                expected = want[i, begin[i] : begin[i] + count]
                assert relative_error(out[i, :count], expected) < tolerance
        begin += np.array(counts)

    cache, ok = allocate(cache, jnp.full(BATCH, 2))
    assert ok.all()
    tokens = jnp.stack([x[i, b : b + 2] for i, b in enumerate(begin)])
    out, _ = jax.jit(lambda x, cache: mla.decode(params, CONFIG, x, cache, 0))(tokens, cache)
    expected = jnp.stack([want[i, b : b + 2] for i, b in enumerate(begin)])
    assert relative_error(out, expected) < tolerance


def test_gradients_without_a_cache():
    def loss(params, x, **options):
        return jnp.sum(mla.prefill(params, CONFIG, x, **options)[0].astype(jnp.float32) ** 2)

    small, exact = inputs()
    grad = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*small).compile()
    assert "fmhaSoftmaxBackward" in grad.as_text()
    exact_loss = functools.partial(loss, precision=HIGHEST, implementation="xla")
    want = jax.jit(jax.grad(exact_loss, argnums=(0, 1)))(*exact)
    for got, expected in zip(jax.tree.leaves(grad(*small)), jax.tree.leaves(want), strict=True):
        assert relative_error(got, expected) < 4e-2
