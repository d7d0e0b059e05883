"""What XLA compiles, and what it need not compile again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SETUP = """
import collections, functools, json, sys
if "reference" in sys.argv:
    sys.modules["flashmla_jax._flashmla"] = None
import jax
import numpy as np
import flashmla_jax
from flashmla_jax import parallel

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
q, pool = np.zeros((2, 1, 4, 576), np.float32), np.zeros((4, 64, 1, 576), np.float32)
table, lengths = np.zeros((2, 2), np.int32), np.array([3, 70], np.int32)
mesh = jax.make_mesh((2,), ("head",), axis_types=(jax.sharding.AxisType.Auto,))
heads = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "head"))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
plain = jax.jit(flashmla_jax.flash_mla_with_kvcache, in_shardings=(heads, whole, whole, whole))
plain(q, pool, table, lengths)
"""
OTHERS = """
jax.jit(flashmla_jax.flash_mla_with_kvcache)(q, pool, table, lengths)
divided = functools.partial(parallel.flash_mla_with_kvcache, mesh=mesh, head_axis="head")
jax.jit(divided)(q, pool, table, lengths)
"""
COUNTS = """
print(json.dumps([events["/jax/compilation_cache/cache_" + kind] for kind in ("hits", "misses")]))
"""


def run(program: str, cache: Path, *arguments: str) -> list[int]:
    """How many programs a process with two devices finds in the cache, and how many it does not."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-P", "-c", program + COUNTS, *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def test_the_persistent_cache_serves_other_processes(tmp_path: Path) -> None:
    """Of the op, alone, over a mesh and on divided arrays: a second process compiles none again."""
    assert run(SETUP + OTHERS, tmp_path) == [0, 3]
    assert run(SETUP + OTHERS, tmp_path) == [3, 0]


def test_the_persistent_cache_tells_kernels_from_the_reference(tmp_path: Path) -> None:
    assert run(SETUP, tmp_path, "reference") == [0, 1]
    assert run(SETUP, tmp_path) == [0, 1]
    assert run(SETUP, tmp_path) == [1, 0]
