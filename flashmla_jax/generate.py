"""Batched generation: prompts are read once, then every step adds a token to every sequence.

A generation runs two programs, whatever its length: one that reads the prompts, padded to one of
few lengths, and one that decodes a token. The cache is donated from step to step, so it stays where
it is in memory. Lengths, tables and who has finished are data.

This is for one batch that starts together, and shows the logits of every step. Requests that come
and go are for `flashmla_jax.engine`, which gives the same tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers.mla import Params
from flashmla_jax.models import deepseek
from flashmla_jax.models.deepseek import DeepSeekConfig
from flashmla_jax.models.flat import FlatModel


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_p: only the most likely tokens are drawn from, as few as have this probability together
        (nucleus sampling, arXiv:1904.09751), and all that are as likely as the last of these; 1 is
        all of them.
      seed: of the random numbers, of which the lower 32 bits count. Sequence i of a batch draws its
        t-th token with a key made from `seed + i` and t, so that it does not depend on its
        neighbours.

    Raises:
      ValueError: for a temperature that is negative or not finite, or top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of a generation gave.

    Attributes:
      tokens: per sequence its next token, or None if it had finished before.
      logits: float32[batch, vocab] on the device, from which they were chosen; meaningless for the
        sequences that had finished.
    """

    tokens: tuple[int | None, ...]
    logits: jax.Array


