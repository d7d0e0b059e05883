"""The engine with drafts from multi-token prediction, against models that have no cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_engine
from test_engine import (
    CHUNK,
    DRAFT,
    MAX_SEQLEN,
    PAGES,
    check_end,
    check_pools_stay_in_place,
    check_step,
    check_tokens,
    prompt_of,
    run,
)

from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.engine import _copy, _decode, _look_ahead, _move_pages, _read
from flashmla_jax.generate import GREEDY, Sampling
from flashmla_jax.models import deepseek, init_params

pytestmark = pytest.mark.usefixtures("on_cpu")

CONFIG = dataclasses.replace(test_engine.CONFIG, num_nextn_predict_layers=1)
LAYER = CONFIG.num_hidden_layers


def make_engine(model, **changes):
    return test_engine.make_engine(model, **({"draft": DRAFT} | changes))


def partly(x, of):
    return jax.tree.map(lambda leaf: of * leaf, x)


def make_model(strength):
    """Parameters with which a token mostly decides the next one, and the module knows that.

    With a `strength` of the layers of 0, it is always so, and the module is always right.
    """
    params = init_params(CONFIG, jax.random.key(0), jnp.float32)
    params["layers"] = partly(params["layers"], strength)
    size = CONFIG.hidden_size
    # Of what the module reads, it passes on the embedding of the newest token.
    passing = jnp.eye(2 * size, size)
    for name in ("self_attn", "mlp"):
        params["mtp"][name] = partly(params["mtp"][name], strength)
    params["mtp"]["eh_proj"] = {
        "kernel": passing + 0.5 * strength * params["mtp"]["eh_proj"]["kernel"]
    }
    return jax.device_put(params, jax.devices("cpu")[0]), CONFIG


@pytest.fixture(scope="module")
def model(on_cpu):
    return make_model(0.3)


# --- The oracle ------------------------------------------------------------------------------


def in_order(params, config, ids):
    """Hidden states after the final norm of an uncached pass over `ids` [s]: float64[s, hidden]."""
    same = {**params, "lm_head": {"kernel": jnp.eye(config.hidden_size)}}
    padded = np.zeros(MAX_SEQLEN + DRAFT, np.int32)
    padded[: len(ids)] = ids
    return np.float64(deepseek.forward(same, config, padded[None])[0, : len(ids)])


def rms_norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * np.float64(scale)


def module_of(params, hidden, next_ids):
    """What the module makes of a whole sequence: hidden states [s, hidden] and latents [s, 576].

    What it reads is put together in float64. The layer, the norm and the head are a model with one
    layer, whose embedding gives just that.
    """
    module, s = params["mtp"], len(hidden)
    embedding = np.float64(params["embed_tokens"]["embedding"])[next_ids]
    both = [
        rms_norm(embedding, module["enorm"]["scale"]),
        rms_norm(hidden, module["hnorm"]["scale"]),
    ]
    x = np.zeros((MAX_SEQLEN + DRAFT, CONFIG.hidden_size), np.float32)
    x[:s] = np.concatenate(both, axis=1) @ np.float64(module["eh_proj"]["kernel"])
    one_layer = {
        "embed_tokens": {"embedding": jnp.asarray(x)},
        "layers": [module],
        "norm": module["shared_head"]["norm"],
        "lm_head": {"kernel": jnp.eye(CONFIG.hidden_size)},
    }
    cache = PagedKVCache.create(
        num_layers=1, num_pages=PAGES + 1, batch=1, max_pages_per_seq=PAGES + 1, dtype=jnp.float32
    )
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=0)
    ids = np.arange(len(x), dtype=np.int32)[None]
    out, cache, ok = deepseek.prefill(
        one_layer, config, ids, np.array([s]), cache, all_positions=True
    )
    assert ok.all()
    return np.float64(out[0, :s]), np.asarray(cache.gather(0)[0, :s, 0])


def check_module(engine, model):
    """What it has in the cache, and what it would guess from, are as without chunks and drafts."""
    latents = np.asarray(engine.cache.gather(LAYER))[:, :, 0]
    lengths = np.asarray(engine.cache.cache_seqlens)
    for member in engine._running:
        length, ids = int(lengths[member.slot]), member.request.ids
        if length == 0:
            continue
        assert length < len(ids)
        hidden = in_order(*model, ids[:length])
        ahead, expected = module_of(model[0], hidden, ids[1 : length + 1])
        np.testing.assert_allclose(latents[member.slot, :length], expected, atol=2e-5)
        if not member.is_reading:
            got = engine._newest.ahead[member.slot]
            np.testing.assert_allclose(got, ahead[-1], atol=2e-5)


def drafts_of(model, ids, length):
    """What is guessed to follow the token at `length`, with those before it in the cache."""
    hidden, next_ids = in_order(*model, ids[:length]), np.array(ids[1 : length + 1])
    head = np.float64(model[0]["lm_head"]["kernel"])
    for _ in range(DRAFT):
        ahead, _ = module_of(model[0], hidden, next_ids)
        next_ids = np.append(next_ids, (ahead[-1] @ head).argmax())
        hidden = np.append(hidden, ahead[-1:], axis=0)
    return next_ids[length:].tolist()


# --- What is generated -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_random_loads(model, seed):
    """With too few pages for all, beginnings in common, and greedy and sampled requests."""
    rng = np.random.default_rng(seed)
    engine, requests = make_engine(model), []

    def submit():
        for _ in range(rng.integers(1, 4)):
            shared = prompt_of(int(rng.integers(2)), int(rng.integers(0, 140)))
            own = rng.integers(0, CONFIG.vocab_size, rng.integers(1, 90)).tolist()
            sampling = Sampling(float(rng.choice([0, 0.3])), 0.9, int(rng.integers(100)))
            stops = rng.integers(0, CONFIG.vocab_size, 5).tolist()
            new = int(rng.integers(1, 70))
            requests.append(engine.submit(shared + own, new, sampling=sampling, stop_tokens=stops))

    run(engine, {int(step): submit for step in rng.integers(0, 30, 4)})
    check_tokens(model, requests)
    assert 0 < engine.stats.accepted < engine.stats.drafted


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.3, 0.9, 1)])
def test_drafts_change_the_number_of_steps_only(model, sampling):
    steps, tokens = [], []
    for drafter in (None, "ngram", "mtp"):
        engine = make_engine(model, draft=DRAFT if drafter else 0, drafter=drafter)
        assert engine.drafter == drafter
        assert engine.cache.num_layers == LAYER + (drafter == "mtp")
        requests = [
            engine.submit(prompt_of(i, n), 60, sampling=sampling) for i, n in enumerate((3, 63))
        ]
        steps.append(run(engine))
        tokens.append([request.tokens for request in requests])
    assert tokens[0] == tokens[1] == tokens[2]
    assert max(steps[1:]) < steps[0]


def test_the_module_has_read_all_that_the_model_has(model):
    """In chunks, beside others, after preemption, with right and wrong drafts, on known prefixes.

    The third prompt begins like the first up to the end of a page, where it goes on differently.
    """
    engine = make_engine(model)
    first = prompt_of(0, 2 * PAGE_SIZE + 9)
    third = [*first[: 2 * PAGE_SIZE], (first[2 * PAGE_SIZE] + 1) % CONFIG.vocab_size, 5]
    prompts = [first, prompt_of(1, CHUNK), third, [*first[:100], 7], prompt_of(2, 60)]
    requests = [engine.submit(prompt, 90 - 9 * i) for i, prompt in enumerate(prompts)]
    more, steps = True, 0
    while more:
        more = engine.step()
        check_step(engine)
        if steps % 3 == 0 or steps < 12:
            check_module(engine, model)
        steps += 1
    check_end(engine)
    check_tokens(model, requests)
    assert engine.stats.preemptions > 0
    assert engine.stats.prefix_tokens > 0
    assert 0 < engine.stats.accepted < engine.stats.drafted


def test_pages_count_as_equal_if_the_token_after_them_is(model):
    engine = make_engine(model)
    first = prompt_of(0, 2 * PAGE_SIZE + 1)
    engine.submit(first, 1)
    run(engine)
    assert engine.pages_cached == 2
    differs = engine.submit([*first[:-1], first[-1] ^ 1, 3], 5)
    same = engine.submit([*first, 3], 5)
    run(engine)
    assert [differs.prefix_tokens, same.prefix_tokens] == [PAGE_SIZE, 2 * PAGE_SIZE]
    check_tokens(model, [differs, same])


# --- What is guessed -------------------------------------------------------------------------


def test_guesses_of_the_module():
    """Of two sequences, beside a slot that is empty; of which the module goes on from its own."""
    params, config = model = make_model(1.0)
    engine = make_engine(model)
    requests = [engine.submit(prompt_of(i, n), 40) for i, n in enumerate((30, 63))]
    look_ahead = jax.jit(_look_ahead, static_argnums=(1, 3))
    engine.step()
    for _ in range(5):
        engine.step()
        cache, ok = engine.cache.allocate(np.array([1 + DRAFT, 1 + DRAFT, 0]))
        assert ok.all()
        drafts, after = look_ahead(params, config, engine._newest.ahead, DRAFT, cache)
        for draft, request in zip(drafts, requests, strict=False):
            assert draft.tolist() == drafts_of(model, request.ids, len(request.ids) - 1)
        jax.tree.map(np.testing.assert_array_equal, after.pages[:-1], cache.pages[:-1])


def test_guesses_that_are_right_are_counted(model):
    """Each step accepts as many as a simulation without a cache does."""
    prompt, new, sampling = prompt_of(0, 20), 40, Sampling(0.5, 0.9, 1)
    engine = make_engine(model, draft=0)
    request = engine.submit(prompt, new + DRAFT + 1, sampling=sampling)
    engine.run()
    ids = [*prompt, *request.tokens]
    expected, length = [], len(prompt)
    while length + 1 < len(prompt) + new:
        drafts = drafts_of(model, ids, length)
        following = ids[length + 1 : length + 1 + DRAFT]
        accepted = 0
        while accepted < DRAFT and drafts[accepted] == following[accepted]:
            accepted += 1
        expected.append(accepted)
        length += 1 + accepted
    assert set(expected) >= {0, 1, 2}

    engine = make_engine(model)
    engine.submit(prompt, new, sampling=sampling)
    accepted, more = [0], True
    while more:
        more = engine.step()
        if engine.stats.drafted == len(accepted) * DRAFT:
            accepted.append(engine.stats.accepted)
    assert np.diff(accepted).tolist() == expected


@pytest.mark.parametrize(("draft", "missing"), [(1, 0), (1, 1), (DRAFT, 0), (DRAFT, DRAFT)])
def test_a_module_that_is_always_right(draft, missing):
    """Also of a request that ends with some of a step's tokens: guesses that it gets count."""
    model = make_model(0.0)
    engine = make_engine(model, draft=draft)
    new = 1 + 6 * (1 + draft) - missing
    requests = [engine.submit(prompt_of(i, CHUNK), new) for i in range(2)]
    run(engine)
    check_tokens(model, requests)
    assert engine.stats.drafted == 2 * 6 * draft
    assert engine.stats.accepted == 2 * (6 * draft - max(missing - 1, 0))
    assert engine.stats.steps == 6  # of which the first one has also read the prompts


