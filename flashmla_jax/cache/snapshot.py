"""Sequences of a `PagedKVCache` outside of it: in host memory, or in a file.

    saved = snapshot(cache, [3, 5])
    saved.save("sessions.npz")
    ...
    cache, ok = restore(cache, Snapshot.load("sessions.npz"), [0, 1])

The tokens come back bit for bit, in whatever pages are free then.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashmla_jax.cache.layout import DTYPES, PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.ops.cache_append import cache_append

_FORMAT = "flashmla_jax.cache.Snapshot 1"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The tokens of some sequences, on the host.

    Attributes:
      tokens: per sequence, [num_layers, seqlen, num_kv_heads, HEAD_DIM] in the cache's dtype; of
        FP8 caches, their bytes.
      index_keys: per sequence, [num_layers, seqlen, 1, any], as they lie in the pools of index
        keys, if the cache has them.
    """

    tokens: tuple[np.ndarray, ...]
    index_keys: tuple[np.ndarray, ...] = ()

    @property
    def seqlens(self) -> tuple[int, ...]:
        """Tokens in each sequence."""
        return tuple(x.shape[1] for x in self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens."""
        return sum(x.nbytes for x in self.tokens + self.index_keys)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file, which is there in whole or not at all: NumPy's `.npz`, of plain bytes."""
        path = Path(path)
        # NumPy's files know no bfloat16: the bytes are written, and beside them what they mean.
        arrays = {f"tokens_{i}": _bytes_of(x) for i, x in enumerate(self.tokens)}
        dtype = self.tokens[0].dtype.name if self.tokens else ""
        if self.index_keys:
            arrays["index_dtype"] = np.array(self.index_keys[0].dtype.name)
            arrays |= {f"index_keys_{i}": _bytes_of(x) for i, x in enumerate(self.index_keys)}
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                np.savez(file, format=np.array(_FORMAT), dtype=np.array(dtype), **arrays)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                file.close()
                Path(file.name).unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Reads a file that `save` has written.

        Raises:
          ValueError: it is no such file, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["format"]) != _FORMAT:
                    raise ValueError(f"{path} is of another format: {file['format']}")
                tokens = _read_arrays(file, "tokens", str(file["dtype"]))
                index_keys: tuple[np.ndarray, ...] = ()
                if "index_dtype" in file:
                    index_keys = _read_arrays(file, "index_keys", str(file["index_dtype"]))
                    if len(index_keys) != len(tokens):
                        raise ValueError("index keys are missing")
        except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not a snapshot of a cache: {error}") from error
        return cls(tokens, index_keys)


def _read_arrays(file: Mapping[str, np.ndarray], name: str, dtype: str) -> tuple[np.ndarray, ...]:
    """The arrays `name`_0, `name`_1, ... of a file, whose bytes are numbers of `dtype`."""
    count = sum(x.startswith(f"{name}_") for x in file)
    known = {x.name: x for x in map(jnp.dtype, (*DTYPES, jnp.uint8))}
    if count and dtype not in known:
        raise ValueError("its dtype is unknown")
    return tuple(file[f"{name}_{i}"].view(known[dtype]) for i in range(count))