class Generation:
    """A batch of prompts being continued: iterate over it, once, for its steps.

    The first step comes from reading the prompts, every other from decoding one token per
    sequence. A sequence finishes with a stop token, which is its last; it then takes no more room
    in the cache while the others go on. The iteration ends when all have finished, or after
    `max_new_tokens` steps.

    Attributes:
      prompts: int32 arrays, one per sequence.
      max_new_tokens: how many tokens a sequence gets at most.
      cache: the cache after the newest step that was started.
    """

    prompts: tuple[np.ndarray, ...]
    max_new_tokens: int
    cache: PagedKVCache

    def __init__(
        self,
        params: Params,
        config: DeepSeekConfig,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] | None = None,
        num_pages: int | None = None,
        cache_dtype: Any = None,
    ) -> None:
        """Checks the arguments and makes an empty cache.

        Args:
          params: the model's, as `models.load_checkpoint` gives them or, better, `deepseek.absorb`.
            Absorbed ones are used as they are. Of others the generation makes absorbed ones for
            itself, with a copy of all weights but the embedding and routed experts: for several
            batches, or where memory is short, `params = deepseek.absorb(params, config)` before.
          config: the model's configuration.
          prompts: token ids, at least one sequence and at least one token in each.
          max_new_tokens: at least 1.
          sampling: how tokens are chosen, by default greedily.
          stop_tokens: ids that end a sequence; None for the configuration's `eos_token_id`, `()`
            for none.
          num_pages: size of the cache's pool; by default what the batch can need at most, rounded
            up by at most an eighth so that other batches can run the same programs.
          cache_dtype: `PagedKVCache.create`'s; by default that of the model's embedding.

        Raises:
          ValueError: for an empty prompt or batch, a token outside the vocabulary, more tokens than
            the model has positions, or a pool that the batch might not fit.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if len(prompts) == 0:
            raise ValueError("prompts is empty: at least one sequence is needed")
        self.prompts = tuple(
            checked_ids(f"prompt {i}", prompt, config) for i, prompt in enumerate(prompts)
        )
        self._stop_tokens = stops_of(config, stop_tokens)
        self.max_new_tokens = max_new_tokens
        self._rules = _Rules.make(len(prompts), sampling, self._stop_tokens)

        lengths = np.array([len(prompt) for prompt in self.prompts], np.int32)
        # A token is cached when it is read, so the last one of a sequence never is.
        most = lengths + (max_new_tokens - 1)
        self.cache = _make_cache(params, config, most, num_pages, cache_dtype)
        self._model = FlatModel.of(deepseek.absorb(params, config), config)
        self._lengths = lengths
        self._ids = np.zeros((len(prompts), _padded(int(lengths.max()))), np.int32)
        for row, prompt in zip(self._ids, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        self._started = False

    def compile(self) -> Generation:
        """Compiles and runs both programs with no sequence taking part; returns self.

        Without it the first two steps compile, if the process has not run the like before.
        """
        tokens, _, self.cache, _ = self._begin(np.zeros_like(self._lengths))
        _, _, self.cache, _ = self._continue(tokens, 1)
        jax.block_until_ready(self.cache)
        return self

    def __iter__(self) -> Iterator[Step]:
        """Yields the steps. One step ahead is already running when a step is yielded."""
        if self._started:
            raise RuntimeError("a Generation can be iterated over only once")
        self._started = True
        tokens, logits, self.cache, ok = self._begin(self._lengths)
        for count in range(1, self.max_new_tokens + 1):
            step = (tokens, logits, ok)
            tokens.copy_to_host_async()
            ok.copy_to_host_async()
            if count < self.max_new_tokens:
                tokens, logits, self.cache, ok = self._continue(tokens, count)
            now, fits = jax.device_get((step[0], step[2]))
            if not fits.all():  # __init__ has made sure of it
                raise RuntimeError(f"the cache of {self.cache.num_pages} pages is full")
            yield Step(tuple(int(t) if t >= 0 else None for t in now), step[1])
            if all(t < 0 or int(t) in self._stop_tokens for t in now):
                return

    def _begin(self, lengths: np.ndarray) -> tuple[jax.Array, jax.Array, PagedKVCache, jax.Array]:
        return _begin(self._model, self._ids, lengths, self.cache, self._rules)

    def _continue(
        self, tokens: jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array, PagedKVCache, jax.Array]:
        # Sent for each step only where it matters: that takes the host time.
        number = None if self._rules.greedy else np.int32(count)
        return _continue(self._model, tokens, self.cache, self._rules, number)


def generate(
    params: Params,
    config: DeepSeekConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    num_pages: int | None = None,
    cache_dtype: Any = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[list[int]]:
    """Continues a batch of prompts.

    Args:
      params: see `Generation`, as for the other arguments.
      config: the model's configuration.
      prompts: token ids of each sequence.
      max_new_tokens: how many tokens a sequence gets at most.
      sampling: how tokens are chosen.
      stop_tokens: ids that end a sequence.
      num_pages: size of the cache's pool.
      cache_dtype: the cache's.
      on_step: called with every `Step` as it comes, for streaming.

    Returns:
      The new tokens of each sequence, with the stop token if one came.

    Raises:
      ValueError: as `Generation` does.
    """
    generation = Generation(
        params,
        config,
        prompts,
        max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        num_pages=num_pages,
        cache_dtype=cache_dtype,
    )
    new_tokens: list[list[int]] = [[] for _ in prompts]
    for step in generation:
        for sequence, token in zip(new_tokens, step.tokens, strict=True):
            if token is not None:
                sequence.append(token)
        if on_step is not None:
            on_step(step)
    return new_tokens


def score(
    params: Params, config: DeepSeekConfig, ids: Sequence[int], prefill: int | None = None
) -> np.ndarray:
    """Log-probabilities that the model gives the tokens of a sequence.

    Args:
      params: the model's, see `Generation`; used as they are if nothing is decoded.
      config: the model's configuration.
      ids: at least one token.
      prefill: how many tokens are read at once; the others are decoded one by one through the
        paged cache. All of them by default, 0 for none.

    Returns:
      float32[len(ids) - 1]: `log p(ids[t + 1] | ids[0..t])` for every t, natural logarithm.

    Raises:
      ValueError: for tokens outside the vocabulary or more than the model has positions, or for
        `prefill` outside `[0, len(ids)]`.
    """
    tokens = checked_ids("ids", ids, config)
    length = len(tokens)
    prefill = length if prefill is None else prefill
    if not 0 <= prefill <= length:
        raise ValueError(f"prefill must be in [0, {length}], the number of ids, got {prefill}")
    cache = _make_cache(params, config, np.array([length]), None)
    if prefill < length - 1:
        params = deepseek.absorb(params, config)
    model = FlatModel.of(params, config)

    parts: list[jax.Array] = []
    if prefill > 0:
        # The token after the last one that is read is a target too; after the end there is none.
        padded = np.zeros((1, _padded(prefill) + 1), np.int32)
        padded[0, : min(prefill + 1, length)] = tokens[: prefill + 1]
        lengths = np.array([prefill], np.int32)
        logprobs, cache = _score_prompt(model, padded, lengths, cache)
        parts.append(logprobs[: min(prefill, length - 1)])
    for t in range(prefill, length - 1):
        logprob, cache = _score_token(model, tokens[None, t : t + 2], cache)
        parts.append(logprob)
    return np.concatenate([np.zeros(0, np.float32), *jax.device_get(parts)])


# --- The compiled programs -------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rules:
    """`Sampling` and the stop tokens, as the compiled programs take them.

    Attributes:
      keys: key[batch].
      temperature: float32[].
      top_p: float32[].
      stop_tokens: int32[n].
      greedy: whether the first three are not needed.
    """

    keys: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    stop_tokens: jax.Array
    greedy: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def make(cls, batch: int, sampling: Sampling, stop_tokens: frozenset[int]) -> _Rules:
        seeds = [(sampling.seed + i) & 0xFFFFFFFF for i in range(batch)]
        return cls(
            keys=jax.vmap(jax.random.key)(np.array(seeds, np.uint32)),
            temperature=jnp.float32(sampling.temperature),
            top_p=jnp.float32(sampling.top_p),
            stop_tokens=jnp.array(sorted(stop_tokens), jnp.int32),
            greedy=sampling.temperature == 0,
        )

    def go_on_after(self, tokens: jax.Array) -> jax.Array:
        """bool[batch]: which sequences are not finished, given their last tokens int32[batch]."""
        return (tokens >= 0) & ~jnp.isin(tokens, self.stop_tokens)

    def choose(self, logits: jax.Array, count: jax.typing.ArrayLike | None) -> jax.Array:
        """int32[batch]: the next tokens, after `count` tokens, from float32[batch, vocab].

        What is not greedy needs the count.
        """
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        assert count is not None
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, count)
        draw = jax.vmap(sample, (0, 0, None, None))
        return draw(keys, logits, self.temperature, self.top_p)


def sample(
    key: jax.Array, logits: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Draws an index from float32[vocab] logits, as `Sampling` says: int32[]."""
    # Both are above 0, though float32 may not tell them from it; the best token always stays in.
    least = jnp.finfo(jnp.float32).tiny
    temperature, top_p = jnp.maximum(temperature, least), jnp.maximum(top_p, least)
    logits = (logits - jnp.max(logits)) / temperature
    # Sums round, so that top_p = 1 needs to be said.
    is_in = (_in_order(logits) >= _nucleus_end(logits, top_p)) | (top_p >= 1)
    return jax.random.categorical(key, jnp.where(is_in, logits, -jnp.inf)).astype(jnp.int32)


