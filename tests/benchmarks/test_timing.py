"""Times from a profile, and from the host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import timing


def profile(*streams: list[tuple[int, int]]) -> SimpleNamespace:
    """A GPU profile with these (start, duration) in nanoseconds on its streams, and more."""

    def line(name, events):
        return SimpleNamespace(
            name=name, events=[SimpleNamespace(start_ns=s, duration_ns=d) for s, d in events]
        )

    gpu = [line(f"Stream #{i}(Compute)", events) for i, events in enumerate(streams)]
    gpu.append(line("XLA Modules", [(0, 10**9)]))
    host = [line("python", [(0, 10**9)])]
    return SimpleNamespace(
        planes=[
            SimpleNamespace(name="/host:CPU", lines=host),
            SimpleNamespace(name="/device:GPU:0", lines=gpu),
        ]
    )


def test_spans_of_equal_runs() -> None:
    first = [(1000, 200), (1300, 100), (5000, 250), (5300, 150)]
    second = [(1100, 700), (5100, 100)]  # ends after the run's last start
    events = timing.kernels(profile(first, second))
    assert timing.spans(events, 2) == pytest.approx([800e-9, 450e-9])


def test_runs_that_differ_are_refused() -> None:
    with pytest.raises(RuntimeError, match="3 kernels"):
        timing.spans(timing.kernels(profile([(0, 1), (2, 1), (4, 1)])), 2)
    with pytest.raises(RuntimeError, match="0 kernels"):
        timing.spans(timing.kernels(profile([])), 2)


def test_programs_take_turns() -> None:
    order: list[str] = []
    samples = timing.cpu_seconds([lambda: order.append("a"), lambda: order.append("b")], 0.0)
    assert order == ["a", "b"] * 6  # the first round is not timed
    assert [len(x) for x in samples] == [5, 5]
    assert all(x > 0 for mine in samples for x in mine)
