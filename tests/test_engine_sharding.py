"""The engine with parameters that are divided over devices."""

import dataclasses

import jax
import numpy as np
import pytest
from devices import elsewhere, make_mesh, meshes, run_on_eight_devices
from test_engine import CONFIG, DRAFT, check_tokens, make_engine, prompt_of, run

from flashmla_jax.engine import _copy, _decode, _move_pages, _read
from flashmla_jax.models import init_params, tensor_parallel


@elsewhere
def test_on_eight_devices() -> None:
    run_on_eight_devices(__file__)


@meshes
@pytest.mark.parametrize(("draft", "mtp"), [(0, 0), (DRAFT, 0), (DRAFT, 1)])
def test_tensor_parallel(draft: int, mtp: int) -> None:
    """The cache is on all devices, and each program is compiled once."""
    config = dataclasses.replace(CONFIG, num_nextn_predict_layers=mtp)
    params = init_params(config, jax.random.key(0), np.float32)
    mesh = make_mesh(model=2, expert=4)
    sharding_of = tensor_parallel(config, mesh, "model", "expert")

    def place(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jax.device_put(leaf, sharding_of(name, leaf.shape))

    sharded = jax.tree_util.tree_map_with_path(place, params)
    programs = (_read, _decode, _move_pages, _copy)
    engine = make_engine((sharded, config), draft=draft).compile()
    assert engine.drafter == ("mtp" if mtp else "ngram" if draft else None)
    compiled = [program._cache_size() for program in programs]
    requests = [engine.submit(prompt_of(i % 2, n), 12) for i, n in enumerate((70, 3, 100, 130, 90))]
    run(engine)
    assert engine.stats.prefix_tokens > 0
    check_tokens((params, config), requests)
    assert [program._cache_size() for program in programs] == compiled
    assert all(pool.sharding.is_fully_replicated for pool in engine.cache.pages)
    assert engine.cache.pages[0].sharding.device_set == set(mesh.devices.flat)
