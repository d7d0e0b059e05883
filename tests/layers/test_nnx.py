"""The Flax module: a holder of parameters, so what matters is that they are the right ones."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import nnx

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import MLAConfig, YarnScaling, mla
from flashmla_jax.layers.nnx import MultiHeadLatentAttention

pytestmark = pytest.mark.usefixtures("on_cpu")

CONFIG = MLAConfig(
    hidden_size=20,
    num_heads=2,
    q_lora_rank=12,
    qk_nope_head_dim=8,
    v_head_dim=16,
    rope_scaling=YarnScaling(factor=8, original_max_position_embeddings=8, mscale_all_dim=1.0),
)


def test_parameters_have_the_names_and_shapes_of_a_checkpoint():
    layer = MultiHeadLatentAttention(CONFIG, use_bias=True, rngs=nnx.Rngs(0))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer)))
    assert shapes == {
        "q_a_proj": {"kernel": (20, 12), "bias": (12,)},
        "q_a_layernorm": {"scale": (12,)},
        "q_b_proj": {"kernel": (12, 2 * 72)},
        "kv_a_proj_with_mqa": {"kernel": (20, 576), "bias": (576,)},
        "kv_a_layernorm": {"scale": (512,)},
        "kv_b_proj": {"kernel": (512, 2 * 24)},
        "o_proj": {"kernel": (32, 20), "bias": (20,)},
    }


def test_without_low_rank_query():
    config = dataclasses.replace(CONFIG, q_lora_rank=None)
    layer = MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    names = set(nnx.to_pure_dict(nnx.state(layer)))
    assert names == {"q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
    assert layer(jnp.ones((1, 3, 20))).shape == (1, 3, 20)


def test_constructor_keywords():
    layer = MultiHeadLatentAttention(
        CONFIG,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=nnx.initializers.zeros_init(),
        use_bias=False,
        rngs=nnx.Rngs(0),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(jnp.float16)}
    assert not layer.kv_b_proj.kernel[...].any()
    assert layer(jnp.ones((1, 3, 20))).dtype == jnp.bfloat16


def test_computes_what_mla_defines():
    layer = MultiHeadLatentAttention(CONFIG, use_bias=True, rngs=nnx.Rngs(0))
    layer.q_a_layernorm.scale[...] = jnp.linspace(0.5, 1.5, 12)
    x = jax.random.normal(jax.random.key(1), (2, 11, 20))
    want = mla.prefill(nnx.to_pure_dict(nnx.state(layer)), CONFIG, x)
    out, kv = layer.prefill(x)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(kv, want[1])
    np.testing.assert_array_equal(layer(x), out)


def test_decode_continues_prefill_inside_nnx_jit():
    layer = MultiHeadLatentAttention(CONFIG, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 70, 20))
    want = layer(x)
    cache = PagedKVCache.create(
        num_layers=1, num_pages=4, batch=2, max_pages_per_seq=2, dtype=jnp.float32
    )
    cache, ok = cache.allocate(jnp.full(2, 62))
    assert ok.all()
    cache = cache.append(0, layer.prefill(x[:, :62])[1][:, :, None])

    @nnx.jit
    def step(layer, x, cache):
        cache, ok = cache.allocate(jnp.full(2, x.shape[1]))
        out, cache = layer.decode(x, cache)
        return out, cache, ok

    for t in range(62, 70):
        out, cache, ok = step(layer, x[:, t : t + 1], cache)
        assert ok.all()
        np.testing.assert_allclose(out[:, 0], want[:, t], atol=2e-6)


def test_whole_sequences_are_differentiable():
    layer = MultiHeadLatentAttention(CONFIG, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, 20))
    grads = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_says_what_to_install_without_flax(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "flashmla_jax.layers.nnx")
    with pytest.raises(ImportError, match=r"pip install flashmla-jax\[flax\]"):
        importlib.import_module("flashmla_jax.layers.nnx")
