"""Makes `step.bin` beside it: a serialised program that today's package has to run.

    python3.11 -m venv build/exported
    build/exported/bin/pip install jax==0.9.1 jaxlib==0.9.1 flatbuffers .
    build/exported/bin/python tests/exported/make_step.py

It is made with the oldest supported jax: an older one need not read what a newer one has written,
and a newer one reads what is older by six months at least, in practice by years.

Programs like it are in the hands of users. A change that keeps it from running, or from meaning the
same, is a new version of an FFI target (`flashmla_jax/ops/_ffi.py`), or other fields of
`PagedKVCache`. Then it is made anew, and the release notes say that programs have to be.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

import flashmla_jax as fm

STEP = Path(__file__).with_name("step.bin")
LAYERS, TOKENS, HEADS = 2, 2, 4


def step(
    cache: fm.PagedKVCache, num_tokens: jax.Array, kv: jax.Array, q: jax.Array
) -> tuple[fm.PagedKVCache, jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """A decode step of two layers, the second batch-invariantly."""
    cache, ok = cache.allocate(num_tokens)
    results = []
    for layer, deterministic in enumerate([True, "batch_invariant"]):
        cache = cache.append(layer, kv)
        arguments = cache.pages[layer], cache.block_table, cache.cache_seqlens
        results.append(
            fm.flash_mla_with_kvcache(q, *arguments, causal=True, deterministic=deterministic)
        )
    return cache, ok, results


def shapes(dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """The arguments of `step`, for batches, pools and tables of any size."""
    batch, num_pages, pages = export.symbolic_shape("batch, num_pages, pages")
    create = functools.partial(
        fm.PagedKVCache.create,
        num_layers=LAYERS,
        num_pages=num_pages,
        batch=batch,
        max_pages_per_seq=pages,
        dtype=dtype,
    )
    return (
        jax.eval_shape(create),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch, TOKENS, 1, 576), dtype),
        jax.ShapeDtypeStruct((batch, TOKENS, HEADS, 576), dtype),
    )


def export_step(platforms: tuple[str, ...] = ("cpu", "cuda")) -> export.Exported:
    checks = fm.export_disabled_checks()
    return export.export(jax.jit(step), platforms=platforms, disabled_checks=checks)(*shapes())


def main() -> None:
    jax.config.update("jax_traceback_in_locations_limit", 0)  # no paths of this machine
    STEP.write_bytes(export_step().serialize())
    print(f"wrote {STEP}: {STEP.stat().st_size} bytes, jax {jax.__version__}")


if __name__ == "__main__":
    main()
