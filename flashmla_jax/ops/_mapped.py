"""`vmap` of the ops over a page pool.

A mapped axis stands in front of all others of the primitive's operands and results, the outermost
first, so that it can be divided over devices like any other; only where an op is lowered is it
folded into the batch. The parameter `mapped` has an entry for each, which tells whether the pool
has it too: a pool without it is shared, and not copied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

Mapped = tuple[bool, ...]


def batch(
    primitive: Primitive,
    size: int,
    operands: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    pool: int,
    shares_pool: bool,
    mapped: Mapped,
    **params: Any,
) -> list[jax.Array]:
    """The batching rule of dense decode and append, for `_ffi.register_batching`.

    Args:
      primitive: the op.
      size: of the mapped axis.
      operands: of the primitive.
      dims: the place of the mapped axis in each, or None.
      pool: which of them is the page pool.
      shares_pool: whether the elements of the mapped axis may share one; else it is copied first.
      mapped: of the axes that are there already.
      params: the primitive's others.
    """
    in_front = []
    for i, (x, dim) in enumerate(zip(operands, dims, strict=True)):
        if dim is not None:
            in_front.append(jnp.moveaxis(x, dim, 0))
        elif i == pool and shares_pool:
            in_front.append(x)
        else:
            in_front.append(jnp.broadcast_to(x, (size, *x.shape)))
    own = dims[pool] is not None or not shares_pool
    return list(primitive.bind(*in_front, mapped=(own, *mapped), **params))


def batch_by_folding(
    primitive: Primitive,
    size: int,
    operands: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    shared: Sequence[int],
    **params: Any,
) -> list[jax.Array]:
    """The rule of ops that fold the mapped axis into the batch at once.

    If one of the operands that are not per sequence, `shared`, has it, elements come one after
    another. The parameter `mapped` of such a primitive is always empty.
    """
    in_front = [
        x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(operands, dims, strict=True)
    ]
    if any(dims[i] is not None for i in shared):
        mapped = [i for i, dim in enumerate(dims) if dim is not None]

        def one(elements: list[jax.Array]) -> list[jax.Array]:
            own = list(in_front)
            for i, x in zip(mapped, elements, strict=True):
                own[i] = x
            return list(primitive.bind(*own, **params))

        return jax.lax.map(one, [in_front[i] for i in mapped])
    folded = []
    for i, (x, dim) in enumerate(zip(in_front, dims, strict=True)):
        if i not in shared:
            x = fold(jnp.broadcast_to(x, (size, *x.shape)) if dim is None else x, 1)
        folded.append(x)
    return [unfold(x, (size,)) for x in primitive.bind(*folded, **params)]


def fold(x: jax.Array, axes: int) -> jax.Array:
    """Merges so many axes in front into the next one."""
    return x.reshape(math.prod(x.shape[: axes + 1]), *x.shape[axes + 1 :])


def unfold(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """The reverse, with the sizes of the axes in front."""
    return x.reshape(*sizes, x.shape[0] // math.prod(sizes), *x.shape[1:])


def fold_operands(
    operands: Sequence[jax.Array],
    *,
    pool: int,
    tables: Sequence[int],
    mapped: Mapped,
    fold_pool: bool = True,
) -> list[jax.Array]:
    """All operands without mapped axes: one pool, and tables that point into it.

    An entry outside its own pool must not reach a neighbour's: it becomes -1.
    """
    pages = operands[pool]
    folded = [fold(x, len(mapped)) for x in operands]
    folded[pool] = fold(pages, sum(mapped)) if fold_pool else pages
    if any(mapped):
        for i in tables:
            table = _in_one_pool(operands[i], pages.shape[sum(mapped)], mapped)
            folded[i] = fold(table, len(mapped))
    return folded


def _in_one_pool(table: jax.Array, num_pages: int, mapped: Mapped) -> jax.Array:
    """Page numbers of pools of `num_pages`, as those of all pools after one another."""
    number: Any = jnp.int32(0)  # of the pool that a sequence has
    for i, own in enumerate(mapped):
        if own:
            size = table.shape[i]
            places = jnp.arange(size, dtype=jnp.int32)
            number = number * size + jnp.expand_dims(places, range(1, table.ndim - i))
    valid = (table >= 0) & (table < num_pages)
    return jnp.where(valid, table + number * num_pages, -1)


def folded(
    function: Callable[..., Any], *, pool: int, tables: Sequence[int], fold_pool: bool = True
) -> Callable[..., Any]:
    """`function`, which knows no mapped axes, as one that does.

    Without `fold_pool` it knows those of the pool, which is its result.
    """

    @functools.wraps(function)
    def of_mapped(*operands: jax.Array, mapped: Mapped, **params: Any) -> list[jax.Array]:
        if not mapped:
            return list(function(*operands, **params))
        sizes = operands[tables[0]].shape[: len(mapped)]
        flat = fold_operands(operands, pool=pool, tables=tables, mapped=mapped, fold_pool=fold_pool)
        results = function(*flat, **params)
        return [unfold(x, sizes) for x in results] if fold_pool else list(results)

    return of_mapped
