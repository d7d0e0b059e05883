"""Records as tables and plots, and records compared."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, report

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
DECODE = [RESULTS / "cpu.json", RESULTS / "nvidia_h200.json"]


def row(case: str, us: float, *samples: float, **more: Any) -> dict[str, Any]:
    return {
        "case": case,
        "us": us,
        "samples_us": list(samples or (us,)),
        "tflops": 100 / us,
        "gbps": 100_000 / us,
        **more,
    }


def record(*rows: dict[str, Any], read: float = 4000, matmul: float = 600) -> dict[str, Any]:
    return {
        "device": "Some GPU",
        "date": "2026-01-02",
        "command": "make bench",
        "commit": "abc",
        "results": {
            "ceilings": {"read_gbps": read, "sustained_matmul_tflops": matmul},
            "dense_decode": list(rows),
        },
    }


def test_other_records_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sanitizer_nvidia_h200\.json is no record of the decode"):
        report.load(RESULTS / "sanitizer_nvidia_h200.json")


def test_share_is_that_of_the_nearer_ceiling() -> None:
    ceilings = {"read_gbps": 4000, "sustained_matmul_tflops": 600}
    assert report.share({"gbps": 3000, "tflops": 60}, ceilings) == 0.75
    assert report.share({"gbps": 400, "tflops": 540}, ceilings) == 0.9


def test_markdown_has_what_was_compared() -> None:
    table = report.markdown(
        record(
            row("b1 s1 h16 1024 uniform", 12.345, gather_einsum_us=99.6, speedup=8.07),
            row("b1 s1 h16 2048 uniform", 13),
            row("b8 s2 h4 4096 varlen float16", 1250.0, gather_einsum_us=12500.0, speedup=10.0),
        )
    )
    lines = table.splitlines()
    assert "| 1 | 1 | 16 | 1024 | 12.3 us | 100 us | 8.1x |" in lines
    assert "| 8 | 2 | 4 | 4096 varlen float16 | 1250 us | 12.5 ms | 10.0x |" in lines
    assert "2048" not in table
    assert "Some GPU, 2026-01-02, `make bench`" in table


@pytest.mark.parametrize("path", DECODE, ids=lambda path: path.name)
def test_the_committed_records_can_be_reported(path: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    assert report.main([str(path), "--plots", str(tmp_path)]) == 0
    assert report.markdown(report.load(path)) in capsys.readouterr().out
    for plot in ("roofline", "latency"):
        root = ET.parse(tmp_path / f"{path.stem}_{plot}.svg").getroot()
        text = " ".join(x.text or "" for x in root.iter() if x.tag.endswith("text"))
        assert "MLA decode" in text
    for one in report.load(path)["results"]["dense_decode"]:
        assert 0 < report.share(one, report.load(path)["results"]["ceilings"]) < 1.5


def test_compare_flags_what_became_slower(tmp_path: Path, capsys) -> None:
    old = record(
        row("same", 100, 99, 100, 101),
        row("slower", 100, 99, 100, 101),
        row("noisy", 100, 60, 100, 140),
        row("faster", 100, 99, 100, 101),
        row("gone", 100),
    )
    new = record(
        row("same", 102, 101, 102, 103),
        row("slower", 110, 109, 110, 111),
        row("noisy", 110, 70, 110, 150),
        row("faster", 80, 79, 80, 81),
        row("new", 100),
    )
    verdicts = {change.case: change.verdict for change in compare.compare(old, new)}
    assert verdicts == {"same": "", "slower": "SLOWER", "noisy": "", "faster": "faster"}

    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, content in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(content))
    assert compare.main(list(map(str, paths))) == 1
    assert "1 of 4 cases are slower" in capsys.readouterr().out
    assert compare.main([*map(str, paths), "--tolerance", "0.2"]) == 0
    assert compare.main([str(paths[0])] * 2) == 0


def test_tables_are_replaced(tmp_path: Path) -> None:
    """That of the device, and no other."""
    old, new, other = (record(row("b1 s1 h16 1024 uniform", us)) for us in (100, 50, 70))
    for each in (old, new, other):
        each["results"]["dense_decode"][0] |= {"gather_einsum_us": 500, "speedup": 5}
    other["device"] += " 2"
    document = f"Before.\n\n{report.markdown(old)}\n\n{report.markdown(other)}\n\nAfter.\n"
    path, file = tmp_path / "record.json", tmp_path / "document.md"
    path.write_text(json.dumps(new))
    file.write_text(document)
    assert report.main([str(path), "--into", str(file)]) == 0
    assert file.read_text() == document.replace(report.markdown(old), report.markdown(new))
    with pytest.raises(ValueError, match="has 0 tables"):
        report.replace_table("nothing", new)


def test_compare_goes_by_the_share_of_each_runs_ceiling() -> None:
    """Twice the time on a device half as fast is no change."""
    old, new = record(row("x", 100)), record(row("x", 200), read=2000, matmul=300)
    (change,) = compare.compare(old, new)
    assert change.ratio == pytest.approx(1)
    assert change.verdict == ""


def test_nothing_in_common(tmp_path: Path) -> None:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, name in zip(paths, ("x", "y"), strict=True):
        path.write_text(json.dumps(record(row(name, 1))))
    assert compare.main(list(map(str, paths))) == 1
