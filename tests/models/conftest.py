"""What the tests of models share."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.models import DeepSeekConfig, init_params, load_checkpoint


@pytest.fixture(scope="session")
def random_params() -> Callable[..., dict]:
    """Like `init_params`, which compiles something for every shape."""

    def make(config: DeepSeekConfig, seed: int = 0, dtype=jnp.bfloat16) -> dict:
        rng = np.random.default_rng(seed)

        def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            values = rng.standard_normal(leaf.shape, np.float32)
            values = values * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1 + 0.2 * values
            return jnp.asarray(values, leaf.dtype)

        return jax.tree.map(
            draw, jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
        )

    return make


@pytest.fixture(scope="session")
def loading_peak() -> Callable[..., int]:
    """The most bytes that the host, beside its devices, holds while a checkpoint is loaded."""

    def measure(path: Path, **options) -> int:
        load_checkpoint(path, **options)  # compiles, which takes memory too
        gc.collect()
        tracemalloc.start()
        load_checkpoint(path, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    return measure
