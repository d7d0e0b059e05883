"""The benchmark of appending: what its calls write, on any device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import append, timing
from benchmarks.append import Case

CASES = [
    Case("prompts", batch=2, num_tokens=130, cached=0, calls=3),
    Case("one prompt", batch=1, num_tokens=64, cached=0, calls=2),
    Case("decoding step", batch=5, num_tokens=1, cached=200, calls=4),
    Case("drafts", batch=5, num_tokens=3, cached=200, calls=2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_page_is_in_two_calls(case: Case) -> None:
    pool, calls = append.inputs(case)
    assert len(calls) == case.calls
    pages = np.concatenate([np.asarray(table).ravel() for _, table, _, _ in calls])
    np.testing.assert_array_equal(np.sort(pages[pages >= 0]), np.arange(pool.shape[0]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_measured_is_appending(case: Case) -> None:
    pool, calls = append.inputs(case)
    expected, written = np.asarray(pool).copy(), 0
    for call in calls:
        new_kv, table, start, count = map(np.asarray, call)
        for i, j in np.ndindex(case.batch, case.num_tokens):
            assert j < count[i]
            page, row = table[i, (start[i] + j) // 64], (start[i] + j) % 64
            assert page >= 0
            expected[page, row] = new_kv[i, j]
            written += 1
    assert written == case.calls * case.batch * case.num_tokens
    np.testing.assert_array_equal(append.append_all(pool, calls), expected)


def test_bytes_of_a_call() -> None:
    """As many as its tokens have, twice; they are not read from their pages."""
    assert Case("", batch=3, num_tokens=5, cached=70, calls=2).bytes() == 2 * 3 * 5 * 576 * 2
    for case in CASES:
        new_kv, *_ = append.inputs(case)[1][0]
        assert case.bytes() == 2 * new_kv.nbytes


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that ran in 12 us: each run goes on with the pool of the one before."""
    case = CASES[2]

    def gpu_seconds(program: timing.Program) -> list[float]:
        for _ in range(2):
            assert jnp.any(jax.block_until_ready(program()))
        return [10e-6, 12e-6, 14e-6]

    monkeypatch.setattr(timing, "gpu_seconds", gpu_seconds)
    row = append.measure(case)
    assert row["us"] == 3.0
    assert row["samples_us"] == [2.5, 3.0, 3.5]
    assert row["gbps"] == pytest.approx(case.bytes() / 3e3, abs=0.05)


def test_prompts_are_beyond_the_l2_cache() -> None:
    prompts = [case for case in append.CASES if "prompt" in case.name]
    assert len(prompts) == 2
    for case in prompts:
        assert case.calls * case.bytes() > 4 * 50 * 2**20  # which an H200 has
