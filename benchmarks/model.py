"""Decoding steps of a whole model on a Hopper GPU: random weights in DeepSeek-V2-Lite's shapes.

    python -m benchmarks.model

Part of `make bench`; a record under benchmarks/results/. A step takes a token of every sequence
through all layers and gives the next ones, greedily; the first ones are random, a different one for
each sequence. It is measured as a loop of a user's would run it: programs are started one after
another, the host waits for the last one.

Where there are few tokens, all layers are one call of kernels, and the logits are another
(`flashmla_jax.models.few_tokens`). Beside such a step stands the same model with XLA's layers and
logits, which attend with the op; and with gather + einsum in place of that (which brings the tokens
of an FP8 cache back to bfloat16 when it has gathered them). And what the memory
would allow: the weights that a step needs (all but the embedding, of the experts those that its
tokens have chosen, which are counted in the same steps) and the cached tokens, read once at the
bandwidth that was measured in the same run.

What the engine makes of it stands beside: so many requests at once, how fast their prompts are
read, in chunks between the decoding steps of those that are through, and how many tokens a second
come when all decode, each handed to the host.

Attention's share is of a step on the device, from a profile: of the kernels that have the op's
names, its combine included. The step of a few tokens has no combine: what merges the partial
results there is part of another kernel (docs/kernel.md), and does not count.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import flashmla_jax as fm
from benchmarks import decode, report, timing
from benchmarks.record import MODELS, RESULTS, device_slug, has_hopper, write_record
from flashmla_jax.cache import layout
from flashmla_jax.engine import CHUNK, Engine
from flashmla_jax.layers import mla
from flashmla_jax.models import DeepSeekConfig, deepseek, few_tokens, init_params

CONTEXT, SERVED = 4096, (1, 32)
SAMPLES, STEPS = 3, 40  # and as many steps before them
# https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json, without its YaRN.
CONFIG = DeepSeekConfig(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    first_k_dense_replace=1,
    max_position_embeddings=163840,
)

FOOTNOTE = f"""\
A step of up to {few_tokens.MAX_TOKENS} tokens is one call of kernels for all layers, and one for
the logits; with more, layers and logits are XLA's anyway, but for attention and experts."""
ENGINE = """\
The same in the engine, with requests that come together: tokens a second while all decode, and how
fast their prompts of {context} tokens were read before, in chunks of {chunk}."""


@dataclasses.dataclass(frozen=True)
class Case:
    """So many sequences of `context` tokens, in a cache of bfloat16 or "fp8"."""

    batch: int
    context: int
    cache: str = "bfloat16"


CASES = (Case(1, CONTEXT), Case(1, CONTEXT, "fp8"), Case(32, CONTEXT), Case(128, CONTEXT))
# Kernels of csrc/sm90/attention, by the names that a profile has, mangled or not.
ATTENTION = r"flashmla.*(wide|paired|narrow|CombineKernel)"


def full_cache(config: DeepSeekConfig, case: Case) -> fm.PagedKVCache:
    """A cache of sequences of random tokens, with room for the steps that follow."""
    pages = -(-(case.context + (1 + SAMPLES) * STEPS) // 64)
    cache = fm.PagedKVCache.create(
        num_layers=config.num_hidden_layers,
        num_pages=case.batch * pages,
        batch=case.batch,
        max_pages_per_seq=pages,
        dtype=case.cache,
    )

    @jax.jit
    def random_pool(key: jax.Array) -> jax.Array:
        kv = jax.random.normal(key, (*cache.pages[0].shape[:-1], 576), cache.dtype)
        return layout.quantize(kv) if cache.is_fp8 else kv

    keys = jax.random.split(jax.random.key(1), config.num_hidden_layers)
    pools = tuple(random_pool(key) for key in keys)
    lengths = jnp.full(case.batch, case.context, jnp.int32)
    return dataclasses.replace(cache, pages=pools).allocate(lengths)[0]


def start(config: DeepSeekConfig, case: Case) -> tuple[jax.Array, fm.PagedKVCache]:
    """What the first step reads: random tokens int32[batch, 1], all different, and a full cache."""
    ids = np.random.default_rng(0).choice(config.vocab_size, (case.batch, 1), replace=False)
    return jnp.asarray(ids, jnp.int32), full_cache(config, case)


def decoding(config: DeepSeekConfig, params: Any, case: Case) -> timing.Program:
    """A program that decodes the next step whenever it is called, and returns its tokens."""

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params: Any, ids: jax.Array, cache: fm.PagedKVCache) -> Any:
        logits, cache, _ = deepseek.decode_step(params, config, ids, cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    ids, cache = start(config, case)

    def next_step() -> jax.Array:
        nonlocal ids, cache
        ids, cache = step(params, ids, cache)
        return ids

    return next_step


def experts_read(config: DeepSeekConfig, params: Any, case: Case) -> float:
    """How many experts of a layer a step's tokens choose, on average over layers and timed steps.

    It takes the steps once more, with XLA's layers, and has them give what their routers chose.
    """
    chosen: list[jax.Array] = []

    def route(*args: Any) -> Any:
        experts, shares = router(*args)
        chosen.append(experts)
        return experts, shares

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params: Any, ids: jax.Array, cache: fm.PagedKVCache) -> Any:
        chosen.clear()
        cache, _ = cache.allocate(jnp.ones(case.batch, jnp.int32))
        hidden, cache = deepseek.decode_hidden(params, config, ids, cache)
        logits = deepseek.head(params, config, hidden)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache, jnp.stack(chosen)

    router = deepseek._route
    params = of_xla(params)
    ids, cache = start(config, case)
    counts = []
    with mock.patch.object(deepseek, "_route", route):
        for number in range((1 + SAMPLES) * STEPS):
            ids, cache, experts = step(params, ids, cache)
            if number >= STEPS:
                counts += [len(np.unique(layer)) for layer in np.asarray(experts)]
    return statistics.mean(counts)


