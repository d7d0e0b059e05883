"""The paged KV cache: one pool of pages per layer, and a block table that all layers share.

A decoding step, inside one `jax.jit` that donates the cache:

    cache, ok = cache.allocate(num_tokens)      # once: pages are taken, lengths advance
    for layer in range(num_layers):
        cache = cache.append(layer, kv)         # the new tokens of this layer, written in place
        out, lse = flash_mla_with_kvcache(q, cache.pages[layer], cache.block_table,
                                          cache.cache_seqlens)

Everything that changes from step to step is an array, so one compiled program serves a whole
generation: sequences grow, end and give their pages back without recompilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim, register_pytree_node_serialization

from flashmla_jax._checks import fewer
from flashmla_jax.cache.layout import DTYPES, HEAD_DIM, PAGE_SIZE
from flashmla_jax.ops import _sharding
from flashmla_jax.ops.cache_append import cache_append

_INT32_MAX = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """The latent KV cache of a batch of sequences, in pages of `PAGE_SIZE` tokens.

    Token `t` of sequence `i` lives in page `block_table[i, t // PAGE_SIZE]`, row `t % PAGE_SIZE`,
    of every layer's pool. A cache is immutable: methods return the next one. Donate it to the
    jitted function that advances it (`jax.jit(step, donate_argnames="cache")`), and the pools are
    updated in place; without donation every step copies them.

    Attributes:
      pages: per layer, [num_pages, PAGE_SIZE, num_kv_heads, HEAD_DIM]. A buffer per layer, because
        a scan over one stacked buffer would copy it.
      block_table: int32[batch, max_pages_per_seq]; -1 beyond a sequence's pages.
      cache_seqlens: int32[batch], tokens in each sequence, those of the last `allocate` included.
      free_pages: int32[num_pages], a stack: its first `num_free` entries are the free pages.
      num_free: int32[].
      num_new: int32[batch], tokens that the last `allocate` made room for.
    """

    pages: tuple[jax.Array, ...]
    block_table: jax.Array
    cache_seqlens: jax.Array
    free_pages: jax.Array
    num_free: jax.Array
    num_new: jax.Array

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        num_pages: int,
        batch: int,
        max_pages_per_seq: int,
        dtype: Any = jnp.bfloat16,
        num_kv_heads: int = 1,
    ) -> PagedKVCache:
        """An empty cache.

        Under `jax.eval_shape` with symbolic sizes, what `jax.export` takes in its place.

        Args:
          num_layers: layers that keep tokens; each has its own pool.
          num_pages: pages in a pool, shared by all sequences.
          batch: sequences.
          max_pages_per_seq: pages that one sequence can hold.
          dtype: bfloat16, float16 or, on CPU, float32.
          num_kv_heads: KV heads per token; 1 for the DeepSeek models.

        Raises:
          ValueError: for a size below 1 (below 0 for `batch`), another dtype, or a sequence that
            int32 cannot count.
        """
        sizes = {
            "num_layers": num_layers,
            "num_pages": num_pages,
            "max_pages_per_seq": max_pages_per_seq,
            "num_kv_heads": num_kv_heads,
        }
        for name, size in sizes.items():
            if fewer(size, 1):
                raise ValueError(f"{name} must be at least 1, got {size}")
        if fewer(batch, 0):
            raise ValueError(f"batch must not be negative, got {batch}")
        if not is_symbolic_dim(max_pages_per_seq) and max_pages_per_seq * PAGE_SIZE > _INT32_MAX:
            raise ValueError(
                f"a sequence of {max_pages_per_seq=} pages of {PAGE_SIZE} tokens is longer than "
                "int32 can count"
            )
        if jnp.dtype(dtype) not in DTYPES:
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {jnp.dtype(dtype)}")
        shape = (num_pages, PAGE_SIZE, num_kv_heads, HEAD_DIM)
        return cls(
            pages=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
            block_table=jnp.full((batch, max_pages_per_seq), -1, jnp.int32),
            cache_seqlens=jnp.zeros(batch, jnp.int32),
            # Reversed, so that page 0 is on top of the stack and is taken first.
            free_pages=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
            num_free=jnp.int32(num_pages),
            num_new=jnp.zeros(batch, jnp.int32),
        )

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.pages)

    @property
    def num_pages(self) -> int:
        """Pages in the pool of each layer."""
        return self.free_pages.shape[-1]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return PAGE_SIZE

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.block_table.shape[-2]

    @property
    def max_pages_per_seq(self) -> int:
        """Pages that one sequence can hold."""
        return self.block_table.shape[-1]

    @property
    def max_seqlen(self) -> int:
        """Tokens that one sequence can hold, pool permitting."""
        return self.max_pages_per_seq * PAGE_SIZE

    @property
    def num_kv_heads(self) -> int:
        """KV heads per token."""
        return self.pages[0].shape[-2]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the cached tokens."""
        return self.pages[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the pools of all layers."""
        return sum(pool.size * pool.dtype.itemsize for pool in self.pages)

    @property
    def num_used(self) -> jax.Array:
        """int32[]: pages that sequences own."""
        return self.num_pages - self.num_free

    @property
    def usage(self) -> jax.Array:
        """float32[]: the share of the pool that sequences own, from 0 to 1."""
        return self.num_used / jnp.float32(self.num_pages)

    def allocate(self, num_tokens: jax.typing.ArrayLike) -> tuple[PagedKVCache, jax.Array]:
        """Makes room for new tokens: takes pages from the free list and advances the lengths.

        All or nothing: when the pool has too few pages for all sequences together, when a sequence
        would outgrow its row of the block table, or when a number is negative, nothing is taken,
        no length changes, `num_new` is 0 (so `append` writes nothing), and `ok` is False.

        Args:
          num_tokens: int32[batch], new tokens of each sequence; 0 leaves a sequence as it is.

        Returns:
          The cache, and ok bool[].
        """
        num_tokens = jnp.asarray(num_tokens)
        if num_tokens.shape != self.cache_seqlens.shape:
            raise ValueError(
                f"num_tokens must have shape [batch] = {self.cache_seqlens.shape}, "
                f"got {num_tokens.shape}"
            )
        if not jnp.issubdtype(num_tokens.dtype, jnp.integer):
            raise ValueError(f"num_tokens must be integers, got {num_tokens.dtype}")
        *books, ok = self._on_books(_allocate, num_tokens, self.num_free)
        return self._with(books), ok

    def append(self, layer: int, kv: jax.Array, *, cuda_graph: bool = True) -> PagedKVCache:
        """Writes one layer's new tokens into the room that the last `allocate` made.

        Row `j < num_new[i]` of `kv[i]` becomes token `cache_seqlens[i] - num_new[i] + j`. Rows
        from `num_new[i]` on are padding and are not written.

        Args:
          layer: which layer, a Python int.
          kv: [batch, s, num_kv_heads, HEAD_DIM] in the cache's dtype, with `s >= max(num_new)`.
          cuda_graph: see `flash_mla_with_kvcache`.

        Returns:
          The cache with this layer's pool updated.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")
        pool = cache_append(
            self.pages[layer],
            kv,
            self.block_table,
            self.cache_seqlens - self.num_new,
            self.num_new,
            cuda_graph=cuda_graph,
        )
        pages = (*self.pages[:layer], pool, *self.pages[layer + 1 :])
        return dataclasses.replace(self, pages=pages)

    def free(self, mask: jax.typing.ArrayLike) -> PagedKVCache:
        """Empties sequences and gives their pages back to the pool.

        Args:
          mask: bool[batch], the sequences to empty.

        Returns:
          The cache, in which they have length 0.
        """
        mask = jnp.asarray(mask)
        if mask.shape != self.cache_seqlens.shape or mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask must be bool[batch] = bool{list(self.cache_seqlens.shape)}, "
                f"got {mask.dtype}{list(mask.shape)}"
            )
        return self._with(self._on_books(_free, mask))

    def _on_books(
        self, function: Callable[..., list[jax.Array]], argument: jax.Array, *like: jax.Array
    ) -> list[jax.Array]:
        """Applies a function to the arrays of integers, which come back sharded as they were.

        Pages are counted over all sequences: on explicit meshes the sums over sharded ones are
        left to XLA. What else it returns is sharded as `like`.
        """
        books = [getattr(self, name) for name in _BOOKS]
        return _sharding.auto(function, [*books, *like])(argument, *books)

    def _with(self, books: Sequence[jax.Array]) -> PagedKVCache:
        changes: dict[str, Any] = dict(zip(_BOOKS, books, strict=True))
        return dataclasses.replace(self, **changes)


