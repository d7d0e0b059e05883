"""Dense decode beside the gather + einsum that JAX users have without it, on a Hopper GPU or a CPU.

    python -m benchmarks.decode                  the table; a record under benchmarks/results/
    python -m benchmarks.decode --sweep          and more lengths
    python -m benchmarks.decode --only latency   some cases, no record

On a GPU a time is that of one call among many of a compiled program, all that the call launches
included: the program's time on the device, divided by its calls, whose pages together are beyond
what the L2 cache holds. Ceilings are measured in the same run: a GPU is limited by its power, so
times of different runs do not compare, but shares of the ceilings do (`python -m
benchmarks.compare`).
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

import flashmla_jax as fm
from benchmarks import append, cases, experts, indexer, report, sparse, timing
from benchmarks.cases import Case
from benchmarks.record import RESULTS, device_slug, has_hopper, write_record
from flashmla_jax import reference
from flashmla_jax.cache import layout
from flashmla_jax.cache.layout import HEAD_DIM, PAGE_SIZE

BEYOND_L2 = 160 * 2**20  # bytes of pages that the calls of a program walk through
MOST_CALLS = 120
LAYERS = 60  # of the model that the "in a model" measurement imitates

Attend = Callable[..., tuple[jax.Array, jax.Array]]


def attention(case: Case, rival: bool) -> Attend:
    """Our op, or the same in jax.numpy, as a function of (q, k_cache, block_table, lengths)."""
    if rival:
        return functools.partial(
            reference.flash_mla_with_kvcache,
            softmax_scale=HEAD_DIM**-0.5,
            causal=case.causal,
            in_panels=False,
        )
    deterministic = "batch_invariant" if case.batch_invariant else True
    return functools.partial(
        fm.flash_mla_with_kvcache,
        causal=case.causal,
        deterministic=deterministic,
        is_fp8_kvcache=case.fp8,
    )


def inputs(case: Case, calls: int, most_pools: int) -> tuple[jax.Array, jax.Array, list, jax.Array]:
    """(q, k_cache, a block table per call, lengths): random, the pages in random order.

    The tables go through the pool, which holds the pages of at most `most_pools` calls.
    """
    rng = np.random.default_rng(0)
    lengths = case.lengths()
    pages = -(-lengths // PAGE_SIZE)
    num_pages = int(pages.sum()) * min(calls, most_pools)
    tables = []
    order = np.empty(0, np.int32)
    for _ in range(calls):
        if order.size == 0:
            order = rng.permutation(num_pages).astype(np.int32)
        table = np.full((case.batch, pages.max()), -1, np.int32)
        for row, count in zip(table, pages, strict=True):
            row[:count], order = order[:count], order[count:]
        tables.append(jnp.asarray(table))
    key_q, key_k = jax.random.split(jax.random.key(0))
    q = jax.random.normal(key_q, (case.batch, case.s_q, case.h_q, HEAD_DIM), case.dtype)
    k_cache = random_pages(key_k, num_pages, case)
    return q, k_cache, tables, jnp.asarray(lengths)


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_pages(key: jax.Array, num_pages: int, case: Case) -> jax.Array:
    """A pool of standard normal numbers, in the case's format."""
    pages = jax.random.normal(key, (num_pages, PAGE_SIZE, 1, HEAD_DIM), case.dtype)
    return layout.quantize(pages) if case.fp8 else pages


