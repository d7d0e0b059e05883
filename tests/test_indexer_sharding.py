"""The indexer's choice under plain `jit`, over arrays divided over virtual CPU devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import elsewhere, make_mesh, meshes, run_on_eight_devices
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ops.test_index_topk import FORMATS, Problem, choose

from flashmla_jax.layers import indexer
from flashmla_jax.ops import _ffi

AXES = [("batch", None), (None, "s"), ("batch", "s")]


@elsewhere
def test_on_eight_devices() -> None:
    run_on_eight_devices(__file__)


@meshes
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_each_has_its_query_tokens(
    axes: tuple[str | None, str | None], kind: AxisType, fmt: str
) -> None:
    """And all of the pool: nothing travels."""
    mesh = make_mesh(kind, batch=4, s=2)
    problem = Problem(np.random.default_rng(0), (300, 0, 70, 129), 6, 5, fmt)
    batch, s = axes
    specs = P(batch, s), P(batch, s), P(), P(batch), P(batch, s)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(problem.arguments(), specs, strict=True)
    ]
    lowered = choose.lower(*placed, topk=np.int64(40))
    if _ffi.why_no_kernel(_ffi.CPU) is None:
        assert _ffi.INDEX_TOPK in lowered.as_text()  # by which compilation caches know
    text = lowered.compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
    chosen = choose(*placed, topk=40)
    assert chosen.sharding.is_equivalent_to(NamedSharding(mesh, P(batch, s)), chosen.ndim)
    np.testing.assert_array_equal(chosen, problem.wanted(40))


@meshes
def test_precisions_are_in_the_program() -> None:
    mesh = make_mesh(AxisType.Auto, batch=8)
    problem = Problem(np.random.default_rng(1), (90,) * 8, 1, 3)
    batch, whole = (NamedSharding(mesh, spec) for spec in (P("batch"), P()))
    placed = jax.device_put(problem.arguments(), (batch, batch, whole, batch, batch))
    for precision in (
        jax.lax.Precision.HIGHEST,
        (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT),
        jax.lax.DotAlgorithmPreset.DEFAULT,
    ):
        program = jax.jit(lambda *x, p=precision: indexer.choose_cached(*x, np.int64(16), p))
        np.testing.assert_array_equal(program(*placed), problem.wanted(16))


@meshes
def test_pools_are_not_divided() -> None:
    mesh = make_mesh(AxisType.Auto, pages=8)
    pool = jax.device_put(jnp.ones((8, 64, 1, 128)), NamedSharding(mesh, P("pages")))
    q, weights = jnp.ones((2, 1, 4, 128)), jnp.ones((2, 1, 4))
    table, visible = jnp.zeros((2, 3), jnp.int32), jnp.full((2, 1), 99)
    with pytest.raises(jax.errors.JaxRuntimeError, match="index_pages is sharded along axis 0"):
        choose(q, weights, pool, table, visible, topk=5)
