"""FlashMLA's FP8 page formats, byte by byte in NumPy, and what sparse attention means in float64.

Written from the formats' description and the docstrings, and on purpose not from
`flashmla_jax.cache.layout` and `flashmla_jax.reference`, which are what it checks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def codes_of(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32) / scales).astype(E4M3).view(np.uint8)


def scale_of(values: np.ndarray, powers_of_two: bool) -> np.ndarray:
    """float32[...] of tiles [..., n]."""
    scales = np.maximum(np.abs(values.astype(np.float32)).max(-1) / np.float32(448), 1e-4)
    if powers_of_two:
        fraction, exponent = np.frexp(scales)  # scales = fraction * 2**exponent, fraction >= 0.5
        scales = np.ldexp(np.float32(1), np.where(fraction == 0.5, exponent - 1, exponent))
    return scales.astype(np.float32)


def quantize_656(kv: np.ndarray, powers_of_two: bool = True) -> np.ndarray:
    """uint8[..., 656] of [..., 576]."""
    out = np.zeros((*kv.shape[:-1], 656), np.uint8)
    for tile in range(4):
        columns = slice(128 * tile, 128 * (tile + 1))
        scale = scale_of(kv[..., columns], powers_of_two)
        out[..., columns] = codes_of(kv[..., columns], scale[..., None])
        out[..., 512 + 4 * tile : 516 + 4 * tile] = scale[..., None].view(np.uint8)
    out[..., 528:] = np.ascontiguousarray(kv[..., 512:].astype(BF16)).view(np.uint8)
    return out


def dequantize_656(tokens: np.ndarray) -> np.ndarray:
    """float64[..., 576] of uint8[..., 656]."""
    scales = np.ascontiguousarray(tokens[..., 512:528]).view(np.float32).astype(np.float64)
    latent = tokens[..., :512].view(E4M3).astype(np.float64) * np.repeat(scales, 128, axis=-1)
    rope = np.ascontiguousarray(tokens[..., 528:]).view(BF16).astype(np.float64)
    return np.concatenate([latent, rope], axis=-1)


def as_half_precision(tokens: np.ndarray) -> np.ndarray:
    """float64[..., 576] of uint8[..., 656], by way of half precision.

    A token's largest scale becomes 64 to 128 of its unit, a power of two. The scales in these units
    are rounded, and what they are multiplied with.
    """
    scales = np.ascontiguousarray(tokens[..., 512:528]).view(np.float32)
    top = np.fmax.reduce(np.abs(scales), axis=-1, keepdims=True)
    exponent = np.where(top > 0, np.frexp(np.where(top > 0, top, 1))[1] - 1 - 6, -60)
    unit = np.ldexp(1.0, np.clip(exponent, -60, 120))
    halves = np.repeat((scales / unit).astype(np.float16), 128, axis=-1)
    latent = tokens[..., :512].view(E4M3).astype(np.float16) * halves
    return np.concatenate(
        [latent.astype(np.float64) * unit, dequantize_656(tokens)[..., 512:]], axis=-1
    )


def numbers_of(tokens: np.ndarray, dtype: Any, rows: int) -> np.ndarray:
    """float64[..., 576]: what attention makes of tokens, with so many query rows to a KV head.

    They are rounded to the queries' dtype. But up to 32 rows on a GPU read them in half precision,
    which is nearer to what they are.
    """
    if dtype == BF16 and rows <= 32 and jax.default_backend() != "cpu":
        return as_half_precision(tokens)
    return dequantize_656(tokens).astype(dtype).astype(np.float64)


def quantize_584(kv: np.ndarray) -> np.ndarray:
    """uint8[num_pages, page_size, 1, 584] of [num_pages, page_size, 1, 512]."""
    num_pages, page_size, _, _ = kv.shape
    pages = np.zeros((num_pages, page_size * 584), np.uint8)
    for page in range(num_pages):
        for row in range(page_size):
            token = kv[page, row, 0]
            data = pages[page, 576 * row : 576 * (row + 1)]
            scales = pages[page, 576 * page_size + 8 * row :][:8]
            for tile in range(7):
                columns = slice(64 * tile, 64 * (tile + 1))
                scale = scale_of(token[columns], powers_of_two=True)
                data[columns] = codes_of(token[columns], scale)
                scales[tile] = np.log2(scale) + 127
            data[448:] = token[448:].astype(BF16).view(np.uint8)
    return pages.reshape(num_pages, page_size, 1, 584)


def dequantize_584(pages: np.ndarray) -> np.ndarray:
    """float64[num_pages, page_size, 1, 512] of uint8[num_pages, page_size, 1, 584]."""
    num_pages, page_size, _, _ = pages.shape
    flat = pages.reshape(num_pages, page_size * 584)
    out = np.zeros((num_pages, page_size, 1, 512))
    for page in range(num_pages):
        for row in range(page_size):
            data = flat[page, 576 * row : 576 * (row + 1)]
            exponents = flat[page, 576 * page_size + 8 * row :][:7].astype(np.float64)
            factors = np.repeat(np.where(exponents == 255, np.nan, 2 ** (exponents - 127)), 64)
            out[page, row, 0, :448] = data[:448].view(E4M3).astype(np.float64) * factors
            out[page, row, 0, 448:] = data[448:].view(BF16).astype(np.float64)
    return out


class Sparse(NamedTuple):
    out: np.ndarray  # [n, h_q, 512]
    max_logits: np.ndarray  # [n, h_q]
    lse: np.ndarray  # [n, h_q]
    spread: np.ndarray  # like out: how far rounding the probabilities may move it
    terms: np.ndarray  # [n, h_q]: the sum of a score's |products|, of the token that has most


def attend_sparse(
    q: np.ndarray,
    tokens: list[np.ndarray],
    softmax_scale: float,
    attn_sink: np.ndarray | None = None,
) -> Sparse:
    """Of each query token q[i], [h_q, head_dim], to tokens[i], [any number, head_dim]; float64."""
    n, h_q, _ = q.shape
    out = np.zeros((n, h_q, 512))
    spread = np.zeros_like(out)
    top, lse = np.full((n, h_q), -np.inf), np.full((n, h_q), -np.inf)
    terms = np.zeros((n, h_q))
    for i, keys in enumerate(tokens):
        if len(keys) == 0:
            continue
        scores = softmax_scale * (q[i].astype(np.float64) @ keys.T)
        terms[i] = softmax_scale * (abs(q[i].astype(np.float64)) @ abs(keys).T).max(-1)
        top[i] = scores.max(-1)
        weights = np.exp(scores - top[i][:, None])
        lse[i] = top[i] + np.log(weights.sum(-1))
        p = weights / weights.sum(-1, keepdims=True)
        if attn_sink is not None:
            p = p / (1 + np.exp(attn_sink.astype(np.float64) - lse[i]))[:, None]
        out[i] = p @ keys[:, :512]
        spread[i] = np.sqrt(p**2 @ keys[:, :512] ** 2)
    return Sparse(out, top, lse, spread, terms)
