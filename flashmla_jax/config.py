"""What is installed, what was built, and what runs where."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

import jax

from flashmla_jax.ops import _ffi


def show_config() -> None:
    """Prints versions, how the compiled module was built, and what runs on each device found."""
    rows = [("python", platform.python_version())]
    rows += [(name, _version(name)) for name in ("flashmla-jax", "jax", "jaxlib", "flax")]
    rows += _build()
    rows += [(f"{device.platform}:{device.id}", _describe(device)) for device in _devices()]
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:{width}}{value}")


def kernel_on(device: jax.Device) -> str:
    """What attention and cache updates run as on `device`, in words."""
    target = _ffi.CUDA if device.platform == "gpu" else device.platform
    if (reason := _ffi.why_no_kernel(target)) is not None:
        return f"the jax.numpy reference, slowly: {reason}"
    return {_ffi.CPU: "the C++ kernels", _ffi.CUDA: "the Hopper kernels"}[target]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build() -> list[tuple[str, str]]:
    """How the compiled module was built."""
    info = _ffi.build_info()
    if not info:
        return [("module", f"not loaded: {_ffi.import_error()}")]
    api = ".".join(map(str, info["ffi_api_version"]))
    cuda = "not built in"
    if info["cuda_version"] is not None:
        major, minor = divmod(info["cuda_version"], 1000)
        cuda = f"{major}.{minor // 10}, for {', '.join(info['cuda_architectures'])}"
    return [("module", f"compiler {info['compiler']}, XLA FFI {api}"), ("CUDA", cuda)]


def _devices() -> list[jax.Device]:
    """The devices of the default platform, and the CPU."""
    devices = list(jax.local_devices())
    if devices[0].platform != "cpu":
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out.
            devices += jax.local_devices(backend="cpu")
    return devices


def _describe(device: jax.Device) -> str:
    capability = getattr(device, "compute_capability", None)
    kind = device.device_kind + (f", compute capability {capability}" if capability else "")
    return f"{kind}: {kernel_on(device)}"
