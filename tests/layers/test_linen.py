"""The Linen module: a holder of parameters, so what matters is that they are the right ones."""

from __future__ import annotations

import functools
import importlib
import operator
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen as nn
from flax import nnx as flax_nnx
from jax.sharding import PartitionSpec as P
from jaxprs import has_precision, products

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
    shapes = jax.eval_shape(layer.init, jax.random.key(0), X)["params"]
    shapes = jax.tree.map(jnp.shape, shapes)
    other = flax_nnx.eval_shape(
        lambda: nnx.MultiHeadLatentAttention(config, use_bias=use_bias, rngs=flax_nnx.Rngs(0))
    )
    assert shapes == jax.tree.map(
        jnp.shape, flax_nnx.to_pure_dict(flax_nnx.state(other, flax_nnx.Param))
    )


@pytest.fixture(scope="module")
def trained():
    """A layer, its variables, and what it makes of X without a cache."""
    layer = MultiHeadLatentAttention(CONFIG, use_bias=True)
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    variables["params"]["q_a_layernorm"]["scale"] = jnp.linspace(0.5, 1.5, 12)
    return layer, variables, jax.jit(layer.apply)(variables, X)


def test_computes_what_mla_defines(trained):
    layer, variables, out = trained
    want = jax.jit(mla.prefill, static_argnums=1)(variables["params"], CONFIG, X)
    np.testing.assert_array_equal(out, want[0])
    both = jax.jit(functools.partial(layer.apply, method="prefill"))(variables, X)
    jax.tree.map(np.testing.assert_array_equal, both, want)


def test_linen_captures_intermediates(trained):
    layer, variables, out = trained
    _, captured = jax.jit(functools.partial(layer.apply, capture_intermediates=True))(variables, X)
    np.testing.assert_array_equal(captured["intermediates"]["__call__"][0], out)


def test_attributes():
    layer = MultiHeadLatentAttention(
        CONFIG,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=nn.with_partitioning(nn.initializers.zeros_init(), (None, "heads")),
        bias_init=nn.with_partitioning(nn.initializers.constant(0.5), ("heads",)),
        use_bias=True,
    )
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    kernel = variables["params"]["kv_b_proj"]["kernel"]
    assert kernel.names == (None, "heads")
    assert not kernel.value.any()
    for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
        bias = variables["params"][name]["bias"]
        assert bias.names == ("heads",)
        assert (bias.value == 0.5).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float16)}
    assert jax.eval_shape(layer.apply, variables, X).dtype == jnp.bfloat16


def is_boxed(x):
    return isinstance(x, nn.Partitioned)


def test_partitioning_is_metadata_on_request():
    partitioning = mla.head_partitioning(CONFIG, "heads")
    layer = MultiHeadLatentAttention(CONFIG, kernel_partitioning=partitioning)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    for name, leaves in variables["params"].items():
        axes = partitioning.get(name)
        assert (getattr(leaves.get("kernel"), "names", None)) == axes
    specs = nn.get_partition_spec(variables)["params"]
    assert specs["o_proj"]["kernel"] == P("heads", None)

    plain = jax.eval_shape(MultiHeadLatentAttention(CONFIG).init, jax.random.key(0), X)
    assert {type(leaf) for leaf in jax.tree.leaves(plain, is_leaf=is_boxed)} == {
        jax.ShapeDtypeStruct
    }
    kernel_init = nn.with_partitioning(nn.initializers.ones_init(), (None, "width"))
    both = layer.clone(kernel_init=kernel_init)
    both = jax.eval_shape(both.init, jax.random.key(0), X)
    specs = nn.get_partition_spec(both)["params"]
    for name in specs.keys() - {"q_a_layernorm", "kv_a_layernorm"}:
        assert specs[name]["kernel"] == P(*partitioning.get(name, (None, "width")))

    wrong = MultiHeadLatentAttention(CONFIG, kernel_partitioning={"q_proj": (None, "heads")})
    with pytest.raises(ValueError, match=r"kernel_partitioning must .* got 'q_proj'"):
        jax.eval_shape(wrong.init, jax.random.key(0), X)


def test_kernels_differ():
    params = jax.jit(MultiHeadLatentAttention(CONFIG).init)(jax.random.key(0), X)["params"]
    kernels = [leaves["kernel"] for leaves in params.values() if "kernel" in leaves]
    firsts = {float(kernel[0, 0]) for kernel in kernels}
    assert len(firsts) == len(kernels)
    assert float(params["kv_b_proj"]["kernel"].std()) == pytest.approx(512**-0.5, rel=0.1)


