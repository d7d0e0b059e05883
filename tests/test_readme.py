"""The README's examples run, each by itself, and what the documents call by name is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from benchmarks import accuracy, model, prefill, report
from benchmarks.record import RESULTS
from flashmla_jax import PagedKVCache

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_examples_are_there() -> None:
    for name in (
        "flash_mla_with_kvcache",
        "PagedKVCache",
        "MultiHeadLatentAttention",
        "export_disabled_checks",
    ):
        assert any(name in example for example in EXAMPLES)


def run(number: int) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(EXAMPLES[number], f"{README.name}, example {number}", "exec"), names)
    if "ok" in names:
        assert names["ok"].all()
    if "out" in names:
        assert names["out"].shape[0] == 2
    return names


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
@pytest.mark.usefixtures("on_cpu")
def test_example(number: int) -> None:
    run(number)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_on_a_gpu(number: int) -> None:
    run(number)


@pytest.mark.usefixtures("on_cpu")
def test_the_layers_example_is_for_gpus_too() -> None:
    (number,) = (i for i, e in enumerate(EXAMPLES) if "MultiHeadLatentAttention(" in e)
    names = run(number)
    graph, state = nnx.split(names["serving"])

    def decode(state: nnx.State, x: jax.Array, cache: PagedKVCache) -> Any:
        return nnx.merge(graph, state).decode(x, cache)

    traced = jax.jit(decode).trace(state, names["x"], names["cache"])
    traced.lower(lowering_platforms=("cuda",))  # which says so where there is no kernel


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "docs/fp8.md", "docs/kernel.md", "docs/scaling.md"]
)
def test_commands_and_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    paths = set(re.findall(r"`(?:python )?([a-z_]+/[\w/.]*|[\w/]+\.py)`", text))
    assert paths
    for path in paths - {"build/site"}:
        assert (ROOT / path).exists() or (ROOT / "flashmla_jax" / path).exists(), path


def test_figures_of_fp8_caches() -> None:
    record = json.loads((RESULTS / "accuracy.json").read_text())
    assert accuracy.markdown(record) in (ROOT / "docs" / "fp8.md").read_text()


def test_figures_of_appending() -> None:
    results = json.loads((RESULTS / "nvidia_h200.json").read_text())["results"]
    prompts, prompt, step = results["cache_append"]
    copy = results["ceilings"]["copy_gbps"]
    text = " ".join((ROOT / "docs" / "kernel.md").read_text().split())
    assert prompts["case"] == "b8 prompts of 4096"
    assert f"eight prompts of 4096 tokens at {prompts['gbps'] / 1e3:.2f} TB/s" in text
    assert prompt["case"] == "b1 prompt of 16384"
    assert f"reaches {copy / 1e3:.2f} (a prompt of 16 K: {prompt['gbps'] / 1e3:.2f})" in text
    assert step["case"] == "b128 decoding step"
    assert f"the 128 tokens of a decoding step in {step['us']:.1f} us" in text


def test_figures_of_a_model() -> None:
    record = json.loads((RESULTS / "nvidia_h200_model.json").read_text())
    assert model.markdown(record) in README.read_text()


def test_figures_of_prefill() -> None:
    record = json.loads((RESULTS / "nvidia_h200_prefill.json").read_text())
    assert prefill.markdown(record) in README.read_text()


@pytest.mark.parametrize("name", ["nvidia_h200", "nvidia_h100_80gb_hbm3", "cpu"])
def test_figures_are_those_of_the_records(name: str) -> None:
    assert report.markdown(report.load(RESULTS / f"{name}.json")) in README.read_text()
