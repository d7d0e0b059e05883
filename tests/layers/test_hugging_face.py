"""Attention in chunks over a cache inside a whole model, against Hugging Face's logits.

The golden is one of tests/models; what a model does around attention is tested there.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import mla
from flashmla_jax.models import deepseek, load_checkpoint

pytestmark = pytest.mark.usefixtures("on_cpu")

GOLDEN = Path(__file__).parents[1] / "models" / "goldens" / "deepseek_v3"


def test_logits_of_a_prompt_in_chunks(monkeypatch):
    """18 tokens, then two that are decoded, then the same again; by absorbed weights the second."""
    config, params = load_checkpoint(GOLDEN, dtype=jnp.float32)
    with np.load(GOLDEN / "goldens.npz") as file:
        ids, want = file["prompts"][:1], file["prefill"][:1]
    assert ids.shape == (1, 40)

    def attend(params, config, x, precision=None, **_):
        absorbed = mla.absorb(params, config)
        cache = PagedKVCache.create(
            num_layers=1, num_pages=1, batch=1, max_pages_per_seq=1, dtype=x.dtype
        )
        outs, begin = [], 0
        for function, weights, count in (
            (mla.prefill_into_cache, params, 18),
            (mla.decode, params, 2),
            (mla.prefill_into_cache, absorbed, 18),
            (mla.decode, absorbed, 2),
        ):
            end = begin + count
            cache, _ = cache.allocate(jnp.array([count]))
            out, cache = function(weights, config, x[:, begin:end], cache, 0, precision)
            outs.append(out)
            begin = end
        return jnp.concatenate(outs, axis=1), None

    monkeypatch.setattr(mla, "prefill", attend)
    forward = jax.jit(inspect.unwrap(deepseek.forward), static_argnums=1)
    np.testing.assert_allclose(forward(params, config, ids), want, atol=1e-5, rtol=0)
