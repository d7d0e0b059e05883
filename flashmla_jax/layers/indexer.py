"""The lightning indexer of DeepSeek sparse attention: which cached tokens a token attends to.

An indexer has many small query heads, and one key per token that it keeps in a paged cache of its
own, beside the latents (`PagedKVCache.create(..., index_head_dim=...)`). The score of a cached
token is, of the products of its key with the query's heads, the sum of those that are positive,
each times a weight that the querying token gives to the head:

    score[t] = sum over heads of weight[head] * max(q[head] . key[t], 0)

The `topk` tokens of the highest scores are chosen. Of equal scores, the one at the lower position
counts as higher, so that where scores are exact the choice is the same wherever and however it is
computed. Those that are chosen come in the order of their positions.

Axes: `batch`; `s` querying tokens; `t` cached ones; `heads` index heads; `head_dim` numbers of one.

Parameters are nested dicts with the checkpoint's names and Flax's leaves. A kernel is `[in, out]`:

    wq_b.kernel            [q_lora_rank, heads * head_dim]
    wk.kernel              [hidden, head_dim]
    k_norm.scale           [head_dim], with k_norm.bias of a layer norm
    weights_proj.kernel    float32[hidden, heads]

Sources: DeepSeek-V3.2-Exp (github.com/deepseek-ai/DeepSeek-V3.2-Exp), section 1 of its report and
`inference/model.py`; `modeling_deepseek_v32.py` and `modeling_glm_moe_dsa.py` of Hugging Face
transformers. DeepSeek's code also multiplies queries and keys by a Hadamard matrix, for the sake of
FP8: it is orthogonal, so the products are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flashmla_jax.cache.layout import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE
from flashmla_jax.layers import mla
from flashmla_jax.ops import index_topk

Params = Mapping[str, Any]

_ROPE_DIM = HEAD_DIM - HEAD_DIM_V


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """The shape of an indexer; hashable.

    `rope_interleave` says which of the first 64 numbers are rotated together: neighbours, as in
    MLA, or as in DeepSeek-V3.2 those that are 32 apart.

    Raises:
      ValueError: a size is too small.
    """

    num_heads: int
    head_dim: int
    topk: int
    rope_interleave: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, least in {"num_heads": 1, "head_dim": _ROPE_DIM, "topk": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def project_q(
    params: Params,
    config: IndexerConfig,
    x: jax.Array,
    q_latent: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]:
    """The index heads of tokens, and what each head's products count.

    Args:
      params: as in the module's docstring.
      config: the shape of the indexer.
      x: [batch, s, hidden], what the layer's attention reads.
      q_latent: [batch, s, q_lora_rank], MLA's normalised latent of its queries.
      cos: of `mla.rope_tables`, float32[batch, s, 32].
      sin: the same.
      precision: of the product with `wq_b`.

    Returns:
      q [batch, s, heads, head_dim], and weights float32[batch, s, heads], which contain the factor
      `(heads * head_dim) ** -0.5`.
    """
    q = mla.linear(q_latent, params["wq_b"], precision)
    q = q.reshape(*q.shape[:-1], config.num_heads, config.head_dim)
    q = _rotate(config, q, cos[..., None, :], sin[..., None, :])
    # In float32, as routers are.
    highest = jax.lax.Precision.HIGHEST
    weights = mla.linear(x.astype(jnp.float32), params["weights_proj"], highest)
    return q, weights * (config.num_heads * config.head_dim) ** -0.5


def project_k(
    params: Params,
    config: IndexerConfig,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """What the cache keeps of tokens for the indexer; arguments as for `project_q`.

    Returns [batch, s, head_dim].
    """
    key = _layer_norm(mla.linear(x, params["wk"], precision), params["k_norm"], config.norm_eps)
    return _rotate(config, key, cos, sin)


def choose(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    num_visible: jax.Array,
    topk: int,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """The tokens that each query attends to, among keys that lie one after the other.

    For long sequences some queries are looked at after the others, so that memory grows with the
    number of keys and not with its square.

    Args:
      q: [batch, s, heads, head_dim].
      weights: float32[batch, s, heads].
      keys: [batch, t, head_dim].
      num_visible: int32[batch, s]: a query sees the first so many keys, which have to be finite,
        and no key if that is 0 or less; the others may be anything, NaN included.
      topk: how many tokens a query attends to.
      precision: of the products.

    Returns:
      Their positions int32[batch, s, topk], in their order; -1 at the end where there are fewer.
    """
    return index_topk.choose(q, weights, keys, num_visible, topk, precision)


def choose_cached(
    q: jax.Array,
    weights: jax.Array,
    index_pages: jax.Array,
    block_table: jax.Array,
    num_visible: jax.Array,
    topk: int,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """As `choose`, among keys in pages.

    On a Hopper GPU kernels do it, for up to 256 heads of 128 numbers in bfloat16 or float16, and
    keys in q's dtype or FP8. Their work grows with `num_visible`. Their workspace is 4 bytes for
    each score that the block table has room for: of as many query tokens at a time as fit 1 GiB, or
    of one of each sequence. (In programs exported with a symbolic batch or table, of 64 of each
    sequence; with symbolic `s`, of all.) Elsewhere XLA does it, and work and memory grow with the
    width of the block table.

    With FP8 keys and q in bfloat16 the kernels multiply in half precision, each head of q in a unit
    in which its largest number is about 2^14: numbers below about 2^-31 of the largest lose digits,
    and below about 2^-39 they vanish. Weights take the units out, so a weight times the largest
    number of its head, times 2^-14, has to be finite in float32.

    Args:
      q: [batch, s, heads, head_dim].
      weights: float32[batch, s, heads].
      index_pages: [num_pages, 64, 1, head_dim], or in FP8 as `flashmla_jax.cache.index_keys` says.
        Products with codes are computed in q's dtype, which holds them exactly, or as above.
      block_table: int32[batch, max_pages_per_seq]; unused entries may hold anything, and so may
        unused pages. Entries in use that are outside the pool are its first or last page.
      num_visible: int32[batch, s]: a query sees the first so many tokens of its sequence, whose
        keys have to be finite; more than the table has room for are all of it.
      topk: how many tokens a query attends to.
      precision: of the products, where no kernel computes them: a name, a `jax.lax.Precision`, two
        of them, or a `jax.lax.DotAlgorithmPreset`.

    Returns:
      Their positions int32[batch, s, topk], see `choose`.

    Raises:
      ValueError: for shapes, dtypes and numbers outside the above, at trace time. Tables and
        `num_visible` may have integers of other dtypes.
      NotImplementedError: for a `jax.lax.DotAlgorithm`.
    """
    return index_topk.index_topk(q, weights, index_pages, block_table, num_visible, topk, precision)


def pool_indices(positions: jax.Array, block_table: jax.Array) -> jax.Array:
    """Where tokens lie in a pool: page times 64 plus row.

    Args:
      positions: int32[batch, s, topk], or -1.
      block_table: int32[batch, max_pages_per_seq].

    Returns:
      int32[batch, s, topk]; -1 where the position is negative, or its page.
    """
    slots = jnp.maximum(positions, 0) // PAGE_SIZE
    pages = jax.vmap(lambda table, slot: table.at[slot].get(mode="fill", fill_value=-1))(
        block_table, slots
    )
    exists = (positions >= 0) & (pages >= 0)
    return jnp.where(exists, pages * PAGE_SIZE + positions % PAGE_SIZE, -1).astype(jnp.int32)


def _layer_norm(x: jax.Array, params: Params, eps: float) -> jax.Array:
    """`x` [..., dim] with mean 0 and variance 1, times `scale` plus `bias`, computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale, bias = (params[name].astype(jnp.float32) for name in ("scale", "bias"))
    return (x32 * scale + bias).astype(x.dtype)


def _rotate(config: IndexerConfig, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first 64 numbers of `x` [..., head_dim] by tables [..., 32]."""
    rope, rest = jnp.split(x, [_ROPE_DIM], axis=-1)
    if config.rope_interleave:
        rope = mla.apply_rope(rope, cos, sin)
    else:
        first, second = jnp.split(rope.astype(jnp.float32), 2, axis=-1)
        rope = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rope.astype(x.dtype), rest], axis=-1)
