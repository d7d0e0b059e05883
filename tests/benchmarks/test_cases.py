"""The measured calls: named apart, the same every time, and counted right."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import cases, report
from benchmarks.cases import Case


@pytest.mark.parametrize("group", [cases.TABLE + cases.SWEEP, cases.CPU], ids=["gpu", "cpu"])
def test_names_are_unique_and_can_be_read_back(group: list[Case]) -> None:
    names = [str(case) for case in group]
    assert len(set(names)) == len(names)
    for case, name in zip(group, names, strict=True):
        parts = report.sizes({"case": name})
        assert (int(parts["batch"]), int(parts["s_q"])) == (case.batch, case.s_q)
        assert (int(parts["h_q"]), int(parts["length"])) == (case.h_q, case.length)


def test_lengths() -> None:
    for case in cases.TABLE:
        lengths = case.lengths()
        assert lengths.shape == (case.batch,)
        assert lengths.dtype == np.int32
        assert lengths.min() >= case.s_q
        np.testing.assert_array_equal(lengths, case.lengths())
    skew, even = (Case("", 64, 1, 16, 1024, spread).lengths() for spread in ("skew", "even"))
    assert sorted(set(skew.tolist())) == [1024, 128 * 1024]
    assert abs(int(skew.sum()) - int(even.sum())) < 64
    assert len(set(even.tolist())) == 1
    with pytest.raises(ValueError, match="sideways"):
        Case("", 1, 1, 1, 1, "sideways").lengths()


def test_counts() -> None:
    case = Case("", 2, 3, 5, 100)
    assert case.flop() == 2 * (2 * 3 * 5) * 100 * (576 + 512)
    assert case.bytes() == 2 * (2 * 100 * 576 + (2 * 3 * 5) * (576 + 512))
    assert Case("", 2, 3, 5, 100, dtype="float32").bytes() == 2 * case.bytes()