def _in_order(x: jax.Array) -> jax.Array:
    """uint32, of float32: numbers in the same order, whose digits can be sought one by one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)  # -0.0 is 0.0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _nucleus_end(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The greatest number such that logits at or above it have `top_p` or more together: uint32[].

    A number as `_in_order` makes them; 0 if rounding leaves all of them below `top_p`. Digit by
    digit from the first, three bits at a time: of the seven candidates for a digit, as many as have
    enough at or above them. On a GPU that is faster than sorting (NVIDIA H200, 2026-11-30, by 2.2,
    3.1 and 1.4 times for 1, 32 and 128 rows of 102400).
    """
    numbers, p = _in_order(logits), jax.nn.softmax(logits)
    end = jnp.uint32(0)
    for shift in range(30, -1, -3):
        least = end + (jnp.arange(1, 8 if shift < 30 else 4, dtype=jnp.uint32) << shift)
        above = jnp.sum(jnp.where(numbers >= least[:, None], p, 0), axis=1)
        end += jnp.sum(above >= top_p, dtype=jnp.uint32) << shift
    return end


@functools.partial(jax.jit, donate_argnames="cache")
def _begin(
    model: FlatModel,
    ids: jax.Array,
    lengths: jax.Array,
    cache: PagedKVCache,
    rules: _Rules,
) -> tuple[jax.Array, jax.Array, PagedKVCache, jax.Array]:
    """Reads prompts int32[batch, s] of `lengths` int32[batch], 0 for one that stays out.

    Returns the first tokens int32[batch], -1 for those that stay out; the logits float32[batch,
    vocab] they come from; the cache; and ok bool[batch].
    """
    logits, cache, ok = deepseek.prefill(model.params, model.config, ids, lengths, cache)
    return jnp.where(lengths > 0, rules.choose(logits, 0), -1), logits, cache, ok


