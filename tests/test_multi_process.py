"""`examples/multi_process_decode.py` over two processes on the CPU, one of which may die."""

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


def start(*arguments: str) -> list[subprocess.Popen[str]]:
    """Two processes with two devices each; their output, errors included, is text."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, str(ROOT / "examples" / "multi_process_decode.py"), *arguments]
    command += ["--coordinator", address, "--num-processes", "2", "--process-id"]
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
