"""Attention of many tokens with a key and a value per head, as in training and in prefill.

`attention` never holds more than a bounded number of scores, has a derivative, and gives the
logarithm of the sum of exponentiated scores, so that results over disjoint keys can be merged. On
an NVIDIA GPU that cuDNN has a kernel for, it is cuDNN that attends; everywhere else it is XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from flashmla_jax._private import cudnn as _cudnn

Implementation = Literal["cudnn", "xla"]

# The float32 scores of this many (query, key) pairs exist at a time: 256 MiB.
_MAX_SCORES = 2**26
# Causal queries are given more and more keys in this many steps, rather than all from the first on.
_CAUSAL_STEPS = 4


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    softmax_scale: float,
    *,
    causal: bool = False,
    kv_lengths: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
    max_scores: int = _MAX_SCORES,
) -> tuple[jax.Array, jax.Array]:
    """Attends from every query to all keys, or to those up to its own.

    Args:
      q: [batch, s_q, heads, qk].
      k: [batch, s_kv, heads, qk] in q's dtype.
      v: [batch, s_kv, heads, v] in q's dtype.
      softmax_scale: multiplies the scores.
      causal: query `j` sees keys `0` to `j`. Then `s_q` and `s_kv` are the same.
      kv_lengths: int32[batch], how many keys each sequence has. Keys and values from there on are
        not seen, but must be finite. By default all `s_kv`. Not together with `causal`.
      precision: of the two products; cuDNN has only one.
      implementation: "cudnn", which raises what JAX raises where it does not run; "xla"; or None,
        cuDNN where JAX says that this machine's runs for these arrays and the program is compiled
        for CUDA, and XLA otherwise.
      max_scores: how many float32 scores may exist at once. XLA's memory is bounded by it, and one
        query per sequence is the least that is done at a time.

    Returns:
      out: [batch, s_q, heads, v] in v's dtype. Scores and softmax are float32; the probabilities
        are multiplied in v's dtype with float32 accumulation, as in the paged op.
      lse: float32[batch, heads, s_q], natural logarithm.
      A query without keys has `out = 0` and `lse = -inf`.

      Differentiable with respect to `out`, in the same bounded memory. cuDNN's derivative takes
      nothing from `lse`.

    Raises:
      ValueError: for shapes that do not belong together, `causal` with `kv_lengths`, or an unknown
        implementation.
    """
    if implementation not in (None, "cudnn", "xla"):
        raise ValueError(f"implementation must be 'cudnn', 'xla' or None, got {implementation!r}")
    if q.ndim != 4 or k.shape != (*q.shape[:1], k.shape[1], *q.shape[2:]):
        raise ValueError(
            f"q and k must be [batch, tokens, heads, qk] of the same but tokens, got {q.shape} and "
            f"{k.shape}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must have k's axes but the last, got {v.shape} beside k {k.shape}")
    if causal and (kv_lengths is not None or q.shape[1] != k.shape[1]):
        raise ValueError(
            "causal attention is that of tokens to themselves, without kv_lengths, got "
            f"{q.shape[1]} queries, {k.shape[1]} keys and {kv_lengths=}"
        )
    if kv_lengths is not None and kv_lengths.shape != q.shape[:1]:
        raise ValueError(f"kv_lengths must be [batch] = {q.shape[:1]}, got {kv_lengths.shape}")

    if q.shape[1] == 0:
        out = jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype)
        return out, jnp.zeros((q.shape[0], q.shape[2], 0), jnp.float32)
    cudnn = functools.partial(_cudnn_attention, softmax_scale=softmax_scale, causal=causal)
    xla = functools.partial(
        _xla_attention,
        softmax_scale=softmax_scale,
        causal=causal,
        precision=precision,
        max_scores=max_scores,
    )
    if implementation == "cudnn":
        return cudnn(q, k, v, kv_lengths)
    if implementation == "xla" or not _cudnn_runs(cudnn, q, k, v, kv_lengths):
        return xla(q, k, v, kv_lengths)
    return jax.lax.platform_dependent(q, k, v, kv_lengths, cuda=cudnn, default=xla)


def _cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_lengths: jax.Array | None,
    *,
    softmax_scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    if _cudnn is None:
        raise NotImplementedError(
            f"jax {jax.__version__} has no cuDNN attention where it is looked for; use "
            "implementation='xla' or None"
        )
    missing = q.shape[-1] - v.shape[-1]
    if missing < 0:
        raise NotImplementedError(f"cuDNN needs v no wider than q and k, got {v.shape}, {q.shape}")
    attend = functools.partial(
        _cudnn.dot_product_attention,
        q,
        k,
        # There are kernels for narrower values, but JAX cannot vmap those.
        jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, missing))),
        scale=softmax_scale,
        return_residual=True,
    )
    if kv_lengths is None:
        mask_type = _cudnn.MaskType.CAUSAL if causal else _cudnn.MaskType.NO_MASK
        out, lse = attend(mask_type=mask_type)
        return out[..., : v.shape[-1]], lse
    # A sequence without keys is given one, and its result is dropped.
    out, lse = attend(
        mask_type=_cudnn.MaskType.PADDING,
        q_seqlen=jnp.full(q.shape[0], q.shape[1], jnp.int32),
        kv_seqlen=jnp.maximum(kv_lengths, 1).astype(jnp.int32),
    )
    has_keys = (kv_lengths > 0)[:, None, None]
    out = jnp.where(has_keys[..., None], out[..., : v.shape[-1]], 0)
    return out, jnp.where(has_keys, lse, -jnp.inf)


def _cudnn_runs(cudnn: Callable[..., tuple[jax.Array, jax.Array]], *args: object) -> bool:
    """Whether JAX finds cuDNN here, and in it a kernel for these arrays on this GPU."""
    try:
        jax.eval_shape(cudnn, *args)
    except Exception:  # a jax to come may refuse in other ways than NotImplementedError
        return False
    return True


def _xla_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_lengths: jax.Array | None,
    *,
    softmax_scale: float,
    causal: bool,
    precision: jax.lax.PrecisionLike,
    max_scores: int,
) -> tuple[jax.Array, jax.Array]:
    """A few queries at a time, whose scores are computed anew in the backward pass."""
    batch, s_q, heads, _ = q.shape
    s_kv = k.shape[1]
    # A program that is exported for batches of any size bounds the scores of each sequence.
    sequences = 1 if is_symbolic_dim(batch) else batch
    chunk = max(1, min(s_q, max_scores // max(1, sequences * heads * s_kv)))
    q = jnp.pad(q, ((0, 0), (0, -s_q % chunk), (0, 0), (0, 0)))
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def attend(start: jax.Array, *, num_keys: int) -> tuple[jax.Array, jax.Array]:
        queries = jax.lax.dynamic_slice_in_dim(q, start, chunk, axis=1)
        scores = einsum("bqhd,bkhd->bhqk", queries, k[:, :num_keys]) * softmax_scale
        key = jnp.arange(num_keys)
        if causal:
            scores = jnp.where(key <= (start + jnp.arange(chunk))[:, None], scores, -jnp.inf)
        if kv_lengths is not None:
            scores = jnp.where(key < kv_lengths[:, None, None, None], scores, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf))
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1, total)
        out = einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v[:, :num_keys])
        return out.astype(v.dtype), (top + jnp.log(total))[..., 0]

    # Of the keys after a causal query's own, at most those in its step are multiplied in vain.
    outs, lses = [], []
    starts = np.arange(0, s_q, chunk)
    for part in np.array_split(starts, min(len(starts), _CAUSAL_STEPS)) if causal else [starts]:
        num_keys = min(s_kv, int(part[-1]) + chunk) if causal else s_kv
        step = jax.checkpoint(functools.partial(attend, num_keys=num_keys), prevent_cse=False)
        out, lse = jax.lax.map(step, jnp.asarray(part))  # [chunks, batch, chunk, ...]
        outs.append(jnp.moveaxis(out, 0, 1).reshape(batch, len(part) * chunk, heads, v.shape[-1]))
        lses.append(jnp.moveaxis(lse, 0, 2).reshape(batch, heads, len(part) * chunk))
    return jnp.concatenate(outs, axis=1)[:, :s_q], jnp.concatenate(lses, axis=2)[..., :s_q]
