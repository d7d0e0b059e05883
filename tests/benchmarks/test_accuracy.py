"""The benchmark of FP8 accuracy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accuracy


@pytest.mark.usefixtures("on_cpu")
def test_errors_are_of_the_size_of_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "LENGTH", 256)
    monkeypatch.setattr(accuracy, "SEQUENCES", 2)
    rows = {cache: accuracy.errors("normal", cache, 0) for cache in accuracy.CACHES}
    assert rows["bfloat16"]["out_error"] < float(jnp.finfo(jnp.bfloat16).eps)
    for cache in accuracy.CACHES[1:]:
        assert 0.01 < rows[cache]["out_error"] < 0.05
        assert rows["bfloat16"]["lse_most"] < rows[cache]["lse_most"] < 0.01
        assert rows[cache]["lse_rms"] <= rows[cache]["lse_most"]


def test_tokens() -> None:
    rng = np.random.default_rng(0)
    spread = {
        kind: np.abs(accuracy.tokens_of(kind, rng)).max()
        for kind in ("normal", "heavy tails", "large columns")
    }
    assert spread["normal"] < 8 < spread["heavy tails"]
    assert spread["large columns"] > 100
