"""The cases that `make sanitize` puts under compute-sanitizer, without it, on any device."""

from __future__ import annotations

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("sanitize", Path(__file__).with_name("sanitize.py"))
sanitize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitize)


def test_cases() -> None:
    sanitize.run_cases()