def numbers_of_guesses(engine, monkeypatch):
    """A list that gets how many tokens each step to come guesses for a request."""
    guess, numbers = engine._guess, []

    def recorded(runs):
        drafts = guess(runs)
        numbers.append(drafts.shape[1])
        return drafts

    monkeypatch.setattr(engine, "_guess", recorded)
    return numbers


def test_without_pages_for_guesses(model, monkeypatch):
    """A step then decodes as without, and the module goes on with it."""
    engine = make_engine(model)
    numbers = numbers_of_guesses(engine, monkeypatch)
    requests = [engine.submit(prompt_of(i, 2 * PAGE_SIZE), 60) for i in range(2)]
    requests.append(engine.submit(prompt_of(2, 100), 29))
    while engine.step():
        check_step(engine)
        if numbers and numbers[-1] == 0:
            check_module(engine, model)
    assert set(numbers) == {0, DRAFT}
    assert engine.stats.preemptions == 0
    check_tokens(model, requests)
    check_end(engine)


def test_known_prefixes_give_way_to_guesses(model, monkeypatch):
    """A pool that is full of them is as good as an empty one."""
    engine = make_engine(model)
    for i in range(2):
        engine.submit(prompt_of(i, 4 * PAGE_SIZE), 1)
        engine.run()
    assert engine.pages_cached >= PAGES - 1
    numbers = numbers_of_guesses(engine, monkeypatch)
    requests = [engine.submit(prompt_of(2 + i, 50 + 7 * i), 60) for i in range(3)]
    while engine.step():
        check_step(engine)
    assert set(numbers) == {DRAFT}
    check_tokens(model, requests)
    check_end(engine)


