"""Records of measurements: complete, on target, and a warning when the kernels have changed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import record, record_tests
from flashmla_jax.engine import CHUNK

RECORDS = sorted(record.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_record(path: Path) -> None:
    content = json.loads(path.read_text())
    for key in ("device", "date", "command", "commit", "source_hash", "versions", "results"):
        assert key in content
    if not record.is_fresh(content):
        warnings.warn(
            f"{path.name} was measured with other sources; run `{content['command']}` again",
            pytest.PytestWarning,
            stacklevel=1,
        )


def test_a_whole_models_targets() -> None:
    content = json.loads((record.RESULTS / "nvidia_h200_model.json").read_text())
    rows = {(row["batch"], row["cache"]): row for row in content["results"]["decode"]}
    few = [(1, "bfloat16"), (1, "fp8")]
    assert sorted(rows) == sorted([*few, (32, "bfloat16"), (128, "bfloat16")])
    for row in rows.values():
        assert row["context"] == 4096
        assert 0 < row["attention_share"] < 1
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_us"] * 1e6, rel=1e-3)
        assert row["step_us"] < row["gather_einsum_step_us"]
    for case in few:  # all layers are one call
        assert rows[case]["step_us"] < 0.75 * rows[case]["xla_layers_step_us"]
    for row in content["results"]["serving"]:
        assert row["chunk"] == CHUNK
        assert row["prompt_tokens_per_s"] > row["tokens_per_s"]


@pytest.mark.parametrize("cache", ["bfloat16", "fp8"])
def test_a_step_of_one_sequence_is_near_the_reading(cache: str) -> None:
    content = json.loads((record.RESULTS / "nvidia_h200_model.json").read_text())["results"]
    (row,) = (row for row in content["decode"] if (row["batch"], row["cache"]) == (1, cache))
    assert row["of_the_floor"] >= 0.6


@pytest.mark.parametrize(("requests", "least"), [(1, 0.85), (32, 0.95)])
def test_the_engine_hides_behind_the_device(requests: int, least: float) -> None:
    """What the host does around a step: the engine is nearly as fast as bare steps."""
    content = json.loads((record.RESULTS / "nvidia_h200_model.json").read_text())["results"]
    (bare,) = (
        row for row in content["decode"] if (row["batch"], row["cache"]) == (requests, "bfloat16")
    )
    (row,) = (row for row in content["serving"] if row["requests"] == requests)
    assert row["tokens_per_s"] > least * bare["tokens_per_s"]


def test_what_reading_in_chunks_is_worth() -> None:
    """What `prefill_into_cache` and `mha.attention` do by default is what is faster."""
    results = json.loads((record.RESULTS / "nvidia_h200_prefill.json").read_text())["results"]
    chunks = {
        (row["chunk"], row["absorb_prefix"], row["fp8"]): row["us"] for row in results["chunks"]
    }
    for chunk, fp8 in ((256, False), (512, False), (256, True)):
        assert chunks[chunk, True, fp8] < chunks[chunk, False, fp8]
    for chunk, fp8 in ((1024, False), (4096, False), (512, True)):
        assert chunks[chunk, False, fp8] < chunks[chunk, True, fp8]
    attention = {(row["tokens"], row["implementation"]): row["us"] for row in results["attention"]}
    for tokens in (4096, 16384):
        assert attention[tokens, "cudnn"] < attention[tokens, "xla"]


def test_targets_of_appending() -> None:
    results = json.loads((record.RESULTS / "nvidia_h200.json").read_text())["results"]
    rows = {row["case"]: row for row in results["cache_append"]}
    prompts = [row for case, row in rows.items() if "prompt" in case]
    assert len(prompts) == 2
    for row in prompts:
        assert row["gbps"] >= 0.7 * results["ceilings"]["copy_gbps"]
    assert rows["b128 decoding step"]["us"] < 5


@pytest.mark.parametrize(("device", "size"), [("cpu", "cpu"), ("nvidia_h200", "gpu")])
def test_training_takes_minutes(device: str, size: str) -> None:
    """The example's training, of the size that is the device's default."""
    results = json.loads((record.RESULTS / f"train_tiny_{device}.json").read_text())["results"]
    assert results["size"] == size
    assert results["seconds"] < 300
    assert results["loss_on_unseen_text"] < 1.4


def test_targets_of_the_indexer() -> None:
    """With kernels, no case is slower than what XLA makes of it."""
    results = json.loads((record.RESULTS / "nvidia_h200.json").read_text())["results"]
    for row in results["indexer"]:
        assert row["us"] < row["xla_us"]
    rows = {row["case"]: row for row in results["indexer"]}
    assert {"b64 32768 bfloat16 keys", "b64 131072 fp8 keys"} <= set(rows)


def test_all_tests_passed_on_a_gpu() -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("the record is of the run before this one, which may mend what failed there")
    content = json.loads((record.RESULTS / "gpu_tests_nvidia_h200.json").read_text())
    outcomes = content["results"]["outcomes"]
    assert outcomes["passed"] > 0
    assert not outcomes.keys() & {"failed", "error"}, outcomes


def test_kernels_are_clean() -> None:
    content = json.loads((record.RESULTS / "sanitizer_nvidia_h200.json").read_text())
    assert content["results"].keys() == {"memcheck", "racecheck", "synccheck"}
    for groups in content["results"].values():
        assert groups.keys() == {"attention", "cache", "few tokens", "experts"}
        assert all(group["clean"] for group in groups.values()), groups


def test_write_record(tmp_path: Path) -> None:
    path = record.write_record(tmp_path / "new" / "x.json", [{"us": 1.5}], "make bench")
    content = json.loads(path.read_text())
    assert content["results"] == [{"us": 1.5}]
    assert content["command"] == "make bench"
    assert content["sources"] == list(record.KERNELS)
    assert content["source_hash"] == record.source_hash()
    assert content["versions"]["jax"]


def test_sources_of_a_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is fresh until one of those changes that it depends on; older ones depend on kernels."""
    for source in record.MODELS:
        assert (record.ROOT / source).exists()
    names = ["CMakeLists.txt", "csrc/sm90/a.cu", "flashmla_jax/models/b.py", "flashmla_jax/c.py"]
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    kernels, models = (
        ("CMakeLists.txt", "csrc"),
        ("csrc", "flashmla_jax/models", "flashmla_jax/c.py"),
    )
    monkeypatch.setattr(record, "KERNELS", kernels)
    paths = [
        record.write_record(tmp_path / f"{i}.json", {}, "make bench", sources)
        for i, sources in enumerate((kernels, models))
    ]
    records = [json.loads(path.read_text()) for path in paths]
    without_names = {k: v for k, v in records[0].items() if k != "sources"}
    records.append(without_names | {"source_hash": record.source_hash(kernels)})

    def fresh() -> list[bool]:
        return [record.is_fresh(content) for content in records]

    assert fresh() == [True, True, True]
    changes = zip(names, [(0, 1, 0), (0, 0, 0), (1, 0, 1), (1, 0, 1)], strict=True)
    for name, expected in changes:
        (tmp_path / name).write_text("changed")
        assert fresh() == list(map(bool, expected)), name
        (tmp_path / name).write_text(name)
    (tmp_path / "flashmla_jax" / "models" / "new.py").write_text("")
    assert fresh() == [True, False, True]


def test_the_tests_record_depends_on_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = SimpleNamespace(platform="gpu", device_kind="Some GPU")
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    monkeypatch.setattr(record_tests, "RESULTS", tmp_path)
    junit = tmp_path / "junit.xml"
    junit.write_text('<testsuite><testcase classname="test_x" name="test_y" time="1"/></testsuite>')
    assert record_tests.main([str(junit)]) == 0
    content = json.loads((tmp_path / "gpu_tests_some_gpu.json").read_text())
    assert content["sources"] == list(record.MODELS)
    assert content["results"]["outcomes"] == {"passed": 1}
