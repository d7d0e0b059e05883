"""The engine against the model's uncached forward pass, whoever shares the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import CONFIG

import flashmla_jax as fm
from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.engine import Engine, _copy, _decode, _move_pages, _read, guess_next
from flashmla_jax.generate import GREEDY, Sampling, sample
from flashmla_jax.models import deepseek, init_params

pytestmark = pytest.mark.usefixtures("on_cpu")

# The same sizes in all tests, so that they share their programs. With drafts, a row of the block
# table has a place for all pages too.
PAGES, SLOTS, CHUNK, DRAFT = 8, 3, 48, 3
MAX_SEQLEN = PAGES * PAGE_SIZE + 1 - DRAFT


@pytest.fixture(scope="module")
def model(on_cpu):
    params = init_params(CONFIG, jax.random.key(0), jnp.float32)
    # Bound to a device, as parameters of a checkpoint are.
    return jax.device_put(params, jax.devices("cpu")[0]), CONFIG


def make_engine(model, **changes):
    sizes = {
        "num_pages": PAGES,
        "max_seqlen": MAX_SEQLEN,
        "slots": SLOTS,
        "chunk": CHUNK,
        "prompts_at_once": 2,
    }
    engine = Engine(*model, **(sizes | changes))
    # What is in no token yet must not be read.
    poison = 0xFF if engine.cache.is_fp8 else np.nan
    pages = [
        jax.device_put(jnp.full(x.shape, poison, x.dtype), x.sharding) for x in engine.cache.pages
    ]
    engine.cache = dataclasses.replace(engine.cache, pages=tuple(pages))
    return engine


def prompt_of(seed, length):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


def check_step(engine):
    """The cache is sound, and the device uses no page that the scheduler does not know of."""
    engine.cache.check()
    if not (engine._owed.freed or engine._owed.released):  # which the device will hear of
        assert int(engine.cache.num_used) <= engine.pages_used
    assert 0 <= engine.pages_cached <= engine.pages_used <= engine.cache.num_pages
    assert len(engine.running) <= SLOTS


def check_end(engine):
    """Nothing is left but known prefixes, which nobody uses."""
    assert engine.waiting == engine.running == ()
    assert not engine.cache.cache_seqlens.any()
    stats = engine.cache.stats()
    assert int(stats.used) == int(stats.retained) == engine.pages_used == engine.pages_cached


def run(engine, late=None):
    """Steps to the end; `late` submits requests after a number of steps."""
    late = dict(late or {})
    steps, more = 0, True
    while more or late:
        if steps in late:
            late.pop(steps)()
        more = engine.step()
        check_step(engine)
        steps += 1
    check_end(engine)
    return steps


def run_streamed(engine, wanted, after_step=lambda: None):
    """Submits prompts, each with a number of tokens and a sampling, and steps to the end.

    Whoever is preempted keeps what it has, and `on_token` gets every token once.

    Returns:
      The requests, and for each time that one was preempted its place among them and the tokens
      that it had before that step.
    """
    streams, victims = [[] for _ in wanted], []
    requests = [
        engine.submit(prompt, new, sampling=sampling, on_token=stream.append)
        for (prompt, new, sampling), stream in zip(wanted, streams, strict=True)
    ]
    more = True
    while more:
        before = [(list(request.tokens), request.preemptions) for request in requests]
        more = engine.step()
        check_step(engine)
        after_step()
        for i, (tokens, preemptions) in enumerate(before):
            assert requests[i].tokens[: len(tokens)] == tokens
            assert requests[i].tokens == streams[i]
            if requests[i].preemptions > preemptions:
                victims.append((i, tokens))
    check_end(engine)
    assert len(victims) == engine.stats.preemptions
    for i, tokens in victims:
        assert streams[i][: len(tokens)] == tokens
    return requests, victims


@jax.jit
def draw(seed, count, logits, temperature, top_p):
    key = jax.random.fold_in(jax.random.key(seed), count)
    return sample(key, logits, temperature, top_p)


def check_tokens(model, requests, cancelled=False):
    """Every token is what an uncached pass over all tokens before gives."""
    for first in range(0, len(requests), 4):
        batch = requests[first : first + 4]
        ids = np.zeros((4, MAX_SEQLEN), np.int32)
        for row, request in zip(ids, batch, strict=False):
            row[: len(request.ids)] = [*request.prompt, *request.tokens]
        logits = np.asarray(deepseek.forward(*model, ids))
        for rows, request in zip(logits, batch, strict=False):
            s = request.sampling
            rows = rows[len(request.prompt) - 1 :][: len(request.tokens)]
            expected = rows.argmax(-1).tolist()
            if s.temperature > 0:
                expected = [
                    int(draw(np.uint32(s.seed), t, row, s.temperature, s.top_p))
                    for t, row in enumerate(rows)
                ]
            assert request.tokens == expected
            assert len(request.tokens) == len(request.token_times)
            ended = "stop" if request.tokens[-1] in request.stop_tokens else "length"
            assert request.finish_reason == ("cancelled" if cancelled else ended)


# --- What is generated -----------------------------------------------------------------------


def test_requests_come_and_go(model):
    """Of all lengths around pages and chunks, more than there are slots, and some come later."""
    engine, requests, seen = make_engine(model), [], []

    def submit(length, new):
        number = len(requests)
        request = engine.submit(
            prompt_of(number, length), new, on_token=lambda token: seen.append((number, token))
        )
        assert request.number == number
        requests.append(request)

    for length, new in ((3, 5), (70, 66), (130, 1), (64, 20), (48, 3)):
        submit(length, new)
    late = {5: lambda: submit(1, 30), 30: lambda: submit(200, 9), 90: lambda: submit(65, 2)}
    run(engine, late)
    check_tokens(model, requests)
    for number, request in enumerate(requests):
        assert [token for n, token in seen if n == number] == request.tokens
        assert len(request.tokens) == request.max_new_tokens
        assert request.token_times == sorted(request.token_times)
        assert request.submit_time <= request.token_times[0]
    # They did take turns.
    order = [number for number, _ in seen]
    assert order != sorted(order)


@pytest.mark.parametrize("draft", [0, DRAFT])
def test_a_prompt_is_read_while_others_decode(model, draft):
    """A chunk and a token in each step. Without drafts, tokens come one step later."""
    engine = make_engine(model, draft=draft, prefix_cache=False)
    first = engine.submit(prompt_of(0, 10), 40)
    while len(first.tokens) < 2:
        engine.step()
    second = engine.submit(prompt_of(1, 200), 3)
    before, late = engine.stats.read_tokens, int(draft == 0)
    for step in range(5):
        count = len(first.tokens)
        engine.step()
        check_step(engine)
        assert len(first.tokens) > count if draft else len(first.tokens) == count + 1
        assert engine.stats.read_tokens == before + min((step + 1) * CHUNK, 200)
        assert (second.tokens == []) == (step < 4 + late)
    run(engine)
    check_tokens(model, [first, second])


@pytest.mark.parametrize("draft", [0, DRAFT])
@pytest.mark.parametrize("seed", range(3))
def test_random_loads(model, seed, draft):
    """With too few pages for all, beginnings in common, and greedy and sampled requests."""
    rng = np.random.default_rng(seed)
    engine, requests = make_engine(model, draft=draft), []

    def submit():
        for _ in range(rng.integers(1, 4)):
            shared = prompt_of(int(rng.integers(2)), int(rng.integers(0, 140)))
            own = rng.integers(0, CONFIG.vocab_size, rng.integers(1, 90)).tolist()
            sampling = Sampling(float(rng.choice([0, 0.7])), 0.9, int(rng.integers(100)))
            new = int(rng.integers(1, 70))
            stops = rng.integers(0, CONFIG.vocab_size, 5).tolist()
            requests.append(engine.submit(shared + own, new, sampling=sampling, stop_tokens=stops))

    run(engine, {int(step): submit for step in rng.integers(0, 60, 4)})
    check_tokens(model, requests)


# --- Pages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [0, DRAFT])
def test_preempted_requests_give_the_same(model, draft):
    """Three that start with one page each and need four in the end, of eight."""
    engine = make_engine(model, prefix_cache=False, draft=draft)
    samplings = [GREEDY, Sampling(1.0, 0.9, 3), GREEDY]
    wanted = [(prompt_of(i, 60), 150, sampling) for i, sampling in enumerate(samplings)]
    requests, victims = run_streamed(engine, wanted)
    check_tokens(model, requests)
    assert requests[0].preemptions == 0  # the oldest goes on
    assert requests[2].preemptions > 0
    assert engine.stats.preemptions == sum(r.preemptions for r in requests)
    assert engine.pages_used == 0
    for i, tokens in victims:
        assert 0 < len(tokens) < len(requests[i].tokens)

    for request, one in zip(requests, wanted, strict=True):
        alone = make_engine(model, prefix_cache=False, draft=draft)
        ((undisturbed,), _) = run_streamed(alone, [one])
        assert alone.stats.preemptions == 0
        assert undisturbed.tokens == request.tokens


def test_an_fp8_cache(model):
    """Who is preempted, waits and shares pages gets what it would get alone, of the same cache."""
    prompts = [prompt_of(0, 60), prompt_of(1, 130), prompt_of(0, 60)[:50], prompt_of(2, 70)]
    alone = []
    for prompt in prompts:
        engine = make_engine(model, prefix_cache=False, cache_dtype="fp8")
        assert engine.cache.is_fp8
        alone.append(engine.submit(prompt, 150))
        run(engine)
    engine = make_engine(model, cache_dtype="fp8", draft=DRAFT)
    requests = [engine.submit(prompt, 150) for prompt in prompts]
    run(engine)
    assert engine.stats.preemptions > 0
    assert [r.tokens for r in requests] == [r.tokens for r in alone]
    exact = make_engine(model, prefix_cache=False)
    others = [exact.submit(prompt, 150) for prompt in prompts]
    run(exact)
    same = [
        [x == y for x, y in zip(r.tokens, o.tokens, strict=True)]
        for r, o in zip(requests, others, strict=True)
    ]
    assert np.mean([x[0] for x in same]) >= 0.5  # rounding is seen, but not at once
    assert not np.all(same)


def test_a_request_that_needs_all_pages(model):
    """It gets them from others, and from what only keeps prefixes."""
    engine = make_engine(model)
    requests = [
        engine.submit(prompt_of(i, n), 25) for i, n in enumerate((100, MAX_SEQLEN - 25, 130))
    ]
    run(engine)
    check_tokens(model, requests)
    assert int(engine.cache.high_water) == PAGES


def test_a_request_that_is_in_its_own_way(model):
    """Its first page holds what another page is known for, on which its later ones depend.

    So it needs one page more than there are, until it starts again with that other one.
    """
    engine = make_engine(model)
    prompt = prompt_of(0, 70)
    first = engine.submit(prompt, 1)
    second = engine.submit(prompt, MAX_SEQLEN - 70)
    run(engine)
    assert second.preemptions == 1
    check_tokens(model, [first, second])


def test_known_prefixes_are_not_read_again(model):
    engine = make_engine(model)
    prefix = prompt_of(0, 2 * PAGE_SIZE)
    first = engine.submit([*prefix, 1, 2, 3], 4)
    run(engine)
    assert first.prefix_tokens == 0
    assert engine.stats.read_tokens == len(first.prompt)
    assert engine.pages_cached == 2

    others = [engine.submit([*prefix, *range(9 + i)], 3) for i in range(3)]
    engine.step()
    table = np.asarray(engine.cache.block_table)
    np.testing.assert_array_equal(table[0, :2], table[1, :2])  # the very same pages
    assert int(engine.cache.stats().shared) == 2
    run(engine)
    check_tokens(model, [first, *others])
    assert [request.prefix_tokens for request in others] == [2 * PAGE_SIZE] * 3
    assert engine.stats.prefix_tokens == 3 * 2 * PAGE_SIZE
    assert engine.stats.read_tokens == len(first.prompt) + 9 + 10 + 11

    # The last token of a prompt is always read.
    whole = engine.submit(prefix, 2)
    run(engine)
    assert whole.prefix_tokens == PAGE_SIZE
    check_tokens(model, [whole])


def test_a_conversation_goes_on_from_its_pages(model):
    engine = make_engine(model)
    first = engine.submit(prompt_of(0, 100), 40)
    run(engine)
    second = engine.submit([*first.prompt, *first.tokens, 5, 6], 5)
    run(engine)
    assert second.prefix_tokens == 2 * PAGE_SIZE  # of which 28 tokens were generated
    check_tokens(model, [first, second])


def test_prompts_that_wait_share_with_those_before_them(model):
    """Two are read at once, each for itself; the third starts with a page of theirs."""
    engine = make_engine(model)
    prompt = prompt_of(0, 70)
    requests = [engine.submit(prompt, 5, sampling=Sampling(1.0, seed=i)) for i in range(3)]
    run(engine)
    assert [request.prefix_tokens for request in requests] == [0, 0, PAGE_SIZE]
    check_tokens(model, requests)
    assert len({tuple(request.tokens) for request in requests}) == 3


def test_prefixes_go_before_requests(model):
    """Other prompts take the pages of those that are over, and nobody is preempted."""
    engine = make_engine(model)
    requests = []
    for i in range(4):
        requests.append(engine.submit(prompt_of(i, 3 * PAGE_SIZE), 3))
        run(engine)
    assert engine.stats.preemptions == 0
    again = engine.submit([*requests[3].prompt, 0], 3)
    assert engine.submit([*requests[0].prompt, 0], 3).prefix_tokens is None  # not known yet
    run(engine)
    assert again.prefix_tokens == 3 * PAGE_SIZE
    check_tokens(model, [*requests, again])


def test_without_prefix_cache_nothing_stays(model):
    engine = make_engine(model, prefix_cache=False)
    requests = [engine.submit(prompt_of(0, 150), 3) for _ in range(3)]
    run(engine)
    assert engine.pages_used == engine.stats.prefix_tokens == 0
    check_tokens(model, requests)


# --- How tokens are chosen, and when it ends ---------------------------------------------------


def test_seeds_and_neighbours(model):
    """Tokens depend on the request's seed, not on its slot, its number or who else is there."""

    def tokens(seeds, others=0):
        engine = make_engine(model)
        for i in range(others):
            engine.submit(prompt_of(50 + i, 20), 4 + i)
        requests = [
            engine.submit(prompt_of(0, 20), 12, sampling=Sampling(1.0, 0.95, seed))
            for seed in seeds
        ]
        run(engine)
        check_tokens(model, requests)
        return [request.tokens for request in requests]

    first, second = tokens([1, 2])
    assert first != second
    assert tokens([2, 1], others=2) == [second, first]


