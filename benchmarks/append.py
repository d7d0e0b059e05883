"""Cache append on a Hopper GPU: the tokens of a prompt, and those of a decoding step.

Part of `make bench`. A time is that of one call among many of a compiled program, each with pages
and new tokens of its own. Those of prompts are together beyond what the L2 cache holds; those of
decoding steps are not.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from flashmla_jax.cache.layout import HEAD_DIM, PAGE_SIZE
from flashmla_jax.ops.cache_append import cache_append


@dataclasses.dataclass(frozen=True)
class Case:
    """Appends of `num_tokens` tokens to each of `batch` sequences that hold up to `cached`."""

    name: str
    batch: int
    num_tokens: int
    cached: int
    calls: int

    def bytes(self) -> int:
        """Of the new tokens in bfloat16, read once and written once."""
        return 2 * self.batch * self.num_tokens * HEAD_DIM * 2


CASES = [
    Case("b8 prompts of 4096", batch=8, num_tokens=4096, cached=0, calls=8),
    Case("b1 prompt of 16384", batch=1, num_tokens=16384, cached=0, calls=16),
    Case("b128 decoding step", batch=128, num_tokens=1, cached=8192, calls=60),
]


def inputs(case: Case) -> tuple[jax.Array, list[tuple[jax.Array, ...]]]:
    """A pool, and per call (new_kv, block_table, start, count): no page is in two calls."""
    rng = np.random.default_rng(0)
    max_pages = -(-(case.cached + case.num_tokens) // PAGE_SIZE)
    start = rng.integers(case.cached // 2, case.cached + 1, case.batch, np.int32)
    slot = np.arange(max_pages)
    first, last = start // PAGE_SIZE, (start + case.num_tokens - 1) // PAGE_SIZE
    touched = (slot >= first[:, None]) & (slot <= last[:, None])
    num_pages = case.calls * int(touched.sum())
    order = rng.permutation(num_pages).astype(np.int32).reshape(case.calls, -1)
    count = jnp.full(case.batch, case.num_tokens, jnp.int32)
    shape = (case.batch, case.num_tokens, 1, HEAD_DIM)
    calls = []
    for pages, key in zip(order, jax.random.split(jax.random.key(0), case.calls), strict=True):
        table = np.full(touched.shape, -1, np.int32)
        table[touched] = pages
        new_kv = jax.random.normal(key, shape, jnp.bfloat16)
        calls.append((new_kv, jnp.asarray(table), jnp.asarray(start), count))
    return jnp.zeros((num_pages, PAGE_SIZE, 1, HEAD_DIM), jnp.bfloat16), calls


@functools.partial(jax.jit, donate_argnames="pool")
def append_all(pool: jax.Array, calls: list[tuple[jax.Array, ...]]) -> jax.Array:
    """One call after the other, in the same pool."""
    for call in calls:
        pool = cache_append(pool, *call)
    return pool


def measure(case: Case) -> dict[str, Any]:
    """A row of the record. Times are in microseconds: the median, and every sample."""
    pool, calls = inputs(case)

    def program() -> jax.Array:
        nonlocal pool
        pool = append_all(pool, calls)
        return pool

    samples = [run / case.calls for run in timing.gpu_seconds(program)]
    median = statistics.median(samples)
    return {
        "case": case.name,
        "us": round(median * 1e6, 2),
        "samples_us": [round(x * 1e6, 2) for x in samples],
        "gbps": round(case.bytes() / median / 1e9, 1),
    }


def copy_gbps() -> float:
    """What XLA's own code reaches: bytes read plus bytes written, per nanosecond."""
    x = jnp.ones(2**29, jnp.bfloat16)
    negate = jax.jit(jnp.negative)
    seconds = statistics.median(timing.gpu_seconds(lambda: negate(x), 4))
    return round(2 * x.nbytes / seconds / 1e9)
