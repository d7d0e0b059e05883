"""The routed experts of a mixture: every token goes through its own few.

Each (token, expert) pair is a row. There are no capacity limits: no token loses an expert to the
others of its batch. What multiplies the rows depends on where, and on how many they are:

- on a GPU, a few rows read their experts' weights in sums of products, which XLA fuses: a kernel
  per product, and no copy of a weight;
- more rows are sorted by expert into blocks, each of which goes through its expert's MLP in kernels
  of csrc/sm90/grouped_mlp.cu: they read weights once for each block, and only those they need;
- elsewhere a loop takes block after block.

All of it is for experts that a GPU has all of: XLA cannot divide the call of the kernels, and would
gather weights that are divided over several GPUs on each of them, in every layer.

`jax.lax.ragged_dot` would be the grouped product, but on GPU and CPU XLA (of jax 0.9.1 to 0.12)
makes it every expert for every row, of masked copies of all rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from flashmla_jax.ops import _ffi

# On a GPU, up to how many rows each reads its expert's weights for itself.
_FEW_ROWS = 16
# What the kernels want of both sizes; csrc/params.h has the same number.
_ALIGNMENT = 8
# Up to how many rows each counts those before it, rather than being sorted.
_ROWS_COUNTED = 2048


class Experts(NamedTuple):
    """The weights of the experts' gated MLPs, laid out as in a checkpoint: [experts, out, in]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Experts:
        """From the parameters of `gate_proj`, `up_proj` and `down_proj`."""
        return cls(*(params[name]["weight"] for name in ("gate_proj", "up_proj", "down_proj")))


