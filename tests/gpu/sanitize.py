"""Runs the kernels under compute-sanitizer: memcheck, racecheck and synccheck.

    python tests/gpu/sanitize.py                  every tool; a record under benchmarks/results/
    python tests/gpu/sanitize.py --cases cache    a group of cases alone, as each tool runs them

The grid is small, because racecheck makes a kernel a hundred times slower. Results are checked too:
a kernel that does nothing has no errors.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in (".", "models", "ops")]
sys.path.append(str(ROOT))

TOOLS = ("memcheck", "racecheck", "synccheck")
LIMIT = 200  # seconds, for each group of cases
ENVIRONMENT = {
    # Every buffer gets an allocation of its own, so that memcheck sees where it ends.
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # Graphs would hide which launch failed; and XLA is not to try out its own kernels.
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    " --xla_gpu_autotune_level=0",
    "JAX_PLATFORMS": "cuda,cpu",
    # What compiles in a second has been seen to take minutes under a tool: so all is compiled
    # before.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


class Case(NamedTuple):
    lengths: tuple[int, ...]
    s_q: int = 1
    h_q: int = 16
    h_kv: int = 1
    causal: bool = False
    dtype: str = "bf16"
    deterministic: bool | str = True
    fp8: bool = False


DENSE_DECODE = {
    "one sequence, split, tail page": Case((300,)),
    "one token": Case((1,), h_q=1),
    "lengths around page borders, causal": Case(
        (0, 1, 63, 64, 65, 130), s_q=2, h_q=9, causal=True, dtype="f16"
    ),
    "two tiles of heads": Case((200, 65), h_q=128),
    "ragged tiles, two KV heads, causal": Case((129, 3, 64), s_q=4, h_q=42, h_kv=2, causal=True),
    "more sequences than multiprocessors": Case((70, 1, 0) * 60, h_q=3),
    "many pages to a thread block": Case((20_000, 9_999), s_q=2, h_q=7, causal=True),
    "many pages to a cluster": Case((13_000, 64, 2_000), h_q=128),
    "few parts to a sequence": Case((300, 400) * 8, s_q=3, h_q=16, causal=True),
    "batch-invariant, narrow": Case((2_200, 5, 4_097), h_q=9, deterministic="batch_invariant"),
    "batch-invariant, wide": Case((2_200, 0), h_q=128, deterministic="batch_invariant"),
    "fp8, up to 16 rows": Case((300, 0, 65), h_q=9, fp8=True),
    "fp8, up to 32 rows, two KV heads, causal": Case(
        (129, 64), s_q=2, h_q=24, h_kv=2, causal=True, fp8=True
    ),
    "fp8, a tile": Case((200, 1), h_q=64, fp8=True),
    "fp8, two tiles, batch-invariant": Case(
        (200, 65), h_q=128, fp8=True, deterministic="batch_invariant"
    ),
    "fp8, many pages to a thread block": Case((9_000,), h_q=3, fp8=True),
}


class SparseCase(NamedTuple):
    shape: tuple[int, int, int]
    """batch, s_q, topk"""
    h_q: int
    fmt: str = "bf16"
    head_dim: int = 576
    page_size: int = 64


SPARSE = {
    "listed tokens": SparseCase((2, 1, 200), 64),
    "listed tokens, 512 columns": SparseCase((1, 3, 70), 3, head_dim=512),
    "more query tokens than multiprocessors": SparseCase((1, 300, 20), 5),
    "listed fp8 tokens, up to 16 rows": SparseCase((2, 1, 200), 9, "fp8", page_size=20),
    "listed fp8 tokens, up to 32 rows": SparseCase((2, 2, 330), 30, "fp8", page_size=20),
    "listed fp8 tokens, a tile": SparseCase((2, 1, 200), 50, "fp8", page_size=20),
    "listed fp8 tokens, two tiles": SparseCase((2, 2, 130), 128, "fp8"),
    "listed fp8 tokens of 512, a tile": SparseCase((2, 1, 130), 64, "fp8", 512, page_size=5),
    "listed fp8 tokens of 512, two tiles": SparseCase((1, 2, 130), 128, "fp8", 512),
}


def run_attention() -> None:
    """Dense and sparse attention."""
    import fp8_oracle
    import jax
    import numpy as np
    import oracle
    import test_fp8
    import test_sparse

    import flashmla_jax as fm

    rng = np.random.default_rng(0)
    for name, case in DENSE_DECODE.items():
        sizes = {"s_q": case.s_q, "h_q": case.h_q, "h_kv": case.h_kv}
        dtype = oracle.DTYPES[case.dtype]
        if case.fp8:
            problem, exact = test_fp8.make_problem(rng, case.lengths, dtype, **sizes)
        else:
            problem = exact = oracle.make_problem(rng, case.lengths, dtype=dtype, **sizes)
        attend = jax.jit(
            functools.partial(
                fm.flash_mla_with_kvcache,
                causal=case.causal,
                deterministic=case.deterministic,
                is_fp8_kvcache=case.fp8,
            )
        )
        oracle.assert_matches(attend(*problem), oracle.attend(exact, causal=case.causal))
        print(f"{name}: correct", flush=True)

    for name, case in SPARSE.items():
        batch, s_q, topk = case.shape
        counted = rng.integers(0, topk + 1, batch).astype(np.int32)
        scopes = [
            test_sparse.Scope(rng, case.head_dim, case.fmt, shape, case.page_size, count, case.h_q)
            for shape, count in ((case.shape, counted), ((batch, s_q, 70), None))
        ]
        q = rng.standard_normal((batch, s_q, case.h_q, case.head_dim), np.float32)
        q = q.astype(test_sparse.BF16)
        sink = rng.standard_normal(case.h_q).astype(np.float32)
        attend = jax.jit(functools.partial(test_sparse.attend, is_fp8_kvcache=case.fmt == "fp8"))
        actual = attend(
            *(q, scopes[0].pool, scopes[0].indices, scopes[1].pool, scopes[1].indices, sink),
            topk_length=counted,
        )
        tokens = [np.concatenate(x) for x in zip(*(x.tokens() for x in scopes), strict=True)]
        rows = q.reshape(-1, case.h_q, case.head_dim)
        expected = fp8_oracle.attend_sparse(rows, tokens, case.head_dim**-0.5, sink)
        test_sparse.assert_matches(actual, expected, batch)
        print(f"{name}: correct", flush=True)


def run_cache() -> None:
    """Appending, and choosing tokens by an indexer's keys."""
    import jax
    import numpy as np
    import oracle
    import test_index_topk

    import flashmla_jax as fm

    rng = np.random.default_rng(0)
    append = jax.jit(fm.cache_append, donate_argnums=0)
    for h_kv, tokens in ((1, 7), (2, 7), (1, 350), (2, 350)):
        problem = oracle.make_problem(rng, (450, 0, 400), h_kv=h_kv)
        table, num_pages = problem.block_table, len(problem.k_cache)
        if table[1, 0] in [*table[0, :8], *table[2, :7]]:  # a row that two write is either's
            table[1, 0] = num_pages
        new_kv = rng.standard_normal((3, tokens, h_kv, 576), np.float32).astype(problem.q.dtype)
        start, count = np.array([62, 0, 90], np.int32), np.array([tokens, 7, 3], np.int32)
        expected = problem.k_cache.copy()
        for i, j in np.ndindex(3, tokens):
            slot, row = divmod(int(start[i]) + j, 64)
            if j < count[i] and 0 <= table[i, slot] < num_pages:
                expected[table[i, slot], row] = new_kv[i, j]
        pool = append(jax.device_put(problem.k_cache), new_kv, table, start, count)
        assert np.asarray(pool).tobytes() == expected.tobytes()
        print(f"cache_append, {h_kv} KV heads, {tokens} tokens: correct", flush=True)

    # One thread block to a query's scores; and a cluster.
    for lengths, s, heads, topk in (((300, 65, 0), 3, 70, 64), ((9_000,), 1, 5, 700)):
        for fmt in test_index_topk.FORMATS:
            problem = test_index_topk.Problem(rng, lengths, s, heads, fmt)
            chosen = test_index_topk.choose(*problem.arguments(), topk=topk)
            np.testing.assert_array_equal(chosen, problem.wanted(topk))
            print(f"indexer, {fmt} keys of {lengths}: correct", flush=True)


