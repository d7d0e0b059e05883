"""The dense decode custom call: attention of a few query tokens over a paged latent cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashmla_jax import reference
from flashmla_jax.cache.layout import FP8, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, FP8Format, dequantize
from flashmla_jax.ops import _ffi, _mapped, _sharding, tangents

# The GPU workspace, as csrc/params.h bounds it: up to how many query rows partial results are in
# single precision, query rows per tile, how many parts the tokens are divided into over the whole
# grid, at most, and what each notes about merging them.
NARROW_ROWS = 32
ROW_TILE = 64
MAX_PARTITIONS = 144
MERGE_WORDS = 16
# Batch-invariantly, sequences are cut into chunks of so many pages, and into so many at most.
CHUNK_PAGES = 32
MAX_CHUNKS = 128


def dense_decode(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool,
    cuda_graph: bool,
) -> tuple[jax.Array, jax.Array]:
    """Binds the primitive; `flashmla_jax.flash_mla_with_kvcache` checks the arguments."""
    out, lse = dense_decode_p.bind(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        batch_invariant=batch_invariant,
        cuda_graph=cuda_graph,
        mapped=(),
    )
    return out, lse


# --- Abstract evaluation ---------------------------------------------------------------------


SHARDING = _sharding.Rule(
    operands={
        "q": ("batch", "s_q", "h_q", "576"),
        "k_cache": ("num_pages", "64", "h_kv", "576"),
        "block_table": ("batch", "max_pages_per_seq"),
        "cache_seqlens": ("batch",),
    },
    results=(("batch", "s_q", "h_q", "512"), ("batch", "h_q", "s_q")),
    divided=("batch", "h_kv", "h_q"),
    pool="k_cache",
    small=("block_table", "cache_seqlens"),
    advice=(
        "Divide batch or h_q, and of k_cache nothing but h_kv; or divide pages with "
        "flashmla_jax.parallel, where each device has its own."
    ),
)


def _abstract_eval(
    *operands: Any, mapped: _mapped.Mapped, **_: Any
) -> tuple[jax.core.ShapedArray, ...]:
    q = operands[0]
    *sizes, batch, s_q, h_q, _head_dim = q.shape
    out, lse = (*sizes, batch, s_q, h_q, HEAD_DIM_V), (*sizes, batch, h_q, s_q)
    results = (out, q.dtype), (lse, jnp.float32)
    return _sharding.result_types(SHARDING.over(mapped), operands, results)


dense_decode_p = _ffi.define_primitive("flash_mla_with_kvcache", _abstract_eval)


# --- Lowerings -------------------------------------------------------------------------------


def _results(q: jax.Array | jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    batch, s_q, h_q, _ = q.shape
    return [
        jax.ShapeDtypeStruct((batch, s_q, h_q, HEAD_DIM_V), q.dtype),
        jax.ShapeDtypeStruct((batch, h_q, s_q), jnp.float32),
    ]


def results_and_workspace(
    q: jax.ShapeDtypeStruct, h_kv: int, max_pages: int
) -> list[jax.ShapeDtypeStruct]:
    """What a call on a GPU writes, for calls that do more than that."""
    return _results(q) + _workspace(q.shape, h_kv, max_pages, batch_invariant=False)


def sparse_workspace(h_q: int, fmt: FP8Format | None) -> list[jax.ShapeDtypeStruct]:
    """That of sparse attention, to which each query token is a sequence.

    Only over `FP8` tokens are there kernels for few query rows.
    """
    partial_out, *others = _workspace((1, 1, h_q, HEAD_DIM), 1, 1, batch_invariant=False)
    if fmt != FP8:
        partial_out = jax.ShapeDtypeStruct(partial_out.shape, np.float16)
    return [partial_out, *others]


def _workspace(
    q: tuple[int, ...], h_kv: int, max_pages: int, batch_invariant: bool
) -> list[jax.ShapeDtypeStruct]:
    """Partial results of sequences that several thread blocks share: bounded by the grid.

    Batch-invariantly, those of every chunk of every sequence that the table has room for. Batch
    and pages may be symbolic.
    """
    batch, s_q, h_q, _ = q
    rows = s_q * (h_q // h_kv)
    row_tiles = h_kv * -(-rows // ROW_TILE)
    partitions = max(1, MAX_PARTITIONS // row_tiles)
    slots = 2 * partitions if partitions > 1 else 0
    if batch_invariant:
        pages = max_pages + -(-s_q // PAGE_SIZE)
        chunks = jax.core.min_dim((pages + CHUNK_PAGES - 1) // CHUNK_PAGES, MAX_CHUNKS)
        divided = jax.core.min_dim(chunks - 1, 1)  # 0 or 1
        slots = divided * batch * chunks
    slots = jax.core.max_dim(1, row_tiles * slots)
    tile = (slots, min(rows, ROW_TILE))
    dtype = np.float32 if rows <= NARROW_ROWS else np.float16
    return [
        jax.ShapeDtypeStruct((*tile, HEAD_DIM_V), dtype),
        jax.ShapeDtypeStruct((*tile, 4), np.float32),
        jax.ShapeDtypeStruct((partitions, MERGE_WORDS), np.int32),
    ]


def _call_cpu(
    *operands: jax.Array, softmax_scale: float, causal: bool, batch_invariant: bool, **_: Any
) -> list[jax.Array]:
    del batch_invariant  # it always is: chunks follow from a sequence's own length
    call = jax.ffi.ffi_call(_ffi.DENSE_DECODE, _results(operands[0]))
    return list(call(*operands, softmax_scale=np.float32(softmax_scale), causal=causal))


def _call_cuda(
    *operands: jax.Array,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool,
    cuda_graph: bool,
) -> list[jax.Array]:
    q, k_cache, block_table, _ = operands
    if _is_fp8(k_cache) and q.dtype == jnp.float32:  # such numbers are for the CPU
        return _reference(
            *operands, softmax_scale=softmax_scale, causal=causal, batch_invariant=batch_invariant
        )
    if q.dtype == jnp.float32:
        raise NotImplementedError(
            "flash_mla_with_kvcache runs bfloat16 and float16 on GPUs, float32 on the CPU only; "
            f"got q {q.dtype}. Cast q and k_cache, or set JAX_PLATFORMS=cpu."
        )
    workspace = _workspace(q.shape, k_cache.shape[2], block_table.shape[1], batch_invariant)
    target = _ffi.DENSE_DECODE if cuda_graph else _ffi.DENSE_DECODE_NO_GRAPH
    call = jax.ffi.ffi_call(target, _results(q) + workspace)
    out, lse, *_ = call(
        *operands,
        softmax_scale=np.float32(softmax_scale),
        causal=causal,
        batch_invariant=batch_invariant,
    )
    return [out, lse]


def _reference(
    *operands: jax.Array, softmax_scale: float, causal: bool, batch_invariant: bool, **_: Any
) -> list[jax.Array]:
    q, k_cache = operands[:2]
    if batch_invariant:
        raise NotImplementedError(
            'deterministic="batch_invariant" runs on CPUs and, but for float32, on Hopper GPUs; '
            "elsewhere flash_mla_with_kvcache is jax.numpy, whose sums XLA orders as it likes."
        )
    to_numbers = functools.partial(dequantize, dtype=q.dtype) if _is_fp8(k_cache) else None
    return list(
        reference.flash_mla_with_kvcache(
            *operands, softmax_scale=softmax_scale, causal=causal, dequantize=to_numbers
        )
    )


def _is_fp8(k_cache: jax.Array) -> bool:
    return k_cache.dtype == jnp.uint8


_POOL, _TABLES = 1, (2,)  # which operands are the page pool, and pages of it
_folded = functools.partial(_mapped.folded, pool=_POOL, tables=_TABLES)

_ffi.register_lowerings(
    dense_decode_p,
    kernels={_ffi.CPU: _folded(_call_cpu), _ffi.CUDA: _folded(_call_cuda)},
    reference=_folded(_reference),
    sharding=SHARDING,
    name="flashmla_dense_decode",
)


# --- Batching --------------------------------------------------------------------------------

_ffi.register_batching(
    dense_decode_p,
    functools.partial(_mapped.batch, dense_decode_p, pool=_POOL, shares_pool=True),
)


# --- Differentiation -------------------------------------------------------------------------


def _tangents(
    operands: tuple[jax.Array, ...],
    results: list[jax.Array],
    operand_tangents: list[Any],
    *,
    softmax_scale: float,
    causal: bool,
    mapped: _mapped.Mapped,
    **_: Any,  # of the forward pass
) -> list[jax.Array]:
    q, k_cache = operand_tangents[:2]
    if _is_fp8(operands[1]):
        raise NotImplementedError(
            "flash_mla_with_kvcache is not differentiable over FP8 caches: differentiate over "
            "pages of numbers, which flashmla_jax.cache.layout.dequantize makes of them"
        )

    def of_one(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k_cache, table, lengths, out, lse, *tangents_of = arrays
        return tangents.dense_decode(
            (q, k_cache, table, lengths),
            (out, lse),
            *tangents_of,
            softmax_scale=softmax_scale,
            causal=causal,
        )

    for own in reversed(mapped):
        pool = 0 if own else None
        of_one = jax.vmap(of_one, (0, pool, 0, 0, 0, 0, 0, pool))
    return list(of_one(*operands, *results, q, k_cache))


_ffi.register_tangents(dense_decode_p, _tangents)