def test_sampling_is_per_request(model):
    engine = make_engine(model)
    prompt = prompt_of(0, 20)
    settings = [GREEDY, Sampling(1.0, 1e-6, 5), Sampling(2.0)]
    greedy, narrow, hot = [engine.submit(prompt, 12, sampling=s) for s in settings]
    run(engine)
    assert greedy.tokens == narrow.tokens != hot.tokens
    check_tokens(model, [greedy, narrow, hot])


@pytest.mark.parametrize("draft", [0, DRAFT])
def test_stop_tokens(model, draft):
    free = make_engine(model)
    requests = [free.submit(prompt_of(i, 30), 20) for i in range(3)]
    run(free)
    stop = requests[0].tokens[7]
    engine = make_engine(model, draft=draft)
    stopped = [engine.submit(prompt_of(i, 30), 20, stop_tokens=[stop, 511]) for i in range(3)]
    run(engine)
    for request, other in zip(stopped, requests, strict=True):
        tokens = other.tokens
        end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert request.tokens == tokens[:end]
    assert stopped[0].finish_reason == "stop"


def test_the_configuration_says_what_ends(model):
    config = dataclasses.replace(CONFIG, eos_token_id=(3, 4))
    engine = make_engine((model[0], config))
    assert engine.submit([1], 1).stop_tokens == {3, 4}
    assert engine.submit([1], 1, stop_tokens=()).stop_tokens == set()


