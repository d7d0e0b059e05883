"""A layer whose heads are divided over eight devices, against the same on one.

The checks need eight devices. Where there are fewer, one test runs this file in a process that has
them.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import DEVICES, elsewhere, make_mesh, meshes, run_on_eight_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import MLAConfig, mla

nnx = pytest.importorskip("flax.nnx")
from flax import linen as nn  # noqa: E402

from flashmla_jax.layers import linen  # noqa: E402
from flashmla_jax.layers.nnx import MultiHeadLatentAttention  # noqa: E402

CONFIG = MLAConfig(
    hidden_size=24, num_heads=DEVICES, q_lora_rank=16, qk_nope_head_dim=8, v_head_dim=16
)
PARTITIONING = mla.head_partitioning(CONFIG, "heads")
X = np.random.default_rng(0).standard_normal((2, 100, 24)).astype(np.float32)


@elsewhere
def test_on_eight_devices() -> None:
    run_on_eight_devices(__file__)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(heads=DEVICES)


@pytest.fixture(scope="module")
def layer(mesh):
    """Made where it belongs: a mesh is set, and the names are those of its axes."""
    with jax.set_mesh(mesh):
        return MultiHeadLatentAttention(CONFIG, kernel_partitioning=PARTITIONING, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def on_one_device(layer):
    """The parameters on one device, and what the layer is to give."""
    params = nnx.to_pure_dict(nnx.state(layer))
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
    return params, jax.jit(mla.prefill, static_argnums=1)(params, CONFIG, X)[0]


def collectives(compiled):
    text = compiled.as_text()
    return re.findall(
        r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", text
    )


@meshes
def test_each_device_has_its_heads(layer):
    assert layer.kv_b_proj.kernel[...].sharding.spec == P(None, "heads")
    assert layer.o_proj.kernel[...].addressable_shards[3].data.shape == (16, 24)
    absorbed = layer.absorb().kv_b_proj
    for weight, shape in ((absorbed.w_uk, (1, 512, 8)), (absorbed.w_uv, (1, 16, 512))):
        assert weight[...].addressable_shards[3].data.shape == shape


@meshes
def test_prefill_and_decode(layer, mesh, on_one_device):
    """The only word between devices is the sum after `o_proj`."""
    serving = layer.absorb()
    cache = PagedKVCache.create(
        num_layers=1, num_pages=4, batch=2, max_pages_per_seq=2, dtype=jnp.float32
    )
    cache, x = jax.device_put((cache, X), NamedSharding(mesh, P()))

    def attend(method, layer, x, cache):
        return getattr(layer, method)(x, cache)

    begin = 0
    for module, method, count in (
        (layer, "prefill_into_cache", 70),
        (serving, "prefill_into_cache", 20),
        (serving, "decode", 2),
    ):
        end = begin + count
        cache, ok = jax.jit(PagedKVCache.allocate)(cache, np.full(2, count))
        assert ok.all()
        step = nnx.jit(functools.partial(attend, method))
        compiled = step.lower(module, x[:, begin:end], cache).compile()
        assert collectives(compiled) == ["all-reduce"]
        out, cache = compiled(module, x[:, begin:end], cache)
        np.testing.assert_allclose(out, on_one_device[1][:, begin:end], atol=3e-6)
        begin = end


@meshes
@pytest.mark.parametrize(
    ("dtype", "absorb_prefix", "tolerance"), [(jnp.float32, True, 3e-6), (jnp.bfloat16, None, 2e-2)]
)
def test_attention_to_a_prefix_as_it_lies(
    layer, mesh, on_one_device, dtype, absorb_prefix, tolerance
):
    """Needs no other word, either; in bfloat16 it is what few tokens do by default."""
    params = nnx.to_pure_dict(nnx.state(layer.absorb()))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    cache = PagedKVCache.create(
        num_layers=1, num_pages=4, batch=2, max_pages_per_seq=2, dtype=dtype
    )
    cache, x = jax.device_put((cache, X.astype(dtype)), NamedSharding(mesh, P()))
    step = jax.jit(
        lambda params, x, cache: mla.prefill_into_cache(
            params, CONFIG, x, cache, 0, absorb_prefix=absorb_prefix
        )
    )
    for begin, end in ((0, 70), (70, 90)):
        cache, ok = jax.jit(PagedKVCache.allocate)(cache, np.full(2, end - begin))
        assert ok.all()
        compiled = step.lower(params, x[:, begin:end], cache).compile()
        assert collectives(compiled) == ["all-reduce"]
        out, cache = compiled(params, x[:, begin:end], cache)
        np.testing.assert_allclose(out, on_one_device[1][:, begin:end], atol=tolerance)


@meshes
def test_gradients_are_sharded_as_the_parameters(layer, mesh, on_one_device):
    def loss(params, x):
        return jnp.sum(mla.prefill(params, CONFIG, x)[0] ** 2)

    params = nnx.to_pure_dict(nnx.state(layer))
    x = jax.device_put(X[:, :10], NamedSharding(mesh, P()))
    grads = jax.jit(jax.grad(loss))(params, x)
    want = jax.jit(jax.grad(loss))(on_one_device[0], X[:, :10])
    for name, axes in PARTITIONING.items():
        want_sharding = NamedSharding(mesh, P(*axes))
        assert grads[name]["kernel"].sharding.is_equivalent_to(want_sharding, ndim=2)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


# --- The Linen module -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_linen(mesh):
    """The layer, and its variables where their names say, which they are initialised to."""
    layer = linen.MultiHeadLatentAttention(CONFIG, kernel_partitioning=PARTITIONING)
    init = functools.partial(layer.init, jax.random.key(0))
    shardings = nn.get_sharding(jax.eval_shape(init, X), mesh)
    return layer, nn.unbox(jax.jit(init, out_shardings=shardings)(X))


@meshes
def test_linen_decodes(of_linen, mesh):
    """A prompt and then a token: the only word between devices is the sum after `o_proj`."""
    layer, variables = of_linen
    on_one = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), variables["params"])
    want = jax.jit(mla.prefill, static_argnums=1)(on_one, CONFIG, X)[0]
    serving = layer.clone(absorbed=True)
    absorb = jax.jit(functools.partial(mla.absorb, config=CONFIG))
    absorbed = {"params": absorb(variables["params"])}
    assert absorbed["params"]["kv_b_proj"]["w_uk"].addressable_shards[3].data.shape == (1, 512, 8)
    cache = PagedKVCache.create(
        num_layers=1, num_pages=4, batch=2, max_pages_per_seq=2, dtype=jnp.float32
    )
    cache, x = jax.device_put((cache, X), NamedSharding(mesh, P()))
    begin = 0
    for module, weights, method, count in (
        (layer, variables, "prefill_into_cache", 70),
        (serving, absorbed, "decode", 1),
    ):
        end = begin + count
        cache, ok = jax.jit(PagedKVCache.allocate)(cache, np.full(2, count))
        assert ok.all()
        step = jax.jit(functools.partial(module.apply, method=method))
        compiled = step.lower(weights, x[:, begin:end], cache).compile()
        assert collectives(compiled) == ["all-reduce"]
        out, cache = compiled(weights, x[:, begin:end], cache)
        np.testing.assert_allclose(out, want[:, begin:end], atol=3e-6)
        begin = end


@meshes
def test_linen_gradients_are_sharded_as_the_parameters(of_linen, mesh):
    layer, variables = of_linen
    x = X[:, :10]

    def loss(variables, x):
        return jnp.sum(layer.apply(variables, x) ** 2)

    def loss_on_one(params):
        return jnp.sum(mla.prefill(params, CONFIG, x)[0] ** 2)

    grads = jax.jit(jax.grad(loss))(variables, jax.device_put(x, NamedSharding(mesh, P())))
    grads = grads["params"]
    for name, axes in PARTITIONING.items():
        wanted = NamedSharding(mesh, P(*axes))
        assert variables["params"][name]["kernel"].sharding.is_equivalent_to(wanted, ndim=2)
        assert grads[name]["kernel"].sharding.is_equivalent_to(wanted, ndim=2)
    on_one = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), variables["params"])
    want = jax.jit(jax.grad(loss_on_one))(on_one)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
