"""A record of the decode benchmark as a table and as plots.

    python -m benchmarks.report benchmarks/results/nvidia_h200.json                  Markdown
    python -m benchmarks.report benchmarks/results/nvidia_h200.json --plots FOLDER   two SVG files
    python -m benchmarks.report benchmarks/results/nvidia_h200.json --into README.md

Plots need matplotlib (`pip install '.[bench]'`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Record = dict[str, Any]


def load(path: Path | str) -> Record:
    """A record of the decode benchmark."""
    record = json.loads(Path(path).read_text())
    if "dense_decode" not in record.get("results", ()):
        raise ValueError(f"{path} is no record of the decode benchmark")
    return record


def share(row: Row, ceilings: dict[str, float]) -> float:
    """Of the ceiling that is nearer: memory read or matrix products, both of the same run."""
    return max(
        row["gbps"] / ceilings["read_gbps"],
        row["tflops"] / ceilings["sustained_matmul_tflops"],
    )


def sizes(row: Row) -> dict[str, str]:
    """The parts of a case's name."""
    pattern = r"b(?P<batch>\d+) s(?P<s_q>\d+) h(?P<h_q>\d+) (?P<length>\d+) (?P<rest>.*)"
    match = re.fullmatch(pattern, row["case"])
    if match is None:
        raise ValueError(f"not the name of a case: {row['case']!r}")
    return match.groupdict()


def line(row: Row, ceilings: dict[str, float]) -> str:
    """A row as the benchmark prints it."""
    rate = row["tflops"]
    work = f"{rate:.0f} TFLOP/s" if rate >= 1 else f"{rate * 1e3:.0f} GFLOP/s"
    text = f"{row['case']:42}{time(row['us']):>10}{work:>13}{row['gbps']:>8.4g} GB/s"
    text += f"{share(row, ceilings):>6.0%}"
    if "gather_einsum_us" in row:
        text += f"   gather + einsum {time(row['gather_einsum_us'])}, {row['speedup']}x"
    return text


def time(us: float) -> str:
    """Three digits and a unit."""
    if us >= 9995:
        return f"{us / 1000:.3g} ms"
    return f"{us:.0f} us" if us >= 99.5 else f"{us:.3g} us"


def markdown(record: Record) -> str:
    """The cases that were measured beside gather + einsum, as a Markdown table."""
    lines = [
        "| batch | query tokens | heads | cached tokens each | this op | gather + einsum | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["results"]["dense_decode"]:
        if "gather_einsum_us" not in row:
            continue
        case = sizes(row)
        tokens = case["length"] + ("" if case["rest"] == "uniform" else f" {case['rest']}")
        tokens = tokens.replace("uniform ", "")
        cells = [case["batch"], case["s_q"], case["h_q"], tokens, time(row["us"])]
        cells += [time(row["gather_einsum_us"]), f"{row['speedup']:.1f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{record['device']}, {record['date']}, `{record['command']}`: median times of one call.",
    ]
    return "\n".join(lines)


def replace_table(document: str, record: Record) -> str:
    """`document` with this record's table in place of an earlier one of the same device."""
    table = markdown(record)
    header = "\n".join(table.splitlines()[:2])
    last = rf"{re.escape(record['device'])}, .*: median times of one call\."
    replaced, count = re.subn(
        rf"{re.escape(header)}\n(?:\|.*\n)*\n{last}", lambda _: table, document
    )
    if count != 1:
        raise ValueError(f"the document has {count} tables of {record['device']}, not one")
    return replaced


def plot_roofline(record: Record, path: Path) -> None:
    """Every case: arithmetic intensity against what it reached, under the run's own ceilings."""
    plt = _pyplot()
    results = record["results"]
    ceilings = results["ceilings"]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    regimes: dict[str, list[Row]] = {}
    for row in results["dense_decode"]:
        regimes.setdefault(row.get("regime", "cases"), []).append(row)
    for regime, rows in regimes.items():
        intensity = [row["tflops"] / row["gbps"] * 1e3 for row in rows]
        axes.scatter(intensity, [row["tflops"] for row in rows], s=18, label=regime)
    low, high = axes.get_xlim()
    low = max(low, 1)
    read, matmul = ceilings["read_gbps"] / 1e3, ceilings["sustained_matmul_tflops"]
    points = [low, matmul / read, max(high, 2 * matmul / read)]
    limits = [min(x * read, matmul) for x in points]
    axes.plot(points, limits, color="black", linewidth=1, label="ceilings")
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP per byte of memory", ylabel="TFLOP/s",
        title=f"MLA decode, {record['device']}, {record['date']}",
    )  # fmt: skip
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def plot_latency(record: Record, path: Path) -> None:
    """Time against the number of cached tokens, a line for each batch and number of heads."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines: dict[tuple[int, int, str], dict[int, float]] = {}
    for row in record["results"]["dense_decode"]:
        case = sizes(row)
        if case["s_q"] == "1" and case["rest"].startswith("uniform"):
            key = int(case["batch"]), int(case["h_q"]), case["rest"].removeprefix("uniform")
            lines.setdefault(key, {})[int(case["length"])] = row["us"]
    for (batch, heads, dtype), times in sorted(lines.items()):
        if len(times) > 1:
            lengths = sorted(times)
            label = f"batch {batch}, {heads} heads{dtype}"
            axes.plot(lengths, [times[x] for x in lengths], marker="o", markersize=3, label=label)
    if axes.lines:
        axes.legend(fontsize="small")
    axes.set(
        xscale="log", yscale="log", xlabel="cached tokens of each sequence", ylabel="us",
        title=f"MLA decode, {record['device']}, {record['date']}",
    )  # fmt: skip
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    # The same record gives the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "flashmla_jax", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    return plt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write plots there")
    parser.add_argument("--into", type=Path, metavar="FILE", help="replace the table there")
    arguments = parser.parse_args(argv)
    record = load(arguments.record)
    print(markdown(record))
    if arguments.into is not None:
        document = replace_table(arguments.into.read_text(), record)
        arguments.into.write_text(document)
    if arguments.plots is not None:
        if importlib.util.find_spec("matplotlib") is None:
            print("no plots: they need matplotlib")
            return 0
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for name, plot in (("roofline", plot_roofline), ("latency", plot_latency)):
            path = arguments.plots / f"{arguments.record.stem}_{name}.svg"
            plot(record, path)
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
