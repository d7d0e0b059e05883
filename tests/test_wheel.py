"""The package as it is shipped: one wheel for every supported jax, and the ways to build it.

Environments and builds are kept in build/wheel-test, so that only the first run is slow.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "wheel-test" / sys.implementation.cache_tag
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD_REQUIREMENTS = PYPROJECT["build-system"]["requires"]
OLDEST = next(r for r in BUILD_REQUIREMENTS if r.startswith("jax=="))


def run(*command: str | Path, **kwargs) -> subprocess.CompletedProcess[str]:
    """Runs a command away from the source tree, with the settings of nobody's Python."""
    env = kwargs.pop("env", None) or os.environ
    env = {k: v for k, v in env.items() if not re.match("PYTHONPATH|PYTEST_|XLA_FLAGS", k)}
    return subprocess.run(
        list(map(str, command)), env=env, cwd=WORK, text=True, capture_output=True, **kwargs
    )


def check(*command: str | Path, **kwargs) -> str:
    """The same, and what it printed; fails with all of that if the command does."""
    result = run(*command, **kwargs)
    if result.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}")
    return result.stdout + result.stderr


def pip(python: Path, *arguments: str | Path) -> str:
    return check(python, "-m", "pip", "--disable-pip-version-check", *arguments)


def environment(name: str, *requirements: str) -> Path:
    """The Python of a virtual environment with `requirements`, in their newest versions."""
    folder = WORK / name
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        WORK.mkdir(parents=True, exist_ok=True)
        check(sys.executable, "-m", "venv", folder)
    pip(python, "install", "--quiet", "--upgrade", *requirements)
    (folder / "complete").touch()
    return python


