"""Decoding steps of a few tokens on a Hopper GPU: all layers in one call, logits in another.

For one token, a step's time is that of reading the weights, if nothing else takes any. What XLA
makes of the layers is some twenty-five kernels each, every one of which begins when the one before
it has ended. Here a layer is nine or ten, which start while others end and have their weights on
the way by then; and one more is the product with the head. See docs/kernel.md.

XLA cannot divide such calls over devices: `deepseek.absorb` notes whether the parameters are on
one device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from flashmla_jax.cache.layout import HEAD_DIM
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import mla
from flashmla_jax.ops import _ffi, dense_decode

if TYPE_CHECKING:
    from flashmla_jax.models.deepseek import DeepSeekConfig

Params = Mapping[str, Any]

# What the kernels are built for; csrc/sm90/few_tokens.h has the same numbers.
MAX_TOKENS = 4
_NOPE_DIM = 128
_ALIGNMENT = 64  # of all sizes
_MAX_SIZE = 1 << 20
_MAX_HEADS = 1024
_MAX_EXPERTS, _MAX_EXPERTS_PER_TOKEN, _MAX_EXPERT_GROUPS = 512, 16, 32
# A thread block's shared memory has all tokens' vectors, beside a little else.
_MAX_VECTOR_BYTES = 200 * 1024


def applies(params: Params, config: DeepSeekConfig, ids: jax.Array, cache: PagedKVCache) -> bool:
    """Whether a step of `ids` int32[batch, s_q] may run so on a GPU, for these parameters."""
    dtype = params["embed_tokens"]["embedding"].dtype
    if not _has_kernels(params, ids.size, dtype) or not _fits(config, ids.size):
        return False
    if len(cache.pages) < len(params["layers"]):  # one pool of several layers
        return False
    if cache.dtype != dtype:
        return False
    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    in_float32 = ("['gate']['weight']", "['gate']['e_score_correction_bias']", "['scale']")
    return all(
        leaf.dtype == dtype or jax.tree_util.keystr(path).endswith(in_float32)
        for path, leaf in leaves
    )


def applies_to_logits(params: Params, hidden: jax.Array, weight: jax.Array) -> bool:
    """Whether `logits` may have these arguments on a GPU, of a model with these parameters."""
    tokens, (vocab, size) = math.prod(hidden.shape[:-1]), weight.shape
    return (
        _has_kernels(params, tokens, hidden.dtype)
        and weight.dtype == hidden.dtype
        and vocab % _ALIGNMENT == size % _ALIGNMENT == 0
        and vocab <= _MAX_SIZE
        and tokens * size * 2 <= _MAX_VECTOR_BYTES
    )


def _has_kernels(params: Params, tokens: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether a GPU has kernels for so many tokens of this type."""
    return (
        "one_device" in params
        and not is_symbolic_dim(tokens)
        and 0 < tokens <= MAX_TOKENS
        and dtype in (jnp.bfloat16, jnp.float16)
        and _ffi.why_no_kernel(_ffi.CUDA) is None
    )


def _fits(config: DeepSeekConfig, tokens: int) -> bool:
    """Whether the kernels have all that the model has."""
    act = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    sizes = (
        config.hidden_size,
        config.intermediate_size,
        config.moe_intermediate_size,
        config.q_lora_rank or 0,
        config.v_head_dim,
    )
    widest = max(*sizes, config.num_attention_heads * config.v_head_dim, act)
    has_more = (
        config.is_longcat
        or config.zero_expert_num
        or config.mla_scale_q_lora
        or config.mla_scale_kv_lora
        or config.attention_bias
        or config.indexer is not None
    )
    return (
        not has_more
        and config.num_attention_heads <= _MAX_HEADS
        and config.qk_nope_head_dim == _NOPE_DIM
        and all(size % _ALIGNMENT == 0 for size in sizes)
        and tokens * widest * 2 <= _MAX_VECTOR_BYTES
        and config.n_routed_experts <= _MAX_EXPERTS
        and config.num_experts_per_tok <= _MAX_EXPERTS_PER_TOKEN
        and config.n_group <= _MAX_EXPERT_GROUPS
    )


