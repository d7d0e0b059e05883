"""The indexer's choice of cached tokens on a Hopper GPU, beside the same composed from XLA.

Part of `make bench`. A time is that of one call of a compiled program of several, on keys of their
own: together they are beyond what the L2 cache holds.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.layers import indexer
from flashmla_jax.ops import index_topk

Choose = Callable[..., jax.Array]

HEADS, TOPK = 64, 2048  # DeepSeek-V3.2
HEAD_DIM = index_topk.HEAD_DIM


@dataclasses.dataclass(frozen=True)
class Case:
    """The newest token of each of `batch` sequences, of `tokens` each."""

    batch: int
    tokens: int
    fp8: bool

    def __str__(self) -> str:
        return f"b{self.batch} {self.tokens} {'fp8' if self.fp8 else 'bfloat16'} keys"

    def calls(self) -> int:
        """Different ones in a program."""
        return max(2, min(64, 2**28 // self.bytes()))

    def bytes(self) -> int:
        """Of the keys, read once."""
        return self.batch * self.tokens * (HEAD_DIM + 16 if self.fp8 else 2 * HEAD_DIM)


CASES = [
    Case(batch, tokens, fp8)
    for batch, tokens in [(64, 32768), (64, 131072), (1, 8192), (1, 131072)]
    for fp8 in (False, True)
]


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """q, weights, a pool, the tables of all calls [calls, batch, pages] and num_visible."""
    pages = case.tokens // PAGE_SIZE
    num_pages = case.calls() * case.batch * pages
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (case.batch, 1, HEADS, HEAD_DIM), jnp.bfloat16)
    weights = jax.random.normal(keys[1], (case.batch, 1, HEADS), jnp.float32)
    size = HEAD_DIM + 16 if case.fp8 else HEAD_DIM
    shape = (num_pages, PAGE_SIZE, 1, size)
    if case.fp8:  # any codes but NaN, and a scale of 1
        pool = jax.random.randint(keys[2], shape, 0, 120, jnp.uint8)
        one = np.float32(1).tobytes()
        pool = pool.at[..., HEAD_DIM : HEAD_DIM + 4].set(np.frombuffer(one, np.uint8))
    else:
        pool = jax.random.normal(keys[2], shape, jnp.bfloat16)
    tables = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    tables = jnp.asarray(tables.reshape(case.calls(), case.batch, pages))
    return q, weights, pool, tables, jnp.full((case.batch, 1), case.tokens, jnp.int32)


def choose(*arguments: jax.Array) -> jax.Array:
    """One call. On a Hopper GPU, two kernels."""
    return indexer.choose_cached(*arguments, TOPK)


def choose_composed(*arguments: jax.Array) -> jax.Array:
    """What it is where there are no kernels."""
    (positions,) = index_topk.reference(*arguments, topk=TOPK, precision=None)
    return positions


def measure(case: Case) -> dict[str, Any]:
    """A row of the record. Times are in microseconds: the median, and every sample."""
    q, weights, pool, tables, num_visible = inputs(case)

    def microseconds(choose: Choose, repeats: int) -> list[float]:
        @jax.jit
        def run(*arguments: jax.Array) -> list[jax.Array]:
            q, weights, pool, tables, num_visible = arguments
            return [choose(q, weights, pool, table, num_visible) for table in tables]

        arguments = q, weights, pool, tables, num_visible
        seconds = timing.gpu_seconds(lambda: run(*arguments), repeats)
        return [x / case.calls() * 1e6 for x in seconds]

    samples = microseconds(choose, 10)
    median = statistics.median(samples)
    return {
        "case": str(case),
        "us": round(median, 2),
        "samples_us": [round(x, 2) for x in samples],
        "gbps": round(case.bytes() / median / 1e3, 1),
        "xla_us": round(statistics.median(microseconds(choose_composed, 3)), 2),
    }
