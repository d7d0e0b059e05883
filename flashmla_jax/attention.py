"""Multi-head Latent Attention over a paged cache: the public functions and their contract."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from flashmla_jax import reference
from flashmla_jax._checks import array, fewer
from flashmla_jax.cache.layout import DTYPES, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE
from flashmla_jax.ops.dense_decode import dense_decode


def get_mla_metadata(
    cache_seqlens: jax.Array,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[jax.Array, None]:
    """Describes a decode step's work, for the two optional arguments of `flash_mla_with_kvcache`.

    Needed by code written for FlashMLA, and by nothing else: the kernels divide the work on the
    device from `cache_seqlens` itself, at the cost of one load, so that there is no schedule to
    make beforehand, and none that could be stale.

    Args:
      cache_seqlens: int32[batch], the number of cached tokens of each sequence; may be traced.
      num_q_tokens_per_head_k: `s_q * h_q // h_kv`, query rows that read one KV head.
      num_heads_k: `h_kv`.
      num_heads_q: `h_q`; only sparse attention uses it.
      is_fp8_kvcache: not supported yet.
      topk: not supported yet.

    Returns:
      tile_scheduler_metadata: int32[batch + 1], the 64-token pages in use before each sequence,
        and in all.
      num_splits: None. How often a sequence is split depends on the GPU that the program will run
        on, and is decided there.

    Raises:
      ValueError: for a malformed argument.
      NotImplementedError: for `is_fp8_kvcache` and `topk`.
    """
    _refuse(is_fp8_kvcache=is_fp8_kvcache or None, topk=topk)
    cache_seqlens = array("cache_seqlens", cache_seqlens, "[batch]", dtype=jnp.int32)
    _positive("num_q_tokens_per_head_k", num_q_tokens_per_head_k)
    _positive("num_heads_k", num_heads_k)
    if num_heads_q is not None:
        _positive("num_heads_q", num_heads_q)
        if num_heads_q % num_heads_k:
            raise ValueError(
                f"num_heads_q must be a multiple of num_heads_k, got {num_heads_q=}, {num_heads_k=}"
            )
    pages = -(-jnp.maximum(cache_seqlens, 0) // PAGE_SIZE)
    return jnp.pad(jnp.cumsum(pages, dtype=jnp.int32), (1, 0)), None


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    head_dim_v: int = HEAD_DIM_V,
    tile_scheduler_metadata: jax.Array | None = None,
    num_splits: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    extra_k_cache: jax.Array | None = None,
    extra_indices_in_kvcache: jax.Array | None = None,
    topk_length: jax.Array | None = None,
    extra_topk_length: jax.Array | None = None,
    *,
    deterministic: bool | str = True,
    cuda_graph: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Attends from a few new tokens of each sequence to its paged latent cache (MLA decoding).

    Key and value are one array: a cached token's key is all of its 576 numbers (the 512 of the
    compressed latent, then the 64 of the rotated RoPE key), its value the first 512. Query head h
    reads KV head `h // (h_q // h_kv)`.

    Token t of sequence i lives in page `block_table[i, t // 64]`, row `t % 64`. Only tokens
    `t < cache_seqlens[i]` exist: nothing else is read, so unused table entries may hold any
    integer, and unused pages and the tail of the last page anything, NaN included. A negative
    length counts as 0.

    A row with no visible key (an empty sequence, or `causal` with fewer cached tokens than s_q)
    gives `out = 0` and `lse = -inf`, which `merge_attention_states` understands. (FlashMLA gives
    `lse = +inf`.)

    Lengths and tables are data: they may be traced and change between calls of one compiled
    program. Since they cannot be checked at trace time, a token that cannot exist (a page id
    outside the pool, or a length beyond what the table can hold) gives NaN in the rows that see
    it, and is never read. Numbers that are not finite in a token that does exist may make NaN of
    the results of the rows that see it, and of no others. The same inputs give the same bits.

    Args:
      q: [batch, s_q, h_q, 576] bfloat16, float16, or on the CPU float32: queries in latent space.
      k_cache: [num_pages, 64, h_kv, 576] in q's dtype: the page pool.
      block_table: int32[batch, max_pages_per_seq], the pages of each sequence.
      cache_seqlens: int32[batch], cached tokens of each sequence, those of this step included.
      head_dim_v: 512, the length of a value.
      tile_scheduler_metadata: from `get_mla_metadata`; accepted, and not needed.
      num_splits: from `get_mla_metadata`; accepted, and not needed.
      softmax_scale: factor of the scores, any finite number; 576 ** -0.5 unless given. Models pass
        their own (DeepSeek: 192 ** -0.5 times YaRN's mscale squared).
      causal: align the s_q queries with the last s_q tokens: query j sees the tokens
        `t <= cache_seqlens[i] - s_q + j`. Otherwise every query sees all tokens.
      is_fp8_kvcache: not supported yet.
      indices: not supported yet (sparse attention).
      attn_sink: not supported yet.
      extra_k_cache: not supported yet.
      extra_indices_in_kvcache: not supported yet.
      topk_length: not supported yet.
      extra_topk_length: not supported yet.
      deterministic: True, the same inputs give the same bits; or "batch_invariant", the result of a
        sequence is the same to the bit whatever else is in the batch, and however large the batch
        and the table are. On a GPU every sequence is then cut into chunks of 2048 tokens, which
        costs time (`docs/kernel.md`), and a workspace of a result for each chunk that the table has
        room for; on a CPU it costs nothing.
      cuda_graph: whether XLA may record the call in a CUDA graph, as it does by itself where calls
        follow each other. False leaves it out: for programs whose arrays are elsewhere at every
        step, so that graphs are recorded again and again, and for profilers and debuggers.

    Returns:
      out: [batch, s_q, h_q, 512] in q's dtype.
      lse: float32[batch, h_q, s_q], natural logarithm of the sum of exponentiated scores.

    Raises:
      ValueError: for shapes, dtypes and numbers outside the above, at trace time; and for shardings
        over explicit axes of a mesh that would move pages between devices. Over automatic axes XLA
        finds out, and its `JaxRuntimeError` quotes the same.
      NotImplementedError: for arguments that are not supported yet, for float32 on a GPU, for
        "batch_invariant" where neither kernel runs, and when differentiated under jax 0.9.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1; the interface is FlashMLA's.
    """
    _refuse(
        is_fp8_kvcache=is_fp8_kvcache or None,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    q = array("q", q, "[batch, s_q, h_q, 576]")
    k_cache = array("k_cache", k_cache, "[num_pages, 64, h_kv, 576]")
    block_table = array("block_table", block_table, "[batch, max_pages_per_seq]", dtype=jnp.int32)
    cache_seqlens = array("cache_seqlens", cache_seqlens, "[batch]", dtype=jnp.int32)
    batch, s_q, h_q, head_dim = q.shape
    num_pages, page_size, h_kv, cache_head_dim = k_cache.shape

    if q.dtype not in DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if k_cache.dtype != q.dtype:
        raise ValueError(f"k_cache must have q's dtype {q.dtype}, got {k_cache.dtype}")
    if head_dim != HEAD_DIM:
        raise ValueError(f"q must have head dimension 576 (512 + 64), got shape {q.shape}")
    if cache_head_dim != HEAD_DIM:
        raise ValueError(f"k_cache must have head dimension 576, got shape {k_cache.shape}")
    if page_size != PAGE_SIZE:
        raise ValueError(f"k_cache must have pages of 64 tokens, got shape {k_cache.shape}")
    for name, size in {"s_q": s_q, "h_q": h_q, "h_kv": h_kv}.items():
        if is_symbolic_dim(size):
            raise NotImplementedError(
                f"{name} must be a number when exported, got the symbolic dimension {size}: the "
                "kernels depend on it. batch, num_pages and max_pages_per_seq may be symbolic."
            )
    if fewer(num_pages, 1) or h_kv < 1:
        raise ValueError(f"k_cache must hold a page and a KV head, got shape {k_cache.shape}")
    if s_q < 1 or h_q < 1:
        raise ValueError(f"q must hold a token and a head, got shape {q.shape}")
    if h_q % h_kv:
        raise ValueError(f"q's heads must be a multiple of k_cache's, got {h_q=}, {h_kv=}")
    if block_table.shape[0] != batch or fewer(block_table.shape[1], 1):
        raise ValueError(
            f"block_table must be [batch, max_pages_per_seq] with {batch=} and at least one page, "
            f"got shape {block_table.shape}"
        )
    if cache_seqlens.shape != (batch,):
        raise ValueError(f"cache_seqlens must be [batch] with {batch=}, got {cache_seqlens.shape}")
    if head_dim_v != HEAD_DIM_V:
        raise ValueError(f"head_dim_v must be 512, got {head_dim_v}")
    if tile_scheduler_metadata is not None:
        metadata = array(
            "tile_scheduler_metadata", tile_scheduler_metadata, "[batch + 1]", dtype=jnp.int32
        )
        if metadata.shape != (batch + 1,):
            raise ValueError(
                f"tile_scheduler_metadata must be [batch + 1] with {batch=}, from "
                f"get_mla_metadata, got shape {metadata.shape}"
            )
    if num_splits is not None:
        raise ValueError("num_splits must be None, as get_mla_metadata returns it")
    scale = HEAD_DIM**-0.5 if softmax_scale is None else _number("softmax_scale", softmax_scale)
    if deterministic is not True and deterministic != "batch_invariant":
        raise ValueError(f'deterministic must be True or "batch_invariant", got {deterministic!r}')

    if batch == 0:
        return jnp.zeros((0, s_q, h_q, HEAD_DIM_V), q.dtype), jnp.zeros((0, h_q, s_q), jnp.float32)
    return dense_decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        softmax_scale=scale,
        causal=bool(causal),
        batch_invariant=deterministic == "batch_invariant",
        cuda_graph=bool(cuda_graph),
    )


