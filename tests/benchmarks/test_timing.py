"""Times from a profile, and from the host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import timing


def profile(*streams: list[tuple]) -> SimpleNamespace:
    """A GPU profile with these (start, duration) in nanoseconds on its streams, and more.

    A third element is a kernel's name.
    """

    def line(name, events):
        events = [
            SimpleNamespace(start_ns=start, duration_ns=duration, name="".join(rest))
            for start, duration, *rest in events
        ]
        return SimpleNamespace(name=name, events=events)

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


def test_time_of_some_kernels() -> None:
    """One that starts before another has ended waits for it, on whatever stream that is."""
    first = [(0, 100, "x"), (90, 60, "a1"), (200, 50, "a2"), (400, 10, "x")]
    second = [(210, 20, "a3"), (230, 100, "x"), (320, 50, "a4")]
    kernels = timing.kernels(profile(first, second))
    assert [kernel.name for kernel in kernels] == ["x", "a1", "a2", "a3", "x", "a4", "x"]
    assert timing.seconds_of("a[1-3]", kernels) == pytest.approx(100e-9)
    assert timing.seconds_of("^a", kernels) == pytest.approx(140e-9)
    assert timing.seconds_of("x", kernels) == pytest.approx(190e-9)
    assert timing.seconds_of("b", kernels) == 0


def test_programs_take_turns() -> None:
    order: list[str] = []
    samples = timing.cpu_seconds([lambda: order.append("a"), lambda: order.append("b")], 0.0)
    assert order == ["a", "b"] * 6  # the first round is not timed
    assert [len(x) for x in samples] == [5, 5]
    assert all(x > 0 for mine in samples for x in mine)