def seconds_on_gpu(case: Case, rival: bool) -> list[float]:
    """Of one call, in each run of a program of many."""
    copies = -(-BEYOND_L2 // case.bytes())
    calls = 3 if rival else min(max(copies, 8), MOST_CALLS)
    attend = attention(case, rival)
    q, k_cache, tables, lengths = inputs(case, calls, copies)

    @jax.jit
    def run(q: jax.Array, k_cache: jax.Array, tables: list, lengths: jax.Array) -> Any:
        # Equal calls would become one: each has a table of its own.
        return [attend(q, k_cache, table, lengths) for table in tables]

    runs = timing.gpu_seconds(lambda: run(q, k_cache, tables, lengths))
    return [run / calls for run in runs]


def seconds_on_cpu(case: Case) -> list[list[float]]:
    """Of our calls, and of the rival's."""
    q, k_cache, (table,), lengths = inputs(case, 1, 1)
    functions = [jax.jit(attention(case, rival)) for rival in (False, True)]
    return timing.cpu_seconds(
        [functools.partial(function, q, k_cache, table, lengths) for function in functions]
    )


def measure(case: Case) -> dict[str, Any]:
    """One row of the record. Times are in microseconds: the median, and every sample."""
    if jax.devices()[0].platform == "gpu":
        ours = seconds_on_gpu(case, rival=False)
        rival = seconds_on_gpu(case, rival=True) if case.rival else None
    else:
        ours, rival = seconds_on_cpu(case)
    median = statistics.median(ours)
    row: dict[str, Any] = {
        "case": str(case),
        "regime": case.regime,
        "us": round(median * 1e6, 2),
        "samples_us": [round(x * 1e6, 2) for x in ours],
        "tflops": round(case.flop() / median / 1e12, 3),
        "gbps": round(case.bytes() / median / 1e9, 1),
    }
    if rival is not None:
        gather_einsum = statistics.median(rival)
        row["gather_einsum_us"] = round(gather_einsum * 1e6, 2)
        row["speedup"] = round(gather_einsum / median, 2)
    return row


def ceilings() -> dict[str, float]:
    """What XLA's own code reaches here: sums over much memory, and products of large matrices."""
    gpu = jax.devices()[0].platform == "gpu"
    x = jnp.ones((2**15, 2**16) if gpu else (2**13, 2**13), jnp.float32)
    sums = [jax.jit(functools.partial(jnp.sum, axis=axis)) for axis in (1, None)]

    def seconds(program: timing.Program) -> float:
        samples = timing.gpu_seconds(program, 4) if gpu else timing.cpu_seconds([program])[0]
        return statistics.median(samples)

    read = min(seconds(functools.partial(total, x)) for total in sums)
    flop, programs = products(gpu)
    return {
        "read_gbps": round(x.nbytes / read / 1e9),
        "sustained_matmul_tflops": round(
            flop / min(map(seconds, programs)) / 1e12, 1 if gpu else 3
        ),
    }


def products(gpu: bool) -> tuple[int, list[timing.Program]]:
    """Programs that multiply large matrices, and the FLOP of each."""
    size = 8192 if gpu else 1024
    keys = jax.random.split(jax.random.key(1))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    if gpu:
        chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, 200, lambda _, c: (c @ b) * 0.01, a))
        return 200 * 2 * size**3, [functools.partial(chain, a, b)]
    # XLA uses a processor's matrix units for bfloat16 with results in float32. Without them float32
    # is faster.
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    dtypes = jnp.bfloat16, jnp.float32
    operands = [(a.astype(dtype), b.astype(dtype)) for dtype in dtypes]
    return 2 * size**3, [functools.partial(multiply, *pair) for pair in operands]


def in_a_model(case: Case = cases.IN_A_MODEL) -> dict[str, float]:
    """A jitted step of 60 layers' calls, each on its own pages: on the device, and in all."""
    q, k_cache, (table,), lengths = inputs(case, 1, 1)
    caches = [k_cache] + [k_cache + 0 for _ in range(LAYERS - 1)]

    @jax.jit
    def step(q: jax.Array, caches: list, table: jax.Array, lengths: jax.Array) -> list:
        return [fm.flash_mla_with_kvcache(q, cache, table, lengths)[0] for cache in caches]

    def program() -> Any:
        return step(q, caches, table, lengths)

    device = statistics.median(timing.gpu_seconds(program))
    host = statistics.median(timing.cpu_seconds([program])[0])
    alone = statistics.median(seconds_on_gpu(case, rival=False))
    return {
        "layers": LAYERS,
        "kernel_us": round(alone * 1e6, 2),
        "device_us": round(device * 1e6, 1),
        "host_us": round(host * 1e6, 1),
        "host_share": round(host / (LAYERS * alone), 3),
    }


