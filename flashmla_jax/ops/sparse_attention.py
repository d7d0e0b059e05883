"""The sparse attention custom call: of query tokens to those tokens of a pool that they name."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashmla_jax import reference
from flashmla_jax.cache.layout import FP8, FP8_512, HEAD_DIM, HEAD_DIM_V, FP8Format, take_tokens
from flashmla_jax.ops import _ffi, _mapped, _sharding
from flashmla_jax.ops.dense_decode import sparse_workspace

# Where there is no kernel: query tokens whose own tokens are gathered at a time.
_CHUNK = 64

Scope = tuple[jax.Array, jax.Array, jax.Array | None]


def sparse_attention(
    q: jax.Array,
    scope: Scope,
    extra: Scope | None = None,
    *,
    softmax_scale: float,
    attn_sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Binds the primitive; the public functions check the arguments.

    Args:
      q: [batch, s_q, h_q, head_dim].
      scope: a pool [num_pages, page_size, 1, head_dim] or FP8; the places of the tokens that are
        attended to in it, int32[batch, s_q, topk]; and how many of them count, int32[batch], or
        None for all.
      extra: a second one, in the same format.
      softmax_scale: factor of the scores.
      attn_sink: float32[h_q] or None.

    Returns:
      out [batch, s_q, h_q, 512] in q's dtype; max_logits and lse, float32[batch, h_q, s_q].
    """
    batch, s_q, h_q, _ = q.shape
    if extra is None:
        nothing = jnp.zeros((1, 1, *scope[0].shape[2:]), scope[0].dtype)
        extra = nothing, jnp.zeros((batch, s_q, 0), jnp.int32), None
    operands = [q]
    for pool, indices, length in (scope, extra):
        if length is None:
            length = jnp.full(batch, indices.shape[-1], jnp.int32)
        operands += [pool, indices, length]
    if attn_sink is None:
        attn_sink = jnp.full(h_q, -jnp.inf, jnp.float32)
    out, max_logits, lse = sparse_attention_p.bind(
        *operands, attn_sink, softmax_scale=softmax_scale, mapped=()
    )
    return out, max_logits, lse


# --- Abstract evaluation ---------------------------------------------------------------------


SHARDING = _sharding.Rule(
    operands={
        "q": ("batch", "s_q", "h_q", "head_dim"),
        "k_cache": ("num_pages", "page_size", "h_kv", "token"),
        "indices": ("batch", "s_q", "topk"),
        "topk_length": ("batch",),
        "extra_k_cache": ("extra_pages", "extra_page_size", "extra_h_kv", "token"),
        "extra_indices_in_kvcache": ("batch", "s_q", "extra_topk"),
        "extra_topk_length": ("batch",),
        "attn_sink": ("h_q",),
    },
    results=(
        ("batch", "s_q", "h_q", "512"),
        ("batch", "h_q", "s_q"),
        ("batch", "h_q", "s_q"),
    ),
    divided=("batch", "h_kv", "h_q"),
    pool="k_cache",
    small=("indices", "topk_length", "extra_indices_in_kvcache", "extra_topk_length", "attn_sink"),
    advice="Divide batch or h_q, and nothing of the pools.",
)


def _abstract_eval(*operands: Any, **_: Any) -> tuple[jax.core.ShapedArray, ...]:
    q = operands[0]
    batch, s_q, h_q, _head_dim = q.shape
    per_row = (batch, h_q, s_q), jnp.float32
    results = [((batch, s_q, h_q, HEAD_DIM_V), q.dtype), per_row, per_row]
    return _sharding.result_types(SHARDING, operands, results)


sparse_attention_p = _ffi.define_primitive("sparse_attention", _abstract_eval)


# --- Lowerings -------------------------------------------------------------------------------


