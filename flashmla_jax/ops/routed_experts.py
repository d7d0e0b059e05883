"""The routed experts of a mixture: every token goes through its own few.

Each (token, expert) pair is a row. There are no capacity limits: no token loses an expert to the
others of its batch. What multiplies the rows depends on where, and on how many they are:

- on a GPU, a few rows read their experts' weights in sums of products, which XLA fuses: a kernel
  per product, and no copy of a weight;
- more rows are sorted by expert into blocks, each of which goes through its expert's MLP in kernels
  of csrc/sm90/grouped_mlp.cu: they read weights once for each block, and only those they need;
- elsewhere a loop takes block after block.

Weights may be divided over devices: the experts, the size of their MLPs, or both. Each device then
has its part of every sum, and devices add up what they have; no weight that is divided so leaves
its device. Tokens may be divided over other axes of a mesh. (Derivatives are XLA's to divide.)

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

from flashmla_jax.ops import _ffi, _sharding

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
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """The weighted sum of each token's experts.

    Args:
      weights: of all experts. They may be divided over devices along the experts, along the size of
        their MLPs, or along both, and all three alike.
      tokens: [num_tokens, hidden].
      experts: int32[num_tokens, k], each token's different experts. Numbers past the last one are
        nobody's, and their shares 0.
      shares: float32[num_tokens, k].
      precision: of the products in the loop; by default JAX's.

    Returns:
      [num_tokens, hidden] in the dtype of `tokens`. Sums are of float32.

    Raises:
      ValueError: shapes contradict each other, or there is no expert.
    """
    _check_shapes(weights, tokens, experts, shares)
    if experts.size == 0:
        return jnp.zeros_like(tokens)
    # Its name: a program for several devices has it in writing, and not what is set around it.
    name: str | None = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if precision is not None:
        name = precision.name.lower()
    return _routed(name, weights, tokens, experts, shares).astype(tokens.dtype)


def _check_shapes(
    weights: Experts, tokens: jax.Array, experts: jax.Array, shares: jax.Array
) -> None:
    num_experts, size, hidden = weights.gate.shape
    if num_experts < 1:
        raise ValueError(f"there must be an expert, got gate {weights.gate.shape}")
    if weights.up.shape != weights.gate.shape:
        raise ValueError(f"up must be as gate {weights.gate.shape}, got {weights.up.shape}")
    if weights.down.shape != (num_experts, hidden, size):
        expected = num_experts, hidden, size
        raise ValueError(f"down must be {expected}, got {weights.down.shape}")
    if tokens.ndim != 2 or tokens.shape[1] != hidden:
        raise ValueError(f"tokens must be [num_tokens, {hidden}], got {tokens.shape}")
    if experts.ndim != 2 or experts.shape[0] != tokens.shape[0]:
        raise ValueError(f"experts must be [{tokens.shape[0]}, k], got {experts.shape}")
    if shares.shape != experts.shape:
        raise ValueError(f"shares must be as experts {experts.shape}, got {shares.shape}")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _routed(
    precision: str | None,
    weights: Experts,
    tokens: jax.Array,
    experts: jax.Array,
    shares: jax.Array,
) -> jax.Array:
    """The sum, before it is rounded."""
    num_experts = weights.gate.shape[0]
    numbers = jnp.arange(num_experts, dtype=jnp.int32)
    operands = tokens, experts, shares, numbers, *weights
    (out,) = routed_experts_p.bind(*operands, num_experts=num_experts, precision=precision)
    return out


def _dtype_of_sums(tokens: Any) -> Any:
    return jnp.promote_types(tokens.dtype, jnp.float32)


# --- Abstract evaluation ---------------------------------------------------------------------


_SHARDING = _sharding.Rule(
    operands={
        "tokens": ("num_tokens", "hidden"),
        "experts": ("num_tokens", "k"),
        "shares": ("num_tokens", "k"),
        "numbers": ("num_experts",),
        "gate": ("num_experts", "size", "hidden"),
        "up": ("num_experts", "size", "hidden"),
        "down": ("num_experts", "hidden", "size"),
    },
    results=(("num_tokens", "hidden"),),
    divided=("num_tokens", "num_experts", "size"),
    small=("tokens", "experts", "shares", "numbers"),
    advice="Divide the experts, or the size of their MLPs.",
    summed=("num_experts", "size"),
)


def _abstract_eval(*operands: Any, **_: Any) -> tuple[jax.core.ShapedArray, ...]:
    tokens = operands[0]
    return _sharding.result_types(_SHARDING, operands, [(tokens.shape, _dtype_of_sums(tokens))])


routed_experts_p = _ffi.define_primitive("routed_experts", _abstract_eval)


# --- A few rows ------------------------------------------------------------------------------


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
    dtype = _dtype_of_sums(tokens)
    rows = rows.reshape(*shares.shape, rows.shape[-1]).astype(dtype)
    return (rows * shares[..., None].astype(dtype)).sum(axis=1)


# --- Blocks of rows --------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """Rows sorted by expert, each expert's padded to whole blocks."""

    slot_of_row: jax.Array
    """int32[rows]: where a row is in the blocks; beyond them if its expert is nobody's."""
    row_of_slot: jax.Array
    """int32[num_blocks * block]: the reverse; the number of rows in the padding."""
    expert_of_block: jax.Array
    """int32[num_blocks]: past the last expert for blocks that have no row."""


