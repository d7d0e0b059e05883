"""The `flashmla-jax` command."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.config import kernel_on, show_config
from flashmla_jax.engine import CHUNK, Engine
from flashmla_jax.generate import Generation, Sampling, checked_ids, score
from flashmla_jax.layers.mla import Params, YarnScaling
from flashmla_jax.models import (
    DeepSeekConfig,
    Tokenizer,
    deepseek,
    init_params,
    load_checkpoint,
    load_tokenizer,
    save_checkpoint,
    tensor_parallel,
)
from flashmla_jax.serve_bench import Load, check_plot, serve

# What a terminal would obey, but for tabs and newlines.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}

# How far the logits of decoding through the cache may be from those of a forward pass without one,
# in standard deviations of the logits: at every token, and at three quarters of each sequence's.
# Both ways round, in another order; in 16 bits this sometimes makes a router swap two nearly equal
# experts, which moves the logits of that token much further.
_TOLERANCES = {"float32": (1e-3, 1e-3), "float16": (0.5, 0.05), "bfloat16": (0.5, 0.1)}

# A small byte-level model, trained with `examples/train_tiny.py --size cpu`.
_DEMO_CHECKPOINT = Path(__file__).parent / "demo_checkpoint"
_DEMO_PROMPTS = (
    "The ",
    "Return a list of ",
    "If the file does not exist, ",
    "This method is called ",
)
_DEMO_SAMPLING = Sampling(temperature=0.4)

_RANDOM_CONFIG = DeepSeekConfig(
    model_type="deepseek_v3",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=16,
    q_lora_rank=128,
    moe_intermediate_size=128,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    # Small, so that random experts that swap places in 16 bits do not drown all other rounding.
    routed_scaling_factor=0.25,
    first_k_dense_replace=1,
    rope_scaling=YarnScaling(
        factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    ),
    max_position_embeddings=163840,
)
_RANDOM_PROMPT_LENGTHS = (5, 37, 64, 150)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0 is success, 1 a result that failed its check, 2 a mistake of the user's, which one line on
    stderr explains.
    """
    args = _parser().parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"flashmla-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


# --- Arguments -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flashmla-jax",
        description="Runs DeepSeek models on a paged latent cache, through FlashMLA in JAX.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "generate",
        _generate,
        "Continues prompts with a checkpoint. On a terminal, what follows a single --prompt is "
        "shown as it comes.",
    )
    _add_model(sub, "the default is bfloat16 on a GPU and float32 on the CPU")
    prompts = sub.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt-ids", nargs="+", type=_ids, metavar="IDS", help="prompts, as 1,5,7"
    )
    prompts.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="prompts, for the checkpoint's tokenizer.json"
    )
    sub.add_argument(
        "--chat", action="store_true", help="each prompt is a message, in the chat template"
    )
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    sub.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy"
    )
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: all tokens")
    sub.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the sampling, N + i for the i-th prompt; default 0",
    )
    _add_engine(sub)
    sub.add_argument(
        "--check",
        action="store_true",
        help="run all prompts as one batch, and compare the logits with an uncached forward pass",
    )

    sub = command(
        "serve-bench",
        _serve_bench,
        "Measures throughput and latencies under random requests that arrive at random times: to "
        "the first token (TTFT), per token after it (TPOT, a request's mean), and between tokens "
        "(ITL, where those that one step gives with drafts count as one).",
    )
    _add_model(sub, "as in generate")
    _add_engine(sub)
    sub.add_argument("--requests", type=int, default=64, metavar="N", help="default 64")
    sub.add_argument(
        "--rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help="requests per second on average (Poisson); default inf: all at once",
    )
    sub.add_argument(
        "--prompt-lengths",
        type=_range,
        default=(32, 256),
        metavar="A,B",
        help="from A to B tokens, all as likely; default 32,256",
    )
    sub.add_argument(
        "--new-tokens",
        type=_range,
        default=(16, 128),
        metavar="A,B",
        help="likewise; default 16,128",
    )
    sub.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="tokens that all prompts begin with, besides their own; default 0",
    )
    sub.add_argument(
        "--num-pages",
        type=int,
        metavar="N",
        help="size of the cache; by default what the longest requests need in all slots",
    )
    sub.add_argument(
        "--chunk",
        type=int,
        default=CHUNK,
        metavar="N",
        help="tokens read per step; default %(default)s",
    )
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="as in generate")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the load; default 0")
    sub.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw cache use over time, as the suffix says: .svg, .png, .pdf "
        "(pip install 'flashmla-jax[bench]')",
    )

    sub = command(
        "demo",
        _demo,
        "Continues four prompts with a small byte-level model that comes with the package, and "
        "checks the result against an uncached forward pass.",
    )
    sub.add_argument(
        "--random",
        action="store_true",
        help="write a DeepSeek-V3 checkpoint with experts and random weights, and use that one",
    )
    sub.add_argument(
        "--dir",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "flashmla_jax",
        help="where --random keeps its checkpoint; default ~/.cache/flashmla_jax",
    )
    sub.add_argument("--max-new-tokens", type=int, default=160, metavar="N", help="default 160")
    sub.add_argument("--dtype", choices=_DTYPES, help="as in generate")

    sub = command("score", _score, "Prints the log-probability of each token of a sequence.")
    _add_model(sub, "as in generate")
    sub.add_argument("--ids", type=_ids, required=True, metavar="IDS", help="as 1,5,7")
    sub.add_argument(
        "--prefill",
        type=int,
        metavar="K",
        help="read the first K tokens at once and decode the others one by one; default all",
    )
    sub.add_argument("--json", action="store_true", help='print {"logprobs": [...]}')

    command("info", _info, "Prints versions, how the package was built, and what runs where.")
    return parser


