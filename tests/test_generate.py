"""Generation against the model's uncached forward pass, token by token."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.generate import (
    Generation,
    Sampling,
    _begin,
    _continue,
    _in_order,
    _nucleus_end,
    _round_up,
    _score_token,
    generate,
    sample,
    score,
)
from flashmla_jax.layers import YarnScaling, mla
from flashmla_jax.models import DeepSeekConfig, deepseek, init_params

pytestmark = pytest.mark.usefixtures("on_cpu")

CONFIG = DeepSeekConfig(
    model_type="deepseek_v3",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=32,
    qk_nope_head_dim=16,
    v_head_dim=16,
    moe_intermediate_size=32,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    routed_scaling_factor=0.5,
    first_k_dense_replace=1,
    rope_scaling=YarnScaling(factor=40, original_max_position_embeddings=64, mscale_all_dim=1.0),
)
PROMPTS = [[3, 1, 4], list(range(40, 110)), [7], [5, 9, 2, 6, 5, 3, 5, 8]]


@pytest.fixture(scope="module")
def model(on_cpu):
    return init_params(CONFIG, jax.random.key(0), jnp.float32), CONFIG


def forward(model, rows):
    """Logits of an uncached pass over sequences of different lengths, padded."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return np.asarray(deepseek.forward(*model, ids))


# --- What is generated -----------------------------------------------------------------------


