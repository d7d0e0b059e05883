"""The models against Hugging Face (golden files, see goldens/make_goldens.py) and against NumPy."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import GOLDENS, Golden, cached_tokens, load_golden

import flashmla_jax
from flashmla_jax import export_disabled_checks
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import YarnScaling
from flashmla_jax.models import deepseek
from flashmla_jax.models.deepseek import DeepSeekConfig

pytestmark = pytest.mark.usefixtures("on_cpu")

LOGITS = {"atol": 1e-5, "rtol": 0}
LATENTS = {"atol": 2e-5, "rtol": 0}

V3_JSON = json.loads((GOLDENS / "deepseek_v3" / "config.json").read_text())
V2_JSON = json.loads((GOLDENS / "deepseek_v2_lite" / "config.json").read_text())


@pytest.fixture(scope="module", params=["deepseek_v3", "deepseek_v2_lite"])
def golden(request) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="module")
def v3() -> Golden:
    return load_golden("deepseek_v3")


# --- Parity with Hugging Face --------------------------------------------------------------------


def test_goldens_reach_past_the_yarn_threshold(golden):
    assert golden.lengths.min() > golden.config.rope_scaling.original_max_position_embeddings


def test_forward_matches_hugging_face(golden):
    logits = deepseek.forward(golden.params, golden.config, golden.prompts)
    assert logits.dtype == jnp.float32
    for i, length in enumerate(golden.lengths):
        np.testing.assert_allclose(logits[i, :length], golden.prefill[i, :length], **LOGITS)


def test_prefill_and_every_decode_step_match_hugging_face(golden):
    cache = golden.cache()
    logits, cache, ok = deepseek.prefill(
        golden.params, golden.config, golden.prompts, golden.lengths, cache
    )
    assert ok.all()
    last = golden.prefill[np.arange(2), golden.lengths - 1]
    np.testing.assert_allclose(logits, last, **LOGITS)
    compiled = deepseek.decode_step._cache_size()
    for step in range(golden.next_ids.shape[1]):
        ids = golden.next_ids[:, step : step + 1]
        logits, cache, ok = deepseek.decode_step(golden.params, golden.config, ids, cache)
        assert ok.all()
        np.testing.assert_allclose(logits[:, 0], golden.decode[:, step], **LOGITS)
    assert deepseek.decode_step._cache_size() == compiled + 1

    for layer, latents in enumerate(golden.latents):
        np.testing.assert_allclose(cached_tokens(cache, layer, 0), latents, **LATENTS)


def test_an_exported_decode_step_serves_every_batch_size(v3):
    batch, num_pages, pages = jax.export.symbolic_shape("batch, num_pages, pages")
    create = functools.partial(
        PagedKVCache.create, num_layers=v3.config.num_hidden_layers, dtype=jnp.float32
    )
    cache = jax.eval_shape(
        functools.partial(create, num_pages=num_pages, batch=batch, max_pages_per_seq=pages)
    )
    ids = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    decode_step = jax.jit(functools.partial(deepseek.decode_step, v3.params, v3.config))
    checks = export_disabled_checks()
    exported = jax.export.export(decode_step, platforms=["cpu"], disabled_checks=checks)(ids, cache)
    for n in (1, 2):
        cache = create(num_pages=n + 2, batch=n, max_pages_per_seq=n)
        prompts, lengths = v3.prompts[:n], v3.lengths[:n]
        _, cache, ok = deepseek.prefill(v3.params, v3.config, prompts, lengths, cache)
        assert ok.all()
        for step in range(v3.next_ids.shape[1]):
            logits, cache, ok = exported.call(v3.next_ids[:n, step : step + 1], cache)
            assert ok.all()
            np.testing.assert_allclose(logits[:, 0], v3.decode[:n, step], **LOGITS)


def test_prefill_logits_of_all_positions(v3):
    logits, _, ok = deepseek.prefill(
        v3.params, v3.config, v3.prompts, v3.lengths, v3.cache(), all_positions=True
    )
    assert ok.all()
    for i, length in enumerate(v3.lengths):
        np.testing.assert_allclose(logits[i, :length], v3.prefill[i, :length], **LOGITS)


def test_several_tokens_in_one_decode_step(v3):
    _, cache, _ = deepseek.prefill(v3.params, v3.config, v3.prompts, v3.lengths, v3.cache())
    logits, _, ok = deepseek.decode_step(v3.params, v3.config, v3.next_ids[:, :5], cache)
    assert ok.all()
    np.testing.assert_allclose(logits, v3.decode[:, :5], **LOGITS)


def test_prompts_join_and_leave_a_running_batch(v3):
    """The second prompt comes two steps after the first, and rests while the first goes on."""
    params, config, cache = v3.params, v3.config, v3.cache()
    only = np.eye(2, dtype=bool)
    _, cache, ok = deepseek.prefill(params, config, v3.prompts, v3.lengths * only[0], cache)
    assert ok.all()
    for step in range(2):
        ids = v3.next_ids[:, step : step + 1]
        logits, cache, ok = deepseek.decode_step(params, config, ids, cache, only[0])
        assert ok.all()
        np.testing.assert_allclose(logits[0, 0], v3.decode[0, step], **LOGITS)
    np.testing.assert_array_equal(cache.cache_seqlens, [42, 0])

    logits, cache, ok = deepseek.prefill(params, config, v3.prompts, v3.lengths * only[1], cache)
    assert ok.all()
    np.testing.assert_allclose(logits[1], v3.prefill[1, v3.lengths[1] - 1], **LOGITS)
    ids = np.stack([v3.next_ids[0, 2:3], v3.next_ids[1, 0:1]])
    logits, cache, ok = deepseek.decode_step(params, config, ids, cache, np.array([True, True]))
    assert ok.all()
    np.testing.assert_allclose(logits[0, 0], v3.decode[0, 2], **LOGITS)
    np.testing.assert_allclose(logits[1, 0], v3.decode[1, 0], **LOGITS)


# --- When it does not fit ------------------------------------------------------------------------


def test_a_full_cache_is_left_alone_and_the_logits_are_nan(v3):
    params, config = v3.params, v3.config
    _, cache, ok = deepseek.prefill(
        params, config, np.zeros((2, 64), np.int32), np.array([64, 23]), v3.cache(num_pages=2)
    )
    assert ok.all()
    before = jax.tree.map(np.array, cache)
    logits, cache, ok = deepseek.decode_step(params, config, v3.next_ids[:, :1], cache)
    assert ok.tolist() == [False, True]  # the other has room in its page
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()
    np.testing.assert_array_equal(cache.cache_seqlens, [64, 24])
    np.testing.assert_array_equal(cache.block_table, before.block_table)
    for pool, old in zip(cache.pages, before.pages, strict=True):
        page = before.block_table[0, 0]
        np.testing.assert_array_equal(pool[page], old[page])


@pytest.mark.parametrize(
    ("lengths", "fit"),
    [([41, 3], [False, True]), ([3, -1], [True, False]), ([128, 128], [False, False])],
    ids=["longer than ids", "negative", "both"],
)
def test_prefill_refuses_lengths_that_do_not_fit(v3, lengths, fit):
    logits, cache, ok = deepseek.prefill(
        v3.params, v3.config, v3.prompts, np.array(lengths), v3.cache()
    )
    assert ok.tolist() == fit
    assert np.isnan(logits).any(1).tolist() == np.isnan(logits).all(1).tolist()
    np.testing.assert_array_equal(np.isnan(logits).all(1), ~ok)
    np.testing.assert_array_equal(cache.cache_seqlens, np.where(fit, lengths, 0))


def test_prefill_refuses_a_sequence_that_is_not_empty(v3):
    args = (v3.params, v3.config, v3.prompts)
    _, cache, ok = deepseek.prefill(*args, v3.lengths, v3.cache())
    assert ok.all()
    _, cache, ok = deepseek.prefill(*args, np.array([0, 3]), cache)
    assert ok.tolist() == [True, False]
    np.testing.assert_array_equal(cache.cache_seqlens, v3.lengths)


def test_shape_errors(v3):
    args = (v3.params, v3.config)
    with pytest.raises(ValueError, match=r"ids must be \[batch, tokens\].*\(2,\)"):
        deepseek.forward(*args, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=r"lengths or active must be \[batch\], got \(3,\)"):
        deepseek.prefill(*args, v3.prompts, np.zeros(3, np.int32), v3.cache())
    with pytest.raises(ValueError, match=r"at least one token, got \(2, 0\)"):
        deepseek.decode_step(*args, np.zeros((2, 0), np.int32), v3.cache())


def test_empty_batch(v3):
    params, config, ids = v3.params, v3.config, np.zeros((0, 4), np.int32)
    assert deepseek.forward(params, config, ids).shape == (0, 4, 96)
    logits, cache, ok = deepseek.prefill(
        params, config, ids, np.zeros(0, np.int32), v3.cache(batch=0)
    )
    assert ok.all()
    assert logits.shape == (0, 96)
    logits, _, ok = deepseek.decode_step(params, config, ids, cache)
    assert ok.all()
    assert logits.shape == (0, 4, 96)


def test_the_cache_is_donated(v3):
    cache = v3.cache()
    deepseek.prefill(v3.params, v3.config, v3.prompts, v3.lengths, cache)
    assert all(pool.is_deleted() for pool in cache.pages)


def test_bfloat16(v3, random_params):
    """Without experts, for a rounding error that sends a token to another one is no small error."""
    config = dataclasses.replace(v3.config, first_k_dense_replace=3)
    params = random_params(config)
    bf16 = v3._replace(config=config, params=params)
    prompts, lengths = v3.prompts[:, :8], np.array([8, 5])
    logits, cache, ok = deepseek.prefill(params, config, prompts, lengths, bf16.cache())
    assert ok.all()
    assert cache.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    ids = np.concatenate([prompts[:1], v3.next_ids[:1, :1]], axis=1)
    dense = deepseek.forward(params, config, ids)
    np.testing.assert_allclose(logits[0], dense[0, 7], atol=0.15)  # logits deviate by about 1
    logits, _, _ = deepseek.decode_step(params, config, v3.next_ids[:, :1], cache)
    np.testing.assert_allclose(logits[0, 0], dense[0, 8], atol=0.15)


def test_tied_embeddings(random_params):
    config = DeepSeekConfig.from_dict({**V2_JSON, "tie_word_embeddings": True})
    params = random_params(config, dtype=jnp.float32)
    assert "lm_head" not in params
    ids = np.arange(6, dtype=np.int32)[None]
    untied = {**params, "lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}
    np.testing.assert_allclose(
        deepseek.forward(params, config, ids),
        deepseek.forward(untied, dataclasses.replace(config, tie_word_embeddings=False), ids),
        rtol=1e-4,
        atol=1e-4,
    )


# --- The configuration ---------------------------------------------------------------------------


def test_config_of_v3():
    config = DeepSeekConfig.from_dict(V3_JSON)
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
    assert config.rope_scaling == YarnScaling(40, 16, 32, 1, 1.4, 1.0)
    assert [config.is_moe(layer) for layer in range(3)] == [False, True, True]
    assert config.mla.norm_eps == 1e-6
    assert hash(config) == hash(DeepSeekConfig.from_dict(V3_JSON))


def test_config_goes_there_and_back():
    for contents in (V3_JSON, V2_JSON, {**V3_JSON, "rope_scaling": None, "eos_token_id": [1, 2]}):
        config = DeepSeekConfig.from_dict(contents)
        assert DeepSeekConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_reads_rope_parameters():
    rope = {**V3_JSON["rope_scaling"], "rope_type": "yarn", "rope_theta": 50000.0}
    del rope["type"]
    contents = {**V3_JSON, "rope_parameters": rope}
    del contents["rope_scaling"], contents["rope_theta"]
    assert DeepSeekConfig.from_dict(contents) == dataclasses.replace(
        DeepSeekConfig.from_dict(V3_JSON), rope_theta=50000.0
    )


def test_config_file_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        DeepSeekConfig.from_json(tmp_path)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (1, {}, 1),
        (1, {"eos_token_id": None, "temperature": 0.3}, 1),
        (1, {"eos_token_id": 1}, 1),
        (1, {"eos_token_id": []}, 1),
        (1, {"eos_token_id": 2}, (1, 2)),
        (1, {"eos_token_id": [2, 1]}, (1, 2)),
        (None, {"eos_token_id": 2}, 2),
        (None, {"eos_token_id": [2, 3]}, (2, 3)),
        ([4, 5], {"eos_token_id": [5, 6, 0]}, (4, 5, 6, 0)),
    ],
)
def test_stop_tokens_of_a_folder_are_those_of_both_files(tmp_path, ours, theirs, expected):
    contents = {**V3_JSON, "eos_token_id": ours}
    config = DeepSeekConfig.from_dict(contents)
    (tmp_path / "config.json").write_text(json.dumps(contents))
    assert DeepSeekConfig.from_json(tmp_path) == config
    (tmp_path / "generation_config.json").write_text(json.dumps(theirs))
    assert DeepSeekConfig.from_json(tmp_path) == dataclasses.replace(config, eos_token_id=expected)
    assert DeepSeekConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", r"^[^:]*/generation_config\.json is no JSON"),
        ("[]", r"^[^:]*/generation_config\.json holds no JSON object"),
        ('{"eos_token_id": "</s>"}', r"generation_config\.json: eos_token_id must .* got '</s>'"),
        ('{"eos_token_id": [1, 2.0]}', r"generation_config\.json: .* got \[1, 2\.0\]"),
        ('{"eos_token_id": true}', r"generation_config\.json: .* got True"),
        ('{"eos_token_id": -1}', r"generation_config\.json: .* got -1"),
    ],
)
def test_stop_tokens_that_are_none(tmp_path, contents, message):
    (tmp_path / "config.json").write_text(json.dumps(V3_JSON))
    (tmp_path / "generation_config.json").write_text(contents)
    with pytest.raises(ValueError, match=message):
        DeepSeekConfig.from_json(tmp_path)
    with pytest.raises(ValueError, match=r"eos_token_id must be a token id.* got 'x'"):
        DeepSeekConfig.from_dict({**V3_JSON, "eos_token_id": "x"})


def test_config_of_v2_without_router_fields():
    contents = {**V2_JSON, "n_group": None, "topk_group": None}
    for name in ("scoring_func", "topk_method", "norm_topk_prob"):
        del contents[name]
    assert DeepSeekConfig.from_dict(contents) == DeepSeekConfig.from_dict(V2_JSON)


def test_config_without_experts():
    contents = {**V2_JSON, "n_routed_experts": None, "n_shared_experts": None}
    config = DeepSeekConfig.from_dict(contents)
    assert not any(config.is_moe(layer) for layer in range(config.num_hidden_layers))


EXPERT_FIELDS = {
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
}
DENSE = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
DENSE |= {"num_attention_heads": 1, "q_lora_rank": 8}


@pytest.mark.parametrize(
    "given", [{}, {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}]
)
@pytest.mark.parametrize(
    ("model_type", "index"),
    [
        ("deepseek_v2", {}),
        ("deepseek_v3", {}),
        ("glm4_moe_lite", {}),
        ("deepseek_v32", {"index_n_heads": 1, "index_head_dim": 128, "index_topk": 8}),
    ],
)
def test_file_of_a_config_without_experts(model_type, index, given):
    """As transformers wants it: no field of experts is null, and all layers are dense."""
    config = DeepSeekConfig(model_type=model_type, **DENSE | index | given)
    assert config == DeepSeekConfig(model_type=model_type, **DENSE | index)
    contents = json.loads(json.dumps(config.to_dict()))
    assert not EXPERT_FIELDS & contents.keys()
    assert contents["first_k_dense_replace"] == 3
    assert contents.get("mlp_layer_types", ["dense"] * 3) == ["dense"] * 3
    assert ("mlp_layer_types" in contents) == (model_type == "glm4_moe_lite")
    assert DeepSeekConfig.from_dict(contents) == config
    deeper = dataclasses.replace(config, num_hidden_layers=4)
    assert deeper.to_dict()["first_k_dense_replace"] == 4


def test_file_of_the_demo():
    folder = Path(flashmla_jax.__file__).parent / "demo_checkpoint"
    contents = json.loads((folder / "config.json").read_text())
    assert not EXPERT_FIELDS & contents.keys()
    assert contents["first_k_dense_replace"] == contents["num_hidden_layers"] == 3
    config = DeepSeekConfig.from_json(folder)
    assert contents.items() <= config.to_dict().items()
    assert DeepSeekConfig.from_dict(config.to_dict()) == config


YARN = V3_JSON["rope_scaling"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "llama"}, NotImplementedError, "model_type 'llama'"),
        ({"model_type": None}, NotImplementedError, "model_type None"),
        ({"kv_lora_rank": 256}, NotImplementedError, "a model with kv_lora_rank=256 and qk_rope"),
        ({"qk_rope_head_dim": 32}, NotImplementedError, "qk_rope_head_dim=32"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            NotImplementedError,
            r"quantised weights .*'weight_block_size': None.*convert the checkpoint to bfloat16",
        ),
        ({"quantization_config": {"bits": 4}}, NotImplementedError, "'quant_method': None"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act='gelu'"),
        ({"moe_layer_freq": 2}, NotImplementedError, "moe_layer_freq=2"),
        ({"rope_interleave": False}, NotImplementedError, "rope_interleave=False"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, NotImplementedError, "'linear'"),
        (
            {"rope_scaling": {**YARN, "attention_factor": 1.0}},
            NotImplementedError,
            "attention_factor=1.0",
        ),
        ({"rope_scaling": {"type": "yarn"}}, ValueError, "lack factor, original_max"),
        ({"scoring_func": "softmax"}, NotImplementedError, "scoring_func='softmax'"),
        ({"hidden_size": None, "vocab_size": None}, ValueError, "lacks vocab_size, hidden_size"),
        ({"routed_scaling_factor": None}, ValueError, "lacks routed_scaling_factor"),
        ({"n_group": None}, ValueError, "lacks n_group"),
        ({"n_group": 3}, ValueError, "^n_routed_experts=8 do not divide into n_group=3"),
        ({"n_group": 8}, ValueError, "best two experts, it has 1"),
        ({"topk_group": 5}, ValueError, "^topk_group=5 is not between 1 and n_group=4"),
        ({"num_experts_per_tok": 5}, ValueError, "^num_experts_per_tok=5 .* the 4 experts"),
        ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers must be positive, got 0"),
        ({"moe_intermediate_size": -1}, ValueError, "^moe_intermediate_size=-1"),
    ],
)
def test_config_errors(changes, error, message):
    with pytest.raises(error, match=message):
        DeepSeekConfig.from_dict({**V3_JSON, **changes})


# --- Parameters for serving ----------------------------------------------------------------------


def test_absorbed_parameters_give_the_same_logits(golden):
    config, params = golden.config, deepseek.absorb(golden.params, golden.config)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert not any("kernel" in name for name in names)
    args = golden.prompts, golden.lengths, golden.cache()
    logits, cache, ok = deepseek.prefill(params, config, *args)
    assert ok.all()
    wanted, other, _ = deepseek.prefill(golden.params, config, *args[:2], golden.cache())
    np.testing.assert_allclose(logits, wanted, atol=2e-5)
    logits, _, _ = deepseek.decode_step(params, config, golden.next_ids[:, :1], cache)
    wanted, _, _ = deepseek.decode_step(golden.params, config, golden.next_ids[:, :1], other)
    np.testing.assert_allclose(logits, wanted, atol=2e-5)


def test_absorbed_parameters_of_tied_embeddings(v3):
    config = dataclasses.replace(v3.config, tie_word_embeddings=True)
    params = {name: value for name, value in v3.params.items() if name != "lm_head"}
    ids = v3.prompts[:, :5]
    np.testing.assert_allclose(
        deepseek.forward(deepseek.absorb(params, config), config, ids),
        deepseek.forward(params, config, ids),
        atol=1e-4,
    )
