"""`flashmla_jax.layers.dsa`: its forms agree, and nothing that is no token has a say.

What they compute is held against Hugging Face in models/test_dsa.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import dsa, mla
from flashmla_jax.layers.indexer import IndexerConfig

pytestmark = pytest.mark.usefixtures("on_cpu")

SMALL = mla.MLAConfig(
    hidden_size=20, num_heads=3, q_lora_rank=28, qk_nope_head_dim=12, v_head_dim=36
)
INDEX = IndexerConfig(num_heads=64, head_dim=64, topk=12)
LENGTHS = (80, 5, 0)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)

    def kernel(*shape):
        return {"kernel": (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)}

    sizes = mla.parameter_shapes(SMALL)
    attention = {
        name: kernel(*leaves["kernel"])
        if "kernel" in leaves
        else {"scale": np.ones(leaves["scale"])}
        for name, leaves in sizes.items()
    }
    index = {
        "wq_b": kernel(SMALL.q_lora_rank, 64 * 64),
        "wk": kernel(SMALL.hidden_size, 64),
        "k_norm": {"scale": np.ones(64, np.float32), "bias": np.zeros(64, np.float32)},
        "weights_proj": kernel(SMALL.hidden_size, 64),
    }
    return {**attention, "indexer": index}


def random_x(batch=3, s=80):
    rng = np.random.default_rng(2)
    return rng.standard_normal((batch, s, SMALL.hidden_size)).astype(np.float32)


def make_cache(num_layers=1, **changes):
    sizes = {"num_pages": 5, "batch": 3, "max_pages_per_seq": 2, "dtype": jnp.float32}
    cache = PagedKVCache.create(**sizes, num_layers=num_layers, index_head_dim=64, **changes)
    pools = (
        tuple(jnp.full_like(x, jnp.nan) for x in xs) for xs in (cache.pages, cache.index_pages)
    )
    return dataclasses.replace(cache, **dict(zip(("pages", "index_pages"), pools, strict=True)))


prefill = jax.jit(dsa.prefill, static_argnums=1, static_argnames="index")
prefill_into_cache = jax.jit(dsa.prefill_into_cache, static_argnums=(1, 4), static_argnames="index")
decode = jax.jit(dsa.decode, static_argnums=(1, 4), static_argnames="index")


def test_attention_is_sparse(params):
    x = random_x()
    out, _ = prefill(params, SMALL, x, index=INDEX)
    dense, _ = mla.prefill(params, SMALL, x)
    np.testing.assert_allclose(out[:, :12], dense[:, :12], atol=1e-5)
    assert (np.abs(out[:, 12:] - dense[:, 12:]).max(axis=-1) > 1e-3).mean() > 0.9


def test_padding_has_no_say(params):
    """NaN behind the new tokens, in pages of nobody and behind the last token."""
    x = random_x()
    wanted, (kv, keys) = prefill(params, SMALL, x, index=INDEX)
    padded = np.where(np.arange(80)[:, None] < np.reshape(LENGTHS, (3, 1, 1)), x, np.nan)
    cache, ok = make_cache().allocate(jnp.int32(LENGTHS))
    assert ok.all()
    out, cache = prefill_into_cache(params, SMALL, padded, cache, 0, index=INDEX)
    assert np.isfinite(out).all()
    for i, length in enumerate(LENGTHS):
        np.testing.assert_allclose(out[i, :length], wanted[i, :length], atol=1e-5)
        table = cache.block_table[i]
        for pool, tokens in ((cache.pages[0], kv), (cache.index_pages[0], keys)):
            rows = pool[table].reshape(128, -1)[:length]
            np.testing.assert_allclose(rows, tokens[i, :length], atol=1e-5)


def test_decode_goes_on_where_a_prompt_ends(params):
    x = random_x()
    wanted, _ = prefill(params, SMALL, x, index=INDEX)
    cache, _ = make_cache().allocate(jnp.int32([77, 2, 0]))
    _, cache = prefill_into_cache(params, SMALL, x, cache, 0, index=INDEX)
    cache, ok = cache.allocate(jnp.int32([3, 3, 0]))  # the third sequence is left alone, and empty
    assert ok.all()
    new = np.stack([x[0, 77:80], x[1, 2:5], x[2, :3]])
    out, cache = decode(params, SMALL, new, cache, 0, index=INDEX)
    np.testing.assert_allclose(out[0], wanted[0, 77:80], atol=1e-5)
    np.testing.assert_allclose(out[1], wanted[1, 2:5], atol=1e-5)
    assert np.isfinite(out[2]).all()


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")
def test_derivative(params):
    """What is chosen is a constant: as by differences that are too small to change it."""
    x, direction = random_x(1, 30), random_x(1, 60)[:, 30:]
    towards = np.random.default_rng(3).standard_normal((1, 30, SMALL.hidden_size))

    def function(x, params):
        out, (kv, _) = dsa.prefill(params, SMALL, x, jax.lax.Precision.HIGHEST, index=INDEX)
        return jnp.sum(out * towards) + jnp.sum(kv)

    gradient, of_params = jax.jit(jax.grad(function, argnums=(0, 1)))(x, params)
    by_x = float(jnp.sum(gradient * direction))
    values = [float(jax.jit(function)(x + sign * 3e-4 * direction, params)) for sign in (1, -1)]
    assert by_x == pytest.approx((values[0] - values[1]) / 6e-4, rel=2e-2)
    indexers = jax.tree.leaves(of_params["indexer"])
    assert all(not leaf.any() for leaf in indexers)
    others = {name: value for name, value in of_params.items() if name != "indexer"}
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(others))


def test_layers_in_a_scan(params):
    """With one pool for all, whose number is an array; every layer has keys of its own."""
    x, layers = random_x(), 3
    stacked = jax.tree.map(lambda p: jnp.stack([p, p * 1.5, p * 0.5]), params)
    cache = make_cache(layers, one_pool=True)

    @jax.jit
    def run(cache, x):
        def body(carry, layer_params):
            cache, layer = carry
            out, cache = dsa.prefill_into_cache(layer_params, SMALL, x, cache, layer, index=INDEX)
            return (cache, layer + 1), out

        (cache, _), outs = jax.lax.scan(body, (cache, jnp.int32(0)), stacked)
        return outs, cache

    cache, _ = cache.allocate(jnp.int32([80, 80, 0]))
    outs, cache = run(cache, x)
    for layer in range(layers):
        own = jax.tree.map(lambda p, layer=layer: p[layer], stacked)
        wanted, (_, keys) = prefill(own, SMALL, x, index=INDEX)
        np.testing.assert_allclose(outs[layer, :2], wanted[:2], atol=1e-4)
        view = cache.at_layer(layer)
        rows = view.index_pages[0][view.block_table[1]].reshape(128, 64)
        np.testing.assert_allclose(rows[:80], keys[1], atol=1e-4)


@pytest.mark.parametrize("function", [dsa.decode, dsa.prefill_into_cache])
def test_what_does_not_fit(params, function):
    x = random_x(s=1)
    with pytest.raises(ValueError, match=r"index keys of 96 numbers.*it has index_head_dim=64"):
        function(params, SMALL, x, make_cache(), 0, index=dataclasses.replace(INDEX, head_dim=96))
    with pytest.raises(ValueError, match=r"x must be \[batch, s, hidden\]"):
        function(params, SMALL, x[:2], make_cache(), 0, index=INDEX)
