"""The `flashmla-jax` command: what it prints, where, and with which exit code."""

import ast
import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from flashmla_jax import cli
from flashmla_jax.config import kernel_on, show_config
from flashmla_jax.engine import Engine
from flashmla_jax.generate import Generation
from flashmla_jax.models import deepseek, load_checkpoint, load_tokenizer
from flashmla_jax.ops import _ffi

CHECKPOINT = Path(__file__).parent / "models" / "goldens" / "deepseek_v3"
TRAINING = Path(__file__).parent.parent / "examples" / "train_tiny.py"
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


@pytest.fixture(autouse=True)
def on_cpu(request):
    """Float32, in which one can compare tightly, decodes on the CPU only."""
    if request.node.get_closest_marker("gpu"):
        yield
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            yield


def run(capsys, *argv):
    """Exit code, stdout and stderr of the command in this process."""
    try:
        code = cli.main([str(arg) for arg in argv])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_config(folder, **changes):
    """A folder with the checkpoint's configuration, changed, and its weights."""
    config = json.loads((CHECKPOINT / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to((CHECKPOINT / "model.safetensors").resolve())
    return folder


def test_loading_shows_how_far_it_is(capsys, monkeypatch):
    """A hundred steps, as the bytes come."""
    counted = []

    @contextlib.contextmanager
    def progress(description, total=None):
        counted.append((description, total, []))
        yield lambda: counted[-1][2].append(1)

    monkeypatch.setattr(cli, "_progress", progress)
    code, _, _ = run(capsys, "score", "--checkpoint", CHECKPOINT, "--ids", "1,2,3")
    assert code == 0
    ((description, total, steps),) = counted
    assert description == "loading deepseek_v3"
    assert len(steps) == total == 100


# --- score -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill", [0, 1, 5, 11, 12])
def test_score(capsys, prefill):
    ids = ",".join(map(str, IDS))
    argv = ["score", "--checkpoint", CHECKPOINT, "--ids", ids, "--prefill", prefill]
    code, out, _ = run(capsys, *argv, "--dtype", "float32", "--json")
    assert code == 0
    result = json.loads(out)
    assert list(result) == ["logprobs"]

    config, params = load_checkpoint(CHECKPOINT, dtype=jnp.float32)
    logits = np.asarray(deepseek.forward(params, config, np.int32([IDS]))[0], np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = wanted[np.arange(len(IDS) - 1), IDS[1:]]
    np.testing.assert_allclose(result["logprobs"], wanted, atol=1e-5, rtol=0)


def test_score_as_a_process_prints_json_and_nothing_else():
    """As scripts call it, with the prefill left to the default."""
    argv = ["score", "--checkpoint", CHECKPOINT, "--ids", "1,5,7,9", "--dtype", "float32", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "flashmla_jax.cli", *map(str, argv)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.count("\n") == 1
    assert len(json.loads(result.stdout)["logprobs"]) == 3


def test_score_for_people(capsys):
    code, out, _ = run(capsys, "score", "--checkpoint", CHECKPOINT, "--ids", "1 5 7")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["5", "7"]


# --- generate --------------------------------------------------------------------------------


def test_generate(capsys):
    argv = ["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1,2,3", "7"]
    code, out, _ = run(capsys, *argv, "--max-new-tokens", 70, "--check")
    assert code == 0
    tokens = re.findall(r"sequence \d +(\d+) prompt tokens, (\d+) new: ([\d,]+)", out)
    assert [(int(p), int(n), t.count(",") + 1) for p, n, t in tokens] == [(3, 70, 70), (1, 70, 70)]
    assert re.search(r"^platform +cpu", out, re.M)
    assert re.search(r"^kernel +" + re.escape(kernel_on(jax.devices("cpu")[0])), out, re.M)
    assert re.search(r"^prefill +4 tokens, .* tokens/s$", out, re.M)
    assert re.search(r"^decode +138 tokens in 69 steps, .* tokens/s$", out, re.M)
    assert re.search(r"^cache +4 of 4 pages of 64 tokens in use \(100%\)", out, re.M)
    difference = re.search(r"^check +passed: max difference .* pass (\S+) \(allowed", out, re.M)
    assert float(difference[1]) < 1e-4


def test_generate_with_an_fp8_cache(capsys):
    argv = ["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1,2,3", "--fp8-cache"]
    code, out, _ = run(capsys, *argv, "--max-new-tokens", 70)
    assert code == 0
    assert len(re.search("new: (.*)", out)[1].split(",")) == 70
    _, exact, _ = run(capsys, *argv[:-1], "--max-new-tokens", 70)
    sizes = [float(re.search(r"^cache .* ([\d.]+) MiB", x, re.M)[1]) for x in (out, exact)]
    assert abs(sizes[0] / sizes[1] - 656 / 2304) < 0.1  # of float32
    code, _, err = run(capsys, *argv, "--check")
    assert code != 0
    assert "--fp8-cache" in err


def test_generate_with_a_drafter(capsys):
    argv = ["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1,2,3", "--draft", 2]
    _, plain, _ = run(capsys, *argv[:-2], "--max-new-tokens", 20)
    code, out, _ = run(capsys, *argv, "--drafter", "ngram", "--max-new-tokens", 20)
    assert code == 0
    assert re.search("new: (.*)", out)[1] == re.search("new: (.*)", plain)[1]
    code, _, err = run(capsys, *argv, "--drafter", "mtp")
    assert code != 0
    assert "mtp" in err


def test_generate_samples_by_seed(capsys):
    def tokens(seed):
        argv = ["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1", "--seed", seed]
        _, out, _ = run(capsys, *argv, "--temperature", 1, "--top-p", 0.9, "--max-new-tokens", 9)
        return re.search("new: (.*)", out)[1]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_generate_stops_at_eos(capsys, tmp_path):
    argv = ["--prompt-ids", "1", "--max-new-tokens", 9]
    _, out, _ = run(capsys, "generate", "--checkpoint", CHECKPOINT, *argv)
    tokens = re.search("new: (.*)", out)[1].split(",")
    write_config(tmp_path, eos_token_id=int(tokens[3]))
    _, out, _ = run(capsys, "generate", "--checkpoint", tmp_path, *argv)
    assert re.search("new: (.*)", out)[1].split(",") == tokens[: tokens.index(tokens[3]) + 1]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": int(tokens[1])}))
    _, out, _ = run(capsys, "generate", "--checkpoint", tmp_path, *argv)
    assert re.search("new: (.*)", out)[1].split(",") == tokens[: tokens.index(tokens[1]) + 1]


def test_generate_from_text(capsys, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(96)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(write_config(tmp_path) / "tokenizer.json"))
    argv = ["generate", "--checkpoint", tmp_path, "--max-new-tokens", 4]
    code, text, _ = run(capsys, *argv, "--prompt", "w1 w2", "w7")
    assert code == 0
    _, numbers, _ = run(capsys, *argv, "--prompt-ids", "1,2", "7")
    texts = re.findall("new: '(.*)'", text)
    assert texts == [
        " ".join(f"w{token}" for token in line.split(","))
        for line in re.findall("new: (.*)", numbers)
    ]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "w9 {{ messages[0].content }}"})
    )
    _, text, _ = run(capsys, *argv, "--prompt", "w1 w2", "--chat")
    _, numbers, _ = run(capsys, *argv, "--prompt-ids", "9,1,2")
    (ids,) = re.findall("new: (.*)", numbers)
    assert re.findall("new: '(.*)'", text) == [" ".join(f"w{x}" for x in ids.split(","))]


def write_tokenizer(folder, tokens):
    """A tokenizer whose tokens are these bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # others are written after 255
    others = [byte for byte in range(256) if byte not in letters]
    names = {byte: chr(byte) for byte in letters}
    names |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocabulary = {names[byte]: i for i, byte in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_generate_shows_text_on_a_terminal_as_it_comes(capsys, monkeypatch, tmp_path):
    """Whole characters, of which some tokens are parts, and all of them in the end."""
    write_tokenizer(
        write_config(tmp_path), [*range(32, 80), *range(0x80, 0xA8), *range(0xC3, 0xCB)]
    )
    argv = ["generate", "--checkpoint", tmp_path, "--temperature", 2, "--max-new-tokens", 60]
    argv += ["--prompt", "ABC"]
    _, out, _ = run(capsys, *argv)
    text = ast.literal_eval(re.search("new: (.*)", out)[1])
    assert any(ord(c) in range(0xC0, 0x300) for c in text)

    seen = []
    step = Engine.step

    def watched(engine):
        seen.append(capsys.readouterr().out)
        return step(engine)

    monkeypatch.setattr(Engine, "step", watched)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, rest, err = run(capsys, *argv)
    assert code == 0
    assert seen[0].endswith("\nsequence 0  ")
    assert "".join(seen[1:]) + rest.partition("\nprompts")[0] == text
    assert max(map(len, seen[1:])) < 10
    assert sum(map(bool, seen[1:])) > 20
    assert re.search("^generated +60 tokens", rest, re.M)
    assert "generating" not in err

    _, out, _ = run(capsys, *argv, "ABC")  # of two prompts, everything in the end
    assert out.count("60 new: ") == 2


def test_text_on_a_terminal_does_not_command_it(capsys):
    cli._type("a\tb\n\x1b[2J\x9b\r\u200d\u00e9")
    assert capsys.readouterr().out == "a\tb\n\\x1b[2J\\x9b\\r\u200d\u00e9"


def test_a_failed_check_is_exit_code_1(capsys, monkeypatch):
    monkeypatch.setitem(cli._TOLERANCES, "float32", (1e-12, 1e-12))
    argv = ["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1,2,3", "--check"]
    code, out, _ = run(capsys, *argv, "--max-new-tokens", 3)
    assert code == 1
    assert "FAILED: max difference" in out


@pytest.mark.parametrize("wrong", [np.nan, 3.0])
def test_the_check_sees_one_wrong_logit(capsys, monkeypatch, wrong):
    """In one token, of one sequence, of the forward pass."""
    forward = deepseek.forward

    def broken(params, config, ids):
        return forward(params, config, ids).at[1, 4, 7].add(wrong)

    monkeypatch.setattr(cli.deepseek, "forward", broken)
    argv = ["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1,2,3", "1,2,3", "--check"]
    code, out, _ = run(capsys, *argv, "--max-new-tokens", 5)
    assert code == 1
    assert "FAILED" in out


# --- demo and info ---------------------------------------------------------------------------


def check_demo(out, steps):
    assert len(sequences(out)) == 4
    assert re.search(rf"^decode +\d+ tokens in {steps} steps", out, re.M)
    assert re.search(r"^compiled +in .* leave out$", out, re.M)
    assert re.search(r"^check +passed: max difference", out, re.M)


def sequences(out):
    return re.findall(r"^sequence \d +(.*)$", out, re.M)


def english_words(text):
    return re.findall(r"[a-z]{2,}", text.lower())


def check_english(out):
    """Most words that the model wrote are among those it learned from, and not always the same."""
    new = []
    for text, prompt in zip(sequences(out), cli._DEMO_PROMPTS, strict=True):
        assert text.startswith(prompt)
        new += english_words(text.removeprefix(prompt))
    corpus = set(english_words(runpy.run_path(str(TRAINING))["prose"]()))
    assert len(new) >= 40
    assert len(set(new)) >= len(new) / 3
    assert np.mean([word in corpus for word in new]) >= 0.8, " ".join(new)
    assert np.mean([len(word) for word in new]) >= 3.5


def test_demo(capsys):
    code, out, _ = run(capsys, "demo")
    assert code == 0
    check_demo(out, r"\d{2,}")
    check_english(out)
    assert re.search(r"^model +deepseek_v3, .* in float32$", out, re.M)
    _, again, _ = run(capsys, "demo")
    assert sequences(again) == sequences(out)


def test_the_demo_prints_text_as_it_comes(capsys, monkeypatch):
    """Before a step is taken, all that the earlier steps gave to the first sequence is there."""
    seen = []
    advance = Generation.__iter__

    def watched(generation):
        for step in advance(generation):
            seen.append(capsys.readouterr().out)
            yield step

    monkeypatch.setattr(Generation, "__iter__", watched)
    code, out, _ = run(capsys, "demo", "--max-new-tokens", 20)
    assert code == 0
    assert seen[0].endswith("\nsequence 0  ")
    assert seen[1].startswith(cli._DEMO_PROMPTS[0])
    assert all(len(text) == 1 for text in seen[2:])
    check_demo("".join(seen) + out, 19)


def test_the_demo_checkpoint_is_small():
    """At most 4 MB with the tokenizer, whose tokens are bytes."""
    files = {path.name: path.stat().st_size for path in cli._DEMO_CHECKPOINT.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert sum(files.values()) <= 4e6
    with safetensors.safe_open(cli._DEMO_CHECKPOINT / "model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = load_tokenizer(cli._DEMO_CHECKPOINT)
    text = "Bytes: \x00 \t é € 𝄞\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_random_demo(capsys, tmp_path):
    argv = ["demo", "--random", "--dir", tmp_path, "--max-new-tokens"]
    code, out, err = run(capsys, *argv, 65)
    assert code == 0
    check_demo(out, 64)
    assert re.search(r"^model +deepseek_v3, .* in float32$", out, re.M)
    assert "random weights, written now" in out
    assert "generating" in err

    (checkpoint,) = tmp_path.iterdir()
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert {path.name for path in checkpoint.glob("*.safetensors")} == shards
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]

    code, out, _ = run(capsys, *argv, 3)
    assert code == 0
    assert "from an earlier run" in out
    check_demo(out, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_demos_on_the_gpu(capsys, tmp_path, dtype):
    code, out, _ = run(capsys, "demo", "--dtype", dtype)
    assert code == 0
    check_demo(out, r"\d{2,}")
    check_english(out)
    argv = ["demo", "--random", "--dir", tmp_path, "--dtype", dtype, "--max-new-tokens", 65]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    check_demo(out, 64)
    assert re.search(r"^kernel +the Hopper kernels$", out, re.M)


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["jax"] == jax.__version__
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows["cpu:0"].endswith(kernel_on(jax.devices("cpu")[0]))
    assert "CUDA" in rows or "not loaded" in rows["module"]
    assert show_config() is None
    assert capsys.readouterr().out == out


def test_info_says_why_there_is_no_kernel(capsys, monkeypatch):
    monkeypatch.setattr(_ffi, "why_no_kernel", lambda platform: f"no kernels for {platform}")
    _, out, _ = run(capsys, "info")
    assert re.search(r"^cpu:0 .*the jax\.numpy reference, slowly: no kernels for cpu$", out, re.M)


# --- Mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: command"),
        (["sing"], "invalid choice: 'sing'"),
        (["score", "--ids", "1"], "required: --checkpoint"),
        (["score", "--checkpoint", CHECKPOINT, "--ids", "1,x"], "must look like 1,5,7, got '1,x'"),
        (["score", "--checkpoint", "/nowhere", "--ids", "1"], "no checkpoint folder /nowhere"),
        (["score", "--checkpoint", CHECKPOINT, "--ids", "96"], "ids has token 96 at position 0"),
        (["score", "--checkpoint", CHECKPOINT, "--ids", ""], "ids is empty"),
        (["score", "--checkpoint", CHECKPOINT, "--ids", "1", "--prefill", "2"], "got 2"),
        (["score", "--checkpoint", CHECKPOINT, "--ids", "1", "--dtype", "int8"], "'int8'"),
        (["generate", "--checkpoint", CHECKPOINT], "--prompt-ids --prompt is required"),
        (["generate", "--checkpoint", CHECKPOINT, "--prompt", "hi"], "tokenizer.json"),
        (["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1", "--chat"], "--chat needs"),
        (["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", ","], "prompt 0 is empty"),
        (["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1,-2"], "token -2 at position"),
        (
            ["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1", "--top-p", "2"],
            "top_p must be above 0 and at most 1, got 2.0",
        ),
        (
            ["generate", "--checkpoint", CHECKPOINT, "--prompt-ids", "1", "--max-new-tokens", "0"],
            "max_new_tokens must be at least 1, got 0",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    *progress, line = err.splitlines()
    assert all(text.endswith(" ...") for text in progress)
    assert line.startswith("flashmla-jax")
    assert message in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"hidden_size": 61}, "shape"),
        ({"kv_lora_rank": 256}, "256"),
    ],
)
def test_checkpoints_that_do_not_fit(capsys, tmp_path, changes, message):
    write_config(tmp_path, **changes)
    code, out, err = run(capsys, "score", "--checkpoint", tmp_path, "--ids", "1,2")
    assert code == 2
    assert out == ""
    assert message in err.splitlines()[-1]


def test_a_folder_without_a_checkpoint(capsys, tmp_path):
    code, _, err = run(capsys, "score", "--checkpoint", tmp_path, "--ids", "1,2")
    assert code == 2
    assert "config.json" in err.splitlines()[-1]
