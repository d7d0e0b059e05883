"""Continuous batching: requests come and go while others are being decoded.

An `Engine` has a fixed number of slots, each a sequence of one `PagedKVCache`. A request waits,
gets a slot when there are pages for its prompt, is read in chunks, and then decodes a token per
step together with the others until it is finished. In between

- pages of prompts (and of what was generated) stay in the cache as long as there is room, and a new
  request whose beginning is known starts from them (`cache.prefix`);
- when pages run out, those that nobody uses go first, and then the youngest request: it gives back
  its slot, waits at the head of the queue, and is read again with what it had generated;
- with `draft > 0`, the next tokens are guessed, and a step reads them all to see which ones were
  right. Guesses come from the model's multi-token prediction module, which for each token more goes
  on from its own output; without one, from what followed the same words before (prompt lookup
  decoding).

None of this changes what is generated, beyond rounding: every token is chosen from the model's
logits after all tokens before it, greedily or with a random number made from the request's seed and
the token's index. That holds for drafts and sampling too: a draft counts if it is the token that is
drawn, which for a guess without a distribution of its own accepts as often as the rule of
speculative sampling (arXiv:2302.01318).

The device runs one program for chunks of prompts, one for decoding and, with drafts, one for
verifying them, and others of these while somebody's tokens are drawn; besides them one that moves
pages between owners, and one that copies the block table when a sequence may have filled a page.
Lengths, tables, slots and sampling parameters are data. The scheduler is plain Python. It knows
what the device's allocator will do, so it need not wait for it: without drafts a step is started
before the tokens of the one before are read.

The multi-token prediction module has a layer of the same cache. Of a token it needs the hidden
state and the token after it, which are both there when the token has been read: the next one is in
the prompt, or has just been chosen. So every program fills that layer together with the others. The
last tokens of two equal pages differ there if other tokens follow, and then the pages count as
different ones.

Sources: vLLM (arXiv:2309.06180) for paging, preemption and hashed prefixes; Sarathi
(arXiv:2308.16369) for chunks of prompts between decoding steps; DeepSeek-V3 (arXiv:2412.19437) for
drafts from multi-token prediction.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.cache.prefix import PrefixIndex
from flashmla_jax.generate import GREEDY, Sampling, beside, checked_ids, sample, stops_of
from flashmla_jax.layers.mla import Params
from flashmla_jax.models import deepseek
from flashmla_jax.models.deepseek import DeepSeekConfig
from flashmla_jax.models.flat import FlatModel

CHUNK = 512  # tokens of a prompt that a step reads at most, unless told

# The longest and the shortest run of tokens that a draft is looked up by.
_LONGEST_NGRAM, _SHORTEST_NGRAM = 3, 1


class Request:
    """What was asked of an `Engine`, and what has come of it.

    Attributes:
      number: requests are counted in the order in which they are submitted.
      prompt: int32[length].
      max_new_tokens: how many tokens it gets at most.
      sampling: how they are chosen.
      stop_tokens: which end it.
      tokens: the new tokens so far, with the stop token if one came.
      finish_reason: "stop", "length" or "cancelled", None while there is more to come.
      submit_time: when it was submitted, in seconds of `time.perf_counter`.
      token_times: when each token reached the host.
      prefix_tokens: how many tokens of the prompt were in the cache when it first got a slot.
      preemptions: how often it had to give back its slot.
    """

    def __init__(
        self,
        number: int,
        prompt: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: frozenset[int],
        on_token: Callable[[int], None] | None,
    ) -> None:
        """See `Engine.submit`."""
        self.number = number
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.stop_tokens = stop_tokens
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.submit_time = time.perf_counter()
        self.token_times: list[float] = []
        self.prefix_tokens: int | None = None
        self.preemptions = 0
        self._on_token = on_token
        self._ids = np.concatenate([prompt, np.zeros(max_new_tokens, np.int32)])

    @property
    def ids(self) -> np.ndarray:
        """int32: the prompt and the new tokens so far."""
        return self._ids[: len(self.prompt) + len(self.tokens)]

    @property
    def most_cached(self) -> int:
        """How many tokens it can have in the cache: its last one is never read."""
        return len(self._ids) - 1

    def _receive(self, token: int, now: float) -> None:
        self._ids[len(self.prompt) + len(self.tokens)] = token
        self.tokens.append(token)
        self.token_times.append(now)
        if token in self.stop_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_new_tokens:
            self.finish_reason = "length"


@dataclasses.dataclass
class EngineStats:
    """What an engine has done so far.

    Attributes:
      steps: of `Engine.step` that gave the device something to do.
      read_tokens: tokens of prompts that were read.
      prefix_tokens: tokens of prompts that were in the cache, and were not read.
      preemptions: how often a request had to give back its slot.
      drafted: tokens that were guessed.
      accepted: guesses that were right, and became tokens of a request.
    """

    steps: int = 0
    read_tokens: int = 0
    prefix_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclasses.dataclass(eq=False)
class _Run:
    """A request in a slot.

    Attributes:
      request: which.
      slot: which.
      target: tokens to read before it decodes: those it had when it got the slot.
      length: tokens it has in the cache once all that was started is done.
      asked: new tokens it has then.
      claimed: pages that are set aside for it, including the shared ones.
      shared: those of its pages that the prefix index knows.
      known: how many of its first pages have known contents.
      is_over: whether it has left the slot.
    """

    request: Request
    slot: int
    target: int
    length: int
    asked: int
    claimed: int
    shared: list[int]
    known: int
    is_over: bool = False

    @property
    def is_reading(self) -> bool:
        return self.length < self.target


@dataclasses.dataclass
class _Result:
    """What a program gives, on the device, and whose it is.

    Attributes:
      outcome: int32[slots, 2 + n]: whether the cache did what the scheduler thinks it did, how many
        new tokens each slot has, and which.
      runs: who took part, and how many tokens each has in the cache then (None: as many as before
        and those that it was given).
      block_table: the cache's, then, if prefixes are kept and a run may have filled a page; or
        None.
    """

    outcome: jax.Array
    runs: Sequence[tuple[_Run, int | None]] = ()
    block_table: jax.Array | None = None

    def __post_init__(self) -> None:
        """Has them sent to the host as soon as they are there."""
        self.outcome.copy_to_host_async()
        if self.block_table is not None:
            self.block_table.copy_to_host_async()


class _Sent:
    """An array on the device, which is sent again only if it changes: that takes the host time."""

    def __init__(self, beside: jax.Array) -> None:
        """To be put where an array is."""
        self._beside = beside
        self._sent: tuple[np.ndarray, jax.Array] | None = None

    def __call__(self, array: np.ndarray) -> jax.Array:
        """The array on the device."""
        if self._sent is None or not np.array_equal(array, self._sent[0]):
            self._sent = array, beside(self._beside, jnp.asarray(array))
        return self._sent[1]


class Engine:
    """Runs requests on a model: see the module's docstring.

        engine = Engine(params, config, num_pages=1000, max_seqlen=4096)
        request = engine.submit([1, 2, 3], 100)
        engine.run()
        print(request.tokens)

    Attributes:
      cache: the cache after the newest program that was started.
      stats: counts.
      drafter: what guesses tokens, "mtp" or "ngram"; None without drafts.
    """

    cache: PagedKVCache
    stats: EngineStats
    drafter: Literal["mtp", "ngram"] | None

    def __init__(
        self,
        params: Params,
        config: DeepSeekConfig,
        *,
        num_pages: int,
        max_seqlen: int,
        slots: int = 8,
        chunk: int = CHUNK,
        prompts_at_once: int = 1,
        draft: int = 0,
        drafter: Literal["mtp", "ngram"] | None = None,
        prefix_cache: bool = True,
        cache_dtype: Any = None,
    ) -> None:
        """Makes an empty cache.

        Args:
          params: the model's, as `models.load_checkpoint` gives them or `deepseek.absorb`. Absorbed
            ones are used as they are. Of others the engine makes absorbed ones for itself, with a
            copy of all weights but the embedding and routed experts; the caller's can be dropped
            then. To have their memory for the cache, `params = deepseek.absorb(params, config)`
            before; and divide them over devices before that.
          config: the model's configuration.
          num_pages: pages of 64 tokens in the cache's pool.
          max_seqlen: tokens of the longest sequence, prompt and new ones.
          slots: how many requests are run at the same time at most.
          chunk: how many tokens of a prompt a step reads at most. With more, long prompts are read
            sooner; with fewer, those who decode meanwhile wait less for their next token. (On a GPU
            the host waits for the end of a program that expands what is cached, see
            `mla.prefill_into_cache`: with more than 512, or than 256 over an FP8 cache.)
          prompts_at_once: how many prompts a step reads from.
          draft: how many tokens to guess and verify in a step; 0 for none.
          drafter: what guesses them: the model's multi-token prediction module, whose parameters
            are `mtp`, or what the text so far repeats. None for the module if it is there.
          prefix_cache: whether to keep pages for prompts that begin alike.
          cache_dtype: `PagedKVCache.create`'s; by default that of the model's embedding.

        Raises:
          ValueError: for a number that is too small, a max_seqlen beyond the positions that the
            model has, or a drafter that there is not.
        """
        least = {
            "slots": (slots, 1),
            "num_pages": (num_pages, 1),
            "max_seqlen": (max_seqlen, 2),
            "chunk": (chunk, 1),
            "prompts_at_once": (prompts_at_once, 1),
            "draft": (draft, 0),
        }
        for name, (value, at_least) in least.items():
            if value < at_least:
                raise ValueError(f"{name} must be at least {at_least}, got {value}")
        if max_seqlen > config.max_position_embeddings:
            raise ValueError(
                f"max_seqlen must be at most the model's {config.max_position_embeddings} "
                f"positions, got {max_seqlen}"
            )
        if drafter not in (None, "mtp", "ngram"):
            raise ValueError(f'drafter must be "mtp", "ngram" or None, got {drafter!r}')
        if drafter == "mtp" and "mtp" not in params:
            raise ValueError('drafter="mtp" needs parameters with "mtp", these have none')
        if drafter is None:
            drafter = "mtp" if "mtp" in params else "ngram"
        self.drafter = drafter if draft else None
        uses_mtp = self.drafter == "mtp"
        self._model = FlatModel.of(deepseek.absorb(params, config), config)
        self._max_seqlen, self._draft = max_seqlen, draft
        self._chunk = min(chunk, max_seqlen)
        self._prompts_at_once = min(prompts_at_once, slots)
        embedding = params["embed_tokens"]["embedding"]
        self.cache, self._newest = beside(
            embedding,
            (
                PagedKVCache.create(
                    num_layers=config.num_hidden_layers + uses_mtp,
                    num_pages=num_pages,
                    batch=slots,
                    # Drafts have a place there too before they are found wrong.
                    max_pages_per_seq=_pages_for(max_seqlen - 1 + draft),
                    dtype=embedding.dtype if cache_dtype is None else cache_dtype,
                    index_head_dim=config.index_head_dim,
                ),
                _Newest(
                    tokens=jnp.zeros(slots, jnp.int32),
                    ahead=jnp.zeros((slots, config.hidden_size), embedding.dtype)
                    if uses_mtp
                    else None,
                ),
            ),
        )
        self._is_active = _Sent(embedding)
        self._drafts = {count: _Sent(embedding) for count in (0, draft)}
        self.stats = EngineStats()
        self._num_requests = 0
        self._waiting: collections.deque[Request] = collections.deque()
        self._slots: list[_Run | None] = [None] * slots
        self._results: list[_Result] = []
        self._index = PrefixIndex(lookahead=int(uses_mtp))
        self._keeps_prefixes = prefix_cache
        self._owed = _Books()
        # Who waits for pages, and what pages there were when it was last seen that they do not do.
        self._refused: Request | None = None
        self._refused_with = (0, 0)
        self._calls: collections.deque[tuple[Request, int]] = collections.deque()

    @property
    def waiting(self) -> tuple[Request, ...]:
        """The requests that wait for a slot, in the order in which they will get one."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Request, ...]:
        """The requests that have a slot, oldest first."""
        return tuple(run.request for run in self._running)

    @property
    def pages_used(self) -> int:
        """How many pages are set aside for running requests or keep known prefixes."""
        return self.cache.num_pages - self._num_free

    @property
    def pages_cached(self) -> int:
        """How many of those only keep prefixes, and are given up when there is need."""
        return self._index.num_evictable

    def compile(self, *, draws: bool | None = None) -> Engine:
        """Compiles and runs the programs with no request taking part; returns self.

        Without it the first steps compile, if the process has not run the like before.

        Args:
          draws: whether there are going to be requests whose tokens are drawn, `temperature` being
            above 0, for whom there are programs of their own: True, False, or None for both.
        """
        results = self._results
        self._results = []
        self._move_pages(_Books())
        kinds = {False, True} if draws is None else {draws}
        for kind in kinds | {False}:  # a chunk that does not end a prompt draws nothing
            self._read([], kind)
        for kind in kinds:
            for draft in {0, self._draft}:
                self._decode([], np.full((len(self._slots), draft), -1, np.int32), kind)
        if self._keeps_prefixes:
            _copy(self.cache.block_table)
        jax.block_until_ready(self.cache)
        self._results = results
        return self

    def submit(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Request:
        """Puts a request at the end of the queue.

        Args:
          prompt_ids: at least one token id.
          max_new_tokens: at least 1.
          sampling: how tokens are chosen, by default greedily. The t-th new token is drawn with a
            key made from `sampling.seed` (its lower 32 bits) and t alone.
          stop_tokens: ids that end the sequence; None for the configuration's `eos_token_id`, `()`
            for none.
          on_token: called with each new token, in order, at the end of the step that has brought
            it to the host. What it raises comes out of `step`; the next one goes on, with the calls
            that are left.

        Returns:
          The request, which gets its results as they come.

        Raises:
          ValueError: for an empty prompt, a token outside the vocabulary, or a request that could
            never run: longer than `max_seqlen`, or in need of more pages than there are.
        """
        prompt = checked_ids("prompt_ids", prompt_ids, self._model.config)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        length = len(prompt) + max_new_tokens
        if length > self._max_seqlen:
            raise ValueError(
                f"prompt_ids has {len(prompt)} tokens, which with {max_new_tokens=} are {length}, "
                f"more than max_seqlen={self._max_seqlen}"
            )
        if _pages_for(length - 1) > self.cache.num_pages:
            raise ValueError(
                f"prompt_ids has {len(prompt)} tokens, which with {max_new_tokens=} need "
                f"{_pages_for(length - 1)} pages, and there are num_pages={self.cache.num_pages}"
            )
        stops = stops_of(self._model.config, stop_tokens)
        request = Request(self._num_requests, prompt, max_new_tokens, sampling, stops, on_token)
        self._num_requests += 1
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request, wherever it is, and gives back its slot and its pages.

        It keeps the tokens that it has, `on_token` is not called any more, and its `finish_reason`
        becomes "cancelled". One that has ended before stays as it is.

        Raises:
          ValueError: the request is another engine's.
        """
        if request.finish_reason is not None:
            return
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            runs = [run for run in self._running if run.request is request]
            if not runs:
                raise ValueError(f"request {request.number} is not of this engine")
            self._leave(runs[0])
        request.finish_reason = "cancelled"
        self._calls = collections.deque(call for call in self._calls if call[0] is not request)

    def run(self) -> None:
        """Steps until no request is left."""
        while self.step():
            pass

    def step(self) -> bool:
        """Reads a chunk of prompts, decodes a step of the others, and hands on what came before.

        Returns:
          Whether there is anything left to do.
        """
        self._make_room()
        self._admit()
        before, self._results = self._results, []
        reading = [run for run in self._running if run.is_reading]
        if reading:
            self._read(reading, _draws([run for run in reading if self._is_last_chunk(run)]))
        decoding = [run for run in self._running if self._decodes(run)]
        if decoding:
            self._decode(decoding, self._guess(decoding), _draws(decoding))
        self.stats.steps += bool(reading or decoding)
        self._collect(before)
        if self._draft:  # as many tokens as were right
            self._collect_all()
        more = bool(self._waiting or self._running or self._results)
        if not more:
            self._keep_books()
            self._collect_all()
        self._hand_on()
        return more or bool(self._waiting)  # a call may have submitted one

    # --- Who gets a slot, and pages ----------------------------------------------------------

    @property
    def _running(self) -> list[_Run]:
        """Oldest first."""
        runs = [run for run in self._slots if run is not None]
        return sorted(runs, key=lambda run: run.request.number)

    @property
    def _num_free(self) -> int:
        """Pages that nobody has a claim to."""
        own = sum(run.claimed - len(run.shared) for run in self._slots if run is not None)
        return self.cache.num_pages - len(self._index) - own

    def _is_last_chunk(self, run: _Run) -> bool:
        return run.target - run.length <= self._chunk

    def _decodes(self, run: _Run) -> bool:
        return not run.is_reading and run.asked < run.request.max_new_tokens

    def _make_room(self) -> None:
        """Sees to it that all who decode have a place for their next token.

        The oldest request goes on in the end: no other takes its pages, and it fits alone. If one
        of its pages holds what the index knows another for, it may have to start again with that.
        """
        for run in self._running:
            while not run.is_over and self._decodes(run) and not self._claim(run, run.length + 1):
                if self._results:  # someone may be finished
                    self._collect_all()
                else:
                    self._preempt(self._running[-1])

    def _admit(self) -> None:
        """Gives slots to those who wait, in order; as many as are read at once."""
        while self._waiting and None in self._slots:
            if sum(run.is_reading for run in self._running) >= self._prompts_at_once:
                return
            request = self._waiting[0]
            if request is self._refused and not self._may_start(request):
                return  # as before; and what is on its way is seen in the next step
            self._collect_all()  # what was just read may be what it begins with
            run = self._start(request)
            if run is None:
                self._refused, self._refused_with = request, self._state_of_pages
                return
            self._waiting.popleft()
            self._slots[run.slot] = run
            if run.shared:
                self._owed.adopted[run.slot] = list(run.shared)
            self.stats.prefix_tokens += run.length
            if request.prefix_tokens is None:
                request.prefix_tokens = run.length

    @property
    def _state_of_pages(self) -> tuple[int, int]:
        """What decides whether a request gets a slot: pages to be had, and those that are known."""
        return self._num_free + self._index.num_evictable, len(self._index)

    def _may_start(self, request: Request) -> bool:
        """Whether one that was refused may be worth another try."""
        if self._state_of_pages == self._refused_with:
            return False
        known = len(self._index.match(request.ids)[0]) if self._keeps_prefixes else 0
        self._refused_with = self._state_of_pages
        return _pages_to_start(request) - known <= self._num_free + self._index.num_evictable

    def _start(self, request: Request) -> _Run | None:
        """A run in a free slot, with pages to read all its tokens; None if there are too few."""
        pages = self._index.match(request.ids)[0] if self._keeps_prefixes else []
        self._index.acquire(pages)
        run = _Run(
            request,
            self._slots.index(None),
            target=len(request.ids),
            length=len(pages) * PAGE_SIZE,
            asked=len(request.tokens),
            claimed=len(pages),
            shared=pages,
            known=len(pages),
        )
        if self._claim(run, _pages_to_start(request) * PAGE_SIZE):
            return run
        self._index.release(pages)
        return None

    def _claim(self, run: _Run, length: int) -> bool:
        """Sets pages aside, so that a run has them for `length` tokens; else changes nothing."""
        growth = max(_pages_for(length) - run.claimed, 0)
        if not self._have_free(growth):
            return False
        run.claimed += growth
        return True

    def _have_free(self, count: int) -> bool:
        """Gives up known prefixes until so many pages are free, or none if that cannot be."""
        missing = count - self._num_free if count > 0 else 0
        if missing > self._index.num_evictable:
            return False
        if missing > 0:
            self._owed.released += self._index.evict(missing)
        return True

    def _preempt(self, run: _Run) -> None:
        self._leave(run)
        self._waiting.appendleft(run.request)
        run.request.preemptions += 1
        self.stats.preemptions += 1

    def _leave(self, run: _Run) -> None:
        """Takes a run out of its slot."""
        self._index.release(run.shared)
        self._owed.freed.append(run.slot)
        self._slots[run.slot] = None
        run.is_over = True

    def _keep_books(self) -> None:
        """Has the cache do what was decided since the last time.

        Pages to retain can wait for as long as the sequences that hold them stay.
        """
        if self._owed.freed or self._owed.released or self._owed.adopted:
            self._move_pages(self._owed)
            self._owed = _Books()

    def _move_pages(self, books: _Books) -> None:
        outcome, self.cache = _move_pages(self.cache, *books.arrays(self.cache))
        self._results.append(_Result(outcome))

    # --- What the device does ----------------------------------------------------------------

    def _read(self, runs: list[_Run], draws: bool) -> None:
        """Starts the program that reads the next chunk of each run's prompt.

        There is one for chunks after which some run draws a token, and one for others: a program
        that finds out by itself has the host wait for it.
        """
        self._keep_books()
        rows = self._prompts_at_once
        ids = np.zeros((rows, self._chunk + 1), np.int32)
        slots = np.full(rows, len(self._slots), np.int32)
        num_tokens, is_last = np.zeros(rows, np.int32), np.zeros(rows, np.bool_)
        rules = _rules_of(rows, dict(enumerate(runs))) if draws else None
        spans = []
        for row, run in enumerate(runs):
            count = min(self._chunk, run.target - run.length)
            # With the token after them, unless that is still to be chosen.
            tokens = run.request.ids[run.length : run.length + count + 1]
            ids[row, : len(tokens)] = tokens
            spans.append((run.length, run.length + count))
            run.length += count
            slots[row], num_tokens[row], is_last[row] = run.slot, count, not run.is_reading
            run.asked += not run.is_reading
            self.stats.read_tokens += count
        outcome, self._newest, self.cache = _read(
            self._model,
            ids,
            slots,
            num_tokens,
            is_last,
            rules,
            self._newest,
            self.cache,
        )
        lengths = [(run, run.length) for run in runs]
        self._results.append(_Result(outcome, lengths, self._table_after(spans)))

    def _decode(self, runs: list[_Run], drafts: np.ndarray, draws: bool) -> None:
        """Starts the program that gives each run its next token, or more with drafts.

        For `draws` see `_read`.
        """
        self._keep_books()
        slots = len(self._slots)
        is_active = np.zeros(slots, np.bool_)
        is_active[[run.slot for run in runs]] = True
        rules = _rules_of(slots, {run.slot: run for run in runs}) if draws else None
        outcome, self._newest, self.cache = _decode(
            self._model,
            self._newest,
            self._drafts[drafts.shape[1]](drafts),
            self._is_active(is_active),
            rules,
            self.cache,
        )
        table = self._table_after((r.length, r.length + 1 + drafts.shape[1]) for r in runs)
        lengths: Sequence[tuple[_Run, int | None]] = [(run, None) for run in runs]
        if drafts.shape[1] == 0:
            for run in runs:
                run.length += 1
                run.asked += 1
            lengths = [(run, run.length) for run in runs]
        self._results.append(_Result(outcome, lengths, table))

    def _table_after(self, spans: Iterable[tuple[int, int]]) -> jax.Array | None:
        """A copy of the block table, if a sequence may have filled a page; it is for prefixes.

        Each has grown from so many tokens to so many. The table itself is given to the next
        program. Were it one more result of every program, it would lie elsewhere after each step,
        and XLA would have to update the CUDA graph of the kernels that read it.
        """
        if self._keeps_prefixes and any(a // PAGE_SIZE < b // PAGE_SIZE for a, b in spans):
            return _copy(self.cache.block_table)
        return None

    def _guess(self, runs: list[_Run]) -> np.ndarray:
        """int32[slots, draft] guesses, or int32[slots, 0] if there are none or no pages for them.

        -1 where there is no guess, or the model is to make one.
        """
        none = np.zeros((len(self._slots), 0), np.int32)
        if not self._draft:
            return none
        drafts = np.full((len(self._slots), self._draft), -1, np.int32)
        num_drafted = len(runs) * self._draft
        if self.drafter == "ngram":
            for run in runs:
                if run.asked == len(run.request.tokens):  # so that its last token is known here
                    guess = guess_next(run.request.ids, self._draft)
                    drafts[run.slot, : len(guess)] = guess
            num_drafted = int(np.count_nonzero(drafts >= 0))
        growth = [max(_pages_for(r.length + 1 + self._draft) - r.claimed, 0) for r in runs]
        if not num_drafted or not self._have_free(sum(growth)):
            return none
        self.stats.drafted += num_drafted
        return drafts

    # --- What comes back ---------------------------------------------------------------------

    def _collect_all(self) -> None:
        results, self._results = self._results, []
        self._collect(results)

    def _collect(self, results: list[_Result]) -> None:
        """Waits for results, gives out their tokens and takes out who is finished."""
        for result in results:
            outcome = np.asarray(result.outcome)
            if not outcome[:, 0].all():
                raise RuntimeError("the cache's pages are not what the scheduler takes them for")
            now = time.perf_counter()
            for run, length in result.runs:
                if run.is_over:  # in the step before
                    continue
                _, num_new, *new = outcome[run.slot].tolist()
                tokens = new[:num_new]
                if length is None:
                    run.length += len(tokens)
                    run.asked += len(tokens)
                    run.claimed = max(run.claimed, _pages_for(run.length))
                request = run.request
                received = 0
                for token in tokens:
                    if request.finish_reason is None:
                        request._receive(token, now)
                        self._calls.append((request, token))
                        received += 1
                if length is None:
                    self.stats.accepted += min(received, max(len(tokens) - 1, 0))
                if self._keeps_prefixes:
                    # The last token is not in the cache, nor are tokens that only others know of.
                    cached = min(run.length if length is None else length, len(request.ids) - 1)
                    self._remember(run, result.block_table, cached)
                if request.finish_reason is not None:
                    self._leave(run)

    def _hand_on(self) -> None:
        """Tells who wants to know of the new tokens: last, so that a call may raise."""
        while self._calls:
            request, token = self._calls.popleft()
            if request._on_token is not None:
                request._on_token(token)

    def _remember(self, run: _Run, block_table: jax.Array | None, length: int) -> None:
        """Makes the full pages among a run's first `length` tokens known, if they are not."""
        count = length // PAGE_SIZE
        if count <= run.known:
            return
        assert block_table is not None
        run.known = count
        pages = np.asarray(block_table)[run.slot, :count].tolist()
        new = self._index.insert(run.request.ids, pages)
        self._index.acquire(new)
        run.shared += new
        self._owed.retained += new


def guess_next(ids: np.ndarray, count: int) -> np.ndarray:
    """Guesses what follows a sequence from what followed its last tokens before.

    The last three tokens are looked up, or two, or one, and the latest place counts.

    Args:
      ids: int32[length].
      count: how many tokens to guess at most.

    Returns:
      int32[n], n from 0 to `count`.

    Source: prompt lookup decoding, as in `PromptLookupCandidateGenerator` of Hugging Face
    transformers.
    """
    for n in range(_LONGEST_NGRAM, _SHORTEST_NGRAM - 1, -1):
        if len(ids) <= n:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], n)
        places = np.flatnonzero((windows == ids[-n:]).all(axis=1))
        if len(places):
            start = int(places[-1]) + n
            return ids[start : start + count]
    return ids[:0]


