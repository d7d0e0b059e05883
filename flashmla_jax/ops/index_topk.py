"""The indexer's custom call: of all cached tokens, those that score highest.

`flashmla_jax.layers.indexer` says what a score is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from flashmla_jax._checks import array, fewer, positive
from flashmla_jax.cache import index_keys
from flashmla_jax.cache.layout import DTYPES, PAGE_SIZE
from flashmla_jax.ops import _ffi, _mapped, _sharding

# How many products of a head and a key XLA computes at a time, 4 bytes each.
_AT_A_TIME = 2**26
# And how many scores the kernels have room for.
_SCORES_AT_A_TIME = 2**28
# Of how many query tokens of a sequence, where sizes that are symbolic leave that open.
_QUERIES_AT_A_TIME = 64

# What the kernels are built for; csrc/params.h has the same numbers.
HEAD_DIM = 128
MAX_HEADS = 256


def index_topk(
    q: jax.Array,
    weights: jax.Array,
    index_pages: jax.Array,
    block_table: jax.Array,
    num_visible: jax.Array,
    topk: int,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Binds the primitive; see `layers.indexer.choose_cached`. A choice has no derivative."""
    q = array("q", q, "[batch, s, heads, head_dim]")
    weights = array("weights", weights, "[batch, s, heads]")
    index_pages = array("index_pages", index_pages, "[num_pages, 64, 1, n]")
    block_table = array("block_table", block_table, "[batch, max_pages_per_seq]")
    num_visible = array("num_visible", num_visible, "[batch, s]")
    topk = positive("topk", topk)
    batch, s, heads, head_dim = q.shape

    if q.dtype not in DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if fewer(heads, 1):
        raise ValueError(f"q must hold a head, got shape {q.shape}")
    if weights.shape != q.shape[:-1]:
        raise ValueError(f"weights must be like q's {q.shape[:-1]}, got shape {weights.shape}")
    if index_pages.dtype not in (*DTYPES, jnp.uint8):
        raise ValueError(
            f"index_pages must be bfloat16, float16, float32 or uint8, got {index_pages.dtype}"
        )
    key = index_keys.size_of(head_dim, index_pages.dtype)
    if index_pages.shape[1:] != (PAGE_SIZE, 1, key):
        raise ValueError(
            f"index_pages must be [num_pages, {PAGE_SIZE}, 1, {key}] in {index_pages.dtype} with "
            f"{head_dim=}, got shape {index_pages.shape}"
        )
    if fewer(index_pages.shape[0], 1):
        raise ValueError(f"index_pages must hold a page, got shape {index_pages.shape}")
    if block_table.shape[0] != batch:
        raise ValueError(
            f"block_table must be [batch, max_pages_per_seq] with {batch=}, "
            f"got shape {block_table.shape}"
        )
    if num_visible.shape != (batch, s):
        raise ValueError(
            f"num_visible must be [batch, s] with {batch=} and {s=}, got shape {num_visible.shape}"
        )
    for name, value in {"block_table": block_table, "num_visible": num_visible}.items():
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {value.dtype}")

    weights = weights.astype(jnp.float32)
    operands = [jax.lax.stop_gradient(x) for x in (q, weights, index_pages)]
    (positions,) = index_topk_p.bind(
        *operands,
        block_table.astype(jnp.int32),
        num_visible.astype(jnp.int32),
        topk=topk,
        precision=_name(precision),
        mapped=(),
    )
    return positions


def _name(precision: Any) -> Any:
    """A precision as a literal, which jax takes too: programs have it in writing."""
    if precision is None or isinstance(precision, str):
        return precision
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return precision.name
    if isinstance(precision, jax.lax.DotAlgorithm):
        raise NotImplementedError(
            "precision must be a name, a jax.lax.Precision or a jax.lax.DotAlgorithmPreset, "
            f"got {precision}"
        )
    if isinstance(precision, (list, tuple)) and len(precision) == 2:
        return tuple(_name(x) for x in precision)
    raise ValueError(
        "precision must be a name, a jax.lax.Precision, two of them, or a "
        f"jax.lax.DotAlgorithmPreset, got {precision!r}"
    )


