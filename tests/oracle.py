"""What dense MLA decoding means, in float64 NumPy, and problems to check it on.

Written from the definition in `flash_mla_with_kvcache`'s docstring, one sequence and one KV head at
a time, and on purpose not from `flashmla_jax.reference`, which is one of the things it checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

PAGE_SIZE, HEAD_DIM, HEAD_DIM_V = 64, 576, 512
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}

# What an unused entry of a block table may hold: anything.
GARBAGE = (INT32_MAX, -1, INT32_MIN, -(2**30), 123_456_789, 0)


@dataclasses.dataclass
class Problem:
    """The arrays of one call; the same names as the arguments of `flash_mla_with_kvcache`."""

    q: np.ndarray
    k_cache: np.ndarray
    block_table: np.ndarray
    cache_seqlens: np.ndarray

    def __iter__(self) -> Any:
        return iter((self.q, self.k_cache, self.block_table, self.cache_seqlens))

    def replace(self, **changes: np.ndarray) -> Problem:
        return dataclasses.replace(self, **changes)


class Expected(NamedTuple):
    """What the op should give, and how far rounding probabilities and scores may move it."""

    out: np.ndarray  # [batch, s_q, h_q, 512]
    lse: np.ndarray  # [batch, h_q, s_q]
    spread: np.ndarray  # like out: the root of the sum of (probability * value) ** 2
    # Like lse: the sum of a score's |products|, of the token that has most. (For float32 on a GPU.)
    terms: np.ndarray | float = 0.0


def attend(
    problem: Problem, softmax_scale: float = HEAD_DIM**-0.5, causal: bool = False
) -> Expected:
    """The op, in float64 throughout."""
    q, k_cache, block_table, cache_seqlens = problem
    batch, s_q, h_q, _ = q.shape
    num_pages, _, h_kv, _ = k_cache.shape
    group = h_q // h_kv
    out = np.zeros((batch, s_q, h_q, HEAD_DIM_V))
    spread = np.zeros_like(out)
    lse = np.full((batch, h_q, s_q), -np.inf)
    terms = np.zeros_like(lse)
    # A length beyond the table means tokens that cannot exist. One that every row sees says as much
    # as two billion.
    capacity = block_table.shape[1] * PAGE_SIZE
    for i in range(batch):
        length = min(int(cache_seqlens[i]), capacity + s_q)
        if length <= 0:
            continue
        tokens = np.full((length, h_kv, HEAD_DIM), np.nan)
        for first in range(0, min(length, capacity), PAGE_SIZE):
            page = int(block_table[i, first // PAGE_SIZE])
            if 0 <= page < num_pages:
                end = min(first + PAGE_SIZE, length)
                tokens[first:end] = k_cache[page, : end - first]
        for j in range(s_q):
            end = length - s_q + j + 1 if causal else length
            if end <= 0:
                continue
            for head in range(h_kv):
                heads = slice(head * group, (head + 1) * group)
                keys = tokens[:end, head]
                queries = q[i, j, heads].astype(np.float64)
                scores = softmax_scale * (queries @ keys.T)
                terms[i, heads, j] = softmax_scale * (abs(queries) @ abs(keys).T).max(axis=-1)
                top = scores.max(axis=-1, keepdims=True)
                weights = np.exp(scores - top)
                total = weights.sum(axis=-1, keepdims=True)
                p, values = weights / total, keys[:, :HEAD_DIM_V]
                out[i, j, heads] = p @ values
                spread[i, j, heads] = np.sqrt(p**2 @ values**2)
                lse[i, heads, j] = (top + np.log(total))[:, 0]
    return Expected(out, lse, spread, terms)


def make_problem(
    rng: np.random.Generator,
    lengths: Sequence[int],
    *,
    s_q: int = 1,
    h_q: int = 16,
    h_kv: int = 1,
    dtype: Any = ml_dtypes.bfloat16,
    spare_pages: int = 3,
    spare_entries: int = 2,
) -> Problem:
    """Random tokens in scattered pages, and poison wherever nothing may be read.

    Pages that no sequence uses and the tails of last pages are NaN; unused table entries hold
    numbers of every kind, those of other sequences' pages included.
    """
    batch = len(lengths)
    used = [-(-max(length, 0) // PAGE_SIZE) for length in lengths]
    width = max([1, *used]) + spare_entries
    num_pages = sum(used) + spare_pages
    pages = rng.permutation(num_pages)
    k_cache = np.full((num_pages, PAGE_SIZE, h_kv, HEAD_DIM), np.nan, dtype)
    garbage = np.array([*GARBAGE, num_pages, *pages[:3]], np.int32)
    block_table = rng.choice(garbage, (batch, width))
    for i, length in enumerate(lengths):
        mine, pages = pages[: used[i]], pages[used[i] :]
        block_table[i, : used[i]] = mine
        for first, page in zip(range(0, length, PAGE_SIZE), mine, strict=True):
            rows = min(PAGE_SIZE, length - first)
            values = rng.standard_normal((rows, h_kv, HEAD_DIM), np.float32)
            k_cache[page, :rows] = values.astype(dtype)
    q = rng.standard_normal((batch, s_q, h_q, HEAD_DIM), np.float32).astype(dtype)
    return Problem(q, k_cache, block_table, np.array(lengths, np.int32))


def assert_matches(actual: tuple[Any, Any], expected: Expected) -> None:
    """Compares (out, lse) with FlashMLA's tolerances for 16-bit inputs, far closer for float32.

    FlashMLA's absolute tolerance supposes many tokens, whose roundings average out. Among a few, a
    probability's rounding to the input dtype shows, and is allowed for.
    """
    dtype = np.asarray(actual[0]).dtype
    out, lse = (np.asarray(x, np.float64) for x in actual)
    # On a GPU float32 is XLA's, which sums a score's products in whatever order it likes.
    score = np.zeros(lse.shape)
    if dtype == np.float32 and jax.default_backend() != "cpu":
        score += float(np.finfo(np.float32).eps) * np.nan_to_num(expected.terms)
    if dtype == np.float32:
        moved = np.swapaxes(score, 1, 2)[..., None] * expected.spread
        tolerances = {"abs_tol": 5e-6 + moved, "rel_tol": 1e-4, "cos_tol": 1e-10}
    else:
        roundings = 4 * float(ml_dtypes.finfo(dtype).eps) / 2 * expected.spread
        tolerances = {"abs_tol": 8e-4 + roundings, "rel_tol": 2.01 / 128, "cos_tol": 5e-6}
    _assert_close("out", out, expected.out, **tolerances)
    # A score is a float32 sum over 36 steps of the tensor cores, which truncate.
    if dtype == np.float32:
        tolerances = {"abs_tol": 1e-6 + score, "rel_tol": 1e-6}
    else:
        tolerances = {"abs_tol": 4e-6, "rel_tol": 8.01 / 65536}
    _assert_close("lse", lse, expected.lse, **tolerances, cos_tol=None)


def _assert_close(
    name: str,
    actual: np.ndarray,
    expected: np.ndarray,
    *,
    abs_tol: float | np.ndarray,
    rel_tol: float,
    cos_tol: float | None,
) -> None:
    assert actual.shape == expected.shape, f"{name}: {actual.shape=}, {expected.shape=}"
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), f"NaN in {name}")
    finite = np.isfinite(expected)
    infinite = ~finite & ~np.isnan(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite], f"infinities in {name}")
    abs_tol = np.broadcast_to(abs_tol, actual.shape)[finite]
    actual, expected = actual[finite], expected[finite]
    error = np.abs(actual - expected)
    bad = (error > abs_tol) & (error > rel_tol * np.abs(expected))
    if not np.isfinite(actual).all() or bad.any():
        worst = np.nanargmax(np.where(bad, error, 0))
        raise AssertionError(
            f"{name}: {bad.sum()} of {bad.size} numbers are off; the worst is {actual[worst]:.7g} "
            f"and should be {expected[worst]:.7g} (off by {error[worst]:.3g})"
        )
    norm = (actual**2).sum() + (expected**2).sum()
    if cos_tol is not None and norm > 0:
        distance = 1 - 2 * (actual * expected).sum() / norm
        assert distance <= cos_tol, f"{name}: 1 - cosine is {distance:.3g}, over {cos_tol}"