def routed_experts(
    weights: Experts,
    tokens: jax.Array,
    experts: jax.Array,
    shares: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """The weighted sum of each token's experts.

    Args:
      weights: of all experts.
      tokens: [tokens, hidden].
      experts: int32[tokens, k], each token's different experts. Numbers past the last one are
        nobody's, and their shares 0.
      shares: float32[tokens, k].
      precision: of the products in the loop.

    Returns:
      [tokens, hidden] in the dtype of `tokens`.
    """
    if experts.size == 0:
        return jnp.zeros_like(tokens)
    loop: Callable[..., jax.Array] = functools.partial(_loop, precision=precision)
    on_gpu = loop
    if not is_symbolic_dim(experts.size) and experts.size <= _FEW_ROWS:
        on_gpu = _fused
    elif _has_kernels(weights, tokens):
        on_gpu = _grouped
    return jax.lax.platform_dependent(weights, tokens, experts, shares, cuda=on_gpu, default=loop)


def _fused(weights: Experts, tokens: jax.Array, experts: jax.Array, shares: jax.Array) -> jax.Array:
    expert_of_row = experts.reshape(-1)

    def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
        chosen = weight.at[expert_of_row].get(mode="clip")
        products = x[:, None, :].astype(jnp.float32) * chosen.astype(jnp.float32)
        return products.sum(axis=2).astype(x.dtype)

    rows = jnp.repeat(tokens, experts.shape[1], axis=0)
    hidden = jax.nn.silu(dot(rows, weights.gate)) * dot(rows, weights.up)
    return _combine(dot(hidden, weights.down), tokens, shares)


def _combine(rows: jax.Array, tokens: jax.Array, shares: jax.Array) -> jax.Array:
    rows = rows.reshape(*shares.shape, rows.shape[-1]) * shares[..., None]
    return rows.sum(axis=1).astype(tokens.dtype)


# --- Blocks of rows --------------------------------------------------------------------------


def _has_kernels(weights: Experts, tokens: jax.Array) -> bool:
    """Whether a GPU has the kernels for these arrays.

    They have to be built where a program is made: a machine without them exports the loop.
    """
    return (
        tokens.dtype in (jnp.bfloat16, jnp.float16)
        and all(weight.dtype == tokens.dtype for weight in weights)
        and all(size > 0 and size % _ALIGNMENT == 0 for size in weights.gate.shape[1:])
        and _ffi.why_no_kernel(_ffi.CUDA) is None
    )


class _Blocks(NamedTuple):
    """Rows sorted by expert, each expert's padded to whole blocks."""

    slot_of_row: jax.Array
    """int32[rows]: where a row is in the blocks; beyond them if its expert is nobody's."""
    row_of_slot: jax.Array
    """int32[num_blocks * block]: the reverse; the number of rows in the padding."""
    expert_of_block: jax.Array
    """int32[num_blocks]: past the last expert for blocks that have no row."""


def _sorted_by_expert(expert_of_row: jax.Array, num_experts: int, least: int) -> _Blocks:
    """Blocks of about as many rows as an expert gets, a power of two from `least` to 128.

    Large enough to use the multiplier, small enough that little is padding.
    """
    num_rows = expert_of_row.shape[0]
    if is_symbolic_dim(num_rows):  # exported for batches of any size
        block = 32
    else:
        block = min(128, max(least, 1 << (num_rows // num_experts).bit_length()))
    num_blocks = (num_rows + jax.core.min_dim(num_experts, num_rows) * (block - 1)) // block

    row = jnp.arange(num_rows, dtype=jnp.int32)
    expert = jnp.arange(num_experts, dtype=jnp.int32)
    counts = jnp.sum(expert_of_row[:, None] == expert, axis=0, dtype=jnp.int32)
    blocks = (counts + block - 1) // block
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    # A row's place among those of its expert.
    if not is_symbolic_dim(num_rows) and num_rows <= _ROWS_COUNTED:
        is_before = (expert_of_row[:, None] == expert_of_row) & (row < row[:, None])
        rank = jnp.sum(is_before, axis=1, dtype=jnp.int32)
    else:
        order = jnp.argsort(expert_of_row, stable=True)
        starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
        ranks = row - starts.at[expert_of_row[order]].get(mode="clip")
        rank = jnp.zeros(num_rows, jnp.int32).at[order].set(ranks, unique_indices=True)
    first = (ends - blocks).at[expert_of_row].get(mode="clip")
    slot = jnp.where(expert_of_row < num_experts, first * block + rank, num_blocks * block)
    row_of_slot = jnp.full(num_blocks * block, num_rows, jnp.int32)
    number = jnp.arange(num_blocks, dtype=jnp.int32)
    return _Blocks(
        slot_of_row=slot,
        row_of_slot=row_of_slot.at[slot].set(row, mode="drop"),
        expert_of_block=jnp.sum(ends <= number[:, None], axis=1, dtype=jnp.int32),
    )


def _in_blocks(blocks: _Blocks, tokens: jax.Array, experts: jax.Array) -> jax.Array:
    """The rows [num_blocks, block, hidden], with zeros in the padding."""
    rows = tokens.at[blocks.row_of_slot // experts.shape[1]].get(mode="fill", fill_value=0)
    return rows.reshape(blocks.expert_of_block.shape[0], -1, tokens.shape[1])


def _from_blocks(
    out: jax.Array, blocks: _Blocks, tokens: jax.Array, shares: jax.Array
) -> jax.Array:
    out = out.reshape(-1, out.shape[-1])
    rows = out.at[blocks.slot_of_row].get(mode="fill", fill_value=0)
    return _combine(rows, tokens, shares)


def _loop(
    weights: Experts,
    tokens: jax.Array,
    experts: jax.Array,
    shares: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    num_experts = weights.gate.shape[0]
    blocks = _sorted_by_expert(experts.reshape(-1), num_experts, least=8)

    def apply(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, expert = inputs
        gate, up, down = (weight[expert] for weight in weights)

        def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
            return jnp.einsum("bi,oi->bo", x, weight, precision=precision)

        return dot(jax.nn.silu(dot(x, gate)) * dot(x, up), down)

    expert_of_block = jnp.minimum(blocks.expert_of_block, num_experts - 1)
    out = jax.lax.map(apply, (_in_blocks(blocks, tokens, experts), expert_of_block))
    return _from_blocks(out, blocks, tokens, shares)


@jax.custom_jvp
def _grouped(
    weights: Experts, tokens: jax.Array, experts: jax.Array, shares: jax.Array
) -> jax.Array:
    blocks = _sorted_by_expert(experts.reshape(-1), weights.gate.shape[0], least=16)
    rows = _in_blocks(blocks, tokens, experts)
    act = jax.ShapeDtypeStruct((*rows.shape[:-1], weights.gate.shape[1]), rows.dtype)
    out = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
    call = jax.ffi.ffi_call(_ffi.GROUPED_MLP, (out, act), vmap_method="sequential")
    return _from_blocks(call(rows, blocks.expert_of_block, *weights)[0], blocks, tokens, shares)


@_grouped.defjvp
def _grouped_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative is that of the loop."""
    weights, tokens, experts, shares = primals
    d_weights, d_tokens, _, d_shares = tangents
    _, tangent = jax.jvp(
        lambda w, x, s: _loop(w, x, experts, s),
        (weights, tokens, shares),
        (d_weights, d_tokens, d_shares),
    )
    return _grouped(*primals), tangent
