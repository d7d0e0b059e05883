"""`flashmla_jax.layers.mla` against its definition, written out in float64 NumPy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import mla_oracle
import numpy as np
import pytest

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.layers import mha, mla
from flashmla_jax.ops import _ffi

pytestmark = pytest.mark.usefixtures("on_cpu")

V3_YARN = mla.YarnScaling(
    factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
)
# Stretched from position 8 on, with a factor on sines and cosines, and sizes that all differ.
SMALL = mla.MLAConfig(
    hidden_size=20,
    num_heads=3,
    q_lora_rank=28,
    qk_nope_head_dim=12,
    v_head_dim=36,
    rope_scaling=mla.YarnScaling(
        factor=8, original_max_position_embeddings=8, mscale=1.3, mscale_all_dim=0.6
    ),
)
WITHOUT_Q_LORA = dataclasses.replace(SMALL, q_lora_rank=None, rope_scaling=None)


def make_params(config: mla.MLAConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def kernel(n_in: int, n_out: int) -> dict:
        return {"kernel": (rng.standard_normal((n_in, n_out)) * n_in**-0.5).astype(np.float32)}

    def norm(n: int) -> dict:
        return {"scale": (1 + 0.3 * rng.standard_normal(n)).astype(np.float32)}

    q_size = config.num_heads * config.qk_head_dim
    params = {
        "kv_a_proj_with_mqa": kernel(config.hidden_size, 576),
        "kv_a_layernorm": norm(512),
        "kv_b_proj": kernel(512, config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)),
        "o_proj": kernel(config.num_heads * config.v_head_dim, config.hidden_size),
    }
    if config.q_lora_rank is None:
        params["q_proj"] = kernel(config.hidden_size, q_size)
    else:
        params["q_a_proj"] = kernel(config.hidden_size, config.q_lora_rank)
        params["q_a_layernorm"] = norm(config.q_lora_rank)
        params["q_b_proj"] = kernel(config.q_lora_rank, q_size)
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            size = params[name]["kernel"].shape[1]
            params[name]["bias"] = (0.1 * rng.standard_normal(size)).astype(np.float32)
    return params


prefill = jax.jit(mla.prefill, static_argnums=1)
prefill_into_cache = jax.jit(
    mla.prefill_into_cache,
    static_argnums=(1, 4),
    static_argnames=("prefix_chunk", "absorb_prefix"),
)
decode = jax.jit(mla.decode, static_argnums=(1, 4))


@jax.jit
def allocate(cache: PagedKVCache, counts: jax.Array) -> tuple[PagedKVCache, jax.Array]:
    cache, ok = cache.allocate(counts)
    return cache, jnp.all(ok)


def test_softmax_scale_is_that_of_the_published_models():
    v3 = mla.MLAConfig(hidden_size=7168, num_heads=128, q_lora_rank=1536, rope_scaling=V3_YARN)
    assert v3.softmax_scale == pytest.approx(192**-0.5 * 1.8738542)
    yarn = dataclasses.replace(V3_YARN, mscale=0.707, mscale_all_dim=0.707)
    v2 = dataclasses.replace(v3, rope_scaling=yarn)
    assert v2.softmax_scale == pytest.approx(192**-0.5 * 1.5896262, rel=1e-5)
    assert dataclasses.replace(v3, rope_scaling=None).softmax_scale == 192**-0.5


@pytest.mark.parametrize(
    "yarn",
    [
        None,
        V3_YARN,
        SMALL.rope_scaling,
        dataclasses.replace(V3_YARN, factor=32, beta_fast=1.0, beta_slow=0.5),
    ],
)
def test_rope_frequencies(yarn):
    config = dataclasses.replace(SMALL, rope_scaling=yarn, rope_theta=50000.0)
    frequencies = mla.rope_frequencies(config)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, mla_oracle.inv_freq(config), rtol=1e-6)


def test_rope_angles_are_float32_at_long_positions():
    config = mla.MLAConfig(hidden_size=8, num_heads=1, rope_scaling=V3_YARN)
    position = 100_003
    cos, sin = mla.rope_tables(config, jnp.array([[position]], jnp.int32))
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    for dtype, atol in ((jnp.float32, 2e-2), (jnp.bfloat16, 5e-2)):
        rotated = mla.apply_rope(jnp.asarray(x, dtype), cos[0, 0], sin[0, 0])
        assert rotated.dtype == dtype
        np.testing.assert_allclose(
            rotated.astype(np.float32), mla_oracle.rotate(config, x, position), atol=atol
        )


def test_rms_norm_is_float32_inside():
    x = np.random.default_rng(0).standard_normal((5, 300)) * 300.0  # squares overflow float16
    scale = np.linspace(0.5, 1.5, 300)
    out = mla.rms_norm(jnp.asarray(x, jnp.float16), jnp.asarray(scale, jnp.float16), 1e-6)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(out, np.float64), mla_oracle.norm(x, scale), atol=5e-3)


@pytest.mark.parametrize("config", [SMALL, WITHOUT_Q_LORA], ids=["q_lora", "no_q_lora"])
def test_prefill_matches_float64(config):
    params = make_params(config)
    x = np.random.default_rng(1).standard_normal((2, 21, config.hidden_size)).astype(np.float32)
    out, kv = prefill(params, config, x)
    for i in range(len(x)):
        want_out, want_kv = mla_oracle.layer(params, config, x[i])
        np.testing.assert_allclose(out[i], want_out, atol=5e-6)
        np.testing.assert_allclose(kv[i], want_kv, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, WITHOUT_Q_LORA], ids=["q_lora", "no_q_lora"])
def test_decode_matches_float64_across_a_page_border(config):
    """Ragged sequences around the end of a page, continued by 1, 3 and 1 tokens."""
    params, lengths, steps = make_params(config), [60, 17], [1, 3, 1]
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, max(lengths) + sum(steps), config.hidden_size)).astype(np.float32)
    want = [mla_oracle.layer(params, config, x[i]) for i in range(2)]

    cache = PagedKVCache.create(
        num_layers=2, num_pages=3, batch=2, max_pages_per_seq=2, dtype=jnp.float32
    )
    cache, ok = allocate(cache, jnp.array(lengths))
    assert ok.all()
    _, kv = prefill(params, config, x[:, : max(lengths)])
    cache = cache.append(1, kv[:, :, None])

    position = np.array(lengths)
    for step in steps:
        tokens = np.stack([x[i, p : p + step] for i, p in enumerate(position)])
        cache, ok = allocate(cache, jnp.full(2, step))
        assert ok.all()
        out, cache = decode(params, config, tokens, cache, 1)
        for i, p in enumerate(position):
            np.testing.assert_allclose(out[i], want[i][0][p : p + step], atol=5e-6)
        position += step
    for i, p in enumerate(position):
        rows = cache.pages[1][cache.block_table[i], :, 0].reshape(-1, 576)[:p]
        np.testing.assert_allclose(rows, want[i][1][:p], atol=1e-5)
    assert not cache.pages[0].any()  # the other layer's


def test_padding_does_not_reach_shorter_sequences():
    params = make_params(SMALL)
    x = np.random.default_rng(4).standard_normal((1, 9, SMALL.hidden_size)).astype(np.float32)
    out, _ = prefill(params, SMALL, x)
    x[:, 6:] = 1e4
    padded, _ = prefill(params, SMALL, x)
    np.testing.assert_allclose(padded[:, :6], out[:, :6], atol=1e-6)


# --- Into a cache, over what is there ------------------------------------------------------------

# New tokens of each sequence, call by call. Prefixes end within a page, at the end of one, and
# pages later; sequences begin late, rest, and are continued by one token and by more than a page.
CALLS = [(130, 64, 0, 9), (20, 1, 70, 0), (0, 66, 3, 55)]


def poison(cache: PagedKVCache) -> PagedKVCache:
    """NaN wherever the pages hold no token, and garbage where the table holds no page."""
    slot = np.arange(cache.max_pages_per_seq)
    lengths = np.asarray(cache.cache_seqlens - cache.num_new)
    table = np.array(cache.block_table)
    owned = slot < -(-np.asarray(cache.cache_seqlens)[:, None] // 64)
    pages = []
    for pool in cache.pages:
        kept = np.full(pool.shape, np.nan, np.float32)
        for i, length in enumerate(lengths):
            for t in range(length):
                kept[table[i, t // 64], t % 64] = pool[table[i, t // 64], t % 64]
        pages.append(jnp.asarray(kept, pool.dtype))
    garbage = np.array([-(2**31), 2**31 - 1, 0, 10**6])[slot % 4]
    table = jnp.asarray(np.where(owned, table, garbage), jnp.int32)
    return dataclasses.replace(cache, pages=tuple(pages), block_table=table)


@pytest.mark.parametrize(
    ("options", "absorbed"),
    [
        ({"prefix_chunk": 64}, False),
        ({"prefix_chunk": 1024}, True),
        ({"absorb_prefix": True}, False),
        ({"absorb_prefix": True}, True),
    ],
)
def test_prefill_into_cache_matches_float64(options, absorbed):
    params = make_params(SMALL)
    ends = np.cumsum(CALLS, axis=0)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((4, ends.max(), SMALL.hidden_size)).astype(np.float32)
    want = [mla_oracle.layer(params, SMALL, x[i, : ends[-1, i]]) for i in range(4)]
    if absorbed:
        params = mla.absorb(params, SMALL)

    cache = PagedKVCache.create(
        num_layers=2, num_pages=11, batch=4, max_pages_per_seq=4, dtype=jnp.float32
    )
    for counts, end in zip(CALLS, ends, strict=True):
        cache, ok = allocate(cache, jnp.array(counts))
        assert ok.all()
        begin = end - np.array(counts)
        tokens = np.full((4, 133, SMALL.hidden_size), np.nan, np.float32)
        for i, count in enumerate(counts):
            tokens[i, :count] = x[i, begin[i] : end[i]]
        table = cache.block_table
        out, cache = prefill_into_cache(params, SMALL, tokens, poison(cache), 1, **options)
        cache = dataclasses.replace(cache, block_table=table)
        assert np.isfinite(out).all()
        for i, count in enumerate(counts):
            np.testing.assert_allclose(out[i, :count], want[i][0][begin[i] : end[i]], atol=5e-6)
    for i, end in enumerate(ends[-1]):
        rows = cache.pages[1][cache.block_table[i], :, 0].reshape(-1, 576)[:end]
        np.testing.assert_allclose(rows, want[i][1], atol=1e-5)


@pytest.mark.parametrize("absorb_prefix", [False, True])
def test_prefill_into_cache_in_bfloat16(absorb_prefix):
    """Parts merged by their log-sum-exp are as good as attention to all at once."""
    params = make_params(SMALL)
    x = jax.random.normal(jax.random.key(0), (1, 160, SMALL.hidden_size), jnp.bfloat16)
    want, _ = mla_oracle.layer(params, SMALL, np.asarray(x[0], np.float32))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    cache = PagedKVCache.create(num_layers=1, num_pages=3, batch=1, max_pages_per_seq=3)
    errors = []
    for begin, end in ((0, 80), (80, 160)):
        cache, _ = allocate(cache, jnp.array([end - begin]))
        options = {"prefix_chunk": 64, "absorb_prefix": absorb_prefix}
        out, cache = prefill_into_cache(params, SMALL, x[:, begin:end], cache, 0, **options)
        assert out.dtype == jnp.bfloat16
        errors.append(np.abs(np.asarray(out[0], np.float64) - want[begin:end]).max())
    assert max(errors) < 0.06
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize(
    ("tokens", "dtype", "is_fp8", "want"),
    [
        (512, jnp.bfloat16, False, True),
        (513, jnp.bfloat16, False, False),
        (256, jnp.bfloat16, True, True),
        (257, jnp.bfloat16, True, False),
        (16, jnp.float32, False, False),
    ],
)
@pytest.mark.parametrize("has_kernels", [True, False])
def test_few_tokens_attend_to_a_prefix_as_it_lies(
    tokens, dtype, is_fp8, want, has_kernels, monkeypatch
):
    """Where there are kernels for that: the reference would take memory for all of a cache."""
    why = None if has_kernels else "for no reason"
    monkeypatch.setattr(_ffi, "why_no_kernel", lambda *_, **__: why)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), make_params(SMALL))
    x = jax.ShapeDtypeStruct((2, tokens, SMALL.hidden_size), dtype)
    cache = PagedKVCache.create(
        num_layers=1,
        num_pages=20,
        batch=2,
        max_pages_per_seq=10,
        dtype="fp8" if is_fp8 else dtype,
    )
    program = jax.jit(lambda x, cache: mla.prefill_into_cache(params, SMALL, x, cache, 0))
    traced = str(program.trace(x, cache).jaxpr)
    assert ("flash_mla_with_kvcache" in traced) == (want and has_kernels)


@pytest.mark.parametrize("layer", [0, 1])
def test_prefixes_of_fp8_tokens_either_way(layer):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), make_params(SMALL))
    x = jax.random.normal(jax.random.key(layer), (2, 150, SMALL.hidden_size), jnp.bfloat16)
    outs = []
    for absorb_prefix in (False, True):
        cache = PagedKVCache.create(
            num_layers=2, num_pages=6, batch=2, max_pages_per_seq=3, dtype="fp8"
        )
        for begin, counts in ((0, (100, 64)), (100, (50, 0))):
            cache, ok = allocate(cache, jnp.array(counts))
            assert ok.all()
            tokens = x[:, begin : begin + max(counts)]
            out, cache = prefill_into_cache(
                params, SMALL, tokens, cache, layer, absorb_prefix=absorb_prefix
            )
        outs.append(np.asarray(out[0], np.float32))
    assert 0 < np.linalg.norm(outs[1] - outs[0]) < 0.01 * np.linalg.norm(outs[0])


def test_only_the_prefix_is_read(monkeypatch):
    """No prefix, no trip; else as many as the longest prefix of a sequence that goes on has."""
    attention, trips = mha.attention, []

    def counted(*args, kv_lengths=None, **kwargs):
        if kv_lengths is not None:
            jax.debug.callback(lambda: trips.append(1))
        return attention(*args, kv_lengths=kv_lengths, **kwargs)

    monkeypatch.setattr(mha, "attention", counted)
    params, x = make_params(SMALL), jnp.ones((2, 9, SMALL.hidden_size))
    step = jax.jit(
        lambda cache: mla.prefill_into_cache(params, SMALL, x, cache, 0, prefix_chunk=64)
    )
    empty = PagedKVCache.create(
        num_layers=1, num_pages=12, batch=2, max_pages_per_seq=6, dtype=jnp.float32
    )
    for lengths, counts, want in (
        ([0, 0], [5, 9], 0),
        ([64, 1], [5, 9], 1),
        ([65, 300], [5, 0], 2),
    ):
        cache, _ = allocate(empty, jnp.array(lengths))
        cache, ok = allocate(cache, jnp.array(counts))
        assert ok.all()
        jax.block_until_ready(step(cache))
        jax.effects_barrier()
        assert len(trips) == want
        trips.clear()


@pytest.mark.parametrize(
    ("batch", "max_pages", "tokens"),
    [(1, 65, 4096), (2, 65, 2048), (3, 65, 1344), (8, 65, 1024), (1, 5, 320)],
)
def test_tokens_that_are_expanded_at_a_time(batch, max_pages, tokens, monkeypatch):
    """By default: 4096 of the batch's, but at least 1024 of a sequence, if it can have as many."""
    attention, expanded = mha.attention, []

    def noted(q, k, v, *args, kv_lengths=None, **kwargs):
        if kv_lengths is not None:
            expanded.append((k.shape[:2], v.shape[:2]))
        return attention(q, k, v, *args, kv_lengths=kv_lengths, **kwargs)

    monkeypatch.setattr(mha, "attention", noted)
    cache = PagedKVCache.create(
        num_layers=1, num_pages=1, batch=batch, max_pages_per_seq=max_pages, dtype=jnp.float32
    )
    x = jnp.ones((batch, 3, SMALL.hidden_size))
    jax.eval_shape(
        lambda x, cache: mla.prefill_into_cache(make_params(SMALL), SMALL, x, cache, 0), x, cache
    )
    assert set(expanded) == {((batch, tokens), (batch, tokens))}