@functools.partial(jax.jit, donate_argnames="cache")
def _continue(
    model: FlatModel,
    tokens: jax.Array,
    cache: PagedKVCache,
    rules: _Rules,
    count: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, jax.Array, PagedKVCache, jax.Array]:
    """Reads each sequence's last token and chooses its next; arguments and results as above."""
    active = rules.go_on_after(tokens)
    ids = jnp.maximum(tokens, 0)[:, None]
    logits, cache, ok = deepseek.decode_step(model.params, model.config, ids, cache, active)
    logits = logits[:, 0]
    return jnp.where(active, rules.choose(logits, count), -1), logits, cache, ok


@functools.partial(jax.jit, donate_argnames="cache")
def _score_prompt(
    model: FlatModel, ids: jax.Array, lengths: jax.Array, cache: PagedKVCache
) -> tuple[jax.Array, PagedKVCache]:
    """float32[s]: the log-probability of `ids[0, t + 1]` for every t, ids int32[1, s + 1]."""
    logits, cache, _ = deepseek.prefill(
        model.params, model.config, ids[:, :-1], lengths, cache, all_positions=True
    )
    return _logprobs(logits[0], ids[0, 1:]), cache


@functools.partial(jax.jit, donate_argnames="cache")
def _score_token(
    model: FlatModel, ids: jax.Array, cache: PagedKVCache
) -> tuple[jax.Array, PagedKVCache]:
    """float32[1]: the log-probability of `ids[0, 1]` after `ids[0, 0]`, ids int32[1, 2]."""
    logits, cache, _ = deepseek.decode_step(model.params, model.config, ids[:, :1], cache)
    return _logprobs(logits[0], ids[0, 1:]), cache


def _logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32[n]: log-probabilities of targets int32[n] under logits float32[n, vocab]."""
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


# --- Sizes and checks ------------------------------------------------------------------------


def _round_up(n: int) -> int:
    """At least n, at most an eighth more, and one of few numbers: sizes decide what compiles."""
    step = 1 << max(n.bit_length() - 4, 0)
    return -(-n // step) * step


def _padded(length: int) -> int:
    """The length to which prompts of at most `length` tokens are padded."""
    return PAGE_SIZE * _round_up(-(-length // PAGE_SIZE))


_T = TypeVar("_T")


def beside(array: jax.Array, tree: _T) -> _T:
    """Puts a tree of arrays where an array is that was put somewhere; else leaves it.

    Programs are compiled again when an argument is first left to JAX and then, being the result of
    one with such parameters, bound to a device.
    """
    if not getattr(array, "committed", False):
        return tree
    sharding = array.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.device_put(tree, sharding)


def _make_cache(
    params: Params,
    config: DeepSeekConfig,
    lengths: np.ndarray,
    num_pages: int | None = None,
    dtype: Any = None,
) -> PagedKVCache:
    """An empty cache in which sequences can grow to `lengths` int32[batch]."""
    longest = int(lengths.max())
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"a sequence would be {longest} tokens long, and the model has "
            f"{config.max_position_embeddings} positions"
        )
    pages = -(-lengths // PAGE_SIZE)
    needed = int(pages.sum())
    if num_pages is not None and num_pages < needed:
        raise ValueError(
            f"num_pages={num_pages} is too small: {len(lengths)} sequences of together up to "
            f"{int(lengths.sum())} tokens need {needed} pages of {PAGE_SIZE}"
        )
    embedding = params["embed_tokens"]["embedding"]
    cache = PagedKVCache.create(
        num_layers=config.num_hidden_layers,
        num_pages=_round_up(needed) if num_pages is None else num_pages,
        batch=len(lengths),
        max_pages_per_seq=_round_up(int(pages.max())),
        dtype=embedding.dtype if dtype is None else dtype,
        index_head_dim=config.index_head_dim,
    )
    return beside(embedding, cache)


def stops_of(config: DeepSeekConfig, stop_tokens: Sequence[int] | None) -> frozenset[int]:
    """The given ids, or those of the configuration's `eos_token_id` for None."""
    if stop_tokens is None:
        eos = config.eos_token_id
        stop_tokens = eos if isinstance(eos, tuple) else () if eos is None else (eos,)
    return frozenset(stop_tokens)


def checked_ids(name: str, ids: Any, config: DeepSeekConfig) -> np.ndarray:
    """`ids` as int32[length], or a ValueError that calls them `name`."""
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"{name} must be a sequence of token ids, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: at least one token is needed")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    outside = (array < 0) | (array >= config.vocab_size)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(
            f"{name} has token {array[at]} at position {at}, outside the vocabulary of "
            f"{config.vocab_size}"
        )
    return array.astype(np.int32)
