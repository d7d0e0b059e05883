"""Loads two checkpoints and prints what memory of the host the second one took, in bytes as JSON.

    python loading_memory.py SMALL LARGE

The first one makes JAX start, and has all that is loaded on demand loaded. Linux only.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import jax

from flashmla_jax.models import load_checkpoint

PROCESS = Path("/proc/self")


def status(name: str) -> int:
    """A number of bytes from the status that Linux has of this process."""
    lines = (PROCESS / "status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    _, kilobytes, unit = line.split()
    assert unit == "kB"
    return int(kilobytes) * 1024


def main(small: str, large: str) -> None:
    jax.block_until_ready(load_checkpoint(small)[1])
    gc.collect()
    (PROCESS / "clear_refs").write_text("5")  # the peak is what there is now
    before = status("VmRSS")
    params = jax.block_until_ready(load_checkpoint(large)[1])
    taken = {
        "platform": jax.devices()[0].platform,
        "parameters": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "peak": status("VmHWM") - before,
        "end": status("VmRSS") - before,
    }
    print(json.dumps(taken))


if __name__ == "__main__":
    main(*sys.argv[1:])