def sources() -> list[Path]:
    folders = (ROOT / "flashmla_jax", ROOT / "csrc", ROOT / "cmake")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [ROOT / name for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")]
    return sorted(path for path in files if path.suffix not in (".pyc", ".so"))


@pytest.fixture(scope="module")
def wheel() -> Path:
    """A wheel made as for a release: from an sdist, in an environment of its own."""
    WORK.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for path in sources():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    folder = WORK / f"dist-{digest.hexdigest()[:16]}"
    if not folder.exists():
        for old in WORK.glob("dist-*"):
            shutil.rmtree(old)
        check(sys.executable, "-m", "build", "--outdir", folder / "incomplete", ROOT)
        for path in (folder / "incomplete").iterdir():
            path.rename(folder / path.name)
        (folder / "incomplete").rmdir()
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def oldest() -> Path:
    """The Python of an environment with the oldest supported jax and what builds the package."""
    return environment("oldest", *BUILD_REQUIREMENTS, "cmake>=3.26", "ninja", "flatbuffers")


def test_builds_with_the_oldest_supported_jax() -> None:
    """An FFI handler runs on no runtime older than the headers it was compiled with."""
    version = OLDEST.removeprefix("jax==")
    assert {f"jax>={version}", f"jaxlib>={version}"} <= set(PYPROJECT["project"]["dependencies"])


def test_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    module, rest = [n for n in names if n.endswith(".so")], {n for n in names if ".so" not in n}
    assert len(module) == 1
    assert re.fullmatch(r"flashmla_jax/_flashmla\.cpython-\w+-x86_64-linux-gnu\.so", module[0])
    python = {
        str(path.relative_to(ROOT))
        for path in sources()
        if path.is_relative_to(ROOT / "flashmla_jax")
    }
    assert {name for name in rest if name.startswith("flashmla_jax/")} == python
    assert "flashmla_jax/py.typed" in python
    version = PYPROJECT["project"]["version"]
    metadata = {name for name in rest if not name.startswith("flashmla_jax/")}
    assert metadata == {
        f"flashmla_jax-{version}.dist-info/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_module_needs_the_c_runtime_and_exports_its_entry(wheel: Path, tmp_path: Path) -> None:
    """The driver is asked for at run time, and cudart is inside: neither is a dependency."""
    with zipfile.ZipFile(wheel) as archive:
        module = archive.extract(
            next(n for n in archive.namelist() if n.endswith(".so")), path=tmp_path
        )
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", check("readelf", "--dynamic", module)))
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64"}
    assert not re.search(r"R(UN)?PATH", check("readelf", "--dynamic", module))
    symbols = [line.split() for line in check("readelf", "-W", "--dyn-syms", module).splitlines()]
    symbols = [fields for fields in symbols if len(fields) == 8 and fields[6] != "UND"]
    assert [fields[7] for fields in symbols if fields[0] != "Num:"] == ["PyInit__flashmla"]


@pytest.mark.parametrize("requirement", [OLDEST, "jax"], ids=["oldest jax", "newest jax"])
def test_runs_on(requirement: str, wheel: Path, request: pytest.FixtureRequest) -> None:
    """The operations give the same as the reference, and Python ends without a word."""
    if requirement == OLDEST:
        python = request.getfixturevalue("oldest")
    else:
        python = environment("newest", requirement, "jaxlib", "flatbuffers")
    pip(python, "install", "--quiet", wheel)
    pip(python, "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    pip(python, "check")

    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = run(python, "-P", ROOT / "tests" / "wheel_check.py", env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    assert Path(facts["location"]).is_relative_to(python.parents[1])
    if requirement == OLDEST:
        assert facts["jax"] == OLDEST.removeprefix("jax==")

    info = run(python.with_name("flashmla-jax"), "info", env=env)
    assert info.returncode == 0, info.stdout + info.stderr
    assert facts["jax"] in info.stdout


@pytest.mark.parametrize("part", ["operations", "others"])
def test_the_suite_passes_on_the_oldest_jax(part: str, oldest: Path, wheel: Path) -> None:
    """All tests but these; the environment of the others has the newest."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    packages = [x for name in ("bench", "flax", "hf") for x in extras[name]]
    packages += ["hypothesis", "pytest>=8", "pytest-xdist"]
    pip(oldest, "install", "--quiet", OLDEST, wheel, *packages)
    command = [oldest, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", ROOT]
    command += ["-n", "auto", "--maxprocesses", "8", "--dist", "loadfile", "--part", part]
    command += ["-c", ROOT / "pyproject.toml", "--ignore", ROOT / "tests" / "test_wheel.py"]
    tests = check(*command, ROOT / "tests", env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert re.search(r"\d+ passed", tests)
    assert f"jax {OLDEST.removeprefix('jax==')} on cpu" in tests


# --- FLASHMLA_CUDA ---------------------------------------------------------------------------


def path_without_nvcc(*first: Path) -> str:
    folders = [str(f) for f in first] + os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not (Path(f) / "nvcc").exists())
    if shutil.which("c++", path=path) is None:
        pytest.skip("nvcc and the C++ compiler are in the same folder")
    return path


def configure(
    python: Path, build: Path, *, nvcc: str | None, arguments: Sequence[str] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Configures a build where `nvcc`, a shell script, is the only CUDA compiler, or None is."""
    tools = build.with_name("tools")
    tools.mkdir()
    path = path_without_nvcc(python.parent)
    if nvcc is not None:
        (tools / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (tools / "nvcc").chmod(0o755)
        path = f"{tools}{os.pathsep}{path}"
    hidden = ("CUDACXX", "CUDA_HOME", "FLASHMLA_CUDA")
    outside = {k: v for k, v in os.environ.items() if k not in hidden}
    return run(
        python.with_name("cmake"),
        *("-G", "Ninja", "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={python}", *arguments),
        env=outside | {"PATH": path} | env,
    )


def plain(result: subprocess.CompletedProcess[str]) -> str:
    """Output on one line: CMake breaks its messages."""
    return " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize(
    ("mode", "nvcc", "reason"),
    [
        ("OFF", "echo 'Cuda compilation tools, release 13.0, V13.0.88'", "FLASHMLA_CUDA=OFF"),
        ("AUTO", None, "no CUDA compiler was found"),
        ("", None, "no CUDA compiler was found"),
        ("AUTO", "exit 1", "nvcc does not run"),
        ("AUTO", "echo 'release 12.4, V12.4.1'", "is CUDA 12.4; 12.8 or newer is needed"),
    ],
)
def test_builds_for_the_cpu_and_says_why(
    oldest: Path, tmp_path: Path, mode: str, nvcc: str | None, reason: str
) -> None:
    result = configure(oldest, tmp_path / "build", nvcc=nvcc, FLASHMLA_CUDA=mode)
    assert result.returncode == 0, plain(result)
    assert plain(result).count("flashmla_jax:") == 1
    assert re.search(rf"flashmla_jax: building for the CPU only: .*{reason}", plain(result))


@pytest.mark.parametrize(
    ("mode", "nvcc", "message"),
    [
        ("ON", None, "FLASHMLA_CUDA=ON, but no CUDA compiler was found (looked at CUDACXX, "),
        ("ON", "echo 'release 12.4, V12.4.1'", "is CUDA 12.4; 12.8 or newer is needed"),
        ("yes", None, "FLASHMLA_CUDA must be ON, OFF or AUTO, got 'yes'"),
    ],
)
def test_refuses(oldest: Path, tmp_path: Path, mode: str, nvcc: str | None, message: str) -> None:
    result = configure(oldest, tmp_path / "build", nvcc=nvcc, FLASHMLA_CUDA=mode)
    assert result.returncode != 0
    assert message in plain(result)


def test_refuses_free_threaded_python(oldest: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    answer = 'case "$*" in *Py_GIL_DISABLED*) echo 1;; *) exec "$REAL_PYTHON" "$@";; esac'
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    arguments = [f"-DPython_EXECUTABLE={python}"]
    result = configure(
        oldest, tmp_path / "build", nvcc=None, arguments=arguments, REAL_PYTHON=str(oldest)
    )
    assert result.returncode != 0
    assert "free-threaded Python (3.13t and the like) is not supported" in plain(result)


def test_argument_wins_over_the_environment(oldest: Path, tmp_path: Path) -> None:
    arguments = ["-DFLASHMLA_CUDA=OFF"]
    result = configure(
        oldest, tmp_path / "build", nvcc=None, arguments=arguments, FLASHMLA_CUDA="ON"
    )
    assert result.returncode == 0, plain(result)
    assert "building for the CPU only: FLASHMLA_CUDA=OFF" in plain(result)


def test_cpu_build_has_cpu_kernels_alone(oldest: Path, tmp_path: Path) -> None:
    """And a build folder may be used again with another answer, here that of the environment."""
    build = tmp_path / "build"
    configure(oldest, build, nvcc=None)
    shutil.rmtree(tmp_path / "tools")
    configured = configure(oldest, build, nvcc=None, FLASHMLA_CUDA="OFF")
    assert "building for the CPU only: FLASHMLA_CUDA=OFF" in plain(configured)
    check(oldest.with_name("cmake"), "--build", build)
    code = "import _flashmla as m; print(list(m.registrations()), m.build_info()['cuda_version'])"
    assert check(oldest, "-P", "-c", f"import sys; sys.path.insert(0, {str(build)!r}); {code}") == (
        "['cpu'] None\n"
    )


def test_this_environment_runs_the_same_version() -> None:
    """The suite's own installation is of this tree's version: reinstall after changing it."""
    assert importlib.metadata.version("flashmla-jax") == PYPROJECT["project"]["version"]
