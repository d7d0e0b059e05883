"""What is divided over two GPUs, by XLA under plain `jit`, by `parallel`, and over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from devices import make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_multi_process import free_address
from test_parallel import deal_out
from test_sharding import LENGTHS, append_problem, assert_sharded, collectives, pool_copies, put

from flashmla_jax import cache_append, flash_mla_with_kvcache, parallel
from flashmla_jax.ops import _ffi
from flashmla_jax.ops import routed_experts as moe

sys.path.append(str(Path(__file__).parents[1] / "ops"))
import test_routed_experts_on_a_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.devices()[0].platform != "gpu" or len(jax.devices()) < 2, reason="needs two GPUs"
    ),
]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("name", ["heads", "batch", "KV heads"])
def test_plain_jit(name: str, h_q: int, kind: AxisType) -> None:
    rng = np.random.default_rng([h_q, len(name)])
    h_kv = 2 if name == "KV heads" else 1
    problem = oracle.make_problem(rng, LENGTHS, h_q=h_q, h_kv=h_kv)
    mesh = make_mesh(kind, d=2)
    batch, head = ("d", None) if name == "batch" else (None, "d")
    pool = P(None, None, "d") if name == "KV heads" else P()
    arrays = put(mesh, problem, (P(batch, None, head), pool, P(batch), P(batch)))
    attend = jax.jit(flash_mla_with_kvcache)
    compiled = attend.lower(*arrays).compile()
    assert collectives(compiled) == []
    assert pool_copies(compiled, problem.k_cache) == []
    assert "flashmla_dense_decode" in compiled.as_text()
    out, lse = attend(*arrays)
    oracle.assert_matches((out, lse), oracle.attend(problem))
    assert_sharded(out, mesh, P(batch, None, head))


@pytest.mark.parametrize("heads", [None, "d"])
def test_append_in_place(heads: str | None) -> None:
    operands, expected = append_problem(2)
    spec = P(None, None, heads)
    mesh = make_mesh(d=2)
    arrays = put(mesh, operands, (spec, spec, P(), P(), P()))
    append = jax.jit(cache_append, donate_argnums=0)
    compiled = append.lower(*arrays).compile()
    assert collectives(compiled) == []
    assert pool_copies(compiled, operands[0]) == []
    np.testing.assert_array_equal(append(*arrays), expected)


@pytest.mark.parametrize("over", ["experts", "sizes"])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_routed_experts(num_tokens: int, over: str) -> None:
    """Nothing travels but the sums."""
    case = test_routed_experts_on_a_gpu.make(8, num_tokens, 4, 256, 96, jnp.bfloat16)
    mesh = make_mesh(d=2)
    gate, down = (P("d"),) * 2 if over == "experts" else (P(None, "d"), P(None, None, "d"))
    weights = moe.Experts(*put(mesh, case[0], (gate, gate, down)))
    arrays = put(mesh, case[1:], (P(), P(), P()))
    run = jax.jit(moe.routed_experts)
    compiled = run.lower(weights, *arrays).compile()
    assert [f"f32[{num_tokens},256]" in line for line in collectives(compiled)] == [True]
    assert (_ffi.GROUPED_MLP in compiled.as_text()) == (num_tokens > 1 or over == "experts")
    out = run(weights, *arrays)
    want = test_routed_experts_on_a_gpu.exact(case)
    assert test_routed_experts_on_a_gpu.relative_error(out, want) < 8e-3


@pytest.mark.parametrize("scheme", ["head", "batch", "context"])
def test_parallel(scheme: str) -> None:
    problem = oracle.make_problem(np.random.default_rng(3), LENGTHS, spare_entries=0)
    sizes = {name: 2 if scheme == name else 1 for name in ("batch", "context")}
    mesh = make_mesh(**{scheme: 2})
    dealt = deal_out(problem, sizes["batch"], sizes["context"])
    out, lse = parallel.flash_mla_with_kvcache(*dealt, mesh=mesh, **{f"{scheme}_axis": scheme})
    oracle.assert_matches((out, lse), oracle.attend(problem))
    spec = {"head": P(None, None, "head"), "batch": P("batch"), "context": P()}[scheme]
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), out.ndim)


@pytest.mark.parametrize("context", ["1", "2"])
def test_a_process_for_each(context: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "multi_process_decode.py")]
    command += ["--context", context, "--coordinator", free_address(), "--num-processes", "2"]
    processes = [
        subprocess.Popen(
            [*command, "--process-id", str(i)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(i), "JAX_PLATFORMS": "cuda"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "2 gpu devices of 2 processes" in outputs[0]
