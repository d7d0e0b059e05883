"""The configurations of published models.

configs/ has the fields of their `config.json` that the library reads, and some beside them that it
does not. Of which revision or date they are is not recorded, and they need not be the files as they
were published.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers.indexer import IndexerConfig
from flashmla_jax.models import checkpoint, deepseek, init_params
from flashmla_jax.models.deepseek import DeepSeekConfig

CONFIGS = Path(__file__).parent / "configs"


def published(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


# Per model: parameters without multi-token prediction, as transformers 5.24 counts them (of LongCat
# without the kernels that it allocates for identities); layers with experts; heads, q_lora_rank and
# the sizes of a head; the softmax scale times the square root of a head's size; router.
EXPECTED = {
    "deepseek-v2-lite": (15706484224, 26, 16, None, (128, 64, 128), 1.5896, "softmax"),
    "deepseek-v2": (235741434880, 59, 128, 1536, (128, 64, 128), 1.5896, "softmax"),
    "deepseek-v3": (671026419200, 58, 128, 1536, (128, 64, 128), 1.8739, "sigmoid"),
    "deepseek-r1": (671026419200, 58, 128, 1536, (128, 64, 128), 1.8739, "sigmoid"),
    "deepseek-v3.1": (671026419200, 58, 128, 1536, (128, 64, 128), 1.8739, "sigmoid"),
    "kimi-k2-instruct": (1026408232448, 60, 64, 1536, (128, 64, 128), 1.8133, "sigmoid"),
    "glm-4.7-flash": (29943393920, 46, 20, 768, (192, 64, 256), 1.0, "sigmoid"),
    "deepseek-v3.2": (671877944064, 58, 128, 1536, (128, 64, 128), 1.8739, "sigmoid"),
    "glm-5": (743911218432, 75, 64, 2048, (192, 64, 256), 1.0, "sigmoid"),
    "longcat-flash-chat": (560664980480, 28, 64, 1536, (128, 64, 128), 1.0, "softmax"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_published_models(name):
    config = DeepSeekConfig.from_json(CONFIGS / f"{name}.json")
    num_parameters, num_moe, heads, q_lora_rank, sizes, scale, scoring = EXPECTED[name]
    layers = range(config.num_hidden_layers)
    assert sum(config.is_moe(i) or config.has_shortcut(i) for i in layers) == num_moe
    mla = config.mla
    assert (mla.num_heads, mla.q_lora_rank) == (heads, q_lora_rank)
    assert (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) == sizes
    assert mla.softmax_scale * math.sqrt(sizes[0] + sizes[1]) == pytest.approx(scale, abs=1e-4)
    assert config.scoring_func == scoring
    assert mla.norm_eps == 1e-6  # of the norms inside attention, whatever rms_norm_eps is
    shapes = [p.model_shape for p in checkpoint._parameters(config, mtp=False)]
    assert sum(map(math.prod, shapes)) == num_parameters
    assert DeepSeekConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", EXPECTED)
def test_fields_that_say_nothing_of_the_mathematics(name):
    """Those that published files have beside the ones above, and some that nobody knows yet."""
    others = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "transformers_version": "4.33.1",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "pretraining_tp": 1,
        "ep_size": 1,
        "seq_aux": True,
        "aux_loss_alpha": 0.001,
        "initializer_range": 0.02,
        "pad_token_id": None,
        "attention_dropout": 0.0,
        "a_field_to_come": {"of": ["any", "kind"]},
    }
    config = DeepSeekConfig.from_dict(published(name))
    assert DeepSeekConfig.from_dict(others | published(name)) == config


@pytest.mark.parametrize("name", EXPECTED)
def test_published_models_run(name):
    """Abstractly: with all sizes as they are, and as few layers as there are kinds of."""
    config = DeepSeekConfig.from_dict(published(name))
    config = dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    mlp = params["layers"][1]["mlp"] if not config.is_longcat else params["layers"][0]["shortcut"]
    assert mlp["experts"]["up_proj"]["weight"].shape == (
        config.n_routed_experts,
        config.moe_intermediate_size,
        config.hidden_size,
    )
    cache = jax.eval_shape(
        lambda: PagedKVCache.create(
            num_layers=2,
            num_pages=80,
            batch=2,
            max_pages_per_seq=40,  # more tokens than an indexer chooses
            index_head_dim=config.index_head_dim,
        )
    )
    ids = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    logits, after, _ = jax.eval_shape(
        lambda p, i, c: deepseek.decode_step(p, config, i, c), params, ids, cache
    )
    assert logits.shape == (2, 1, config.vocab_size)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cache
    )


def test_numbers_that_tell_the_models_apart():
    v3, kimi = (DeepSeekConfig.from_dict(published(n)) for n in ("deepseek-v3", "kimi-k2-instruct"))
    assert (v3.n_group, v3.topk_group, v3.routed_scaling_factor) == (8, 4, 2.5)
    assert (kimi.n_group, kimi.n_routed_experts, kimi.routed_scaling_factor) == (1, 384, 2.827)
    assert (kimi.rope_theta, kimi.rope_scaling.factor, kimi.rope_scaling.beta_fast) == (5e4, 32, 1)
    v2 = DeepSeekConfig.from_dict(published("deepseek-v2"))
    assert (v2.n_group, v2.topk_group, v2.routed_scaling_factor) == (8, 3, 16.0)
    assert (v2.topk_method, v2.norm_topk_prob) == ("group_limited_greedy", False)
    glm = DeepSeekConfig.from_dict(published("glm-4.7-flash"))
    assert (glm.rope_theta, glm.rope_scaling, glm.eos_token_id[0]) == (1e6, None, 154820)
    v32, glm5 = (DeepSeekConfig.from_dict(published(n)) for n in ("deepseek-v3.2", "glm-5"))
    assert v32.indexer == IndexerConfig(64, 128, 2048, rope_interleave=False)
    assert glm5.indexer == IndexerConfig(32, 128, 2048, rope_interleave=True)
    assert glm5.mla.softmax_scale == 256**-0.5
    assert v2.indexer is kimi.indexer is None
    longcat = DeepSeekConfig.from_dict(published("longcat-flash-chat"))
    assert (longcat.num_hidden_layers, longcat.num_experts_per_tok) == (56, 12)
    assert (longcat.n_routed_experts, longcat.zero_expert_num) == (512, 256)
    assert longcat.mla_scale_q_lora
    assert longcat.mla_scale_kv_lora


# --- As newer versions of transformers write them ------------------------------------------------


def as_transformers_5(contents: dict) -> dict:
    """One field for all of RoPE, beside fields that are derived from others."""
    if "rope_parameters" in contents:  # GLM-5 was published so
        return contents
    contents = {
        **contents,
        "rope_parameters": {
            **(contents.pop("rope_scaling", None) or {}),
            "rope_theta": contents.pop("rope_theta"),
        },
        "qk_head_dim": contents["qk_nope_head_dim"] + 64,
        "head_dim": 64,
        "rope_interleave": True,
        "dtype": contents.pop("torch_dtype", "bfloat16"),
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    }
    yarn = contents["rope_parameters"].get("type")
    contents["rope_parameters"]["rope_type"] = yarn or "default"
    return contents


@pytest.mark.parametrize("name", EXPECTED)
def test_rope_parameters(name):
    expected = DeepSeekConfig.from_dict(published(name))
    assert DeepSeekConfig.from_dict(as_transformers_5(published(name))) == expected


def test_layers_told_one_by_one():
    contents = published("glm-4.7-flash")
    expected = DeepSeekConfig.from_dict(contents)
    del contents["first_k_dense_replace"]
    contents["mlp_layer_types"] = ["dense"] + ["sparse"] * 46
    assert DeepSeekConfig.from_dict(contents) == expected
    contents["mlp_layer_types"] = ["dense"] * 3 + ["sparse"] * 44
    assert DeepSeekConfig.from_dict(contents).first_k_dense_replace == 3
    contents["mlp_layer_types"] = ["sparse"] + ["dense"] * 46
    with pytest.raises(NotImplementedError, match=r"mlp_layer_types=\['sparse', 'dense'"):
        DeepSeekConfig.from_dict(contents)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "deepseek-v3.2",
            {"model_type": "deepseek_v3"},
            r"'deepseek_v3' with .*'index_topk': 2048",
        ),
        (
            "glm-5",
            {"index_topk_pattern": "FSSF"},
            r"index_topk_pattern='FSSF' .*another has chosen",
        ),
        ("glm-5", {"index_topk_freq": 4}, r"index_topk_freq=4"),
        ("glm-5", {"indexer_types": ["full", "shared"]}, r"indexer_types=\['full', 'shared'\]"),
        ("kimi-linear", {}, r"'kimi_linear' with linear_attn_config=.*Kimi Delta Attention"),
        ("kimi-k2-thinking", {}, r"quantised weights .*'compressed-tensors'"),
        ("longcat-flash-chat", {"zero_expert_type": "copy"}, r"zero_expert_type='copy'"),
        ("longcat-flash-chat", {"attention_method": "MHA"}, r"attention_method='MHA'"),
        ("longcat-flash-chat", {"router_bias": True}, r"router_bias=True"),
        ("longcat-flash-chat", {"ngram_vocab_size_ratio": 78}, r"ngram_vocab_size_ratio=78 .*n-gr"),
        ("glm-4.7-flash", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        (
            "glm-4.7-flash",
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor=0\.5",
        ),
        ("deepseek-v3", {"model_type": "kimi_k25"}, r"'kimi_k25' is not supported, only deepseek"),
        ("deepseek-v3", {"kv_lora_rank": 256}, r"kv_lora_rank=256"),
        ("deepseek-v3", {"qk_rope_head_dim": 0}, r"qk_rope_head_dim=0"),
        ("deepseek-v3", {"rope_scaling": {"type": "dynamic", "factor": 2}}, r"'dynamic'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(name, changes, message):
    with pytest.raises(NotImplementedError, match=message):
        DeepSeekConfig.from_dict({**published(name), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_topk": None, "index_n_heads": None}, r"lacks index_n_heads, index_topk"),
        ({"index_topk": 0}, r"topk must be at least 1, got 0"),
        ({"index_head_dim": 32}, r"head_dim must be at least 64, got 32"),
        ({"q_lora_rank": None}, r"an indexer needs a q_lora_rank"),
    ],
)
def test_errors_of_models_with_an_indexer(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepSeekConfig.from_dict({**published("deepseek-v3.2"), **changes})


def test_how_an_indexer_rotates_goes_by_the_model_unless_told():
    contents = published("glm-5")
    del contents["indexer_rope_interleave"]
    assert DeepSeekConfig.from_dict(contents).indexer.rope_interleave
    contents["indexer_rope_interleave"] = False
    assert not DeepSeekConfig.from_dict(contents).indexer.rope_interleave
    contents["indexer_types"] = ["full"] * 78
    contents["index_topk_freq"] = 1
    assert DeepSeekConfig.from_dict(contents).index_topk == 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None, "moe_topk": None}, r"lacks num_layers, moe_topk"),
        ({"q_lora_rank": None}, r"mla_scale_q_lora=True needs a q_lora_rank"),
        ({"moe_topk": 800}, r"num_experts_per_tok=800 is not between 1 and the 768"),
    ],
)
def test_errors_of_longcat(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepSeekConfig.from_dict({**published("longcat-flash-chat"), **changes})