# --- Drafts ----------------------------------------------------------------------------------


def repetitive(model):
    """Parameters with which a token mostly decides the next one, so that guesses come true."""
    return {**model[0], "layers": jax.tree.map(lambda x: 0.3 * x, model[0]["layers"])}, CONFIG


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.3, 0.9, 1)])
def test_drafts_change_the_number_of_steps_only(model, sampling):
    model = repetitive(model)
    steps, tokens = [], []
    for draft in (0, DRAFT):
        engine = make_engine(model, draft=draft)
        requests = [
            engine.submit(prompt_of(i, n), 60, sampling=sampling) for i, n in enumerate((3, 63))
        ]
        steps.append(run(engine))
        tokens.append([request.tokens for request in requests])
        check_tokens(model, requests)
    assert tokens[0] == tokens[1]
    assert 0 < engine.stats.accepted <= engine.stats.drafted
    assert steps[1] < steps[0]


def test_drafts_preempt_nobody(model):
    """Where there are no pages for guesses, a step decodes as without."""
    engine = make_engine(model, draft=DRAFT)
    requests = [engine.submit(prompt_of(i, 2 * PAGE_SIZE), 60) for i in range(2)]
    requests.append(engine.submit(prompt_of(2, 70), 58))
    run(engine)
    check_tokens(model, requests)
    assert engine.stats.preemptions == 0