def test_memory_of_a_long_prefix_is_bounded():
    config = dataclasses.replace(SMALL, num_heads=2)
    create = functools.partial(
        PagedKVCache.create, num_layers=1, batch=1, max_pages_per_seq=2048, dtype=jnp.float32
    )
    cache = jax.eval_shape(functools.partial(create, num_pages=2048))
    x = jax.ShapeDtypeStruct((1, 2048, config.hidden_size), jnp.float32)
    step = jax.jit(
        lambda x, cache: mla.prefill_into_cache(
            make_params(config), config, x, cache, 0, prefix_chunk=256
        ),
        donate_argnums=1,
    )
    memory = step.lower(x, cache).compile().memory_analysis()
    # Scores of the queries with themselves, and of few arrays of the chunk's size. With the whole
    # prefix of 131072 tokens they would be 2 GiB, and its pages are 302 MB.
    assert memory.temp_size_in_bytes < 2 * 2048**2 * 4 * 4
    pool = cache.pages[0]
    assert memory.alias_size_in_bytes >= pool.size * pool.dtype.itemsize


def test_absorbed_weights():
    params = make_params(SMALL)
    absorbed = mla.absorb(params, SMALL)
    w_uk, w_uv = absorbed["kv_b_proj"]["w_uk"], absorbed["kv_b_proj"]["w_uv"]
    kernel = params["kv_b_proj"]["kernel"]
    for head in range(3):
        np.testing.assert_array_equal(w_uk[head], kernel[:, head * 48 : head * 48 + 12])
        np.testing.assert_array_equal(w_uv[head], kernel[:, head * 48 + 12 : head * 48 + 48].T)
    assert list(params["kv_b_proj"]) == ["kernel"]  # as before
    again = mla.absorb(absorbed, SMALL)
    assert again["kv_b_proj"]["w_uk"] is w_uk

    x = jax.random.normal(jax.random.key(0), (2, 21, SMALL.hidden_size))
    np.testing.assert_allclose(
        prefill(absorbed, SMALL, x)[0], prefill(params, SMALL, x)[0], atol=2e-6
    )


