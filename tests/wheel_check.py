"""Uses an installed flashmla_jax and prints what ran. Run by test_wheel.py, in other environments.

Needs no test package but flatbuffers: it compares the kernels with the reference in the package.
"""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import flashmla_jax as fm
from flashmla_jax import reference
from flashmla_jax.ops import _ffi

# A fallback to the reference would compare the reference with itself.
warnings.simplefilter("error")


def check_dense_decode(dtype: str, causal: bool) -> None:
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((3, 2, 16, 576)), dtype)
    k_cache = jnp.asarray(rng.standard_normal((9, 64, 1, 576)), dtype)
    block_table = jnp.asarray(rng.permutation(9).reshape(3, 3), jnp.int32)
    cache_seqlens = jnp.asarray([150, 1, 0], jnp.int32)

    step = jax.jit(lambda *args: fm.flash_mla_with_kvcache(*args, causal=causal))
    assert _ffi.DENSE_DECODE in step.lower(q, k_cache, block_table, cache_seqlens).as_text()
    out, lse = step(q, k_cache, block_table, cache_seqlens)
    wanted_out, wanted_lse = reference.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, softmax_scale=576**-0.5, causal=causal
    )
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(wanted_out, np.float32), atol=tolerance
    )
    np.testing.assert_allclose(np.asarray(lse), np.asarray(wanted_lse), rtol=1e-5, atol=1e-5)


def check_cache_append(dtype: str) -> None:
    rng = np.random.default_rng(1)
    k_cache = jnp.asarray(rng.standard_normal((5, 64, 1, 576)), dtype)
    new_kv = jnp.asarray(rng.standard_normal((2, 3, 1, 576)), dtype)
    block_table = jnp.asarray([[4, 1], [0, 2]], jnp.int32)
    start, count = jnp.asarray([63, 10], jnp.int32), jnp.asarray([3, 1], jnp.int32)
    wanted = np.array(k_cache)
    wanted[4, 63], wanted[1, :2], wanted[0, 10] = new_kv[0, 0], new_kv[0, 1:], new_kv[1, 0]

    append = jax.jit(fm.cache_append, donate_argnums=0)
    args = (new_kv, block_table, start, count)
    assert _ffi.CACHE_APPEND in append.lower(k_cache, *args).as_text()
    assert np.asarray(append(k_cache, *args)).tobytes() == wanted.tobytes()


def check_export() -> None:
    """A program of an older release runs, as what is exported by this jax does."""
    make_step = runpy.run_path(str(Path(__file__).parent / "exported" / "make_step.py"))
    data = [make_step["STEP"].read_bytes(), make_step["export_step"]().serialize()]
    for call in (jax.export.deserialize(x).call for x in data):
        rng = np.random.default_rng(2)
        cache = fm.PagedKVCache.create(num_layers=2, num_pages=4, batch=3, max_pages_per_seq=1)
        kv = jnp.asarray(rng.standard_normal((3, 2, 1, 576)), jnp.bfloat16)
        q = jnp.asarray(rng.standard_normal((3, 2, 4, 576)), jnp.bfloat16)
        cache, ok, results = call(cache, jnp.asarray([2, 0, 1], jnp.int32), kv, q)
        assert ok.all()
        for pages, result in zip(cache.pages, results, strict=True):
            assert (pages[0, :2] == kv[0]).all()
            assert (pages[1, :1] == kv[2, :1]).all()
            wanted = reference.flash_mla_with_kvcache(
                *(q, pages, cache.block_table, cache.cache_seqlens),
                softmax_scale=576**-0.5,
                causal=True,
            )
            for x, y in zip(result, wanted, strict=True):
                np.testing.assert_allclose(
                    np.asarray(x, np.float32), np.asarray(y, np.float32), atol=2e-2, rtol=1e-5
                )


def main() -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        for causal in (False, True):
            check_dense_decode(dtype, causal)
        check_cache_append(dtype)
    check_export()
    facts = {
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "location": str(Path(fm.__file__).parent),
        "build": _ffi.build_info(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
