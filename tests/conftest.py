"""What all tests share: the platform they run on, and the marker `gpu`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import pytest

# Tests import their neighbours (`oracle`) by name, and `benchmarks`.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))


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


def pytest_configure(config: pytest.Config) -> None:
    if config.option.grid is None:
        config.option.grid = "full" if on_hopper() else "small"


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if not on_hopper():
        skip = pytest.mark.skip(reason="needs a Hopper GPU (compute capability 9.0)")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def pytest_report_header() -> str:
    device = jax.devices()[0]
    return f"jax {jax.__version__} on {device.platform} ({device.device_kind})"


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
