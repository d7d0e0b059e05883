"""The benchmark of a whole model, with a small one."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from benchmarks import decode, model, record, timing
from flashmla_jax import engine
from flashmla_jax.cache import layout
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
    one, fp8, five = model.Case(1, 70), model.Case(1, 70, "fp8"), model.Case(5, 70)
    assert model.step_bytes(SMALL, params, one, 2) == others + experts * 2 / 8 + cached
    assert model.step_bytes(SMALL, params, fp8, 2) == others + experts * 2 / 8 + 70 * 2 * 656
    assert model.step_bytes(SMALL, params, five, 7.5) == pytest.approx(
        others + experts * 7.5 / 8 + 5 * cached
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_first_tokens(monkeypatch, dtype: str) -> None:
    """Each sequence begins with a token of its own, and a cache that holds its context."""
    monkeypatch.setattr(model, "STEPS", 2)
    ids, cache = model.start(SMALL, model.Case(100, 70, dtype))
    assert cache.is_fp8 == (dtype == "fp8")
    assert ids.shape == (100, 1)
    assert ids.dtype == jnp.int32
    assert len(set(np.asarray(ids)[:, 0])) == 100
    assert 0 <= ids.min() <= ids.max() < SMALL.vocab_size
    np.testing.assert_array_equal(cache.cache_seqlens, 70)
    for layer in range(SMALL.num_hidden_layers):
        tokens = np.asarray(cache.gather(layer), np.float32)[:, :70]
        assert abs(tokens.std() - 1) < 0.02


@pytest.mark.parametrize("batch", [1, 4])
def test_experts_that_are_read(monkeypatch, batch: int) -> None:
    """Of layers that add nothing, so that one can tell which tokens come, and their experts."""
    monkeypatch.setattr(model, "STEPS", 2)
    params = init_params(SMALL, jax.random.key(2), jnp.float32)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if re.search("o_proj|down_proj", jax.tree_util.keystr(path)) else x,
        params,
    )
    embedding, gate, head = (
        np.asarray(x, np.float64)
        for x in (
            params["embed_tokens"]["embedding"],
            params["layers"][1]["mlp"]["gate"]["kernel"],
            params["lm_head"]["kernel"],
        )
    )
    case = model.Case(batch, 70)
    ids, counts = np.asarray(model.start(SMALL, case)[0])[:, 0], []
    for _ in range(4 * 2):
        x = embedding[ids]
        x /= np.sqrt((x**2).mean(-1, keepdims=True))
        counts.append(len(set(np.argsort(-(x @ gate))[:, :2].ravel())))
        ids = (x @ head).argmax(-1)
    assert len(set(counts)) > 1 or batch == 1
    experts = model.experts_read(SMALL, deepseek.absorb(params, SMALL), case)
    assert experts == pytest.approx(np.mean(counts[2:]))


@pytest.mark.parametrize("is_fp8", [False, True])
def test_the_rival_is_attention(is_fp8: bool) -> None:
    """Of bfloat16 with sums in float32. Whatever is in no token is finite, in a model's cache."""
    problem = oracle.make_problem(np.random.default_rng(0), (1, 64, 100, 300, 513))
    k_cache = np.where(np.isnan(problem.k_cache), 1e3, problem.k_cache)
    k_cache = jnp.asarray(k_cache.astype(problem.q.dtype))
    pages = layout.quantize(k_cache) if is_fp8 else k_cache
    numbers = layout.dequantize(pages) if is_fp8 else k_cache
    problem = problem.replace(k_cache=np.asarray(numbers))
    out, lse = jax.jit(
        functools.partial(
            model.gather_einsum,
            head_dim_v=512,
            softmax_scale=0.1,
            causal=True,
            is_fp8_kvcache=is_fp8,
        )
    )(*problem.replace(k_cache=pages))
    assert out.dtype == jnp.bfloat16
    assert lse is None
    expected = oracle.attend(problem, 0.1, True)
    oracle.assert_matches((out, expected.lse), expected)