def run_few_tokens() -> None:
    """Steps of whole models."""
    import jax
    import test_few_tokens

    for name, shape, cache_dtype in (
        ("V3", (1, 1), None),
        ("V3", (2, 2), "fp8"),
        ("heads", (1, 1), "fp8"),
        ("small", (2, 2), None),
        ("small", (1, 1), "fp8"),
    ):
        config, dtype = test_few_tokens.CONFIGS[name], jax.numpy.bfloat16
        test_few_tokens.check(config, *shape, int(shape == (2, 2)), dtype, cache_dtype)
        print(f"few tokens, {name}, {shape}, cache {cache_dtype}: correct", flush=True)
    test_few_tokens.check_logits((2, 2), 4288, 320, jax.numpy.bfloat16)
    print("logits of few tokens: correct", flush=True)


def run_experts() -> None:
    """Tokens that make blocks of 16, 64 and 128 rows for their experts."""
    import jax
    import test_routed_experts_on_a_gpu

    from flashmla_jax.ops import routed_experts as moe

    for tokens in (16, 200, 400):
        case = test_routed_experts_on_a_gpu.make(8, tokens, 2, 328, 1032, jax.numpy.bfloat16)
        out, want = jax.jit(moe.routed_experts)(*case), test_routed_experts_on_a_gpu.exact(case)
        error = test_routed_experts_on_a_gpu.relative_error(out, want)
        assert error < 8e-3, (tokens, error)
        print(f"experts of {tokens} tokens: correct", flush=True)