def tracing() -> dict[str, float]:
    """How long jax takes for a decode step of a model, each layer appending and attending."""
    batch, layers = 8, 61
    sizes = {"num_layers": layers, "num_pages": 64, "batch": batch, "max_pages_per_seq": 8}
    cache = jax.eval_shape(functools.partial(fm.PagedKVCache.create, **sizes))
    kv = jax.ShapeDtypeStruct((batch, 1, 1, HEAD_DIM), cache.dtype)
    q = jax.ShapeDtypeStruct((batch, 1, 16, HEAD_DIM), cache.dtype)

    def step(cache: fm.PagedKVCache, kv: jax.Array, q: jax.Array) -> Any:
        cache, _ = cache.allocate(jnp.ones(batch, jnp.int32))
        for layer in range(layers):
            cache = cache.append(layer, kv)
            out, _ = fm.flash_mla_with_kvcache(
                q, cache.pages[layer], cache.block_table, cache.cache_seqlens
            )
            q = q.at[..., : out.shape[-1]].add(out)
        return cache, q

    samples = []
    for _ in range(5):
        start = time.perf_counter()
        # A function of its own each time, or jax would know it.
        jax.jit(lambda *operands: step(*operands), donate_argnums=0).lower(cache, kv, q)
        samples.append(time.perf_counter() - start)
    return {"layers": layers, "trace_and_lower_ms": round(statistics.median(samples) * 1e3, 1)}


def gpu_state() -> dict[str, str]:
    """Driver, power and clocks, as nvidia-smi tells them; {} without it."""
    fields = ("driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, map(str.strip, line.splitlines()[0].split(",")), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--sweep", action="store_true", help="more lengths, for the plots (GPU)")
    parser.add_argument("--only", metavar="REGEX", help="of name or regime; no record")
    arguments = parser.parse_args(argv)
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    if not gpu and device.platform != "cpu":
        print(f"measures the kernels for Hopper GPUs and CPUs, found {device.device_kind}")
        return 1
    if gpu and not has_hopper():
        return 1
    chosen = cases.CPU if not gpu else cases.TABLE + cases.SWEEP * arguments.sweep
    if arguments.only:
        chosen = [case for case in chosen if re.search(arguments.only, f"{case.regime}: {case}")]
        if not chosen:
            parser.error(f"no case is matched by --only {arguments.only!r}")

    console = Console()
    results: dict[str, Any] = {"ceilings": ceilings(), "dense_decode": []}
    with Progress(console=console, transient=True) as progress:
        for case in progress.track(chosen, description="measuring"):
            row = measure(case)
            results["dense_decode"].append(row)
            progress.console.print(
                report.line(row, results["ceilings"]), highlight=False, soft_wrap=True
            )
    if not arguments.only:
        results["tracing"] = tracing()
        console.print(results["tracing"])
    if gpu and not arguments.only:
        results["ceilings"]["copy_gbps"] = append.copy_gbps()
        results["cache_append"] = [append.measure(case) for case in append.CASES]
        for row in results["cache_append"]:
            console.print({key: row[key] for key in ("case", "us", "gbps")})
        results["sparse_attention"] = [sparse.measure(case) for case in sparse.CASES]
        for row in results["sparse_attention"]:
            console.print({key: row[key] for key in ("case", "us", "tflops")})
        results["indexer"] = [indexer.measure(case) for case in indexer.CASES]
        for row in results["indexer"]:
            console.print({key: row[key] for key in ("case", "us", "gbps", "xla_us")})
        layers, read_gbps = experts.weights(), results["ceilings"]["read_gbps"]
        results["experts"] = [experts.measure(case, layers, read_gbps) for case in experts.CASES]
        del layers
        for row in results["experts"]:
            console.print({key: row[key] for key in ("case", "us", "reading_us", "ragged_dot_us")})
        results["in_a_model"] = in_a_model()
        results["gpu"] = gpu_state()
        console.print(results["in_a_model"])
    console.print(", ".join(f"{name} {value}" for name, value in results["ceilings"].items()))
    if not arguments.only:
        name = device_slug() if gpu else "cpu"
        command = "make bench" if gpu else "JAX_PLATFORMS=cpu python -m benchmarks.decode"
        path = write_record(RESULTS / f"{name}.json", results, command)
        print(f"wrote {path}")
        return report.main([str(path), "--plots", str(RESULTS)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
