"""The README's examples run, each by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_three_examples_are_there() -> None:
    for name in ("flash_mla_with_kvcache", "PagedKVCache", "MultiHeadLatentAttention"):
        assert any(name in example for example in EXAMPLES)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
@pytest.mark.usefixtures("on_cpu")
def test_example(number: int) -> None:
    names: dict[str, object] = {}
    exec(compile(EXAMPLES[number], f"{README.name}, example {number}", "exec"), names)
    if "ok" in names:
        assert names["ok"]
    if "out" in names:
        assert names["out"].shape[0] == 2
