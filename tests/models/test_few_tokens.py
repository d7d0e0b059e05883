"""Decoding steps of a few tokens: all layers in one call on a Hopper GPU, logits in another."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashmla_jax as fm
from flashmla_jax.cache import layout
from flashmla_jax.models import DeepSeekConfig, deepseek, few_tokens, init_params
from flashmla_jax.ops import _ffi

ROOT = Path(__file__).parents[2]
CPU = jax.devices("cpu")[0]
BATCH_AND_TOKENS = [(1, 1), (2, 1), (1, 3), (2, 2)]
TOLERANCES = {jnp.bfloat16: 2e-2, jnp.float16: 2.5e-3}
CACHED, STEPS = 130, 3

SIZES = {
    "vocab_size": 256,
    "hidden_size": 320,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "moe_intermediate_size": 192,
    "n_routed_experts": 24,
    "n_shared_experts": 2,
    "num_experts_per_tok": 5,
    "first_k_dense_replace": 1,
}
V2 = {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
}
CONFIGS = {
    "V2-Lite": DeepSeekConfig(**SIZES, **V2),
    "V2": DeepSeekConfig(
        **SIZES | V2 | {"topk_method": "group_limited_greedy", "q_lora_rank": 128},
        n_group=4,
        topk_group=2,
        tie_word_embeddings=True,
    ),
    "V3": DeepSeekConfig(
        **SIZES,
        model_type="deepseek_v3",
        q_lora_rank=192,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    "large": DeepSeekConfig(  # several batches of a row, tiles of a block; attention in wide shape
        **SIZES
        | {"hidden_size": 2304, "num_attention_heads": 20, "n_routed_experts": 40}
        | {"num_hidden_layers": 2, "moe_intermediate_size": 576},
        model_type="deepseek_v3",
        q_lora_rank=2304,
        n_group=5,
        topk_group=2,
    ),
    "heads": DeepSeekConfig(  # as many as DeepSeek-V3 has: two tiles of queries
        **SIZES | {"num_attention_heads": 128, "num_hidden_layers": 2},
        model_type="deepseek_v3",
        q_lora_rank=64,
        n_group=4,
        topk_group=2,
    ),
    "small": DeepSeekConfig(  # fewer steps than warps; no shared experts; no groups
        **SIZES
        | {"hidden_size": 64, "moe_intermediate_size": 64, "n_shared_experts": 0}
        | {"num_attention_heads": 1, "n_routed_experts": 2, "num_experts_per_tok": 1},
        model_type="deepseek_v3",
        q_lora_rank=64,
    ),
}


def make_params(config: DeepSeekConfig, seed: int, dtype: Any) -> dict[str, Any]:
    """Random ones, norms too. Rounding changes which experts are chosen next to never.

    Either correction biases differ by more than scores do, or there are none, and a token's logits
    are multiples of one number.
    """
    params = init_params(config, jax.random.key(seed), dtype)
    rng = np.random.default_rng(seed)
    for layer in params["layers"]:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[norm]["scale"] *= rng.uniform(0.5, 1.5, config.hidden_size).astype(dtype)
        for norm in {"q_a_layernorm", "kv_a_layernorm"} & layer["self_attn"].keys():
            scale = layer["self_attn"][norm]["scale"]
            scale *= rng.uniform(0.5, 1.5, scale.shape).astype(dtype)
            layer["self_attn"][norm]["scale"] = scale
        if "experts" not in layer["mlp"]:
            continue
        gate, experts = layer["mlp"]["gate"], config.n_routed_experts
        order = rng.permutation(experts).astype(np.float32)
        if "e_score_correction_bias" in gate and seed % 2:
            gate["e_score_correction_bias"] = jnp.array(2 * order)
        else:
            direction = rng.standard_normal((config.hidden_size, 1), np.float32)
            direction *= 4 * config.hidden_size**-0.5
            gate["kernel"] = jnp.array(direction * (order - experts / 2) / experts)
    return params


def decode(
    params: Any,
    config: DeepSeekConfig,
    batch: int,
    s_q: int,
    seed: int,
    device: jax.Device,
    cache_dtype: Any = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of some steps after random tokens, and what they leave in each layer's cache.

    On the device, nothing but the steps. The cache is of the parameters' dtype if not of another.
    """
    dtype = params["embed_tokens"]["embedding"].dtype
    is_fp8 = cache_dtype == "fp8"
    rng = np.random.default_rng(seed)
    num_pages, max_pages = 3 * batch + 1, 3
    cache = fm.PagedKVCache.create(
        num_layers=config.num_hidden_layers,
        num_pages=num_pages,
        batch=batch,
        max_pages_per_seq=max_pages,
        dtype=dtype if cache_dtype is None else cache_dtype,
    )
    lengths = rng.integers(CACHED - 5, CACHED, batch, np.int32)  # steps go on to another page
    cache, ok = cache.allocate(lengths)
    assert ok.all()
    free = np.asarray(cache.page_refs) == 0
    pools = []
    for _ in range(config.num_hidden_layers):
        pool = rng.standard_normal((num_pages, 64, 1, 576), np.float32)
        pool = np.where(free[:, None, None, None], np.nan, pool)
        pool = jnp.asarray(pool.astype(jnp.bfloat16))  # the same in all types
        pools.append(layout.quantize(pool) if is_fp8 else pool.astype(dtype))
    cache = dataclasses.replace(cache, pages=tuple(pools))
    params, cache = jax.device_put((params, cache), device)
    logits = []
    for _ in range(STEPS):
        step = rng.integers(0, config.vocab_size, (batch, s_q), np.int32)
        out, cache, ok = deepseek.decode_step(params, config, step, cache)
        assert np.all(ok)
        logits.append(np.asarray(out, np.float32))
    cache = jax.device_put(cache, CPU)
    new = []
    for layer in range(config.num_hidden_layers):
        tokens = np.asarray(cache.gather(layer), np.float32)
        new.append(np.stack([tokens[b, n : n + STEPS * s_q] for b, n in enumerate(lengths)]))
    return np.stack(logits), new


