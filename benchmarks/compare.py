"""Compares two records of the decode benchmark, and flags what has become slower beyond noise.

    python -m benchmarks.compare OLD.json NEW.json

Runs on different days or devices differ in power and clocks, so what is compared is each case's
share of its own run's ceiling. A case is slower when the share has fallen by more than the
tolerance and by more than three times the standard error of the medians. The exit status is 1 when
there is such a case.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import report

TOLERANCE = 0.03


class Change(NamedTuple):
    case: str
    old: float
    """Share of the ceiling."""
    new: float
    noise: float
    """Relative: three times the standard error of the ratio."""
    tolerance: float

    @property
    def ratio(self) -> float:
        """How many times as fast as before."""
        return self.new / self.old

    @property
    def verdict(self) -> str:
        limit = max(self.noise, self.tolerance)
        if self.ratio < 1 - limit:
            return "SLOWER"
        return "faster" if self.ratio > 1 + limit else ""


def spread(row: report.Row) -> float:
    """The relative standard error of the samples' median, from their median deviation from it."""
    samples = row.get("samples_us", ())
    if len(samples) < 2:
        return 0.0
    median = statistics.median(samples)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in samples)
    return 1.2533 * deviation / len(samples) ** 0.5 / median


def compare(old: report.Record, new: report.Record, tolerance: float = TOLERANCE) -> list[Change]:
    """The cases that both records have, in the new one's order."""
    before = {row["case"]: row for row in old["results"]["dense_decode"]}
    changes = []
    for row in new["results"]["dense_decode"]:
        if row["case"] not in before:
            continue
        previous = before[row["case"]]
        changes.append(
            Change(
                row["case"],
                report.share(previous, old["results"]["ceilings"]),
                report.share(row, new["results"]["ceilings"]),
                3 * (spread(previous) ** 2 + spread(row) ** 2) ** 0.5,
                tolerance,
            )
        )
    return changes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="relative; default %(default)s"
    )
    arguments = parser.parse_args(argv)
    old, new = report.load(arguments.old), report.load(arguments.new)
    changes = compare(old, new, arguments.tolerance)
    if not changes:
        print("the records have no case in common")
        return 1
    for name, record in (("old", old), ("new", new)):
        print(f"{name}: {record['device']}, {record['date']}, commit {record['commit']}")
    print(f"{'case':34}{'old':>7}{'new':>7}{'speed':>8}{'noise':>8}")
    for change in changes:
        shares = f"{change.old:>7.1%}{change.new:>7.1%}{change.ratio:>7.3f}x"
        print(f"{change.case:34}{shares}{change.noise:>8.1%}  {change.verdict}".rstrip())
    slower = sum(change.verdict == "SLOWER" for change in changes)
    print(f"{slower} of {len(changes)} cases are slower")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
