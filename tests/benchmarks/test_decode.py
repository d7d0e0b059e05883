"""The decode benchmark itself, on the CPU: one case from beginning to end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import oracle
import pytest

from benchmarks import append, cases, decode, experts, indexer, sparse, timing
from benchmarks.cases import Case

on_the_cpu = pytest.mark.skipif(jax.devices()[0].platform != "cpu", reason="measures the CPU")


@pytest.mark.parametrize("rival", [False, True])
def test_what_is_measured_is_attention(rival: bool) -> None:
    case = Case("", 3, 2, 4, 100, "varlen", "float32" if not rival else "bfloat16")
    if jax.devices()[0].platform == "gpu":
        case = Case("", 3, 2, 4, 100, "varlen")
    q, k_cache, tables, lengths = decode.inputs(case, calls=3, most_pools=2)
    assert len(tables) == 3
    for table in tables:
        problem = oracle.Problem(*map(np.asarray, (q, k_cache, table, lengths)))
        actual = jax.jit(decode.attention(case, rival))(q, k_cache, table, lengths)
        oracle.assert_matches(actual, oracle.attend(problem, 576**-0.5, True))


def test_calls_walk_through_different_pages() -> None:
    case = Case("", 2, 1, 4, 200)
    _, k_cache, tables, _ = decode.inputs(case, calls=3, most_pools=2)
    assert k_cache.shape[0] == 2 * 2 * 4
    first, second, _ = (set(np.asarray(table).ravel().tolist()) for table in tables)
    assert first.isdisjoint(second)


@on_the_cpu
def test_a_row() -> None:
    case = Case("cpu", 1, 1, 2, 70, rival=True)
    row = decode.measure(case)
    assert row["case"] == "b1 s1 h2 70 uniform"
    assert row["us"] == pytest.approx(float(np.median(row["samples_us"])), abs=0.01)
    assert row["gbps"] == pytest.approx(case.bytes() / row["us"] / 1e3, rel=0.02, abs=0.06)
    assert row["speedup"] == pytest.approx(row["gather_einsum_us"] / row["us"], rel=0.1)


@on_the_cpu
@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_a_processors_ceiling_is_the_faster_product(faster: str, monkeypatch) -> None:
    flop, programs = decode.products(gpu=False)
    for dtype, program in zip(("bfloat16", "float32"), programs, strict=True):
        assert {str(x.dtype) for x in program.args} == {dtype}
        assert str(program().dtype) == "float32"

    def cpu_seconds(programs):
        return [[0.001 if x.args[0].dtype == faster else 0.002] for x in programs]

    monkeypatch.setattr(timing, "cpu_seconds", cpu_seconds)
    assert decode.ceilings()["sustained_matmul_tflops"] == pytest.approx(flop / 1e9, abs=1e-3)


@on_the_cpu
def test_the_way_of_a_gpu(monkeypatch, tmp_path, capsys) -> None:
    """All that is done for a GPU, with programs that run here and times that are made up."""
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="Some GPU")
    runs = []

    def gpu_seconds(program, repeats=10):
        runs.append(len(jax.tree.leaves(program())))
        return [0.010, 0.012, 0.014]

    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    monkeypatch.setattr(timing, "gpu_seconds", gpu_seconds)
    monkeypatch.setattr(timing, "cpu_seconds", lambda programs: [[0.015] for _ in programs])
    monkeypatch.setattr(decode, "BEYOND_L2", 2**20)
    monkeypatch.setattr(decode, "LAYERS", 3)
    monkeypatch.setattr(decode, "RESULTS", tmp_path)
    monkeypatch.setattr(decode, "gpu_state", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(cases, "TABLE", [Case("baseline", 2, 1, 2, 70, rival=True)])
    appends = append.Case("decoding step", batch=3, num_tokens=1, cached=100, calls=4)
    monkeypatch.setattr(append, "CASES", [appends])
    monkeypatch.setattr(sparse, "CASES", [sparse.Case(2, 1, 2, 5, 64)])
    monkeypatch.setattr(indexer, "CASES", [indexer.Case(2, 16384, fp8=True)])
    monkeypatch.setattr(indexer.Case, "calls", lambda _: 3)
    monkeypatch.setattr(experts, "CASES", [experts.Case(20)])
    for name, value in {"EXPERTS": 5, "CHOSEN": 3, "HIDDEN": 32, "SIZE": 48}.items():
        monkeypatch.setattr(experts, name, value)
    monkeypatch.setattr(
        decode, "ceilings", lambda: {"read_gbps": 4000, "sustained_matmul_tflops": 600}
    )
    monkeypatch.setattr(
        decode.in_a_model, "__defaults__", (Case("in a model", 1, 1, 2, 100, dtype="float16"),)
    )
    assert decode.main([]) == 0
    record = json.loads((tmp_path / "some_gpu.json").read_text())
    (row,) = record["results"]["dense_decode"]
    calls = 8  # each gives out and lse
    assert runs[:2] == [2 * calls, 2 * 3]
    assert row["us"] == 12_000 / calls
    assert row["samples_us"] == [10_000 / calls, 12_000 / calls, 14_000 / calls]
    assert row["gather_einsum_us"] == 12_000 / 3
    layers = record["results"]["in_a_model"]
    assert (layers["device_us"], layers["host_us"]) == (12_000, 15_000)
    assert layers["host_share"] == pytest.approx(15 / (3 * layers["kernel_us"] / 1e3), abs=1e-3)
    (row,) = record["results"]["cache_append"]
    assert (row["case"], row["us"]) == ("decoding step", 12_000 / 4)
    # A gigabyte is read, and another written.
    assert record["results"]["ceilings"]["copy_gbps"] == round(2 * 2**30 / 0.012 / 1e9)
    (row,) = record["results"]["sparse_attention"]
    assert row["us"] == pytest.approx(12_000 / 60)
    (row,) = record["results"]["indexer"]
    assert row["us"] == row["xla_us"] == 12_000 / 3
    assert row["gbps"] == 1.2  # 2 * 16384 keys of 144 bytes in 4 ms
    (row,) = record["results"]["experts"]
    assert row["us"] == row["ragged_dot_us"] == 12_000 / experts.LAYERS
    assert row["reading_us"] == round(5 * 3 * 32 * 48 * 2 / 4000 / 1e3, 2)
    assert record["results"]["gpu"] == {"clocks.sm": "1980 MHz"}
    assert "| 2 | 1 | 2 | 70 | 1500 us | 4000 us |" in capsys.readouterr().out


@on_the_cpu
def test_some_cases_without_a_record(monkeypatch, capsys) -> None:
    monkeypatch.setattr(decode, "ceilings", lambda: {"read_gbps": 10, "sustained_matmul_tflops": 1})
    monkeypatch.setattr(timing.cpu_seconds, "__defaults__", (0.0,))
    monkeypatch.setattr(decode, "write_record", lambda *_: pytest.fail("wrote a record"))
    assert decode.main(["--only", "cpu: b(1|64) s1 h16 64"]) == 0
    out = capsys.readouterr().out
    assert "b64 s1 h16 64 uniform" in out
    assert "b1 s1 h16 64 uniform" in out
    assert "b8" not in out
    with pytest.raises(SystemExit):
        decode.main(["--only", "latncy"])
    assert "no case is matched by --only 'latncy'" in capsys.readouterr().err