def test_a_step_with_absorbed_weights_does_not_prepare_them():
    """Nothing but the two products takes them."""
    cache = PagedKVCache.create(
        num_layers=1, num_pages=2, batch=2, max_pages_per_seq=1, dtype=jnp.float32
    )
    x = jnp.ones((2, 1, SMALL.hidden_size))

    def uses(params):
        jaxpr = jax.make_jaxpr(lambda p: mla.decode(p, SMALL, x, cache, 0)[0])(params).jaxpr
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        kv_b = [
            var for var, path in zip(jaxpr.invars, paths, strict=True) if path[0].key == "kv_b_proj"
        ]
        return [
            eqn.primitive.name
            for eqn in jaxpr.eqns
            if any(var is atom for var in kv_b for atom in eqn.invars)
        ]

    params = make_params(SMALL)
    assert uses(mla.absorb(params, SMALL)) == ["dot_general", "dot_general"]
    assert uses(params) == ["reshape"]


def test_decode_with_absorbed_weights_matches_float64():
    params = make_params(SMALL)
    x = np.random.default_rng(6).standard_normal((1, 70, SMALL.hidden_size)).astype(np.float32)
    want, _ = mla_oracle.layer(params, SMALL, x[0])
    params = mla.absorb(params, SMALL)
    cache = PagedKVCache.create(
        num_layers=1, num_pages=2, batch=1, max_pages_per_seq=2, dtype=jnp.float32
    )
    cache, _ = allocate(cache, jnp.array([63]))
    out, cache = prefill_into_cache(params, SMALL, x[:, :63], cache, 0)
    np.testing.assert_allclose(out[0], want[:63], atol=5e-6)
    for begin, end in ((63, 64), (64, 69), (69, 70)):
        cache, _ = allocate(cache, jnp.array([end - begin]))
        out, cache = decode(params, SMALL, x[:, begin:end], cache, 0)
        np.testing.assert_allclose(out[0], want[begin:end], atol=5e-6)