def _add_model(parser: argparse.ArgumentParser, dtype_help: str) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="in Hugging Face's format"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help=dtype_help)
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="divide every layer over the first N devices; default 1",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slots", type=int, default=8, metavar="N", help="sequences run at once; default 8"
    )
    parser.add_argument(
        "--draft",
        type=int,
        default=0,
        metavar="N",
        help="tokens to guess, with the checkpoint's multi-token prediction or, without one, from "
        "the text so far, and to verify in a step; default 0",
    )
    parser.add_argument(
        "--drafter", choices=("mtp", "ngram"), help="one of the two, whatever the checkpoint has"
    )
    parser.add_argument(
        "--fp8-cache", action="store_true", help="cached tokens of 656 bytes instead of 1152"
    )


def _range(text: str) -> tuple[int, int]:
    first, *last = _ids(text)
    if len(last) > 1:
        raise argparse.ArgumentTypeError(f"a range must look like 1,5, got {text!r}")
    return first, last[0] if last else first


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"token ids must look like 1,5,7, got {text!r}") from None


# --- Commands --------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    show_config()
    return 0


def _score(args: argparse.Namespace) -> int:
    config, params = _load(args.checkpoint, args.dtype, args.devices)
    logprobs = score(params, config, args.ids, args.prefill)
    if args.json:
        print(json.dumps({"logprobs": logprobs.tolist()}))
    else:
        for token, logprob in zip(args.ids[1:], logprobs, strict=True):
            print(f"{token:>8} {logprob:12.6f}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    if args.chat and not args.prompt:
        raise ValueError("--chat needs --prompt")
    tokenizer = load_tokenizer(args.checkpoint) if args.prompt else None
    prompts = args.prompt_ids
    if tokenizer is not None:
        encode = _as_message(tokenizer) if args.chat else tokenizer.encode
        prompts = [encode(text) for text in args.prompt]
    if args.check and args.fp8_cache:
        raise ValueError("--check compares with exact logits: not with --fp8-cache")
    mtp = args.draft > 0 and args.drafter != "ngram" and not args.check
    config, params = _load(args.checkpoint, args.dtype, args.devices, mtp)
    if args.check:
        run = Generation(params, config, prompts, args.max_new_tokens, sampling=sampling)
        return _run(run, params, config, tokenizer, check=True)

    for i, prompt in enumerate(prompts):
        checked_ids(f"prompt {i}", prompt, config)
    longest = max(map(len, prompts))
    slots = min(args.slots, len(prompts))
    max_seqlen = longest + max(args.max_new_tokens, 1)  # which `submit` checks
    engine = Engine(
        params,
        config,
        num_pages=slots * -(-max_seqlen // PAGE_SIZE),
        max_seqlen=max_seqlen,
        slots=slots,
        chunk=min(longest, CHUNK),
        draft=args.draft,
        drafter=args.drafter,
        cache_dtype="fp8" if args.fp8_cache else None,
    )
    stream = None
    if tokenizer is not None and len(prompts) == 1 and sys.stdout.isatty():
        stream = tokenizer.stream()
    requests = [
        engine.submit(
            prompt,
            args.max_new_tokens,
            sampling=dataclasses.replace(sampling, seed=args.seed + i),
            on_token=None if stream is None else lambda token: _type(stream.step(token)),
        )
        for i, prompt in enumerate(prompts)
    ]
    _compile(engine, params, config, sampling)
    start = time.perf_counter()
    if stream is None:
        with _progress("generating"):
            engine.run()
    else:
        _type(f"{'sequence 0':12}")
        engine.run()
        _type(stream.finish() + "\n")
    seconds = time.perf_counter() - start
    for i, request in enumerate(requests if stream is None else []):
        _report_sequence(i, request.prompt, request.tokens, tokenizer)
    stats = engine.stats
    tokens = sum(len(request.tokens) for request in requests)
    _report("prompts", f"{stats.read_tokens} tokens read, {stats.prefix_tokens} found in the cache")
    _report_speed("generated", tokens, seconds, f" in {stats.steps} steps")
    _report_drafts(engine)
    _report_cache(engine.cache, int(engine.cache.high_water))
    return 0


def _serve_bench(args: argparse.Namespace) -> int:
    if args.plot is not None:
        check_plot("--plot", args.plot)
    load = Load(
        requests=args.requests,
        rate=args.rate,
        prompt_lengths=args.prompt_lengths,
        new_tokens=args.new_tokens,
        shared_prefix=args.shared_prefix,
        sampling=Sampling(args.temperature, seed=args.seed),
        seed=args.seed,
    )
    mtp = args.draft > 0 and args.drafter != "ngram"
    config, params = _load(args.checkpoint, args.dtype, args.devices, mtp)
    num_pages = args.num_pages
    if num_pages is None:
        num_pages = args.slots * -(-load.max_seqlen // PAGE_SIZE)
    engine = Engine(
        params,
        config,
        num_pages=num_pages,
        max_seqlen=load.max_seqlen,
        slots=args.slots,
        chunk=args.chunk,
        draft=args.draft,
        drafter=args.drafter,
        cache_dtype="fp8" if args.fp8_cache else None,
    )
    _compile(engine, params, config, load.sampling)
    with _progress("serving", load.requests) as advance:
        report = serve(engine, load, config.vocab_size, advance)
    for name, value in report.lines():
        _report(name, value)
    _report_drafts(engine)
    if args.plot is not None:
        report.plot(args.plot)
        _report("plot", str(args.plot))
    return 0


def _demo(args: argparse.Namespace) -> int:
    if args.random:
        return _demo_random(args)
    tokenizer = load_tokenizer(_DEMO_CHECKPOINT)
    prompts = [tokenizer.encode(text) for text in _DEMO_PROMPTS]
    config, params = _load(_DEMO_CHECKPOINT, args.dtype)
    run = Generation(params, config, prompts, args.max_new_tokens, sampling=_DEMO_SAMPLING)
    return _run(run, params, config, tokenizer, check=True, stream=True)


def _demo_random(args: argparse.Namespace) -> int:
    checkpoint = _random_checkpoint(args.dir)
    config, params = _load(checkpoint, args.dtype)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in _RANDOM_PROMPT_LENGTHS]
    run = Generation(params, config, prompts, args.max_new_tokens)
    return _run(run, params, config, None, check=True)


def _random_checkpoint(folder: Path) -> Path:
    """Where the checkpoint with random weights is, after writing it if need be."""
    fingerprint = hashlib.sha256(json.dumps(_RANDOM_CONFIG.to_dict()).encode()).hexdigest()[:8]
    path = folder / f"deepseek-v3-random-{fingerprint}"
    if path.exists():
        _report("checkpoint", f"{path} (from an earlier run)")
        return path
    with _progress("writing a checkpoint"):
        params = init_params(_RANDOM_CONFIG, jax.random.key(0), jnp.bfloat16)
        save_checkpoint(path, _RANDOM_CONFIG, params, max_shard_size=8 * 2**20)
    _report("checkpoint", f"{path} (random weights, written now)")
    return path


def _load(
    checkpoint: Path, dtype: str | None, devices: int = 1, mtp: bool = False
) -> tuple[DeepSeekConfig, Params]:
    """A checkpoint's configuration and parameters, as decoding reads them."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {checkpoint}")
    shardings = None
    if devices != 1:
        found = jax.devices()
        if not 1 <= devices <= len(found):
            raise ValueError(
                f"--devices {devices} is not from 1 to {len(found)}, as many as there are"
            )
        mesh = Mesh(np.array(found[:devices]), ("devices",))
        shardings = tensor_parallel(DeepSeekConfig.from_json(checkpoint), mesh, "devices")
    if dtype is None:
        dtype = "bfloat16" if _device().platform == "gpu" else "float32"
    percent = 0
    with _progress(f"loading {checkpoint.name}", 100) as advance:

        def show(done: int, total: int) -> None:
            nonlocal percent
            while percent < done * 100 // total:
                advance()
                percent += 1

        config, params = load_checkpoint(
            checkpoint, dtype=_DTYPES[dtype], shardings=shardings, mtp=mtp, progress=show
        )
    return config, deepseek.absorb(params, config)


def _as_message(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.apply_chat_template([{"role": "user", "content": text}])


def _device() -> jax.Device:
    """Where arrays go, and programs run, by default."""
    (device,) = jnp.zeros(()).devices()
    return device


# --- A generation, timed, printed and checked ------------------------------------------------


@dataclasses.dataclass
class _Record:
    """What a generation did.

    Attributes:
      tokens: the new tokens of each sequence.
      logits: if kept, of each step, float32[batch, vocab]; on the device, so as not to wait.
      prefill_seconds, decode_seconds: wall-clock time.
      steps: decode steps, which follow the one that reads the prompts.
      decoded: tokens that those steps gave.
    """

    tokens: list[list[int]]
    logits: list[jax.Array] = dataclasses.field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    decoded: int = 0


def _run(
    run: Generation,
    params: Params,
    config: DeepSeekConfig,
    tokenizer: Any,
    check: bool,
    stream: bool = False,
) -> int:
    """Runs a generation and prints what came of it; returns the exit code.

    With `stream`, sequences are printed as text, the first one while it grows.
    """
    _compile(run, params, config)

    record = _Record([[] for _ in run.prompts])
    if stream:
        progress = _stream(tokenizer, run.prompts[0].tolist(), record.tokens[0])
    else:
        progress = _progress("generating", run.max_new_tokens)
    with progress as advance:
        _fill(record, run, check, advance)
    for i, (prompt, tokens) in enumerate(zip(run.prompts, record.tokens, strict=True)):
        if not stream:
            _report_sequence(i, prompt, tokens, tokenizer)
        elif i > 0:
            _report(f"sequence {i}", _text(tokenizer, [*prompt.tolist(), *tokens]))

    _report_speed("prefill", sum(map(len, run.prompts)), record.prefill_seconds)
    if record.steps:
        _report_speed("decode", record.decoded, record.decode_seconds, f" in {record.steps} steps")
    _report_cache(run.cache, int(run.cache.num_used))
    return _check(run, params, config, record) if check else 0


def _fill(record: _Record, run: Generation, keep_logits: bool, advance: Callable[[], None]) -> None:
    """Runs a generation, and calls `advance` after each step."""
    start = time.perf_counter()
    for number, step in enumerate(run):
        now = time.perf_counter()
        if number == 0:
            record.prefill_seconds = now - start
        else:
            record.decode_seconds = now - start - record.prefill_seconds
            record.steps = number
            record.decoded += sum(token is not None for token in step.tokens)
        for tokens, token in zip(record.tokens, step.tokens, strict=True):
            if token is not None:
                tokens.append(token)
        if keep_logits:
            record.logits.append(step.logits)
        advance()


@contextlib.contextmanager
def _stream(tokenizer: Any, prompt: list[int], tokens: list[int]) -> Iterator[Callable[[], None]]:
    """Prints the first sequence; gives a function that prints what `tokens` has grown by."""
    shown = 0

    def advance() -> None:
        nonlocal shown
        text = _text(tokenizer, prompt + tokens)
        print(text[shown:], end="", flush=True)
        shown = len(text)

    print(f"{'sequence 0':12}", end="")
    yield advance
    print()


def _text(tokenizer: Any, tokens: list[int]) -> str:
    """On one line, without the end of the line and without half a character at the end."""
    text: str = tokenizer.decode(tokens)
    return text.rstrip("\n\ufffd")


def _check(run: Generation, params: Params, config: DeepSeekConfig, record: _Record) -> int:
    """Compares the logits of every step with those of one forward pass without a cache."""
    rows = [[*p.tolist(), *new] for p, new in zip(run.prompts, record.tokens, strict=True)]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    with _progress("checking"):
        forward = np.asarray(deepseek.forward(params, config, ids))

    steps = np.stack(jax.device_get(record.logits))
    largest, usual = np.float32(0), np.float32(0)
    for i, (prompt, new) in enumerate(zip(run.prompts, record.tokens, strict=True)):
        dense = forward[i, len(prompt) - 1 :][: len(new)]
        differences = np.max(np.abs(steps[: len(new), i] - dense), axis=-1)
        # `np.maximum` keeps NaN, which then fails the comparison.
        largest = np.maximum(largest, np.max(differences))
        usual = np.maximum(usual, np.quantile(differences, 0.75))
    std = np.std(forward)
    allowed, usually_allowed = (tolerance * std for tolerance in _TOLERANCES[run.cache.dtype.name])
    passed = bool(largest <= allowed and usual <= usually_allowed)
    _report(
        "check",
        f"{'passed' if passed else 'FAILED'}: max difference between the logits of decoding and of "
        f"one uncached forward pass {largest:.1e} (allowed {allowed:.1e}), at three quarters of "
        f"the tokens {usual:.1e} (allowed {usually_allowed:.1e})",
    )
    return 0 if passed else 1


def _compile(
    run: Generation | Engine,
    params: Params,
    config: DeepSeekConfig,
    sampling: Sampling | None = None,
) -> None:
    """Prints what will run, and compiles it: of an engine, what such sampling of all needs."""
    device = _device()
    size = sum(x.size for x in jax.tree.leaves(params))
    dtype = run.cache.dtype.name
    _report("model", f"{config.model_type}, {size / 1e6:.1f} M parameters in {dtype}")
    _report("platform", f"{device.platform} ({device.device_kind})")
    _report("kernel", kernel_on(device))
    start = time.perf_counter()
    with _progress("compiling"):
        if isinstance(run, Engine):
            run.compile(draws=None if sampling is None else sampling.temperature > 0)
        else:
            run.compile()
    seconds = time.perf_counter() - start
    _report("compiled", f"in {seconds:.1f} s, which the speeds below leave out")


def _report(name: str, value: str) -> None:
    print(f"{name:12}{value}", flush=True)


def _type(text: str) -> None:
    """Prints text where the last one ended, with control characters written out."""
    text = _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
    print(text, end="", flush=True)


def _report_sequence(
    number: int, prompt: Sequence[int] | np.ndarray, tokens: list[int], tokenizer: Any
) -> None:
    text = repr(tokenizer.decode(tokens)) if tokenizer else ",".join(map(str, tokens))
    _report(f"sequence {number}", f"{len(prompt)} prompt tokens, {len(tokens)} new: {text}")


def _report_drafts(engine: Engine) -> None:
    if engine.drafter is not None:
        way = {"mtp": "multi-token prediction", "ngram": "n-grams"}[engine.drafter]
        stats = engine.stats
        _report("drafts", f"{stats.accepted} of {stats.drafted} tokens were right, from {way}")


def _report_cache(cache: PagedKVCache, used: int) -> None:
    _report(
        "cache",
        f"{used} of {cache.num_pages} pages of {cache.page_size} tokens in use "
        f"({used / cache.num_pages:.0%}), {cache.nbytes / 2**20:.1f} MiB in {cache.num_layers} "
        "layers",
    )


def _report_speed(name: str, tokens: int, seconds: float, steps: str = "") -> None:
    _report(name, f"{tokens} tokens{steps}, {seconds:.3f} s: {tokens / seconds:.0f} tokens/s")


@contextlib.contextmanager
def _progress(description: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Shows that something is under way, on stderr; gives a function that counts one step done."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
    except ImportError:
        has_rich = False
    else:
        has_rich = True
    if not (has_rich and sys.stderr.isatty()):
        print(f"{description} ...", file=sys.stderr, flush=True)
        yield lambda: None
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    if total is not None:
        columns += [BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


if __name__ == "__main__":
    sys.exit(main())
