"""The README's examples run, each by itself, and what the documents call by name is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
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


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_and_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    paths = set(re.findall(r"`(?:python )?([a-z_]+/[\w/.]*|[\w/]+\.py)`", text))
    assert paths
    for path in paths - {"build/site"}:
        assert (ROOT / path).exists() or (ROOT / "flashmla_jax" / path).exists(), path


def test_figures_are_those_of_the_records() -> None:
    """Up to what one measurement differs from the next."""
    text = README.read_text()
    cases = {}
    for name in ("nvidia_h200", "cpu"):
        record = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        cases |= {result["case"]: result for result in record["results"]["dense_decode"]}

    row = r"^\| (\d+), (\d+), (\d+) \| (\d+) us \| (\d+) us \| ([\d.]+)x \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert rows
    for batch, heads, length, *figures in rows:
        case = cases[f"b{batch} s1 h{heads} {length} uniform"]
        recorded = [case["us"], case["gather_einsum_us"], case["speedup"]]
        assert list(map(float, figures)) == pytest.approx(recorded, rel=0.05)

    sentence = r"batch 8 with 16 heads and 4096 tokens each takes ([\d.]+) ms, ([\d.]+) times"
    case = cases["b8 s1 h16 4096 bfloat16"]
    figures = map(float, re.search(sentence, " ".join(text.split())).groups())
    assert list(figures) == pytest.approx([case["ms"], case["speedup"]], rel=0.05)