GROUPS = {
    "attention": run_attention,
    "cache": run_cache,
    "few tokens": run_few_tokens,
    "experts": run_experts,
}


def run_cases() -> None:
    """Runs every case once on the default device and compares the results."""
    for run in GROUPS.values():
        run()


def find_sanitizer() -> str:
    """compute-sanitizer: $COMPUTE_SANITIZER, on PATH, or in a CUDA toolkit."""
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *Path("/usr/local").glob("cuda-*")]
    candidates = [os.environ.get("COMPUTE_SANITIZER"), "compute-sanitizer"]
    candidates += [f"{root}/bin/compute-sanitizer" for root in roots if root]
    for candidate in filter(None, candidates):
        if found := shutil.which(candidate):
            return found
    raise SystemExit("compute-sanitizer is not on PATH; COMPUTE_SANITIZER can say where it is")


def run_tool(command: Sequence[str], tool: str, group: str, cache: str) -> dict[str, Any]:
    """Runs a group of cases under a tool, showing its output; what it found."""
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, sys.executable, __file__, "--cases", group],
        env=os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    summary = f"no summary after {LIMIT} s"
    timer = threading.Timer(LIMIT, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        for line in process.stdout:
            print(f"{tool} {time.monotonic() - start:4.0f} s: {line}", end="", flush=True)
            if "SUMMARY" in line:
                summary = line.strip("= \n")
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    finally:
        timer.cancel()
    clean = process.wait() == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", summary) is not None
    return {"clean": clean, "summary": summary, "seconds": round(time.monotonic() - start, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=GROUPS, help="run these cases, without a tool")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="default: all, side by side")
    arguments = parser.parse_args(argv)
    if arguments.cases:
        GROUPS[arguments.cases]()
        return 0

    sanitizer = find_sanitizer()
    tools = arguments.tool or TOOLS
    runs = [(tool, group) for group in GROUPS for tool in tools]
    with tempfile.TemporaryDirectory() as cache, concurrent.futures.ThreadPoolExecutor(12) as pool:
        # Without a tool, and to compile all programs.
        list(pool.map(lambda group: run_tool([], "no tool", group, cache), GROUPS))

        def run(tool: str, group: str) -> dict[str, Any]:
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=99"]
            # XLA probes the driver with calls that may fail; a failed launch of ours is an error
            # anyhow. And it is our kernels that are examined, not those of XLA and its libraries.
            command += ["--report-api-errors=no", "--kernel-regex=kns=flashmla"]
            command += ["--target-processes=application-only"]
            return run_tool(command, tool, group, cache)

        # They spend their time on the CPU.
        results = dict(zip(runs, pool.map(run, *zip(*runs, strict=True)), strict=True))
    for (tool, group), result in results.items():
        clean = "clean" if result["clean"] else "NOT CLEAN"
        print(f"{tool}, {group}: {clean} ({result['summary']})")
    if arguments.tool is None:
        from benchmarks.record import RESULTS, device_slug, write_record

        by_tool = {tool: {group: results[tool, group] for group in GROUPS} for tool in tools}
        path = RESULTS / f"sanitizer_{device_slug()}.json"
        print(f"wrote {write_record(path, by_tool, 'make sanitize')}")
    return not all(result["clean"] for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