def test_derivative_is_that_of_the_definition():
    """In float64 differences of the oracle, in a random direction of each parameter."""
    params = make_params(SMALL)
    rng = np.random.default_rng(7)
    x = rng.standard_normal((11, SMALL.hidden_size)).astype(np.float32)
    ct = rng.standard_normal(x.shape)

    def loss(params, x):
        return jnp.sum(mla.prefill(params, SMALL, x[None])[0][0] * ct)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    leaves, treedef = jax.tree.flatten((params, x))
    for i, grad in enumerate(jax.tree.leaves(grads)):
        direction = rng.standard_normal(grad.shape)
        ends = []
        for eps in (1e-5, -1e-5):
            moved = [leaf.astype(np.float64) for leaf in leaves]
            moved[i] = moved[i] + eps * direction
            moved_params, moved_x = jax.tree.unflatten(treedef, moved)
            ends.append(np.sum(mla_oracle.layer(moved_params, SMALL, moved_x)[0] * ct))
        want = (ends[0] - ends[1]) / 2e-5
        assert np.sum(grad * direction) == pytest.approx(want, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prefix_chunk": 100}, "prefix_chunk must be a multiple of 64, got 100"),
        ({"prefix_chunk": 0}, "prefix_chunk must be a multiple of 64, got 0"),
        ({"x": jnp.ones((3, 1, 20))}, r"x must be .* batch 2, got \(3, 1, 20\)"),
        ({"layer": 2}, r"layer must be in \[0, 2\), got 2"),
        ({"layer": jnp.int32(0)}, "layer must be an int for a cache with a pool per layer"),
    ],
)
def test_prefill_into_cache_errors(call, message):
    cache = PagedKVCache.create(
        num_layers=2, num_pages=2, batch=2, max_pages_per_seq=1, dtype=jnp.float32
    )
    call = {"x": jnp.ones((2, 1, 20)), "layer": 0} | call
    with pytest.raises(ValueError, match=message):
        mla.prefill_into_cache(make_params(SMALL), SMALL, cache=cache, **call)


