"""The cache append custom call: new tokens go into their pages, in place."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flashmla_jax import reference
from flashmla_jax._checks import array, fewer
from flashmla_jax.cache.layout import DTYPES, PAGE_SIZE
from flashmla_jax.ops import _ffi, _mapped, _sharding

_ALIGNMENT = 16  # bytes; csrc/params.h has the same number


def cache_append(
    k_cache: jax.Array,
    new_kv: jax.Array,
    block_table: jax.Array,
    start: jax.Array,
    count: jax.Array,
    copy_from: jax.Array | None = None,
    *,
    cuda_graph: bool = True,
) -> jax.Array:
    """Writes new tokens into their pages.

    Row j of sequence i becomes token `t = start[i] + j`, in page `block_table[i, t // 64]`, row
    `t % 64`, for all `j < min(count[i], num_tokens)`. A row without a place is dropped: one at a
    negative position, beyond the table, or in a page outside the pool. The rest of the pool keeps
    its contents. Where two rows have the same place, what it holds afterwards is
    unspecified. Under `vmap` every element of the mapped axis has a pool of its own: a pool that
    they share is copied for each. Over several devices, new tokens that are sharded are gathered
    on all that have their pages.

    The result is `k_cache`'s own buffer when that is donated to the jitted function (or is an
    intermediate value of it); otherwise XLA copies the pool first, as for any functional update.

    Args:
      k_cache: [num_pages, 64, h_kv, n] bfloat16, float16, float32, or uint8 for FP8 tokens as
        `flashmla_jax.cache.layout.quantize` makes them: the page pool. n is 576 and 656 for
        attention, and may be any number that makes a multiple of 16 bytes.
      new_kv: [batch, num_tokens, h_kv, n] in k_cache's dtype.
      block_table: int32[batch, max_pages_per_seq], the pages of each sequence.
      start: int32[batch], the position of each sequence's first new token.
      count: int32[batch], how many of its rows are written; 0 or less writes none.
      copy_from: int32[batch], for copy on write: a page of which all rows before `start[i] % 64`
        are copied into the page of sequence i's first new token, provided that this has a place.
        The call must not write these rows of that page. None, or a page outside the pool (-1),
        copies none.
      cuda_graph: see `flash_mla_with_kvcache`.

    Returns:
      The pool [num_pages, 64, h_kv, n] with the tokens in it.

    Raises:
      ValueError: for shapes and dtypes outside the above, at trace time.
    """
    k_cache = array("k_cache", k_cache, "[num_pages, 64, h_kv, n]")
    new_kv = array("new_kv", new_kv, "[batch, num_tokens, h_kv, n]")
    block_table = array("block_table", block_table, "[batch, max_pages_per_seq]", jnp.int32)
    start = array("start", start, "[batch]", jnp.int32)
    count = array("count", count, "[batch]", jnp.int32)
    if copy_from is None:
        copy_from = jnp.full_like(count, -1)
    copy_from = array("copy_from", copy_from, "[batch]", jnp.int32)
    num_pages, page_size, h_kv, head_dim = k_cache.shape
    batch, num_tokens = new_kv.shape[:2]

    if k_cache.dtype not in (*DTYPES, jnp.uint8):
        raise ValueError(
            f"k_cache must be bfloat16, float16, float32 or uint8, got {k_cache.dtype}"
        )
    if new_kv.dtype != k_cache.dtype:
        raise ValueError(f"new_kv must have k_cache's dtype {k_cache.dtype}, got {new_kv.dtype}")
    if page_size != PAGE_SIZE or head_dim < 1 or head_dim * k_cache.dtype.itemsize % _ALIGNMENT:
        raise ValueError(
            f"k_cache must be [num_pages, {PAGE_SIZE}, h_kv, n], with a multiple of {_ALIGNMENT} "
            f"bytes in n numbers, got shape {k_cache.shape} of {k_cache.dtype}"
        )
    if fewer(num_pages, 1) or fewer(h_kv, 1):
        raise ValueError(f"k_cache must hold a page and a KV head, got shape {k_cache.shape}")
    if new_kv.shape[2:] != k_cache.shape[2:]:
        raise ValueError(
            f"new_kv must have k_cache's last two axes {k_cache.shape[2:]}, "
            f"got shape {new_kv.shape}"
        )
    if block_table.shape[0] != batch or fewer(block_table.shape[1], 1):
        raise ValueError(
            f"block_table must be [batch, max_pages_per_seq] with {batch=} and at least one page, "
            f"got shape {block_table.shape}"
        )
    for name, value in {"start": start, "count": count, "copy_from": copy_from}.items():
        if value.shape != (batch,):
            raise ValueError(f"{name} must be [batch] with {batch=}, got shape {value.shape}")

    if batch == 0 or num_tokens == 0:
        return k_cache
    operands = k_cache, new_kv, block_table, start, count, copy_from
    (pool,) = cache_append_p.bind(*operands, cuda_graph=bool(cuda_graph), mapped=())
    return pool


# --- Abstract evaluation ---------------------------------------------------------------------


SHARDING = _sharding.Rule(
    operands={
        "k_cache": ("num_pages", "64", "h_kv", "n"),
        "new_kv": ("batch", "num_tokens", "h_kv", "n"),
        "block_table": ("batch", "max_pages_per_seq"),
        "start": ("batch",),
        "count": ("batch",),
        "copy_from": ("batch",),
    },
    results=(("num_pages", "64", "h_kv", "n"),),
    divided=("h_kv",),
    pool="k_cache",
    small=("block_table", "start", "count", "copy_from"),
    advice=(
        "Divide nothing but h_kv; or divide pages with flashmla_jax.parallel, where each device "
        "has its own."
    ),
)


def _abstract_eval(
    *operands: Any, mapped: _mapped.Mapped, **_: Any
) -> tuple[jax.core.ShapedArray, ...]:
    k_cache = operands[0]
    result = k_cache.shape, k_cache.dtype
    return _sharding.result_types(SHARDING.over(mapped), operands, [result])


cache_append_p = _ffi.define_primitive("cache_append", _abstract_eval)


# --- Lowerings -------------------------------------------------------------------------------


def _call(target: str, *operands: jax.Array) -> list[jax.Array]:
    k_cache = operands[0]
    result = jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype)
    return [jax.ffi.ffi_call(target, result, input_output_aliases={0: 0})(*operands)]


def _call_cpu(*operands: jax.Array, **_: Any) -> list[jax.Array]:
    return _call(_ffi.CACHE_APPEND, *operands)


def _call_cuda(*operands: jax.Array, cuda_graph: bool) -> list[jax.Array]:
    return _call(_ffi.CACHE_APPEND if cuda_graph else _ffi.CACHE_APPEND_NO_GRAPH, *operands)


def _reference(*operands: jax.Array, **_: Any) -> list[jax.Array]:
    return [reference.cache_append(*operands)]


_POOL, _TABLES = 0, (2, 5)  # which operands are the page pool, and pages of it
_folded = functools.partial(_mapped.folded, pool=_POOL, tables=_TABLES)
# The kernels take pools with mapped axes in front: a reshape would stand between the argument and
# its update in place.
_in_place = functools.partial(_folded, fold_pool=False)

_ffi.register_lowerings(
    cache_append_p,
    kernels={_ffi.CPU: _in_place(_call_cpu), _ffi.CUDA: _in_place(_call_cuda)},
    reference=_folded(_reference),
    sharding=SHARDING,
    name="flashmla_cache_append",
)


# --- Batching --------------------------------------------------------------------------------

# Each element of the mapped axis has its own pool; one that they share is copied first.
_ffi.register_batching(
    cache_append_p,
    functools.partial(_mapped.batch, cache_append_p, pool=_POOL, shares_pool=False),
)


# --- Differentiation -------------------------------------------------------------------------


def _tangents(
    operands: tuple[jax.Array, ...],
    results: list[jax.Array],
    operand_tangents: list[Any],
    **params: Any,
) -> list[jax.Array]:
    """Linear in pool and tokens: their tangents are appended as they are."""
    del results
    k_cache, new_kv = operand_tangents[:2]
    return list(cache_append_p.bind(k_cache, new_kv, *operands[2:], **params))


def _transpose(
    cotangent: jax.Array, k_cache: Any, new_kv: Any, *integers: jax.Array, mapped: Any, **_: Any
) -> list[jax.Array | None]:
    """What was written came from the tokens, the rest from the pool."""
    transpose = functools.partial(reference.cache_append_transpose, num_tokens=new_kv.shape[-3])
    for _axis in mapped:
        transpose = jax.vmap(transpose)
    cotangents = transpose(cotangent, *integers)
    return [
        x if isinstance(operand, jax.ShapeDtypeStruct) else None
        for x, operand in zip(cotangents, (k_cache, new_kv), strict=True)
    ] + [None] * len(integers)


_ffi.register_tangents(cache_append_p, _tangents)
_ffi.register_transpose(cache_append_p, _transpose)
