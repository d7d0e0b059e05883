"""The headline check, after FlashMLA's own test of the same name.

    python tests/test_flash_mla.py

validates each configuration against float32 math and prints its ms, TFLOPS and GB/s, on a Hopper
GPU; anywhere else it validates small configurations and says so. Under pytest it checks the small
ones on whatever device there is.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE

import flashmla_jax as fm
from flashmla_jax import reference

BEYOND_L2 = 256 * 2**20  # bytes of pages that consecutive calls walk through


@dataclasses.dataclass(frozen=True)
class Config:
    batch: int
    s_q: int
    mean_length: int
    h_q: int
    varlen: bool
    h_kv: int = 1

    @property
    def causal(self) -> bool:
        return self.s_q > 1

    def __str__(self) -> str:
        return (
            f"b={self.batch}, s_q={self.s_q}, mean_sk={self.mean_length}, h_q={self.h_q}, "
            f"h_kv={self.h_kv}, causal={self.causal}, varlen={self.varlen}"
        )

    def lengths(self, rng: np.random.Generator) -> np.ndarray:
        if not self.varlen:
            return np.full(self.batch, self.mean_length)
        lengths = rng.normal(self.mean_length, self.mean_length / 2, self.batch)
        return np.maximum(lengths.astype(np.int64), self.s_q)


SMALL = [
    Config(batch, s_q, mean_length, h_q, varlen)
    for batch, mean_length, h_q, s_q, varlen in itertools.product(
        (5,), (257, 700), (16, 64, 128), (1, 2), (False, True)
    )
]
HEADLINE = [
    Config(128, s_q, mean_length, h_q, varlen)
    for mean_length, h_q, s_q, varlen in itertools.product(
        (4096, 8192, 16384), (16, 32, 64, 128), (1, 2), (False, True)
    )
]


@functools.partial(jax.jit, static_argnames="causal")
def attend(q, k_cache, block_table, cache_seqlens, causal):
    return fm.flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, causal=causal)


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_flash_mla(config: Config) -> None:
    rng = np.random.default_rng(0)
    problem = oracle.make_problem(
        rng, config.lengths(rng), s_q=config.s_q, h_q=config.h_q, h_kv=config.h_kv
    )
    actual = attend(*problem, causal=config.causal)
    oracle.assert_matches(actual, oracle.attend(problem, causal=config.causal))


# --- The script ------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="causal")
def float32_math(q, k_cache, block_table, cache_seqlens, causal):
    """out, lse and spread, one sequence after the other, so that memory holds one gathered cache.

    Tokens being normal, the spread is the root of the sum of squared probabilities; and squares of
    probabilities are what twice the scale gives.
    """

    def one(operands):
        row, table, length = operands
        tokens = k_cache[jnp.clip(table, 0, len(k_cache) - 1)].astype(jnp.float32)
        row, table, length = row[None].astype(jnp.float32), jnp.arange(len(table)), length[None]
        attend = functools.partial(
            reference.flash_mla_with_kvcache, row, tokens, table[None], length, causal=causal
        )
        out, lse = attend(softmax_scale=HEAD_DIM**-0.5)
        _, twice = attend(softmax_scale=2 * HEAD_DIM**-0.5)
        spread = jnp.swapaxes(jnp.exp(twice / 2 - lse), 1, 2)[..., None]
        return out[0], lse[0], spread[0]

    return jax.lax.map(one, (q, block_table, cache_seqlens))


def device_problem(config: Config) -> tuple[list[jax.Array], list[jax.Array]]:
    """(q, pool, lengths) on the device, and tables that walk through different pages of the pool.

    The pool is NaN in the tails of last pages. What a table does not use points nowhere.
    """
    rng = np.random.default_rng(0)
    lengths = config.lengths(rng)
    pages = -(-lengths // PAGE_SIZE)
    page_bytes = PAGE_SIZE * config.h_kv * HEAD_DIM * 2
    copies = -(-BEYOND_L2 // (int(pages.sum()) * page_bytes))
    num_pages = int(pages.sum()) * copies
    order = rng.permutation(num_pages).astype(np.int32)
    tails = np.full(num_pages, PAGE_SIZE)
    tables = []
    for _ in range(copies):
        table = np.full((config.batch, pages.max()), -1, np.int32)
        for i, count in enumerate(pages):
            table[i, :count], order = order[:count], order[count:]
            tails[table[i, count - 1]] = (lengths[i] - 1) % PAGE_SIZE + 1
        tables.append(jnp.asarray(table))
    key_q, key_k = jax.random.split(jax.random.key(0))
    shape_q = (config.batch, config.s_q, config.h_q, HEAD_DIM)
    shape_k = (num_pages, PAGE_SIZE, config.h_kv, HEAD_DIM)

    @jax.jit
    def make_pool(tails):
        tokens = jax.random.normal(key_k, shape_k, jnp.bfloat16)
        real = jnp.arange(PAGE_SIZE)[None] < tails[:, None]
        return jnp.where(real[..., None, None], tokens, jnp.nan)

    q = jax.random.normal(key_q, shape_q, jnp.bfloat16)
    return [q, make_pool(jnp.asarray(tails)), jnp.asarray(lengths, jnp.int32)], tables


def seconds_per_call(shared: list[jax.Array], tables: list[jax.Array], causal: bool) -> float:
    """Of programs of many calls less programs of few, which leaves out what a program costs."""

    def program(calls: int) -> float:
        @jax.jit
        def run(q: Any, k_cache: Any, lengths: Any, tables: Any) -> Any:
            return [
                fm.flash_mla_with_kvcache(q, k_cache, table, length, causal=causal)
                for table, length in zip(tables, lengths, strict=True)
            ]

        # An operand of its own for each call, or XLA would make equal calls one.
        q, k_cache, length = shared
        shared_tables = [tables[i % len(tables)] for i in range(calls)]
        operands = (q, k_cache, [length] * calls, shared_tables)
        times = []
        for _ in range(9):
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    few, many = 2, 12
    return (program(many) - program(few)) / (many - few)


def validate_and_measure(config: Config) -> str:
    shared, tables = device_problem(config)
    q, k_cache, lengths = shared
    out, lse = attend(q, k_cache, tables[0], lengths, causal=config.causal)
    expected = float32_math(q, k_cache, tables[0], lengths, causal=config.causal)
    expected = oracle.Expected(*(np.asarray(x, np.float64) for x in expected))
    oracle.assert_matches((out, lse), expected)

    seconds = seconds_per_call(shared, tables, config.causal)
    tokens = int(lengths.sum())
    rows = config.batch * config.s_q * config.h_q
    flop = 2 * config.s_q * config.h_q * tokens * (HEAD_DIM + HEAD_DIM_V)
    size = 2 * (tokens * config.h_kv * HEAD_DIM + rows * (HEAD_DIM + HEAD_DIM_V))
    return (
        f"{seconds * 1e3:.3f} ms, {flop / seconds / 1e12:.0f} TFLOPS, "
        f"{size / seconds / 1e9:.0f} GB/s"
    )


def main() -> int:
    device = jax.devices()[0]
    hopper = device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"
    if not hopper:
        print(
            f"No Hopper GPU here (compute capability 9.0), but {device.device_kind}: validating "
            "small configurations, without timing."
        )
    failures = 0
    for config in HEADLINE if hopper else SMALL:
        try:
            if hopper:
                result = validate_and_measure(config)
            else:
                test_flash_mla(config)
                result = "correct"
        except AssertionError as error:
            failures += 1
            result = f"WRONG: {error}"
        print(f"{config}: {result}", flush=True)
    print(f"{failures} configurations are wrong" if failures else "All configurations are correct.")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