def of_xla(params: Any) -> Any:
    """Parameters of which steps of a few tokens are XLA's layers and logits, too."""
    return {name: value for name, value in params.items() if name != "one_device"}


def step_seconds(config: DeepSeekConfig, params: Any, case: Case) -> list[float]:
    """Of a decoding step, each among many; several samples."""
    next_step = decoding(config, params, case)
    samples = []
    for sample in range(1 + SAMPLES):
        begin = time.perf_counter()
        for _ in range(STEPS):
            ids = next_step()
        jax.block_until_ready(ids)
        if sample > 0:  # the first one compiles
            samples.append((time.perf_counter() - begin) / STEPS)
    return samples


def attention_share(config: DeepSeekConfig, params: Any, case: Case) -> float:
    """Of a step's time on the device."""
    repeats = 10
    kernels = timing.gpu_kernels(decoding(config, params, case), repeats)
    attention = timing.seconds_of(ATTENTION, kernels)
    if not attention:
        raise RuntimeError(f"none of {len(kernels)} kernels has one of the op's names")
    return attention / sum(timing.spans(kernels, repeats))


def step_bytes(config: DeepSeekConfig, params: Any, case: Case, experts: float) -> float:
    """What a step has to read: weights, of so many experts of a layer, and cached tokens."""
    token = layout.FP8.token_bytes if case.cache == "fp8" else 576 * 2
    total = case.batch * case.context * config.num_hidden_layers * token
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "embed_tokens" in name:
            continue
        share = 1.0
        if "experts" in name and "shared_experts" not in name:
            share = experts / config.n_routed_experts
        total += leaf.nbytes * share
    return total


def gather_einsum(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    is_fp8_kvcache: bool,
) -> tuple[jax.Array, None]:
    """In place of the op, what one would write without it, and as short as that.

    For one new token of each sequence, which sees all of them, and one KV head. Only scores are
    masked: what is in no token must be finite. FP8 tokens are brought back to bfloat16 when they
    are gathered. There is no lse.
    """
    batch, s_q, _, head_dim = q.shape
    assert s_q == k_cache.shape[2] == 1
    assert causal
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    pages = k_cache[block_table]
    if is_fp8_kvcache:
        pages = layout.dequantize(pages, dtype=q.dtype)
    tokens = pages.reshape(batch, -1, head_dim)
    scores = einsum("bshd,btd->bsht", q, tokens) * softmax_scale
    exists = jnp.arange(tokens.shape[1]) < cache_seqlens[:, None]
    p = jax.nn.softmax(jnp.where(exists[:, None, None], scores, -jnp.inf), axis=-1)
    out = einsum("bsht,btd->bshd", p.astype(q.dtype), tokens[..., :head_dim_v])
    return out.astype(q.dtype), None


def measure(config: DeepSeekConfig, params: Any, case: Case) -> dict[str, Any]:
    """What a row of the record begins with; times in microseconds."""
    samples = step_seconds(config, params, case)
    layers_of_xla = of_xla(params)
    with_op = statistics.median(step_seconds(config, layers_of_xla, case))
    with mock.patch.object(mla, "flash_mla_with_kvcache", gather_einsum):
        deepseek.decode_step.clear_cache()
        rival = statistics.median(step_seconds(config, layers_of_xla, case))
    deepseek.decode_step.clear_cache()
    step = statistics.median(samples)
    return {
        **dataclasses.asdict(case),
        "step_us": round(step * 1e6, 1),
        "samples_us": [round(x * 1e6, 1) for x in samples],
        "tokens_per_s": round(case.batch / step, 1),
        "xla_layers_step_us": round(with_op * 1e6, 1),
        "gather_einsum_step_us": round(rival * 1e6, 1),
        "speedup": round(rival / step, 2),
        "experts_read": round(experts_read(config, params, case), 2),
    }


