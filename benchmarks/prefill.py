"""Reading prompts on a Hopper GPU: attention of whole prompts, and a layer that reads in chunks.

    python -m benchmarks.prefill

Part of `make bench`; a record under benchmarks/results/. Times are of the device, from the first
kernel to the last one.

Attention with a key and a value per head is cuDNN's where that runs (`flashmla_jax.layers.mha`),
and XLA elsewhere: here is what the choice is worth. A prompt that is read in chunks, as the engine
does it so that others decode meanwhile, attends in each chunk to all that was read before. Either
keys and values are expanded from the cache once more, and shorter chunks are more of that; or the
chunk attends to the cache as it lies (`absorb_prefix`), which is more work for each of its tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks import report, timing
from benchmarks.record import KERNELS, RESULTS, device_slug, has_hopper, write_record
from flashmla_jax import PagedKVCache
from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.layers import MLAConfig, mha, mla

# Of DeepSeek-V3: https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json
CONFIG = MLAConfig(hidden_size=7168, num_heads=128, q_lora_rank=1536)
SOURCES = (*KERNELS, "flashmla_jax/attention.py", "flashmla_jax/layers", "benchmarks/prefill.py")
IMPLEMENTATIONS: tuple[mha.Implementation, ...] = ("cudnn", "xla")
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal attention of a prompt to itself."""

    tokens: int

    def flops(self, config: MLAConfig) -> float:
        """Of both products, half of whose results are masked and do not count."""
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return self.tokens**2 * config.num_heads * head_dim

    def program(self, config: MLAConfig, implementation: mha.Implementation) -> timing.Program:
        """One call."""
        qk = config.qk_nope_head_dim + config.qk_rope_head_dim
        sizes = (qk, qk, config.v_head_dim)
        q, k, v = (
            jax.random.normal(key, (1, self.tokens, config.num_heads, size), jnp.bfloat16)
            for key, size in zip(jax.random.split(jax.random.key(0), 3), sizes, strict=True)
        )

        @jax.jit
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            scale = config.softmax_scale
            return mha.attention(q, k, v, scale, causal=True, implementation=implementation)[0]

        return lambda: attend(q, k, v)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A prompt through a layer, so many tokens at a time, into the cache."""

    tokens: int
    chunk: int
    absorb_prefix: bool
    fp8: bool = False  # the cache

    def program(self, config: MLAConfig) -> timing.Program:
        """All chunks, one program each; gives the layer's outputs for the last one."""
        keys = iter(jax.random.split(jax.random.key(0), 100))
        params = {
            name: {
                leaf: jax.random.normal(next(keys), shape, jnp.bfloat16) * shape[0] ** -0.5
                if leaf == "kernel"
                else jnp.ones(shape, jnp.bfloat16)
                for leaf, shape in leaves.items()
            }
            for name, leaves in mla.parameter_shapes(config).items()
        }
        params = mla.absorb(params, config)
        x = jax.random.normal(next(keys), (1, self.tokens, config.hidden_size), jnp.bfloat16)
        chunks = [x[:, i : i + self.chunk] for i in range(0, self.tokens, self.chunk)]
        pages = self.tokens // PAGE_SIZE
        cache = PagedKVCache.create(
            num_layers=1,
            num_pages=pages,
            batch=1,
            max_pages_per_seq=pages,
            dtype="fp8" if self.fp8 else jnp.bfloat16,
        )

        @functools.partial(jax.jit, donate_argnames="cache")
        def read(params: Any, x: jax.Array, cache: PagedKVCache) -> Any:
            cache, _ = cache.allocate(jnp.full(1, x.shape[1]))
            return mla.prefill_into_cache(
                params, config, x, cache, 0, absorb_prefix=self.absorb_prefix
            )

        forget = jax.jit(lambda cache: cache.truncate(jnp.zeros(1, jnp.int32)), donate_argnums=0)

        def read_all() -> jax.Array:
            nonlocal cache
            cache = forget(cache)
            for x in chunks:
                out, cache = read(params, x, cache)
            return out

        return read_all


ATTENTION = [Attention(4096), Attention(16384)]
CHUNKS = [
    Chunks(32768, chunk, absorb) for chunk in (256, 512, 1024, 4096) for absorb in (False, True)
] + [Chunks(32768, chunk, absorb, fp8=True) for chunk in (256, 512) for absorb in (False, True)]


def seconds(program: timing.Program) -> tuple[float, list[float]]:
    """The median, and every sample in microseconds."""
    samples = timing.gpu_seconds(program, REPEATS)
    return statistics.median(samples), [round(x * 1e6, 1) for x in samples]


def measure_attention(case: Attention, config: MLAConfig = CONFIG) -> list[dict[str, Any]]:
    """Rows of the record, one for each implementation."""
    rows = []
    for implementation in IMPLEMENTATIONS:
        median, samples = seconds(case.program(config, implementation))
        rows.append(
            {
                "tokens": case.tokens,
                "implementation": implementation,
                "us": round(median * 1e6, 1),
                "samples_us": samples,
                "tflops": round(case.flops(config) / median / 1e12, 1),
            }
        )
    return rows


def measure_chunks(case: Chunks, config: MLAConfig = CONFIG) -> dict[str, Any]:
    """A row of the record."""
    median, samples = seconds(case.program(config))
    return {
        "tokens": case.tokens,
        "chunk": case.chunk,
        "absorb_prefix": case.absorb_prefix,
        "fp8": case.fp8,
        "us": round(median * 1e6, 1),
        "samples_us": samples,
        "tokens_per_s": round(case.tokens / median),
    }


def markdown(record: dict[str, Any]) -> str:
    """A record as Markdown tables."""
    lines = ["| prompt | attention by | time | TFLOP/s |", "|---|---|---|---|"]
    for row in record["results"]["attention"]:
        cells = [row["tokens"], row["implementation"], report.time(row["us"]), row["tflops"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| prompt | in chunks of | cache | what it has | a layer's time | tokens/s |"]
    lines.append("|---|---|---|---|---|---|")
    for row in record["results"]["chunks"]:
        form = "as it lies" if row["absorb_prefix"] else "expanded"
        dtype = "FP8" if row["fp8"] else "bfloat16"
        cells = [
            row["tokens"],
            row["chunk"],
            dtype,
            form,
            report.time(row["us"]),
            row["tokens_per_s"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    where = f"{record['device']}, {record['date']}, `{record['command']}`"
    return "\n".join([*lines, "", f"{where}: DeepSeek-V3's attention, one prompt."])


def main() -> int:
    if not has_hopper():
        return 1
    console = Console()
    results: dict[str, list[dict[str, Any]]] = {"attention": [], "chunks": []}
    for attention in ATTENTION:
        results["attention"] += measure_attention(attention)
        console.print(results["attention"][-len(IMPLEMENTATIONS) :])
    for chunks in CHUNKS:
        results["chunks"].append(measure_chunks(chunks))
        console.print(results["chunks"][-1])
    path = write_record(RESULTS / f"{device_slug()}_prefill.json", results, "make bench", SOURCES)
    print(f"wrote {path}")
    print(markdown(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
