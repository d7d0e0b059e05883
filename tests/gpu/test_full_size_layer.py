"""One layer of DeepSeek-V3, from an FP8 checkpoint on disk to logits, against NumPy.

At its true size that takes a Hopper GPU; the same in small runs everywhere.
"""

from __future__ import annotations

import collections
import json
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import mla_oracle
import numpy as np
import pytest
from safetensors.numpy import save_file

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.models import DeepSeekConfig, checkpoint, deepseek, load_checkpoint

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
# Its sizes, experts and YaRN; one layer, with experts, and few words.
V3 = json.loads((CONFIGS / "deepseek-v3.json").read_text()) | {
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 0,
    "vocab_size": 512,
}
# Blocks of scales that are cut off, and as many groups to choose from.
SMALL = V3 | {
    "hidden_size": 320,
    "num_attention_heads": 4,
    "q_lora_rank": 160,
    "moe_intermediate_size": 192,
    "n_routed_experts": 64,
    "vocab_size": 64,
}
# Tensors of 448 MiB and their scales, on a CPU of 42 MiB, which malloc gives back when freed.
LARGE = V3 | {
    "moe_intermediate_size": 65536,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
}
LARGE_ON_A_CPU = LARGE | {"moe_intermediate_size": 6144, "num_attention_heads": 8}
# Of the norm. In bfloat16 a dozen values in a row, and every weight, are rounded by 2^-9 or less of
# themselves: 0.01 in all. An expert that is left out is an error of 0.08 and more, and a model
# without YaRN one of 0.15.
TOLERANCE = {jnp.bfloat16: 2e-2, jnp.float32: 1e-5}

PROMPTS, STEPS = (140, 61), 4  # of which the second goes on in another page

Tensors = dict[str, np.ndarray]


# --- The checkpoint ------------------------------------------------------------------------------


