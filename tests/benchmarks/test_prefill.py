"""The benchmark of reading prompts, with short ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import prefill, timing
from flashmla_jax.layers import MLAConfig
from flashmla_jax.models import DeepSeekConfig

pytestmark = pytest.mark.usefixtures("on_cpu")

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
SMALL = MLAConfig(hidden_size=32, num_heads=2, q_lora_rank=16, qk_nope_head_dim=16, v_head_dim=16)
ROW = {
    "tokens": 128,
    "chunk": 64,
    "absorb_prefix": True,
    "fp8": False,
    "us": 10.0,
    "samples_us": [10.0],
    "tokens_per_s": 12_800_000,
}


def test_the_published_layer() -> None:
    published = DeepSeekConfig.from_json(CONFIGS / "deepseek-v3.json").mla
    assert dataclasses.replace(published, rope_scaling=None) == prefill.CONFIG


def test_chunks_are_the_same_prompt() -> None:
    """However long they are, and attend to what came before; and each time it begins anew."""
    outs = {}
    cases = [(64, False, False), (64, True, False), (128, True, False), (256, False, False)]
    for case in [*cases, (64, True, True)]:
        chunk = case[0]
        program = prefill.Chunks(256, *case).program(SMALL)
        first, again = np.asarray(program(), np.float32), np.asarray(program(), np.float32)
        np.testing.assert_array_equal(first, again)
        assert first.shape == (1, chunk, 32)
        outs[case] = first[:, -64:]
    whole = outs.pop((256, False, False))
    for (*_, fp8), out in outs.items():
        tolerance = 0.1 if fp8 else 0.02
        assert 0 < np.linalg.norm(out - whole) < tolerance * np.linalg.norm(whole)
    assert not np.array_equal(outs[64, False, False], outs[64, True, False])


def test_work_of_attention() -> None:
    """A multiply and an add for each number of a key and a value that a query sees."""
    tokens, heads, head_dim = 256, 2, 16 + 64 + 16
    pairs = tokens * (tokens + 1) / 2
    flops = prefill.Attention(tokens).flops(SMALL)
    assert flops == pytest.approx(2 * pairs * heads * head_dim, rel=0.01)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of programs that ran in 10 us."""

    def gpu_seconds(program: timing.Program, repeats: int) -> list[float]:
        jax.block_until_ready(program())
        return [10e-6, 9e-6, 12e-6][:repeats]

    monkeypatch.setattr(timing, "gpu_seconds", gpu_seconds)
    monkeypatch.setattr(prefill, "IMPLEMENTATIONS", ("xla",))
    case = prefill.Attention(128)
    (row,) = prefill.measure_attention(case, SMALL)
    assert (row["tokens"], row["implementation"], row["us"]) == (128, "xla", 10)
    assert row["tflops"] == round(case.flops(SMALL) / 10e-6 / 1e12, 1)
    chunks = prefill.measure_chunks(prefill.Chunks(128, 64, True), SMALL)
    assert (chunks["chunk"], chunks["us"], chunks["tokens_per_s"]) == (64, 10, 12_800_000)
    results = {"attention": [row], "chunks": [chunks]}
    content = {"results": results, "device": "GPU", "date": "today", "command": "make bench"}
    table = prefill.markdown(json.loads(json.dumps(content)))
    assert f"| 128 | xla | 10 us | {row['tflops']} |" in table
    assert "| 128 | 64 | bfloat16 | as it lies | 10 us | 12800000 |" in table


def test_the_way_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="Some GPU")
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    values = {"RESULTS": tmp_path, "ATTENTION": [], "CHUNKS": [prefill.Chunks(128, 64, True)]}
    for name, value in values.items():
        monkeypatch.setattr(prefill, name, value)
    monkeypatch.setattr(prefill, "measure_chunks", lambda case: {**ROW, "chunk": case.chunk})
    assert prefill.main() == 0
    content = json.loads((tmp_path / "some_gpu_prefill.json").read_text())
    assert content["results"] == {"attention": [], "chunks": [ROW]}
    assert content["sources"] == list(prefill.SOURCES)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cpu = SimpleNamespace(platform="cpu", device_kind="Some CPU")
    monkeypatch.setattr(jax, "devices", lambda *_: [cpu])
    assert prefill.main() == 1
    assert "needs a Hopper GPU" in capsys.readouterr().out
