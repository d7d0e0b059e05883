"""Makes the golden files beside it, with Hugging Face transformers.

    pip install torch==2.13.0 transformers==5.24.0 safetensors
    python tests/models/goldens/make_goldens.py [MODEL ...]

For each model below, or for those named, a folder with a checkpoint (config.json, model.safetensors
in bfloat16) and `goldens.npz`:

    prompts   int32[2, 40]     two prompts, padded with 0
    lengths   int32[2]         40 and 23
    next_ids  int32[2, 8]      the tokens that decoding is fed, one after the other
    prefill   float32[2, 40, vocab]   logits of every position (of the padding: 0)
    decode    float32[2, 8, vocab]    logits of the cached decode steps
    latents   float32[layers, 48, 576]   the cache of the first sequence after the last step

Models with an indexer (DeepSeek-V3.2 and GLM-5, made with torch 2.14.1) have prompts of 70 tokens,
so that the cache has more than a page, and choose 16 of them. Of the first sequence there is also

    index_keys  float32[layers, 78, index_head_dim]   the indexers' cache
    selected    int8[layers, 78, 16]    the tokens that each token attends to, in order; -1 where it
                                        has fewer

DeepSeek-V3 also has a module for multi-token prediction, which transformers does not run; here it
is put together from transformers' layers, as vLLM and SGLang do it. It is in files of its own, for
checkpoints come with and without it: `mtp.safetensors`, named as in published checkpoints with the
copies of embedding and head, and `mtp.npz`:

    logits    float32[2, 47, vocab]      after each token of prompt and next_ids but the last, of
                                         which there are 47 and 30, of the token after the next

The models are tiny, but every number is computed in float32 from weights that are bfloat16 numbers,
so a correct model agrees to rounding. What makes the goldens tell right from wrong:

- `original_max_position_embeddings` is 16, so that positions from there on need YaRN;
- V3 has `mscale` unlike `mscale_all_dim`, so that sines and cosines carry a factor other than 1;
- no two sizes that could be confused are equal (nope 24, rope 64, v 40, 3 heads);
- `rms_norm_eps` is far from the 1e-6 that the norms inside attention keep to;
- norms are not 1, the router's correction bias is not 0 and decides some choices;
- weights are so large that logits have a standard deviation of 0.5, and attention is not flat.

Where transformers 5.24 departs from the `modeling_deepseek.py` that DeepSeek publishes:

- V3 de-interleaves the rotary dimensions (evens, then odds) and caches them so; this script puts
  them back into the order of DeepSeek's code, in which they are neighbours. V2 keeps that order.
- V2 ignores `norm_topk_prob` (no published V2 sets it, nor does this one).
- The rotary dimensions of GLM-5's index keys are put back, too.
- Index keys are neither rotated by a Hadamard matrix, which would change no dot product, nor FP8.
- The published V3 code skips the normalisation if only one expert is chosen; no model does that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    DynamicCache,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

HERE = Path(__file__).parent
LENGTHS = (40, 23)
INDEXED_LENGTHS = (70, 23)
STEPS = 8

COMMON = {
    "vocab_size": 96,
    "hidden_size": 60,
    "intermediate_size": 80,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 64,
    "v_head_dim": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-3,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 3,
        "q_lora_rank": 48,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {**YARN, "mscale": 1.4, "mscale_all_dim": 1.0},
    },
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_hidden_layers": 2,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_hidden_layers": 2,
        "q_lora_rank": 48,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 4.0,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "kimi_k2": {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 2,
        "q_lora_rank": 48,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000.0,
        "rope_scaling": {
            **YARN,
            "factor": 32.0,
            "beta_fast": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v32": {
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 24,
        "index_n_heads": 64,
        "index_head_dim": 72,
        "index_topk": 16,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {**YARN, "mscale": 1.4, "mscale_all_dim": 1.0},
    },
    "glm_moe_dsa": {
        "model_type": "glm_moe_dsa",
        "architectures": ["GlmMoeDsaForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 40,
        "v_head_dim": 56,
        "index_n_heads": 64,
        "index_head_dim": 72,
        "index_topk": 16,
        "indexer_rope_interleave": True,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "glm4_moe_lite": {
        "model_type": "glm4_moe_lite",
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "num_hidden_layers": 2,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 40,
        "v_head_dim": 56,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 1.0,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
    },
    "longcat_flash": {
        "model_type": "longcat_flash",
        "architectures": ["LongcatFlashForCausalLM"],
        "num_layers": 2,
        "ffn_hidden_size": 80,
        "expert_ffn_hidden_size": 24,
        "moe_topk": 3,
        "q_lora_rank": 48,
        "zero_expert_num": 4,
        "zero_expert_type": "identity",
        "attention_method": "MLA",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "router_bias": False,
        "routed_scaling_factor": 6.0,
        "rope_theta": 10000000.0,
    },
}
CLASSES = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "kimi_k2": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "longcat_flash": (LongcatFlashConfig, LongcatFlashForCausalLM),
}
# Fields of COMMON under other names.
LONGCAT_DROPS = (
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "num_key_value_heads",
)


class Predictor(torch.nn.Module):
    """Multi-token prediction: layer `num_hidden_layers` of a checkpoint."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.enorm, self.hnorm = DeepseekV3RMSNorm(size, eps), DeepseekV3RMSNorm(size, eps)
        self.eh_proj = torch.nn.Linear(2 * size, size, bias=False)
        self.layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.norm = DeepseekV3RMSNorm(size, eps)

    def logits(self, model: DeepseekV3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
        """float32[1, s - 1, vocab] for int64[1, s]; transformers' last state is after the norm."""
        hidden = model.model(ids).last_hidden_state[:, :-1]
        embedding = model.model.embed_tokens(ids[:, 1:])
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))
        s = x.shape[1]
        positions = torch.arange(s)[None]
        mask = torch.full((s, s), -torch.inf).triu(1)[None, None]
        x = self.layer(
            x,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=model.model.rotary_emb(x, positions),
        )
        return model.lm_head(self.norm(x))

    def tensors(self, model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
        """Under the names of published checkpoints."""
        renamed = {"layer": "", "norm": "shared_head.norm."}
        tensors = {}
        for name, tensor in checkpoint_tensors(self).items():
            first, _, rest = name.partition(".")
            tensors[renamed.get(first, f"{first}.") + rest] = tensor
        tensors["embed_tokens.weight"] = model.model.embed_tokens.weight.detach().bfloat16()
        tensors["shared_head.head.weight"] = model.lm_head.weight.detach().bfloat16()
        at = f"model.layers.{self.config.num_hidden_layers}"
        return {f"{at}.{name}": tensor for name, tensor in tensors.items()}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws every weight, in numbers that bfloat16 has."""
    is_sigmoid = model.config.model_type != "longcat_flash"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in tensors:
            if "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                value = 0.2 * noise if is_sigmoid else 0.03 * noise
            elif name.endswith("norm.bias"):
                value = 0.3 * noise
            elif tensor.ndim == 1:  # norms
                value = 1 + 0.3 * noise
            elif "embed_tokens" in name:
                value = noise
            else:
                value = noise * tensor.shape[-1] ** -0.5
                if "lm_head" in name:
                    value *= 0.5
            tensor.copy_(value.bfloat16().float())


def checkpoint_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors under the names of published checkpoints, experts one by one."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for expert, gate_up in enumerate(tensor[: model.config.n_routed_experts]):
                gate, up = gate_up.chunk(2)
                tensors[f"{stem}.{expert}.gate_proj.weight"] = gate
                tensors[f"{stem}.{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            for expert, down in enumerate(tensor):
                tensors[f"{stem}.{expert}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}


def interleaved(rope: torch.Tensor) -> torch.Tensor:
    """The rotary dimensions in DeepSeek's order, of which transformers has the even ones first."""
    return torch.stack(rope.chunk(2, dim=-1), dim=-1).flatten(-2)


def cached_latents(cache: DynamicCache, deinterleaved: bool) -> np.ndarray:
    """What the cache holds: float32[layers, tokens, 576]."""
    layers = []
    for layer in cache.layers:
        latent, rope = layer.keys[0, 0], layer.values[0, 0]
        if deinterleaved:
            rope = interleaved(rope)
        layers.append(torch.cat([latent, rope], dim=-1).numpy())
    return np.stack(layers)


def cached_index_keys(cache: DynamicCache, deinterleaved: bool) -> np.ndarray:
    """What the cache has for the indexers: float32[layers, tokens, index_head_dim]."""
    layers = []
    for layer in cache.layers:
        rope, rest = layer.indexer_keys[0].tensor_split([64], dim=-1)
        if deinterleaved:
            rope = interleaved(rope)
        layers.append(torch.cat([rope, rest], dim=-1).numpy())
    return np.stack(layers)


class Selections:
    """The tokens that the indexers of a model choose, as it runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers: list[list[np.ndarray]] = []
        for layer in model.model.layers:
            rows: list[np.ndarray] = []
            self.layers.append(rows)
            layer.self_attn.indexer.register_forward_hook(
                lambda _module, _args, out, rows=rows: rows.extend(out[0].numpy())
            )

    def take(self, topk: int) -> np.ndarray:
        """int8[layers, tokens, topk], since the last time; transformers pads with later tokens."""
        selected = np.full((len(self.layers), len(self.layers[0]), topk), -1, np.int8)
        for layer, rows in enumerate(self.layers):
            for token, row in enumerate(rows):
                row = np.sort(row[row <= token])
                assert len(row) == min(topk, token + 1)
                selected[layer, token, : len(row)] = row
            rows.clear()
        return selected


def make(name: str, config: dict[str, Any]) -> None:
    config = {**COMMON, **config}
    model_type = config["model_type"]
    if model_type == "longcat_flash":
        config = {name: value for name, value in config.items() if name not in LONGCAT_DROPS}
    if "rope_parameters" in config:
        del config["rope_theta"]
    config_class, model_class = CLASSES[model_type]
    hf_config = config_class.from_dict(json.loads(json.dumps(config)))
    hf_config._attn_implementation = "eager"
    model = model_class(hf_config).float().eval()
    randomise(model)
    has_indexer = "index_topk" in config
    lengths = INDEXED_LENGTHS if has_indexer else LENGTHS
    selections = Selections(model) if has_indexer else None
    more = {}

    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config["vocab_size"], (len(lengths), max(lengths)), dtype=np.int32)
    next_ids = rng.integers(0, config["vocab_size"], (len(lengths), STEPS), dtype=np.int32)
    prefill = np.zeros((*prompts.shape, config["vocab_size"]), np.float32)
    decode = np.zeros((*next_ids.shape, config["vocab_size"]), np.float32)
    latents = None
    with torch.no_grad():
        for i, length in enumerate(lengths):
            prompts[i, length:] = 0
            cache = DynamicCache(config=hf_config)
            ids = torch.from_numpy(prompts[i : i + 1, :length]).long()
            prefill[i, :length] = model(ids, cache=cache).logits[0]
            for step in range(STEPS):
                ids = torch.from_numpy(next_ids[i : i + 1, step : step + 1]).long()
                decode[i, step] = model(ids, cache=cache).logits[0, 0]
            if i == 0:
                latents = cached_latents(cache, deinterleaved=model_type != "deepseek_v2")
                if selections is not None:
                    more["index_keys"] = cached_index_keys(cache, model_type == "glm_moe_dsa")
                    more["selected"] = selections.take(config["index_topk"])
    assert latents is not None
    print(f"{name}: logits have a standard deviation of {prefill[0].std():.2f}")

    folder = HERE / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(checkpoint_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(
        folder / "goldens.npz",
        prompts=prompts,
        lengths=np.array(lengths, np.int32),
        next_ids=next_ids,
        prefill=prefill,
        decode=decode,
        latents=latents,
        **more,
    )
    if model_type == "deepseek_v3":
        make_mtp(folder, model, prompts, next_ids)


def make_mtp(
    folder: Path, model: DeepseekV3ForCausalLM, prompts: np.ndarray, next_ids: np.ndarray
) -> None:
    predictor = Predictor(model.config).float().eval()
    randomise(predictor, seed=1)
    longest = max(LENGTHS) + STEPS - 1
    logits = np.zeros((len(LENGTHS), longest, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for i, length in enumerate(LENGTHS):
            ids = np.concatenate([prompts[i, :length], next_ids[i]])[None]
            out = predictor.logits(model, torch.from_numpy(ids).long())[0]
            logits[i, : len(out)] = out
    print(f"{folder.name}: those of mtp, {logits[0].std():.2f}")
    save_file(predictor.tensors(model), folder / "mtp.safetensors", metadata={"format": "pt"})
    np.savez_compressed(folder / "mtp.npz", logits=logits)


if __name__ == "__main__":
    torch.manual_seed(0)
    for model_name in sys.argv[1:] or MODELS:
        make(model_name, MODELS[model_name])