def _pages_for(length: int) -> int:
    return -(-length // PAGE_SIZE)


def _pages_to_start(request: Request) -> int:
    """With a place for the first token that it decodes, lest it be preempted at once."""
    return _pages_for(min(len(request.ids) + 1, request.most_cached))


@dataclasses.dataclass
class _Books:
    """What the cache is still to do, in this order.

    Attributes:
      retained: pages to keep when no sequence holds them.
      freed: slots to empty.
      released: pages to keep no longer.
      adopted: pages to start a slot with.
    """

    retained: list[int] = dataclasses.field(default_factory=list)
    freed: list[int] = dataclasses.field(default_factory=list)
    released: list[int] = dataclasses.field(default_factory=list)
    adopted: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    def arrays(self, cache: PagedKVCache) -> tuple[np.ndarray, ...]:
        """The arguments of `_move_pages`, whose shapes are always the same."""
        lists = np.full((2, cache.num_pages), -1, np.int32)
        lists[0, : len(self.retained)] = self.retained
        lists[1, : len(self.released)] = self.released
        is_freed, is_adopting = np.zeros((2, cache.batch), np.bool_)
        is_freed[self.freed] = True
        pages = np.zeros((cache.batch, cache.max_pages_per_seq), np.int32)
        seqlens = np.zeros(cache.batch, np.int32)
        for slot, adopted in self.adopted.items():
            is_adopting[slot] = True
            pages[slot, : len(adopted)] = adopted
            seqlens[slot] = len(adopted) * PAGE_SIZE
        return lists[0], is_freed, lists[1], is_adopting, pages, seqlens


# --- The compiled programs -------------------------------------------------------------------


def _rules_of(rows: int, runs: dict[int, _Run]) -> np.ndarray:
    """How to choose the next token of each row, uint32[4, rows], in one piece.

    The seed, the number of new tokens there are already, and the bits of the float32 temperature
    and top_p; of runs, each in a row.
    """
    seeds, counts = np.zeros((2, rows), np.uint32)
    temperature, top_p = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    for row, run in runs.items():
        sampling = run.request.sampling
        seeds[row], counts[row] = sampling.seed & 0xFFFFFFFF, run.asked
        temperature[row], top_p[row] = sampling.temperature, sampling.top_p
    return np.stack([seeds, counts, temperature.view(np.uint32), top_p.view(np.uint32)])


def _draws(runs: list[_Run]) -> bool:
    """Whether any run's tokens are drawn."""
    return any(run.request.sampling.temperature > 0 for run in runs)


def _choose(rules: jax.Array | None, logits: jax.Array) -> jax.Array:
    """int32[rows, s]: a token for each of the float32[rows, s, vocab] logits.

    The j-th of a row is the j-th of its new tokens from now on. Without rules (`_rules_of`), and
    where the temperature is 0, it is the most likely one.
    """
    most_likely = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if rules is None:
        return most_likely

    def draw(
        seed: jax.Array,
        count: jax.Array,
        logits: jax.Array,
        temperature: jax.Array,
        top_p: jax.Array,
    ) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return sample(key, logits, temperature, top_p)

    seeds, counts = rules[:2]
    temperature, top_p = jax.lax.bitcast_convert_type(rules[2:], jnp.float32)
    is_drawn = temperature > 0
    counts = counts[:, None] + jnp.arange(logits.shape[1], dtype=counts.dtype)
    draw_row = jax.vmap(draw, (None, 0, 0, None, None))
    drawn = jax.vmap(draw_row)(seeds, counts, logits, jnp.where(is_drawn, temperature, 1), top_p)
    return jnp.where(is_drawn[:, None], drawn, most_likely)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Newest:
    """What is known of the newest token of each slot, which is not read yet.

    Attributes:
      tokens: int32[slots].
      ahead: [slots, hidden], what multi-token prediction makes of it, and of all before: the hidden
        state from which the token after it is guessed. None without such guesses.
    """

    tokens: jax.Array
    ahead: jax.Array | None


@functools.partial(jax.jit, donate_argnames="cache")
def _move_pages(
    cache: PagedKVCache,
    retained: jax.Array,
    is_freed: jax.Array,
    released: jax.Array,
    is_adopting: jax.Array,
    pages: jax.Array,
    seqlens: jax.Array,
) -> tuple[jax.Array, PagedKVCache]:
    """See `_Books`; returns the outcome (`_Result`) and the cache."""
    cache = cache.retain(retained).free(is_freed).release(released)
    cache, ok = cache.adopt(is_adopting, pages, seqlens)
    nothing = jnp.zeros_like(cache.cache_seqlens)
    return _outcome(ok, nothing, nothing[:, None]), cache


def _outcome(ok: jax.Array, num_new: jax.Array, new: jax.Array) -> jax.Array:
    """Of bool[slots], int32[slots] and int32[slots, n], as `_Result` has it: in one piece."""
    return jnp.concatenate([ok[:, None].astype(jnp.int32), num_new[:, None], new], axis=1)


_copy = jax.jit(jnp.copy)


@functools.partial(jax.jit, donate_argnames=("newest", "cache"))
def _read(
    model: FlatModel,
    ids: jax.Array,
    slots: jax.Array,
    num_tokens: jax.Array,
    is_last: jax.Array,
    rules: jax.Array | None,
    newest: _Newest,
    cache: PagedKVCache,
) -> tuple[jax.Array, _Newest, PagedKVCache]:
    """Reads the next tokens of some slots, and chooses the first new token of those at the end.

    Args:
      model: the model.
      ids: int32[rows, chunk + 1], and the one after them, if it is known; padded at the end.
      slots: int32[rows], whose they are; one past the last slot for a row that is not used.
      num_tokens: int32[rows], how many they are, at most `chunk`.
      is_last: bool[rows], whether a prompt ends with them.
      rules: of each row, None if nothing is drawn.
      newest: of each slot; donated.
      cache: donated.

    Returns:
      As `_decode`, with n = 1.
    """
    params, config = model.params, model.config
    logits, hidden, cache, ok = deepseek.extend(
        params, config, ids[:, :-1], slots, num_tokens, cache
    )
    chosen = _choose(rules, logits[:, None])[:, 0]
    at = jnp.where(is_last, slots, cache.batch)
    tokens = newest.tokens.at[at].set(chosen, mode="drop")
    num_new = jnp.zeros_like(tokens).at[at].set(1, mode="drop")
    ahead = newest.ahead
    if ahead is not None:
        row, last = jnp.arange(slots.shape[0]), jnp.maximum(num_tokens - 1, 0)
        next_ids = ids[:, 1:]
        next_ids = next_ids.at[row, last].set(jnp.where(is_last, chosen, next_ids[row, last]))
        hidden, cache = deepseek.mtp_extend(params, config, hidden, next_ids, slots, cache)
        ahead = ahead.at[at].set(hidden[row, last], mode="drop")
    newest = _Newest(tokens, ahead)
    return _outcome(ok, num_new, tokens[:, None]), newest, cache


@functools.partial(jax.jit, donate_argnames=("newest", "cache"))
def _decode(
    model: FlatModel,
    newest: _Newest,
    drafts: jax.Array,
    is_active: jax.Array,
    rules: jax.Array | None,
    cache: PagedKVCache,
) -> tuple[jax.Array, _Newest, PagedKVCache]:
    """Reads the newest token of slots and what is guessed to follow, and chooses what does.

    Args:
      model: the model.
      newest: of each slot; donated.
      drafts: int32[slots, n], guesses, -1 for none; n may be 0. With multi-token prediction, which
        makes them, only their number counts.
      is_active: bool[slots], which take part.
      rules: of each slot, None if nothing is drawn.
      cache: donated.

    Returns:
      The outcome (`_Result`), with 1 + n new tokens of which some count; the newest; and the cache,
      which has forgotten the wrong guesses.
    """
    params, config = model.params, model.config
    before, num_drafts = cache.cache_seqlens, drafts.shape[1]
    cache, ok = cache.allocate(jnp.where(is_active, 1 + num_drafts, 0))
    if newest.ahead is not None:
        drafts, cache = _look_ahead(params, config, newest.ahead, num_drafts, cache)
    ids = jnp.concatenate([newest.tokens[:, None], jnp.maximum(drafts, 0)], axis=1)
    hidden, cache = deepseek.decode_hidden(params, config, ids, cache)
    new = _choose(rules, deepseek.head(params, config, hidden))
    # A token counts if all guesses before it were right.
    is_right = (new[:, :-1] == drafts).astype(jnp.int32)
    num_new = 1 + jnp.sum(jnp.cumprod(is_right, axis=1), axis=1)
    num_new = jnp.where(is_active & ok, num_new, 0).astype(jnp.int32)

    def update(old: jax.Array, per_token: jax.Array) -> jax.Array:
        """What the last token that counts has; the old where there is none."""
        at = jnp.maximum(num_new - 1, 0)
        last = jnp.take_along_axis(per_token, jnp.expand_dims(at, range(1, per_token.ndim)), axis=1)
        return jnp.where(jnp.expand_dims(num_new > 0, range(1, old.ndim)), last[:, 0], old)

    ahead = newest.ahead
    if ahead is not None:
        hidden, cache = deepseek.mtp_decode(params, config, hidden, new, cache)
        ahead = update(ahead, hidden)
    if num_drafts > 0:
        cache = cache.truncate(before + num_new)
    newest = _Newest(update(newest.tokens, new), ahead)
    return _outcome(ok, num_new, new), newest, cache


def _look_ahead(
    params: Params, config: DeepSeekConfig, ahead: jax.Array, count: int, cache: PagedKVCache
) -> tuple[jax.Array, PagedKVCache]:
    """Guesses tokens with multi-token prediction.

    Args:
      params: the model's.
      config: the model's.
      ahead: [slots, hidden], see `_Newest`.
      count: how many tokens, at least 0.
      cache: has made room for them.

    Returns:
      int32[slots, count], and the cache, whose last layer has what is to be replaced when the model
      has read the tokens.
    """
    start, takes_part = cache.cache_seqlens - cache.num_new, (cache.num_new > 0).astype(jnp.int32)
    hidden, drafts = ahead[:, None], jnp.zeros((ahead.shape[0], 0), jnp.int32)
    for i in range(count):
        if i > 0:
            view = dataclasses.replace(
                cache,
                cache_seqlens=start + i * takes_part,
                num_new=takes_part,
                copy_from=cache.copy_from if i == 1 else jnp.full_like(cache.copy_from, -1),
            )
            hidden, view = deepseek.mtp_decode(params, config, hidden, drafts[:, -1:], view)
            cache = dataclasses.replace(cache, pages=view.pages, index_pages=view.index_pages)
        guess = jnp.argmax(deepseek.head(params, config, hidden), axis=-1).astype(jnp.int32)
        drafts = jnp.concatenate([drafts, guess], axis=1)
    return drafts, cache
