"""The page formats: how a cached token is laid out.

A page holds `PAGE_SIZE` tokens. A token is one latent vector of `HEAD_DIM` numbers: the compressed
key-value latent (`HEAD_DIM_V` numbers) followed by the rotated RoPE key. Keys are all of it, values
its first `HEAD_DIM_V` numbers. The same constants stand in `csrc/params.h`.

The FP8 formats are FlashMLA's, byte for byte: the latent in e4m3, a scale for every so many numbers
of it, and the RoPE key in bfloat16. A number is what its code stands for times its scale.

    FP8      512 codes, 4 float32 scales, 64 bfloat16: 656 bytes, token after token
    FP8_512  448 codes, 64 bfloat16: 576 bytes, token after token; and behind those of all tokens of
             the page, for each token 7 scales (powers of two, ue8m0) and a byte that means nothing.
             A token has 512 numbers, and its value is all of them
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

PAGE_SIZE = 64
HEAD_DIM = 576
HEAD_DIM_V = 512

# What a page may be made of; float32 runs on the CPU only.
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

ROPE_DIM = HEAD_DIM - HEAD_DIM_V
# Scales are no smaller: DeepSeek's kernels have it so.
_LEAST_SCALE = 1e-4
_E4M3_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class FP8Format:
    """An FP8 page format.

    Attributes:
      head_dim: numbers of a token, of which the last `ROPE_DIM` are bfloat16.
      tile: how many numbers share a scale.
      scale_bytes: bytes of a token's scales.
      scales_apart: whether the scales of a page lie behind its tokens.
    """

    head_dim: int
    tile: int
    scale_bytes: int
    scales_apart: bool

    @property
    def num_codes(self) -> int:
        """Numbers of a token that are e4m3 codes."""
        return self.head_dim - ROPE_DIM

    @property
    def num_scales(self) -> int:
        """Scales of a token."""
        return self.num_codes // self.tile

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, scales included."""
        return self.num_codes + self.scale_bytes + 2 * ROPE_DIM


FP8 = FP8Format(head_dim=HEAD_DIM, tile=128, scale_bytes=16, scales_apart=False)
FP8_512 = FP8Format(head_dim=512, tile=64, scale_bytes=8, scales_apart=True)
FP8_FORMATS = (FP8, FP8_512)


def quantize(kv: jax.Array, fmt: FP8Format = FP8, *, powers_of_two: bool = True) -> jax.Array:
    """Brings tokens into an FP8 format.

    A tile's scale is its largest magnitude over 448, e4m3's largest number, and 1e-4 at least; and,
    as DeepSeek has it, the next power of two. Numbers are rounded to the nearest code.

    Args:
      kv: [..., page_size, h_kv, head_dim], floating point. For `FP8`, any leading axes.
      fmt: the format.
      powers_of_two: whether scales are rounded up to powers of two; `FP8_512` has no others.

    Returns:
      uint8[..., page_size, h_kv, token_bytes]. A tile with a number that is not finite is NaN.

    Raises:
      ValueError: for another last axis, a dtype that is not floating point, other scales than
        `FP8_512` can hold, or more than one KV head there.
    """
    if not jnp.issubdtype(kv.dtype, jnp.floating):
        raise ValueError(f"kv must be floating point, got {kv.dtype}")
    if kv.ndim < 1 or kv.shape[-1] != fmt.head_dim:
        raise ValueError(f"kv must be [..., {fmt.head_dim}], got shape {kv.shape}")
    if fmt.scales_apart and not powers_of_two:
        raise ValueError("powers_of_two must be True: FP8_512's scales are")
    latent, rope = kv[..., : fmt.num_codes], kv[..., fmt.num_codes :]
    tiles = latent.astype(jnp.float32).reshape(*kv.shape[:-1], fmt.num_scales, fmt.tile)
    codes, scales = to_codes(tiles, powers_of_two=powers_of_two)
    parts = to_bytes(codes.reshape(latent.shape)), to_bytes(rope.astype(jnp.bfloat16))
    if not fmt.scales_apart:
        return jnp.concatenate([parts[0], to_bytes(scales), parts[1]], axis=-1)
    exponents = _exponents(scales)
    pad = jnp.zeros((*exponents.shape[:-1], fmt.scale_bytes - fmt.num_scales), jnp.uint8)
    return _join_page(
        jnp.concatenate(parts, axis=-1), jnp.concatenate([exponents, pad], axis=-1), fmt
    )


