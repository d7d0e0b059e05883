"""DeepSeek-V2, DeepSeek-V3 and their kin: the configuration, and the model as pure functions.

Four functions run the same network:

- `forward` evaluates whole sequences with no cache, every position at once;
- `prefill` does so for prompts of different lengths and keeps their latents in a `PagedKVCache`;
- `decode_step` appends the next tokens and attends to the cache through `flash_mla_with_kvcache`;
- `extend` reads many next tokens of some sequences, after what the cache has of them.

Each but `extend`, a part of programs, is one `jax.jit` whose static arguments are the configuration
and options, so lengths and tables may change from call to call without a new compilation. `prefill`
and `decode_step` donate the cache they are given.

The multi-token prediction module of DeepSeek-V3 and some others runs after them, to guess one token
more: it reads the hidden state of each token beside the embedding of the token after it
(`mtp_extend`, `mtp_decode`), and has a layer of the cache to itself, the one after the model's.

Parameters are nested dicts with the checkpoint's names and Flax's leaves, kernels `[in, out]`;
those of routed experts lie as in the checkpoint, see `flashmla_jax.ops.routed_experts`:

    embed_tokens.embedding                      [vocab, hidden]
    layers[i].input_layernorm.scale             [hidden]
    layers[i].self_attn                         see `flashmla_jax.layers.mla`
    layers[i].self_attn.indexer                 see `flashmla_jax.layers.indexer`, if it has one
    layers[i].post_attention_layernorm.scale    [hidden]
    layers[i].mlp.{gate,up}_proj.kernel         [hidden, intermediate]      in dense layers
    layers[i].mlp.down_proj.kernel              [intermediate, hidden]
    layers[i].mlp.gate.kernel                   float32[hidden, experts]    in the others
    layers[i].mlp.gate.e_score_correction_bias  float32[experts]            V3 only
    layers[i].mlp.experts.{gate,up}_proj.weight [experts, moe_intermediate, hidden]
    layers[i].mlp.experts.down_proj.weight      [experts, hidden, moe_intermediate]
    layers[i].mlp.shared_experts                a dense mlp, as wide as n_shared_experts of them
    layers[i].shortcut                          LongCat only, see below: gate and experts
    norm.scale                                  [hidden]
    lm_head.kernel                              [hidden, vocab]     unless tied to the embedding
    mtp.{enorm,hnorm,shared_head.norm}.scale    [hidden]            the module, if it is there: it
    mtp.eh_proj.kernel                          [2 * hidden, hidden]    shares embedding and head
    mtp                                         and what a layer has

Activations have the dtype of the embedding. Routing and logits are float32.

DeepSeek-V3.2 is DeepSeek-V3 with an indexer in every layer, which chooses the tokens that a token
attends to (`flashmla_jax.layers.dsa`), and so is GLM-5 (`glm_moe_dsa`) in other sizes. Their cache
has index keys, too: `PagedKVCache.create(..., index_head_dim=config.index_head_dim)`.

Kimi-K2 is DeepSeek-V3 in other sizes, and so is GLM-4.7-Flash (`glm4_moe_lite`). LongCat-Flash has
pairs of dense layers, which here are layers like others. Experts run beside each pair: they read
what the first one's MLP reads, and their output is added after the second one's. Some experts are
the identity, which have no parameters but places in the router; and queries and latents are
multiplied by `sqrt(hidden / rank)`.

Sources: DeepSeek-V2 (arXiv:2405.04434), DeepSeek-V3 (arXiv:2412.19437), and the
`modeling_deepseek.py` that DeepSeek publishes beside each model's weights; Kimi-K2
(arXiv:2507.20534); LongCat-Flash (arXiv:2509.01322); DeepSeek-V3.2 (arXiv:2512.02556);
`modeling_glm4_moe_lite.py`, `modeling_glm_moe_dsa.py` and `modeling_longcat_flash.py` of Hugging
Face transformers. Multi-token prediction is section 2.2 of DeepSeek-V3; what its equations leave
open is as in `deepseek_mtp.py` of vLLM and `deepseek_nextn.py` of SGLang: the projection takes the
embedding first and then the hidden state; and that is the one after the model's final norm, or
after the module's own, where the module goes on from what it predicted (vllm-project/vllm#45895).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import dsa, mla
from flashmla_jax.layers.indexer import IndexerConfig
from flashmla_jax.layers.mla import MLAConfig, Params, YarnScaling
from flashmla_jax.models import few_tokens
from flashmla_jax.ops.routed_experts import Experts, routed_experts

_State = TypeVar("_State")

# The architecture that Hugging Face has for each model type.
_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
    "kimi_k2": "DeepseekV3",
    "glm4_moe_lite": "Glm4MoeLite",
    "glm_moe_dsa": "GlmMoeDsa",
    "longcat_flash": "LongcatFlash",
}
# Model types whose layers have an indexer, and whether that rotates neighbouring numbers.
_INDEXED = {"deepseek_v32": False, "glm_moe_dsa": True}
_INDEX_FIELDS = ["index_n_heads", "index_head_dim", "index_topk"]
# Fields that ask for what the layers here do not compute, and what that is.
_BEYOND = {
    "index_topk_pattern": "some of its layers attend to what the indexer of another has chosen",
    "linear_attn_config": "some of its layers are not MLA but Kimi Delta Attention",
    "ngram_vocab_size_ratio": "its embedding also looks up n-grams of tokens",
}
# Fields that must have one value, if they are there.
_FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "index_topk_freq": 1,
    "partial_rotary_factor": 1.0,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "router_bias": False,
}
# LongCat's names for other models' fields.
_LONGCAT_NAMES = {
    "num_hidden_layers": "num_layers",  # which are pairs
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "expert_ffn_hidden_size",
    "num_experts_per_tok": "moe_topk",
}
# Without these a model with experts would silently be another one.
_MOE_FIELDS = [
    "moe_intermediate_size",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "first_k_dense_replace",
]
_V3_MOE_FIELDS = ["n_group", "topk_group", "norm_topk_prob"]
# These a model without experts does not have; transformers takes no null for them.
_EXPERT_FIELDS = [
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
]
_ROUTERS = (("softmax", "greedy"), ("softmax", "group_limited_greedy"), ("sigmoid", "noaux_tc"))
_LONGCAT_ROUTER = ("softmax", "noaux_tc")
_GENERATION_CONFIG = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class DeepSeekConfig:
    """The fields of a Hugging Face `config.json` that decide what is computed; hashable.

    Names and meanings are those of the file. `rope_scaling` is parsed, and `None` for plain RoPE.
    `num_nextn_predict_layers` says that there may be parameters for multi-token prediction, see
    `has_mtp`; a model does without them. Without `n_routed_experts` all layers are dense, which
    `first_k_dense_replace` then says too, whatever was given, and other fields of experts are 0.

    Raises:
      ValueError: fields contradict each other.
      NotImplementedError: a model this library has no code for; the message names the field.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = 4096
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    num_nextn_predict_layers: int = 0
    zero_expert_num: int = 0
    mla_scale_q_lora: bool = False
    mla_scale_kv_lora: bool = False
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    indexer_rope_interleave: bool | None = None

    def __post_init__(self) -> None:
        _check_model_type({"model_type": self.model_type})
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        _ = self.mla  # checks the attention's fields
        self._check_indexer()
        if self.mla_scale_q_lora and self.q_lora_rank is None:
            raise ValueError("mla_scale_q_lora=True needs a q_lora_rank, it is None")
        if self.is_longcat and self.num_hidden_layers % 2:
            raise ValueError(
                f"layers come in pairs, got num_hidden_layers={self.num_hidden_layers}"
            )
        if self.n_routed_experts:
            self._check_experts()
        else:
            for name in _EXPERT_FIELDS:
                object.__setattr__(self, name, 0)
            object.__setattr__(self, "first_k_dense_replace", self.num_hidden_layers)

    def _check_indexer(self) -> None:
        fields = {name: getattr(self, name) for name in _INDEX_FIELDS}
        if self.model_type in _INDEXED:
            _ = self.indexer  # checks them
            if self.q_lora_rank is None:
                raise ValueError("an indexer needs a q_lora_rank, it is None")
        elif any(fields.values()):
            raise NotImplementedError(
                f"model_type {self.model_type!r} with {fields} is not supported: "
                f"only {' and '.join(_INDEXED)} have an indexer"
            )

    def _check_experts(self) -> None:
        router = (self.scoring_func, self.topk_method)
        if router not in _ROUTERS and not (self.is_longcat and router == _LONGCAT_ROUTER):
            raise NotImplementedError(
                f"no router with scoring_func={self.scoring_func!r} and "
                f"topk_method={self.topk_method!r}; "
                f"there are {', '.join('/'.join(r) for r in _ROUTERS)}"
            )
        if self.moe_intermediate_size <= 0:
            raise ValueError(
                f"moe_intermediate_size={self.moe_intermediate_size} must be positive with experts"
            )
        choice = self.n_routed_experts + self.zero_expert_num
        if self.n_group <= 0 or choice % self.n_group:
            raise ValueError(
                f"n_routed_experts={self.n_routed_experts} do not divide into "
                f"n_group={self.n_group} groups"
            )
        group_size = choice // self.n_group
        if self.topk_method == "noaux_tc" and self.n_group > 1 and group_size < 2:
            raise ValueError(f"a group is scored by its best two experts, it has {group_size}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"topk_group={self.topk_group} is not between 1 and n_group={self.n_group}"
            )
        if self.topk_method != "greedy":
            choice = self.topk_group * group_size
        if not 1 <= self.num_experts_per_tok <= choice:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is not between 1 and the {choice} "
                "experts that a token can choose from"
            )

    @property
    def mla(self) -> MLAConfig:
        """The shape of the attention layers."""
        return MLAConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
        )

    @property
    def indexer(self) -> IndexerConfig | None:
        """The shape of the attention layers' indexers, if they have any."""
        if self.model_type not in _INDEXED:
            return None
        rope_interleave = self.indexer_rope_interleave
        if rope_interleave is None:
            rope_interleave = _INDEXED[self.model_type]
        return IndexerConfig(
            num_heads=self.index_n_heads,
            head_dim=self.index_head_dim,
            topk=self.index_topk,
            rope_interleave=rope_interleave,
        )

    @property
    def is_longcat(self) -> bool:
        """Whether experts run beside pairs of dense layers."""
        return self.model_type == "longcat_flash"

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts rather than one dense MLP."""
        is_sparse = self.n_routed_experts > 0 and layer >= self.first_k_dense_replace
        return is_sparse and not self.is_longcat

    @property
    def has_mtp(self) -> bool:
        """Whether there may be a multi-token prediction module: there is code for one, as in V3."""
        return self.num_nextn_predict_layers == 1 and not self.is_longcat

    def has_shortcut(self, layer: int) -> bool:
        """Whether routed experts start beside layer `layer`, to be added after the next one."""
        return self.n_routed_experts > 0 and self.is_longcat and layer % 2 == 0

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> DeepSeekConfig:
        """Reads a Hugging Face `config.json`, or the one in folder `path`.

        Of a folder, `generation_config.json` is read too, if there is one: a sequence is to end at
        any token that either file has as `eos_token_id`. Chats of some models end at one that only
        the second has. What else is there, the defaults of sampling, is not used: how to sample is
        said where tokens are generated.

        Raises:
          ValueError: as `from_dict`; or a file is no JSON, or has an `eos_token_id` that is neither
            a token's id nor a list of them.
          NotImplementedError: as `from_dict`.
        """
        path = Path(path)
        if not path.is_dir():
            return cls.from_dict(read_json_object(path))
        config = cls.from_dict(read_json_object(path / "config.json"))
        generation = path / _GENERATION_CONFIG
        if not generation.is_file():
            return config
        contents = read_json_object(generation)
        try:
            more = _token_ids("eos_token_id", contents.get("eos_token_id"))
        except ValueError as error:
            raise ValueError(f"{generation}: {error}") from None
        stops = _token_ids("eos_token_id", config.eos_token_id)
        if not set(more) - set(stops):
            return config
        stops = tuple(dict.fromkeys((*stops, *more)))
        return dataclasses.replace(config, eos_token_id=stops[0] if len(stops) == 1 else stops)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DeepSeekConfig:
        """Takes the contents of a Hugging Face `config.json`.

        Raises:
          ValueError: a required field is missing, or fields contradict each other.
          NotImplementedError: a field asks for what there is no code for. Of quantised weights,
            DeepSeek's own are known: FP8 (e4m3) with a scale for each block of 128 x 128, which
            `load_checkpoint` multiplies out.
        """
        _check_model_type(config)
        _check_quantization(config.get("quantization_config") or {})
        for name, supported in _FIXED.items():
            if config.get(name) not in (None, supported):
                raise NotImplementedError(
                    f"{name}={config[name]!r} is not supported, only {supported!r}"
                )
        if config["model_type"] == "longcat_flash":
            config = _from_longcat(config)
        elif (layers := config.get("mlp_layer_types")) is not None:
            config = {**config, "first_k_dense_replace": _count_dense(layers)}

        is_v2 = config["model_type"] == "deepseek_v2"
        fields = dataclasses.fields(cls)
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        required.remove("q_lora_rank")  # null or absent: the query has no low-rank projection
        if config["model_type"] in _INDEXED:
            required += _INDEX_FIELDS
            _check_index_types(config.get("indexer_types") or ())
        if config.get("n_routed_experts"):
            required += _MOE_FIELDS if is_v2 else _MOE_FIELDS + _V3_MOE_FIELDS
        if missing := [name for name in required if config.get(name) is None]:
            if config["model_type"] == "longcat_flash":
                missing = [_LONGCAT_NAMES.get(name, name) for name in missing]
            raise ValueError(f"the configuration lacks {', '.join(missing)}")
        names = {field.name for field in fields} - {"rope_theta", "rope_scaling"}
        values = {name: config[name] for name in names if config.get(name) is not None}
        values.setdefault("q_lora_rank", None)
        if is_v2:
            values.setdefault("scoring_func", "softmax")
            values.setdefault("topk_method", "greedy")
            values.setdefault("norm_topk_prob", False)
        stops = _token_ids("eos_token_id", values.get("eos_token_id"))
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = stops
        rope_theta, rope_scaling = _parse_rope(config)
        return cls(**values, rope_theta=rope_theta, rope_scaling=rope_scaling)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a Hugging Face `config.json` from which `from_dict` gives this back."""
        config: dict[str, Any] = dataclasses.asdict(self)
        config["num_key_value_heads"] = self.num_attention_heads
        config["n_shared_experts"] = self.n_shared_experts or None
        if self.rope_scaling is not None:
            config["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(self.rope_scaling)}
        if self.indexer is None:
            for name in (*_INDEX_FIELDS, "indexer_rope_interleave"):
                del config[name]
        if self.is_longcat:
            for name, theirs in _LONGCAT_NAMES.items():
                config[theirs] = config.pop(name)
            config["num_layers"] //= 2
        elif not self.n_routed_experts:
            for name in _EXPERT_FIELDS:
                del config[name]
        if self.model_type == "glm4_moe_lite":  # whose code does not read first_k_dense_replace
            dense = min(self.first_k_dense_replace, self.num_hidden_layers)
            sparse = self.num_hidden_layers - dense
            config["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * sparse
        architecture = f"{_ARCHITECTURES[self.model_type]}ForCausalLM"
        return {"architectures": [architecture], "hidden_act": "silu", **config}


def read_json_object(path: Path) -> dict[str, Any]:
    """The contents of a file that must be a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    """The ids that field `name` of a configuration has: one, several or, as null, none."""
    ids = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"{name} must be a token id, a list of them or null, got {value!r}")
    return ids


def _check_model_type(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    for name, reason in _BEYOND.items():
        if config.get(name) is not None:
            raise NotImplementedError(
                f"model_type {model_type!r} with {name}={config[name]!r} is not supported: {reason}"
            )
    if model_type not in _ARCHITECTURES:
        raise NotImplementedError(
            f"model_type {model_type!r} is not supported, only {', '.join(_ARCHITECTURES)}"
        )


def _from_longcat(config: Mapping[str, Any]) -> dict[str, Any]:
    """LongCat's fields under the names of the others, with the defaults of its code."""
    renamed = {name: config.get(theirs) for name, theirs in _LONGCAT_NAMES.items()}
    if renamed["num_hidden_layers"] is not None:
        renamed["num_hidden_layers"] *= 2
    defaults = {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "rope_theta": 1e7}
    # Its code has one router, whatever these fields say.
    router = {
        **dict(zip(("scoring_func", "topk_method"), _LONGCAT_ROUTER, strict=True)),
        **{"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0},
    }
    return {**defaults, **config, **renamed, **router}


def _count_dense(mlp_layer_types: Sequence[str]) -> int:
    """How many layers come before those with experts, which newer files tell one by one."""
    dense = list(mlp_layer_types).count("dense")
    if list(mlp_layer_types) != ["dense"] * dense + ["sparse"] * (len(mlp_layer_types) - dense):
        raise NotImplementedError(
            f"mlp_layer_types={mlp_layer_types!r} is not supported, only dense layers and then "
            "sparse ones"
        )
    return dense


def _check_index_types(indexer_types: Sequence[str]) -> None:
    """Raises unless all layers have indexers of their own, which newer files tell one by one."""
    if set(indexer_types) - {"full"}:
        raise NotImplementedError(
            f"indexer_types={list(indexer_types)!r} is not supported, only 'full' layers"
        )


def _check_quantization(quantization: Mapping[str, Any]) -> None:
    """Raises unless weights are as they are or, in DeepSeek's way, FP8 with 128 x 128 blocks."""
    supported = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    actual = {name: quantization.get(name) for name in supported}
    if quantization and actual != supported:
        raise NotImplementedError(
            f"quantised weights with {actual} are not supported, only with {supported}: convert "
            "the checkpoint to bfloat16 and drop quantization_config"
        )


def _parse_rope(config: Mapping[str, Any]) -> tuple[float, YarnScaling | None]:
    """Theta and scaling, from `rope_theta` and `rope_scaling` or the newer `rope_parameters`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise NotImplementedError(
            f"partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported, only 1.0"
        )
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise NotImplementedError(f"RoPE of type {kind!r} is not supported, only default and yarn")
    if rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise NotImplementedError(
            "YaRN with attention_factor or without truncate is not supported: "
            f"attention_factor={rope.get('attention_factor')!r}, truncate={rope.get('truncate')!r}"
        )
    names = {field.name for field in dataclasses.fields(YarnScaling)}
    if missing := {"factor", "original_max_position_embeddings"} - rope.keys():
        raise ValueError(f"YaRN's parameters lack {', '.join(sorted(missing))}: {dict(rope)}")
    return theta, YarnScaling(**{name: rope[name] for name in names if rope.get(name) is not None})


@functools.partial(jax.jit, static_argnames="config")
def forward(params: Params, config: DeepSeekConfig, ids: jax.Array) -> jax.Array:
    """Logits of every position of whole sequences, without a cache.

    Args:
      params: see the module's docstring.
      config: the model's configuration.
      ids: int32[batch, s], each at least 0 and below `vocab_size`.

    Returns:
      float32[batch, s, vocab]; position `t` predicts token `t + 1` and depends on none after `t`.
    """
    _check_ids(ids)
    hidden, _ = _run_sequences(params, config, ids)
    return _logits(params, config, hidden)


@functools.partial(jax.jit, static_argnames=("config", "all_positions"), donate_argnames="cache")
def prefill(
    params: Params,
    config: DeepSeekConfig,
    ids: jax.Array,
    lengths: jax.Array,
    cache: PagedKVCache,
    *,
    all_positions: bool = False,
) -> tuple[jax.Array, PagedKVCache, jax.Array]:
    """Reads prompts into a cache.

    Args:
      params: see the module's docstring.
      config: the model's configuration.
      ids: int32[batch, s], one prompt per row, padded at the end with any valid token.
      lengths: int32[batch], at most `s`. A sequence with a prompt must be empty in the cache; one
        with length 0 is left as it is, so that prompts can join a batch that is being decoded.
      cache: donated.
      all_positions: whether to return the logits of every position instead of the last one's.

    Returns:
      logits: float32[batch, vocab], after each prompt's last token (meaningless for length 0); with
        `all_positions`, float32[batch, s, vocab], meaningless in the padding.
      cache: with the prompts in it.
      ok: bool[batch]. False if the cache had too few free pages, a prompt went to a sequence that
        is not empty, or a length is out of range: then the sequence is as before, and its logits
        are NaN.
    """
    _check_ids(ids, lengths)
    fits = (lengths <= ids.shape[1]) & ((lengths == 0) | (cache.cache_seqlens == 0))
    cache, ok = cache.allocate(jnp.where(fits, lengths, -1))  # which it refuses
    hidden, states = _run_sequences(params, config, ids)
    for layer, state in enumerate(states):
        if config.indexer is not None:
            kv, keys = state
            cache = cache.append_index(layer, keys)
        else:
            kv = state
        cache = cache.append(layer, kv[:, :, None].astype(cache.dtype))
    if not all_positions:
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    logits = _logits(params, config, hidden)
    return jnp.where(jnp.expand_dims(ok, range(1, logits.ndim)), logits, jnp.nan), cache, ok


def extend(
    params: Params,
    config: DeepSeekConfig,
    ids: jax.Array,
    rows: jax.Array,
    num_tokens: jax.Array,
    cache: PagedKVCache,
) -> tuple[jax.Array, jax.Array, PagedKVCache, jax.Array]:
    """Reads the next tokens of some sequences into a cache, after what they have there.

    Unlike `prefill`, it goes on where a sequence is, be that a prefix that others share or the
    earlier chunks of its prompt. Not jitted: a part of programs.

    Args:
      params: see the module's docstring.
      config: the model's configuration.
      ids: int32[rows, s], padded at the end.
      rows: int32[rows], the sequence of the cache that each belongs to, or the cache's batch.
      num_tokens: int32[rows], at most `s`.
      cache: any.

    Returns:
      logits: float32[rows, vocab], after each row's last token; meaningless without one.
      hidden: [rows, s, hidden], of every token, after the final norm.
      cache: with the tokens in it.
      ok: bool[batch]. False if the cache had too few free pages: then the sequence is as before.
    """
    per_sequence = jnp.zeros(cache.batch, jnp.int32).at[rows].set(num_tokens, mode="drop")
    cache, ok = cache.allocate(per_sequence)
    view = _of_rows(cache, rows)
    hidden = _embed(params, ids)
    precision = _precision(hidden.dtype)
    shortcut = None
    for layer, layer_params in enumerate(params["layers"]):
        attend = functools.partial(
            _forms(config).prefill_into_cache, cache=view, layer=layer, precision=precision
        )
        hidden, shortcut, view = _layer(layer_params, config, hidden, shortcut, attend)
    hidden = _final_norm(params, config, hidden)
    last = jnp.maximum(num_tokens - 1, 0)[:, None, None]
    logits = head(params, config, jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    return logits, hidden, _with_pools(cache, view), ok


def _with_pools(cache: PagedKVCache, view: PagedKVCache) -> PagedKVCache:
    """The cache with the tokens that were appended to a view of it."""
    return dataclasses.replace(cache, pages=view.pages, index_pages=view.index_pages)


def _of_rows(cache: PagedKVCache, rows: jax.Array) -> PagedKVCache:
    """The cache of some sequences: `rows` int32[any], or the cache's batch for an empty one."""

    def of_rows(array: jax.Array, fill_value: int) -> jax.Array:
        return array.at[rows].get(mode="fill", fill_value=fill_value)

    return dataclasses.replace(
        cache,
        block_table=of_rows(cache.block_table, -1),
        cache_seqlens=of_rows(cache.cache_seqlens, 0),
        num_new=of_rows(cache.num_new, 0),
        copy_from=of_rows(cache.copy_from, -1),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(
    params: Params,
    config: DeepSeekConfig,
    ids: jax.Array,
    cache: PagedKVCache,
    active: jax.Array | None = None,
) -> tuple[jax.Array, PagedKVCache, jax.Array]:
    """Appends the next tokens of every sequence and predicts what follows each.

    Args:
      params: see the module's docstring.
      config: the model's configuration.
      ids: int32[batch, s_q]; `s_q` is 1, or more to read several tokens at once.
      cache: donated.
      active: bool[batch]; the sequences to continue, by default all. The others are left as they
        are and take no pages; their logits mean nothing.

    Returns:
      logits: float32[batch, s_q, vocab].
      cache: with the tokens in it.
      ok: bool[batch]. False if the cache had too few free pages: then the sequence is as before,
        and its logits are NaN.
    """
    _check_ids(ids, active)
    batch, s_q = ids.shape
    num_tokens = jnp.full(batch, s_q, jnp.int32)
    if active is not None:
        num_tokens = jnp.where(active, num_tokens, 0)
    cache, ok = cache.allocate(num_tokens)
    hidden, cache = decode_hidden(params, config, ids, cache)
    return jnp.where(ok[:, None, None], head(params, config, hidden), jnp.nan), cache, ok


def decode_hidden(
    params: Params, config: DeepSeekConfig, ids: jax.Array, cache: PagedKVCache
) -> tuple[jax.Array, PagedKVCache]:
    """`decode_step` between allocation and head. Not jitted: a part of programs.

    Args:
      params: see the module's docstring.
      config: the model's configuration.
      ids: int32[batch, s_q].
      cache: has made room for `s_q` tokens of a sequence, or none: then its result means nothing.

    Returns:
      The hidden states [batch, s_q, hidden] after the final norm, and the cache with the tokens.
    """
    hidden = _embed(params, ids)
    if few_tokens.applies(params, config, ids, cache):
        hidden, cache = jax.lax.platform_dependent(
            params,
            hidden,
            cache,
            cuda=lambda *args: few_tokens.decode_layers(args[0], config, *args[1:]),
            default=lambda *args: _decode_layers(args[0], config, *args[1:]),
        )
    else:
        hidden, cache = _decode_layers(params, config, hidden, cache)
    return _final_norm(params, config, hidden), cache


def _decode_layers(
    params: Params, config: DeepSeekConfig, hidden: jax.Array, cache: PagedKVCache
) -> tuple[jax.Array, PagedKVCache]:
    precision = _precision(hidden.dtype)
    shortcut = None
    for layer, layer_params in enumerate(params["layers"]):
        attend = functools.partial(
            _forms(config).decode, cache=cache, layer=layer, precision=precision
        )
        hidden, shortcut, cache = _layer(layer_params, config, hidden, shortcut, attend)
    return hidden, cache


def mtp_extend(
    params: Params,
    config: DeepSeekConfig,
    hidden: jax.Array,
    next_ids: jax.Array,
    rows: jax.Array,
    cache: PagedKVCache,
) -> tuple[jax.Array, PagedKVCache]:
    """Multi-token prediction over what `extend` has just read. A part of programs, like that.

    Args:
      params: see the module's docstring; with `mtp`.
      config: the model's configuration.
      hidden: [rows, s, hidden], as `extend` returns them.
      next_ids: int32[rows, s], the token after each, the one after the last included.
      rows: int32[rows], as for `extend`.
      cache: as `extend` returns it, with a layer more than the model has.

    Returns:
      hidden: [rows, s, hidden], of which `head` makes logits of the token after the next.
      cache: with the module's layer of the tokens.
    """
    attend = functools.partial(
        _forms(config).prefill_into_cache,
        cache=_of_rows(cache, rows),
        layer=config.num_hidden_layers,
        precision=_precision(hidden.dtype),
    )
    hidden, view = _mtp(params, config, hidden, next_ids, attend)
    return hidden, _with_pools(cache, view)


def mtp_decode(
    params: Params,
    config: DeepSeekConfig,
    hidden: jax.Array,
    next_ids: jax.Array,
    cache: PagedKVCache,
) -> tuple[jax.Array, PagedKVCache]:
    """Multi-token prediction over what `decode_hidden` has just read. A part of programs, too.

    To guess further, what it returns takes the place of the hidden state of the next token.

    Args:
      params: see the module's docstring; with `mtp`.
      config: the model's configuration.
      hidden: [batch, s_q, hidden], of the newest tokens, after the final norm.
      next_ids: int32[batch, s_q], the token after each.
      cache: has made room for the tokens, and a layer more than the model has.

    Returns:
      As `mtp_extend`: the hidden states [batch, s_q, hidden], and the cache.
    """
    attend = functools.partial(
        _forms(config).decode,
        cache=cache,
        layer=config.num_hidden_layers,
        precision=_precision(hidden.dtype),
    )
    return _mtp(params, config, hidden, next_ids, attend)


def head(params: Params, config: DeepSeekConfig, hidden: jax.Array) -> jax.Array:
    """`hidden` [..., hidden], after the final norm, to logits float32[..., vocab]."""
    weights = params["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
    if "kernel" in weights:
        weight = weights["kernel"].T
    else:
        weight = weights["embedding"] if config.tie_word_embeddings else weights["weight"]
    product = functools.partial(
        jnp.einsum,
        "...h,vh->...v",
        precision=_precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if few_tokens.applies_to_logits(params, hidden, weight):
        return jax.lax.platform_dependent(hidden, weight, cuda=few_tokens.logits, default=product)
    return product(hidden, weight)


def absorb(params: Params, config: DeepSeekConfig) -> dict[str, Any]:
    """Parameters for serving, which lie as decoding reads them.

    All functions here take them; `save_checkpoint` does not.

    Args:
      params: see the module's docstring.
      config: the model's configuration.

    Returns:
      The same, after `mla.absorb` and `mla.transpose_kernels`; with an empty `one_device` if all
      of them are arrays on one device, for steps of a few tokens (`models.few_tokens`). Divide
      parameters over devices before, not afterwards; and to differentiate such steps, or logits of
      so few tokens, drop it. Parameters that come from here are given back as they are, without
      `one_device` if it was dropped.
    """
    attention = params["layers"][0]["self_attn"]
    if "w_uk" in attention["kv_b_proj"] and "weight" in attention["o_proj"]:
        return dict(params)

    def absorb_layer(layer: Params) -> dict[str, Any]:
        attention = mla.absorb(layer["self_attn"], config.mla)
        return mla.transpose_kernels({**layer, "self_attn": attention})

    others = {name: value for name, value in params.items() if name not in ("layers", "mtp")}
    absorbed = mla.transpose_kernels(others)
    absorbed["layers"] = [absorb_layer(layer) for layer in params["layers"]]
    if "mtp" in params:
        absorbed["mtp"] = absorb_layer(params["mtp"])
    leaves = jax.tree_util.tree_leaves(params)
    has_devices = all(
        isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves
    )
    if has_devices and len(set().union(*(leaf.devices() for leaf in leaves))) == 1:
        absorbed["one_device"] = ()
    return absorbed


def _check_ids(ids: jax.Array, per_sequence: jax.Array | None = None) -> None:
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids must be [batch, tokens] with at least one token, got {ids.shape}")
    if per_sequence is not None and per_sequence.shape != ids.shape[:1]:
        raise ValueError(
            f"lengths or active must be [batch], got {per_sequence.shape} beside ids {ids.shape}"
        )


def _precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """A float32 model is run for its exactness: no TF32 or bfloat16 passes inside its products."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _embed(params: Params, ids: jax.Array) -> jax.Array:
    embedding: jax.Array = params["embed_tokens"]["embedding"]
    return embedding[ids]


def _logits(params: Params, config: DeepSeekConfig, hidden: jax.Array) -> jax.Array:
    """`hidden` [..., hidden], before the final norm, to float32[..., vocab]."""
    return head(params, config, _final_norm(params, config, hidden))


def _final_norm(params: Params, config: DeepSeekConfig, hidden: jax.Array) -> jax.Array:
    return mla.rms_norm(hidden, params["norm"]["scale"], config.rms_norm_eps)


def _run_sequences(
    params: Params, config: DeepSeekConfig, ids: jax.Array
) -> tuple[jax.Array, list[Any]]:
    """Whole sequences int32[batch, s] through all layers.

    Returns the last hidden states [batch, s, hidden], and per layer what to cache: [batch, s, 576],
    and with an indexer [batch, s, index_head_dim] beside it.
    """
    hidden = _embed(params, ids)
    precision = _precision(hidden.dtype)
    attend = functools.partial(_forms(config).prefill, precision=precision)
    states = []
    shortcut = None
    for layer_params in params["layers"]:
        hidden, shortcut, state = _layer(layer_params, config, hidden, shortcut, attend)
        states.append(state)
    return hidden, states


class _Forms(NamedTuple):
    """How a model's layers attend: these functions of `mla`, or those of `dsa`."""

    prefill: Callable[..., Any]
    prefill_into_cache: Callable[..., Any]
    decode: Callable[..., Any]


def _forms(config: DeepSeekConfig) -> _Forms:
    index = config.indexer
    if index is None:
        return _Forms(mla.prefill, mla.prefill_into_cache, mla.decode)
    sparse = (dsa.prefill, dsa.prefill_into_cache, dsa.decode)
    return _Forms(*(functools.partial(function, index=index) for function in sparse))


def _layer(
    params: Params,
    config: DeepSeekConfig,
    hidden: jax.Array,
    shortcut: jax.Array | None,
    attend: Callable[[Params, MLAConfig, jax.Array], tuple[jax.Array, _State]],
) -> tuple[jax.Array, jax.Array | None, _State]:
    """One decoder layer on `hidden` [batch, s, hidden].

    `attend` is its attention; what it returns beside its output is passed on. `shortcut` is the
    output of experts beside the layer before, which is added here; the next one's is returned.
    """
    x = mla.rms_norm(hidden, params["input_layernorm"]["scale"], config.rms_norm_eps)
    out, state = attend(_attention(params["self_attn"], config), config.mla, x)
    hidden = hidden + out
    x = mla.rms_norm(hidden, params["post_attention_layernorm"]["scale"], config.rms_norm_eps)
    out = _moe(params["mlp"], config, x) if "experts" in params["mlp"] else _mlp(params["mlp"], x)
    hidden = hidden + out
    if shortcut is not None:
        hidden = hidden + shortcut
    return hidden, _moe(params["shortcut"], config, x) if "shortcut" in params else None, state


def _mtp(
    params: Params,
    config: DeepSeekConfig,
    hidden: jax.Array,
    next_ids: jax.Array,
    attend: Callable[[Params, MLAConfig, jax.Array], tuple[jax.Array, _State]],
) -> tuple[jax.Array, _State]:
    """The multi-token prediction module on `hidden` [batch, s, hidden], for `attend` see `_layer`.

    `next_ids` int32[batch, s] are the tokens after those of `hidden`.
    """
    module, eps = params["mtp"], config.rms_norm_eps
    embedding = mla.rms_norm(_embed(params, next_ids), module["enorm"]["scale"], eps)
    hidden = mla.rms_norm(hidden, module["hnorm"]["scale"], eps)
    x = jnp.concatenate([embedding, hidden], axis=-1)
    x = mla.linear(x, module["eh_proj"], _precision(x.dtype))
    x, _, state = _layer(module, config, x, None, attend)
    return mla.rms_norm(x, module["shared_head"]["norm"]["scale"], eps), state


def _attention(params: Params, config: DeepSeekConfig) -> Params:
    """The attention's parameters; LongCat's factors of query and latent join the norms' scales."""
    ranks = {
        "q_a_layernorm": config.q_lora_rank if config.mla_scale_q_lora else None,
        "kv_a_layernorm": config.kv_lora_rank if config.mla_scale_kv_lora else None,
    }
    factors = {name: (config.hidden_size / rank) ** 0.5 for name, rank in ranks.items() if rank}
    return {**params, **{n: {"scale": params[n]["scale"] * f} for n, f in factors.items()}}


def _mlp(params: Params, x: jax.Array) -> jax.Array:
    """The gated MLP (SwiGLU) on `x` [..., hidden]."""
    precision = _precision(x.dtype)
    gate = mla.linear(x, params["gate_proj"], precision)
    up = mla.linear(x, params["up_proj"], precision)
    return mla.linear(jax.nn.silu(gate) * up, params["down_proj"], precision)


def _moe(params: Params, config: DeepSeekConfig, x: jax.Array) -> jax.Array:
    """The mixture of experts on `x` [batch, s, hidden]."""
    tokens = x.reshape(-1, x.shape[-1])
    experts, shares = _route(params["gate"], config, tokens)
    if config.zero_expert_num:
        is_identity = experts >= config.n_routed_experts
        identity = jnp.where(is_identity, shares, 0).sum(axis=-1, keepdims=True)
        shares = jnp.where(is_identity, 0, shares)
    kernels = Experts.of(params["experts"])
    out = routed_experts(kernels, tokens, experts, shares, _precision(tokens.dtype))
    if config.zero_expert_num:
        out = out + (identity * tokens).astype(out.dtype)
    out = out.reshape(x.shape)
    if "shared_experts" in params:
        out = out + _mlp(params["shared_experts"], x)
    return out


def _route(
    params: Params, config: DeepSeekConfig, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Chooses the experts of each token, in float32.

    V3 scores with a sigmoid; a correction bias takes part in the choice but not in the weights, and
    a group of experts is worth the sum of its best two. V2 scores with a softmax, and a group is
    worth its best. V3 always scales the weights; V2 only if it has not normalised them. LongCat is
    V3 with a softmax.

    Args:
      params: `kernel` float32[hidden, experts], and V3's `e_score_correction_bias`
        float32[experts]; identities count among the experts.
      config: which router, and its numbers.
      tokens: [tokens, hidden].

    Returns:
      int32[tokens, num_experts_per_tok] experts and float32 weights of the same shape.
    """
    highest = jax.lax.Precision.HIGHEST
    logits = mla.linear(tokens.astype(jnp.float32), params, highest)
    is_v3 = config.topk_method == "noaux_tc"
    is_sigmoid = config.scoring_func == "sigmoid"
    scores = jax.nn.sigmoid(logits) if is_sigmoid else jax.nn.softmax(logits, axis=-1)
    choice = scores + params["e_score_correction_bias"] if is_v3 else scores

    if config.topk_method != "greedy" and config.n_group > 1:
        groups = choice.reshape(-1, config.n_group, choice.shape[-1] // config.n_group)
        worth = jax.lax.top_k(groups, 2 if is_v3 else 1)[0].sum(axis=-1)
        _, best = jax.lax.top_k(worth, config.topk_group)
        allowed = jax.nn.one_hot(best, config.n_group, dtype=jnp.bool_).any(axis=1)
        choice = jnp.where(allowed[:, :, None], groups, -jnp.inf).reshape(choice.shape)

    _, experts = jax.lax.top_k(choice, config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    if is_v3 or not config.norm_topk_prob:
        weights = weights * config.routed_scaling_factor
    return experts, weights
