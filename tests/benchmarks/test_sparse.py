"""The benchmark of sparse attention: what its calls compute, on any device."""

from __future__ import annotations

import fp8_oracle
import jax
import numpy as np
import pytest

from benchmarks import sparse
from flashmla_jax.cache import layout


@pytest.mark.parametrize(
    "case",
    [
        sparse.Case(2, 2, 4, 20, 128),
        sparse.Case(2, 1, 4, 20, 128, fp8=True),
        sparse.Case(1, 5, 4, 20, 128, prefill=True),
    ],
    ids=str,
)
def test_what_is_measured_is_attention(case: sparse.Case) -> None:
    q, pool, lists = sparse.inputs(case)
    assert len(lists) == case.calls()
    assert not np.array_equal(lists[0], lists[1])
    out = jax.jit(lambda *args: sparse.attend(case, *args))(q, pool, lists[0])
    numbers = np.asarray(layout.dequantize(pool) if case.fp8 else pool, np.float64)
    numbers = numbers.reshape(-1, 576)
    assert len(numbers) == case.batch * case.tokens
    tokens = [numbers[places] for places in np.asarray(lists[0]).reshape(-1, case.topk)]
    rows = np.asarray(q).reshape(-1, case.h_q, 576)
    expected = fp8_oracle.attend_sparse(rows, tokens, 576**-0.5)
    np.testing.assert_allclose(
        np.asarray(out, np.float64).reshape(expected.out.shape), expected.out, rtol=0.05, atol=0.02
    )


def test_names_are_different() -> None:
    assert len({str(case) for case in sparse.CASES}) == len(sparse.CASES)