def merge_attention_states(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combines attention results over disjoint sets of keys into the result over all of them.

    Exact up to rounding: out is the average of `outs` weighted by `exp(lses)`. A part with
    `lse = -inf` is empty and has no say, whatever its output holds; merging only empty parts gives
    `(0, -inf)`.

    Args:
      outs: [parts, batch, s_q, h_q, head_dim_v], at least one part.
      lses: float32[parts, batch, h_q, s_q], natural logarithm.

    Returns:
      out [batch, s_q, h_q, head_dim_v] in the dtype of `outs`, and lse float32[batch, h_q, s_q].

    Raises:
      ValueError: for shapes and dtypes outside the above.

    Source: FlashAttention-2 (arXiv:2307.08691), section 3.1.
    """
    outs = array("outs", outs, "[parts, batch, s_q, h_q, head_dim_v]")
    lses = array("lses", lses, "[parts, batch, h_q, s_q]", dtype=jnp.float32)
    if not jnp.issubdtype(outs.dtype, jnp.floating):
        raise ValueError(f"outs must be floating point, got {outs.dtype}")
    parts, batch, s_q, h_q, _ = outs.shape
    if parts < 1:
        raise ValueError(f"outs must hold at least one part, got shape {outs.shape}")
    if lses.shape != (parts, batch, h_q, s_q):
        raise ValueError(
            f"lses must be [parts, batch, h_q, s_q] = {(parts, batch, h_q, s_q)} to match outs "
            f"{outs.shape}, got {lses.shape}"
        )
    return reference.merge_attention_states(outs, lses)


# --- Validation ------------------------------------------------------------------------------


def _number(name: str, value: Any) -> float:
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a Python number: it is part of the compiled program")
    number = float(value)
    # Kernels work in float32, and in base 2: the number times log2(e) has to be finite there.
    if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max) / math.log2(
        math.e
    ):
        raise ValueError(f"{name} must be finite in float32, also times log2(e), got {number}")
    return number


def _positive(name: str, value: int) -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} is not supported yet: dense attention over bfloat16, float16 and (on the "
                "CPU) float32 pages is"
            )
