"""The benchmark of a whole model, with a small one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import decode, model, record, timing
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
    monkeypatch.setattr(timing, "gpu_kernels", three_kernels)
    programs = attentions_of_programs(monkeypatch)
    assert model.main() == 0
    # A call per layer, when a program is traced: what was, is not again for the profile.
    assert programs == [
        {"one_device": True, "op": 2, "gather_einsum": 0},
        {"one_device": True, "op": 0, "gather_einsum": 0},
        {"one_device": False, "op": 2, "gather_einsum": 0},
        {"one_device": False, "op": 0, "gather_einsum": 2},
    ]
    content = json.loads((tmp_path / "some_gpu_model.json").read_text())
    assert content["sources"] == list(record.MODELS)
    (row,) = content["results"]["decode"]
    assert (row["batch"], row["context"]) == (2, 70)
    assert row["tokens_per_s"] == pytest.approx(2e6 / row["step_us"], rel=1e-3)
    assert row["speedup"] == pytest.approx(
        row["gather_einsum_step_us"] / row["step_us"], rel=0.01, abs=0.01
    )
    assert row["of_the_floor"] == pytest.approx(row["floor_us"] / row["step_us"], abs=1e-3)
    assert row["attention_share"] == 0.3
    row |= {"step_us": 200.0, "xla_layers_step_us": 300.0, "gather_einsum_step_us": 500.0}
    row |= {"tokens_per_s": 5000.0, "of_the_floor": 0.25}
    assert "| 2 | 200 us | 5000 | 30% | 300 us, 1.5x | 500 us, 2.5x | 25% |\n" in model.markdown(
        content
    )


def three_kernels(program: timing.Program, repeats: int) -> list[timing.Kernel]:
    """Of each run, of which one is the op's and takes 0.3 of the time."""
    jax.block_until_ready(program())
    names = ("fusion", "void flashmla::sm90::narrow::Kernel<__nv_bfloat16, 16>(int)", "fusion")
    return [
        timing.Kernel(10 * run + begin, 10 * run + end, name)
        for run in range(repeats)
        for name, begin, end in zip(names, (0, 2, 5), (2, 5, 10), strict=True)
    ]


def test_a_profile_without_the_op(monkeypatch) -> None:
    monkeypatch.setattr(model, "decoding", lambda *_: lambda: None)
    monkeypatch.setattr(timing, "gpu_kernels", lambda *_: [timing.Kernel(0, 1, "fusion")] * 10)
    with pytest.raises(RuntimeError, match="none of 10 kernels has one of the op's names"):
        model.attention_share(SMALL, None, 2, 70)


@pytest.mark.parametrize(
    ("name", "is_attention"),
    [
        (
            "void flashmla::sm90::wide::Kernel<__half, 2, flashmla::sm90::wide::Problem<>>(int)",
            True,
        ),
        ("_ZN8flashmla4sm9010narrow_fp86KernelINS0_9DenseCallELi16EEEvT_", True),
        ("void flashmla::sm90::(anonymous namespace)::CombineKernel<float>(int)", True),
        ("void flashmla::sm90::(anonymous namespace)::LinearKernel<float>(int)", False),
        ("_ZN8flashmla4sm9012_GLOBAL__N_117CacheAppendKernelENS0_17CacheAppendParamsE", False),
        ("void cutlass::Kernel<narrow>(int)", False),
    ],
)
def test_names_of_attentions_kernels(name: str, is_attention: bool) -> None:
    assert bool(re.search(model.ATTENTION, name)) == is_attention


def test_attention_has_no_other_kernels() -> None:
    """Each shape has its kernel in a namespace of its own; the combine has its name."""
    folder = record.ROOT / "csrc" / "sm90" / "attention"
    sources = {path.stem: path.read_text() for path in folder.iterdir()}
    with_kernels = {name for name, text in sources.items() if "__global__" in text}
    assert with_kernels == {"wide", "narrow", "narrow_fp8", "combine"}
    for name in with_kernels - {"combine"}:
        assert f"namespace flashmla::sm90::{name} {{" in sources[name]
    assert "    CombineKernel(" in sources["combine"]


def attentions_of_programs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What the programs of `decoding` will have called for attention, a dict for each."""
    programs: list[dict[str, int]] = []

    def counted(name, function):
        def call(*args, **kwargs):
            programs[-1][name] += 1
            return function(*args, **kwargs)

        return call

    def decoding(config, params, *args):
        counts = {"op": 0, "gather_einsum": 0}
        programs.append({"one_device": "one_device" in params, **counts})
        return original(config, params, *args)

    original = model.decoding
    monkeypatch.setattr(model, "decoding", decoding)
    monkeypatch.setattr(model, "gather_einsum", counted("gather_einsum", model.gather_einsum))
    op = counted("op", mla.flash_mla_with_kvcache)
    monkeypatch.setattr(mla, "flash_mla_with_kvcache", op)
    return programs


def test_without_a_gpu(monkeypatch, capsys) -> None:
    cpu = SimpleNamespace(platform="cpu", device_kind="Some CPU")
    monkeypatch.setattr(jax, "devices", lambda *_: [cpu])
    assert model.main() == 1
    assert "needs a Hopper GPU" in capsys.readouterr().out