def compare(
    row: dict[str, Any], config: DeepSeekConfig, params: Any, case: Case, read_gbps: float
) -> dict[str, Any]:
    """What it ends with: attention's share, and what the memory would allow."""
    num_bytes = step_bytes(config, params, case, row["experts_read"])
    floor_us = num_bytes / read_gbps / 1e3
    return {
        "attention_share": round(attention_share(config, params, case), 3),
        "floor_us": round(floor_us, 1),
        "of_the_floor": round(floor_us / row["step_us"], 3),
    }


def serve(config: DeepSeekConfig, params: Any, requests: int, context: int) -> dict[str, Any]:
    """So many requests with prompts of `context` random tokens in an engine, as a row."""
    # Those that begin first decode while others' prompts are read, a chunk in each step.
    most = 2 + (1 + SAMPLES) * STEPS + requests * -(-context // CHUNK)
    pages = -(-(context + most) // 64)
    engine = Engine(
        params,
        config,
        num_pages=requests * pages,
        max_seqlen=context + most,
        slots=requests,
        chunk=CHUNK,
    ).compile(draws=False)
    rng = np.random.default_rng(0)
    # When programs first run, the device and the host make ready for them.
    engine.submit(rng.integers(config.vocab_size, size=CHUNK + 1), 4, stop_tokens=())
    while engine.step():
        pass
    running = [
        engine.submit(rng.integers(config.vocab_size, size=context), most, stop_tokens=())
        for _ in range(requests)
    ]
    begin = time.perf_counter()
    while not all(request.tokens for request in running):
        engine.step()
    reading = time.perf_counter() - begin
    samples = []
    for sample in range(1 + SAMPLES):
        before, begin = sum(len(request.tokens) for request in running), time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        tokens = sum(len(request.tokens) for request in running) - before
        if sample > 0:  # in the first one, the host may find things for the first time
            samples.append(tokens / (time.perf_counter() - begin))
    return {
        "requests": requests,
        "context": context,
        "chunk": CHUNK,
        "prompt_tokens_per_s": round(requests * context / reading, 1),
        "tokens_per_s": round(statistics.median(samples), 1),
        "samples_tokens_per_s": [round(x, 1) for x in samples],
    }


def markdown(record: dict[str, Any]) -> str:
    """A record as Markdown tables."""
    columns = ["batch", "cache", "step", "tokens/s", "attention's share", "XLA's layers, this op"]
    columns += ["XLA's layers, gather + einsum", "of the limit"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in record["results"]["decode"]:
        others = [
            f"{report.time(row[name])}, {row[name] / row['step_us']:.1f}x"
            for name in ("xla_layers_step_us", "gather_einsum_step_us")
        ]
        cache = "FP8" if row["cache"] == "fp8" else row["cache"]
        cells = [row["batch"], cache, report.time(row["step_us"]), f"{row['tokens_per_s']:.0f}"]
        cells += [f"{row['attention_share']:.0%}", *others, f"{row['of_the_floor']:.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    where = f"{record['device']}, {record['date']}, `{record['command']}`"
    lines += ["", f"{where}: {record['results']['model']}'s shapes.", FOOTNOTE, ""]
    serving = record["results"]["serving"]
    lines += [ENGINE.format(**serving[0]), ""]
    lines += [
        "| requests | tokens/s | of a bare step's | tokens/s of prompts |",
        "|---|---|---|---|",
    ]
    bare = {
        row["batch"]: row["tokens_per_s"]
        for row in record["results"]["decode"]
        if row["cache"] == "bfloat16"
    }
    for row in serving:
        share = f"{row['tokens_per_s'] / bare[row['requests']]:.0%}"
        cells = [row["requests"], f"{row['tokens_per_s']:.0f}", share]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['prompt_tokens_per_s']:.0f} |")
    return "\n".join(lines)


def main() -> int:
    if not has_hopper():
        return 1
    console = Console()
    params = deepseek.absorb(init_params(CONFIG, jax.random.key(0)), CONFIG)
    rows = [measure(CONFIG, params, case) for case in CASES]
    serving = [serve(CONFIG, params, requests, CONTEXT) for requests in SERVED]
    # Profiles come last: a process that has made one starts programs slower.
    read_gbps = decode.ceilings()["read_gbps"]
    for row, case in zip(rows, CASES, strict=True):
        row |= compare(row, CONFIG, params, case, read_gbps)
    console.print(rows, serving)
    results = {"model": "DeepSeek-V2-Lite", "read_gbps": read_gbps, "decode": rows}
    results["serving"] = serving
    path = write_record(RESULTS / f"{device_slug()}_model.json", results, "make bench", MODELS)
    print(f"wrote {path}")
    print(markdown(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