def test_the_way_of_a_gpu(monkeypatch, tmp_path) -> None:
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="Some GPU")
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    case = model.Case(2, 70)
    for name, value in {"CONFIG": SMALL, "CONTEXT": 70, "CASES": (case,), "STEPS": 2}.items():
        monkeypatch.setattr(model, name, value)
    monkeypatch.setattr(model, "RESULTS", tmp_path)
    monkeypatch.setattr(decode, "ceilings", lambda: {"read_gbps": 100})
    monkeypatch.setattr(timing, "gpu_kernels", three_kernels)
    programs = attentions_of_programs(monkeypatch)
    served = {"requests": 2, "context": 70, "chunk": 64}
    served |= {"prompt_tokens_per_s": 3000.4, "tokens_per_s": 4000.0}
    monkeypatch.setattr(model, "serve", lambda *_: served)
    assert model.main() == 0
    # A call per layer, when a program is traced.
    assert programs == [
        {"one_device": True, "op": 2, "gather_einsum": 0},
        {"one_device": False, "op": 2, "gather_einsum": 0},
        {"one_device": False, "op": 0, "gather_einsum": 2},
        {"one_device": True, "op": 2, "gather_einsum": 0},  # which counts experts
        {"one_device": True, "op": 2, "gather_einsum": 0},  # for a profile
    ]
    content = json.loads((tmp_path / "some_gpu_model.json").read_text())
    assert content["sources"] == list(record.MODELS)
    assert content["results"]["serving"] == [served] * 2
    (row,) = content["results"]["decode"]
    assert (row["batch"], row["context"], row["cache"]) == (2, 70, "bfloat16")
    assert row["tokens_per_s"] == pytest.approx(2e6 / row["step_us"], rel=1e-3)
    assert row["speedup"] == pytest.approx(
        row["gather_einsum_step_us"] / row["step_us"], rel=0.01, abs=0.01
    )
    assert row["of_the_floor"] == pytest.approx(row["floor_us"] / row["step_us"], abs=1e-3)
    assert row["attention_share"] == 0.3
    assert 2 <= row["experts_read"] <= 4
    params = deepseek.absorb(init_params(SMALL, jax.random.key(0)), SMALL)
    num_bytes = model.step_bytes(SMALL, params, case, row["experts_read"])
    assert row["floor_us"] == pytest.approx(num_bytes / 100e3, abs=0.06)
    row |= {"step_us": 200.0, "xla_layers_step_us": 300.0, "gather_einsum_step_us": 500.0}
    row |= {"tokens_per_s": 5000.0, "of_the_floor": 0.25}
    content["results"]["decode"].append(row | {"cache": "fp8", "tokens_per_s": 1.0})
    tables = model.markdown(content)
    assert "| 2 | FP8 | 200 us | 1 | 30% |" in tables
    assert "| 2 | bfloat16 | 200 us | 5000 | 30% | 300 us, 1.5x | 500 us, 2.5x | 25% |\n" in tables
    assert "| 2 | 4000 | 80% | 3000 |" in tables
    assert "in chunks of 64." in tables


def test_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request decodes while the clock runs, to the last step."""
    monkeypatch.setattr(model, "CHUNK", 32)
    monkeypatch.setattr(model, "STEPS", 2)
    engines, tokens = [], []

    class Engine(engine.Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            engines.append(self)

        def step(self):
            working = super().step()
            tokens.append([len(request.tokens) for request in self.running])
            return working

    monkeypatch.setattr(model, "Engine", Engine)
    row = model.serve(SMALL, init_params(SMALL, jax.random.key(0)), 3, 70)
    assert (row["requests"], row["context"], row["chunk"]) == (3, 70, 32)
    assert row["prompt_tokens_per_s"] > 0
    assert row["tokens_per_s"] == statistics.median(row["samples_tokens_per_s"])
    assert engines[0].stats.read_tokens == 3 * 70 + 32 + 1
    measured = np.array(tokens[-model.SAMPLES * model.STEPS - 1 :])
    assert measured.shape == (model.SAMPLES * model.STEPS + 1, 3)
    assert measured[0].all()
    assert (np.diff(measured, axis=0) == 1).all()


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
        model.attention_share(SMALL, None, model.Case(2, 70))


@pytest.mark.parametrize(
    ("name", "is_attention"),
    [
        (
            "void flashmla::sm90::wide::Kernel<__half, 2, flashmla::sm90::wide::Problem<>>(int)",
            True,
        ),
        ("_ZN8flashmla4sm9010narrow_fp86KernelINS0_9DenseCallELi16EEEvT_", True),
        ("void flashmla::sm90::paired::Kernel<flashmla::sm90::paired::Problem<>>(int)", True),
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
    assert with_kernels == {"wide", "paired", "narrow", "narrow_fp8", "combine"}
    for name in with_kernels - {"combine"}:
        assert f"namespace flashmla::sm90::{name} {{" in sources[name]
    assert "    CombineKernel(" in sources["combine"]


def attentions_of_programs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What the programs that decode will have called for attention, a dict for each."""
    programs: list[dict[str, int]] = []

    def counted(name, function):
        def call(*args, **kwargs):
            programs[-1][name] += 1
            return function(*args, **kwargs)

        return call

    def program(function):
        def call(config, params, *args):
            counts = {"op": 0, "gather_einsum": 0}
            programs.append({"one_device": "one_device" in params, **counts})
            return function(config, params, *args)

        return call

    for name in ("decoding", "experts_read"):
        monkeypatch.setattr(model, name, program(getattr(model, name)))
    monkeypatch.setattr(model, "gather_einsum", counted("gather_einsum", model.gather_einsum))
    op = counted("op", mla.flash_mla_with_kvcache)
    monkeypatch.setattr(mla, "flash_mla_with_kvcache", op)
    return programs


def test_without_a_gpu(monkeypatch, capsys) -> None:
    cpu = SimpleNamespace(platform="cpu", device_kind="Some CPU")
    monkeypatch.setattr(jax, "devices", lambda *_: [cpu])
    assert model.main() == 1
    assert "needs a Hopper GPU" in capsys.readouterr().out
