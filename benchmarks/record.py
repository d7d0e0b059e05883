"""Records of measurements: what was measured, on what, from which sources.

A record under `results/` says by a hash which sources it was measured with, so that a test can warn
when they have changed since.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from flashmla_jax.ops import _ffi

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What records depend on: files, and folders with all that is in them.
KERNELS = ("CMakeLists.txt", "csrc", "flashmla_jax/ops", "flashmla_jax/cache")
MODELS = (
    *KERNELS,
    "flashmla_jax/attention.py",
    "flashmla_jax/reference.py",
    "flashmla_jax/layers",
    "flashmla_jax/models",
    "flashmla_jax/engine.py",
    "flashmla_jax/generate.py",
    "benchmarks/model.py",
)
_SUFFIXES = {".py", ".cc", ".h", ".cu", ".cuh"}


def write_record(
    path: Path | str, results: Any, command: str, sources: Iterable[str] = KERNELS
) -> Path:
    """Writes `results`, which must be JSON, with all that is needed to judge and repeat them.

    `sources` are what they depend on.
    """
    sources = list(sources)
    record = {
        "device": device_name(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "commit": _commit(),
        "sources": sources,
        "source_hash": source_hash(sources),
        "versions": versions(),
        "results": results,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def is_fresh(record: dict[str, Any]) -> bool:
    """Whether the sources that a record depends on are as they were then."""
    sources = record.get("sources", KERNELS)  # which older records do not name
    return record["source_hash"] == source_hash(sources)


def source_hash(sources: Iterable[str] = KERNELS) -> str:
    """SHA-256 over the names and contents of sources, by default the kernels'."""
    digest = hashlib.sha256()
    for path in _source_files(sources):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _source_files(sources: Iterable[str]) -> Iterator[Path]:
    for source in sources:
        path = ROOT / source
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
            yield from sorted(files)
        else:
            yield path


def device_name() -> str:
    """The GPU's name, or the processor's with the number of threads it gives us."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    return f"{_processor()}, {len(os.sched_getaffinity(0))} threads"


def device_slug() -> str:
    """The GPU's name as records' files have it."""
    return device_name().lower().replace(" ", "_")


def has_hopper() -> bool:
    """Whether there is a Hopper GPU; says so if not."""
    device = jax.devices()[0]
    if device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0":
        return True
    print(f"needs a Hopper GPU (compute capability 9.0), found {device.device_kind}")
    return False


def _processor() -> str:
    """The processor's name, model and best instructions for this, as far as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = info.get("model name", platform.machine())
    flags = info.get("flags", "").split()
    vectors = next((x for x in ("amx_bf16", "avx512f", "avx2") if x in flags), None)
    model = [f"family {info['cpu family']} model {info['model']}"] if "cpu family" in info else []
    return ", ".join([name, *model, *([vectors] if vectors else [])])


def versions() -> dict[str, str | None]:
    """Of all that the numbers depend on; None for what is not there."""
    info = _ffi.build_info()
    cuda = info.get("cuda_version")
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "flashmla_jax": _version("flashmla-jax"),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        "compiler": info.get("compiler"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, marked when files differ from it; None outside a git checkout."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
