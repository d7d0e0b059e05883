"""The mixture of experts on a GPU, against the loop in float32."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.export import export_disabled_checks
from flashmla_jax.ops import _ffi
from flashmla_jax.ops import routed_experts as moe

pytestmark = pytest.mark.gpu


def make(num_experts, num_tokens, k, hidden, size, dtype):
    keys = jax.random.split(jax.random.key(0), 5)

    def weight(key, *shape):
        return jax.random.normal(key, (num_experts, *shape), dtype) * dtype(shape[-1] ** -0.5)

    weights = moe.Experts(
        weight(keys[0], size, hidden), weight(keys[1], size, hidden), weight(keys[2], hidden, size)
    )
    tokens = jax.random.normal(keys[3], (num_tokens, hidden), dtype)
    shares = jax.random.uniform(keys[4], (num_tokens, k))
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(num_experts)[:k] for _ in range(num_tokens)])
    return weights, tokens, jnp.asarray(experts, jnp.int32), shares


def in_float32(case):
    """The same numbers: what is not of float32 or of integers is brought there."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype.itemsize == 2 else x, case)


def exact(case):
    """By the loop, in float32."""
    return jax.jit(functools.partial(moe._loop, precision="highest"))(*in_float32(case))


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("num_experts", "num_tokens", "k", "hidden", "size"),
    [
        (64, 1, 6, 2048, 1408),
        (64, 2, 8, 2048, 1408),
        (64, 3, 6, 2048, 1408),
        (64, 128, 6, 2048, 1408),
        (16, 160, 2, 192, 72),
        (16, 400, 2, 192, 72),
        (8, 600, 2, 256, 96),
        (8, 3000, 2, 96, 160),
        (40, 90, 4, 8, 24),
        (3, 200, 2, 7168, 328),
    ],
)
def test_matches_the_loop(num_experts, num_tokens, k, hidden, size, dtype):
    case = make(num_experts, num_tokens, k, hidden, size, dtype)
    run = jax.jit(moe.routed_experts)
    text = run.lower(*case).as_text()
    assert (_ffi.GROUPED_MLP in text) == (num_tokens * k > moe._FEW_ROWS)
    assert relative_error(run(*case), exact(case)) < (8e-3 if dtype == jnp.bfloat16 else 1e-3)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_blocks(rows, dtype):
    """Of every size, against float64; those of no expert are not written.

    Experts without a block are NaN. There are several blocks of some experts, and more tiles than a
    GPU has multiprocessors, of both products; sizes are no multiples of a tile's. Results take the
    tokens' place, of which the second product needs nothing.
    """
    hidden, size, experts, blocks = 1864, 1032, 10, 30
    rng = np.random.default_rng(rows)
    of_block = np.sort(rng.choice([0, 1, 3, 4, 8, 9], blocks - 7)).astype(np.int32)
    of_block = np.concatenate([of_block, np.full(7, experts, np.int32)])

    def weight(*shape):
        x = rng.standard_normal((experts, *shape)) * shape[-1] ** -0.5
        x[np.setdiff1d(np.arange(experts), of_block)] = np.nan
        return jnp.asarray(x, dtype)

    gate, up, down = weight(size, hidden), weight(size, hidden), weight(hidden, size)
    tokens = jnp.asarray(rng.standard_normal((blocks, rows, hidden)), dtype)
    shapes = [jax.ShapeDtypeStruct((blocks, rows, n), dtype) for n in (hidden, size)]
    call = jax.jit(jax.ffi.ffi_call(_ffi.GROUPED_MLP, shapes, input_output_aliases={0: 0}))
    arguments = tokens, jnp.asarray(of_block), gate, up, down
    (out, act), (again, _) = call(*arguments), call(*arguments)
    used = of_block < experts
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(out[~used], tokens[~used])
    g, u, d, x = (np.asarray(array, np.float64) for array in (gate, up, down, tokens))
    for block in np.flatnonzero(used):
        expert = of_block[block]
        a = x[block] @ g[expert].T
        a = a / (1 + np.exp(-a)) * (x[block] @ u[expert].T)
        tolerance = 4e-3 if dtype == jnp.bfloat16 else 5e-4
        assert relative_error(act[block], a) < tolerance
        product = np.asarray(act[block], np.float64) @ d[expert].T
        assert relative_error(out[block], product) < tolerance


@pytest.mark.parametrize("share", [0.3, 1])
def test_experts_that_are_nobodys(share):
    """Of some rows, or of all: other calls' results are not in the way."""
    weights, tokens, experts, shares = make(8, 100, 4, 256, 96, jnp.bfloat16)
    is_nobodys = np.random.default_rng(1).random(experts.shape) < share
    case = (
        weights,
        tokens,
        jnp.where(is_nobodys, 8 + np.arange(4), experts),
        jnp.where(is_nobodys, 0, shares),
    )
    want = exact(case)
    run = jax.jit(lambda *case: [moe.routed_experts(*case) for _ in range(2)])
    with_nan = jax.jit(lambda: jnp.full((64, 1024), jnp.nan, jnp.bfloat16))
    for _ in range(3):
        jax.block_until_ready([with_nan() for _ in range(50)])
        for got in run(*case):
            assert np.linalg.norm(np.asarray(got - want, np.float64)) <= 8e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("num_tokens", [1, 90])