def test_greedy_is_the_argmax_of_a_forward_pass(model):
    """Over page borders, with every step's logits those of the uncached model."""
    generation = Generation(*model, PROMPTS, 70)
    steps = list(generation)
    assert len(steps) == 70
    new = np.array([step.tokens for step in steps]).T
    logits = forward(model, [[*p, *t] for p, t in zip(PROMPTS, new.tolist(), strict=True)])
    for i, prompt in enumerate(PROMPTS):
        dense = logits[i, len(prompt) - 1 :][:70]
        np.testing.assert_allclose([s.logits[i] for s in steps], dense, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(new[i], dense.argmax(-1))
    # The last token of a sequence was not read.
    lengths = np.array([len(p) + 69 for p in PROMPTS])
    np.testing.assert_array_equal(generation.cache.cache_seqlens, lengths)
    assert generation.cache.num_used == sum(-(-lengths // PAGE_SIZE))


def test_generate_returns_the_steps_tokens(model):
    seen = []
    result = generate(*model, PROMPTS, 5, on_step=lambda step: seen.append(step.tokens))
    assert result == np.array(seen).T.tolist()
    assert result == np.array([s.tokens for s in Generation(*model, PROMPTS, 5)]).T.tolist()


def test_one_new_token_needs_no_decode_step(model):
    (step,) = Generation(*model, PROMPTS, 1)
    assert len(step.tokens) == len(PROMPTS)


def test_prompts_may_be_arrays(model):
    prompts = [np.array(p, np.int64) for p in PROMPTS]
    assert generate(*model, prompts, 3) == generate(*model, PROMPTS, 3)


def test_bfloat16():
    params = init_params(CONFIG, jax.random.key(0), jnp.bfloat16)
    generation = Generation(params, CONFIG, PROMPTS, 3)
    assert generation.cache.dtype == jnp.bfloat16
    for step in generation:
        assert np.isfinite(step.logits).all()


# --- How it runs -----------------------------------------------------------------------------


def test_two_programs_for_everything(model):
    """Steps, lengths of the same size class and sampling parameters compile nothing."""
    before = _begin._cache_size(), _continue._cache_size()
    for prompts, max_new_tokens, sampling in [
        ([[1, 2], [3] * 60], 66, Sampling(0.5)),
        ([[4] * 50, [5]], 70, Sampling(1.5, 0.9, 7)),
    ]:
        list(Generation(*model, prompts, max_new_tokens, sampling=sampling).compile())
        list(Generation(*model, prompts, max_new_tokens, sampling=sampling))
    assert (_begin._cache_size() - before[0], _continue._cache_size() - before[1]) == (1, 1)


def test_committed_parameters_compile_once_too(model):
    params = jax.device_put(model[0], jax.devices("cpu")[0])
    before = _continue._cache_size()
    generate(params, model[1], PROMPTS, 40)
    assert _continue._cache_size() == before + 1


def test_parameters_are_absorbed_once(model):
    """By a generation, unless they are already; nothing else decodes with other ones."""
    params, config = model
    generation = Generation(params, config, PROMPTS, 5)
    assert "w_uk" in generation._model.params["layers"][1]["self_attn"]["kv_b_proj"]
    assert "kernel" in params["layers"][1]["self_attn"]["kv_b_proj"]  # the caller's, as before
    absorbed = deepseek.absorb(params, config)
    same = Generation(absorbed, config, PROMPTS, 5)
    for ours, given in zip(same._model.leaves, jax.tree.leaves(absorbed), strict=True):
        assert ours is given
    assert [s.tokens for s in same] == [s.tokens for s in generation]


def test_pools_stay_in_place(model):
    generation = Generation(*model, PROMPTS, 20)
    addresses = [pool.unsafe_buffer_pointer() for pool in generation.cache.pages]
    for _ in generation.compile():
        now = [pool.unsafe_buffer_pointer() for pool in generation.cache.pages]
        assert now == addresses


def test_compile_changes_nothing(model):
    generation = Generation(*model, PROMPTS, 5).compile()
    assert generation.cache.num_used == 0
    assert not generation.cache.cache_seqlens.any()
    tokens = [step.tokens for step in generation]
    assert tokens == [step.tokens for step in Generation(*model, PROMPTS, 5)]


def test_steps_come_one_by_one(model):
    generation = Generation(*model, PROMPTS, 100)
    steps = iter(generation)
    next(steps)
    assert max(generation.cache.cache_seqlens) <= 71  # one step ahead
    with pytest.raises(RuntimeError, match="only once"):
        next(iter(generation))


# --- Ends ------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_sequence_and_leaves_the_others(model):
    free_running = generate(*model, PROMPTS, 12)
    stop = free_running[1][4]
    generation = Generation(*model, PROMPTS, 12, stop_tokens=[stop])
    steps = [step.tokens for step in generation]
    for i, tokens in enumerate(free_running):
        end = tokens.index(stop) + 1 if stop in tokens else 12
        column = [step[i] for step in steps]
        assert column[:end] == tokens[:end]
        assert column[end:] == [None] * (len(steps) - end)
        assert generation.cache.cache_seqlens[i] == len(PROMPTS[i]) + min(end, 12) - 1


def test_all_finished_ends_early(model):
    tokens = generate(*model, PROMPTS, 12)
    stops = [row[2] for row in tokens]
    steps = list(Generation(*model, PROMPTS, 12, stop_tokens=stops))
    assert len(steps) <= 3


@pytest.mark.parametrize(("eos", "stops"), [(None, set()), (7, {7}), ((7, 9), {7, 9})])
def test_eos_of_the_configuration_stops(model, eos, stops):
    config = dataclasses.replace(CONFIG, eos_token_id=eos)
    assert Generation(model[0], config, PROMPTS, 1)._stop_tokens == stops
    assert Generation(model[0], config, PROMPTS, 1, stop_tokens=())._stop_tokens == set()


# --- Sampling --------------------------------------------------------------------------------


def test_seed_decides(model):
    def sample(seed):
        return generate(*model, PROMPTS, 10, sampling=Sampling(1.0, 0.95, seed))

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_neighbours_do_not_matter(model):
    sampling = Sampling(temperature=1.0, seed=3)
    first = generate(*model, PROMPTS, 20, sampling=sampling)
    others = [[9] * 30, PROMPTS[1], [8] * 64, [1]]
    second = generate(*model, others, 20, sampling=sampling)
    assert first[1] == second[1]
    assert first[0] != second[0]


def test_same_prompts_are_sampled_differently(model):
    first, second = generate(*model, [[1, 2]] * 2, 20, sampling=Sampling(1.0))
    assert first != second


def test_small_top_p_is_greedy(model):
    sampling = Sampling(temperature=1.0, top_p=1e-6)
    assert generate(*model, PROMPTS, 10, sampling=sampling) == generate(*model, PROMPTS, 10)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9)])
