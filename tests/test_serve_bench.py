"""The synthetic load, and what `serve-bench` and `generate` say of an engine."""

import dataclasses
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashmla_jax import cli
from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.engine import Engine, Request
from flashmla_jax.generate import GREEDY, Sampling, generate
from flashmla_jax.models import load_checkpoint
from flashmla_jax.serve_bench import Load, Report, Sample, check_plot, serve

pytestmark = pytest.mark.usefixtures("on_cpu")

CHECKPOINT = Path(__file__).parent / "models" / "goldens" / "deepseek_v3"


@pytest.fixture(scope="module")
def model(on_cpu):
    config, params = load_checkpoint(CHECKPOINT, dtype=jnp.float32)
    return params, config


def run(capsys, *argv):
    code = cli.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- The load --------------------------------------------------------------------------------


def test_serve_gives_every_request_its_tokens(model):
    load = Load(
        requests=9,
        rate=100.0,
        prompt_lengths=(3, 20),
        new_tokens=(2, 9),
        shared_prefix=PAGE_SIZE,
        sampling=Sampling(1.0, seed=4),
        seed=1,
    )
    engine = Engine(*model, num_pages=10, max_seqlen=load.max_seqlen, slots=3, chunk=32)
    finished = []
    report = serve(engine, load, 96, on_finish=lambda: finished.append(1))
    assert len(report.requests) == len(finished) == 9
    lengths = [len(request.prompt) - PAGE_SIZE for request in report.requests]
    assert min(lengths) >= 3
    assert max(lengths) <= 20
    assert len(set(lengths)) > 1
    for i, request in enumerate(report.requests):
        np.testing.assert_array_equal(
            request.prompt[:PAGE_SIZE], report.requests[0].prompt[:PAGE_SIZE]
        )
        assert 2 <= len(request.tokens) == request.max_new_tokens <= 9
        assert request.sampling == Sampling(1.0, seed=4 + i)
    assert report.new_tokens == sum(len(request.tokens) for request in report.requests)
    assert (report.first_token_latencies > 0).all()
    assert (np.diff(report.arrivals) > 0).all()
    assert len(report.inter_token_latencies) == report.new_tokens - 9
    assert max(report.usage) <= 1
    assert report.samples[-1].running == report.samples[-1].waiting == 0
    assert report.samples[-1].pages_held == 0
    assert report.samples[-1].pages_cached > 0

    again = serve(
        Engine(*model, num_pages=10, max_seqlen=load.max_seqlen, slots=3, chunk=32),
        dataclasses.replace(load, rate=float("inf")),
        96,
    )
    assert [r.tokens for r in again.requests] == [r.tokens for r in report.requests]
    assert len(set(again.arrivals)) == 1


def make_report():
    """Two requests by hand: three tokens after 1, 3, 4 seconds, and one after 2."""
    requests = []
    for number, times in enumerate([[11.0, 13.0, 14.0], [13.0]]):
        request = Request(number, np.ones(10, np.int32), len(times), GREEDY, frozenset(), None)
        request.tokens, request.token_times = [7] * len(times), times
        request.prefix_tokens = 5 * number
        request.preemptions = number
        requests.append(request)
    samples = [Sample(1.0, 4, 0, 1, 0), Sample(3.0, 5, 3, 1, 1), Sample(4.0, 0, 2, 0, 0)]
    return Report(4.0, requests, [10.0, 11.0], samples, num_pages=8)


def test_report():
    report = make_report()
    np.testing.assert_array_equal(report.first_token_latencies, [1.0, 2.0])
    np.testing.assert_array_equal(report.inter_token_latencies, [2.0, 1.0])
    np.testing.assert_array_equal(report.times_per_output_token, [1.5])
    np.testing.assert_array_equal(report.usage, [0.5, 1.0, 0.25])
    lines = dict(report.lines())
    assert lines["requests"] == "2 in 4.00 s: 0.50 requests/s"
    assert lines["prompts"] == "20 tokens, 25% of them in the cache"
    assert lines["throughput"] == "4 new tokens: 1.0 tokens/s"
    assert lines["preemptions"] == "1"
    assert lines["TTFT"] == "p50 1500.0, p90 1900.0, p99 1990.0 ms"
    assert lines["TPOT"] == "p50 1500.0, p90 1500.0, p99 1500.0 ms"
    assert lines["ITL"] == "p50 1500.0, p90 1900.0, p99 1990.0 ms"
    assert lines["cache use"] == "mean 69%, peak 100% of 8 pages"
    assert lines["over time"] == "▄" * 15 + "█" * 30 + "▂" * 15


def test_report_without_a_second_token():
    report = make_report()
    short = dataclasses.replace(report, requests=report.requests[1:], arrivals=report.arrivals[1:])
    assert not {"ITL", "TPOT"} & dict(short.lines()).keys()


def test_tokens_of_one_step():
    """Of nine tokens in four steps, there are three times between, and the mean is of eight."""
    report = make_report()
    request = report.requests[0]
    request.tokens, request.token_times = [7] * 9, [11.0, *[13.0] * 4, *[14.0] * 3, 19.0]
    np.testing.assert_array_equal(report.inter_token_latencies, [2.0, 1.0, 5.0])
    np.testing.assert_array_equal(report.times_per_output_token, [1.0])


def test_plot(tmp_path):
    """Texts are in the file, as such or in comments beside the shapes of their letters."""
    pytest.importorskip("matplotlib")
    make_report().plot(tmp_path / "cache.svg")
    svg = (tmp_path / "cache.svg").read_text()
    texts = re.findall(r"(?<=>|-) ?([a-z][a-z ]*[a-z]) ?(?=<|-)", svg)
    series = ["held by requests", "cached prefixes", "running", "waiting"]
    assert [text for text in texts if text in series] == series
    assert {"pages", "requests", "seconds"} <= set(texts)