@pytest.mark.parametrize("parts", [1, 4, 8])
def test_some_of_the_experts(num_tokens, parts):
    """What each device has of them gives its part of the sum; the others' are not read."""
    weights, *rows = case = make(8, num_tokens, 4, 256, 96, jnp.bfloat16)
    here = 8 // parts

    @functools.partial(jax.jit, static_argnames="part")
    def of(part, weights, rows):
        some = jax.tree.map(lambda x: x[part * here : (part + 1) * here], weights)
        numbers = jnp.arange(part * here, (part + 1) * here, dtype=jnp.int32)
        params = {"num_experts": 8, "precision": None}
        return moe.routed_experts_p.bind(*rows, numbers, *some, **params)[0]

    outs = [of(part, weights, rows) for part in range(parts)]
    assert all(out.dtype == jnp.float32 for out in outs)
    assert relative_error(sum(outs), exact(case)) < 8e-3
    for part, out in enumerate(outs):
        theirs = np.asarray(rows[1]) // here == part
        assert (np.asarray(out).any(axis=1) == theirs.any(axis=1)).all()


def test_mapped():
    weights, tokens, experts, shares = make(8, 90, 4, 256, 96, jnp.bfloat16)
    split = [x.reshape(3, 30, *x.shape[1:]) for x in (tokens, experts, shares)]
    run = jax.jit(jax.vmap(moe.routed_experts, (None, 0, 0, 0)))
    got = run(weights, *split).reshape(tokens.shape)
    want = jax.jit(moe.routed_experts)(weights, tokens, experts, shares)
    assert relative_error(got, want) < 8e-3


def test_exported_for_any_number_of_tokens():
    (rows,) = jax.export.symbolic_shape("n")
    weights, tokens, experts, shares = make(8, 90, 4, 256, 96, jnp.bfloat16)
    shapes = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights),
        *(jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in (tokens, experts, shares)),
    ]
    exported = jax.export.export(
        jax.jit(moe.routed_experts), platforms=["cuda"], disabled_checks=export_disabled_checks()
    )(*shapes)
    assert _ffi.GROUPED_MLP in exported.mlir_module()
    for number in (2, 90):
        case = weights, tokens[:number], experts[:number], shares[:number]
        assert relative_error(exported.call(*case), jax.jit(moe.routed_experts)(*case)) < 8e-3


def test_no_block_is_used():
    """Then nothing is written: the tokens, in whose place results would be, are as they were."""
    of_block, tokens = jnp.full(3, 5, jnp.int32), jnp.ones((3, 16, 64), jnp.bfloat16)
    weight = jnp.zeros((5, 64, 64), jnp.bfloat16)
    shapes = [jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)] * 2
    call = jax.jit(jax.ffi.ffi_call(_ffi.GROUPED_MLP, shapes, input_output_aliases={0: 0}))
    np.testing.assert_array_equal(call(tokens, of_block, weight, weight, weight)[0], tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 8}, "blocks must be of 16, 32, 64 or 128 rows, got 8"),
        ({"hidden": 60}, "sizes must be multiples of 8 and at most 1048576, got 60"),
        ({"down": 72}, r"unexpected down \[5, 64, 72\]"),
        ({"dtype": jnp.float32}, "tokens must be bfloat16 or float16"),
    ],
)
def test_bad_arguments(change, message):
    sizes = {"rows": 16, "hidden": 64, "size": 96, "down": 96, "dtype": jnp.bfloat16} | change
    rows, hidden, size, dtype = (sizes[name] for name in ("rows", "hidden", "size", "dtype"))
    gate, down = jnp.zeros((5, size, hidden), dtype), jnp.zeros((5, hidden, sizes["down"]), dtype)
    shapes = [jax.ShapeDtypeStruct((3, rows, n), dtype) for n in (hidden, size)]
    tokens = jnp.zeros((3, rows, hidden), dtype)
    call = jax.ffi.ffi_call(_ffi.GROUPED_MLP, shapes)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(tokens, jnp.zeros(3, jnp.int32), gate, gate, down))


def test_derivative():
    case = make(8, 100, 2, 64, 32, jnp.bfloat16)

    def loss(run, weights, tokens, experts, shares):
        return jnp.sum(run(weights, tokens, experts, shares).astype(jnp.float32) ** 2)

    def gradient(run, case):
        return jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1, 3)))(*case)

    got = gradient(moe.routed_experts, case)
    want = gradient(functools.partial(moe._loop, precision="highest"), in_float32(case))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 3e-2
