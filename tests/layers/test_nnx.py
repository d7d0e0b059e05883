"""The Flax module: a holder of parameters, so what matters is that they are the right ones."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxprs import has_precision, products

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
    layer = nnx.eval_shape(
        lambda: MultiHeadLatentAttention(CONFIG, use_bias=True, rngs=nnx.Rngs(0))
    )
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
    assert jax.eval_shape(layer, jnp.ones((1, 3, 20))).shape == (1, 3, 20)


def test_constructor_keywords():
    layer = MultiHeadLatentAttention(
        CONFIG,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=nnx.initializers.zeros_init(),
        bias_init=nnx.initializers.constant(0.5),
        use_bias=True,
        rngs=nnx.Rngs(0),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(jnp.float16)}
    assert not layer.kv_b_proj.kernel[...].any()
    for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
        assert (getattr(layer, name).bias[...] == 0.5).all()
    assert jax.eval_shape(layer, jnp.ones((1, 3, 20))).dtype == jnp.bfloat16


def test_computes_what_mla_defines():
    layer = MultiHeadLatentAttention(CONFIG, use_bias=True, rngs=nnx.Rngs(0))
    layer.q_a_layernorm.scale[...] = jnp.linspace(0.5, 1.5, 12)
    x = jax.random.normal(jax.random.key(1), (2, 11, 20))
    params = nnx.to_pure_dict(nnx.state(layer))
    want = jax.jit(mla.prefill, static_argnums=1)(params, CONFIG, x)
    out, kv = nnx.jit(lambda layer, x: layer.prefill(x))(layer, x)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(kv, want[1])
    np.testing.assert_array_equal(call(layer, x), out)


def make_cache(**changes):
    sizes = {"num_layers": 1, "num_pages": 6, "batch": 2, "max_pages_per_seq": 3}
    return PagedKVCache.create(**sizes | changes, dtype=jnp.float32)


@pytest.fixture(scope="module")
def trained():
    """A layer, tokens, and what it makes of them without a cache."""
    layer = MultiHeadLatentAttention(CONFIG, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 140, 20))
    return layer, x, call(layer, x)


@nnx.jit
def call(layer, x):
    return layer(x)


@functools.partial(nnx.jit, donate_argnames="cache", static_argnames="method")
def step(layer, x, cache, method):
    """The next tokens of every sequence, which `cache` has no room for yet."""
    cache, ok = cache.allocate(jnp.full(2, x.shape[1]))
    out, cache = getattr(layer, method)(x, cache)
    return out, cache, ok


def test_prefill_in_chunks_and_decode_inside_nnx_jit(trained):
    """In donated steps, with absorbed weights and without."""
    layer, x, want = trained
    serving = layer.absorb()
    cache, begin = make_cache(), 0
    for module, method, count in (
        (layer, "prefill_into_cache", 62),
        (layer, "decode", 1),
        (serving, "decode", 3),
        (serving, "prefill_into_cache", 62),
        (layer, "decode", 1),
        (serving, "decode", 3),
    ):
        end, before = begin + count, cache
        out, cache, ok = step(module, x[:, begin:end], cache, method)
        assert ok.all()
        assert before.pages[0].is_deleted()  # being donated
        np.testing.assert_allclose(out, want[:, begin:end], atol=2e-6)
        begin = end


def test_decode_continues_prefill_without_a_cache(trained):
    layer, x, want = trained
    cache, _ = jax.jit(PagedKVCache.allocate)(make_cache(), jnp.full(2, 62))
    _, kv = nnx.jit(lambda layer, x: layer.prefill(x))(layer, x[:, :62])
    out, _, _ = step(layer, x[:, 62:63], cache.append(0, kv[:, :, None]), "decode")
    np.testing.assert_allclose(out, want[:, 62:63], atol=2e-6)


def test_absorbed_layer_is_one_of_its_own(trained):
    layer, x, want = trained
    serving = layer.absorb()
    before, after = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (layer, serving))
    assert after["kv_b_proj"]["w_uk"].shape == (2, 512, 8)
    assert after["kv_b_proj"]["w_uv"].shape == (2, 16, 512)
    assert set(after["kv_b_proj"]) == {"w_uk", "w_uv"}

    def address(array):
        return array.unsafe_buffer_pointer()

    for name in before.keys() - {"kv_b_proj"}:
        assert jax.tree.map(address, after[name]) == jax.tree.map(address, before[name])
    np.testing.assert_array_equal(call(serving.absorb(), x), call(serving, x))

    # Training the one, in place, is not seen by the other, in part or in whole.
    layer = nnx.clone(layer)
    serving = layer.absorb()
    layer.kv_b_proj.kernel[...] *= 2
    layer.o_proj.kernel[...] *= 2
    np.testing.assert_allclose(call(serving, x), want, atol=2e-6)
    assert jnp.abs(call(layer, x) - want).max() > 1e-2
    np.testing.assert_allclose(call(layer.absorb(), x), call(layer, x), atol=2e-5)


def test_partitioning_is_metadata_on_request():
    plain = nnx.eval_shape(lambda: MultiHeadLatentAttention(CONFIG, rngs=nnx.Rngs(0)))
    assert plain.kv_b_proj.kernel.get_metadata().get("out_sharding") is None
    partitioning = mla.head_partitioning(CONFIG, "heads")
    with pytest.raises(ValueError, match="mesh"):  # which Flax wants to be set
        MultiHeadLatentAttention(CONFIG, kernel_partitioning=partitioning, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        layer = MultiHeadLatentAttention(CONFIG, kernel_partitioning=partitioning, rngs=nnx.Rngs(0))
    named = {
        "q_b_proj": {"kernel": P(None, "heads")},
        "kv_b_proj": {"kernel": P(None, "heads")},
        "o_proj": {"kernel": P("heads", None)},
    }
    for name, leaves in nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer))).items():
        assert leaves == named.get(name, {leaf: P() for leaf in leaves})
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer.absorb())))
    assert specs["kv_b_proj"] == dict.fromkeys(["w_uk", "w_uv"], P("heads", None, None))
    with pytest.raises(ValueError, match=r"kernel_partitioning must .* got 'q_proj'"):
        MultiHeadLatentAttention(
            CONFIG, kernel_partitioning={"q_proj": (None, "heads")}, rngs=nnx.Rngs(0)
        )


def test_initialisers_may_attach_partitioning():
    """To all kernels or biases the same; `kernel_partitioning` is in its place, by projection."""
    kernels = nnx.with_partitioning(nnx.initializers.ones_init(), (None, "heads"))
    biases = nnx.with_partitioning(nnx.initializers.ones_init(), ("heads",))
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))

    def specs(**partitioning):
        layer = MultiHeadLatentAttention(
            CONFIG,
            kernel_init=kernels,
            bias_init=biases,
            use_bias=True,
            rngs=nnx.Rngs(0),
            **partitioning,
        )
        kernel = layer.kv_b_proj.kernel[...]
        assert (kernel == 1).all()
        assert kernel.sharding.spec == P(None, "heads")
        state = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer)))
        absorbed = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer.absorb())))
        assert absorbed["kv_b_proj"] == dict.fromkeys(["w_uk", "w_uv"], P("heads", None, None))
        return state

    with jax.set_mesh(mesh):
        plain = specs()
        named = specs(kernel_partitioning={"o_proj": ("heads", None)})
    for leaves in plain.values():
        expected = {"kernel": P(None, "heads"), "bias": P("heads"), "scale": P()}
        assert leaves == {leaf: expected[leaf] for leaf in leaves}
    assert named == {**plain, "o_proj": {"kernel": P("heads", None), "bias": P("heads")}}


def test_implementation_is_handed_on(trained):
    _, x, want = trained
    layer = MultiHeadLatentAttention(CONFIG, implementation="xla", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(call(layer, x), want, atol=2e-6)
    layer = MultiHeadLatentAttention(CONFIG, implementation="none", rngs=nnx.Rngs(0))
    for method in (layer, functools.partial(layer.prefill_into_cache, cache=make_cache())):
        with pytest.raises(ValueError, match=r"implementation must be .* 'none'"):
            jax.eval_shape(method, x)


@pytest.mark.parametrize("precision", [None, jax.lax.Precision.HIGHEST])
@pytest.mark.parametrize("absorbed", [False, True])
def test_precision_is_that_of_all_products(precision, absorbed):
    layer = MultiHeadLatentAttention(
        CONFIG, precision=precision, implementation="xla", rngs=nnx.Rngs(0)
    )
    if absorbed:
        layer = layer.absorb()
    for method, args, least in (
        (layer, (), 8),
        (layer.prefill_into_cache, (make_cache(),), 12),  # which expands cached tokens, too
        (layer.decode, (make_cache(),), 6),
    ):
        found = products(jax.make_jaxpr(method)(jnp.ones((2, 3, 20)), *args).jaxpr)
        assert len(found) >= least
        assert all(has_precision(product, precision) for product in found)


# --- Layers in a scan --------------------------------------------------------------------------

LAYERS = 2


@pytest.fixture(scope="module")
def stack():
    """Layers whose parameters have an axis of layers in front."""
    make = nnx.vmap(lambda rngs: MultiHeadLatentAttention(CONFIG, rngs=rngs))
    return nnx.jit(make)(nnx.Rngs(0).split(LAYERS))


def one_layer_of(stack, i):
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def scan_without_cache(x, layer):
    return x + layer(x)


def scan_with_cache(method, stack, x, cache):
    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    def scan(carry, layer, index):
        x, cache = carry
        out, cache = getattr(layer, method)(x, cache, index)
        return x + out, cache

    cache, ok = cache.allocate(jnp.full(2, x.shape[1]))
    x, cache = scan((x, cache), stack, jnp.arange(LAYERS))
    return x, cache, ok


def test_scan_over_layers_without_a_cache(stack):
    """Values and gradients are those of the layers one by one."""
    x = jax.random.normal(jax.random.key(1), (1, 9, 20))

    def unrolled(stack):
        out = x
        for i in range(LAYERS):
            out = out + one_layer_of(stack, i)(out)
        return jnp.sum(out**2)

    def scanned(stack):
        return jnp.sum(scan_without_cache(x, stack) ** 2)

    value, grads = nnx.jit(nnx.value_and_grad(scanned))(stack)
    want, want_grads = nnx.jit(nnx.value_and_grad(unrolled))(stack)
    assert value == pytest.approx(float(want), rel=1e-5)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert jnp.abs(got).max() > 0
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_scan_over_layers_with_a_cache(stack):
    """Sequences with a common beginning, which is read once and forked, go on by themselves.

    And no program copies pages of the donated cache: without donation it would, which shows that
    a copy would be seen.
    """
    x = jax.random.normal(jax.random.key(1), (2, 80, 20))
    x = x.at[1, :78].set(x[0, :78])
    want = nnx.jit(scan_without_cache)(x, stack)
    stack = nnx.jit(nnx.vmap(lambda layer: layer.absorb()))(stack)
    cache = make_cache(num_layers=LAYERS, num_pages=50, one_pool=True)
    dims = ",".join(map(str, cache.pages[0].shape))

    def compiled(method, tokens, **options):
        step = nnx.jit(scan_with_cache, static_argnums=0, **options)
        return step.lower(method, stack, x[:, :tokens], cache).compile()

    def copies(program):
        return re.findall(rf"= \(?f32\[{dims}\]\S* copy(?:-start)?\(", program.as_text())

    prefill = compiled("prefill_into_cache", 39, donate_argnums=3)
    decode = compiled("decode", 1, donate_argnums=3)
    for program in (prefill, decode):
        assert copies(program) == []
        memory = program.compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= cache.pages[0].nbytes
    assert len(copies(compiled("decode", 1))) == 1

    for program, begin, end in (
        (prefill, 0, 39),
        (prefill, 39, 78),
        (decode, 78, 79),
        (decode, 79, 80),
    ):
        if program is decode:
            fork = jax.jit(PagedKVCache.fork, donate_argnums=0)
            cache = fork(cache, jnp.array([0, 0 if begin == 78 else 1]))
        out, cache, ok = program(stack, x[:, begin:end], cache)
        assert ok.all()
        np.testing.assert_allclose(out, want[:, begin:end], atol=1e-5)


def test_says_what_to_install_without_flax(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "flashmla_jax.layers.nnx")
    with pytest.raises(ImportError, match=r"pip install flashmla-jax\[flax\]"):
        importlib.import_module("flashmla_jax.layers.nnx")