def snapshot(cache: PagedKVCache, sequences: Sequence[int]) -> Snapshot:
    """Copies sequences to host memory; the cache stays as it is.

    Args:
      cache: outside `jit`.
      sequences: their numbers, in the batch.

    Raises:
      ValueError: a number is not one of the batch.
    """
    sequences = _checked(cache, sequences)
    seqlens = np.asarray(cache.cache_seqlens)
    tables = _block_tables(cache)

    def read(i: int, pools: Sequence[jax.Array]) -> np.ndarray:
        length = int(seqlens[i])
        own = np.empty((cache.num_layers, length, *pools[0].shape[2:]), pools[0].dtype)
        for layer, (table, pool) in enumerate(zip(tables, pools, strict=True)):
            pages = table[i, : -(-length // PAGE_SIZE)]
            rows = np.asarray(_read(pool, _padded(pages)))
            own[layer] = rows.reshape(-1, *own.shape[2:])[:length]
        return own

    views = [cache.at_layer(layer) for layer in range(cache.num_layers)]
    tokens = tuple(read(i, [view.pages[0] for view in views]) for i in sequences)
    if not cache.index_pages:
        return Snapshot(tokens)
    index_pools = [view.index_pages[0] for view in views]
    return Snapshot(tokens, tuple(read(i, index_pools) for i in sequences))


def restore(
    cache: PagedKVCache, saved: Snapshot, sequences: Sequence[int]
) -> tuple[PagedKVCache, np.ndarray]:
    """Puts the sequences of a snapshot into a cache.

    Args:
      cache: outside `jit`; donated, so that its pools are written in place.
      saved: of a cache with as many layers and KV heads, of its dtype, and with index keys if it
        has them.
      sequences: which sequence of the batch each becomes; they must be empty.

    Returns:
      The cache; and ok bool[len(sequences)], False for those that the cache has too few pages for.
      Those stay empty.

    Raises:
      ValueError: the snapshot does not fit the cache, or a number is not that of an empty sequence,
        or comes twice. The cache is as before then.
    """
    sequences = _checked(cache, sequences)
    if len(sequences) != len(saved.tokens):
        raise ValueError(
            f"sequences must be as many as the snapshot's {len(saved.tokens)}, got {len(sequences)}"
        )
    if len(set(sequences)) != len(sequences):
        raise ValueError(f"sequences must be different, got {sequences}")
    for x in saved.tokens:
        dtype = cache.pages[0].dtype
        wanted = (cache.num_layers, x.shape[1], *cache.pages[0].shape[2:])
        if x.shape != wanted or x.dtype != dtype:
            raise ValueError(
                f"the cache holds {dtype.name}{list(wanted)}, and the snapshot has "
                f"{x.dtype.name}{list(x.shape)} [num_layers, seqlen, num_kv_heads, {wanted[-1]}]"
            )
    index_keys = saved.index_keys or (None,) * len(saved.tokens)
    for keys in index_keys:
        held, given = (_kind_of_keys(x) for x in (cache.index_pages[:1], (keys,)))
        if held != given:
            raise ValueError(f"the cache holds {held} index keys, and the snapshot has {given}")
    lengths = np.asarray(cache.cache_seqlens)
    taken = [i for i in sequences if lengths[i] > 0]
    if taken:
        raise ValueError(f"sequences must be empty, and of {sequences} there are tokens in {taken}")

    num_tokens = np.zeros(cache.batch, np.int32)
    num_tokens[sequences] = saved.seqlens
    cache, granted = _make_room(cache, num_tokens)
    ok = np.asarray(granted)[sequences]
    tables = _block_tables(cache)
    for i, x, keys, has_room in zip(sequences, saved.tokens, index_keys, ok, strict=True):
        if not has_room:
            continue
        length = np.int32(x.shape[1])
        for layer, table in enumerate(tables):
            pages = _padded(table[i, : -(-length // PAGE_SIZE)])
            view = cache.at_layer(layer)
            pool = _write(view.pages[0], _rows(x[layer], pages), pages, length)
            cache = cache._with_pool(layer, pool)
            if keys is not None:
                pool = _write(view.index_pages[0], _rows(keys[layer], pages), pages, length)
                cache = cache._with_index_pool(layer, pool)
    return cache, ok


def _block_tables(cache: PagedKVCache) -> list[np.ndarray]:
    """That of each layer, on the host."""
    return [np.asarray(cache.at_layer(i).block_table) for i in range(cache.num_layers)]


@functools.partial(jax.jit, donate_argnames="cache")
def _make_room(cache: PagedKVCache, num_tokens: jax.Array) -> tuple[PagedKVCache, jax.Array]:
    cache, ok = cache.allocate(num_tokens)
    # The tokens are not appended: nothing is new.
    return dataclasses.replace(cache, num_new=jnp.zeros_like(cache.num_new)), ok


@jax.jit
def _read(pool: jax.Array, pages: jax.Array) -> jax.Array:
    return pool[pages]


@functools.partial(jax.jit, donate_argnames="pool")
def _write(pool: jax.Array, rows: jax.Array, pages: jax.Array, count: jax.Array) -> jax.Array:
    # A scatter of XLA's does not keep the bits of every NaN.
    return cache_append(pool, rows[None], pages[None], jnp.zeros_like(count)[None], count[None])


def _kind_of_keys(arrays: Sequence[jax.Array | np.ndarray | None]) -> str:
    """What the first of some arrays of index keys [..., any] holds."""
    if not arrays or arrays[0] is None:
        return "no"
    return f"{arrays[0].dtype.name}[{arrays[0].shape[-1]}]"


def _rows(tokens: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Tokens [seqlen, ...] with zeros after them, as many as pages have rows."""
    rows = np.zeros((len(pages) * PAGE_SIZE, *tokens.shape[1:]), tokens.dtype)
    rows[: len(tokens)] = tokens
    return rows


def _padded(pages: np.ndarray) -> np.ndarray:
    """Page numbers, as many as a power of two, so that few programs are compiled."""
    padded = np.zeros(1 << max(len(pages) - 1, 0).bit_length(), np.int32)
    padded[: len(pages)] = pages
    return padded


def _checked(cache: PagedKVCache, sequences: Sequence[int]) -> list[int]:
    numbers = [int(i) for i in sequences]
    for i in numbers:
        if not 0 <= i < cache.batch:
            raise ValueError(f"sequences must be in [0, {cache.batch}), got {i}")
    return numbers


def _bytes_of(x: np.ndarray) -> Any:
    return np.ascontiguousarray(x).view(np.uint8)