def test_plots_that_cannot_be(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    check_plot("path", tmp_path / "cache.PDF")
    for name in ("cache.docx", "cache"):
        with pytest.raises(
            ValueError, match=rf"path must end with one of .*\.svg.*, got .*{name}$"
        ):
            make_report().plot(tmp_path / name)
    with pytest.raises(ValueError, match="path must be in a folder that exists"):
        make_report().plot(tmp_path / "no" / "cache.svg")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(NotImplementedError, match=r"path needs matplotlib .*flashmla-jax\[bench\]"):
        make_report().plot(tmp_path / "cache.svg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"rate": float("nan")}, "rate must be positive, got nan"),
        ({"shared_prefix": -1}, "shared_prefix must not be negative, got -1"),
        ({"prompt_lengths": (0, 4)}, "prompt_lengths must be a range from 1 up, got 0 to 4"),
        ({"new_tokens": (5, 4)}, "new_tokens must be a range from 1 up, got 5 to 4"),
    ],
)
def test_load_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Load(**changes)


# --- The commands ----------------------------------------------------------------------------


def test_serve_bench(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    loads = []

    def recorded(engine, load, *args):
        loads.append(load)
        return serve(engine, load, *args)

    monkeypatch.setattr(cli, "serve", recorded)
    plot = tmp_path / "cache.png"
    argv = ["--checkpoint", CHECKPOINT, "--requests", 5, "--slots", 3, "--num-pages", 10]
    argv += ["--prompt-lengths", "3,20", "--new-tokens", "2,9", "--chunk", 32]
    argv += ["--shared-prefix", 64, "--plot", plot, "--rate", 50, "--seed", 3]
    code, out, _ = run(capsys, "serve-bench", *argv)
    assert code == 0
    assert loads == [Load(5, 50.0, (3, 20), (2, 9), 64, Sampling(0.0, seed=3), seed=3)]
    for name, value in {
        "requests": r"5 in [\d.]+ s: [\d.]+ requests/s",
        "throughput": r"\d+ new tokens: [\d.]+ tokens/s",
        "TTFT": r"p50 [\d.]+, p90 [\d.]+, p99 [\d.]+ ms",
        "TPOT": r"p50 [\d.]+, p90 [\d.]+, p99 [\d.]+ ms",
        "ITL": r"p50 [\d.]+, p90 [\d.]+, p99 [\d.]+ ms",
        "cache use": r"mean \d+%, peak \d+% of 10 pages",
        "plot": re.escape(str(plot)),
    }.items():
        assert re.search(rf"^{name} +{value}$", out, re.M), out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_generate_runs_prompts_in_slots(capsys, model):
    prompts = [[1, 2, 3], [7], [5, 9], [1, 2, 3]]
    argv = ["--checkpoint", CHECKPOINT, "--max-new-tokens", 6, "--slots", 2, "--temperature", 1]
    argv += ["--draft", 2]
    argv += ["--prompt-ids", *(",".join(map(str, prompt)) for prompt in prompts), "--seed", 3]
    code, out, _ = run(capsys, "generate", *argv)
    assert code == 0
    tokens = [
        [int(token) for token in text.split(",")]
        for text in re.findall(r"^sequence \d +\d+ prompt tokens, 6 new: (.*)$", out, re.M)
    ]
    assert tokens == generate(*model, prompts, 6, sampling=Sampling(1.0, seed=3))
    assert tokens[0] != tokens[3]
    assert re.search(r"^generated +24 tokens in \d+ steps, .* tokens/s$", out, re.M)
    assert re.search(r"^drafts +\d+ of \d+ tokens were right, from n-grams$", out, re.M)
    assert re.search(r"^cache +2 of 2 pages of 64 tokens in use", out, re.M)


def test_drafts_from_multi_token_prediction(capsys, tmp_path):
    """The checkpoint's module is read and used where drafts are asked for."""
    tensors = load_file(CHECKPOINT / "model.safetensors")
    save_file(tensors | load_file(CHECKPOINT / "mtp.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    argv = ["--checkpoint", tmp_path, "--max-new-tokens", 12, "--prompt-ids", "1,2,3", "7"]
    outs = []
    for draft in (0, 2):
        code, out, _ = run(capsys, "generate", *argv, "--draft", draft)
        assert code == 0
        outs.append(out)
    plain, drafted = outs
    sequences = r"^sequence .*$"
    assert re.findall(sequences, plain, re.M) == re.findall(sequences, drafted, re.M)
    assert "drafts" not in plain
    way = "from multi-token prediction"
    assert re.search(rf"^drafts +\d+ of [1-9]\d* tokens were right, {way}$", drafted, re.M)
    assert "MiB in 3 layers" in plain
    assert "MiB in 4 layers" in drafted

    argv = ["--checkpoint", tmp_path, "--requests", 2, "--prompt-lengths", 3, "--new-tokens", 4]
    code, out, _ = run(capsys, "serve-bench", *argv, "--draft", 1)
    assert code == 0
    assert way in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--prompt-ids", "1", "--slots", 0], "slots must be at least 1, got 0"),
        (["generate", "--prompt-ids", "1", "--draft", -1], "draft must be at least 0, got -1"),
        (["serve-bench", "--rate", 0], "rate must be positive, got 0.0"),
        (["serve-bench", "--plot", "cache.docx"], "--plot must end with one of"),
    ],
)
def test_mistakes(capsys, argv, message):
    command, *rest = argv
    code, _, err = run(capsys, command, "--checkpoint", CHECKPOINT, *rest)
    assert code == 2
    assert message in err
