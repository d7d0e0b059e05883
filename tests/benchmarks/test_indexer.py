"""The benchmark of the indexer: what its calls compute, on any device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks import indexer
from flashmla_jax.cache.layout import PAGE_SIZE


@pytest.mark.parametrize("fp8", [False, True])
def test_what_is_measured_is_the_choice(fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "TOPK", 50)
    case = indexer.Case(2, 320, fp8)
    operands = indexer.inputs(case)
    tables, num_visible = operands[3:]
    assert len(tables) == case.calls()
    assert sorted(np.unique(tables)) == list(range(len(operands[2])))
    np.testing.assert_array_equal(num_visible, [[320], [320]])
    q, weights = (np.asarray(x, np.float64)[:, 0] for x in operands[:2])
    keys = np.asarray(operands[2])[..., :128].reshape(-1, PAGE_SIZE, 128)
    if fp8:
        keys = np.asarray(jax.lax.bitcast_convert_type(keys, "float8_e4m3fn"), np.float64)
    for table in np.asarray(tables)[:2]:
        chosen = jax.jit(indexer.choose)(*operands[:3], table, num_visible)
        composed = jax.jit(indexer.choose_composed)(*operands[:3], table, num_visible)
        for i in range(case.batch):
            of_sequence = np.float64(keys[table[i]]).reshape(-1, 128)
            scores = weights[i] @ np.maximum(q[i] @ of_sequence.T, 0)
            margin = 1e-3 * np.abs(scores).max()
            lowest = np.sort(scores)[-50]
            for positions in (chosen[i, 0], composed[i, 0]):
                assert set(np.flatnonzero(scores > lowest + margin)) <= set(positions.tolist())
                assert np.all(scores[positions] >= lowest - margin)
                assert len(set(positions.tolist())) == 50


def test_calls_read_from_memory() -> None:
    """Their keys are more than an L2 cache of 50 MiB holds, and no more than 5 GB."""
    for case in indexer.CASES:
        assert 60 * 2**20 < case.calls() * case.bytes() < 5e9


def test_names_are_different() -> None:
    assert len({str(case) for case in indexer.CASES}) == len(indexer.CASES)
