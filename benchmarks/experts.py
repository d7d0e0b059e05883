"""The routed experts of a layer on a Hopper GPU, beside `jax.lax.ragged_dot`.

Part of `make bench`. A time is that of one call of a compiled program of several, each with the
weights of a layer of its own: together they are beyond what the L2 cache holds. Tokens choose their
experts at random, so that some experts have more of them than others.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from flashmla_jax.ops import routed_experts as moe

# Of DeepSeek-V2-Lite.
EXPERTS, CHOSEN, HIDDEN, SIZE = 64, 6, 2048, 1408
LAYERS = 4

Layer = Callable[[moe.Experts, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """So many tokens, each of which goes through `CHOSEN` experts."""

    tokens: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens"

    def flops(self) -> int:
        """Of the products, by what they are, without what pads blocks."""
        return self.tokens * CHOSEN * 6 * HIDDEN * SIZE


CASES = [Case(tokens) for tokens in (8, 32, 128, 512, 4096)]


def weights() -> list[moe.Experts]:
    """Of all layers, in bfloat16."""

    @jax.jit
    def make(key: jax.Array) -> moe.Experts:
        shapes = (SIZE, HIDDEN), (SIZE, HIDDEN), (HIDDEN, SIZE)
        keys = jax.random.split(key, 3)
        return moe.Experts(
            *(
                jax.random.normal(key, (EXPERTS, *shape), jnp.bfloat16) * shape[1] ** -0.5
                for key, shape in zip(keys, shapes, strict=True)
            )
        )

    return [make(key) for key in jax.random.split(jax.random.key(0), LAYERS)]


def inputs(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, their experts in each layer [layers, tokens, k], and shares [tokens, k]."""
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((LAYERS, case.tokens, EXPERTS)), axis=-1)
    experts = jnp.asarray(order[..., :CHOSEN], jnp.int32)
    tokens = jax.random.normal(jax.random.key(1), (case.tokens, HIDDEN), jnp.bfloat16)
    return tokens, experts, jnp.full((case.tokens, CHOSEN), 1 / CHOSEN)


def ragged(
    weights: moe.Experts, tokens: jax.Array, experts: jax.Array, shares: jax.Array
) -> jax.Array:
    """What one would write without kernels, as short as that."""
    order = jnp.argsort(experts.reshape(-1))
    rows = tokens[order // CHOSEN]
    sizes = jnp.bincount(experts.reshape(-1), length=EXPERTS)
    gate, up, down = (jnp.swapaxes(weight, 1, 2) for weight in weights)
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes))
    rows = jax.lax.ragged_dot(hidden * jax.lax.ragged_dot(rows, up, sizes), down, sizes)
    rows = rows * shares.reshape(-1)[order][:, None]
    out = jnp.zeros(tokens.shape, jnp.float32).at[order // CHOSEN].add(rows)
    return out.astype(tokens.dtype)


def measure(case: Case, layers: list[moe.Experts], read_gbps: float) -> dict[str, Any]:
    """A row of the record. Times are in microseconds: the median, and every sample.

    The floor is reading the weights of those that are chosen, at the bandwidth of the same run.
    """
    tokens, experts, shares = inputs(case)

    def microseconds(layer: Layer, repeats: int) -> list[float]:
        @jax.jit
        def run(layers: list[moe.Experts], *arguments: jax.Array) -> list[jax.Array]:
            tokens, experts, shares = arguments
            return [
                layer(weights, tokens, chosen, shares)
                for weights, chosen in zip(layers, experts, strict=True)
            ]

        seconds = timing.gpu_seconds(lambda: run(layers, tokens, experts, shares), repeats)
        return [x / LAYERS * 1e6 for x in seconds]

    samples = microseconds(moe.routed_experts, 10)
    median = statistics.median(samples)
    chosen = statistics.mean(len(np.unique(layer)) for layer in np.asarray(experts))
    floor = chosen * sum(weight[0].nbytes for weight in layers[0]) / read_gbps / 1e3
    return {
        "case": str(case),
        "us": round(median, 2),
        "samples_us": [round(x, 2) for x in samples],
        "tflops": round(case.flops() / median / 1e6, 1),
        "reading_us": round(floor, 2),
        "ragged_dot_us": round(statistics.median(microseconds(ragged, 3)), 2),
    }
