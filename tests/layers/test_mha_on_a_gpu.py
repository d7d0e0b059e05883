"""Attention by cuDNN: what it computes is what XLA computes, in float32 from the same numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.layers import mha

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(("qk", "v_dim"), [(192, 128), (256, 256)], ids=["deepseek", "glm"]),
    pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16]),
]


def make(dtype, qk, v_dim, s_q, s_kv):
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (s_q, qk), (s_kv, qk), (s_kv, v_dim)
    return [
        jax.random.normal(key, (2, s, 4, dim), dtype)
        for key, (s, dim) in zip(keys, sizes, strict=True)
    ]


def reference(qkv, **options):
    qkv = [x.astype(jnp.float32) for x in qkv]
    return mha.attention(*qkv, precision=jax.lax.Precision.HIGHEST, implementation="xla", **options)


@pytest.mark.parametrize("s", [1, 64, 1000])
def test_causal(dtype, qk, v_dim, s):
    qkv = make(dtype, qk, v_dim, s, s)
    options = {"softmax_scale": 2 * qk**-0.5, "causal": True}
    attend = jax.jit(functools.partial(mha.attention, **options))
    if s > 1:
        assert "fmha" in attend.lower(*qkv).compile().as_text()
    out, lse = attend(*qkv)
    want = reference(qkv, **options)
    np.testing.assert_allclose(out.astype(jnp.float32), want[0], atol=2e-2)
    np.testing.assert_allclose(lse, want[1], atol=2e-3)


def test_keys_of_given_lengths(dtype, qk, v_dim):
    qkv = make(dtype, qk, v_dim, 100, 640)
    options = {"softmax_scale": 2 * qk**-0.5, "kv_lengths": jnp.array([0, 333], jnp.int32)}
    attend = functools.partial(mha.attention, implementation="cudnn", **options)
    out, lse = jax.jit(attend)(*qkv)
    want = reference(qkv, **options)
    np.testing.assert_allclose(out.astype(jnp.float32), want[0], atol=2e-2)
    np.testing.assert_allclose(lse, want[1], atol=2e-3)


def test_derivative(dtype, qk, v_dim):
    qkv = make(dtype, qk, v_dim, 300, 300)
    ct = jax.random.normal(jax.random.key(1), qkv[2].shape)
    options = {"softmax_scale": qk**-0.5, "causal": True}

    def loss(*qkv, attend):
        return jnp.sum(attend(*qkv)[0].astype(jnp.float32) * ct)

    cudnn = functools.partial(mha.attention, implementation="cudnn", **options)
    grads = jax.jit(jax.grad(functools.partial(loss, attend=cudnn), argnums=(0, 1, 2)))(*qkv)
    xla = lambda *qkv: reference(qkv, **options)  # noqa: E731
    want = jax.grad(functools.partial(loss, attend=xla), argnums=(0, 1, 2))(*qkv)
    for got, expected in zip(grads, want, strict=True):
        error = jnp.linalg.norm((got - expected).astype(jnp.float32))
        assert error < 2e-2 * jnp.linalg.norm(expected.astype(jnp.float32))


def test_vmap(dtype, qk, v_dim):
    qkv = make(dtype, qk, v_dim, 80, 80)
    attend = functools.partial(
        mha.attention, softmax_scale=qk**-0.5, causal=True, implementation="cudnn"
    )
    together = attend(*qkv)
    apart = jax.vmap(attend)(*(x[:, None] for x in qkv))
    np.testing.assert_allclose(
        apart[0][:, 0].astype(jnp.float32), together[0].astype(jnp.float32), atol=1e-2
    )
    np.testing.assert_allclose(apart[1][:, 0], together[1], atol=1e-3)