# --- Bookkeeping -----------------------------------------------------------------------------

_BOOKS = ("block_table", "cache_seqlens", "free_pages", "num_free", "num_new")


def _allocate(
    num_tokens: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    free_pages: jax.Array,
    num_free: jax.Array,
    num_new: jax.Array,
) -> list[jax.Array]:
    """The arrays after `PagedKVCache.allocate`, and ok."""
    del num_new
    max_pages = block_table.shape[1]
    # Compared before it is added: a length plus any int32 may overflow.
    fits = (num_tokens >= 0) & (num_tokens <= max_pages * PAGE_SIZE - cache_seqlens)
    added = jnp.where(fits, num_tokens, 0).astype(jnp.int32)
    seqlens = cache_seqlens + added

    owned, needed = _num_pages_of(cache_seqlens), _num_pages_of(seqlens)
    taken = needed - owned
    total = jnp.sum(taken, dtype=jnp.int32)
    ok = jnp.all(fits) & (total <= num_free)

    # The pages come off the top of the stack, the first sequence's first.
    slot = jnp.arange(max_pages, dtype=jnp.int32)
    rank = (jnp.cumsum(taken, dtype=jnp.int32) - taken - owned)[:, None] + slot
    page = free_pages.at[num_free - 1 - rank].get(mode="clip")
    is_new = (slot >= owned[:, None]) & (slot < needed[:, None])
    return [
        jnp.where(ok & is_new, page, block_table),
        jnp.where(ok, seqlens, cache_seqlens),
        free_pages,
        jnp.where(ok, num_free - total, num_free),
        jnp.where(ok, added, 0),
        ok,
    ]


