"""Two processes on the CPU: `examples/multi_process_decode.py`, and plain `jit`; one may die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONUNBUFFERED": "1",
}


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(*arguments: str) -> list[subprocess.Popen[str]]:
    """Two processes with two devices each; their output, errors included, is text."""
    command = [sys.executable, str(ROOT / "examples" / "multi_process_decode.py"), *arguments]
    command += ["--coordinator", free_address(), "--num-processes", "2", "--process-id"]
    return run_two(command)


def run_two(command: list[str]) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [*command, str(i)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


PLAIN_JIT = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
import oracle
from flashmla_jax import flash_mla_with_kvcache

jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
problem = oracle.make_problem(np.random.default_rng(0), (300, 0, 5, 64), dtype=np.float32)
expected = oracle.attend(problem)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("batch", "head"), axis_types=(kind, kind))
    specs = P("batch", None, "head"), P(), P("batch"), P("batch")
    operands = [
        jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)
        for x, spec in zip(problem, specs)
    ]
    attend = jax.jit(flash_mla_with_kvcache)
    text = attend.lower(*operands).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    out, lse = attend(*operands)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, specs[0]), 4)
    for actual, whole in ((out, expected.out), (lse, expected.lse)):
        for shard in actual.addressable_shards:
            np.testing.assert_allclose(shard.data, whole[shard.index], rtol=1e-4, atol=1e-5)
print("correct")
"""


def test_plain_jit() -> None:
    """Arrays that are divided over the devices of both; nothing travels between them."""
    command = [sys.executable, "-P", "-c", PLAIN_JIT, str(ROOT / "tests"), free_address()]
    processes = run_two(command)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all("correct" in output for output in outputs)


@pytest.mark.parametrize("context", ["4", "2", "1"])
def test_two_processes(context: str) -> None:
    processes = start("--context", context, "--tokens", "70")
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "4 cpu devices of 2 processes" in outputs[0]
    assert "70 tokens, difference=" in outputs[0]


def test_a_process_that_dies_ends_the_others() -> None:
    processes = start("--tokens", "1000000", "--heartbeat-timeout", "10")
    try:
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith("token 50"):
                break
        processes[1].send_signal(signal.SIGKILL)
        processes[0].communicate(timeout=120)
        assert processes[0].returncode != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
