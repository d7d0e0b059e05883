"""The paged KV cache: a pool of pages per layer, and a block table that all layers share.

A decoding step, inside one `jax.jit` that donates the cache:

    cache, ok = cache.allocate(num_tokens)      # once: pages are taken, lengths advance
    for layer in range(num_layers):
        cache = cache.append(layer, kv)         # the new tokens of this layer, written in place
        out, lse = flash_mla_with_kvcache(q, cache.pages[layer], cache.block_table,
                                          cache.cache_seqlens)

Everything that changes from step to step is an array, so one compiled program serves a whole
generation: sequences grow, fork, shrink and end without recompilation.

Pages are counted. A page that several sequences hold (`fork`, `adopt`) is not written by any of
them: who appends to it gets a page of its own, into which `append` copies what was there before.

A loop over layers inside the program (`lax.scan`) carries a cache with one pool for all layers:

    cache = PagedKVCache.create(..., one_pool=True)

    def body(cache, layer):                     # an array, int32[]
        cache = cache.append(layer, kv)
        view = cache.at_layer(layer)            # the pool, and page numbers in it
        out, lse = flash_mla_with_kvcache(q, view.pages[0], view.block_table, view.cache_seqlens)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim, register_pytree_node_serialization

from flashmla_jax._checks import fewer
from flashmla_jax.cache import index_keys, layout
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
      pages: per layer, [num_pages, PAGE_SIZE, num_kv_heads, HEAD_DIM]: buffers of their own,
        because a scan over one stacked buffer would copy it. Or one for all layers, for a scan to
        carry: [num_layers * num_pages, ...], of which those from `layer * num_pages` on are layer
        `layer`'s. The last axis of an FP8 cache has a token's bytes, uint8[..., 656].
      block_table: int32[batch, max_pages_per_seq]; -1 beyond a sequence's pages.
      cache_seqlens: int32[batch], tokens in each sequence, those of the last `allocate` included.
      page_refs: int32[num_pages]: how many sequences hold a page, and one more if it is retained.
        A page that nobody holds is free.
      retained: bool[num_pages], pages that are kept when no sequence holds them.
      num_new: int32[batch], tokens that the last `allocate` made room for.
      copy_from: int32[batch], the page whose tokens come before the new ones in theirs, from which
        `append` copies them; -1 if they are there already.
      high_water: int32[], the most pages that were ever in use.
      index_pages: per layer, [num_pages, PAGE_SIZE, 1, index_head_dim]: the keys by which indexers
        choose tokens (DeepSeek sparse attention), in the same places as these; or one for all
        layers, as `pages` are. In FP8, uint8[..., index_head_dim + 16], see `cache.index_keys`.
        Empty for models without.
    """

    pages: tuple[jax.Array, ...]
    block_table: jax.Array
    cache_seqlens: jax.Array
    page_refs: jax.Array
    retained: jax.Array
    num_new: jax.Array
    copy_from: jax.Array
    high_water: jax.Array
    index_pages: tuple[jax.Array, ...] = ()

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
        one_pool: bool = False,
        index_head_dim: int = 0,
        index_dtype: Any = None,
    ) -> PagedKVCache:
        """An empty cache.

        Under `jax.eval_shape` with symbolic sizes, what `jax.export` takes in its place.

        Args:
          num_layers: layers that keep tokens.
          num_pages: pages of each layer, shared by all sequences.
          batch: sequences.
          max_pages_per_seq: pages that one sequence can hold.
          dtype: bfloat16, float16 or, on CPU, float32; or "fp8", for tokens of 656 bytes
            (`layout.FP8`), which are bfloat16 to who appends and gathers them.
          num_kv_heads: KV heads per token; 1 for the DeepSeek models.
          one_pool: whether all layers' pages are in one array, so that `layer` may be an array in
            `append`, `at_layer` and `gather`. By default each layer has its own.
          index_head_dim: numbers of an indexer's key; 0 for models without.
          index_dtype: of these keys, see `cache.index_keys`; as `dtype` by default.

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
        for name, size in {"batch": batch, "index_head_dim": index_head_dim}.items():
            if fewer(size, 0):
                raise ValueError(f"{name} must not be negative, got {size}")
        if not is_symbolic_dim(max_pages_per_seq) and max_pages_per_seq * PAGE_SIZE > _INT32_MAX:
            raise ValueError(
                f"a sequence of {max_pages_per_seq=} pages of {PAGE_SIZE} tokens is longer than "
                "int32 can count"
            )
        is_fp8 = isinstance(dtype, str) and dtype == "fp8"
        if not is_fp8 and jnp.dtype(dtype) not in DTYPES:
            raise ValueError(
                f'dtype must be bfloat16, float16, float32 or "fp8", got {jnp.dtype(dtype)}'
            )
        pools, per_pool = (1, num_layers) if one_pool else (num_layers, 1)
        token = layout.FP8.token_bytes if is_fp8 else HEAD_DIM
        shape = (per_pool * num_pages, PAGE_SIZE, num_kv_heads, token)
        index_shape = (per_pool * num_pages, PAGE_SIZE, 1)
        index_dtype = dtype if index_dtype is None else index_dtype
        return cls(
            pages=tuple(jnp.zeros(shape, jnp.uint8 if is_fp8 else dtype) for _ in range(pools)),
            block_table=jnp.full((batch, max_pages_per_seq), -1, jnp.int32),
            cache_seqlens=jnp.zeros(batch, jnp.int32),
            page_refs=jnp.zeros(num_pages, jnp.int32),
            retained=jnp.zeros(num_pages, jnp.bool_),
            num_new=jnp.zeros(batch, jnp.int32),
            copy_from=jnp.full(batch, -1, jnp.int32),
            high_water=jnp.int32(0),
            index_pages=tuple(
                index_keys.zeros(index_shape, index_head_dim, index_dtype)
                for _ in range(pools if index_head_dim else 0)
            ),
        )

    @property
    def num_layers(self) -> int:
        """Layers."""
        return sum(pool.shape[-4] // self.num_pages for pool in self.pages)

    @property
    def num_pages(self) -> int:
        """Pages of each layer."""
        return self.page_refs.shape[-1]

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
        """The dtype of tokens that are appended and gathered; of FP8 caches, bfloat16."""
        return jnp.dtype(jnp.bfloat16) if self.is_fp8 else self.pages[0].dtype

    @property
    def is_fp8(self) -> bool:
        """Whether tokens lie in FP8 pages: `is_fp8_kvcache` of `flash_mla_with_kvcache`."""
        return self.pages[0].dtype == jnp.uint8

    @property
    def nbytes(self) -> int:
        """Bytes of the pools of all layers."""
        pools = self.pages + self.index_pages
        return sum(pool.size * pool.dtype.itemsize for pool in pools)

    @property
    def index_head_dim(self) -> int:
        """Numbers of an indexer's key; 0 if the cache has none."""
        return index_keys.head_dim_of(self.index_pages[0]) if self.index_pages else 0

    @property
    def num_used(self) -> jax.Array:
        """int32[]: pages that are not free."""
        return jnp.sum(self.page_refs > 0, dtype=jnp.int32)

    @property
    def num_free(self) -> jax.Array:
        """int32[]: pages that nobody holds."""
        return self.num_pages - self.num_used

    @property
    def usage(self) -> jax.Array:
        """float32[]: the share of the pool that is not free, from 0 to 1."""
        return self.num_used / jnp.float32(self.num_pages)

    def allocate(self, num_tokens: jax.typing.ArrayLike) -> tuple[PagedKVCache, jax.Array]:
        """Makes room for new tokens: takes pages that are free and advances the lengths.

        A sequence is refused when it would outgrow its row of the block table, when its number is
        negative, or when the pool has too few pages: those that need fewest get theirs first, in
        the batch's order among equals. What is refused stays as it is, has `num_new` 0 (so that
        `append` writes nothing), and False in `ok`.

        A sequence needs a page for every `PAGE_SIZE` tokens that its own do not hold, and one more
        if it shares the page that its first new token goes into.

        Args:
          num_tokens: int32[batch], new tokens of each sequence; 0 leaves a sequence as it is.

        Returns:
          The cache, and ok bool[batch].
        """
        num_tokens = self._per_sequence("num_tokens", num_tokens)
        return self._on_books(_allocate, num_tokens, refuses=True)

    def reserve(self, num_tokens: jax.typing.ArrayLike) -> tuple[PagedKVCache, jax.Array]:
        """Takes the pages that so many more tokens will need, and leaves the lengths alone.

        `allocate` finds them there; `truncate`, `free` and `fork` give them back. Refuses as
        `allocate` does.

        Args:
          num_tokens: int32[batch], beyond each sequence's length.

        Returns:
          The cache, and ok bool[batch].
        """
        num_tokens = self._per_sequence("num_tokens", num_tokens)
        return self._on_books(_reserve, num_tokens, refuses=True)

    def append(
        self, layer: int | jax.Array, kv: jax.Array, *, cuda_graph: bool = True
    ) -> PagedKVCache:
        """Writes one layer's new tokens into the room that the last `allocate` made.

        Row `j < num_new[i]` of `kv[i]` becomes token `cache_seqlens[i] - num_new[i] + j`. Rows
        from `num_new[i]` on are padding and are not written.

        Every layer has to append before the next `allocate`: that forgets which pages are still to
        be copied from, and may give them away.

        Args:
          layer: which layer, see `at_layer`.
          kv: [batch, s, num_kv_heads, HEAD_DIM] in the cache's dtype, with `s >= max(num_new)`:
            of a sequence with more new tokens than that, the others are what their pages hold,
            anything. An FP8 cache rounds them, with scales that are powers of two.
          cuda_graph: see `flash_mla_with_kvcache`.

        Returns:
          The cache with this layer's pool updated.
        """
        view = self.at_layer(layer)
        if self.is_fp8:
            if kv.dtype != self.dtype:
                raise ValueError(f"kv must be {self.dtype} for an FP8 cache, got {kv.dtype}")
            kv = layout.quantize(kv)
        pool = cache_append(
            view.pages[0],
            kv,
            view.block_table,
            view.cache_seqlens - view.num_new,
            view.num_new,
            view.copy_from,
            cuda_graph=cuda_graph,
        )
        return self._with_pool(layer, pool)

    def append_index(
        self, layer: int | jax.Array, keys: jax.Array, *, cuda_graph: bool = True
    ) -> PagedKVCache:
        """Writes one layer's new index keys, as `append` writes its tokens; besides it.

        Args:
          layer: which layer, see `at_layer`.
          keys: [batch, s, index_head_dim], with `s >= max(num_new)`; they are rounded to what the
            pool holds.
          cuda_graph: see `flash_mla_with_kvcache`.

        Returns:
          The cache with this layer's pool of index keys updated.

        Raises:
          ValueError: for keys that the cache has no place for.
        """
        batch, index_head_dim = self.batch, self.index_head_dim
        wanted = (batch, index_head_dim)
        if not self.index_pages or keys.ndim != 3 or (keys.shape[0], keys.shape[2]) != wanted:
            raise ValueError(
                f"keys must be [batch, s, index_head_dim] with {batch=} and {index_head_dim=}, got "
                f"shape {keys.shape}"
            )
        view = self.at_layer(layer)
        pool = cache_append(
            view.index_pages[0],
            index_keys.pack(keys, view.index_pages[0].dtype)[:, :, None],
            view.block_table,
            view.cache_seqlens - view.num_new,
            view.num_new,
            view.copy_from,
            cuda_graph=cuda_graph,
        )
        return self._with_index_pool(layer, pool)

    def at_layer(self, layer: int | jax.Array) -> PagedKVCache:
        """What one layer reads: its pool alone, and tables with the numbers of its pages there.

        For attention to `view.pages[0]`, and to look at. Sequences are changed, and tokens
        appended, in the cache itself.

        Args:
          layer: which layer; int32[] is possible where one pool holds all.

        Returns:
          A cache that shares the arrays of this one. Of a cache with one pool it has all of that,
          and `block_table` and `copy_from` point to the layer's share.

        Raises:
          ValueError: there is no such layer, or it is an array and layers have their own pools.
        """
        if not isinstance(layer, jax.Array):
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")
        elif len(self.pages) > 1:
            raise ValueError(
                f"layer must be an int for a cache with a pool per layer, got {layer}: an array "
                "needs one pool for all layers (create(..., one_pool=True))"
            )
        if len(self.pages) > 1:
            index_pages = self.index_pages[layer : layer + 1]
            return dataclasses.replace(self, pages=(self.pages[layer],), index_pages=index_pages)
        if self.num_layers == 1:
            return self

        def shift(page: jax.Array) -> jax.Array:
            exists = (page >= 0) & (page < self.num_pages)
            return jnp.where(exists, page + layer * self.num_pages, -1).astype(jnp.int32)

        table, copy_from = shift(self.block_table), shift(self.copy_from)
        return dataclasses.replace(self, block_table=table, copy_from=copy_from)

    def truncate(self, seqlens: jax.typing.ArrayLike) -> PagedKVCache:
        """Forgets the last tokens of sequences, as when drafted tokens were wrong.

        Pages beyond the new length go back to the pool, reserved ones included.

        Args:
          seqlens: int32[batch], how many tokens each keeps. A sequence that has no more than that
            stays as it is; a negative number is 0.

        Returns:
          The cache.
        """
        return self._on_books(_truncate, self._per_sequence("seqlens", seqlens))

    def free(self, mask: jax.typing.ArrayLike) -> PagedKVCache:
        """Empties sequences; their pages that nobody else holds go back to the pool.

        Args:
          mask: bool[batch], the sequences to empty.

        Returns:
          The cache, in which they have length 0.
        """
        return self._on_books(_free, self._per_sequence("mask", mask, jnp.bool_))

    def fork(self, sources: jax.typing.ArrayLike) -> PagedKVCache:
        """Replaces sequences by copies of others, for parallel sampling and beam search.

        Takes no page and copies no token: both have the same pages until one of them appends to
        the last one. All are replaced at once, so `sources` may also be a permutation.

        Args:
          sources: int32[batch]: sequence i becomes what sequence `sources[i]` was. Its own number,
            or none of a sequence (-1), leaves it as it is.

        Returns:
          The cache.
        """
        return self._on_books(_fork, self._per_sequence("sources", sources))

    def adopt(
        self, mask: jax.typing.ArrayLike, pages: jax.typing.ArrayLike, seqlens: jax.typing.ArrayLike
    ) -> tuple[PagedKVCache, jax.Array]:
        """Replaces sequences by tokens that are cached already, as those of a known prefix.

        Refuses a sequence whose length is negative or more than `pages` can hold, or of which a
        page comes twice, or has no tokens to share: it is neither retained nor another sequence's,
        or only reserved by that. What is refused stays as it is.

        Args:
          mask: bool[batch], the sequences to replace.
          pages: int32[batch, any], the pages of each in order; entries beyond its length are not
            looked at.
          seqlens: int32[batch], their tokens.

        Returns:
          The cache, and ok bool[batch], which is True for sequences outside `mask`.
        """
        mask = self._per_sequence("mask", mask, jnp.bool_)
        seqlens = self._per_sequence("seqlens", seqlens)
        pages = jnp.asarray(pages)
        shape = self.block_table.shape
        if pages.ndim != 2 or pages.shape[0] != shape[0] or pages.shape[1] > shape[1]:
            raise ValueError(
                f"pages must have shape [batch, n] with batch={shape[0]} and n at most "
                f"max_pages_per_seq={shape[1]}, got {pages.shape}"
            )
        _check_integers("pages", pages)
        return self._on_books(_adopt, mask, pages, seqlens, refuses=True)

    def retain(self, pages: jax.typing.ArrayLike) -> PagedKVCache:
        """Keeps pages from being free when no sequence holds them any more.

        Args:
          pages: int32[any]. Pages without tokens, or not of the pool (-1), are passed over.

        Returns:
          The cache.
        """
        return self._on_books(_retain, self._list_of_pages(pages))

    def release(self, pages: jax.typing.ArrayLike) -> PagedKVCache:
        """The reverse of `retain`: pages that no sequence holds go back to the pool.

        Args:
          pages: int32[any]. Pages that are not retained are passed over.

        Returns:
          The cache.
        """
        return self._on_books(_release, self._list_of_pages(pages))

    def gather(self, layer: int | jax.Array, max_seqlen: int | None = None) -> jax.Array:
        """One layer's tokens in a dense array, in which those beyond a sequence's length are 0.

        Args:
          layer: which layer, see `at_layer`.
          max_seqlen: how many tokens of each sequence; by default as many as it can have.

        Returns:
          [batch, max_seqlen, num_kv_heads, HEAD_DIM] in the cache's dtype.
        """
        view = self.at_layer(layer)
        pool = view.pages[0]
        if max_seqlen is None:
            max_seqlen = self.max_seqlen
        if fewer(max_seqlen, 0):
            raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")
        position = jnp.arange(max_seqlen, dtype=jnp.int32)
        # Pages that are not there are out of bounds on either side, and filled.
        page = view.block_table.at[:, position // PAGE_SIZE].get(mode="fill", fill_value=-1)
        exists = (position < view.cache_seqlens[:, None]) & (page >= 0)
        page = jnp.where(exists, page, pool.shape[0])
        tokens = pool.at[page, position % PAGE_SIZE].get(
            mode="fill",
            fill_value=0,
            out_sharding=_sharding.of_axes((page, 0), None, (pool, 2), None),
        )
        return layout.dequantize(tokens) if self.is_fp8 else tokens

    def stats(self) -> CacheStats:
        """Counts of pages and tokens, as arrays."""
        owned, needed = _num_owned(self), _num_pages_of(self.cache_seqlens)
        used = self.num_used
        return CacheStats(
            num_pages=jnp.int32(self.num_pages),
            used=used,
            free=self.num_pages - used,
            shared=jnp.sum(self.page_refs > 1, dtype=jnp.int32),
            reserved=jnp.sum(owned - needed, dtype=jnp.int32),
            retained=jnp.sum(self.retained, dtype=jnp.int32),
            high_water=self.high_water,
            num_tokens=jnp.sum(self.cache_seqlens, dtype=jnp.int32),
        )

    def check(self) -> None:
        """Raises a `RuntimeError` that says which of its invariants the cache breaks, if any.

        For debugging, outside `jit`: the arrays of integers are read on the host.
        """
        books = dataclasses.replace(self, pages=(), index_pages=())
        broken = _broken_invariants(jax.device_get(books))
        if broken:
            raise RuntimeError("the cache is corrupt: " + "; ".join(broken))

    def _with_pool(self, layer: int | jax.Array, pool: jax.Array) -> PagedKVCache:
        """The cache with `pool` in place of `at_layer(layer).pages[0]`."""
        return dataclasses.replace(self, pages=_replaced(self.pages, layer, pool))

    def _with_index_pool(self, layer: int | jax.Array, pool: jax.Array) -> PagedKVCache:
        """The cache with `pool` in place of `at_layer(layer).index_pages[0]`."""
        index_pages = _replaced(self.index_pages, layer, pool)
        return dataclasses.replace(self, index_pages=index_pages)

    def _per_sequence(
        self, name: str, value: jax.typing.ArrayLike, dtype: Any = jnp.integer
    ) -> jax.Array:
        """`value` as an array, if it has an element of that kind per sequence."""
        value = jnp.asarray(value)
        if value.shape != self.cache_seqlens.shape:
            raise ValueError(
                f"{name} must have shape [batch] = {self.cache_seqlens.shape}, got {value.shape}"
            )
        if dtype == jnp.bool_:
            if value.dtype != jnp.bool_:
                raise ValueError(f"{name} must be bool, got {value.dtype}")
            return value
        return _check_integers(name, value)

    def _list_of_pages(self, pages: jax.typing.ArrayLike) -> jax.Array:
        pages = jnp.asarray(pages)
        if pages.ndim != 1:
            raise ValueError(f"pages must have one axis, got shape {pages.shape}")
        return _check_integers("pages", pages)

    def _on_books(
        self, function: Callable[..., Any], *arguments: jax.Array, refuses: bool = False
    ) -> Any:
        """Applies a function to the cache without its pools, which comes back sharded as it was.

        Pages are counted over all sequences: on explicit meshes the sums over sharded ones are
        left to XLA. A function that refuses also returns a bool[batch].
        """
        books = dataclasses.replace(self, pages=(), index_pages=())
        like = (books, self.num_new) if refuses else (books,)

        def apply(*args: Any) -> Any:
            results = function(*args)
            # XLA for GPUs, of jax 0.11, cannot compile the books of one sequence as a part of a
            # product that uses them.
            return jax.lax.optimization_barrier(results if refuses else (results,))

        changed, *ok = _sharding.auto(apply, like)(books, *arguments)
        changed = dataclasses.replace(changed, pages=self.pages, index_pages=self.index_pages)
        return (changed, *ok) if refuses else changed


def _replaced(
    pools: tuple[jax.Array, ...], layer: int | jax.Array, pool: jax.Array
) -> tuple[jax.Array, ...]:
    """The pools with `pool` in place of a layer's, or of the one for all layers."""
    number = 0 if len(pools) == 1 else int(layer)
    return (*pools[:number], pool, *pools[number + 1 :])


class CacheStats(NamedTuple):
    """Counts of a `PagedKVCache`, int32[] each."""

    num_pages: jax.Array
    """Pages in the pool."""
    used: jax.Array
    """Pages that a sequence holds or that are retained."""
    free: jax.Array
    """The others."""
    shared: jax.Array
    """Pages with more than one holder."""
    reserved: jax.Array
    """Pages of sequences that hold no token yet."""
    retained: jax.Array
    """Pages that stay when no sequence holds them."""
    high_water: jax.Array
    """The most pages that were ever used."""
    num_tokens: jax.Array
    """Tokens of all sequences together; shared ones count in each."""


# --- Bookkeeping -----------------------------------------------------------------------------
#
# Functions of a cache without its pools. Each takes work in proportion to the pages and to the
# block table, whatever the sequences do.


def _allocate(books: PagedKVCache, num_tokens: jax.Array) -> tuple[PagedKVCache, jax.Array]:
    seqlens, table = books.cache_seqlens, books.block_table
    fits = _fits(books, num_tokens)
    added = jnp.where(fits, num_tokens, 0).astype(jnp.int32)
    tail_slot = seqlens // PAGE_SIZE
    tail = jnp.take_along_axis(table, tail_slot[:, None], axis=1, mode="clip")[:, 0]
    shared = books.page_refs.at[tail].get(mode="clip") > 1
    copies = (added > 0) & (seqlens % PAGE_SIZE > 0) & shared

    books, granted, pages = _take_pages(books, fits, seqlens + added, copies)
    copies &= granted
    added = jnp.where(granted, added, 0)
    # The page that was shared makes way for the first of the new ones.
    is_tail = copies[:, None] & (_slots(table) == tail_slot[:, None])
    return dataclasses.replace(
        books,
        block_table=jnp.where(is_tail, pages[:, None], books.block_table),
        page_refs=books.page_refs.at[_or_none(copies, tail, books)].add(-1, mode="drop"),
        cache_seqlens=seqlens + added,
        num_new=added,
        copy_from=jnp.where(copies, tail, -1),
    ), granted


def _reserve(books: PagedKVCache, num_tokens: jax.Array) -> tuple[PagedKVCache, jax.Array]:
    fits = _fits(books, num_tokens)
    added = jnp.where(fits, num_tokens, 0).astype(jnp.int32)
    nothing = jnp.zeros_like(fits)
    books, granted, _ = _take_pages(books, fits, books.cache_seqlens + added, nothing)
    return books, granted


def _fits(books: PagedKVCache, num_tokens: jax.Array) -> jax.Array:
    """bool[batch]: whether a number of new tokens is one, and has a place in the block table."""
    # Compared before it is added: a length plus any int32 may overflow.
    room = books.block_table.shape[1] * PAGE_SIZE - books.cache_seqlens
    return (num_tokens >= 0) & (num_tokens <= room)


def _take_pages(
    books: PagedKVCache, fits: jax.Array, seqlens: jax.Array, copies: jax.Array
) -> tuple[PagedKVCache, jax.Array, jax.Array]:
    """Gives sequences the pages for `seqlens` tokens in all, and one more where `copies`.

    Returns the cache, which sequences got theirs bool[batch], and the one more int32[batch].
    """
    num_pages = books.num_pages
    owned, needed = _num_owned(books), _num_pages_of(seqlens)
    growth = jnp.maximum(needed - owned, 0)
    is_free = books.page_refs == 0
    number = jnp.cumsum(is_free, dtype=jnp.int32) - 1  # of a page among those that are free
    num_free = number[-1] + 1

    # The least wish first. One beyond the pool is as good as any, and their sum no overflow.
    wishes = jnp.minimum(growth + copies, num_pages + 1)
    order = jnp.argsort(wishes, stable=True)
    within = jnp.cumsum(wishes[order], dtype=jnp.int32) <= num_free
    granted = fits & jnp.zeros_like(fits).at[order].set(within)
    taken = jnp.where(granted, wishes, 0)
    total = jnp.sum(taken, dtype=jnp.int32)

    free_page = jnp.zeros(num_pages, jnp.int32)
    free_page = free_page.at[jnp.where(is_free, number, num_pages)].set(
        jnp.arange(num_pages, dtype=jnp.int32), mode="drop"
    )
    first = jnp.cumsum(taken, dtype=jnp.int32) - taken
    slot = _slots(books.block_table)
    is_new = granted[:, None] & (slot >= owned[:, None]) & (slot < needed[:, None])
    rank = (first + copies - owned)[:, None] + slot
    page = free_page.at[rank].get(mode="clip")
    return (
        dataclasses.replace(
            books,
            block_table=jnp.where(is_new, page, books.block_table),
            page_refs=jnp.where(is_free & (number < total), 1, books.page_refs),
            high_water=jnp.maximum(books.high_water, num_pages - num_free + total),
        ),
        granted,
        free_page.at[first].get(mode="clip"),
    )


def _truncate(books: PagedKVCache, seqlens: jax.Array) -> PagedKVCache:
    kept = jnp.clip(seqlens, 0, _INT32_MAX).astype(jnp.int32)
    shorter = kept < books.cache_seqlens
    kept = jnp.where(shorter, kept, books.cache_seqlens)
    dropped = shorter[:, None] & (_slots(books.block_table) >= _num_pages_of(kept)[:, None])
    return _replace_rows(books, shorter, jnp.where(dropped, -1, books.block_table), kept)


def _free(books: PagedKVCache, mask: jax.Array) -> PagedKVCache:
    return _replace_rows(books, mask, jnp.int32(-1), jnp.int32(0))


def _fork(books: PagedKVCache, sources: jax.Array) -> PagedKVCache:
    batch = sources.shape[0]
    itself = jnp.arange(batch, dtype=jnp.int32)
    copied = (sources >= 0) & (sources < batch) & (sources != itself)
    sources = jnp.where(copied, sources, itself)
    seqlens = books.cache_seqlens[sources]
    holds = _slots(books.block_table) < _num_pages_of(seqlens)[:, None]
    return _replace_rows(books, copied, jnp.where(holds, books.block_table[sources], -1), seqlens)


def _adopt(
    books: PagedKVCache, mask: jax.Array, pages: jax.Array, seqlens: jax.Array
) -> tuple[PagedKVCache, jax.Array]:
    most = pages.shape[1] * PAGE_SIZE
    fits = (seqlens >= 0) & (seqlens <= most)
    seqlens = jnp.clip(seqlens, 0, most).astype(jnp.int32)
    holds = _slots(pages) < _num_pages_of(seqlens)[:, None]
    in_pool = (pages >= 0) & (pages < books.num_pages)
    has_tokens = in_pool & _with_tokens(books).at[jnp.where(in_pool, pages, 0)].get(mode="clip")
    # Sorted, a page that comes twice stands beside itself; what is not held is beyond the pool.
    ordered = jnp.sort(jnp.where(holds & in_pool, pages, books.num_pages), axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < books.num_pages)
    ok = fits & jnp.all(has_tokens | ~holds, axis=1) & ~jnp.any(twice, axis=1)
    rows = jnp.full_like(books.block_table, -1)
    rows = rows.at[:, : pages.shape[1]].set(jnp.where(holds, pages, -1).astype(jnp.int32))
    return _replace_rows(books, mask & ok, rows, seqlens), ok | ~mask


def _replace_rows(
    books: PagedKVCache, mask: jax.Array, rows: jax.Array, seqlens: jax.Array
) -> PagedKVCache:
    """Gives some sequences other pages and lengths, and counts who holds what."""
    table = jnp.where(mask[:, None], rows, books.block_table)
    changed = table != books.block_table
    refs = books.page_refs
    for pages, change in ((table, 1), (books.block_table, -1)):
        refs = refs.at[_or_none(changed & (pages >= 0), pages, books)].add(change, mode="drop")
    return dataclasses.replace(
        books,
        block_table=table,
        cache_seqlens=jnp.where(mask, seqlens, books.cache_seqlens),
        page_refs=refs,
        num_new=jnp.where(mask, 0, books.num_new),
        copy_from=jnp.where(mask, -1, books.copy_from),
    )


def _retain(books: PagedKVCache, pages: jax.Array) -> PagedKVCache:
    retained = books.retained | (_among(pages, books) & _with_tokens(books))
    return _with_retained(books, retained)


def _release(books: PagedKVCache, pages: jax.Array) -> PagedKVCache:
    return _with_retained(books, books.retained & ~_among(pages, books))


def _with_retained(books: PagedKVCache, retained: jax.Array) -> PagedKVCache:
    change = retained.astype(jnp.int32) - books.retained.astype(jnp.int32)
    return dataclasses.replace(books, retained=retained, page_refs=books.page_refs + change)


def _among(pages: jax.Array, books: PagedKVCache) -> jax.Array:
    """bool[num_pages]: which of all pages are listed."""
    listed = jnp.zeros(books.num_pages, jnp.bool_)
    return listed.at[_or_none(pages >= 0, pages, books)].set(True, mode="drop")


def _with_tokens(books: PagedKVCache) -> jax.Array:
    """bool[num_pages]: which pages are retained or hold a sequence's tokens."""
    table = books.block_table
    filled = (table >= 0) & (_slots(table) < _num_pages_of(books.cache_seqlens)[:, None])
    return books.retained.at[_or_none(filled, table, books)].set(True, mode="drop")


def _or_none(mask: jax.Array, pages: jax.Array, books: PagedKVCache) -> jax.Array:
    """Pages, or one past the pool; a negative one would count from its end."""
    return jnp.where(mask, pages, books.num_pages)


def _num_owned(books: PagedKVCache) -> jax.Array:
    """int32[batch]: pages of each sequence, which fill its row of the table from the left."""
    return jnp.sum(books.block_table >= 0, axis=1, dtype=jnp.int32)


def _num_pages_of(seqlens: jax.Array) -> jax.Array:
    return seqlens // PAGE_SIZE + (seqlens % PAGE_SIZE > 0)


def _slots(table: jax.Array) -> jax.Array:
    return jnp.arange(table.shape[1], dtype=jnp.int32)


def _check_integers(name: str, value: jax.Array) -> jax.Array:
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {value.dtype}")
    return value


def _broken_invariants(books: PagedKVCache) -> list[str]:
    """What is wrong with a cache, whose arrays are on the host."""
    table, seqlens, num_pages = books.block_table, books.cache_seqlens, books.num_pages
    held = table >= 0
    owned, needed = held.sum(1), -(-seqlens // PAGE_SIZE)
    slot = np.arange(table.shape[1])
    broken = []

    def expect(holds: Any, what: str, where: str = "sequences") -> None:
        if not np.all(holds):
            at = np.flatnonzero(np.logical_not(holds)).tolist()
            broken.append(f"{what} ({where} {at})" if np.ndim(holds) else what)

    expect((held == (slot < owned[:, None])).all(1), "pages are not on the left of the block table")
    expect((table < num_pages).all(1), "pages are not of the pool")
    expect((seqlens >= 0) & (seqlens <= owned * PAGE_SIZE), "lengths are beyond the pages")
    expect((books.num_new >= 0) & (books.num_new <= seqlens), "num_new is beyond the lengths")
    expect((books.copy_from >= -1) & (books.copy_from < num_pages), "copy_from is not of the pool")
    in_pool = held & (table < num_pages)
    refs = np.bincount(table[in_pool], minlength=num_pages)
    expect(
        [len(set(row[own])) == own.sum() for row, own in zip(table, in_pool, strict=True)],
        "sequences hold a page twice",
    )
    expect(books.page_refs == refs + books.retained, "pages are miscounted", "pages")
    reserved = in_pool & (slot >= needed[:, None])
    private = books.page_refs[np.where(in_pool, table, 0)] == 1
    expect((private | ~reserved).all(1), "reserved pages are shared")
    expect(books.high_water >= (books.page_refs > 0).sum(), "high_water is below what is used")
    return broken


# --- Exported programs -----------------------------------------------------------------------

# What a serialised program says of a cache in its signature: the fields, in the order of its
# arguments. JAX knows arguments by their order alone, so with others they would be mixed up.
_FIELDS = " ".join(field.name for field in dataclasses.fields(PagedKVCache))


def _check_fields(data: bytes | bytearray) -> tuple[()]:
    # Programs from before there were index keys have none: the last field is empty.
    if bytes(data).decode() not in (_FIELDS, _FIELDS.removesuffix(" index_pages")):
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
    from_children=lambda _, children: PagedKVCache(*children),
)