def _free(
    mask: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    free_pages: jax.Array,
    num_free: jax.Array,
    num_new: jax.Array,
) -> list[jax.Array]:
    """The arrays after `PagedKVCache.free`."""
    slot = jnp.arange(block_table.shape[1], dtype=jnp.int32)
    returned = mask[:, None] & (slot < _num_pages_of(cache_seqlens)[:, None])
    returned = returned.ravel()
    # The returned pages go on top of the stack, in table order; the others nowhere.
    rank = num_free + jnp.cumsum(returned, dtype=jnp.int32) - 1
    rank = jnp.where(returned, rank, free_pages.shape[0])
    return [
        jnp.where(mask[:, None], -1, block_table),
        jnp.where(mask, 0, cache_seqlens),
        free_pages.at[rank].set(block_table.ravel(), mode="drop"),
        num_free + jnp.sum(returned, dtype=jnp.int32),
        jnp.where(mask, 0, num_new),
    ]


# --- Exported programs -----------------------------------------------------------------------

# What a serialised program says of a cache in its signature: the fields, in the order of its
# arguments. JAX knows arguments by their order alone, so with others they would be mixed up.
_FIELDS = " ".join(field.name for field in dataclasses.fields(PagedKVCache))


def _check_fields(data: bytes | bytearray) -> tuple[()]:
    if bytes(data).decode() != _FIELDS:
        raise ValueError(
            f"the program was exported with a PagedKVCache of the fields {bytes(data).decode()!r}, "
            f"and this one has {_FIELDS!r}: export it again"
        )
    return ()  # no field is static


register_pytree_node_serialization(
    PagedKVCache,
    serialized_name="flashmla_jax.PagedKVCache",
    serialize_auxdata=lambda _: _FIELDS.encode(),
    deserialize_auxdata=_check_fields,
)


# --- Pages -----------------------------------------------------------------------------------


def _num_pages_of(seqlens: jax.Array) -> jax.Array:
    return (seqlens + (PAGE_SIZE - 1)) // PAGE_SIZE
