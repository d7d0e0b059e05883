"""Checks that several public functions make of their arguments."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim


def array(name: str, value: Any, shape: str, dtype: Any = None) -> jax.Array:
    """`value` as an array of the rank that `shape` names, and of `dtype` exactly if given."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise ValueError(f"{name} must be an array {shape}, got {type(value).__name__}")
    if value.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} must be {shape}, got shape {value.shape}")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} must be {jnp.dtype(dtype).name}, got {value.dtype}")
    converted = jnp.asarray(value)
    if converted.dtype != value.dtype:
        raise ValueError(f"{name} is {value.dtype}, which JAX would narrow to {converted.dtype}")
    return converted


def positive(name: str, value: Any) -> int:
    """`value` as a number of 1 or more."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def fewer(size: int, least: int) -> bool:
    """Whether an axis has fewer elements than it must.

    A symbolic dimension of `jax.export` may have: what it stands for, the kernels check.
    """
    return not is_symbolic_dim(size) and size < least
