"""The benchmark of a whole model, with a small one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import decode, model
from flashmla_jax.layers import mla
from flashmla_jax.models import DeepSeekConfig, deepseek, init_params

pytestmark = pytest.mark.usefixtures("on_cpu")

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
SMALL = dataclasses.replace(
    model.CONFIG,
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
)


def test_the_published_model() -> None:
    """Its sizes and its router. Another RoPE and other ends of a text cost the same."""
    published = DeepSeekConfig.from_json(CONFIGS / "deepseek-v2-lite.json")
    others = {"rope_scaling": None, "bos_token_id": None, "eos_token_id": None}
    assert dataclasses.replace(published, **others) == model.CONFIG


def test_bytes_of_a_step() -> None:
    params = deepseek.absorb(init_params(SMALL, jax.random.key(0)), SMALL)
    sizes = {
        jax.tree_util.keystr(path): leaf.nbytes
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    experts = sum(size for name, size in sizes.items() if "'experts'" in name)
    assert experts == 8 * 3 * 64 * 32 * 2
    others = sum(sizes.values()) - experts - 128 * 64 * 2
    cached = 70 * 2 * 576 * 2
    assert model.step_bytes(SMALL, params, 1, 70) == others + experts * 2 / 8 + cached
    assert model.step_bytes(SMALL, params, 1000, 70) == pytest.approx(
        others + experts + 1000 * cached
    )


def test_the_way_of_a_gpu(monkeypatch, tmp_path) -> None:
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="Some GPU")
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    for name, value in {"CONFIG": SMALL, "CONTEXT": 70, "BATCHES": (2,), "STEPS": 2}.items():
        monkeypatch.setattr(model, name, value)
    monkeypatch.setattr(model, "RESULTS", tmp_path)
    monkeypatch.setattr(decode, "ceilings", lambda: {"read_gbps": 100})
    monkeypatch.setattr(decode, "seconds_on_gpu", lambda *_, **__: [1e-6])
    uses = attentions_of_steps(monkeypatch)
    assert model.main() == 0
    # A call per layer, when a program is traced.
    assert uses == [{"op": 2, "gather_einsum": 0}, {"op": 0, "gather_einsum": 2}]
    record = json.loads((tmp_path / "some_gpu_model.json").read_text())
    (row,) = record["results"]["decode"]
    assert (row["batch"], row["context"]) == (2, 70)
    assert row["tokens_per_s"] == pytest.approx(2e6 / row["step_us"], rel=1e-3)
    assert row["speedup"] == pytest.approx(
        row["gather_einsum_step_us"] / row["step_us"], rel=0.01, abs=0.01
    )
    assert row["of_the_floor"] == pytest.approx(row["floor_us"] / row["step_us"], abs=1e-3)


def attentions_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What `step_seconds` will have called for attention, a dict for each time that it ran."""
    uses: list[dict[str, int]] = []

    def counted(name, function):
        def call(*args, **kwargs):
            uses[-1][name] += 1
            return function(*args, **kwargs)

        return call

    def step_seconds(*args):
        uses.append({"op": 0, "gather_einsum": 0})
        return timed(*args)

    timed = model.step_seconds
    monkeypatch.setattr(model, "step_seconds", step_seconds)
    monkeypatch.setattr(model, "gather_einsum", counted("gather_einsum", model.gather_einsum))
    op = counted("op", mla.flash_mla_with_kvcache)
    monkeypatch.setattr(mla, "flash_mla_with_kvcache", op)
    return uses


def test_without_a_gpu(monkeypatch, capsys) -> None:
    cpu = SimpleNamespace(platform="cpu", device_kind="Some CPU")
    monkeypatch.setattr(jax, "devices", lambda *_: [cpu])
    assert model.main() == 1
    assert "needs a Hopper GPU" in capsys.readouterr().out