def test_distribution(temperature, top_p):
    """Frequencies over many draws, and nothing from outside the nucleus."""
    logits = np.float32([2.0, -1.0, 1.5, 0.0, 1.0, -np.inf])
    p = np.exp(logits / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    nucleus = order[: np.searchsorted(np.cumsum(p[order]), top_p - 1e-6) + 1]
    wanted = np.zeros_like(p)
    wanted[nucleus] = p[nucleus] / p[nucleus].sum()

    n = 20_000
    draw = jax.jit(jax.vmap(sample, (0, None, None, None)))
    drawn = draw(jax.random.split(jax.random.key(0), n), logits, temperature, top_p)
    count = collections.Counter(np.asarray(drawn).tolist())
    assert set(count) == set(np.flatnonzero(wanted).tolist())
    for token, probability in enumerate(wanted):
        error = 5 * np.sqrt(probability * (1 - probability) / n)
        assert abs(count[token] / n - probability) <= error


@pytest.mark.parametrize("seed", range(8))
def test_nucleus(seed):
    """Which tokens are in it, of many, some of them equally likely, against float64."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.choice([0.5, 3, 10]), 2000).astype(np.float32)
    logits[rng.integers(2000, size=300)] = rng.choice([-np.inf, 0, -0.0, 1.5, -1.5], 300)
    p = np.exp(logits.astype(np.float64) - logits.max())
    values = np.unique(logits[np.isfinite(logits)])[::-1]
    mass = np.cumsum([p[logits == value].sum() for value in values]) / p.sum()
    in_nucleus = jax.jit(lambda top_p: _in_order(logits) >= _nucleus_end(logits, top_p))
    before = np.concatenate([[0], mass[:-1]])
    ends = np.flatnonzero(mass - before > 1e-5)  # float32 sums cannot tell others
    for end in {*ends[[0, 1, 2, -1]], *rng.choice(ends, 6)}:
        top_p = np.float32((before[end] + mass[end]) / 2)
        np.testing.assert_array_equal(in_nucleus(top_p), logits >= values[end])


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1, 1e-38), (1, 1e-50), (1e-50, 1), (1e-38, 1), (1e-38, 1e-38)]
)
def test_what_is_next_to_zero(temperature, top_p):
    """As far as float32 can tell: the most likely token is drawn."""
    rng = np.random.default_rng(0)
    draw, key = jax.jit(sample), jax.random.key(1)
    for scale in (1, 1e30):
        logits = (rng.standard_normal(500) * scale).astype(np.float32)
        drawn = draw(key, logits, jnp.float32(temperature), jnp.float32(top_p))
        assert drawn == logits.argmax()


# --- Scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill", [None, 0, 1, 63, 64, 65, 99, 100])
def test_score(model, prefill):
    ids = np.random.default_rng(0).integers(0, model[1].vocab_size, 100)
    logits = forward(model, [ids])[0].astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    actual = score(*model, ids.tolist(), prefill)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, wanted[np.arange(99), ids[1:]], atol=1e-5, rtol=0)


def test_score_decodes_with_one_program(model):
    before = _score_token._cache_size()
    score(*model, range(1, 200), 7)
    assert _score_token._cache_size() <= before + 1


def test_score_absorbs_for_decoding_only(model, monkeypatch):
    params, config = model
    absorbed = deepseek.absorb(params, config)
    prefilled, decoded = score(*model, range(9)), score(*model, range(9), 3)
    np.testing.assert_array_equal(score(absorbed, config, range(9), 3), decoded)

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(mla, "absorb", refuse)
    np.testing.assert_array_equal(score(*model, range(9)), prefilled)
    score(absorbed, config, range(9), 3)
    with pytest.raises(AssertionError):
        score(*model, range(9), 3)


@pytest.mark.parametrize("prefill", [None, 0, 1])
def test_score_of_one_token_is_empty(model, prefill):
    assert score(*model, [5], prefill).shape == (0,)


# --- Sizes and mistakes ----------------------------------------------------------------------


def test_sizes_are_few_and_waste_at_most_an_eighth():
    sizes = [_round_up(n) for n in range(1, 5000)]
    assert all(n <= size <= n * 9 / 8 for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 100


def test_smallest_pool_that_holds_the_batch(model):
    """Prompt 1 ends with 70 + 59 cached tokens, prompt 0 with 3 + 59."""
    assert generate(*model, PROMPTS[:2], 60, num_pages=4) == generate(*model, PROMPTS[:2], 60)
    with pytest.raises(ValueError, match=r"num_pages=3 is too small: 2 sequences .* need 4 pages"):
        generate(*model, PROMPTS[:2], 60, num_pages=3)


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 1, "prompts is empty"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1], [2, 512]], 1, "prompt 1 has token 512 at position 1, outside the vocabulary of 512"),
        ([[-1]], 1, "token -1 at position 0"),
        ([[1.5]], 1, "must hold integers, got float64"),
        ([[[1]]], 1, r"got shape \(1, 1\)"),
        ([[1]], 0, "max_new_tokens must be at least 1, got 0"),
        ([[1, 2]], 10**6, "would be 1000001 tokens long, and the model has"),
    ],
)
def test_bad_prompts(model, prompts, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        Generation(*model, prompts, max_new_tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "got 1.1"),
    ],
)
def test_bad_sampling(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


@pytest.mark.parametrize("prefill", [-1, 4])
def test_bad_prefill(model, prefill):
    with pytest.raises(ValueError, match=rf"prefill must be in \[0, 3\].* got {prefill}"):
        score(*model, [1, 2, 3], prefill)


def test_score_checks_ids(model):
    with pytest.raises(ValueError, match="ids has token 99999"):
        score(*model, [1, 99999])
