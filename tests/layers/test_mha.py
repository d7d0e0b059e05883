"""`flashmla_jax.layers.mha` against float64 NumPy, and cuDNN's attention against XLA's."""

from __future__ import annotations

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.layers import mha

# The platforms are compared with NumPy in float32, on the CPU.
on_cpu = pytest.mark.usefixtures("on_cpu")

BATCH, HEADS, QK, V = 2, 3, 10, 7


def make_qkv(s_q, s_kv, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((BATCH, s_q, HEADS, QK)).astype(np.float32)
    k = rng.standard_normal((BATCH, s_kv, HEADS, QK)).astype(np.float32)
    return q, k, rng.standard_normal((BATCH, s_kv, HEADS, V)).astype(np.float32)


def oracle(q, k, v, scale, visible):
    """Out and lse in float64, one query at a time; `visible` [batch, s_q, s_kv]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    batch, s_q, heads, _ = q.shape
    out = np.zeros((batch, s_q, heads, v.shape[-1]))
    lse = np.full((batch, heads, s_q), -np.inf)
    for i, j, h in np.ndindex(batch, s_q, heads):
        keys = visible[i, j]
        if keys.any():
            scores = scale * k[i, keys, h] @ q[i, j, h]
            weights = np.exp(scores - scores.max())
            lse[i, h, j] = scores.max() + np.log(weights.sum())
            out[i, j, h] = weights @ v[i, keys, h] / weights.sum()
    return out, lse


@on_cpu
@pytest.mark.parametrize("queries_at_once", [0, 4, 19])
def test_causal(queries_at_once):
    """Less than one query at a time, which is one, four with a remainder, and all at once."""
    q, k, v = make_qkv(19, 19)
    max_scores = BATCH * HEADS * 19 * queries_at_once
    attend = functools.partial(mha.attention, causal=True, max_scores=max_scores)
    out, lse = jax.jit(attend, static_argnums=3)(q, k, v, 0.7)
    want = oracle(q, k, v, 0.7, np.broadcast_to(np.tri(19, dtype=bool), (BATCH, 19, 19)))
    assert lse.dtype == np.float32
    np.testing.assert_allclose(out, want[0], atol=1e-6)
    np.testing.assert_allclose(lse, want[1], atol=2e-6)


@on_cpu
@pytest.mark.parametrize(("lengths", "queries_at_once"), [([0, 23], 2), ([5, 1], 8), (None, 2)])
def test_keys_of_given_lengths(lengths, queries_at_once):
    q, k, v = make_qkv(8, 23)
    visible = np.arange(23) < np.array(lengths or [23, 23])[:, None, None]
    visible = np.broadcast_to(visible, (BATCH, 8, 23))
    want = oracle(q, k, v, -0.7, visible)
    for i, length in enumerate(lengths or []):
        k[i, length:] = 1e4  # finite, and not to be seen
        v[i, length:] = 1e4
    out, lse = jax.jit(mha.attention, static_argnums=3, static_argnames="max_scores")(
        q,
        k,
        v,
        -0.7,
        kv_lengths=None if lengths is None else jnp.array(lengths),
        max_scores=BATCH * HEADS * 23 * queries_at_once,
    )
    np.testing.assert_allclose(out, want[0], atol=1e-6)
    np.testing.assert_allclose(lse, want[1], atol=2e-6)


@on_cpu
def test_no_queries():
    q, k, v = make_qkv(0, 0)
    out, lse = mha.attention(q, k, v, 0.7, causal=True)
    assert out.shape == (BATCH, 0, HEADS, V)
    assert lse.shape == (BATCH, HEADS, 0)


@on_cpu
def test_exported_for_any_batch():
    (batch,) = jax.export.symbolic_shape("batch")
    attend = jax.jit(functools.partial(mha.attention, softmax_scale=0.7, causal=True))
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in make_qkv(9, 9)]
    exported = jax.export.export(attend, platforms=["cpu", "cuda"])(*shapes)
    got, want = exported.call(*make_qkv(9, 9)), attend(*make_qkv(9, 9))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, want)


@on_cpu
def test_scores_are_float32_and_may_be_large():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in make_qkv(5, 5))
    out, lse = mha.attention(q, k, v, 100.0, causal=True)
    visible = np.broadcast_to(np.tri(5, dtype=bool), (BATCH, 5, 5))
    want = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), 100.0, visible)
    assert out.dtype == jnp.bfloat16
    assert want[1].max() > 300  # whose exponential overflows
    np.testing.assert_allclose(out.astype(np.float32), want[0], atol=2e-2)
    np.testing.assert_allclose(lse, want[1], rtol=1e-5)


@on_cpu
def test_derivative():
    """Against the derivative of attention written without blocks, in float64 differences."""
    q, k, v = make_qkv(9, 9)
    ct = np.random.default_rng(1).standard_normal((BATCH, 9, HEADS, V)).astype(np.float32)

    def loss(q, k, v):
        out, _ = mha.attention(q, k, v, 0.7, causal=True, max_scores=BATCH * HEADS * 9 * 2)
        return jnp.sum(out * ct)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    visible = np.broadcast_to(np.tri(9, dtype=bool), (BATCH, 9, 9))
    rng = np.random.default_rng(2)
    for i, grad in enumerate(grads):
        direction = rng.standard_normal(grad.shape)
        ends = []
        for eps in (1e-5, -1e-5):
            moved = [x.astype(np.float64) for x in (q, k, v)]
            moved[i] = moved[i] + eps * direction
            ends.append(np.sum(oracle(*moved, 0.7, visible)[0] * ct))
        want = (ends[0] - ends[1]) / 2e-5
        assert np.sum(grad * direction) == pytest.approx(want, rel=1e-4)


@on_cpu
@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_long_prompts_is_bounded(backward):
    shape = jax.ShapeDtypeStruct((1, 8192, 4, 32), jnp.float32)

    def attend(q, k, v):
        return mha.attention(q, k, v, 1.0, causal=True, max_scores=2**20)[0].sum()

    function = jax.grad(attend, argnums=(0, 1, 2)) if backward else attend
    memory = jax.jit(function).lower(shape, shape, shape).compile().memory_analysis()
    # All the scores would be 1 GiB. A quarter of that is what 8 blocks of them and 16 arrays of the
    # inputs' size come to.
    assert memory.temp_size_in_bytes < 4 * 2**20 * 8 + 16 * 4 * shape.size


@on_cpu
def test_causal_attention_skips_most_of_what_it_masks():
    """Of 16 blocks of queries, the first four are multiplied with a quarter of the keys."""
    shape = jax.ShapeDtypeStruct((1, 64, 1, 8), jnp.float32)
    compiled = jax.jit(
        lambda q, k, v: mha.attention(q, k, v, 1.0, causal=True, max_scores=4 * 64)
    ).lower(shape, shape, shape)
    text = compiled.as_text()
    assert {f"1x{n}x1x8" for n in (16, 32, 48, 64)} <= set(re.findall(r"tensor<(\w+)xf32>", text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "triton"}, "implementation must be .* got 'triton'"),
        ({"k": np.zeros((2, 5, 3, 9), np.float32)}, r"q and k must be .*\(2, 5, 3, 9\)"),
        ({"v": np.zeros((2, 4, 3, 7), np.float32)}, r"v must have k's axes .*\(2, 4, 3, 7\)"),
        ({"causal": True}, "causal attention is .* 4 queries, 5 keys"),
        ({"kv_lengths": np.zeros(3, np.int32)}, r"kv_lengths must be \[batch\] = \(2,\), got \(3,"),
    ],
)
def test_errors(changes, message):
    q, k, v = make_qkv(4, 5)
    arguments = {"q": q, "k": k, "v": v, "softmax_scale": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        mha.attention(**arguments)


# --- cuDNN -------------------------------------------------------------------------------------


def shapes(dtype=jnp.bfloat16, qk=192, v=128, batch=(2,)):
    q = jax.ShapeDtypeStruct((*batch, 32, 4, qk), dtype)
    return q, q, jax.ShapeDtypeStruct((*batch, 32, 4, v), dtype)


def custom_calls(function, *args, platform="cuda"):
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    return re.findall(r"custom_call @(\S+?)\(", lowered.as_text())


@pytest.fixture
def with_cudnn(monkeypatch):
    """JAX believes in a Hopper GPU and a cuDNN that knows it, and lowers for them."""
    monkeypatch.setattr(mha._cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(mha._cudnn, "check_compute_capability", lambda _: True)


def test_jax_has_the_private_function_still():
    parameters = inspect.signature(mha._cudnn.dot_product_attention).parameters
    names = ["query", "key", "value", "q_seqlen", "kv_seqlen", "scale", "mask_type"]
    assert {*names, "return_residual"} <= set(parameters)
    assert parameters["qkv_layout"].default == "BTNH"


@pytest.mark.usefixtures("with_cudnn")
def test_the_platform_chooses():
    attend = functools.partial(mha.attention, softmax_scale=0.1, causal=True)
    assert custom_calls(attend, *shapes()) == ["__cudnn$fmhaSoftmax"]
    assert custom_calls(attend, *shapes(), platform="cpu") == []
    xla = functools.partial(attend, implementation="xla")
    assert custom_calls(xla, *shapes()) == []


@pytest.mark.usefixtures("with_cudnn")
def test_derivative_and_vmap_of_cudnn():
    attend = functools.partial(mha.attention, softmax_scale=0.1, causal=True)

    def loss(*qkv):
        return attend(*qkv)[0].astype(jnp.float32).sum()

    calls = custom_calls(jax.grad(loss, argnums=(0, 1, 2)), *shapes())
    assert calls == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert custom_calls(jax.vmap(attend), *shapes(batch=(3, 2))) == ["__cudnn$fmhaSoftmax"]
    grads = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), *shapes())
    assert [g.shape for g in grads] == [x.shape for x in shapes()]


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("lengths", [False, True])
def test_shapes_of_cudnn(lengths):
    q, k, v = shapes()
    kv_lengths = jax.ShapeDtypeStruct((2,), jnp.int32) if lengths else None
    out, lse = jax.eval_shape(
        lambda *args: mha.attention(*args[:3], 0.1, kv_lengths=args[3], implementation="cudnn"),
        *(q, k, v, kv_lengths),
    )
    assert (out.shape, out.dtype) == (v.shape, jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 32), jnp.float32)


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize(
    "arrays",
    [
        shapes(dtype=jnp.float32),
        shapes(qk=264, v=128),
        shapes(qk=100, v=64),
        shapes(qk=64, v=128),
    ],
    ids=["float32", "wide heads", "odd heads", "wide values"],
)
def test_where_cudnn_has_no_kernel(arrays):
    assert custom_calls(lambda *qkv: mha.attention(*qkv, 0.1, causal=True), *arrays) == []
    with pytest.raises(NotImplementedError):
        jax.eval_shape(lambda *qkv: mha.attention(*qkv, 0.1, implementation="cudnn"), *arrays)


def test_without_cudnn(monkeypatch):
    monkeypatch.setattr(mha, "_cudnn", None)
    assert custom_calls(lambda *qkv: mha.attention(*qkv, 0.1, causal=True), *shapes()) == []
    with pytest.raises(NotImplementedError, match="no cuDNN attention"):
        jax.eval_shape(lambda *qkv: mha.attention(*qkv, 0.1, implementation="cudnn"), *shapes())
