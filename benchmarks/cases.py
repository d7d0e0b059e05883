"""The decode calls that are measured."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from flashmla_jax.cache.layout import FP8, HEAD_DIM, HEAD_DIM_V

LONG = 128 * 1024  # the one sequence among the others of a "skew" case

K = 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the op."""

    regime: str
    batch: int
    s_q: int
    h_q: int
    length: int
    spread: str = "uniform"
    """How cached tokens are spread over the batch. "uniform": all sequences have `length`.
    "varlen": normal around `length`, half of it the deviation, as in FlashMLA's own test.
    "skew": one sequence has 128 K, the others `length`. "even": as many tokens as "skew" in all."""
    dtype: str = "bfloat16"
    rival: bool = False
    """Measure gather + einsum too."""
    batch_invariant: bool = False
    """In the mode `deterministic="batch_invariant"`."""
    fp8: bool = False
    """Over an FP8 cache."""

    def __str__(self) -> str:
        name = f"b{self.batch} s{self.s_q} h{self.h_q} {self.length} {self.spread}"
        name += "" if self.dtype == "bfloat16" else f" {self.dtype}"
        return name + " fp8" * self.fp8 + " batch-invariant" * self.batch_invariant

    @property
    def causal(self) -> bool:
        return self.s_q > 1

    def lengths(self) -> np.ndarray:
        """int32[batch], the same every time."""
        lengths = np.full(self.batch, self.length)
        if self.spread == "varlen":
            rng = np.random.default_rng(0)
            lengths = rng.normal(self.length, self.length / 2, self.batch).astype(int)
        elif self.spread == "skew":
            lengths[self.batch // 2] = LONG
        elif self.spread == "even":
            lengths[:] = (LONG + (self.batch - 1) * self.length) // self.batch
        elif self.spread != "uniform":
            raise ValueError(f"unknown spread {self.spread!r}")
        return np.maximum(lengths, self.s_q).astype(np.int32)

    def flop(self) -> int:
        """Of both products, masked scores included."""
        tokens = int(self.lengths().sum())
        return 2 * self.s_q * self.h_q * tokens * (HEAD_DIM + HEAD_DIM_V)

    def bytes(self) -> int:
        """Queries, cached tokens and results, each counted once."""
        size = 4 if self.dtype == "float32" else 2
        token = FP8.token_bytes if self.fp8 else size * HEAD_DIM
        rows = self.batch * self.s_q * self.h_q
        return token * int(self.lengths().sum()) + size * rows * (HEAD_DIM + HEAD_DIM_V)


def _table() -> list[Case]:
    cases = [
        Case("baseline", 128, 1, 128, 4 * K, rival=True),
        Case("baseline", 128, 1, 16, 4 * K, rival=True),
        Case("baseline", 16, 1, 128, 8 * K, rival=True),
        Case("baseline", 16, 1, 16, 8 * K, rival=True),
        Case("baseline", 1, 1, 128, 8 * K, rival=True),
        Case("baseline", 1, 1, 16, 8 * K, rival=True),
    ]
    for s_q, length in itertools.product((1, 2), (4, 8, 16, 32)):
        cases.append(Case("compute-bound", 128, s_q, 128, length * K, "varlen"))
    for heads, length in itertools.product((16, 32, 64), (4, 16)):
        cases.append(Case("memory-bound", 128, 1, heads, length * K, "varlen"))
    for length in (8, 32):
        cases.append(Case("speculative", 32, 4, 16, length * K))
        cases.append(Case("speculative", 32, 1, 64, length * K))
    for batch, heads, length in itertools.product((1, 4, 16), (16, 128), (1, 8, 64)):
        regime = "latency" if batch < 16 else "small batch"
        if (batch, length) not in ((1, 8), (16, 8)):  # those are baselines
            cases.append(Case(regime, batch, 1, heads, length * K))
    for heads, length in itertools.product((16, 128), (1, 8)):
        cases.append(Case("small batch", 32, 1, heads, length * K))
    for heads, spread in itertools.product((16, 128), ("skew", "even")):
        cases.append(Case("skew", 64, 1, heads, K, spread))
    for heads in (16, 128):
        cases.append(Case("float16", 128, 1, heads, 4 * K, "varlen", "float16"))
    for batch, heads, length, spread in (
        (128, 128, 4, "varlen"),
        (128, 16, 4, "varlen"),
        (32, 128, 8, "uniform"),
        (4, 16, 8, "uniform"),
        (1, 128, 64, "uniform"),
    ):
        sizes = batch, 1, heads, length * K
        cases.append(Case("batch-invariant", *sizes, spread, batch_invariant=True))
    for heads, length in itertools.product((16, 32, 64, 128), (4, 16)):
        cases.append(Case("fp8", 128, 1, heads, length * K, "varlen", fp8=True))
    for batch, heads in itertools.product((1, 16), (16, 128)):
        cases.append(Case("fp8", batch, 1, heads, 8 * K, fp8=True))
    return cases


TABLE = _table()

IN_A_MODEL = Case("in a model", 32, 1, 128, 4 * K)

_NAMES = {str(case) for case in TABLE}
SWEEP = [
    case
    for batch, heads, length in itertools.product((1, 16), (16, 128), (0.5, 1, 2, 4, 8, 16, 32, 64))
    if str(case := Case("sweep", batch, 1, heads, int(length * K))) not in _NAMES
]

CPU = [
    Case("cpu", 8, 1, 16, 4 * K, rival=True),
    Case("cpu", 8, 1, 16, 4 * K, dtype="float16", rival=True),
    Case("cpu", 8, 1, 16, 4 * K, dtype="float32", rival=True),
    Case("cpu", 1, 1, 128, 4 * K, rival=True),
    Case("cpu", 1, 1, 128, 4 * K, dtype="float32", rival=True),
    Case("cpu", 4, 4, 16, 4 * K, rival=True),
    Case("cpu", 8, 1, 1, 4 * K, rival=True),
    Case("cpu", 1, 1, 16, 16 * K, rival=True),
    Case("cpu", 64, 1, 16, 64, rival=True),
    Case("cpu", 1, 1, 16, 64, rival=True),
]
