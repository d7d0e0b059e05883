"""Sparse attention on a Hopper GPU: decoding steps, and prompts.

Part of `make bench`. A time is that of one call among several of a compiled program, each with
lists of its own. Indices are random, and so are the tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp

import flashmla_jax as fm
from benchmarks import timing
from flashmla_jax.cache import layout
from flashmla_jax.cache.layout import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE

MOST_TOKENS = 4 * 2**20  # of a pool
K = 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """Query tokens that list `topk` tokens each, of `tokens` for each sequence."""

    batch: int
    s_q: int
    h_q: int
    topk: int
    tokens: int
    fp8: bool = False
    prefill: bool = False
    """Of one prompt, with `flash_mla_sparse_fwd`."""

    def __str__(self) -> str:
        kind = "prefill" if self.prefill else "fp8" if self.fp8 else "bfloat16"
        return f"b{self.batch} s{self.s_q} h{self.h_q} top {self.topk} of {self.tokens} {kind}"

    def calls(self) -> int:
        """Of a program: so many that what they read is beyond what the L2 cache holds."""
        return 3 if self.prefill else min(max(256 // self.batch, 8), 60)

    def flop(self) -> int:
        """Of both products."""
        rows = self.batch * self.s_q * self.h_q
        return 2 * rows * self.topk * (HEAD_DIM + HEAD_DIM_V)


CASES = [
    *(
        Case(*sizes, topk=topk, tokens=32 * K, fp8=fp8)
        for *sizes, topk in (
            (128, 1, 128, 2 * K),
            (128, 2, 128, 2 * K),
            (64, 2, 128, 2 * K),
            (128, 1, 64, 2 * K),
            (128, 1, 32, 2 * K),
            (128, 1, 16, 2 * K),
            (16, 1, 128, 2 * K),
            (1, 1, 128, 2 * K),
            (2, 1, 128, 32 * K),
        )
        for fp8 in (True, False)
    ),
    *(
        Case(1, 4 * K, heads, 2 * K, tokens, prefill=True)
        for heads, tokens in ((128, 8 * K), (128, 32 * K), (64, 32 * K))
    ),
]


@functools.partial(jax.jit, static_argnums=1)
def make_pool(key: jax.Array, case: Case) -> jax.Array:
    """Pages of standard normal tokens, or one after the other."""
    tokens = min(case.batch * case.tokens, MOST_TOKENS)
    pool = jax.random.normal(key, (tokens // PAGE_SIZE, PAGE_SIZE, 1, HEAD_DIM), jnp.bfloat16)
    if case.prefill:
        return pool.reshape(tokens, 1, HEAD_DIM)
    return layout.quantize(pool) if case.fp8 else pool


def inputs(case: Case) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """(q, pool, indices for each call)."""
    key_q, key_pool, *keys = jax.random.split(jax.random.key(0), 2 + case.calls())
    pool = make_pool(key_pool, case)
    tokens = pool.shape[0] * (1 if case.prefill else PAGE_SIZE)
    shape = (case.s_q, case.h_q, HEAD_DIM)
    lists = (case.s_q, 1, case.topk)
    if not case.prefill:
        shape, lists = (case.batch, *shape), (case.batch, case.s_q, case.topk)
    q = jax.random.normal(key_q, shape, jnp.bfloat16)
    return q, pool, [jax.random.randint(key, lists, 0, tokens, jnp.int32) for key in keys]


def attend(case: Case, q: jax.Array, pool: jax.Array, indices: jax.Array) -> jax.Array:
    """One call of the op."""
    if case.prefill:
        return fm.flash_mla_sparse_fwd(q, pool, indices, HEAD_DIM**-0.5)[0]
    options = {"indices": indices, "is_fp8_kvcache": case.fp8}
    return fm.flash_mla_with_kvcache(q, pool, None, None, **options)[0]


def measure(case: Case) -> dict[str, Any]:
    """A row of the record. Times are in microseconds: the median, and every sample."""
    q, pool, lists = inputs(case)

    @jax.jit
    def run(q: jax.Array, pool: jax.Array, lists: list[jax.Array]) -> list[jax.Array]:
        return [attend(case, q, pool, indices) for indices in lists]

    seconds = timing.gpu_seconds(lambda: run(q, pool, lists))
    samples = [x / case.calls() for x in seconds]
    median = statistics.median(samples)
    return {
        "case": str(case),
        "us": round(median * 1e6, 2),
        "samples_us": [round(x * 1e6, 2) for x in samples],
        "tflops": round(case.flop() / median / 1e12, 1),
    }
