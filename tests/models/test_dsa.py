"""Models with an indexer (DeepSeek sparse attention), against Hugging Face.

Their goldens (goldens/make_goldens.py) have prompts of 70 and 23 tokens, of which a token attends
to 16 at most; test_families.py has them too, with prefill and decoding.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import Golden, cached_tokens, load_golden

from flashmla_jax import export_disabled_checks
from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.engine import Engine, _look_ahead
from flashmla_jax.generate import generate
from flashmla_jax.layers import dsa, indexer
from flashmla_jax.models import DeepSeekConfig, deepseek

pytestmark = pytest.mark.usefixtures("on_cpu")

LOGITS = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module", params=["deepseek_v32", "glm_moe_dsa"])
def golden(request) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="module")
def v32() -> Golden:
    return load_golden("deepseek_v32")


def poisoned(cache: PagedKVCache) -> PagedKVCache:
    """The empty cache, with NaN in all pages."""
    pages, index_pages = (
        tuple(jnp.full_like(pool, 255 if pool.dtype == jnp.uint8 else jnp.nan) for pool in pools)
        for pools in (cache.pages, cache.index_pages)
    )
    return dataclasses.replace(cache, pages=pages, index_pages=index_pages)


def cached_index_keys(cache: PagedKVCache, layer: int, sequence: int) -> np.ndarray:
    rows = cache.index_pages[layer][cache.block_table[sequence], :, 0]
    return np.asarray(rows.reshape(-1, rows.shape[-1])[: cache.cache_seqlens[sequence]])


def check_cache(golden: Golden, cache: PagedKVCache) -> None:
    """That the first sequence has all its tokens, as Hugging Face has them."""
    for layer in range(golden.config.num_hidden_layers):
        np.testing.assert_allclose(cached_tokens(cache, layer, 0), golden.latents[layer], atol=2e-5)
        keys = cached_index_keys(cache, layer, 0)
        np.testing.assert_allclose(keys, golden.index_keys[layer], atol=2e-5)


# --- Parity with Hugging Face --------------------------------------------------------------------


def test_goldens_choose_among_more_tokens_than_they_may(golden):
    assert golden.lengths.min() > golden.config.index_topk
    assert golden.config.index_n_heads == 64
    assert golden.lengths.max() > PAGE_SIZE


def test_forward_matches_hugging_face(golden):
    logits = deepseek.forward(golden.params, golden.config, golden.prompts)
    for i, length in enumerate(golden.lengths):
        np.testing.assert_allclose(logits[i, :length], golden.prefill[i, :length], **LOGITS)


def test_decode_steps_match_hugging_face_under_one_program(golden):
    cache = poisoned(golden.cache())
    logits, cache, ok = deepseek.prefill(
        golden.params, golden.config, golden.prompts, golden.lengths, cache
    )
    assert ok.all()
    last = golden.prefill[np.arange(2), golden.lengths - 1]
    np.testing.assert_allclose(logits, last, **LOGITS)
    compiled = deepseek.decode_step._cache_size()
    for step in range(golden.next_ids.shape[1]):
        ids = golden.next_ids[:, step : step + 1]
        logits, cache, ok = deepseek.decode_step(golden.params, golden.config, ids, cache)
        assert ok.all()
        np.testing.assert_allclose(logits[:, 0], golden.decode[:, step], **LOGITS)
    assert deepseek.decode_step._cache_size() == compiled + 1
    check_cache(golden, cache)


@pytest.mark.parametrize("chunk", [32])
def test_chunks_after_a_cached_prefix_match_hugging_face(golden, chunk):
    """Prompts and the tokens after them, a chunk at a time; the second begins a chunk later."""
    params, config = golden.params, golden.config
    extend = jax.jit(deepseek.extend, static_argnums=1)
    compiled = extend._cache_size()
    lengths = golden.lengths + golden.next_ids.shape[1]
    ids = np.zeros((2, 128), np.int32)
    wanted = np.zeros((2, 128, config.vocab_size), np.float32)
    for i, (length, prompt) in enumerate(zip(lengths, golden.lengths, strict=True)):
        ids[i, :length] = [*golden.prompts[i, :prompt], *golden.next_ids[i]]
        wanted[i, :length] = [*golden.prefill[i, :prompt], *golden.decode[i]]

    cache = poisoned(golden.cache())
    done = np.zeros(2, int)
    for step in range(-(-lengths.max() // chunk)):
        counts = np.minimum(lengths - done, chunk)
        counts[1] = 0 if step == 0 else counts[1]
        rows = np.array([1, 0, 2])  # in another order than the batch's, and one of no sequence
        padded = np.pad(done, (0, 1))[rows][:, None] + np.arange(chunk)
        part = np.pad(ids, ((0, 1), (0, chunk)))[rows[:, None], padded]
        logits, hidden, cache, ok = extend(
            params, config, part, rows, np.pad(counts, (0, 1))[rows], cache
        )
        assert ok.all()
        every = deepseek.head(params, config, hidden)
        for at, row in enumerate(rows[:2]):
            if count := counts[row]:
                rest = wanted[row, done[row] : done[row] + count]
                np.testing.assert_allclose(every[at, :count], rest, **LOGITS)
                np.testing.assert_allclose(logits[at], rest[-1], **LOGITS)
        done += counts
    assert extend._cache_size() == compiled + 1
    np.testing.assert_array_equal(cache.cache_seqlens, lengths)
    check_cache(golden, cache)


@pytest.mark.parametrize("s_q", [5])
def test_several_tokens_in_one_decode_step(golden, s_q):
    params, config = golden.params, golden.config
    cache = poisoned(golden.cache())
    _, cache, _ = deepseek.prefill(params, config, golden.prompts, golden.lengths, cache)
    logits, cache, ok = deepseek.decode_step(params, config, golden.next_ids[:, :s_q], cache)
    assert ok.all()
    np.testing.assert_allclose(logits, golden.decode[:, :s_q], **LOGITS)
    # And one that only the first sequence takes part in, which is at the end of its page.
    ids = golden.next_ids[:, s_q : s_q + 1]
    logits, cache, _ = deepseek.decode_step(params, config, ids, cache, np.array([True, False]))
    np.testing.assert_allclose(logits[0, 0], golden.decode[0, s_q], **LOGITS)
    np.testing.assert_array_equal(cache.cache_seqlens, np.add(golden.lengths, [s_q + 1, s_q]))


def test_a_fork_goes_on_with_the_keys_of_its_source(v32):
    """Both write to the page that they share; each attends to its own copy."""
    params, config = v32.params, v32.config
    _, cache, _ = deepseek.prefill(
        params, config, v32.prompts, v32.lengths * [1, 0], poisoned(v32.cache(num_pages=4))
    )
    cache = cache.fork(jnp.array([-1, 0]))
    for step in range(3):
        ids = np.repeat(v32.next_ids[:1, step : step + 1], 2, axis=0)
        logits, cache, ok = deepseek.decode_step(params, config, ids, cache)
        assert ok.all()
        for row in logits[:, 0]:
            np.testing.assert_allclose(row, v32.decode[0, step], **LOGITS)
    table = np.asarray(cache.block_table)
    assert table[0, 0] == table[1, 0]
    assert table[0, 1] != table[1, 1]


def test_the_same_tokens_are_chosen(golden, monkeypatch):
    """In every layer, for every token; of a prompt and what follows, at once."""
    chosen = []

    def choose(*args):
        chosen.append(indexer_choose(*args))
        return chosen[-1]

    indexer_choose = indexer.choose
    monkeypatch.setattr(dsa.indexer, "choose", choose)
    ids = np.concatenate([golden.prompts[0], golden.next_ids[0]])[None]
    deepseek._run_sequences(golden.params, golden.config, ids)
    assert len(chosen) == golden.config.num_hidden_layers
    for layer, positions in enumerate(chosen):
        assert positions.shape == (1, 78, 16)
        for token in range(78):
            wanted = golden.selected[layer, token]
            found = np.asarray(positions[0, token])
            assert set(found.tolist()) == set(wanted.tolist()), (layer, token)
            assert len(set(found.tolist()) - {-1}) == min(token + 1, 16)


# --- What would be another model -----------------------------------------------------------------


def error(golden: Golden, config: DeepSeekConfig, params: dict | None = None) -> float:
    logits = deepseek.forward(golden.params if params is None else params, config, golden.prompts)
    return float(np.abs(logits[0] - golden.prefill[0]).max())


@pytest.mark.parametrize(
    "changes",
    [{"index_topk": 17}, {"index_topk": 1000}, {"rope": True}],
    ids=str,
)
def test_another_choice_is_another_model(golden, changes):
    if "rope" in changes:
        changes = {"indexer_rope_interleave": not golden.config.indexer.rope_interleave}
    assert error(golden, dataclasses.replace(golden.config, **changes)) > 1e-2


@pytest.mark.parametrize(
    ("name", "leaf", "factor"), [("k_norm", "bias", 0), ("weights_proj", "kernel", -1)]
)
def test_another_indexer_is_another_model(v32, name, leaf, factor):
    def change(layer: dict) -> dict:
        index = layer["self_attn"]["indexer"]
        changed = {**index[name], leaf: index[name][leaf] * factor}
        index = {**index, name: changed}
        return {**layer, "self_attn": {**layer["self_attn"], "indexer": index}}

    params = {**v32.params, "layers": [change(layer) for layer in v32.params["layers"]]}
    assert error(v32, v32.config, params) > 1e-2


def test_where_all_tokens_are_chosen_attention_is_dense(v32):
    """A sequence that cannot be longer than that has no choice, and the cache keeps its keys."""
    params, config = v32.params, dataclasses.replace(v32.config, index_topk=128)
    ids = np.concatenate([v32.prompts[:1], v32.next_ids[:1]], axis=1)
    wanted = deepseek.forward(params, config, ids)
    for topk in (70, 128):  # in `prefill` or not, and with room for 128 tokens in the cache
        changed = dataclasses.replace(config, index_topk=topk)
        _, cache, _ = deepseek.prefill(
            params, changed, v32.prompts, v32.lengths, poisoned(v32.cache())
        )
        logits, cache, _ = deepseek.decode_step(params, changed, v32.next_ids[:, :1], cache)
        if topk > 70:
            np.testing.assert_allclose(logits[0, 0], wanted[0, 70], **LOGITS)
        else:
            assert np.abs(logits[0, 0] - wanted[0, 70]).max() > 1e-4
        keys = cached_index_keys(cache, 0, 0)
        np.testing.assert_allclose(keys, v32.index_keys[0][:71], atol=2e-5)


# --- Around the model ----------------------------------------------------------------------------


def test_a_cache_without_keys_is_refused(v32):
    cache = PagedKVCache.create(
        num_layers=2, num_pages=3, batch=2, max_pages_per_seq=2, dtype=jnp.float32
    )
    with pytest.raises(ValueError, match=r"index_head_dim=72, it has index_head_dim=0"):
        deepseek.decode_step(v32.params, v32.config, v32.next_ids[:, :1], cache)


def test_absorbed_parameters_give_the_same_logits(golden):
    config, params = golden.config, deepseek.absorb(golden.params, golden.config)
    logits, cache, _ = deepseek.prefill(
        params, config, golden.prompts, golden.lengths, golden.cache()
    )
    np.testing.assert_allclose(logits, golden.prefill[[0, 1], golden.lengths - 1], atol=2e-5)
    logits, _, _ = deepseek.decode_step(params, config, golden.next_ids[:, :1], cache)
    np.testing.assert_allclose(logits[:, 0], golden.decode[:, 0], atol=2e-5)


def test_an_exported_decode_step_serves_every_batch_and_table(v32):
    batch, num_pages, pages = jax.export.symbolic_shape("batch, num_pages, pages")
    create = functools.partial(
        PagedKVCache.create, num_layers=2, dtype=jnp.float32, index_head_dim=72
    )
    cache = jax.eval_shape(
        functools.partial(create, num_pages=num_pages, batch=batch, max_pages_per_seq=pages)
    )
    ids = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    step = jax.jit(functools.partial(deepseek.decode_step, v32.params, v32.config))
    checks = export_disabled_checks()
    exported = jax.export.export(step, platforms=["cpu"], disabled_checks=checks)(ids, cache)
    for n, pages in ((1, 3), (2, 2)):
        cache = create(num_pages=n + 2, batch=n, max_pages_per_seq=pages)
        prompts, lengths = v32.prompts[:n], v32.lengths[:n]
        _, cache, _ = deepseek.prefill(v32.params, v32.config, prompts, lengths, cache)
        logits, _, ok = exported.call(v32.next_ids[:n, :1], cache)
        assert ok.all()
        np.testing.assert_allclose(logits[:, 0], v32.decode[:n, 0], **LOGITS)


def test_no_sequences(v32):
    ids = np.zeros((0, 40), np.int32)
    assert deepseek.forward(v32.params, v32.config, ids).shape == (0, 40, 96)
    cache = v32.cache(batch=0)
    logits, cache, _ = deepseek.prefill(v32.params, v32.config, ids, np.zeros(0, np.int32), cache)
    assert logits.shape == (0, 96)
    logits, _, _ = deepseek.decode_step(v32.params, v32.config, ids[:, :1], cache)
    assert logits.shape == (0, 1, 96)


@pytest.mark.parametrize("index_dtype", [jnp.bfloat16, "fp8"])
def test_bfloat16(v32, random_params, index_dtype):
    """Without experts, as in test_deepseek.py; of the tokens that are chosen, a few differ."""
    config = dataclasses.replace(v32.config, first_k_dense_replace=2, index_head_dim=80)
    params = random_params(config)
    cache = PagedKVCache.create(
        num_layers=2,
        num_pages=3,
        batch=2,
        max_pages_per_seq=2,
        index_head_dim=80,
        index_dtype=index_dtype,
    )
    _, cache, ok = deepseek.prefill(params, config, v32.prompts, v32.lengths, poisoned(cache))
    assert ok.all()
    logits, _, _ = deepseek.decode_step(params, config, v32.next_ids[:, :1], cache)
    ids = np.concatenate([v32.prompts[:1], v32.next_ids[:1, :1]], axis=1)
    dense = deepseek.forward(params, config, ids)
    assert np.isfinite(logits).all()
    assert np.abs(logits[0, 0] - dense[0, 70]).mean() < 0.15  # logits deviate by about 1


def test_an_fp8_cache(v32, random_params):
    """Latents and index keys are rounded; it is no matter which tokens are read together."""
    config = dataclasses.replace(v32.config, first_k_dense_replace=2, index_head_dim=80)
    params = random_params(config, dtype=jnp.float32)
    tokens = np.concatenate([v32.prompts[0], v32.next_ids[0]])  # 78
    extend = jax.jit(deepseek.extend, static_argnums=1)
    logits = []
    for together in (78, 75):
        cache = PagedKVCache.create(
            num_layers=2, num_pages=2, batch=1, max_pages_per_seq=2, dtype="fp8", index_head_dim=80
        )
        ids = np.zeros((1, 78), np.int32)
        ids[0, :together] = tokens[:together]
        out, _, cache, ok = extend(
            params, config, ids, np.array([0]), np.array([together]), poisoned(cache)
        )
        assert ok.all()
        for token in tokens[together:]:
            out, cache, _ = deepseek.decode_step(params, config, np.array([[token]]), cache)
            out = out[:, 0]
        logits.append(np.asarray(out[0]))
    np.testing.assert_allclose(*logits, **LOGITS)
    exact = deepseek.forward(params, config, tokens[None])[0, -1]
    assert 1e-4 < np.abs(logits[0] - exact).max() < 0.3


@functools.cache
def random_model(num_nextn_predict_layers: int = 0) -> DeepSeekConfig:
    return DeepSeekConfig(
        model_type="deepseek_v32",
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=16,
        index_n_heads=64,
        index_head_dim=64,
        index_topk=16,
        num_nextn_predict_layers=num_nextn_predict_layers,
    )


def check_greedy(
    config: DeepSeekConfig, params: dict, prompt: list[int], tokens: list[int]
) -> None:
    logits = deepseek.forward(params, config, np.array([[*prompt, *tokens]]))
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("mtp", [0, 1])
def test_the_engine(random_params, mtp):
    """Chunked prompts that share a prefix, and drafts (of a module with an indexer of its own)."""
    config = random_model(mtp)
    params = random_params(config, dtype=jnp.float32)
    engine = Engine(
        params, config, num_pages=12, max_seqlen=160, slots=3, chunk=32, draft=2, prompts_at_once=2
    )
    engine.cache = poisoned(engine.cache)
    assert len(engine.cache.index_pages) == 2 + mtp
    shared = np.random.default_rng(0).integers(0, 60, 70).tolist()
    prompts = [shared, [*shared, 5, 6], [7, 8, 9], [*shared[:66], 1]]
    requests = [engine.submit(prompt, max_new_tokens=12, stop_tokens=()) for prompt in prompts]
    engine.run()
    for request in requests:
        assert len(request.tokens) == 12
        check_greedy(config, params, list(request.prompt), list(request.tokens))


def test_drafts_leave_their_index_keys(random_params):
    """In the module's layer, beside their latents."""
    config = random_model(1)
    params = random_params(config, dtype=jnp.float32)
    cache = PagedKVCache.create(
        num_layers=3,
        num_pages=2,
        batch=2,
        max_pages_per_seq=1,
        dtype=jnp.float32,
        index_head_dim=64,
    )
    cache, _ = poisoned(cache).allocate(jnp.int32([4, 0]))
    look_ahead = jax.jit(_look_ahead, static_argnums=(1, 3))
    drafts, cache = look_ahead(params, config, jnp.ones((2, 32)), 4, cache)
    assert drafts.shape == (2, 4)
    for pools in (cache.pages, cache.index_pages):
        rows = pools[2][cache.block_table[0, 0], :, 0]
        # Of the last one, none is needed.
        np.testing.assert_array_equal(np.isfinite(rows).all(axis=-1), np.arange(64) < 3)


def test_generate(random_params):
    config = random_model()
    params = random_params(config, dtype=jnp.float32)
    prompts = [np.arange(50) % 60, np.arange(7)]
    result = generate(params, config, prompts, max_new_tokens=20, stop_tokens=())
    for prompt, tokens in zip(prompts, result, strict=True):
        check_greedy(config, params, prompt.tolist(), list(map(int, tokens)))
