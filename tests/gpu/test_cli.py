"""`generate` and `serve-bench` on a Hopper GPU, in bfloat16, its default; a CPU runs some, too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, check_best, make_params

from flashmla_jax import cli
from flashmla_jax.config import kernel_on
from flashmla_jax.generate import Sampling
from flashmla_jax.models import load_checkpoint, save_checkpoint
from flashmla_jax.serve_bench import Report, serve

DEMO = cli._DEMO_CHECKPOINT


def on_a_gpu(*values: int) -> Any:
    return pytest.param("gpu", *values, marks=pytest.mark.gpu)


@pytest.fixture
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """The platform that a test's programs run on."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], where: str) -> Any:
    """Runs a command, which must succeed and be done by kernels, and gives what it printed."""

    def call(*argv: Any) -> str:
        dtype = [] if where == "gpu" else ["--dtype", "bfloat16"]
        assert cli.main([*map(str, argv), *dtype]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^model +deepseek_v3, .* in bfloat16$", out, re.M)
        assert re.search(rf"^platform +{where} ", out, re.M)
        kernel = re.search(r"^kernel +(.*)$", out, re.M)[1]
        assert kernel == kernel_on(jax.devices(where)[0])
        assert kernel == "the Hopper kernels" or where == "cpu"
        return out

    return call


def write_checkpoint(folder: Path, strength: float) -> tuple[Path, dict]:
    """Where it is, and its parameters; for `strength` see `make_params`."""
    with jax.default_device(jax.devices("cpu")[0]):
        params = make_params(strength, jnp.bfloat16)
        save_checkpoint(folder / "model", CONFIG, params)
    return folder / "model", params


def number(pattern: str, out: str) -> int:
    return int(re.search(rf"^{pattern}", out, re.M)[1])


@pytest.mark.parametrize(
    ("where", "slots", "draft"),
    [
        ("cpu", 2, 1),
        # In one call of all layers, and not.
        *(on_a_gpu(*values) for values in ((3, 0), (2, 1), (5, 0), (5, 2))),
    ],
    indirect=["where"],
)
def test_generate(run: Any, tmp_path: Path, slots: int, draft: int) -> None:
    folder, params = write_checkpoint(tmp_path, 0.25 if draft else 2.0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (3, 70, 1, 64, 20)]
    argv = ["generate", "--checkpoint", folder, "--max-new-tokens", 70, "--slots", slots]
    argv += ["--draft", draft, "--prompt-ids", *(",".join(map(str, ids)) for ids in prompts)]
    out = run(*argv)
    found = re.findall(r"^sequence \d +(\d+) prompt tokens, 70 new: ([\d,]+)$", out, re.M)
    assert [int(length) for length, _ in found] == [len(prompt) for prompt in prompts]
    tokens = [[int(token) for token in ids.split(",")] for _, ids in found]
    assert {len(new) for new in tokens} == {70}
    check_best(params, CONFIG, prompts, tokens)
    assert number(r"prompts +(\d+) tokens read, 0 found", out) == sum(map(len, prompts))
    assert number(r"generated +(\d+) tokens in ", out) == 5 * 70
    if draft:
        assert number(r"drafts +(\d+) of \d+ tokens were right, from multi-token", out) > 0


@pytest.mark.parametrize("where", [on_a_gpu()], indirect=True)
def test_generate_with_a_check(run: Any, tmp_path: Path) -> None:
    folder, params = write_checkpoint(tmp_path, 2.0)
    out = run("generate", "--checkpoint", folder, "--prompt-ids", "1,2,3", "7", "--check")
    tokens = [
        [int(token) for token in ids.split(",")]
        for ids in re.findall(r"^sequence \d +\d prompt tokens, 64 new: ([\d,]+)$", out, re.M)
    ]
    check_best(params, CONFIG, [[1, 2, 3], [7]], tokens)
    assert re.search(r"^check +passed: max difference", out, re.M)


@pytest.mark.parametrize("where", ["cpu", on_a_gpu()], indirect=True)
def test_generate_from_text(run: Any) -> None:
    """With the model of the demo, whose tokens are bytes."""
    pytest.importorskip("tokenizers")
    prompts = ["Return a list of ", "The "]
    argv = ["generate", "--checkpoint", DEMO, "--max-new-tokens", 60, "--prompt", *prompts]
    out = run(*argv)
    found = re.findall(r"^sequence \d +(\d+) prompt tokens, (\d+) new: (.*)$", out, re.M)
    texts = [ast.literal_eval(text) for _, _, text in found]
    assert [(int(m), int(n)) for m, n, _ in found] == [
        (len(prompt), len(text)) for prompt, text in zip(prompts, texts, strict=True)
    ]
    assert all(len(text) == 60 or text.endswith("\n") for text in texts)
    with jax.default_device(jax.devices("cpu")[0]):
        config, params = load_checkpoint(DEMO, dtype=jnp.bfloat16)
    prompts, texts = ([list(text.encode()) for text in some] for some in (prompts, texts))
    check_best(params, config, prompts, texts)


@pytest.mark.parametrize(
    ("where", "draft"), [("cpu", 1), on_a_gpu(0), on_a_gpu(1)], indirect=["where"]
)
def test_serve_bench(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draft: int) -> None:
    """A load with too few pages for all slots: what is said of it, and what its requests got."""
    reports: list[Report] = []

    def recorded(*args: Any) -> Report:
        reports.append(serve(*args))
        return reports[-1]

    monkeypatch.setattr(cli, "serve", recorded)
    folder, params = write_checkpoint(tmp_path, 0.25 if draft else 2.0)
    argv = ["serve-bench", "--checkpoint", folder, "--requests", 8, "--seed", 3]
    argv += ["--prompt-lengths", "3,90", "--new-tokens", "20,80", "--shared-prefix", 64]
    argv += ["--slots", 4, "--num-pages", 6, "--chunk", 64, "--draft", draft]
    out = run(*argv, "--temperature", 0.7)
    (report,) = reports
    requests = report.requests
    samplings = [Sampling(0.7, seed=3 + i) for i in range(8)]
    assert [request.sampling for request in requests] == samplings
    assert all(len(request.tokens) == request.max_new_tokens for request in requests)
    check_best(
        params,
        CONFIG,
        [request.prompt for request in requests],
        [request.tokens for request in requests],
        samplings,
    )
    assert number(r"requests +(\d+) in [\d.]+ s: [\d.]+ requests/s$", out) == 8
    assert number(r"prompts +(\d+) tokens, ", out) == sum(len(r.prompt) for r in requests)
    assert number(r"throughput +(\d+) new tokens: ", out) == sum(len(r.tokens) for r in requests)
    assert number(r"preemptions +(\d+)$", out) == sum(r.preemptions for r in requests) > 0
    times = r" +p50 [\d.]+, p90 [\d.]+, p99 [\d.]+ ms$"
    for name in ("TTFT", "TPOT", "ITL"):
        assert re.search(rf"^{name}{times}", out, re.M)
    assert re.search(r"^cache use +mean \d+%, peak \d+% of 6 pages$", out, re.M)
    if draft:
        assert number(r"drafts +(\d+) of \d+ tokens were right, from multi-token", out) > 0
