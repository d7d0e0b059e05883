"""How far FP8 caches move the results of dense attention.

    JAX_PLATFORMS=cpu python -m benchmarks.accuracy

Writes a record under benchmarks/results/, and prints the table of docs/fp8.md. Every case is
computed over a bfloat16 cache and over FP8 ones made of it, and compared with the same in float64
over the bfloat16 cache. Tokens are normal, or have heavy tails (Student's t with five degrees of
freedom), or a few latent columns that are fifty times as large as the others, as trained models
have them. Queries are normal.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import RESULTS, write_record
from flashmla_jax import flash_mla_with_kvcache, reference
from flashmla_jax.cache import layout

LENGTH, HEADS, SEQUENCES = 2048, 16, 4
SCALE = 192**-0.5 / 4  # of queries that are normal: scores differ by a few units
CACHES = ("bfloat16", "fp8", "fp8, any scales")


def tokens_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    shape = (SEQUENCES * LENGTH // layout.PAGE_SIZE, layout.PAGE_SIZE, 1, layout.HEAD_DIM)
    if kind == "heavy tails":
        return rng.standard_t(5, shape)
    tokens = rng.standard_normal(shape)
    if kind == "large columns":
        tokens[..., rng.choice(layout.HEAD_DIM_V, 8, replace=False)] *= 50
    return tokens


def errors(kind: str, cache: str, seed: int) -> dict[str, Any]:
    """A row of the record: of out, by its norm; of lse, the root mean square and the most."""
    rng = np.random.default_rng(seed)
    kv = jnp.asarray(tokens_of(kind, rng), jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((SEQUENCES, 1, HEADS, layout.HEAD_DIM)), jnp.bfloat16)
    table = jnp.arange(len(kv), dtype=jnp.int32).reshape(SEQUENCES, -1)
    lengths = jnp.full(SEQUENCES, LENGTH, jnp.int32)
    is_fp8 = cache != "bfloat16"
    pages = layout.quantize(kv, powers_of_two=cache == "fp8") if is_fp8 else kv
    out, lse = flash_mla_with_kvcache(
        q, pages, table, lengths, softmax_scale=SCALE, is_fp8_kvcache=is_fp8
    )
    with jax.enable_x64():
        exact, exact_lse = reference.flash_mla_with_kvcache(
            *(jnp.asarray(np.asarray(x, np.float64)) for x in (q, kv)),
            *(table, lengths),
            softmax_scale=SCALE,
            causal=False,
        )
        exact, exact_lse = np.asarray(exact, np.float64), np.asarray(exact_lse, np.float64)
    off = np.asarray(out, np.float64) - exact
    lse_off = np.asarray(lse, np.float64) - exact_lse
    return {
        "tokens": kind,
        "cache": cache,
        "out_error": float(np.linalg.norm(off) / np.linalg.norm(exact)),
        "lse_rms": float(np.sqrt(np.mean(lse_off**2))),
        "lse_most": float(np.abs(lse_off).max()),
    }


def markdown(record: dict[str, Any]) -> str:
    """A record as a Markdown table."""
    lines = [
        "| tokens | cache | error of out | error of lse, rms | lse, the most |",
        "|---|---|---|---|---|",
    ]
    for row in record["results"]:
        cells = [row["tokens"], row["cache"], f"{row['out_error']:.2%}"]
        cells += [f"{row['lse_rms']:.1e}", f"{row['lse_most']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    where = f"{record['device']}, {record['date']}, `{record['command']}`"
    what = f"{SEQUENCES} sequences of {LENGTH} tokens, {HEADS} heads"
    return "\n".join([*lines, "", f"{where}: {what}."])


def main() -> int:
    kinds = ("normal", "heavy tails", "large columns")
    rows = [errors(kind, cache, i) for i, kind in enumerate(kinds) for cache in CACHES]
    command = "JAX_PLATFORMS=cpu python -m benchmarks.accuracy"
    path = write_record(RESULTS / "accuracy.json", rows, command)
    print(f"wrote {path}")
    print(markdown(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
