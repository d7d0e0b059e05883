"""Tests on meshes of virtual CPU devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, Mesh

DEVICES = 8

meshes = pytest.mark.skipif(
    jax.devices()[0].platform != "cpu" or len(jax.devices()) < DEVICES,
    reason=f"needs {DEVICES} CPU devices",
)
"""For tests that need them: `run_on_eight_devices` runs their file where they are."""

_HERE = len(jax.devices("cpu")) >= DEVICES

elsewhere = pytest.mark.skipif(
    _HERE or jax.devices()[0].platform != "cpu",
    reason="the tests run in this process" if _HERE else "for machines without a GPU",
)


def run_on_eight_devices(file: str) -> None:
    """Runs a file's tests in a process that has the devices."""
    path = Path(file)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTEST_ADDOPTS", None)  # more of -q would hide the summary
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    ran = subprocess.run(
        command, cwd=path.parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"\d+ passed", ran.stdout), ran.stdout
    for reason in re.findall(r"SKIPPED \[\d+\] [^ ]+ (.*)", ran.stdout):
        assert reason in ("the tests run in this process", "needs jax 0.10"), ran.stdout


def make_mesh(kind: AxisType = AxisType.Auto, /, **axes: int) -> Mesh:
    """A mesh with these axes, all of one kind."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