# --- How it runs -----------------------------------------------------------------------------


def test_programs_for_each_phase(model):
    programs = (_read, _decode, _move_pages, _copy)
    before = [program._cache_size() for program in programs]
    engine = make_engine(model).compile()
    compiled = [program._cache_size() for program in programs]
    # Of decoding, one without drafts and one with them; those of other tests are the same ones.
    assert all(n - m <= most for n, m, most in zip(compiled, before, (2, 4, 1, 1), strict=True))
    for i, n in enumerate((1, 60, 200, 130, 190)):
        engine.submit(prompt_of(i % 3, n), 90 + 7 * i, sampling=Sampling(0.5 * (i % 2)))
    engine.run()
    assert engine.stats.preemptions > 0
    assert [program._cache_size() for program in programs] == compiled


def test_compile_changes_nothing(model):
    engine = make_engine(model)
    requests = [engine.submit(prompt_of(i, 70), 20) for i in range(4)]
    while engine.compile().step():
        check_step(engine)
        check_module(engine, model)
    check_end(engine)
    check_tokens(model, requests)


def test_pools_stay_in_place(model):
    check_pools_stay_in_place(make_engine(model))


def test_absorbed_parameters(model):
    params, config = model
    engine = make_engine((deepseek.absorb(params, config), config))
    requests = [engine.submit(prompt_of(i, 70), 20) for i in range(2)]
    run(engine)
    check_tokens(model, requests)
    assert engine.stats.accepted > 0


def test_refuses_drafters_that_there_are_not(model):
    with pytest.raises(ValueError, match='drafter must be "mtp", "ngram" or None, got \'eagle\''):
        make_engine(model, drafter="eagle")
    without = {name: value for name, value in model[0].items() if name != "mtp"}
    with pytest.raises(ValueError, match='drafter="mtp" needs parameters with "mtp"'):
        make_engine((without, CONFIG), drafter="mtp")
    assert make_engine((without, CONFIG)).drafter == "ngram"
