"""Seconds, as the device counts them on a GPU, as the host does on a CPU."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

Program = Callable[[], Any]


class Kernel(NamedTuple):
    """What ran on a GPU's stream, and when, in seconds."""

    start: float
    end: float
    name: str


def gpu_seconds(program: Program, repeats: int = 10) -> list[float]:
    """Of each of `repeats` runs: from the start of its first kernel to the end of its last one."""
    return spans(gpu_kernels(program, repeats), repeats)


def gpu_kernels(program: Program, repeats: int = 10) -> list[Kernel]:
    """Those of `repeats` runs.

    Read from XLA's profiler, so that what the host does before and after does not count. Programs
    of a few custom calls and more are CUDA graphs by then.
    """
    for _ in range(3):  # compile, and record the graph
        jax.block_until_ready(program())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(program())
        (path,) = Path(folder).rglob("*.xplane.pb")
        return kernels(jax.profiler.ProfileData.from_file(str(path)))


def kernels(profile: Any) -> list[Kernel]:
    """All that ran on a GPU's streams, in order."""
    events = [
        Kernel(event.start_ns * 1e-9, (event.start_ns + event.duration_ns) * 1e-9, event.name)
        for plane in profile.planes
        if plane.name.startswith("/device:GPU:")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return sorted(events)


def spans(events: Sequence[Kernel], repeats: int) -> list[float]:
    """Cuts the events of equal runs, one after the other, into runs, and measures each."""
    if not events or len(events) % repeats:
        raise RuntimeError(f"{len(events)} kernels were seen, not the same number in each run")
    size = len(events) // repeats
    runs = [events[i : i + size] for i in range(0, len(events), size)]
    return [max(kernel.end for kernel in run) - run[0].start for run in runs]


def seconds_of(pattern: str, events: Sequence[Kernel]) -> float:
    """Of the kernels with such names, in all.

    A kernel may start while the one before it ends, and waits for that then: its time begins when
    all before it have ended.
    """
    total, ended = 0.0, 0.0
    for kernel in events:
        if re.search(pattern, kernel.name):
            total += max(kernel.end - max(kernel.start, ended), 0.0)
        ended = max(ended, kernel.end)
    return total


def cpu_seconds(programs: Sequence[Program], seconds: float = 2.0) -> list[list[float]]:
    """Of single runs of each program, called in turns for about `seconds`, 5 to 200 times.

    In turns, so that none finds its operands in the processor's caches, as in a model, where the
    weights have passed in between.
    """
    for program in programs:
        jax.block_until_ready(program())
    samples: list[list[float]] = [[] for _ in programs]
    end = time.perf_counter() + seconds
    while len(samples[0]) < 5 or (time.perf_counter() < end and len(samples[0]) < 200):
        for program, mine in zip(programs, samples, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program())
            mine.append(time.perf_counter() - start)
    return samples
