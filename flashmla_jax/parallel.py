"""Decoding over a mesh of devices: heads, batch and cached tokens divided among them.

Three schemes, alone or together, each along mesh axes of its own:

- **heads** (tensor parallelism): a device has some query heads, and the whole cache. No
  communication.
- **batch** (data parallelism): a device has some sequences, with pages, tables and lengths of its
  own; page ids count from 0 on every device. No communication.
- **context**: the tokens of a sequence are dealt out, token `t` to device `t mod c` of `c`, where
  it is token `t // c`. Page ids mean the same place in every device's pages, so that one table
  serves all. A device attends to its tokens, and results are merged by their logarithms: one
  all-reduce of the results, in float32.

`flash_mla_with_kvcache` and `cache_append` here take global arrays and a mesh. Within
`jax.shard_map`, the schemes for heads and batch need nothing but the functions of the same names
without a mesh; `context_attention`, `context_append` and `context_length` are for the third.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from flashmla_jax import attention
from flashmla_jax._checks import array
from flashmla_jax.ops import cache_append as _append

AxisName = str | tuple[str, ...]


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    mesh: Mesh,
    batch_axis: AxisName | None = None,
    head_axis: AxisName | None = None,
    context_axis: AxisName | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    deterministic: bool | str = True,
) -> tuple[jax.Array, jax.Array]:
    """`flashmla_jax.flash_mla_with_kvcache` over a mesh.

    Sizes below are global. A scheme without an axis is not used; axes not named hold copies.

    Args:
      q: [batch, s_q, h_q, 576], divided along batch and heads.
      k_cache: [num_pages, 64, h_kv, 576], or 656 bytes in place of 576 numbers. Along the batch
        and context axes, in this order, the pages of one device after those of the other; divided
        along heads if `h_kv > 1`.
      block_table: int32[batch, max_pages_per_seq], divided along batch: ids among the pages of each
        device. With a context axis, an entry covers 64 tokens on each of its devices.
      cache_seqlens: int32[batch], divided along batch: lengths of the sequences, over all devices.
      mesh: the devices.
      batch_axis: the mesh axes that sequences are divided along.
      head_axis: those that query heads are.
      context_axis: those that tokens of the cache are.
      softmax_scale: see `flashmla_jax.flash_mla_with_kvcache`.
      causal: likewise.
      is_fp8_kvcache: likewise.
      deterministic: likewise.

    Returns:
      out [batch, s_q, h_q, 512] and lse float32[batch, h_q, s_q], divided along batch and heads.

    Raises:
      ValueError: an axis is not of the mesh, or is named twice; a size does not divide; and as
        `flashmla_jax.flash_mla_with_kvcache`.
    """
    q = array("q", q, "[batch, s_q, h_q, 576]")
    axes = _Axes(mesh, batch_axis, head_axis, context_axis)
    pool = axes.pool(k_cache, batch=q.shape[0])
    _divides("h_q", q.shape[2], "head_axis", axes.devices(head_axis))

    body: Callable[..., Any] = attention.flash_mla_with_kvcache
    if context_axis is not None:
        body = functools.partial(context_attention, axis_name=context_axis)
    body = functools.partial(
        body,
        softmax_scale=softmax_scale,
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        deterministic=deterministic,
    )
    rows, sequences = PartitionSpec(batch_axis, None, head_axis), PartitionSpec(batch_axis)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(rows, pool, sequences, sequences),
        out_specs=(rows, PartitionSpec(batch_axis, head_axis)),
    )(q, k_cache, block_table, cache_seqlens)


def cache_append(
    k_cache: jax.Array,
    new_kv: jax.Array,
    block_table: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    mesh: Mesh,
    batch_axis: AxisName | None = None,
    head_axis: AxisName | None = None,
    context_axis: AxisName | None = None,
) -> jax.Array:
    """`flashmla_jax.cache_append` over a mesh: every device writes the tokens that are its own.

    Args:
      k_cache: [num_pages, 64, h_kv, n], divided as for `flash_mla_with_kvcache`: 576 numbers, or
        the 656 bytes of FP8 tokens as `flashmla_jax.cache.layout.quantize` makes them.
      new_kv: [batch, num_tokens, h_kv, n], divided along batch, and along heads if `h_kv > 1`.
      block_table: int32[batch, max_pages_per_seq], divided along batch.
      start: int32[batch], divided along batch: positions in the sequences, over all devices.
      count: int32[batch], likewise.
      mesh: the devices.
      batch_axis: the mesh axes that sequences are divided along.
      head_axis: those that query heads are.
      context_axis: those that tokens of the cache are.

    Returns:
      The pool with the tokens in it, divided as it was; the same buffers, if it is donated.

    Raises:
      ValueError: as `flash_mla_with_kvcache` and `flashmla_jax.cache_append`.
    """
    new_kv = array("new_kv", new_kv, "[batch, num_tokens, h_kv, n]")
    axes = _Axes(mesh, batch_axis, head_axis, context_axis)
    pool = axes.pool(k_cache, batch=new_kv.shape[0])
    body: Callable[..., Any] = _append.cache_append
    if context_axis is not None:
        body = functools.partial(context_append, axis_name=context_axis)
    tokens, sequences = PartitionSpec(batch_axis, None, pool[2]), PartitionSpec(batch_axis)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(pool, tokens, sequences, sequences, sequences),
        out_specs=pool,
    )(k_cache, new_kv, block_table, start, count)


def context_attention(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    axis_name: AxisName,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    deterministic: bool | str = True,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a context that is dealt out over `axis_name`; for use inside `jax.shard_map`.

    Communicates once: a maximum of `lse`, and a sum of the weighted results, batch * s_q * h_q *
    513 float32 numbers. With `causal` and more than one query token, a device's share of what each
    query sees is not a suffix, so query tokens are attended one by one, as sequences of their own.

    Args:
      q: [batch, s_q, h_q, 576], the same on all devices of the axis.
      k_cache: [num_pages, 64, h_kv, 576], or 656 bytes in place of 576 numbers: this device's
        pages.
      block_table: int32[batch, max_pages_per_seq], the same on all devices.
      cache_seqlens: int32[batch], likewise: lengths over all devices.
      axis_name: the mesh axes that tokens are dealt out along.
      softmax_scale: see `flashmla_jax.flash_mla_with_kvcache`.
      causal: likewise.
      is_fp8_kvcache: likewise.
      deterministic: likewise.

    Returns:
      out [batch, s_q, h_q, 512] and lse float32[batch, h_q, s_q], the same on all devices.
    """
    batch, s_q, h_q, head_dim = q.shape
    attend = functools.partial(
        attention.flash_mla_with_kvcache,
        softmax_scale=softmax_scale,
        is_fp8_kvcache=is_fp8_kvcache,
        deterministic=deterministic,
    )
    if causal and s_q > 1:
        seen = cache_seqlens[:, None] - s_q + jnp.arange(1, s_q + 1, dtype=jnp.int32)
        out, lse = attend(
            q.reshape(batch * s_q, 1, h_q, head_dim),
            k_cache,
            jnp.repeat(block_table, s_q, axis=0),
            context_length(seen.reshape(-1), axis_name=axis_name),
        )
        out = out.reshape(batch, s_q, h_q, -1)
        lse = lse.reshape(batch, s_q, h_q).swapaxes(1, 2)
    else:
        lengths = context_length(cache_seqlens, axis_name=axis_name)
        out, lse = attend(q, k_cache, block_table, lengths)
    highest = jax.lax.pmax(jax.lax.stop_gradient(lse), axis_name)  # it cancels
    weight = jnp.exp(lse - jnp.where(highest == -jnp.inf, 0, highest))
    total = jax.lax.psum(weight, axis_name)
    per_row = weight.swapaxes(1, 2)[..., None]
    merged = jax.lax.psum(out.astype(jnp.float32) * per_row, axis_name)
    merged = merged / jnp.where(total == 0, 1, total).swapaxes(1, 2)[..., None]
    return merged.astype(out.dtype), highest + jnp.log(total)