# --- Abstract evaluation ---------------------------------------------------------------------


SHARDING = _sharding.Rule(
    operands={
        "q": ("batch", "s", "heads", "head_dim"),
        "weights": ("batch", "s", "heads"),
        "index_pages": ("num_pages", "page_size", "h_kv", "key"),
        "block_table": ("batch", "max_pages_per_seq"),
        "num_visible": ("batch", "s"),
    },
    results=(("batch", "s", "topk"),),
    divided=("batch", "s"),
    pool="index_pages",
    small=("weights", "block_table", "num_visible"),
    advice="Divide batch, and nothing of the pool.",
)


def _abstract_eval(*operands: Any, topk: int, **_: Any) -> tuple[jax.core.ShapedArray, ...]:
    batch, s = operands[0].shape[:2]
    return _sharding.result_types(SHARDING, operands, [((batch, s, topk), jnp.int32)])


index_topk_p = _ffi.define_primitive("index_topk", _abstract_eval)


# --- Without a kernel ------------------------------------------------------------------------


def index_scores(
    q: jax.Array, weights: jax.Array, keys: jax.Array, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """The score of every key for every query.

    Args:
      q: [..., heads, head_dim] in the dtype of `keys`.
      weights: float32[..., heads].
      keys: [t, head_dim].
      precision: of the products.

    Returns:
      float32[..., t].
    """
    products = jnp.einsum(
        "...hd,td->...ht", q, keys, precision=precision, preferred_element_type=jnp.float32
    )
    return jnp.sum(jnp.maximum(products, 0) * weights[..., None], axis=-2)


def top_k(scores: jax.Array, num_visible: jax.Array, topk: int) -> jax.Array:
    """The positions of the highest scores, exactly; of equal ones, the lower positions.

    Args:
      scores: float32[..., t].
      num_visible: int32[...]: only the first so many can be chosen, and others may be anything.
        More than t are all.
      topk: how many are.

    Returns:
      int32[..., topk], in their order; -1 at the end where there are fewer.
    """
    tokens = scores.shape[-1]
    num_visible = jnp.minimum(num_visible, jnp.asarray(tokens, jnp.int32))
    visible = jnp.arange(tokens, dtype=jnp.int32) < num_visible[..., None]
    # For the comparison, -0 is less than 0, and NaN with a negative sign less than all: without, it
    # is higher than all. Of what is -inf, what is visible comes first.
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = jnp.where(jnp.isnan(scores), jnp.nan, scores)
    scores = jnp.where(visible, scores, -jnp.inf)
    if is_symbolic_dim(tokens) or tokens < topk:
        added = topk if is_symbolic_dim(tokens) else topk - tokens
        widths = [(0, 0)] * (scores.ndim - 1) + [(0, added)]
        scores = jnp.pad(scores, widths, constant_values=-jnp.inf)
    _, positions = jax.lax.top_k(scores, topk)
    exists = jnp.arange(topk, dtype=jnp.int32) < num_visible[..., None]
    behind = jnp.iinfo(jnp.int32).max
    positions = jnp.sort(jnp.where(exists, positions.astype(jnp.int32), behind))
    return jnp.where(positions == behind, -1, positions)


def choose(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    num_visible: jax.Array,
    topk: int,
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    """See `layers.indexer.choose`."""
    q = q.astype(keys.dtype)

    def of_sequence(
        q: jax.Array, weights: jax.Array, keys: jax.Array, num_visible: jax.Array
    ) -> jax.Array:
        return _choose(q, weights, keys, num_visible, topk, precision)

    products = q.shape[1] * q.shape[2] * keys.shape[1]
    return _map(of_sequence, (q, weights, keys, num_visible), products)


def _choose(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    num_visible: jax.Array,
    topk: int,
    precision: jax.lax.PrecisionLike,
    scales: jax.Array | None = None,
) -> jax.Array:
    """`choose` for one sequence: int32[s, topk]. `scales` float32[t] are positive factors of keys.

    As such they may as well be factors of scores.
    """

    def of_query(q: jax.Array, weights: jax.Array, num_visible: jax.Array) -> jax.Array:
        scores = index_scores(q, weights, keys, precision)
        return top_k(scores if scales is None else scores * scales, num_visible, topk)

    return _map(of_query, (q, weights, num_visible), q.shape[1] * keys.shape[0])


def _map(
    function: Callable[..., jax.Array], arguments: tuple[jax.Array, ...], products: int
) -> jax.Array:
    """`jax.vmap`, but one after the other what would be more than `_AT_A_TIME` products in all.

    `products` is how many an element of the arguments' first axis needs.
    """
    number = arguments[0].shape[0]
    if is_symbolic_dim(number) or is_symbolic_dim(products) or number * products <= _AT_A_TIME:
        return jax.vmap(function)(*arguments)
    together = max(_AT_A_TIME // products, 1)
    return jax.lax.map(
        lambda args: function(*args), arguments, batch_size=together if together > 1 else None
    )


def reference(
    *operands: jax.Array, topk: int, precision: jax.lax.PrecisionLike, **_: Any
) -> list[jax.Array]:
    """The primitive, composed of XLA's operations."""
    q, weights, index_pages, block_table, num_visible = operands

    def of_sequence(
        q: jax.Array, weights: jax.Array, table: jax.Array, num_visible: jax.Array
    ) -> jax.Array:
        # What is outside the pool is its first or last page, as for the kernels.
        rows = index_pages[jnp.clip(table, 0, index_pages.shape[0] - 1)]
        rows = rows.reshape(table.shape[0] * PAGE_SIZE, index_pages.shape[-1])
        keys, scales = index_keys.unpack(rows, q.dtype)
        return _choose(q.astype(keys.dtype), weights, keys, num_visible, topk, precision, scales)

    products = q.shape[1] * q.shape[2] * block_table.shape[1] * PAGE_SIZE
    return [_map(of_sequence, (q, weights, block_table, num_visible), products)]


# --- Lowerings -------------------------------------------------------------------------------


def _call_cuda(*operands: jax.Array, topk: int, **params: Any) -> list[jax.Array]:
    q, weights, index_pages, block_table, num_visible = operands
    batch, s, heads, head_dim = q.shape
    fits = (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and index_pages.dtype in (q.dtype, jnp.uint8)
        and head_dim == HEAD_DIM
        and not is_symbolic_dim(heads)
        and heads <= MAX_HEADS
        and block_table.shape[1] != 0
        and s != 0
    )
    if not fits:
        return reference(*operands, topk=topk, **params)
    tokens = block_table.shape[1] * PAGE_SIZE
    # The workspace is bounded by taking some query tokens after the others. If there are s of them,
    # a symbol, it is not: a program has as many calls wherever it runs.
    if is_symbolic_dim(s):
        parts = [slice(None)]
    else:
        if is_symbolic_dim(batch) or is_symbolic_dim(tokens):
            step = _QUERIES_AT_A_TIME
        else:
            step = max(_SCORES_AT_A_TIME // max(batch * tokens, 1), 1)
        parts = [slice(first, first + step) for first in range(0, s, step)]
    pieces = []
    for part in parts:
        shape = (batch, q[:, part].shape[1])
        call = jax.ffi.ffi_call(
            _ffi.INDEX_TOPK,
            [
                jax.ShapeDtypeStruct((*shape, topk), jnp.int32),
                jax.ShapeDtypeStruct((*shape, tokens), jnp.uint32),
            ],
        )
        of_part = q[:, part], weights[:, part], index_pages, block_table, num_visible[:, part]
        pieces.append(call(*of_part)[0])
    return [jnp.concatenate(pieces, axis=1) if len(pieces) != 1 else pieces[0]]


_ffi.register_lowerings(
    index_topk_p,
    kernels={_ffi.CPU: reference, _ffi.CUDA: _call_cuda},
    reference=reference,
    sharding=SHARDING,
    name="flashmla_index_topk",
)


# --- Batching --------------------------------------------------------------------------------

_SHARED = (2,)  # the operand that is not per sequence: the pool

_ffi.register_batching(
    index_topk_p, functools.partial(_mapped.batch_by_folding, index_topk_p, shared=_SHARED)
)
