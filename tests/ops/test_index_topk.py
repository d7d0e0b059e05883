"""The choice of cached tokens by an indexer's scores, where kernels make it and where XLA does.

Numbers are whole and small, so that scores are exact in every order of summation, and many are
equal: then the choice has one right answer.
"""

from __future__ import annotations

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.cache import index_keys
from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.layers import indexer
from flashmla_jax.ops import _ffi, index_topk

DIM = index_topk.HEAD_DIM
FORMATS = {"bf16": jnp.bfloat16, "f16": jnp.float16, "fp8": jnp.uint8}


class Problem:
    """Sequences of `lengths` tokens in random pages, with NaN in all that is not theirs."""

    def __init__(self, rng, lengths, s, heads, fmt="bf16", spread=2, spare=3):
        batch, width = len(lengths), max(-(-max(lengths) // PAGE_SIZE), 1) + spare
        num_pages = sum(-(-n // PAGE_SIZE) for n in lengths) + 5
        self.q = rng.integers(-1, 2, (batch, s, heads, DIM)).astype(np.float32)
        self.weights = rng.integers(-2, 3, (batch, s, heads)).astype(np.float32)
        kinds = rng.integers(-spread, spread + 1, (97, DIM)).astype(np.float32)
        kinds[0] = 0
        self.keys = [kinds[rng.integers(0, len(kinds), n)] for n in lengths]
        if fmt == "fp8":  # tokens have different scales
            self.keys = [k * 2.0 ** (np.arange(len(k)) % 4)[:, None] for k in self.keys]
        pool = np.full((num_pages, PAGE_SIZE, 1, DIM), np.nan, np.float32)
        order, used = rng.permutation(num_pages), 0
        self.table = rng.choice([-1, -9, num_pages, 2**31 - 1], (batch, width)).astype(np.int32)
        for i, keys in enumerate(self.keys):
            for slot in range(-(-len(keys) // PAGE_SIZE)):
                page, used = order[used], used + 1
                self.table[i, slot] = page
                part = keys[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE]
                pool[page, : len(part), 0] = part
        self.pool = index_keys.pack(jnp.asarray(pool), FORMATS[fmt])
        self.dtype = jnp.float16 if fmt == "f16" else jnp.bfloat16
        # Causal, and sometimes none.
        self.num_visible = np.array(lengths)[:, None] - s + np.arange(1, s + 1)

    def arguments(self):
        q = jnp.asarray(self.q, self.dtype)
        return q, self.weights, self.pool, self.table, self.num_visible.astype(np.int32)

    def wanted(self, topk):
        positions = np.full((*self.num_visible.shape, topk), -1, np.int32)
        for (i, j), visible in np.ndenumerate(self.num_visible):
            keys = np.float64(self.keys[i][: max(visible, 0)])
            products = np.maximum(np.float64(self.q[i, j]) @ keys.T, 0)
            scores = np.float64(self.weights[i, j]) @ products
            best = np.argsort(-scores, kind="stable")[:topk]
            positions[i, j, : len(best)] = np.sort(best)
        return positions


@functools.partial(jax.jit, static_argnames="topk")
def choose(*arguments, topk):
    return indexer.choose_cached(*arguments, topk)


LENGTHS = (0, 1, 63, 64, 65, 700, 2048, 3001)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("s", "heads"), [(1, 64), (3, 5), (9, 70)])
def test_is_exact(fmt, s, heads):
    rng = np.random.default_rng(s)
    problem = Problem(rng, LENGTHS, s, heads, fmt)
    for topk in (1, 64, 500, 2048):
        chosen = choose(*problem.arguments(), topk=topk)
        np.testing.assert_array_equal(chosen, problem.wanted(topk), err_msg=f"{topk=}")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("s", "heads"), [(5, 64), (2, 129), (2, 200), (1, 256)])
def test_tiles_of_query_tokens(fmt, s, heads):
    """On a GPU four query tokens of up to 64 heads are scored together, or one of more than 128."""
    rng = np.random.default_rng(heads)
    problem = Problem(rng, (700, 65, 0, 260), s, heads, fmt)
    for topk in (50, 300):
        chosen = choose(*problem.arguments(), topk=topk)
        np.testing.assert_array_equal(chosen, problem.wanted(topk), err_msg=f"{topk=}")


@pytest.mark.parametrize("longest", [9_000, 20_000, 40_000])
def test_clusters(longest):
    """On a GPU they are of 2, 4 or 8 thread blocks: some have no scores, some have all chosen."""
    rng = np.random.default_rng(longest)
    problem = Problem(rng, (longest, 2100, 100, 0), 1, 3)
    for topk in (64, 2048):
        chosen = choose(*problem.arguments(), topk=topk)
        np.testing.assert_array_equal(chosen, problem.wanted(topk), err_msg=f"{topk=}")


def test_equal_scores_are_chosen_from_the_front():
    """Of all keys that are the same; beside one that is better, and one that is worse."""
    rng = np.random.default_rng(1)
    problem = Problem(rng, (9000,), 1, 64)
    problem.q[:], problem.weights[:] = 1, 1
    keys = problem.keys[0] = np.ones((9000, DIM), np.float32)
    keys[8111], keys[13] = 2, 0
    pool = np.zeros(problem.pool.shape, np.float32)
    pool[problem.table[0, :141]] = np.pad(keys, ((0, 24), (0, 0))).reshape(141, 64, 1, DIM)
    problem.pool = jnp.asarray(pool, jnp.bfloat16)
    chosen = choose(*problem.arguments(), topk=2048)
    np.testing.assert_array_equal(chosen, problem.wanted(2048))
    np.testing.assert_array_equal(chosen[0, 0], [*range(13), *range(14, 2048), 8111])


def test_scores_of_any_size_and_sign():
    """Each bit of a score counts, in the order that floating-point numbers have."""
    rng = np.random.default_rng(2)
    tokens, topk = 5000, 700
    problem = Problem(rng, (tokens,), 1, 2)
    exponents = rng.integers(-60, 60, tokens)
    mantissas = rng.integers(128, 256, tokens)
    sizes = (mantissas * 2.0**exponents).astype(np.float32)
    sizes[rng.random(tokens) < 0.1] = 0
    # One head's weight is positive and the other's is negative.
    problem.q[:] = 0
    problem.q[0, 0, 0, 0] = problem.q[0, 0, 1, 1] = 1
    problem.weights[0, 0] = 1, -1
    keys = np.zeros((tokens, DIM), np.float32)
    keys[np.arange(tokens), rng.integers(0, 2, tokens)] = sizes
    problem.keys = [keys]
    pool = np.zeros(problem.pool.shape, np.float32)
    pages = -(-tokens // PAGE_SIZE)
    pool[problem.table[0, :pages]] = np.pad(
        keys, ((0, pages * PAGE_SIZE - tokens), (0, 0))
    ).reshape(pages, PAGE_SIZE, 1, DIM)
    problem.pool = jnp.asarray(pool, jnp.bfloat16)
    for topk in (700, 2600, 4400):
        np.testing.assert_array_equal(
            choose(*problem.arguments(), topk=topk), problem.wanted(topk), err_msg=f"{topk=}"
        )


@pytest.mark.parametrize("fmt", FORMATS)
def test_heads_of_any_size(fmt):
    """With a query's heads from 2^-30 to 2^30, next to nothing in each, and weights to match."""
    rng = np.random.default_rng(7)
    problem = Problem(rng, (1300, 900), 3, 64, fmt)
    if fmt == "f16":
        exponents = rng.integers(-6, 7, problem.weights.shape)
    else:
        exponents = rng.integers(-30, 31, problem.weights.shape)
    problem.q *= 2.0 ** exponents[..., None]
    problem.q[rng.random(problem.q.shape[:3]) < 0.2] = 0
    problem.weights *= 2.0**-exponents
    np.testing.assert_array_equal(choose(*problem.arguments(), topk=300), problem.wanted(300))


@pytest.mark.parametrize(
    ("batch", "width", "least"), [(70, 810, 49_200), (40, 1560, 98_400), (3, 6200, 393_300)]
)
def test_more_scores_than_shared_memory_holds(batch, width, least):
    """Sequences of the same pages, in different orders. On a GPU one, two or eight blocks each."""
    rng = np.random.default_rng(8)
    pages, topk = 90, 2048
    keys = rng.integers(-2, 3, (pages, PAGE_SIZE, 1, DIM)).astype(np.float32)
    q = rng.integers(-1, 2, (batch, 1, 2, DIM)).astype(np.float32)
    weights = rng.integers(-2, 3, (batch, 1, 2)).astype(np.float32)
    table = rng.integers(0, pages, (batch, width)).astype(np.int32)
    visible = rng.integers(least, width * PAGE_SIZE + 100, (batch, 1)).astype(np.int32)
    chosen = choose(
        jnp.asarray(q, jnp.bfloat16),
        weights,
        jnp.asarray(keys, jnp.bfloat16),
        table,
        visible,
        topk=topk,
    )
    products = np.maximum(np.einsum("bhd,ptd->bhpt", q[:, 0], keys[:, :, 0]), 0)
    scores = np.einsum("bh,bhpt->bpt", weights[:, 0], products)
    for i in range(batch):
        own = scores[i][table[i]].reshape(-1)[: visible[i, 0]]
        best = np.sort(np.argsort(-own, kind="stable")[:topk])
        np.testing.assert_array_equal(chosen[i, 0], best)


@pytest.mark.parametrize("topk", [30, 64, 70, 300])
def test_more_visible_than_the_table_has(topk):
    rng = np.random.default_rng(9)
    problem = Problem(rng, (64,), 1, 4, spare=0)
    wanted = problem.wanted(topk)
    problem.num_visible[:] = 200
    np.testing.assert_array_equal(choose(*problem.arguments(), topk=topk), wanted)


@pytest.mark.parametrize("fmt", FORMATS)
def test_pages_outside_the_pool(fmt):
    """Among what is visible they are the first or the last."""
    rng = np.random.default_rng(10)
    problem = Problem(rng, (320, 320), 1, 4, fmt, spare=0)
    first, last = rng.integers(-2, 3, (2, PAGE_SIZE, DIM)).astype(np.float32)
    pages = index_keys.pack(jnp.asarray([first, last])[:, :, None], FORMATS[fmt])
    problem.pool = jnp.concatenate([pages[:1], problem.pool, pages[1:]])
    problem.table += 1
    number = len(problem.pool)
    for i, entries in enumerate([(-1, number), (-(2**31), 2**31 - 1)]):
        for slot, entry, keys in zip((3, 1), entries, (first, last), strict=True):
            problem.table[i, slot] = entry
            problem.keys[i][slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE] = keys
    np.testing.assert_array_equal(choose(*problem.arguments(), topk=99), problem.wanted(99))


@pytest.mark.parametrize("fmt", ["bf16", "f16"])
def test_scores_that_are_not_finite(fmt):
    """NaN is higher than all, and nothing that is hidden is chosen."""
    rng = np.random.default_rng(11)
    problem = Problem(rng, (3000,), 1, 2, fmt)
    problem.q[:] = 0
    problem.q[0, 0, :, 0] = 1
    problem.weights[0, 0] = 1, -1  # inf - inf
    at = [17, 64, 2900]
    for t in at:
        page = problem.table[0, t // PAGE_SIZE]
        problem.pool = problem.pool.at[page, t % PAGE_SIZE, 0, 0].set(jnp.inf)
    chosen = choose(*problem.arguments(), topk=5)
    np.testing.assert_array_equal(chosen[0, 0], [0, 1, *at])


def test_lengths_are_data():
    rng = np.random.default_rng(3)
    choose.clear_cache()
    for lengths in ((400, 3, 90), (129, 400, 0)):
        problem = Problem(rng, lengths, 2, 64)
        problem.pool = jnp.pad(problem.pool, ((0, 20 - len(problem.pool)), (0, 0), (0, 0), (0, 0)))
        np.testing.assert_array_equal(choose(*problem.arguments(), topk=77), problem.wanted(77))
    assert choose._cache_size() == 1


def test_vmap():
    rng = np.random.default_rng(4)
    problem = Problem(rng, (300, 70, 129, 64), 2, 20)
    q, weights, pool, table, visible = problem.arguments()
    pairs = [
        jnp.reshape(jnp.asarray(x), (2, 2, *x.shape[1:])) for x in (q, weights, table, visible)
    ]

    def one(q, weights, table, visible):
        return indexer.choose_cached(q, weights, pool, table, visible, 50)

    chosen = jax.jit(jax.vmap(one))(*pairs)
    np.testing.assert_array_equal(chosen.reshape(4, 2, 50), problem.wanted(50))
    pools = jnp.stack([pool, pool[::-1]])
    backwards = jnp.where(table < len(pool), len(pool) - 1 - table, table)
    tables = jnp.stack([table, jnp.where(table < 0, table, backwards)])
    chosen = jax.vmap(lambda p, t: indexer.choose_cached(q, weights, p, t, visible, 50))(
        pools, tables
    )
    for each in chosen:
        np.testing.assert_array_equal(each, problem.wanted(50))


def test_in_pieces(monkeypatch):
    """Of more query tokens than there is room for scores of."""
    rng = np.random.default_rng(5)
    problem = Problem(rng, (300, 200), 7, 64)
    width = problem.table.shape[1] * PAGE_SIZE
    monkeypatch.setattr(index_topk, "_SCORES_AT_A_TIME", 2 * 3 * width)
    chosen = jax.jit(lambda *x: indexer.choose_cached(*x, 40))(*problem.arguments())
    np.testing.assert_array_equal(chosen, problem.wanted(40))


def test_no_derivative():
    problem = Problem(np.random.default_rng(6), (100,), 1, 4)
    q, *rest = problem.arguments()

    def loss(q):
        return jnp.sum(q.astype(jnp.float32)) + jnp.sum(indexer.choose_cached(q, *rest, 10))

    np.testing.assert_array_equal(jax.grad(loss)(q), np.ones(q.shape))


def exported(batch=2, s=1, heads=64, dim=DIM, pages=9, width=4, dtype=jnp.bfloat16, on="cuda"):
    return jax.export.export(
        jax.jit(lambda *x: indexer.choose_cached(*x, 16)),
        platforms=[on],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(_ffi.INDEX_TOPK)],
    )(
        jax.ShapeDtypeStruct((batch, s, heads, dim), dtype),
        jax.ShapeDtypeStruct((batch, s, heads), jnp.float32),
        jax.ShapeDtypeStruct((pages, PAGE_SIZE, 1, dim), dtype),
        jax.ShapeDtypeStruct((batch, width), jnp.int32),
        jax.ShapeDtypeStruct((batch, s), jnp.int32),
    )


@pytest.mark.parametrize(
    ("dtype", "heads", "dim", "is_call"),
    [
        (jnp.bfloat16, 64, 128, True),
        (jnp.float16, 256, 128, True),
        (jnp.bfloat16, 257, 128, False),
        (jnp.bfloat16, 64, 64, False),
        (jnp.float32, 64, 128, False),
    ],
)
def test_what_is_a_call(dtype, heads, dim, is_call):
    module = exported(heads=heads, dim=dim, dtype=dtype).mlir_module()
    assert (_ffi.INDEX_TOPK in module) == is_call


def test_no_query_tokens():
    program = exported(s=0)
    assert _ffi.INDEX_TOPK not in program.mlir_module()
    assert program.out_avals[0].shape == (2, 0, 16)
    empty = CALL | {name: CALL[name][:, :0] for name in ("q", "weights", "num_visible")}
    assert indexer.choose_cached(**empty).shape == (2, 0, 7)


@pytest.mark.parametrize(
    ("symbols", "sizes"),
    [
        ("batch", [64, 64, 2]),
        ("pages", [130]),
        ("width", [64, 64, 2]),
        ("batch, pages, width", [64, 64, 2]),
        ("s", ["s"]),
        ("batch, s", ["s"]),
        ("heads", []),
    ],
)
def test_symbolic_sizes(symbols, sizes):
    """With a number of query tokens, as many are scored at a time as there may be room for."""
    names = [name.strip() for name in symbols.split(",")]
    dims = {"s": 130} | dict(zip(names, jax.export.symbolic_shape(symbols), strict=True))
    calls = re.findall(r"custom_call @flashmla.* -> .*", exported(**dims).mlir_module())
    shapes = [re.findall(r"tensor<([\w?]+)xi32>", call)[-1].split("x") for call in calls]
    assert [shape[1] for shape in shapes] == ["?" if s == "s" else str(s) for s in sizes]


def test_symbolic_sizes_without_kernels():
    symbols = jax.export.symbolic_shape("batch, s, pages, width")
    program = exported(
        **dict(zip(("batch", "s", "pages", "width"), symbols, strict=True)), on="cpu"
    )
    with jax.default_device(jax.devices("cpu")[0]):
        for lengths, s in (((64, 200), 3), ((3,), 1)):
            problem = Problem(np.random.default_rng(13), lengths, s, 64, spare=0)
            chosen = program.call(*problem.arguments())
            np.testing.assert_array_equal(chosen, problem.wanted(16))


CALL = {
    "q": np.zeros((2, 3, 4, DIM), np.float32),
    "weights": np.zeros((2, 3, 4), np.float32),
    "index_pages": np.zeros((5, PAGE_SIZE, 1, DIM), np.float32),
    "block_table": np.zeros((2, 2), np.int32),
    "num_visible": np.zeros((2, 3), np.int32),
    "topk": 7,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": CALL["q"][0]}, r"q must be .*head_dim\], got shape \(3, 4, 128\)"),
        ({"q": np.zeros((2, 3, 4, DIM), np.int32)}, "q must be .*float32, got int32"),
        ({"q": CALL["q"][:, :, :0]}, r"q must hold a head, got shape \(2, 3, 0, 128\)"),
        ({"weights": [1.0]}, r"weights must be an array \[batch, s, heads\], got list"),
        ({"weights": CALL["q"]}, r"weights must be \[batch, s, heads\], got .*\(2, 3, 4, 128\)"),
        ({"weights": CALL["weights"][:, :1]}, r"weights .* q's \(2, 3, 4\), got .*\(2, 1, 4\)"),
        ({"index_pages": CALL["q"][0]}, r"index_pages must be \[num.*, n\], got .*\(3, 4, 128\)"),
        ({"index_pages": CALL["q"]}, r"\[num_pages, 64, 1, 128\] in float32 .*\(2, 3, 4, 128\)"),
        (
            {"index_pages": CALL["index_pages"].astype(np.uint8)},
            r"index_pages .*, 64, 1, 144\] in uint8 with head_dim=128, got .*\(5, 64, 1, 128\)",
        ),
        ({"index_pages": CALL["index_pages"].astype(np.int8)}, "index_pages must be .*, got int8"),
        (
            {"index_pages": CALL["index_pages"][:0]},
            r"index_pages must hold a page.*\(0, 64",
        ),
        ({"block_table": CALL["block_table"][0]}, r"block_table must be .*, got shape \(2,\)"),
        ({"block_table": CALL["block_table"][:1]}, r"block_table .* batch=2, got shape \(1, 2\)"),
        ({"block_table": np.zeros((2, 2), np.float32)}, "block_table .* integers, got float32"),
        ({"num_visible": np.zeros(2, np.int32)}, r"num_visible must be \[batch, s\], got .*\(2,\)"),
        ({"num_visible": np.zeros((2, 2), np.int32)}, r"num_visible .* s=3, got shape \(2, 2\)"),
        ({"num_visible": np.zeros((2, 3), np.bool_)}, "num_visible must be integers, got bool"),
        ({"topk": 0}, "topk must be a positive integer, got 0"),
        ({"topk": np.int32(-3)}, "topk must be a positive integer, got .*-3"),
        ({"topk": 2.0}, r"topk must be a positive integer, got 2\.0"),
        ({"topk": None}, "topk must be a positive integer, got None"),
        ({"precision": 3}, "precision must be a name, .*, got 3"),
    ],
)
def test_malformed_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        indexer.choose_cached(**{**CALL, **changes})


def test_integers_of_any_kind():
    rng = np.random.default_rng(12)
    problem = Problem(rng, (300, 7), 1, 3)
    *arguments, table, visible = problem.arguments()
    table, visible = table.clip(0, 255).astype(np.uint8), visible.astype(np.int16)
    chosen = indexer.choose_cached(*arguments, table, visible, np.int64(16))
    np.testing.assert_array_equal(chosen, problem.wanted(16))


@pytest.mark.parametrize(
    "precision",
    [
        None,
        "highest",
        jax.lax.Precision.HIGH,
        (jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT),
        ["high", "default"],
        jax.lax.DotAlgorithmPreset.F32_F32_F32,
    ],
    ids=str,
)
def test_parameters_are_literals(precision):
    """Programs for several devices have them in writing."""
    call = CALL | {"topk": np.int64(16), "precision": precision}
    arrays = {name: x for name, x in call.items() if isinstance(x, np.ndarray)}
    rest = {name: x for name, x in call.items() if name not in arrays}
    jaxpr = jax.make_jaxpr(lambda arrays: indexer.choose_cached(**arrays, **rest))(arrays)
    (params,) = [x.params for x in jaxpr.eqns if x.primitive is index_topk.index_topk_p]
    assert ast.literal_eval(repr(params)) == params
    assert params["topk"] == 16
    assert indexer.choose_cached(**call).shape == (2, 3, 16)


def test_algorithms_have_no_name():
    algorithm = jax.lax.DotAlgorithm(np.float32, np.float32, np.float32, 1, 1, 1, False)
    with pytest.raises(NotImplementedError, match=r"precision must be a name, .*DotAlgorithm"):
        indexer.choose_cached(**CALL, precision=algorithm)


def test_sizes_agree():
    info = _ffi.build_info()
    if not info:
        pytest.skip("the compiled module did not load")
    assert info["index_head_dim"] == index_topk.HEAD_DIM
    assert info["max_index_heads"] == index_topk.MAX_HEADS
