"""Turns a JUnit file of the test suite into a record for this GPU under results/.

pytest --junitxml=FILE; python -m benchmarks.record_tests FILE
"""

from __future__ import annotations

import argparse
import collections
import heapq
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.record import MODELS, RESULTS, device_name, device_slug, write_record

SLOWEST = 20  # tests that are named with the seconds that they took


def outcome(case: ET.Element) -> str:
    """What became of a test case: passed, failed, error or skipped."""
    for tag, name in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        if case.find(tag) is not None:
            return name
    return "passed"


def summarize(junit: Path) -> dict[str, Any]:
    """Outcomes in all and by module, the tests that did not pass, and those that took longest."""
    cases = list(ET.parse(junit).getroot().iter("testcase"))
    modules: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    not_passed: dict[str, list[str]] = collections.defaultdict(list)
    seconds: dict[str, float] = collections.defaultdict(float)
    for case in cases:
        module, name = case.get("classname", ""), case.get("name", "")
        modules[module][outcome(case)] += 1
        seconds[f"{module}::{name}"] += float(case.get("time", 0))
        if outcome(case) != "passed":
            not_passed[outcome(case)].append(f"{module}::{name}")
    return {
        "outcomes": dict(sum(modules.values(), collections.Counter())),
        "seconds": round(sum(seconds.values()), 1),
        "slowest": {
            name: round(seconds[name], 1)
            for name in heapq.nlargest(SLOWEST, seconds, key=seconds.__getitem__)
        },
        "modules": {module: dict(counts) for module, counts in sorted(modules.items())},
        "not_passed": dict(not_passed),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("junit", type=Path)
    arguments = parser.parse_args(argv)
    if jax.devices()[0].platform != "gpu":
        print(f"no record: the tests ran on {device_name()}, not on a GPU")
        return 1
    path = RESULTS / f"gpu_tests_{device_slug()}.json"
    path = write_record(path, summarize(arguments.junit), "make test-gpu", MODELS)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
