"""What only a GPU has room or reason for: huge pools and batches, and replayed CUDA graphs."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import flashmla_jax as fm

pytestmark = pytest.mark.gpu


def test_pools_beyond_32_bits() -> None:
    """Pages whose numbers lie beyond element 2^31 are written and read like any others."""
    rng = np.random.default_rng(0)
    problem = oracle.make_problem(rng, (300, 64, 1, 777), s_q=2, h_q=20)
    small = jnp.asarray(problem.k_cache)
    num_pages = 2**31 // (64 * 576) + 1000
    far = num_pages - small.shape[0]
    table = np.where(
        (problem.block_table >= 0) & (problem.block_table < small.shape[0]),
        problem.block_table + far,
        problem.block_table,
    ).astype(np.int32)

    @jax.jit
    def make_pool(small: jax.Array) -> jax.Array:
        pool = jnp.zeros((num_pages, *small.shape[1:]), small.dtype)
        rows = small.reshape(1, -1, *small.shape[2:])
        pages = jnp.arange(far, num_pages, dtype=jnp.int32)[None]
        start, count = jnp.zeros(1, jnp.int32), jnp.full(1, rows.shape[1], jnp.int32)
        return fm.cache_append(pool, rows, pages, start, count)

    pool = make_pool(small)
    np.testing.assert_array_equal(
        np.asarray(pool[far:]).view(np.uint16), np.asarray(small).view(np.uint16)
    )
    attend = jax.jit(lambda *operands: fm.flash_mla_with_kvcache(*operands, causal=True))
    got = attend(problem.q, pool, table, problem.cache_seqlens)
    want = attend(problem.q, small, problem.block_table, problem.cache_seqlens)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_batch_of_thousands() -> None:
    rng = np.random.default_rng(1)
    batch, num_pages = 20_000, 500
    k_cache = rng.standard_normal((num_pages, 64, 1, 576), np.float32).astype(jnp.bfloat16)
    q = rng.standard_normal((batch, 1, 3, 576), np.float32).astype(jnp.bfloat16)
    table = rng.integers(0, num_pages, (batch, 3)).astype(np.int32)
    lengths = rng.integers(0, 193, batch).astype(np.int32)
    out, lse = (np.asarray(x) for x in fm.flash_mla_with_kvcache(q, k_cache, table, lengths))
    some = np.sort(rng.choice(batch, 500, replace=False))
    sample = oracle.Problem(q[some], k_cache, table[some], lengths[some])
    oracle.assert_matches((out[some], lse[some]), oracle.attend(sample, 576**-0.5, False))
    np.testing.assert_array_equal(np.isneginf(lse[:, 0, 0]), lengths == 0)
    assert np.isfinite(out.astype(np.float32)).all()


def test_more_row_tiles_than_multiprocessors() -> None:
    rng = np.random.default_rng(2)
    problem = oracle.make_problem(rng, (700, 0, 90), s_q=150, h_q=64, dtype=jnp.bfloat16)
    actual = jax.jit(lambda *x: fm.flash_mla_with_kvcache(*x, causal=True))(*problem)
    oracle.assert_matches(actual, oracle.attend(problem, 576**-0.5, True))


def test_more_row_tiles_than_16_bits() -> None:
    rng = np.random.default_rng(4)
    s_q, h_q = 32_769, 128  # 65,538 tiles of 64 rows
    problem = oracle.make_problem(rng, (100,), dtype=jnp.bfloat16)
    q = jax.random.normal(jax.random.key(4), (1, s_q, h_q, 576), jnp.bfloat16)
    out, lse = jax.jit(fm.flash_mla_with_kvcache)(q, *tuple(problem)[1:])
    some = np.array([0, 1, 12_345, 32_766, 32_767, 32_768])
    sample = problem.replace(q=np.asarray(q[:, some]))
    oracle.assert_matches((out[:, some], lse[:, :, some]), oracle.attend(sample, 576**-0.5, False))


def test_steps_are_cuda_graphs(tmp_path: Path) -> None:
    """All kernels of a decode step are in graphs, or with `cuda_graph=False` ours are in none.

    XLA's profiler knows the graph that a kernel was launched from. The bits are the same.
    """
    rng = np.random.default_rng(5)
    problem = oracle.make_problem(rng, (1500, 900, 64, 2000), h_q=16)
    kv = rng.standard_normal((4, 1, 1, 576), np.float32).astype(jnp.bfloat16)
    results = []
    for graph in (True, False):

        @functools.partial(jax.jit, donate_argnums=0)
        def step(pool, q, kv, table, lengths, graph=graph):
            for _ in range(4):
                pool = fm.cache_append(
                    pool, kv, table, lengths - 1, jnp.ones_like(lengths), cuda_graph=graph
                )
                out, _ = fm.flash_mla_with_kvcache(q, pool, table, lengths, cuda_graph=graph)
                q = q.at[..., :512].set(out)
            return pool, q

        def run(step=step):
            operands = problem.k_cache, problem.q, kv, problem.block_table, problem.cache_seqlens
            return jax.block_until_ready(step(*map(jnp.array, operands)))

        for _ in range(3):
            run()
        with jax.profiler.trace(str(tmp_path / str(graph))):
            results.append(run())
        (path,) = (tmp_path / str(graph)).rglob("*.xplane.pb")
        kernels = [
            {name for name, _ in event.stats}
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            if plane.name.startswith("/device:GPU:")
            for line in plane.lines
            for event in line.events
            if "flashmla" in event.name
        ]
        assert len(kernels) >= 4 * 3  # a step appends, attends and combines
        assert all(("cuda_graph_id" in stats) == graph for stats in kernels)
    for with_graphs, without in zip(*results, strict=True):
        np.testing.assert_array_equal(
            np.asarray(with_graphs).view(np.uint16), np.asarray(without).view(np.uint16)
        )


def test_lengths_change_under_replay() -> None:
    """A program long enough to become a CUDA graph, replayed with other lengths and tables."""
    rng = np.random.default_rng(3)
    layers = 12
    problem = oracle.make_problem(rng, (1500, 900, 64, 2000), h_q=16)

    @jax.jit
    def steps(q, k_cache, table, lengths):
        results = []
        for _ in range(layers):
            out, lse = fm.flash_mla_with_kvcache(q, k_cache, table, lengths)
            results.append((out, lse))
            q = q.at[..., :512].set(out)
        return results

    one = jax.jit(fm.flash_mla_with_kvcache)
    for lengths in ((1500, 900, 64, 2000), (1, 900, 0, 5), (1500, 0, 64, 1999), (0, 0, 0, 0)):
        lengths = np.array(lengths, np.int32)
        table = np.where(
            np.arange(problem.block_table.shape[1]) < -(-lengths[:, None] // 64),
            problem.block_table,
            -1,
        ).astype(np.int32)
        # Other pages, in other places, in a buffer that is elsewhere.
        order = rng.permutation(len(problem.k_cache))
        pages = rng.standard_normal(problem.k_cache.shape, np.float32).astype(jnp.bfloat16)
        k_cache, q = jnp.asarray(pages), jnp.asarray(problem.q)
        table = np.where(table >= 0, order[table % len(order)], -1).astype(np.int32)
        for out, lse in steps(q, k_cache, table, lengths):
            want_out, want_lse = one(q, k_cache, table, lengths)
            for a, b in ((out, want_out), (lse, want_lse)):
                np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
            q = q.at[..., :512].set(out)
    assert steps._cache_size() == 1
