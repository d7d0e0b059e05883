"""The Linen module: a holder of parameters, so what matters is that they are the right ones."""

from __future__ import annotations

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen as nn
from flax import nnx as flax_nnx

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import MLAConfig, YarnScaling, mla, nnx
from flashmla_jax.layers.linen import MultiHeadLatentAttention

pytestmark = pytest.mark.usefixtures("on_cpu")

CONFIG = MLAConfig(
    hidden_size=20,
    num_heads=2,
    q_lora_rank=12,
    qk_nope_head_dim=8,
    v_head_dim=16,
    rope_scaling=YarnScaling(factor=8, original_max_position_embeddings=8, mscale_all_dim=1.0),
)
X = jax.random.normal(jax.random.key(1), (2, 70, 20))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_parameters_are_those_of_the_nnx_module(use_bias, q_lora_rank):
    config = MLAConfig(hidden_size=20, num_heads=2, q_lora_rank=q_lora_rank)
    layer = MultiHeadLatentAttention(config, use_bias=use_bias)
    shapes = jax.tree.map(jnp.shape, layer.init(jax.random.key(0), X)["params"])
    other = nnx.MultiHeadLatentAttention(config, use_bias=use_bias, rngs=flax_nnx.Rngs(0))
    assert shapes == jax.tree.map(
        jnp.shape, flax_nnx.to_pure_dict(flax_nnx.state(other, flax_nnx.Param))
    )


def test_computes_what_mla_defines():
    layer = MultiHeadLatentAttention(CONFIG, use_bias=True)
    variables = layer.init(jax.random.key(0), X)
    variables["params"]["q_a_layernorm"]["scale"] = jnp.linspace(0.5, 1.5, 12)
    want = mla.prefill(variables["params"], CONFIG, X)
    out, kv = layer.apply(variables, X, method=layer.prefill)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(kv, want[1])
    np.testing.assert_array_equal(layer.apply(variables, X), out)


def test_attributes():
    layer = MultiHeadLatentAttention(
        CONFIG,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=nn.with_partitioning(nn.initializers.zeros_init(), (None, "heads")),
    )
    variables = layer.init(jax.random.key(0), X)
    kernel = variables["params"]["kv_b_proj"]["kernel"]
    assert kernel.names == (None, "heads")
    assert not kernel.value.any()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float16)}
    assert layer.apply(variables, X).dtype == jnp.bfloat16


def test_kernels_differ():
    params = MultiHeadLatentAttention(CONFIG).init(jax.random.key(0), X)["params"]
    kernels = [leaves["kernel"] for leaves in params.values() if "kernel" in leaves]
    firsts = {float(kernel[0, 0]) for kernel in kernels}
    assert len(firsts) == len(kernels)
    assert float(params["kv_b_proj"]["kernel"].std()) == pytest.approx(512**-0.5, rel=0.1)


def test_decode_continues_prefill_inside_jit():
    layer = MultiHeadLatentAttention(CONFIG)
    variables = layer.init(jax.random.key(0), X)
    want = layer.apply(variables, X)
    cache = PagedKVCache.create(
        num_layers=1, num_pages=4, batch=2, max_pages_per_seq=2, dtype=jnp.float32
    )
    cache, ok = cache.allocate(jnp.full(2, 62))
    assert ok.all()
    cache = cache.append(0, layer.apply(variables, X[:, :62], method=layer.prefill)[1][:, :, None])

    @jax.jit
    def step(variables, x, cache):
        cache, ok = cache.allocate(jnp.full(2, x.shape[1]))
        out, cache = layer.apply(variables, x, cache, method=layer.decode)
        return out, cache, ok

    for t in range(62, 70):
        out, cache, ok = step(variables, X[:, t : t + 1], cache)
        assert ok.all()
        np.testing.assert_allclose(out[:, 0], want[:, t], atol=2e-6)


def test_whole_sequences_are_differentiable():
    layer = MultiHeadLatentAttention(CONFIG)
    variables = layer.init(jax.random.key(0), X)
    grads = jax.grad(lambda v: jnp.sum(layer.apply(v, X[:1, :5]) ** 2))(variables)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_says_what_to_install_without_flax(monkeypatch):
    monkeypatch.delitem(sys.modules, "flashmla_jax.layers.linen")
    for name in ("flax", "flax.linen", "flax.typing"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install flashmla-jax\[flax\]"):
        importlib.import_module("flashmla_jax.layers.linen")
