"""Sparse attention under plain `jit`, over arrays that are divided over virtual CPU devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import elsewhere, make_mesh, meshes, run_on_eight_devices
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sparse import attend, make_calls

AXES = [("batch", None), (None, "heads"), ("batch", "heads")]


@elsewhere
def test_on_eight_devices() -> None:
    run_on_eight_devices(__file__)


@meshes
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("fmt", ["f32", "fp8 in f32"])
def test_each_has_its_sequences_or_heads(
    axes: tuple[str | None, str | None], kind: AxisType, fmt: str
) -> None:
    """And all of the pools: nothing travels."""
    mesh = make_mesh(kind, batch=4, heads=2)
    rng = np.random.default_rng(3)
    q, scope, extra = make_calls(rng, fmt)
    sink = rng.standard_normal(6).astype(np.float32)
    arrays = q, scope.pool, scope.indices, extra.pool, extra.indices, sink
    is_fp8 = fmt.startswith("fp8")
    expected = attend(*arrays, is_fp8_kvcache=is_fp8)
    batch, heads = axes
    specs = P(batch, None, heads), P(), P(batch), P(), P(batch), P(heads)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    program = jax.jit(attend, static_argnames="is_fp8_kvcache")
    text = program.lower(*placed, is_fp8_kvcache=is_fp8).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
    assert text.count('custom_call_target="flashmla_sparse_attention') == 1
    for x, y in zip(program(*placed, is_fp8_kvcache=is_fp8), expected, strict=True):
        np.testing.assert_array_equal(x, y)


@meshes
def test_pools_are_not_divided() -> None:
    mesh = make_mesh(AxisType.Auto, pages=8)
    q, indices = jnp.ones((1, 1, 2, 576)), jnp.zeros((1, 1, 3), jnp.int32)
    pool = jax.device_put(jnp.ones((8, 64, 1, 576)), NamedSharding(mesh, P("pages")))
    sink = jnp.zeros(2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="k_cache is sharded along axis 0"):
        jax.jit(attend)(q, pool, indices, None, None, sink)