def test_prefill_in_chunks_and_decode_inside_jit(trained):
    """In donated steps, with absorbed weights and without."""
    layer, variables, want = trained
    serving = layer.clone(absorbed=True)
    absorbed = {"params": mla.absorb(variables["params"], CONFIG)}
    made = jax.eval_shape(serving.init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, absorbed)

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
    def step(layer, method, variables, x, cache):
        cache, ok = cache.allocate(jnp.full(2, x.shape[1]))
        out, cache = layer.apply(variables, x, cache, method=method)
        return out, cache, ok

    begin = 0
    cache = PagedKVCache.create(
        num_layers=1, num_pages=4, batch=2, max_pages_per_seq=2, dtype=jnp.float32
    )
    trained, absorbed = (layer, variables), (serving, absorbed)
    for (module, weights), method, count in (
        (trained, "prefill_into_cache", 31),
        (absorbed, "prefill_into_cache", 31),
        (trained, "decode", 1),
        (absorbed, "decode", 1),
        (absorbed, "decode", 1),
    ):
        end, before = begin + count, cache
        out, cache, ok = step(module, method, weights, X[:, begin:end], cache)
        assert ok.all()
        assert before.pages[0].is_deleted()  # being donated
        np.testing.assert_allclose(out, want[:, begin:end], atol=3e-6)
        begin = end


@pytest.mark.parametrize("precision", [None, jax.lax.Precision.HIGHEST])
@pytest.mark.parametrize("absorbed", [False, True])
def test_precision_is_that_of_all_products(precision, absorbed):
    layer = MultiHeadLatentAttention(
        CONFIG, precision=precision, implementation="xla", absorbed=absorbed
    )
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    cache = PagedKVCache.create(
        num_layers=1, num_pages=4, batch=2, max_pages_per_seq=2, dtype=jnp.float32
    )
    for method, args, least in (
        ("__call__", (), 8),
        ("prefill_into_cache", (cache,), 12),  # which expands cached tokens, too
        ("decode", (cache,), 6),
    ):
        apply = functools.partial(layer.apply, method=method)
        found = products(jax.make_jaxpr(apply)(variables, X[:, :3], *args).jaxpr)
        assert len(found) >= least
        assert all(has_precision(product, precision) for product in found)


def test_whole_sequences_are_differentiable(trained):
    layer, variables, _ = trained
    grads = jax.jit(jax.grad(lambda v: jnp.sum(layer.apply(v, X[:1, :5]) ** 2)))(variables)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_gradients_are_those_of_the_nnx_module(trained):
    layer, variables, _ = trained
    graphdef, state = flax_nnx.split(
        flax_nnx.eval_shape(
            lambda: nnx.MultiHeadLatentAttention(CONFIG, use_bias=True, rngs=flax_nnx.Rngs(0))
        )
    )
    flax_nnx.replace_by_pure_dict(state, variables["params"])
    other = flax_nnx.merge(graphdef, state)
    x = X[:, :9]

    def loss(out):
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    grads = jax.jit(jax.grad(lambda v: loss(layer.apply(v, x))))(variables)["params"]
    want = flax_nnx.jit(flax_nnx.grad(lambda module: loss(module(x))))(other)
    want = flax_nnx.to_pure_dict(want)
    assert jax.tree.structure(grads) == jax.tree.structure(want)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert jnp.abs(got).max() > 0
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# --- Layers in a scan --------------------------------------------------------------------------

LAYERS = 2


class Block(nn.Module):
    """The body of a scan over layers, which carries what they add to."""

    @nn.compact
    def __call__(self, x, _):
        return x + MultiHeadLatentAttention(CONFIG, name="attention")(x), None


def test_scan_over_layers_without_a_cache():
    """Values and gradients are those of the layers one by one."""
    x = X[:1, :9]
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
    params = jax.jit(stack().init)(jax.random.key(0), x, None)["params"]["attention"]
    kernel = params["kv_b_proj"]["kernel"]
    assert kernel.shape == (LAYERS, 512, 2 * 24)
    assert len({float(first) for first in kernel[:, 0, 0]}) == LAYERS
    layer = MultiHeadLatentAttention(CONFIG)

    def scanned(params):
        out, _ = stack().apply({"params": {"attention": params}}, x, None)
        return jnp.sum(out**2)

    def unrolled(params):
        out = x
        for i in range(LAYERS):
            one = jax.tree.map(operator.itemgetter(i), params)
            out = out + layer.apply({"params": one}, out)
        return jnp.sum(out**2)

    value, grads = jax.jit(jax.value_and_grad(scanned))(params)
    want, want_grads = jax.jit(jax.value_and_grad(unrolled))(params)
    assert value == pytest.approx(float(want), rel=1e-5)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert jnp.abs(got).max() > 0
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_says_what_to_install_without_flax(monkeypatch):
    monkeypatch.delitem(sys.modules, "flashmla_jax.layers.linen")
    for name in ("flax", "flax.linen", "flax.typing"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install flashmla-jax\[flax\]"):
        importlib.import_module("flashmla_jax.layers.linen")
