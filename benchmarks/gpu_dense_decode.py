"""Dense decode on a Hopper GPU, beside the gather + einsum that JAX users have without it.

    python benchmarks/gpu_dense_decode.py

Prints a table and writes a record for this GPU under benchmarks/results/. A time is that of one
call inside a compiled program: programs of few and of many calls are timed, medians are taken, and
the difference is divided by the number of calls between them, which leaves out what a program costs
to start. Calls walk through more pages than the L2 cache holds. Ceilings are measured in the same
run: the GPU is limited by its power, so figures of different runs do not compare.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from record import write_record

import flashmla_jax as fm
from flashmla_jax import reference

HEAD_DIM, HEAD_DIM_V, PAGE_SIZE = 576, 512, 64
BEYOND_L2 = 256 * 2**20  # bytes of pages that consecutive calls walk through
RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    batch: int
    s_q: int
    h_q: int
    length: int
    varlen: bool = False  # lengths from a normal distribution, as in FlashMLA's own test
    rival: bool = False  # also time gather + einsum

    def __str__(self) -> str:
        kind = "varlen" if self.varlen else "uniform"
        return f"b{self.batch} s{self.s_q} h{self.h_q} {self.length} {kind}"


CASES = [
    Case(128, 1, 128, 4096, rival=True),
    Case(128, 1, 16, 4096, rival=True),
    Case(128, 1, 128, 4096, varlen=True),
    Case(128, 2, 128, 4096, varlen=True),
    Case(128, 1, 128, 16384, varlen=True),
    Case(128, 1, 64, 4096, varlen=True),
    Case(128, 1, 16, 4096, varlen=True),
    Case(128, 1, 16, 16384, varlen=True),
    Case(32, 4, 16, 8192),
    Case(32, 1, 128, 1024),
    Case(32, 1, 128, 8192),
    Case(16, 1, 16, 8192, rival=True),
    Case(16, 1, 128, 8192, rival=True),
    Case(4, 1, 16, 8192),
    Case(4, 1, 128, 8192),
    Case(1, 1, 16, 1024),
    Case(1, 1, 16, 8192),
    Case(1, 1, 16, 65536),
    Case(1, 1, 128, 1024),
    Case(1, 1, 128, 8192, rival=True),
    Case(1, 1, 128, 65536),
]


def seconds_per_call(
    function: Callable[..., Any], shared: Sequence[Any], own: Sequence[Any], few: int
) -> float:
    """Device seconds of `function(*shared, own[i])`, one call after the other.

    Every call has an operand of its own, or XLA would make equal calls one. The program returns one
    number: every array that it handed out would cost the host more time than a short call takes.
    """

    @jax.jit
    def run(shared: Sequence[Any], own: Sequence[Any]) -> Any:
        results = [function(*shared, operand)[0] for operand in own]
        results = jax.lax.optimization_barrier(results)  # all of each, not what is summed alone
        return sum(out[0, 0, 0, 0].astype(jnp.float32) for out in results)

    def program(calls: int) -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            jax.block_until_ready(run(shared, own[:calls]))
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    return (program(len(own)) - program(few)) / (len(own) - few)


def attention_seconds(case: Case, attend: Callable[..., Any], few: int, many: int) -> float:
    rng = np.random.default_rng(0)
    lengths = sample_lengths(case, rng)
    pages = -(-lengths // PAGE_SIZE)
    copies = -(-BEYOND_L2 // (int(pages.sum()) * PAGE_SIZE * HEAD_DIM * 2))
    num_pages = int(pages.sum()) * min(many, copies)
    tables = []
    order = rng.permutation(num_pages).astype(np.int32)
    for _ in range(many):
        table = np.full((case.batch, pages.max()), -1, np.int32)
        if order.size == 0:
            order = rng.permutation(num_pages).astype(np.int32)
        for i, count in enumerate(pages):
            table[i, :count], order = order[:count], order[count:]
        tables.append(jnp.asarray(table))
    key_q, key_k = jax.random.split(jax.random.key(0))
    q = jax.random.normal(key_q, (case.batch, case.s_q, case.h_q, HEAD_DIM), jnp.bfloat16)
    k_cache = jax.random.normal(key_k, (num_pages, PAGE_SIZE, 1, HEAD_DIM), jnp.bfloat16)

    def call(q: jax.Array, k_cache: jax.Array, lengths: jax.Array, table: jax.Array) -> Any:
        return attend(q, k_cache, table, lengths)

    return seconds_per_call(call, (q, k_cache, jnp.asarray(lengths, jnp.int32)), tables, few)


def sample_lengths(case: Case, rng: np.random.Generator) -> np.ndarray:
    if not case.varlen:
        return np.full(case.batch, case.length)
    lengths = rng.normal(case.length, case.length / 2, case.batch).astype(int)
    return np.maximum(lengths, case.s_q)


def measure(case: Case) -> dict[str, Any]:
    causal = case.s_q > 1

    def ours(*operands: jax.Array) -> Any:
        return fm.flash_mla_with_kvcache(*operands, causal=causal)

    def gather_einsum(*operands: jax.Array) -> Any:
        return reference.flash_mla_with_kvcache(
            *operands, softmax_scale=HEAD_DIM**-0.5, causal=causal
        )

    lengths = sample_lengths(case, np.random.default_rng(0))
    query_numbers = case.batch * case.s_q * case.h_q
    flop = 2 * case.s_q * case.h_q * int(lengths.sum()) * (HEAD_DIM + HEAD_DIM_V)
    size = 2 * (int(lengths.sum()) * HEAD_DIM + query_numbers * (HEAD_DIM + HEAD_DIM_V))
    calls = (8, 88) if flop < 2e10 else (4, 24) if flop < 1e12 else (2, 10)
    seconds = attention_seconds(case, ours, *calls)
    result = {
        "case": str(case),
        "us": round(seconds * 1e6, 1),
        "tflops": round(flop / seconds / 1e12, 1),
        "gbps": round(size / seconds / 1e9),
    }
    if case.rival:
        rival = attention_seconds(case, gather_einsum, 1, 3 if size > 1e8 else 9)
        result["gather_einsum_us"] = round(rival * 1e6, 1)
        result["speedup"] = round(rival / seconds, 2)
    return result


def ceilings() -> dict[str, float]:
    """What XLA's own kernels reach: a sum over 8 GB, and products of 8192 x 8192 matrices."""
    x = jnp.ones((4, 2**30), jnp.bfloat16)
    total = jax.jit(lambda x: x.sum(axis=1, dtype=jnp.float32))
    keys = jax.random.split(jax.random.key(1))
    a, b = (jax.random.normal(key, (8192, 8192), jnp.bfloat16) for key in keys)
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, 200, lambda _, c: (c @ b) * 0.01, a))

    def seconds(function: Callable[..., Any], *operands: jax.Array) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(function(*operands))
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    return {
        "read_gbps": round(x.nbytes / seconds(total, x) / 1e9),
        "sustained_matmul_tflops": round(200 * 2 * 8192**3 / seconds(chain, a, b) / 1e12, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args(argv)
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != "9.0":
        print(f"needs a Hopper GPU (compute capability 9.0), found {device.device_kind}")
        return 1

    limits = ceilings()
    print(f"{device.device_kind}; " + ", ".join(f"{k} {v}" for k, v in limits.items()))
    print(f"{'case':32}{'us':>10}{'TFLOP/s':>10}{'GB/s':>8}{'gather+einsum us':>18}{'speedup':>9}")
    rows = []
    for case in CASES:
        row = measure(case)
        rows.append(row)
        rival = f"{row['gather_einsum_us']:>18}{row['speedup']:>9}" if case.rival else ""
        numbers = f"{row['us']:>10}{row['tflops']:>10}{row['gbps']:>8}"
        print(f"{row['case']:32}{numbers}{rival}", flush=True)
    if not arguments.no_record:
        name = device.device_kind.lower().replace(" ", "_")
        path = RESULTS / f"{name}.json"
        write_record(path, {"ceilings": limits, "dense_decode": rows}, "make bench")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