@pytest.mark.parametrize(
    ("ids", "count", "wanted"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([1, 2, 3, 4, 1, 2, 3], 9, [4, 1, 2, 3]),
        ([7, 2, 3, 5, 8, 2, 3, 6, 2, 3], 1, [6]),  # the latest
        ([1, 2, 3, 9, 3, 8, 1, 2, 3], 1, [9]),  # the longest
        ([5, 6, 5], 3, [6, 5]),
        ([5, 5], 3, [5]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
    ],
)
def test_guess_next(ids, count, wanted):
    assert guess_next(np.array(ids, np.int32), count).tolist() == wanted


# --- How it runs -----------------------------------------------------------------------------


def test_programs_for_each_phase(model):
    """Whatever the lengths, the number of requests, who samples and who is preempted.

    There is one for runs of which none samples, and one for others.
    """
    programs = (_read, _decode, _move_pages, _copy)
    before = [program._cache_size() for program in programs]
    engines = [make_engine(model, draft=draft).compile() for draft in (0, DRAFT)]
    compiled = [program._cache_size() for program in programs]
    # Of decoding, one without drafts and one with them; those of other tests are the same ones.
    assert all(n - m <= most for n, m, most in zip(compiled, before, (2, 4, 1, 1), strict=True))
    for engine in engines:
        for i, n in enumerate((1, 60, 200, 130, 190)):
            engine.submit(prompt_of(i % 3, n), 90 + 7 * i, sampling=Sampling(0.5 * (i % 2)))
        engine.run()
        assert engine.stats.preemptions > 0
        assert engine.stats.prefix_tokens > 0
    assert [program._cache_size() for program in programs] == compiled


@pytest.mark.parametrize(("prefix_cache", "copies"), [(True, 2), (False, 0)])
def test_the_table_is_copied_when_a_page_is_full(model, monkeypatch, prefix_cache, copies):
    """For those who begin alike; not in every step."""
    copied = []
    monkeypatch.setattr(fm.engine, "_copy", lambda table: (copied.append(1), _copy(table))[1])
    engine = make_engine(model, prefix_cache=prefix_cache)
    requests = [engine.submit(prompt_of(0, PAGE_SIZE - 4), PAGE_SIZE + 10)]
    run(engine)
    check_tokens(model, requests)
    assert len(copied) == copies


def test_who_waited_for_pages_finds_what_was_read_meanwhile(model):
    """Also what the step before has read, which the host has not heard of yet."""
    engine = make_engine(model)
    first = engine.submit(prompt_of(0, PAGE_SIZE), 60)
    while not first.tokens:
        engine.step()
    prefix = prompt_of(7, 4 * CHUNK)  # three pages
    reads, waits = (engine.submit(prefix + prompt_of(8 + i, 10), 3) for i in range(2))
    engine.step()
    assert engine.waiting == (waits,)
    run(engine)
    check_tokens(model, [first, reads, waits])
    assert waits.prefix_tokens == len(prefix)


def test_nobody_waits_for_the_device_with_one_who_waits_for_pages(model, monkeypatch):
    """The steps of others go on ahead of what comes back."""
    engine, collected = make_engine(model), []
    collect_all = engine._collect_all
    monkeypatch.setattr(engine, "_collect_all", lambda: (collected.append(1), collect_all()))
    first = engine.submit(prompt_of(0, 4 * PAGE_SIZE), 60)
    second = engine.submit(prompt_of(1, 5 * PAGE_SIZE), 3)
    while not first.tokens:
        engine.step()
        check_step(engine)
    collected.clear()
    for _ in range(20):
        engine.step()
        check_step(engine)
        assert engine.running == (first,)
        assert engine.waiting == (second,)
        assert engine._results  # of the step that was just started
    assert not collected
    run(engine)
    check_tokens(model, [first, second])


@pytest.mark.parametrize(("draws", "programs"), [(False, 2), (True, 3), (None, 4)])
def test_compiling_what_is_needed(draws, programs):
    """Of reading and decoding, for a model of its own; a chunk that ends nothing draws nothing."""
    config = dataclasses.replace(CONFIG, vocab_size=CONFIG.vocab_size + programs)
    params = init_params(config, jax.random.key(0), jnp.float32)
    before = _read._cache_size() + _decode._cache_size()
    engine = Engine(params, config, num_pages=2, max_seqlen=100, slots=1, chunk=16)
    engine.compile(draws=draws)
    assert _read._cache_size() + _decode._cache_size() == before + programs
    engine.submit(range(40), 3, sampling=Sampling(0.5 * (draws is not False)))
    engine.run()
    assert _read._cache_size() + _decode._cache_size() == before + programs


def test_compile_changes_nothing(model):
    engine = make_engine(model, draft=DRAFT)
    requests = [engine.submit(prompt_of(i, 70), 20) for i in range(4)]
    while engine.compile().step():
        check_step(engine)
    check_end(engine)
    check_tokens(model, requests)


def test_parameters_are_absorbed_once(model):
    params, config = model
    kernel = params["layers"][0]["self_attn"]["kv_b_proj"]["kernel"]
    own = make_engine(model)._model.params
    assert own["one_device"] == ()  # what `few_tokens` asks for
    assert "w_uk" in own["layers"][0]["self_attn"]["kv_b_proj"]
    assert own["embed_tokens"]["embedding"] is params["embed_tokens"]["embedding"]
    assert params["layers"][0]["self_attn"]["kv_b_proj"]["kernel"] is kernel

    def check_same(given: dict) -> None:
        used = make_engine((given, config))._model.params
        assert jax.tree.structure(used) == jax.tree.structure(given)
        assert all(
            a is b for a, b in zip(jax.tree.leaves(used), jax.tree.leaves(given), strict=True)
        )

    check_same(own)
    without = {name: value for name, value in own.items() if name != "one_device"}
    check_same(without)


def check_pools_stay_in_place(engine):
    addresses = [pool.unsafe_buffer_pointer() for pool in engine.cache.pages]
    for i in range(4):
        engine.submit(prompt_of(i, 70), 5)
    while engine.step():
        assert [pool.unsafe_buffer_pointer() for pool in engine.cache.pages] == addresses


def test_pools_stay_in_place(model):
    check_pools_stay_in_place(make_engine(model))


def test_a_callback_may_submit(model):
    engine, requests = make_engine(model), []

    def more(token):
        if len(requests) < 3:
            requests.append(engine.submit([token], 2, on_token=more))

    requests.append(engine.submit([1], 1, on_token=more))
    run(engine)
    assert [len(request.tokens) for request in requests] == [1, 2, 2]
    assert requests[1].prompt.tolist() == requests[0].tokens


def test_a_callback_that_raises_costs_no_tokens(model):
    engine = make_engine(model)

    def fail(token):
        raise KeyError(token)

    heard = []
    bad = engine.submit([1], 3, on_token=fail)
    good = engine.submit([2], 3, on_token=heard.append)
    failures = 0
    while True:
        try:
            if not engine.step():
                break
        except KeyError:
            failures += 1
    assert failures == 3
    assert heard == good.tokens
    check_tokens(model, [bad, good])
    check_end(engine)


@pytest.mark.parametrize("draft", [0, DRAFT])
def test_cancelled_requests(model, draft):
    """One decodes, one is being read, and one waits: the others never notice."""
    engine, heard = make_engine(model, draft=draft), []
    stays = engine.submit(prompt_of(0, 70), 60)
    decodes = engine.submit(prompt_of(1, 10), 100, on_token=heard.append)
    while len(decodes.tokens) < 5:
        engine.step()
    reads = engine.submit(prompt_of(2, 200), 5)
    last, waits = (engine.submit(prompt_of(3 + i, 30), 4) for i in range(2))
    engine.step()
    assert engine.running == (stays, decodes, reads)
    assert engine.waiting == (last, waits)
    for request in (decodes, reads, waits):
        engine.cancel(request)
        assert request.finish_reason == "cancelled"
        check_step(engine)
    assert engine.running == (stays,)
    assert engine.waiting == (last,)
    tokens = list(decodes.tokens)
    run(engine)
    check_tokens(model, [stays, last])
    check_tokens(model, [decodes], cancelled=True)
    assert decodes.tokens == heard == tokens
    assert reads.tokens == waits.tokens == []

    engine.cancel(stays)
    assert stays.finish_reason == "length"
    another = make_engine(model).submit([1], 1)
    with pytest.raises(ValueError, match="request 0 is not of this engine"):
        engine.cancel(another)


def test_a_callback_may_cancel(model):
    """With what has come already, nothing more is heard of it; nor of another that it cancels."""
    engine, heard = make_engine(model, draft=DRAFT), []

    def third(token):
        heard.append(token)
        if len(heard) == 3:
            engine.cancel(first)
            engine.cancel(second)

    first = engine.submit([1], 50, on_token=third)
    second = engine.submit([2], 50, on_token=lambda token: others.append(token))
    others = []
    run(engine)
    assert heard == first.tokens[:3]
    assert others == second.tokens[: len(others)]
    assert {first.finish_reason, second.finish_reason} == {"cancelled"}
    check_tokens(model, [first, second], cancelled=True)


def test_nothing_to_do(model):
    engine = make_engine(model)
    assert not engine.step()
    engine.run()
    assert engine.stats.steps == 0


# --- Mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([], 1, "prompt_ids is empty"),
        ([512], 1, "prompt_ids has token 512 at position 0, outside the vocabulary of 512"),
        ([1.5], 1, "prompt_ids must hold integers, got float64"),
        ([1], 0, "max_new_tokens must be at least 1, got 0"),
        ([1] * 500, 11, r"max_new_tokens=11 are 511, more than max_seqlen=510"),
    ],
)
def test_submit_refuses(model, prompt, new, message):
    engine = make_engine(model)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, new)
    assert engine.waiting == ()


def test_submit_refuses_what_can_never_fit(model):
    engine = make_engine(model, num_pages=2)
    engine.submit([1] * 100, 29)  # the last token is not cached
    with pytest.raises(ValueError, match=r"max_new_tokens=30 need 3 pages, .* num_pages=2"):
        engine.submit([1] * 100, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"prompts_at_once": 0}, "prompts_at_once must be at least 1, got 0"),
        ({"draft": -1}, "draft must be at least 0, got -1"),
        ({"max_seqlen": 1}, "max_seqlen must be at least 2, got 1"),
        ({"max_seqlen": 4097}, "at most the model's 4096 positions, got 4097"),
    ],
)
def test_engine_refuses(model, changes, message):
    with pytest.raises(ValueError, match=message):
        make_engine(model, **changes)
