"""How an `Engine` does under a synthetic load: requests that arrive at random times."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashmla_jax.engine import Engine, Request
from flashmla_jax.generate import GREEDY, Sampling

_PERCENTILES = (50, 90, 99)
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests, and when they come. Tokens are random.

    Attributes:
      requests: how many.
      rate: requests per second on average, as a Poisson process; infinity for all at once.
      prompt_lengths: the shortest and the longest prompt; all lengths between are as likely.
      new_tokens: the fewest and the most new tokens, likewise.
      shared_prefix: with how many tokens all prompts begin, besides those of their length.
      sampling: of all requests; each has a seed of its own, from this one on.
      seed: of lengths, tokens and times.

    Raises:
      ValueError: for a number below 1 (0 for `shared_prefix`), a range that ends before it begins,
        or a rate that is not positive.
    """

    requests: int = 64
    rate: float = float("inf")
    prompt_lengths: tuple[int, int] = (32, 256)
    new_tokens: tuple[int, int] = (16, 128)
    shared_prefix: int = 0
    sampling: Sampling = GREEDY
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ValueError(f"requests must be at least 1, got {self.requests}")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}")
        if self.shared_prefix < 0:
            raise ValueError(f"shared_prefix must not be negative, got {self.shared_prefix}")
        for name in ("prompt_lengths", "new_tokens"):
            first, last = getattr(self, name)
            if not 1 <= first <= last:
                raise ValueError(f"{name} must be a range from 1 up, got {first} to {last}")

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence that there can be."""
        return self.shared_prefix + self.prompt_lengths[1] + self.new_tokens[1]


@dataclasses.dataclass(frozen=True)
class Sample:
    """The state of an engine after a step.

    Attributes:
      time: in seconds since the start.
      pages_held: pages that running requests hold.
      pages_cached: pages that only keep prefixes.
      running: requests in slots.
      waiting: requests in the queue.
    """

    time: float
    pages_held: int
    pages_cached: int
    running: int
    waiting: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of a load.

    Attributes:
      seconds: from the first arrival to the last token.
      requests: in order of arrival.
      arrivals: when each arrived, in the time of its `token_times`.
      samples: after each step.
      num_pages: of the cache.
    """

    seconds: float
    requests: list[Request]
    arrivals: list[float]
    samples: list[Sample]
    num_pages: int

    @property
    def new_tokens(self) -> int:
        """Tokens that were generated."""
        return sum(len(request.tokens) for request in self.requests)

    @property
    def first_token_latencies(self) -> np.ndarray:
        """float64[requests]: seconds from arrival to the first token."""
        first = [request.token_times[0] for request in self.requests]
        return np.array(first) - np.array(self.arrivals)

    @property
    def inter_token_latencies(self) -> np.ndarray:
        """float64[any]: seconds between a request's tokens, those of one step counted as one."""
        return np.concatenate(
            [np.diff(np.unique(request.token_times)) for request in self.requests]
        )

    @property
    def times_per_output_token(self) -> np.ndarray:
        """float64[any]: of each request with several tokens, mean seconds for one after the first.

        With drafts this is less than the time between tokens, which come several at a time.
        """
        return np.array(
            [
                (times[-1] - times[0]) / (len(times) - 1)
                for times in (request.token_times for request in self.requests)
                if len(times) > 1
            ]
        )

    @property
    def usage(self) -> np.ndarray:
        """float64[steps]: the share of the pool that is used, cached prefixes included."""
        used = [sample.pages_held + sample.pages_cached for sample in self.samples]
        return np.array(used) / self.num_pages

    def lines(self) -> list[tuple[str, str]]:
        """Names and values, to print."""
        prompt_tokens = sum(len(request.prompt) for request in self.requests)
        prefixes = sum(request.prefix_tokens or 0 for request in self.requests)
        preemptions = sum(request.preemptions for request in self.requests)
        rate = len(self.requests) / self.seconds
        speed = self.new_tokens / self.seconds
        share = prefixes / prompt_tokens
        lines = [
            ("requests", f"{len(self.requests)} in {self.seconds:.2f} s: {rate:.2f} requests/s"),
            ("prompts", f"{prompt_tokens} tokens, {share:.0%} of them in the cache"),
            ("throughput", f"{self.new_tokens} new tokens: {speed:.1f} tokens/s"),
            ("preemptions", f"{preemptions}"),
            ("TTFT", _percentiles(self.first_token_latencies)),
        ]
        if len(self.inter_token_latencies):
            lines.append(("TPOT", _percentiles(self.times_per_output_token)))
            lines.append(("ITL", _percentiles(self.inter_token_latencies)))
        peak, mean = self.usage.max(), self._over_time(1)[0]
        lines.append(("cache use", f"mean {mean:.0%}, peak {peak:.0%} of {self.num_pages} pages"))
        # From nothing to all pages in eight steps.
        levels = np.rint(self._over_time(60) * (len(_BLOCKS) - 1)).astype(int)
        lines.append(("over time", "".join(_BLOCKS[level] for level in levels)))
        return lines

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws cache use and the number of requests over time.

        Args:
          path: of the picture; its suffix decides the format.

        Raises:
          NotImplementedError, ValueError: as `check_plot` does.
        """
        check_plot("path", path)
        from matplotlib.figure import Figure

        times = [sample.time for sample in self.samples]
        held = np.array([sample.pages_held for sample in self.samples])
        cached = np.array([sample.pages_cached for sample in self.samples])
        figure = Figure(figsize=(8, 5), layout="constrained")
        pages, requests = figure.subplots(2, sharex=True)
        labels = ["held by requests", "cached prefixes"]
        pages.stackplot(times, held, cached, labels=labels, step="pre")
        pages.axhline(self.num_pages, color="black", linewidth=1, linestyle=":")
        pages.set_ylabel("pages")
        pages.legend(loc="upper left")
        for name in ("running", "waiting"):
            counts = [getattr(sample, name) for sample in self.samples]
            requests.plot(times, counts, label=name, drawstyle="steps-pre")
        requests.set_ylabel("requests")
        requests.set_xlabel("seconds")
        requests.legend(loc="upper left")
        figure.savefig(path)

    def _over_time(self, parts: int) -> np.ndarray:
        """float64[parts]: mean usage in equal parts of the time; a step counts until its end."""
        ends = np.array([sample.time for sample in self.samples])
        area = np.concatenate([[0.0], np.cumsum(np.diff(ends, prepend=0.0) * self.usage)])
        borders = np.linspace(0.0, ends[-1], parts + 1)
        integral = np.interp(borders, np.concatenate([[0.0], ends]), area)
        return np.diff(integral) / (borders[1] - borders[0])


def serve(
    engine: Engine, load: Load, vocab_size: int, on_finish: Callable[[], None] = lambda: None
) -> Report:
    """Submits a load's requests when they arrive, and steps until all are finished.

    Stop tokens are not heeded, so that there are as many new tokens as the load says.

    Args:
      engine: idle.
      load: what to submit.
      vocab_size: of the model.
      on_finish: called when a request is finished.

    Returns:
      What came of it.

    Raises:
      ValueError: for a request that does not fit the engine, see `Engine.submit`.
    """
    rng = np.random.default_rng(load.seed)
    prefix = rng.integers(0, vocab_size, load.shared_prefix)
    prompts, new_tokens = [], []
    for _ in range(load.requests):
        own = rng.integers(0, vocab_size, rng.integers(*load.prompt_lengths, endpoint=True))
        prompts.append(np.concatenate([prefix, own]).tolist())
        new_tokens.append(int(rng.integers(*load.new_tokens, endpoint=True)))
    gaps = rng.exponential(1 / load.rate, load.requests)
    gaps[0] = 0
    start = time.perf_counter()
    arrivals = (start + np.cumsum(gaps)).tolist()

    requests: list[Request] = []
    samples: list[Sample] = []
    finished = 0
    while True:
        while len(requests) < load.requests and arrivals[len(requests)] <= time.perf_counter():
            i = len(requests)
            sampling = dataclasses.replace(load.sampling, seed=load.sampling.seed + i)
            requests.append(
                engine.submit(prompts[i], new_tokens[i], sampling=sampling, stop_tokens=())
            )
        more = engine.step()
        cached = engine.pages_cached
        samples.append(
            Sample(
                time.perf_counter() - start,
                engine.pages_used - cached,
                cached,
                len(engine.running),
                len(engine.waiting),
            )
        )
        finished, before = sum(request.finish_reason is not None for request in requests), finished
        for _ in range(finished - before):
            on_finish()
        if not more:
            if len(requests) == load.requests:
                break
            time.sleep(max(arrivals[len(requests)] - time.perf_counter(), 0))
    seconds = max(request.token_times[-1] for request in requests) - start
    return Report(seconds, requests, arrivals, samples, engine.cache.num_pages)


def check_plot(name: str, path: str | os.PathLike[str]) -> None:
    """Sees to it that `Report.plot` will be able to draw.

    Args:
      name: what the path is called in errors.
      path: of the picture.

    Raises:
      NotImplementedError: without matplotlib.
      ValueError: for a suffix that is no format of matplotlib's, or a folder that is not there.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise NotImplementedError(
            f"{name} needs matplotlib (pip install 'flashmla-jax[bench]')"
        ) from None
    formats = FigureCanvasBase.get_supported_filetypes()
    path = Path(path)
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{name} must end with one of .{', .'.join(sorted(formats))}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{name} must be in a folder that exists, got {path}")


def _percentiles(seconds: np.ndarray) -> str:
    values = np.percentile(seconds, _PERCENTILES) * 1e3
    parts = (f"p{p} {value:.1f}" for p, value in zip(_PERCENTILES, values, strict=True))
    return f"{', '.join(parts)} ms"
