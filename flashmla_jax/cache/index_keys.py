"""How a cache keeps the keys of indexers: as numbers, or in FP8.

In FP8 a key is `head_dim` e4m3 codes and a float32 scale, by which they are multiplied: the power
of two that brings the largest of the numbers to 448, e4m3's largest, or less. Twelve bytes after it
mean nothing: keys come in multiples of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flashmla_jax.cache.layout import DTYPES, to_bytes, to_codes

_ALIGNMENT = 16


def zeros(shape: tuple[int, ...], head_dim: int, dtype: Any) -> jax.Array:
    """A pool [*shape, size] of keys of `head_dim` numbers.

    Args:
      shape: its other axes.
      head_dim: numbers of a key.
      dtype: of these numbers: bfloat16, float16, float32 or "fp8".

    Raises:
      ValueError: for another dtype, or a key that is no multiple of 16 bytes.
    """
    is_fp8 = isinstance(dtype, str) and dtype == "fp8"
    if not is_fp8 and jnp.dtype(dtype) not in DTYPES:
        raise ValueError(
            f'index_dtype must be bfloat16, float16, float32 or "fp8", got {jnp.dtype(dtype)}'
        )
    if head_dim * (1 if is_fp8 else jnp.dtype(dtype).itemsize) % _ALIGNMENT:
        raise ValueError(
            f"index_head_dim must make a multiple of {_ALIGNMENT} bytes, got {head_dim} of "
            f"{dtype if is_fp8 else jnp.dtype(dtype)}"
        )
    dtype = jnp.uint8 if is_fp8 else dtype
    return jnp.zeros((*shape, size_of(head_dim, dtype)), dtype)


def size_of(head_dim: int, dtype: Any) -> int:
    """The size of a key of `head_dim` numbers in a pool of `dtype`, which is uint8 for FP8."""
    return head_dim + (_ALIGNMENT if dtype == jnp.uint8 else 0)


def head_dim_of(pool: jax.Array) -> int:
    """Numbers of a key of a pool [..., size]."""
    return pool.shape[-1] - size_of(0, pool.dtype)


def pack(keys: jax.Array, dtype: Any) -> jax.Array:
    """What a pool of `dtype` holds of keys [..., head_dim]: [..., size]."""
    if dtype != jnp.uint8:
        return keys.astype(dtype)
    codes, scales = to_codes(keys.astype(jnp.float32))
    scale_bytes = to_bytes(scales[..., None])
    widths = [(0, 0)] * (keys.ndim - 1) + [(0, _ALIGNMENT - scale_bytes.shape[-1])]
    return jnp.concatenate([to_bytes(codes), jnp.pad(scale_bytes, widths)], axis=-1)


def unpack(rows: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The keys of a pool's rows [..., size], in `dtype` where they are codes.

    Returns [..., head_dim], and what they are to be multiplied by, float32[...] or None.
    """
    if rows.dtype != jnp.uint8:
        return rows, None
    codes, scale_bytes = jnp.split(rows, [head_dim_of(rows)], axis=-1)
    keys = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(dtype)
    return keys, jax.lax.bitcast_convert_type(scale_bytes[..., :4], jnp.float32)
