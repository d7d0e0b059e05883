"""Multi-head Latent Attention over a paged cache: the public functions and their contract."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from flashmla_jax import reference
from flashmla_jax._checks import array, fewer, positive
from flashmla_jax.cache.layout import (
    DTYPES,
    FP8,
    FP8_512,
    HEAD_DIM,
    HEAD_DIM_V,
    PAGE_SIZE,
    FP8Format,
    as_bytes,
)
from flashmla_jax.ops.dense_decode import dense_decode
from flashmla_jax.ops.sparse_attention import sparse_attention


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
      num_heads_q: `h_q`; only checked.
      is_fp8_kvcache: whether the cache is FP8; makes no difference.
      topk: how many tokens a query token attends to, for sparse attention; makes no difference.

    Returns:
      tile_scheduler_metadata: int32[batch + 1], the 64-token pages in use before each sequence,
        and in all.
      num_splits: None. How often a sequence is split depends on the GPU that the program will run
        on, and is decided there.

    Raises:
      ValueError: for a malformed argument.
    """
    if topk is not None:
        positive("topk", topk)
    cache_seqlens = array("cache_seqlens", cache_seqlens, "[batch]", dtype=jnp.int32)
    positive("num_q_tokens_per_head_k", num_q_tokens_per_head_k)
    positive("num_heads_k", num_heads_k)
    if num_heads_q is not None:
        positive("num_heads_q", num_heads_q)
        if num_heads_q % num_heads_k:
            raise ValueError(
                f"num_heads_q must be a multiple of num_heads_k, got {num_heads_q=}, {num_heads_k=}"
            )
    pages = -(-jnp.maximum(cache_seqlens, 0) // PAGE_SIZE)
    return jnp.pad(jnp.cumsum(pages, dtype=jnp.int32), (1, 0)), None


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array | None,
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

    **FP8 caches** hold a token in 656 bytes (`flashmla_jax.cache.layout.FP8`): 512 e4m3 codes, the
    scales of 128 each, and the RoPE key in bfloat16. Attention is to the numbers that they stand
    for, rounded to q's dtype.

    **Sparse attention** (`indices`, DeepSeek-V3.2) is to tokens that each query token names by
    their places in the pool, `page * page_size + row`; table and lengths are not needed. Indices
    outside the pool are ignored, -1 for one. A token that is named twice counts twice. What is not
    named is not read. Of FP8 caches there is a second format, for queries of 512 numbers
    (`layout.FP8_512`), whose values are all of a token.

    With queries in float32, XLA computes both on GPUs.

    Args:
      q: [batch, s_q, h_q, 576] bfloat16, float16, or on the CPU float32: queries in latent space.
        Not float16 over FP8 caches. [batch, s_q, h_q, 512] for sparse attention to tokens of 512
        numbers.
      k_cache: [num_pages, 64, h_kv, 576] in q's dtype: the page pool. An FP8 one is uint8 or
        float8_e4m3fn [num_pages, 64, h_kv, 656]. For sparse attention h_kv is 1, and pages may be
        of any size; tokens of 512 numbers have 584 bytes in FP8.
      block_table: int32[batch, max_pages_per_seq], the pages of each sequence. None for sparse
        attention, or ignored.
      cache_seqlens: int32[batch], cached tokens of each sequence, those of this step included.
        None for sparse attention, or ignored.
      head_dim_v: 512, the length of a value.
      tile_scheduler_metadata: from `get_mla_metadata`; accepted, and not needed.
      num_splits: from `get_mla_metadata`; accepted, and not needed.
      softmax_scale: factor of the scores, any finite number; 576 ** -0.5 unless given. Models pass
        their own (DeepSeek: 192 ** -0.5 times YaRN's mscale squared).
      causal: align the s_q queries with the last s_q tokens: query j sees the tokens
        `t <= cache_seqlens[i] - s_q + j`. Otherwise every query sees all tokens.
        Not for sparse attention, whose indices say what is seen.
      is_fp8_kvcache: whether the caches are FP8.
      indices: int32[batch, s_q, topk], the places of the tokens that a query token attends to;
        None for all of its sequence. These and what follows are for sparse attention only.
      attn_sink: float32[h_q]. Multiplies the output of a head by exp(lse) / (exp(lse) +
        exp(attn_sink)): -inf changes nothing, +inf makes it 0. lse stays as it is.
      extra_k_cache: a second pool in the same format, with pages of any size.
      extra_indices_in_kvcache: int32[batch, s_q, extra_topk], places in it that are attended to
        beside the others.
      topk_length: int32[batch], how many of the leftmost indices count; all unless given.
      extra_topk_length: int32[batch], the same of the extra ones.
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
      NotImplementedError: for float32 on a GPU where a kernel runs, for "batch_invariant" where
        none does, and when dense attention is differentiated under jax 0.9.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1; DeepSeek-V3.2-Exp; the interface is
    FlashMLA's.
    """
    if deterministic is not True and deterministic != "batch_invariant":
        raise ValueError(f'deterministic must be True or "batch_invariant", got {deterministic!r}')
    batch_invariant = deterministic == "batch_invariant"
    if batch_invariant and indices is not None:
        raise NotImplementedError(
            'deterministic="batch_invariant" is not supported for sparse attention: no kernel runs'
        )
    if head_dim_v != HEAD_DIM_V:
        raise ValueError(f"head_dim_v must be 512, got {head_dim_v}")
    if num_splits is not None:
        raise ValueError("num_splits must be None, as get_mla_metadata returns it")
    if indices is not None:
        if causal:
            raise ValueError("causal must be False for sparse attention: indices say what is seen")
        extra = extra_k_cache, extra_indices_in_kvcache, extra_topk_length
        return _sparse_decode(
            q, (k_cache, indices, topk_length), extra, softmax_scale, is_fp8_kvcache, attn_sink
        )
    sparse_only = {
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    for name, value in sparse_only.items():
        if value is not None:
            raise ValueError(f"{name} is for sparse attention: it needs indices")

    q = array("q", q, "[batch, s_q, h_q, 576]")
    token = FP8.token_bytes if is_fp8_kvcache else HEAD_DIM
    k_cache = array("k_cache", k_cache, f"[num_pages, 64, h_kv, {token}]")
    block_table = array("block_table", block_table, "[batch, max_pages_per_seq]", dtype=jnp.int32)
    cache_seqlens = array("cache_seqlens", cache_seqlens, "[batch]", dtype=jnp.int32)
    batch, s_q, h_q, head_dim = q.shape
    num_pages, page_size, h_kv, cache_head_dim = k_cache.shape

    _check_dtypes(q, k_cache, is_fp8_kvcache)
    if head_dim != HEAD_DIM:
        raise ValueError(f"q must have head dimension 576 (512 + 64), got shape {q.shape}")
    if cache_head_dim != token:
        what = "tokens of 656 bytes" if is_fp8_kvcache else "head dimension 576"
        raise ValueError(f"k_cache must have {what}, got shape {k_cache.shape}")
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
    if tile_scheduler_metadata is not None:
        metadata = array(
            "tile_scheduler_metadata", tile_scheduler_metadata, "[batch + 1]", dtype=jnp.int32
        )
        if metadata.shape != (batch + 1,):
            raise ValueError(
                f"tile_scheduler_metadata must be [batch + 1] with {batch=}, from "
                f"get_mla_metadata, got shape {metadata.shape}"
            )
    scale = HEAD_DIM**-0.5 if softmax_scale is None else _number("softmax_scale", softmax_scale)

    if batch == 0:
        return jnp.zeros((0, s_q, h_q, HEAD_DIM_V), q.dtype), jnp.zeros((0, h_q, s_q), jnp.float32)
    return dense_decode(
        q,
        as_bytes(k_cache) if is_fp8_kvcache else k_cache,
        block_table,
        cache_seqlens,
        softmax_scale=scale,
        causal=bool(causal),
        batch_invariant=batch_invariant,
        cuda_graph=bool(cuda_graph),
    )


def _sparse_decode(
    q: jax.Array,
    scope: tuple[Any, Any, Any],
    extra: tuple[Any, Any, Any],
    softmax_scale: float | None,
    is_fp8: bool,
    attn_sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Checks a sparse call; a scope is a pool, indices and how many of them count."""
    q = array("q", q, "[batch, s_q, h_q, 576 or 512]")
    _, s_q, h_q, head_dim = q.shape
    if head_dim not in (HEAD_DIM, FP8_512.head_dim):
        raise ValueError(f"q must have head dimension 576 or 512, got shape {q.shape}")
    if s_q < 1 or h_q < 1:
        raise ValueError(f"q must hold a token and a head, got shape {q.shape}")
    fmt = (FP8 if head_dim == HEAD_DIM else FP8_512) if is_fp8 else None
    named = _scope(q, fmt, "k_cache", "indices", "topk_length", *scope)
    named_too = None
    if any(value is not None for value in extra):
        names = "extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length"
        for name, value in zip(names[:2], extra, strict=False):
            if value is None:
                raise ValueError(f"{name} is missing: an extra cache needs its indices, and both")
        named_too = _scope(q, fmt, *names, *extra)
    scale = head_dim**-0.5 if softmax_scale is None else _number("softmax_scale", softmax_scale)
    sink = _sink(attn_sink, h_q)
    out, _, lse = sparse_attention(q, named, named_too, softmax_scale=scale, attn_sink=sink)
    return out, lse


def _scope(
    q: jax.Array,
    fmt: FP8Format | None,
    pool_name: str,
    indices_name: str,
    length_name: str,
    pool: Any,
    indices: Any,
    length: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    batch, s_q, _, head_dim = q.shape
    token = head_dim if fmt is None else fmt.token_bytes
    pool = array(pool_name, pool, f"[num_pages, page_size, 1, {token}]")
    _check_dtypes(q, pool, fmt is not None, pool_name)
    if pool.shape[2:] != (1, token) or fewer(pool.shape[0], 1) or fewer(pool.shape[1], 1):
        raise ValueError(
            f"{pool_name} must be [num_pages, page_size, 1, {token}] for queries of {head_dim} "
            f"numbers, got shape {pool.shape}"
        )
    indices = array(indices_name, indices, "[batch, s_q, topk]", dtype=jnp.int32)
    if indices.shape[:2] != (batch, s_q):
        raise ValueError(
            f"{indices_name} must be [batch, s_q, topk] with {batch=}, {s_q=}, got {indices.shape}"
        )
    if length is not None:
        length = array(length_name, length, "[batch]", dtype=jnp.int32)
        if length.shape != (batch,):
            raise ValueError(f"{length_name} must be [batch] with {batch=}, got {length.shape}")
    return pool if fmt is None else as_bytes(pool), indices, length


def flash_mla_sparse_fwd(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    sm_scale: float,
    d_v: int = HEAD_DIM_V,
    attn_sink: jax.Array | None = None,
    topk_length: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends from each token of a sequence to tokens that it names (sparse MLA prefill).

    Token i attends to `kv[indices[i, 0, :]]`. Indices outside `kv` are ignored, -1 for one; a token
    that is named twice counts twice. What is not named has no say, whatever it holds. A token that
    names none gives `out = 0` and -inf for the others. (FlashMLA gives `lse = +inf`.)

    In float32, XLA computes it on GPUs.

    Args:
      q: [s_q, h_q, 576] or [s_q, h_q, 512] bfloat16, float16 or float32: queries in latent space.
      kv: [s_kv, 1, head_dim] in q's dtype: keys, whose first 512 numbers are the values.
      indices: int32[s_q, 1, topk].
      sm_scale: factor of the scores, any finite number.
      d_v: 512, the length of a value.
      attn_sink: float32[h_q]. Multiplies the output of a head by exp(lse) / (exp(lse) +
        exp(attn_sink)): -inf changes nothing, +inf makes it 0. The other results stay as they are.
      topk_length: int32[s_q], how many of a token's leftmost indices count; all unless given.

    Returns:
      out: [s_q, h_q, 512] in q's dtype.
      max_logits: float32[s_q, h_q], the largest score.
      lse: float32[s_q, h_q], natural logarithm of the sum of exponentiated scores.

    Raises:
      ValueError: for shapes, dtypes and numbers outside the above, at trace time.

    Source: DeepSeek-V3.2-Exp; the interface is FlashMLA's.
    """
    q = array("q", q, "[s_q, h_q, 576 or 512]")
    s_q, h_q, head_dim = q.shape
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if head_dim not in (HEAD_DIM, FP8_512.head_dim) or h_q < 1:
        raise ValueError(f"q must be [s_q, h_q, 576 or 512] with a head, got shape {q.shape}")
    kv = array("kv", kv, "[s_kv, 1, head_dim]", dtype=q.dtype)
    if kv.shape[1:] != (1, head_dim) or fewer(kv.shape[0], 1):
        raise ValueError(f"kv must be [s_kv, 1, {head_dim}] with a token, got shape {kv.shape}")
    indices = array("indices", indices, "[s_q, 1, topk]", dtype=jnp.int32)
    if indices.shape[:2] != (s_q, 1):
        raise ValueError(f"indices must be [s_q, 1, topk] with {s_q=}, got shape {indices.shape}")
    if topk_length is not None:
        topk_length = array("topk_length", topk_length, "[s_q]", dtype=jnp.int32)
        if topk_length.shape != (s_q,):
            raise ValueError(f"topk_length must be [s_q] with {s_q=}, got {topk_length.shape}")
    if d_v != HEAD_DIM_V:
        raise ValueError(f"d_v must be 512, got {d_v}")
    # A batch of query tokens that share a pool whose pages are of one token.
    out, max_logits, lse = sparse_attention(
        q[:, None],
        (kv[:, None], indices, topk_length),
        softmax_scale=_number("sm_scale", sm_scale),
        attn_sink=_sink(attn_sink, h_q),
    )
    return out[:, 0], max_logits[..., 0], lse[..., 0]


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


def _check_dtypes(q: jax.Array, pool: jax.Array, is_fp8: bool, name: str = "k_cache") -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if not is_fp8:
        if pool.dtype != q.dtype:
            hint = "; is_fp8_kvcache=True is for FP8" if pool.dtype.itemsize == 1 else ""
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {pool.dtype}{hint}")
        return
    if q.dtype == jnp.float16:
        raise ValueError("q must be bfloat16 or float32 for FP8 caches, got float16")
    if pool.dtype not in (jnp.uint8, jnp.float8_e4m3fn):
        raise ValueError(f"{name} must be uint8 or float8_e4m3fn if FP8, got {pool.dtype}")


def _sink(attn_sink: Any, h_q: int) -> jax.Array | None:
    if attn_sink is None:
        return None
    attn_sink = array("attn_sink", attn_sink, "[h_q]", dtype=jnp.float32)
    if attn_sink.shape != (h_q,):
        raise ValueError(f"attn_sink must be [h_q] with {h_q=}, got shape {attn_sink.shape}")
    return attn_sink