def dequantize(
    pages: jax.Array, fmt: FP8Format = FP8, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """The numbers of pages, or for `FP8` of tokens, in an FP8 format.

    Args:
      pages: uint8 or float8_e4m3fn [..., page_size, h_kv, token_bytes]. For `FP8`, any leading
        axes.
      fmt: the format.
      dtype: of the result, to which the products of codes and scales are rounded.

    Returns:
      [..., page_size, h_kv, head_dim].
    """
    pages = as_bytes(pages)
    if pages.ndim < 1 or pages.shape[-1] != fmt.token_bytes:
        raise ValueError(f"pages must be [..., {fmt.token_bytes}], got shape {pages.shape}")
    if fmt.scales_apart:
        data, scales = _split_page(pages, fmt)
        tokens = jnp.concatenate([data, scales], axis=-1)
    else:
        tokens = pages
    return _dequantize_tokens(tokens, fmt, dtype)


def take_tokens(
    pool: jax.Array, places: jax.Array, fmt: FP8Format | None, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Some tokens of a pool with one KV head.

    Args:
      pool: [num_pages, page_size, 1, head_dim]; or, in an FP8 format, bytes
        [num_pages, page_size, 1, token_bytes].
      places: int32[...], `page * page_size + row`, all of them in the pool.
      fmt: the format; None for numbers.
      dtype: of the result.

    Returns:
      [..., head_dim].
    """
    num_pages, page_size, _, size = pool.shape
    if fmt is None or not fmt.scales_apart:
        tokens = pool.reshape(num_pages * page_size, size)[places]
        return tokens.astype(dtype) if fmt is None else _dequantize_tokens(tokens, fmt, dtype)
    page, row = places // page_size, places % page_size
    data_bytes = fmt.token_bytes - fmt.scale_bytes
    by_page = as_bytes(pool).reshape(num_pages, page_size * size)
    data = row[..., None] * data_bytes + jnp.arange(data_bytes, dtype=jnp.int32)
    scales = row[..., None] * fmt.scale_bytes + jnp.arange(fmt.scale_bytes, dtype=jnp.int32)
    columns = jnp.concatenate([data, page_size * data_bytes + scales], axis=-1)
    return _dequantize_tokens(by_page[page[..., None], columns], fmt, dtype)


def to_codes(tiles: jax.Array, *, powers_of_two: bool = True) -> tuple[jax.Array, jax.Array]:
    """Numbers as e4m3 codes times a scale for each tile of them.

    Args:
      tiles: float32[..., tile].
      powers_of_two: whether scales are rounded up to powers of two.

    Returns:
      float8_e4m3fn[..., tile], and the scales float32[...]: NaN where a number is not finite.
    """
    largest = jnp.max(jnp.abs(tiles), axis=-1)
    bounded = jnp.maximum(largest, _LEAST_SCALE * _E4M3_MAX)
    scales = _power_of_two_for(bounded) if powers_of_two else bounded / _E4M3_MAX
    scales = jnp.where(jnp.isfinite(largest), scales, jnp.nan)
    return (tiles / scales[..., None]).astype(jnp.float8_e4m3fn), scales


def as_bytes(pages: jax.Array) -> jax.Array:
    """FP8 pages as uint8, of which they are made whatever their dtype says."""
    if pages.dtype == jnp.float8_e4m3fn:
        return jax.lax.bitcast_convert_type(pages, jnp.uint8)
    if pages.dtype != jnp.uint8:
        raise ValueError(f"FP8 pages must be uint8 or float8_e4m3fn, got {pages.dtype}")
    return pages


def _dequantize_tokens(tokens: jax.Array, fmt: FP8Format, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Numbers of bytes: codes, scales, RoPE key; or, where scales are apart, scales last."""
    tokens = as_bytes(tokens)
    codes, rest = tokens[..., : fmt.num_codes], tokens[..., fmt.num_codes :]
    if fmt.scales_apart:
        rope, scales = rest[..., : 2 * ROPE_DIM], rest[..., 2 * ROPE_DIM :]
        factors = _powers(scales[..., : fmt.num_scales])
    else:
        scales, rope = rest[..., : fmt.scale_bytes], rest[..., fmt.scale_bytes :]
        factors = _numbers(scales, jnp.float32)
    values = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    values = values.reshape(*factors.shape, fmt.tile) * factors[..., None]
    latent = values.reshape(codes.shape).astype(dtype)
    return jnp.concatenate([latent, _numbers(rope, jnp.bfloat16).astype(dtype)], axis=-1)


def _join_page(data: jax.Array, scales: jax.Array, fmt: FP8Format) -> jax.Array:
    """Tokens' bytes [..., page_size, 1, n] and scales' to pages with the scales behind."""
    _check_one_head(data.shape)
    *axes, page_size, _, _ = data.shape
    flat = [x.reshape(*axes, math.prod(x.shape[-3:])) for x in (data, scales)]
    return jnp.concatenate(flat, axis=-1).reshape(*axes, page_size, 1, fmt.token_bytes)


def _split_page(pages: jax.Array, fmt: FP8Format) -> tuple[jax.Array, jax.Array]:
    _check_one_head(pages.shape)
    *axes, page_size, _, size = pages.shape
    flat = pages.reshape(*axes, page_size * size)
    end = page_size * (size - fmt.scale_bytes)
    data, scales = flat[..., :end], flat[..., end:]
    return data.reshape(*axes, page_size, 1, -1), scales.reshape(*axes, page_size, 1, -1)


def _check_one_head(shape: tuple[int, ...]) -> None:
    if len(shape) < 3 or shape[-2] != 1:
        raise ValueError(f"FP8_512 pages are [..., page_size, 1, bytes], got shape {shape}")


def _power_of_two_for(largest: jax.Array) -> jax.Array:
    """The least power of two that brings positive normal numbers in float32 to 448 or less.

    A number m * 2**k, with m from 1 to 2, over 448 = 1.75 * 2**8 is at most 2**(k - 8) if m is at
    most 1.75. No division, which XLA may round its own way.
    """
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32)
    one, mantissa_of_448 = 1 << 23, 0x600000
    bits = (bits + jnp.uint32(one - 1 - mantissa_of_448)) & ~jnp.uint32(one - 1)
    return jax.lax.bitcast_convert_type(bits - jnp.uint32(8 * one), jnp.float32)


def _exponents(powers: jax.Array) -> jax.Array:
    """Powers of two, and NaN, in ue8m0."""
    bits = jax.lax.bitcast_convert_type(powers, jnp.uint32)
    return jnp.where(jnp.isnan(powers), 255, bits >> 23 & 255).astype(jnp.uint8)


def _powers(exponents: jax.Array) -> jax.Array:
    """What ue8m0 stands for, in float32."""
    bits = exponents.astype(jnp.uint32) << 23
    bits = jnp.where(exponents == 0, 0x400000, bits)  # 2**-127
    powers = jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)
    return jnp.where(exponents == 255, jnp.nan, powers)


def to_bytes(x: jax.Array) -> jax.Array:
    """The last axis as bytes."""
    split = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return split if split.ndim == x.ndim else split.reshape(*x.shape[:-1], -1)


def _numbers(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The last axis, of bytes, as numbers."""
    size = jnp.dtype(dtype).itemsize
    x = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return jax.lax.bitcast_convert_type(x, dtype)