def check(
    config: DeepSeekConfig, batch: int, s_q: int, seed: int, dtype: Any, cache_dtype: Any = None
) -> None:
    """Against float32 on the CPU, which other tests compare with Hugging Face.

    New tokens in FP8 pages are held to less: where rounding makes a number another code, that is
    up to an eighth away. To the bit, `test_fp8_tokens` compares them.
    """
    is_certain = config.topk_method == "noaux_tc" and seed % 2
    device = jax.devices()[0]
    with jax.default_device(CPU):
        params = make_params(config, seed, dtype)
        in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        absorbed = deepseek.absorb(params, config)
        wanted = decode(in_float32, config, batch, s_q, seed, CPU, cache_dtype)
        actual = decode(absorbed, config, batch, s_q, seed, device, cache_dtype)
        again, _ = decode(absorbed, config, batch, s_q, seed, device, cache_dtype)
    for i, (x, y) in enumerate(zip((actual[0], *actual[1]), (wanted[0], *wanted[1]), strict=True)):
        tolerance = 4e-2 if cache_dtype == "fp8" and i > 0 else TOLERANCES[dtype]
        errors = np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)
        # Logits next to 0 may change their signs, and the token its experts.
        assert np.median(errors) < tolerance, (batch, s_q, errors)
        assert np.max(errors) < tolerance or not is_certain, (batch, s_q, errors)
    np.testing.assert_array_equal(actual[0], again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_as_in_float32(name: str, dtype: Any) -> None:
    for seed, (batch, s_q) in enumerate(BATCH_AND_TOKENS):
        check(CONFIGS[name], batch, s_q, seed, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_fp8_cache_as_in_float32(name: str) -> None:
    for seed, (batch, s_q) in enumerate(BATCH_AND_TOKENS):
        check(CONFIGS[name], batch, s_q, seed, jnp.bfloat16, "fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1, 1e-6, 1e30, np.inf])
def test_fp8_tokens(scale: float) -> None:
    """What is written into FP8 pages is what `layout.quantize` makes of a bfloat16 cache's tokens.

    In the first layer, where they are a function of the ids alone: of ordinary size, so small that
    the least scale holds, or with one column so large that others are nothing beside it, or that
    its tile is NaN.
    """
    config = dataclasses.replace(CONFIGS["V3"], num_hidden_layers=1)
    params = make_params(config, 0, jnp.bfloat16)
    attention = params["layers"][0]["self_attn"]
    norm = attention["kv_a_layernorm"]["scale"]
    norm = norm * scale if scale < 1 else norm.at[70].multiply(scale)
    attention["kv_a_layernorm"] = {"scale": norm.astype(jnp.bfloat16)}
    params = deepseek.absorb(params, config)
    tokens = []
    for dtype in (jnp.bfloat16, "fp8"):
        cache = fm.PagedKVCache.create(
            num_layers=1, num_pages=4, batch=2, max_pages_per_seq=2, dtype=dtype
        )
        cache, ok = cache.allocate(jnp.array([62, 0], jnp.int32))
        assert ok.all()
        for ids in np.random.default_rng(1).integers(0, config.vocab_size, (3, 2, 2), np.int32):
            assert few_tokens.applies(params, config, jnp.asarray(ids), cache)
            _, cache, ok = deepseek.decode_step(params, config, ids, cache)
            assert ok.all()
        start, table = np.array([[62], [0]]), np.asarray(cache.block_table)
        page, row = np.divmod(start + np.arange(6), 64)
        tokens.append(np.asarray(cache.pages[0])[np.take_along_axis(table, page, axis=1), row])
    wanted = np.asarray(layout.quantize(jnp.asarray(tokens[0])))
    assert len(np.unique(wanted[..., :512])) > 8
    np.testing.assert_array_equal(without_signs_of_nan(tokens[1]), without_signs_of_nan(wanted))


def without_signs_of_nan(tokens: np.ndarray) -> np.ndarray:
    """FP8 tokens of which a NaN is a NaN."""
    tokens = tokens.copy()
    codes, scales = tokens[..., :512], tokens[..., 512:528].view(np.float32)
    codes[codes & 127 == 127] = 127
    scales[np.isnan(scales)] = np.nan
    return tokens


def check_logits(shape: tuple[int, ...], vocab: int, size: int, dtype: Any) -> None:
    """Against exact products. A token, and a row of weights, are no other's concern."""
    rng = np.random.default_rng(vocab + len(shape))
    hidden = jnp.asarray(rng.standard_normal((*shape, size), np.float32), dtype)
    weight = jnp.asarray(rng.standard_normal((vocab, size), np.float32), dtype)
    on_one_device = {"one_device": ()}
    is_call = few_tokens.applies_to_logits(on_one_device, hidden, weight)
    assert is_call or jax.devices()[0] == CPU

    @jax.jit
    def compute(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        params = on_one_device | {"lm_head": {"weight": weight}}
        return deepseek.head(params, CONFIGS["V3"], hidden)

    actual = np.array(compute(hidden, weight))
    assert actual.dtype == np.float32
    exact = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    errors = np.linalg.norm(actual - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.max(errors) < 1e-5, (shape, vocab, size, errors)
    row = int(rng.integers(vocab))
    token = tuple(rng.integers(shape))
    actual[..., row] = np.nan
    np.testing.assert_array_equal(compute(hidden, weight.at[row].set(np.nan)), actual)
    actual[token] = np.nan
    hidden, weight = hidden.at[token].set(np.nan), weight.at[row].set(np.nan)
    np.testing.assert_array_equal(compute(hidden, weight), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(("vocab", "size"), [(64, 64), (320, 7168), (4288, 2304), (102400, 192)])
def test_logits(vocab: int, size: int, dtype: Any) -> None:
    """Fewer steps than warps, and tiles than blocks; and more."""
    for shape in ((1,), (2, 1), (3,), (1, 4)):
        check_logits(shape, vocab, size, dtype)


def lowered(params: Any, config: DeepSeekConfig, batch: int, s_q: int, **cache: Any) -> Any:
    cache = fm.PagedKVCache.create(
        **{"num_layers": config.num_hidden_layers, "num_pages": 9, "batch": batch} | cache,
        max_pages_per_seq=4,
    )
    ids = jnp.zeros((batch, s_q), jnp.int32)
    return deepseek.decode_step.lower(params, config, ids, cache)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "pool"), [("bfloat16", "bf16[9,64,1,576]"), ("fp8", "u8[9,64,1,656]")]
)
def test_in_place(dtype: str, pool: str) -> None:
    """A call of the layers and one of the head, and no copy of a pool or of the head."""
    config = CONFIGS["V3"]
    params = deepseek.absorb(make_params(config, 0, jnp.bfloat16), config)
    head = f"bf16[{config.vocab_size},{config.hidden_size}]"
    for s_q in (1, 3):
        text = lowered(params, config, 1, s_q, dtype=dtype).compile().as_text()
        assert pool in text
        assert text.count(f'custom_call_target="{_ffi.FEW_TOKENS}"') == 1
        assert text.count(f'custom_call_target="{_ffi.FEW_LOGITS}"') == 1
        assert _ffi.DENSE_DECODE not in text
        copies = [line for line in text.splitlines() if "copy(" in line]
        for array in (pool, head):
            assert not [line for line in copies if f"= {array}" in line]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("fp8", 4e-2)])
def test_sequences_that_wait_or_were_forked(dtype: str, tolerance: float) -> None:
    """As with the kernels of XLA: copy on write, and sequences that are not continued."""
    config = dataclasses.replace(CONFIGS["V3"], first_k_dense_replace=3)
    absorbed = deepseek.absorb(make_params(config, 1, jnp.bfloat16), config)
    results = []
    for params in (absorbed, {k: v for k, v in absorbed.items() if k != "one_device"}):
        rng = np.random.default_rng(4)
        cache = fm.PagedKVCache.create(
            num_layers=3, num_pages=12, batch=3, max_pages_per_seq=3, dtype=dtype
        )
        ids = rng.integers(0, 256, (3, 80), np.int32)
        lengths = np.array([80, 0, 40], np.int32)
        _, cache, _ = deepseek.prefill(params, config, ids, lengths, cache)
        cache = cache.fork(jnp.array([-1, 0, -1]))
        for active in ([True, True, False], [False, True, True], [True, True, True]):
            step = rng.integers(0, 256, (3, 1), np.int32)
            _, cache, ok = deepseek.decode_step(params, config, step, cache, np.array(active))
            assert ok.all()
        assert cache.cache_seqlens.tolist() == [82, 83, 42]
        cache.check()
        tokens = np.stack([np.asarray(cache.gather(layer), np.float32) for layer in range(3)])
        prompts = [tokens[:, 0, :80], tokens[:, 1, :80], tokens[:, 2, :40]]
        new = [tokens[:, 0, 80:82], tokens[:, 1, 80:83], tokens[:, 2, 40:42]]
        results.append([np.concatenate(x, axis=1) for x in (prompts, new)])
    (prompts, new), (prompts_of_xla, new_of_xla) = results
    np.testing.assert_array_equal(prompts, prompts_of_xla)  # copied or not
    assert np.linalg.norm(new - new_of_xla) / np.linalg.norm(new_of_xla) < tolerance


def test_absorb_says_what_is_on_one_device() -> None:
    config = CONFIGS["small"]
    params = init_params(config, jax.random.key(0))
    assert deepseek.absorb(params, config)["one_device"] == ()
    traced = jax.eval_shape(lambda params: deepseek.absorb(params, config), params)
    assert "one_device" not in traced


def test_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["V3"]
    params = deepseek.absorb(init_params(config, jax.random.key(0)), config)
    cache = fm.PagedKVCache.create(num_layers=3, num_pages=9, batch=1, max_pages_per_seq=4)

    def applies(
        params: Any = params,
        config: DeepSeekConfig = config,
        tokens: int = 1,
        cache: fm.PagedKVCache = cache,
    ) -> bool:
        return few_tokens.applies(params, config, jnp.zeros((1, tokens), jnp.int32), cache)

    monkeypatch.setattr(_ffi, "why_no_kernel", lambda *_, **__: "there is none")
    assert not applies()
    monkeypatch.setattr(_ffi, "why_no_kernel", lambda *_, **__: None)
    assert applies()
    assert applies(tokens=few_tokens.MAX_TOKENS)
    assert not applies(tokens=few_tokens.MAX_TOKENS + 1)
    for other in CONFIGS.values():  # what the tests above are about
        absorbed = deepseek.absorb(init_params(other, jax.random.key(0)), other)
        assert applies(absorbed, other, few_tokens.MAX_TOKENS)
    assert not applies({k: v for k, v in params.items() if k != "one_device"})
    create = functools.partial(
        fm.PagedKVCache.create, num_layers=3, num_pages=9, batch=1, max_pages_per_seq=4
    )
    assert applies(cache=create(dtype="fp8"))
    assert not applies(cache=create(dtype=jnp.float16))
    float16 = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    assert applies(float16, cache=create(dtype=jnp.float16))
    assert not applies(float16, cache=create(dtype="fp8"))
    assert not applies(cache=create(one_pool=True))
    float32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    assert not applies(float32, cache=create(dtype=jnp.float32))
    for field, value in (
        ("attention_bias", True),
        ("mla_scale_q_lora", True),
        ("mla_scale_kv_lora", True),
        ("hidden_size", 96),
        ("moe_intermediate_size", 100),
        ("v_head_dim", 96),
        ("qk_nope_head_dim", 192),
        ("intermediate_size", 2**20),
    ):
        assert not applies(config=dataclasses.replace(config, **{field: value})), field
    indexed = dataclasses.replace(
        config, model_type="deepseek_v32", index_n_heads=4, index_head_dim=64, index_topk=16
    )
    assert not applies(config=indexed)
    # Elsewhere the program is the usual one, without the call.
    text = lowered(params, config, 1, 1).compile().as_text()
    assert (_ffi.FEW_TOKENS in text) == (jax.devices()[0].platform == "gpu")


@pytest.mark.parametrize("tied", [False, True])
def test_where_logits_are_a_call(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    config = dataclasses.replace(CONFIGS["V3"], tie_word_embeddings=tied)
    params = deepseek.absorb(init_params(config, jax.random.key(0)), config)
    monkeypatch.setattr(_ffi, "why_no_kernel", lambda *_, **__: None)

    def is_call(
        *shape: int,
        params: Any = params,
        config: DeepSeekConfig = config,
        dtype: Any = jnp.bfloat16,
        platform: str = "cuda",
    ) -> bool:
        hidden = jax.ShapeDtypeStruct((*shape, config.hidden_size), dtype)
        head = jax.jit(lambda params, hidden: deepseek.head(params, config, hidden))
        lowered = head.trace(params, hidden).lower(lowering_platforms=(platform,))
        assert lowered.out_info.shape == (*shape, config.vocab_size)
        assert lowered.out_info.dtype == jnp.float32
        calls = lowered.as_text().count(f"@{_ffi.FEW_LOGITS}(")
        assert calls + lowered.as_text().count("dot_general") == 1
        return calls == 1

    for shape in ((), (1,), (1, 1), (4,), (2, 2)):
        assert is_call(*shape)
        assert not is_call(*shape, platform="cpu")
    for shape in ((5,), (1, 5), (0,)):
        assert not is_call(*shape)
    assert not is_call(1, params={k: v for k, v in params.items() if k != "one_device"})
    assert not is_call(1, dtype=jnp.float32)  # unlike the weights
    for dtype, has_kernel in ((jnp.float16, True), (jnp.float32, False)):
        converted = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        assert is_call(1, params=converted, dtype=dtype) == has_kernel
    for name, size in (("vocab_size", 250), ("vocab_size", 2**20 + 64), ("hidden_size", 96)):
        other = dataclasses.replace(config, **{name: size})
        weight = jax.ShapeDtypeStruct((other.vocab_size, other.hidden_size), jnp.bfloat16)
        head = {"embed_tokens": {"embedding": weight}, "lm_head": {"weight": weight}}
        assert not is_call(1, params=head | {"one_device": ()}, config=other)
    monkeypatch.setattr(_ffi, "why_no_kernel", lambda *_, **__: "there is none")
    assert not is_call(1)


def test_same_numbers_in_c() -> None:
    """Limits, and the order of operands and results."""
    header = (ROOT / "csrc/sm90/few_tokens.h").read_text()
    limits = {k: int(v) for k, v in re.findall(r"constexpr int k(\w+) = (\d+);", header)}
    assert limits == {
        "MaxFewTokens": few_tokens.MAX_TOKENS,
        "FewAlignment": few_tokens._ALIGNMENT,
        "MaxFewSize": few_tokens._MAX_SIZE,
        "NopeDim": few_tokens._NOPE_DIM,
        "MaxFewHeads": few_tokens._MAX_HEADS,
        "MaxExperts": few_tokens._MAX_EXPERTS,
        "MaxExpertsPerToken": few_tokens._MAX_EXPERTS_PER_TOKEN,
        "MaxExpertGroups": few_tokens._MAX_EXPERT_GROUPS,
    }
    handler = (ROOT / "csrc/ffi/few_tokens.cc").read_text()
    enums = {
        name: [re.sub(r"(?<!^)(?=[A-Z])", "_", x).lower() for x in re.findall(r"\bk(\w+),", body)]
        for name, body in re.findall(r"enum (\w+) {(.*?)};", handler, re.DOTALL)
    }
    assert enums["LayerOperand"] == ["cache", *few_tokens._Layer._fields, "layer_operands"]
    assert len(enums["Result"]) == 1 + few_tokens._NUM_WORKSPACES + 1