def test_partitioning_gives_devices_whole_heads():
    for config, query in ((SMALL, "q_b_proj"), (WITHOUT_Q_LORA, "q_proj")):
        names = mla.head_partitioning(config, "x")
        assert names == {query: (None, "x"), "kv_b_proj": (None, "x"), "o_proj": ("x", None)}
        mla.check_partitioning(names, mla.parameter_shapes(config))
    for wrong in ({"q_proj": (None, "x")}, {"o_proj": ("x",)}, {"kv_a_layernorm": (None, None)}):
        with pytest.raises(ValueError, match=f"kernels of .*o_proj.*got '{next(iter(wrong))}'"):
            mla.check_partitioning(wrong, mla.parameter_shapes(SMALL))


def test_bfloat16_prefill_and_decode_agree():
    config = SMALL
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), make_params(config))
    x = jax.random.normal(jax.random.key(0), (1, 12, config.hidden_size), jnp.bfloat16)
    out, kv = prefill(params, config, x)
    assert out.dtype == kv.dtype == jnp.bfloat16
    cache = PagedKVCache.create(num_layers=1, num_pages=1, batch=1, max_pages_per_seq=1)
    cache, _ = allocate(cache, jnp.array([12]))
    decoded, _ = decode(params, config, x, cache, 0)
    assert decoded.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        decoded.astype(np.float32), out.astype(np.float32), atol=0.05, rtol=0.05
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kv_lora_rank": 256}, NotImplementedError, r"kv_lora_rank=256"),
        ({"qk_rope_head_dim": 32}, NotImplementedError, r"qk_rope_head_dim=32"),
        ({"num_heads": 0}, ValueError, "num_heads must be positive, got 0"),
        ({"q_lora_rank": 0}, ValueError, "q_lora_rank must be positive or None, got 0"),
    ],
)
def test_config_errors(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SMALL, **changes)


def test_yarn_errors():
    with pytest.raises(ValueError, match=r"positive factor.*factor=0"):
        mla.YarnScaling(factor=0, original_max_position_embeddings=4096)