def _sorted_by_expert(
    expert_of_row: jax.Array, num_experts: int, among: int, least: int
) -> _Blocks:
    """Blocks of about as many rows as an expert gets, a power of two from `least` to 128.

    Large enough to use the multiplier, small enough that little is padding. The `num_experts` are
    some of those that the rows are divided `among`.
    """
    num_rows = expert_of_row.shape[0]
    if is_symbolic_dim(num_rows):  # exported for batches of any size
        block = 32
    else:
        block = min(128, max(least, 1 << (num_rows // among).bit_length()))
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
    *,
    among: int | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """`among`: how many experts there are, where these are some of them."""
    num_experts = weights.gate.shape[0]
    blocks = _sorted_by_expert(experts.reshape(-1), num_experts, among or num_experts, least=8)

    def apply(x: jax.Array, expert: jax.Array) -> jax.Array:
        gate, up, down = (weight[expert] for weight in weights)

        def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
            return jnp.einsum("bi,oi->bo", x, weight, precision=precision)

        return dot(jax.nn.silu(dot(x, gate)) * dot(x, up), down)

    def apply_if_used(x: jax.Array, expert: jax.Array) -> jax.Array:
        shape = jax.eval_shape(apply, x, expert)
        zeros = functools.partial(jnp.zeros, shape.shape, shape.dtype)
        return jax.lax.cond(expert < num_experts, apply, lambda *_: zeros(), x, expert)

    rows, expert_of_block = _in_blocks(blocks, tokens, experts), blocks.expert_of_block
    if among in (None, num_experts):  # nearly all blocks are used
        expert_of_block = jnp.minimum(expert_of_block, num_experts - 1)
        out = jax.lax.map(lambda block: apply(*block), (rows, expert_of_block))
    else:
        out = jax.lax.map(lambda block: apply_if_used(*block), (rows, expert_of_block))
    return _from_blocks(out, blocks, tokens, shares)


def _grouped(
    weights: Experts,
    tokens: jax.Array,
    experts: jax.Array,
    shares: jax.Array,
    *,
    among: int | None = None,
) -> jax.Array:
    num_experts = weights.gate.shape[0]
    blocks = _sorted_by_expert(experts.reshape(-1), num_experts, among or num_experts, least=16)
    rows = _in_blocks(blocks, tokens, experts)
    act = jax.ShapeDtypeStruct((*rows.shape[:-1], weights.gate.shape[1]), rows.dtype)
    out = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
    call = jax.ffi.ffi_call(_ffi.GROUPED_MLP, (out, act))
    return _from_blocks(call(rows, blocks.expert_of_block, *weights)[0], blocks, tokens, shares)


# --- Lowerings -------------------------------------------------------------------------------


def _call(
    tokens: jax.Array,
    experts: jax.Array,
    shares: jax.Array,
    numbers: jax.Array,
    *weights: jax.Array,
    num_experts: int,
    precision: str | None,
    on_gpu: bool,
    kernels: bool = False,
) -> list[jax.Array]:
    """The op with some of the experts, or all."""
    here = Experts(*weights)
    count = here.gate.shape[0]
    run: Callable[..., jax.Array] = functools.partial(_loop, among=num_experts, precision=precision)
    if kernels and _fits_kernels(here, tokens):
        run = functools.partial(_grouped, among=num_experts)
    if count < num_experts:
        experts = experts - numbers[0]
        is_here = (experts >= 0) & (experts < count)
        experts, shares = jnp.where(is_here, experts, count), jnp.where(is_here, shares, 0)
    elif on_gpu and not is_symbolic_dim(experts.size) and experts.size <= _FEW_ROWS:
        run = _fused
    return [_sharding.auto_along(run, (tokens, 0), None)(here, tokens, experts, shares)]


def _fits_kernels(weights: Experts, tokens: jax.Array) -> bool:
    return (
        tokens.dtype in (jnp.bfloat16, jnp.float16)
        and all(weight.dtype == tokens.dtype for weight in weights)
        and all(size > 0 and size % _ALIGNMENT == 0 for size in weights.gate.shape[1:])
    )


def _reference(*operands: jax.Array, **params: Any) -> list[jax.Array]:
    """Where there are no kernels, on GPUs, too."""
    on_gpu, elsewhere = (
        functools.partial(_call, on_gpu=on_gpu, **params) for on_gpu in (True, False)
    )
    out: list[jax.Array] = jax.lax.platform_dependent(*operands, cuda=on_gpu, default=elsewhere)
    return out


_ffi.register_lowerings(
    routed_experts_p,
    kernels={
        _ffi.CPU: functools.partial(_call, on_gpu=False),
        _ffi.CUDA: functools.partial(_call, on_gpu=True, kernels=True),
    },
    reference=_reference,
    sharding=_SHARDING,
    name="flashmla_routed_experts",
)


# --- Batching --------------------------------------------------------------------------------


def _batch(
    size: Any, operands: tuple[jax.Array, ...], dims: tuple[int | None, ...], **params: Any
) -> list[jax.Array]:
    """Tokens of all elements are tokens, where elements share the experts' weights."""
    operands = tuple(
        x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)
    )
    mapped = [d is not None for d in dims]
    if any(mapped[3:]):

        def one(parts: list[jax.Array]) -> Any:
            rest = iter(parts)
            each = [next(rest) if m else x for x, m in zip(operands, mapped, strict=True)]
            return routed_experts_p.bind(*each, **params)

        return jax.lax.map(one, [x for x, m in zip(operands, mapped, strict=True) if m])

    def together(*operands: jax.Array) -> jax.Array:
        own = [
            x if m else jnp.broadcast_to(x, (size, *x.shape))
            for x, m in zip(operands[:3], mapped, strict=False)
        ]
        rows = [x.reshape(-1, x.shape[-1]) for x in own]
        (out,) = routed_experts_p.bind(*rows, *operands[3:], **params)
        return out.reshape(own[0].shape)

    leading = operands[mapped.index(True)]
    return [_sharding.auto_along(together, (leading, 0), (leading, 1), None)(*operands)]


_ffi.register_batching(routed_experts_p, _batch)


# --- Differentiation -------------------------------------------------------------------------


@_routed.defjvp
def _routed_jvp(precision: str | None, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative is that of the loop."""
    weights, tokens, experts, shares = primals
    d_weights, d_tokens, _, d_shares = tangents

    def loop(weights: Experts, tokens: jax.Array, shares: jax.Array) -> jax.Array:
        run = functools.partial(_loop, precision=precision)
        along = _sharding.auto_along(run, (tokens, 0), None)
        return along(weights, tokens, experts, shares)

    out, tangent = jax.jvp(loop, (weights, tokens, shares), (d_weights, d_tokens, d_shares))
    kernels = functools.partial(_routed, precision)
    out = jax.lax.platform_dependent(
        out, *primals, cuda=lambda _, *primals: kernels(*primals), default=lambda out, *_: out
    )
    return out, tangent