def matrices(config: dict) -> dict[str, tuple[int, int]]:
    """The layer's FP8 matrices, [out, in]."""
    hidden, heads, size = (
        config[name] for name in ("hidden_size", "num_attention_heads", "moe_intermediate_size")
    )
    latent, rope, nope, v_dim = (
        config[name]
        for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    shapes = {
        "self_attn.q_a_proj": (config["q_lora_rank"], hidden),
        "self_attn.q_b_proj": (heads * (nope + rope), config["q_lora_rank"]),
        "self_attn.kv_a_proj_with_mqa": (latent + rope, hidden),
        "self_attn.kv_b_proj": (heads * (nope + v_dim), latent),
        "self_attn.o_proj": (hidden, heads * v_dim),
    }
    experts = [f"mlp.experts.{e}" for e in range(config["n_routed_experts"])]
    for mlp in ("mlp.shared_experts", *experts):
        shapes[f"{mlp}.gate_proj"] = shapes[f"{mlp}.up_proj"] = (size, hidden)
        shapes[f"{mlp}.down_proj"] = (hidden, size)
    return {f"model.layers.0.{name}": shape for name, shape in shapes.items()}


def write_checkpoint(folder: Path, config: dict, rng: np.random.Generator) -> None:
    """Random weights that keep activations near 1, in several files.

    FP8 matrices are pieces of one long row of random numbers, each from a place of its own, with
    scales of their own: nothing is held but that row.
    """
    shapes = matrices(config)
    std = 40  # of e4m3 numbers, which end at 448
    row = rng.standard_normal(max(map(math.prod, shapes.values())) + 2**20, np.float32) * std
    row = row.astype(ml_dtypes.float8_e4m3fn)
    tensors: Tensors = {}
    for name, (n_out, n_in) in shapes.items():
        start = rng.integers(row.size - n_out * n_in + 1)
        blocks = -(-n_out // 128), -(-n_in // 128)
        scales = rng.uniform(0.5, 1.5, blocks) * n_in**-0.5 / std
        tensors[f"{name}.weight"] = row[start:][: n_out * n_in].reshape(n_out, n_in)
        tensors[f"{name}.weight_scale_inv"] = scales.astype(np.float32)

    hidden, layer = config["hidden_size"], "model.layers.0"
    words, experts = config["vocab_size"], config["n_routed_experts"]
    normal = {
        "model.embed_tokens.weight": rng.standard_normal((words, hidden)),
        "lm_head.weight": rng.standard_normal((words, hidden)) * hidden**-0.5,
        f"{layer}.mlp.gate.weight": rng.standard_normal((experts, hidden)) * hidden**-0.5,
    }
    norms = {
        "model.norm": hidden,
        f"{layer}.input_layernorm": hidden,
        f"{layer}.post_attention_layernorm": hidden,
        f"{layer}.self_attn.q_a_layernorm": config["q_lora_rank"],
        f"{layer}.self_attn.kv_a_layernorm": config["kv_lora_rank"],
    }
    normal |= {f"{name}.weight": rng.uniform(0.7, 1.3, size) for name, size in norms.items()}
    tensors |= {name: x.astype(ml_dtypes.bfloat16) for name, x in normal.items()}
    bias = rng.standard_normal(experts, np.float32) * 0.1
    tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = bias

    files: dict[str, Tensors] = collections.defaultdict(dict)
    file_size = sum(x.nbytes for x in tensors.values()) // 6
    written, weight_map = 0, {}
    for name, x in tensors.items():
        weight_map[name] = f"model-{written // file_size}.safetensors"
        files[weight_map[name]][name] = x
        written += x.nbytes
    folder.mkdir()
    for file, content in files.items():
        save_file(content, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def read_checkpoint(folder: Path) -> Tensors:
    """The tensors, mapped from the files as the format says: headers in JSON, then numbers."""
    dtypes = {
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
    }
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            numbers = stream.tell()
        for name, entry in header.items():
            dtype, start = np.dtype(dtypes[entry["dtype"]]), entry["data_offsets"][0]
            shape = tuple(entry["shape"])
            tensors[name] = np.memmap(file, dtype, "r", numbers + start, shape)
    return tensors


# --- The oracle ----------------------------------------------------------------------------------


# The number that each byte is in e4m3. To look it up is faster than `astype`.
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def weight(tensors: Tensors, name: str) -> np.ndarray:
    """A matrix float32[in, out], multiplied out block by block."""
    x = E4M3[np.asarray(tensors[f"{name}.weight"]).view(np.uint8)]
    scales = tensors[f"{name}.weight_scale_inv"]
    for i, j in np.ndindex(scales.shape):
        x[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j]
    return x.T


def vector(tensors: Tensors, name: str) -> np.ndarray:
    return tensors[f"{name}.weight"].astype(np.float64)


def attention_params(tensors: Tensors) -> dict:
    """Those of the layer's attention, as `mla_oracle` takes them."""
    at = "model.layers.0.self_attn."
    names = {name.removeprefix(at).split(".")[0] for name in tensors if name.startswith(at)}
    return {
        name: {"scale": vector(tensors, at + name)}
        if name.endswith("norm")
        else {"kernel": weight(tensors, at + name).astype(np.float64)}
        for name in names
    }


def route(tensors: Tensors, config: dict, x: np.ndarray) -> tuple[dict[int, float], float]:
    """The weights of a token's experts; and how far the choice is from another one."""
    gate = "model.layers.0.mlp.gate"
    scores = 1 / (1 + np.exp(-(vector(tensors, gate) @ x)))
    choice = scores + tensors[f"{gate}.e_score_correction_bias"]
    groups = np.split(np.arange(choice.size), config["n_group"])
    worth = np.array([np.sort(choice[group])[-2:].sum() for group in groups])
    best = np.argsort(-worth)
    last = config["topk_group"] - 1
    gaps = [worth[best[last]] - worth[best[last + 1]]]
    allowed = np.concatenate([groups[g] for g in best[: last + 1]])
    allowed = allowed[np.argsort(-choice[allowed])]
    experts = allowed[: config["num_experts_per_tok"]]
    gaps.append(choice[experts[-1]] - choice[allowed[experts.size]])
    shares = scores[experts] / scores[experts].sum() * config["routed_scaling_factor"]
    return dict(zip(experts.tolist(), shares.tolist(), strict=True)), min(gaps)


def mlp(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    gate, up, down = (
        weight(tensors, f"model.layers.0.mlp.{name}.{part}_proj") for part in ("gate", "up", "down")
    )
    x = x.astype(np.float32)  # or large matrices would be made float64
    gated = x @ gate
    return gated / (1 + np.exp(-gated)) * (x @ up) @ down


def oracle(
    folder: Path, ids: list[np.ndarray], prompts: tuple[int, ...]
) -> tuple[list[dict[int, np.ndarray]], list[np.ndarray]]:
    """Logits of two tokens of each sequence, by their position, and all that is cached.

    One of the prompt and one after it: those whose experts are chosen most clearly, for a rounding
    error that sends a token to another expert is no small error.
    """
    tensors = read_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    params = attention_params(tensors)
    logits: list[dict[int, np.ndarray]] = []
    cached = []
    for sequence, prompt in zip(ids, prompts, strict=True):
        hidden = vector(tensors, "model.embed_tokens")[sequence]
        x = mla_oracle.norm(hidden, vector(tensors, "model.layers.0.input_layernorm"))
        out, kv = mla_oracle.layer(params, DeepSeekConfig.from_json(folder).mla, x)
        cached.append(kv)
        hidden = hidden + out
        x = mla_oracle.norm(hidden, vector(tensors, "model.layers.0.post_attention_layernorm"))
        routes = [route(tensors, config, token) for token in x]
        clearness = np.array([gap for _, gap in routes])
        logits.append({})
        for t in (int(clearness[:prompt].argmax()), prompt + int(clearness[prompt:].argmax())):
            out = hidden[t] + mlp(tensors, "shared_experts", x[t])
            for expert, share in routes[t][0].items():
                out = out + share * mlp(tensors, f"experts.{expert}", x[t])
            out = mla_oracle.norm(out, vector(tensors, "model.norm"))
            logits[-1][t] = vector(tensors, "lm_head") @ out
    return logits, cached


# --- The test ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the checkpoint is to be; it does not stay."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path / "model", ignore_errors=True)


def skip_unless_it_fits(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < 1.2 * num_bytes:
        pytest.skip(f"the checkpoint needs {num_bytes:.1e} bytes on disk, {free:.1e} are free")
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)
    if free < 2.5 * num_bytes:  # bfloat16, and room to work
        pytest.skip(f"the layer needs {2.5 * num_bytes:.1e} bytes on the GPU, {free:.1e} are free")


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def relative_error(got: jax.Array, want: np.ndarray) -> float:
    got = np.asarray(got, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check(
    folder: Path, params: dict, config: DeepSeekConfig, dtype, rng: np.random.Generator
) -> None:
    """Prompts, then a token at a time: logits and the cache are the oracle's."""
    ids = rng.integers(0, config.vocab_size, (2, max(PROMPTS) + STEPS), np.int32)
    sequences = [row[: prompt + STEPS] for row, prompt in zip(ids, PROMPTS, strict=True)]
    want, cached = oracle(folder, sequences, PROMPTS)

    cache = PagedKVCache.create(
        num_layers=1, num_pages=5, batch=2, max_pages_per_seq=3, dtype=dtype
    )
    prompts = ids[:, : max(PROMPTS)]
    logits, cache, ok = deepseek.prefill(
        params, config, prompts, np.array(PROMPTS), cache, all_positions=True
    )
    assert ok.all()
    got = [list(row[:prompt]) for row, prompt in zip(logits, PROMPTS, strict=True)]
    params = deepseek.absorb(params, config)
    for step in range(STEPS):
        tokens = np.array([[row[prompt + step]] for row, prompt in zip(ids, PROMPTS, strict=True)])
        logits, cache, ok = deepseek.decode_step(params, config, tokens, cache)
        assert ok.all()
        for i in range(2):
            got[i].append(logits[i, 0])

    errors = {
        (i, t): relative_error(got[i][t], expected)
        for i, tokens in enumerate(want)
        for t, expected in tokens.items()
    }
    tokens = cache.gather(0)[:, :, 0]
    errors |= {
        f"cache {i}": relative_error(tokens[i, : len(kv)], kv) for i, kv in enumerate(cached)
    }
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_in_small(folder: Path, dtype) -> None:
    rng = np.random.default_rng(0)
    write_checkpoint(folder, SMALL, rng)
    with jax.default_device(jax.devices("cpu")[0]):
        config, params = load_checkpoint(folder, dtype=dtype)
        check(folder, params, config, dtype, rng)


@pytest.mark.gpu
def test_at_full_size(folder: Path) -> None:
    """The host never holds the largest tensor, let alone a layer's experts."""
    sizes = [math.prod(shape) for shape in matrices(V3).values()]
    skip_unless_it_fits(folder, sum(sizes))
    rng = np.random.default_rng(1)
    write_checkpoint(folder, V3, rng)

    before, after = resident(), []
    tracemalloc.start()
    config, params = load_checkpoint(folder, progress=lambda *_: after.append(resident()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert checkpoint._PIECE_BYTES <= peak < max(sizes) / 4
    assert max(after) - before < sum(sizes) / 4  # nor does anything outside Python
    experts = params["layers"][0]["mlp"]["experts"]["up_proj"]["weight"]
    assert experts.shape == (256, 2048, 7168)
    assert experts.dtype == jnp.bfloat16
    check(folder, params, config, jnp.bfloat16, rng)


@pytest.mark.parametrize(
    ("platform", "config"),
    [("cpu", LARGE_ON_A_CPU), pytest.param("gpu", LARGE, marks=pytest.mark.gpu)],
)
def test_the_hosts_memory(folder: Path, tmp_path: Path, platform: str, config: dict) -> None:
    """Whoever takes it, for whatever: at the peak less than two of the largest tensor.

    On a CPU the parameters are there, too.
    """
    if not can_reset_peak():
        pytest.skip("needs the peak of a process's memory, as Linux tells it")
    sizes = [math.prod(shape) for shape in matrices(config).values()]
    if platform == "gpu":
        skip_unless_it_fits(folder, sum(sizes))
    rng = np.random.default_rng(2)
    write_checkpoint(tmp_path / "small", SMALL, rng)
    write_checkpoint(folder, config, rng)
    script = Path(__file__).with_name("loading_memory.py")
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if platform == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, str(script), str(tmp_path / "small"), str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    taken = json.loads(ran.stdout)
    assert taken["platform"] == platform
    assert taken["parameters"] > 2 * sum(sizes)  # in bfloat16
    on_host = taken["parameters"] if platform == "cpu" else 0
    assert checkpoint._PIECE_BYTES <= taken["peak"] - on_host < 2 * max(sizes), taken


def can_reset_peak() -> bool:
    """Whether this is Linux, and lets a process set the peak of its memory back."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return "VmHWM:" in Path("/proc/self/status").read_text()
