"""The checks that protect memory, made again in C++, and what programs of sparse attention hold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashmla_jax as fm
from flashmla_jax.ops import _ffi

TARGET = _ffi.SPARSE_ATTENTION
NAMES = (
    "q",
    "k_cache",
    "indices",
    "length",
    "extra_k_cache",
    "extra_indices",
    "extra_length",
    "attn_sink",
)

on_cpu = pytest.mark.usefixtures("on_cpu")


def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return struct(*shape, dtype=jnp.int32)


GOOD = {
    "q": struct(2, 3, 4, 576),
    "k_cache": struct(5, 16, 1, 576),
    "indices": integers(2, 3, 7),
    "length": integers(2),
    "extra_k_cache": struct(1, 2, 1, 576),
    "extra_indices": integers(2, 3, 0),
    "extra_length": integers(2),
    "attn_sink": struct(4, dtype=jnp.float32),
    "out": struct(2, 3, 4, 512),
    "max_logits": struct(2, 4, 3, dtype=jnp.float32),
    "lse": struct(2, 4, 3, dtype=jnp.float32),
}
FP8 = struct(5, 16, 1, 656, dtype=jnp.uint8)


def call(**changes: jax.ShapeDtypeStruct) -> list[jax.Array]:
    """The bare call on zeros."""
    shapes = GOOD | changes
    f = jax.ffi.ffi_call(TARGET, [shapes[name] for name in ("out", "max_logits", "lse")])
    operands = [jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in NAMES]
    return jax.block_until_ready(f(*operands, softmax_scale=np.float32(1)))


@on_cpu
def test_the_bare_call_works() -> None:
    out, max_logits, lse = call()  # lengths are zero
    assert not np.asarray(out).any()
    assert (np.asarray(max_logits) == -np.inf).all()
    assert (np.asarray(lse) == -np.inf).all()


@on_cpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": struct(2, 3, 4, 640)}, "expected q"),
        ({"q": struct(2, 3, 4, 576, dtype=jnp.int32)}, "expected q"),
        ({"q": struct(2, 3, 4, 512)}, r"1, 512\]"),
        ({"k_cache": struct(5, 16, 2, 576)}, "expected pools"),
        ({"k_cache": struct(5, 0, 1, 576)}, "expected pools"),
        ({"k_cache": struct(5, 16, 576)}, "expected pools"),
        ({"k_cache": struct(5, 16, 1, 576, dtype=jnp.float32)}, "share one of"),
        ({"k_cache": struct(5, 16, 1, 576, dtype=jnp.uint8)}, "656"),
        ({"k_cache": FP8}, "one format"),
        ({"extra_k_cache": struct(1, 2, 1, 512)}, "expected pools"),
        ({"indices": integers(2, 2, 7)}, "expected indices"),
        ({"indices": integers(2, 7)}, "expected indices"),
        ({"length": integers(3)}, "expected indices"),
        ({"extra_indices": integers(3, 3, 0)}, "expected indices"),
        ({"extra_length": integers(2, 1)}, "expected indices"),
        ({"attn_sink": struct(3, dtype=jnp.float32)}, "attn_sink"),
        ({"out": struct(2, 3, 4, 576)}, "expected out"),
        ({"out": struct(2, 3, 4, 512, dtype=jnp.float16)}, "expected out"),
        ({"max_logits": struct(2, 3, 4, dtype=jnp.float32)}, "max_logits"),
        ({"lse": struct(2, 4, 2, dtype=jnp.float32)}, "lse"),
        (
            {
                "q": struct(2, 3, 4, 576, dtype=jnp.float16),
                "k_cache": FP8,
                "extra_k_cache": FP8,
                "out": struct(2, 3, 4, 512, dtype=jnp.float16),
            },
            "float16 is not for FP8",
        ),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_the_handler_refuses(changes: dict[str, jax.ShapeDtypeStruct], message: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{TARGET}.*{message}"):
        call(**changes)


@on_cpu
def test_one_call_for_decoding_and_prefill() -> None:
    q, pool, indices = (
        jnp.ones((2, 1, 3, 576)),
        jnp.ones((2, 64, 1, 576)),
        jnp.zeros((2, 1, 5), int),
    )
    indices = indices.astype(jnp.int32)
    decode = jax.jit(lambda *args: fm.flash_mla_with_kvcache(*args, None, None, indices=indices))
    prefill = jax.jit(lambda *args: fm.flash_mla_sparse_fwd(*args, indices, 1.0))
    for text in (
        decode.lower(q, pool).compile().as_text(),
        prefill.lower(q[:, 0], pool[0]).compile().as_text(),
    ):
        assert text.count(f'custom_call_target="{TARGET}"') == 1
        assert "copy(" not in text


def test_elsewhere_it_is_jax_numpy() -> None:
    q, pool, indices = struct(2, 1, 3, 576), struct(2, 64, 1, 576), integers(2, 1, 5)
    attend = jax.jit(lambda q, x, i: fm.flash_mla_with_kvcache(q, x, None, None, indices=i))
    _ffi._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no kernels for tpu"):
        text = attend.trace(q, pool, indices).lower(lowering_platforms=("tpu",)).as_text()
    assert TARGET not in text
    assert "dot_general" in text