def decode_layers(
    params: Params, config: DeepSeekConfig, hidden: jax.Array, cache: PagedKVCache
) -> tuple[jax.Array, PagedKVCache]:
    """All layers of a decoding step.

    Args:
      params: from `deepseek.absorb`.
      config: the model's configuration.
      hidden: [batch, s_q, hidden], the tokens' embeddings.
      cache: has made room for them, once for all layers.

    Returns:
      The hidden states [batch, s_q, hidden] before the final norm, and the cache with the tokens.
    """
    batch, s_q, _ = hidden.shape
    dtype, heads = hidden.dtype, config.num_attention_heads
    new_tokens = jnp.arange(s_q, dtype=jnp.int32)
    tables = mla.rope_tables(config.mla, cache.cache_seqlens[:, None] - s_q + new_tokens)
    # Arrays of their own, none of which is a result of the program: XLA gives those another place
    # in each step, and would have to update the call in its CUDA graph.
    rope = jnp.stack(tables)
    new = jnp.stack([cache.cache_seqlens - cache.num_new, cache.num_new, cache.copy_from])
    layers = [_Layer.of(layer, dtype) for layer in params["layers"]]
    operands: list[jax.Array] = [hidden, rope, cache.block_table, cache.cache_seqlens, new]
    aliases, first = {}, _NUM_WORKSPACES + 1
    own_pools = cache.pages[: len(layers)]  # a module for drafts has one more
    for i, (pool, layer) in enumerate(zip(own_pools, layers, strict=True)):
        aliases[len(operands)] = first + i
        operands += [pool, *layer]

    def rows(*size: int, dtype: jax.typing.DTypeLike = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch * s_q, *size), dtype)

    queries = (batch, s_q, heads, HEAD_DIM)
    attended, lse, *partials = dense_decode.results_and_workspace(
        jax.ShapeDtypeStruct(queries, dtype), 1, cache.max_pages_per_seq
    )
    workspace = [
        rows(config.hidden_size),
        rows(config.q_lora_rank or 0),
        rows(heads * config.mla.qk_head_dim),
        rows(HEAD_DIM),
        jax.ShapeDtypeStruct(queries, dtype),
        *(attended, lse, *partials),
        rows(heads * config.v_head_dim),
        rows(max(layer.num_experts for layer in layers), dtype=jnp.float32),
        rows(config.num_experts_per_tok, dtype=jnp.int32),
        rows(max(layer.act_size(config) for layer in layers)),
    ]
    assert len(workspace) == _NUM_WORKSPACES
    pools = [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in own_pools]
    is_v3 = config.topk_method == "noaux_tc"
    is_scaled = is_v3 or not config.norm_topk_prob
    is_grouped = config.topk_method != "greedy" and config.n_group > 1
    call = jax.ffi.ffi_call(
        _ffi.FEW_TOKENS,
        [jax.ShapeDtypeStruct(hidden.shape, dtype), *workspace, *pools],
        input_output_aliases=aliases,
        vmap_method="sequential",
    )
    results = call(
        *operands,
        num_layers=np.int32(len(layers)),
        heads=np.int32(heads),
        v_dim=np.int32(config.v_head_dim),
        softmax_scale=np.float32(config.mla.softmax_scale),
        norm_eps=np.float32(config.rms_norm_eps),
        latent_eps=np.float32(config.mla.norm_eps),
        experts_per_token=np.int32(config.num_experts_per_tok),
        sigmoid=config.scoring_func == "sigmoid",
        normalize=config.norm_topk_prob,
        groups=np.int32(config.n_group if is_grouped else 1),
        groups_chosen=np.int32(config.topk_group if is_grouped else 1),
        group_best=np.int32(2 if is_v3 else 1),
        scale=np.float32(config.routed_scaling_factor if is_scaled else 1),
    )
    pages = (*results[first:], *cache.pages[len(layers) :])
    return results[0], dataclasses.replace(cache, pages=pages)


def logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    """The product of a few tokens with the head, exact but for sums in float32.

    Args:
      hidden: [..., hidden], after the final norm; bfloat16 or float16.
      weight: [vocab, hidden], of the same type.

    Returns:
      float32[..., vocab].
    """
    shape = (*hidden.shape[:-1], weight.shape[0])
    call = jax.ffi.ffi_call(
        _ffi.FEW_LOGITS, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential"
    )
    return call(hidden, weight)


_NUM_WORKSPACES = 14


class _Layer(NamedTuple):
    """A layer's weights, in the order of csrc/ffi/few_tokens.cc. What it lacks is empty."""

    norm: jax.Array
    w_q: jax.Array
    q_norm: jax.Array
    w_q_b: jax.Array
    w_kv: jax.Array
    kv_norm: jax.Array
    w_uk: jax.Array
    w_uv: jax.Array
    w_o: jax.Array
    mlp_norm: jax.Array
    router: jax.Array
    bias: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array
    shared_gate: jax.Array
    shared_up: jax.Array
    shared_down: jax.Array

    @classmethod
    def of(cls, params: Params, dtype: jax.typing.DTypeLike) -> _Layer:
        attention, mlp = params["self_attn"], params["mlp"]
        is_moe = "experts" in mlp

        def weight(block: Params | None, name: str) -> jax.Array:
            return block[name]["weight"] if block and name in block else jnp.zeros(0, dtype)

        def scale(block: Params, name: str) -> jax.Array:
            return block[name]["scale"].astype(dtype) if name in block else jnp.zeros(0, dtype)

        routed = mlp["experts"] if is_moe else None
        shared = mlp.get("shared_experts") if is_moe else mlp
        gate = mlp["gate"] if is_moe else {}
        none = jnp.zeros(0, jnp.float32)
        return cls(
            scale(params, "input_layernorm"),
            weight(attention, "q_a_proj" if "q_a_proj" in attention else "q_proj"),
            scale(attention, "q_a_layernorm"),
            weight(attention, "q_b_proj"),
            weight(attention, "kv_a_proj_with_mqa"),
            scale(attention, "kv_a_layernorm"),
            attention["kv_b_proj"]["w_uk"],
            attention["kv_b_proj"]["w_uv"],
            weight(attention, "o_proj"),
            scale(params, "post_attention_layernorm"),
            gate.get("weight", none).astype(jnp.float32),
            gate.get("e_score_correction_bias", none).astype(jnp.float32),
            *(weight(routed, name) for name in ("gate_proj", "up_proj", "down_proj")),
            *(weight(shared, name) for name in ("gate_proj", "up_proj", "down_proj")),
        )

    @property
    def num_experts(self) -> int:
        return self.router.shape[0]

    def act_size(self, config: DeepSeekConfig) -> int:
        """How many numbers a token's experts make of it in between, and the shared ones."""
        routed = config.num_experts_per_tok * self.gate.shape[1] if self.num_experts else 0
        return routed + self.shared_gate.shape[0]
