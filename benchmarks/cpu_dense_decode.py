"""Dense decode on the CPU: our kernel beside `jax.jit` of the reference, XLA's own code for it.

    JAX_PLATFORMS=cpu python benchmarks/cpu_dense_decode.py

Prints a table and writes a record under benchmarks/results/. Times are medians of single calls. The
two take turns, so that neither finds its pages in the processor's caches, as in a model, where the
weights have passed in between. GB/s counts pages that are read once.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from record import RESULTS, device_name, write_record

import flashmla_jax as fm
from flashmla_jax import reference
from flashmla_jax.cache.layout import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE


class Case(NamedTuple):
    batch: int
    s_q: int
    h_q: int
    length: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"b{self.batch} s{self.s_q} h{self.h_q} {self.length} {self.dtype}"


CASES = [
    Case(8, 1, 16, 4096),
    Case(8, 1, 16, 4096, "float16"),
    Case(8, 1, 16, 4096, "float32"),
    Case(1, 1, 128, 4096),
    Case(1, 1, 128, 4096, "float32"),
    Case(4, 4, 16, 4096),
    Case(8, 1, 1, 4096),
    Case(1, 1, 16, 16384),
    Case(64, 1, 16, 64),
    Case(1, 1, 16, 64),
]


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """Random queries and tokens, every sequence full, its pages scattered over the pool."""
    rng = np.random.default_rng(0)
    pages = -(-case.length // PAGE_SIZE)
    tables = rng.permutation(case.batch * pages).astype(np.int32).reshape(case.batch, pages)
    q = rng.standard_normal((case.batch, case.s_q, case.h_q, HEAD_DIM), np.float32)
    k_cache = rng.standard_normal((case.batch * pages, PAGE_SIZE, 1, HEAD_DIM), np.float32)
    lengths = np.full(case.batch, case.length, np.int32)
    arrays = (q.astype(case.dtype), k_cache.astype(case.dtype), tables, lengths)
    return tuple(map(jnp.asarray, arrays))


def medians(functions: Sequence[Callable[[], Any]], seconds: float = 2.0) -> list[float]:
    """Median seconds of each function, called in turns for about `seconds`."""
    for function in functions:
        jax.block_until_ready(function())
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, mine in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]


def measure(case: Case) -> dict[str, Any]:
    causal = case.s_q > 1
    operands = inputs(case)
    ours = jax.jit(functools.partial(fm.flash_mla_with_kvcache, causal=causal))
    xla = jax.jit(
        functools.partial(
            reference.flash_mla_with_kvcache, softmax_scale=HEAD_DIM**-0.5, causal=causal
        )
    )
    kernel, rival = medians([lambda: ours(*operands), lambda: xla(*operands)])
    rows = case.batch * case.s_q * case.h_q
    flop = 2 * rows * case.length * (HEAD_DIM + HEAD_DIM_V)
    return {
        "case": str(case),
        "ms": round(kernel * 1e3, 3),
        "gflops": round(flop / kernel / 1e9, 1),
        "gbps": round(operands[1].nbytes / kernel / 1e9, 2),
        "reference_ms": round(rival * 1e3, 3),
        "speedup": round(rival / kernel, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args(argv)
    if jax.devices()[0].platform != "cpu":
        print("measures the CPU kernel: set JAX_PLATFORMS=cpu")
        return 1
    print(device_name())
    print(f"{'case':28}{'ms':>10}{'GFLOP/s':>10}{'GB/s':>8}{'reference ms':>14}{'speedup':>9}")
    rows = []
    for case in CASES:
        row = measure(case)
        rows.append(row)
        print("{case:28}{ms:>10}{gflops:>10}{gbps:>8}{reference_ms:>14}{speedup:>9}".format(**row))
    if not arguments.no_record:
        command = "JAX_PLATFORMS=cpu python benchmarks/cpu_dense_decode.py"
        print(f"wrote {write_record(RESULTS / 'cpu.json', {'dense_decode': rows}, command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
