"""What all tests share: the platform they run on, and the marker `gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).parent
# Tests import their neighbours (`oracle`) by name, and `benchmarks`.
sys.path.insert(0, str(TESTS))
sys.path.append(str(TESTS.parent))

OPERATIONS = {  # and the cache: where XLA's own optimizations have to be right, too
    "cache",
    "ops",
    "test_attention.py",
    "test_derivative.py",
    "test_fp8.py",
    "test_reference.py",
    "test_sparse.py",
}
# On the CPU most of a model's test is XLA at work on its program; so it takes less than half.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def on_hopper() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--grid",
        choices=("small", "full"),
        default=None,
        help="conformance grid of the attention op; full on a Hopper GPU, small elsewhere",
    )
    parser.addoption(
        "--part",
        choices=("operations", "others"),
        default=None,
        help="only the tests of operations and the cache; or only the others, for the CPU, with "
        "programs that XLA optimizes little",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.part == "others" and not hasattr(config, "workerinput"):
        compile_quickly()
    if config.option.grid is None:
        config.option.grid = "full" if on_hopper() else "small"


def compile_quickly() -> None:
    """Before this process asks for devices; holds for those that it starts, too."""
    flags = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"
    # XLA ends a process with flags that its version does not have.
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    known = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True)
    if known.returncode == 0:
        os.environ["XLA_FLAGS"] = flags


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.option.part is None or collection_path.suffix != ".py":
        return None
    of_operations = collection_path.relative_to(TESTS).parts[0] in OPERATIONS
    return True if of_operations != (config.option.part == "operations") else None


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if not on_hopper():
        skip = pytest.mark.skip(reason="needs a Hopper GPU (compute capability 9.0)")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def pytest_report_header() -> str:
    device = jax.devices()[0]
    flags = os.environ.get("XLA_FLAGS", "").strip() or "no XLA_FLAGS"
    return f"jax {jax.__version__} on {device.platform} ({device.device_kind}), {flags}"


@pytest.fixture(scope="session")
def platform() -> str:
    """Where the tests run: cpu, gpu or tpu."""
    return jax.devices()[0].platform


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    """For modules that compare float32 tightly: it runs on the CPU only, and in full there."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forgets a module's programs after it.

    XLA maps memory for each program on the CPU, and a process may have so many maps
    (vm.max_map_count): beyond, the compiler crashes.
    """
    yield
    jax.clear_caches()