def _call(
    operands: tuple[jax.Array, ...], softmax_scale: float, workspace: list[jax.ShapeDtypeStruct]
) -> list[jax.Array]:
    q = operands[0]
    batch, s_q, h_q = q.shape[:3]
    per_row = jax.ShapeDtypeStruct((batch, h_q, s_q), jnp.float32)
    out = jax.ShapeDtypeStruct((batch, s_q, h_q, HEAD_DIM_V), q.dtype)
    call = jax.ffi.ffi_call(_ffi.SPARSE_ATTENTION, [out, per_row, per_row, *workspace])
    return list(call(*operands, softmax_scale=np.float32(softmax_scale)))[:3]


def _call_cpu(*operands: jax.Array, softmax_scale: float, **_: Any) -> list[jax.Array]:
    return _call(operands, softmax_scale, [])


def _call_cuda(*operands: jax.Array, softmax_scale: float, **_: Any) -> list[jax.Array]:
    q = operands[0]
    if q.dtype == jnp.float32:  # such numbers are for the CPU
        return _reference(*operands, softmax_scale=softmax_scale)
    workspace = sparse_workspace(q.shape[2], _format_of(q, operands[1]))
    return _call(operands, softmax_scale, workspace)


def _reference(*operands: jax.Array, softmax_scale: float, **_: Any) -> list[jax.Array]:
    q, *scopes, attn_sink = operands
    batch, s_q, h_q = q.shape[:3]
    fmt = _format_of(q, scopes[0])

    def by_query(x: jax.Array) -> jax.Array:
        return x.reshape(batch * s_q, *x.shape[2:])

    listed = []
    for pool, indices, length in (scopes[:3], scopes[3:]):
        exists = (indices >= 0) & (indices < pool.shape[0] * pool.shape[1])
        exists &= jnp.arange(indices.shape[-1], dtype=jnp.int32) < length[:, None, None]
        listed.append(by_query(jnp.where(exists, indices, -1)))

    def attend(query: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, *places = query
        tokens = [
            take_tokens(pool, jnp.maximum(x, 0), fmt, q.dtype)
            for pool, x in zip((scopes[0], scopes[3]), places, strict=True)
        ]
        return reference.sparse_attention(
            q,
            jnp.concatenate(tokens, axis=0),
            jnp.concatenate(places, axis=0) >= 0,
            softmax_scale=softmax_scale,
            attn_sink=attn_sink,
            head_dim_v=HEAD_DIM_V,
        )

    out, largest, lse = jax.lax.map(attend, (by_query(q), *listed), batch_size=_CHUNK)
    per_row = [jnp.swapaxes(x.reshape(batch, s_q, h_q), 1, 2) for x in (largest, lse)]
    return [out.reshape(batch, s_q, h_q, HEAD_DIM_V), *per_row]


def _format_of(q: jax.Array, pool: jax.Array) -> FP8Format | None:
    if pool.dtype != jnp.uint8:
        return None
    return FP8 if q.shape[-1] == HEAD_DIM else FP8_512


_ffi.register_lowerings(
    sparse_attention_p,
    kernels={_ffi.CPU: _call_cpu, _ffi.CUDA: _call_cuda},
    reference=_reference,
    sharding=SHARDING,
    name="flashmla_sparse_attention",
)


# --- Batching --------------------------------------------------------------------------------

_SHARED = (1, 4, 7)  # the operands that are not per sequence: both pools, and the sink

_ffi.register_batching(
    sparse_attention_p,
    functools.partial(_mapped.batch_by_folding, sparse_attention_p, shared=_SHARED),
)


# --- Differentiation -------------------------------------------------------------------------


def _tangents(
    operands: tuple[jax.Array, ...],
    results: list[jax.Array],
    operand_tangents: list[Any],
    **params: Any,
) -> list[jax.Array]:
    """Those of the reference, with respect to queries, sink and pools of numbers."""
    del results
    differentiable = [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)]

    def of_floats(*floats: jax.Array) -> list[jax.Array]:
        own = list(operands)
        for i, x in zip(differentiable, floats, strict=True):
            own[i] = x
        return _reference(*own, **params)

    _, tangents = jax.jvp(
        of_floats,
        [operands[i] for i in differentiable],
        [operand_tangents[i] for i in differentiable],
    )
    return tangents


_ffi.register_tangents(sparse_attention_p, _tangents)