def context_append(
    k_cache: jax.Array,
    new_kv: jax.Array,
    block_table: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    axis_name: AxisName,
) -> jax.Array:
    """Writes this device's share of new tokens; for use inside `jax.shard_map`.

    Args:
      k_cache: [num_pages, 64, h_kv, n], this device's pages.
      new_kv: [batch, num_tokens, h_kv, n], all new tokens, the same on all devices of the axis.
      block_table: int32[batch, max_pages_per_seq], likewise.
      start: int32[batch], likewise: positions of the first new tokens, over all devices.
      count: int32[batch], likewise.
      axis_name: the mesh axes that tokens are dealt out along.

    Returns:
      This device's pages, with its tokens in them.
    """
    devices = jax.lax.axis_size(axis_name)
    rank = jax.lax.axis_index(axis_name)
    num_tokens = new_kv.shape[1]
    first = (rank - start) % devices  # the first of the new tokens that is ours
    mine = -(-num_tokens // devices)
    rows = first[:, None] + devices * jnp.arange(mine, dtype=jnp.int32)
    # Rows past the last token are not counted.
    kv = jnp.take_along_axis(new_kv, jnp.minimum(rows, num_tokens - 1)[:, :, None, None], axis=1)
    own = (jnp.minimum(count, num_tokens) - first + devices - 1) // devices
    return _append.cache_append(k_cache, kv, block_table, (start + first) // devices, own)


def context_length(length: jax.Array, *, axis_name: AxisName) -> jax.Array:
    """How many of the first `length` tokens are this device's; for use inside `jax.shard_map`.

    What a `PagedKVCache` of this device's tokens has to `allocate` for new ones is the difference
    between two of these.

    Args:
      length: int32[...], tokens over all devices.
      axis_name: the mesh axes that tokens are dealt out along.

    Returns:
      int32[...]
    """
    devices = jax.lax.axis_size(axis_name)
    rank = jax.lax.axis_index(axis_name)
    return jnp.where(length > rank, (length - 1 - rank) // devices + 1, 0)


def _names(axis: AxisName | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else tuple(axis)


class _Axes:
    """The mesh axes of the three schemes."""

    def __init__(
        self,
        mesh: Mesh,
        batch: AxisName | None,
        head: AxisName | None,
        context: AxisName | None,
    ) -> None:
        self._mesh, self._batch, self._head, self._context = mesh, batch, head, context
        used: set[str] = set()
        for scheme, axis in {"batch": batch, "head": head, "context": context}.items():
            for name in _names(axis):
                if name not in mesh.shape:
                    raise ValueError(
                        f"{scheme}_axis {name!r} is not an axis of the mesh, {dict(mesh.shape)}"
                    )
                if name in used:
                    raise ValueError(f"{scheme}_axis {name!r} is already used for another scheme")
                used.add(name)

    def devices(self, axis: AxisName | None) -> int:
        """How many devices there are along an axis."""
        return math.prod(self._mesh.shape[name] for name in _names(axis))

    def pool(self, k_cache: jax.Array, batch: int) -> PartitionSpec:
        """How the pages are divided; `batch` and they must divide so."""
        k_cache = array("k_cache", k_cache, "[num_pages, 64, h_kv, n]")
        num_pages, _, h_kv, _ = k_cache.shape
        pages = _names(self._batch) + _names(self._context)
        _divides("batch", batch, "batch_axis", self.devices(self._batch))
        _divides("num_pages", num_pages, "batch and context axes", self.devices(pages))
        if h_kv == 1:  # all heads read it
            return PartitionSpec(pages or None, None, None)
        _divides("h_kv", h_kv, "head_axis", self.devices(self._head))
        return PartitionSpec(pages or None, None, self._head)


def _divides(what: str, size: int, axis: str, devices: int) -> None:
    if size % devices:
        raise ValueError(f"{what} = {size} does not divide among the {devices} devices of {axis}")
