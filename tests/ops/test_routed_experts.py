"""The routed experts against NumPy in float64."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashmla_jax.ops import _ffi
from flashmla_jax.ops import routed_experts as moe

pytestmark = pytest.mark.usefixtures("on_cpu")

ROOT = Path(__file__).parents[2]
HIDDEN, SIZE = 32, 64


def make_experts(num_experts: int, num_tokens: int, k: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal((num_experts, *shape)).astype(np.float32) * 0.2

    return {
        "weights": moe.Experts(weight(SIZE, HIDDEN), weight(SIZE, HIDDEN), weight(HIDDEN, SIZE)),
        "tokens": rng.standard_normal((num_tokens, HIDDEN)).astype(np.float32) * 0.3,
        "experts": np.stack(
            [rng.permutation(num_experts)[:k].astype(np.int32) for _ in range(num_tokens)]
        ),
        "shares": rng.random((num_tokens, k)).astype(np.float32),
    }


def oracle_experts(weights, tokens, experts, shares) -> np.ndarray:
    """Token by token and expert by expert, in float64; experts past the last give nothing."""
    gate, up, down = (weight.astype(np.float64) for weight in weights)
    out = np.zeros(tokens.shape)
    for t, x in enumerate(tokens.astype(np.float64)):
        for e, share in zip(experts[t], shares[t].astype(np.float64), strict=True):
            if e < len(gate):
                g = gate[e] @ x
                out[t] += share * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ x)))
    return out


def blocks_of_experts(target, results, **_):
    """In place of the kernels' call: what they write, and NaN where they write nothing."""
    assert target == _ffi.GROUPED_MLP
    shapes = [(x.shape, x.dtype) for x in results]

    def call(rows, expert_of_block, *weights):
        gate, up, down = (x.at[expert_of_block].get(mode="fill") for x in weights)
        act = jax.nn.silu(jnp.einsum("bri,boi->bro", rows, gate))
        act *= jnp.einsum("bri,boi->bro", rows, up)
        out = jnp.einsum("bri,boi->bro", act, down)
        assert [(x.shape, x.dtype) for x in (out, act)] == shapes
        return out, act

    return call


@pytest.fixture(params=["_loop", "_fused", "_grouped"])
def run(request, monkeypatch):
    """Each way to multiply, but for the kernels themselves."""
    monkeypatch.setattr(jax.ffi, "ffi_call", blocks_of_experts)
    way = getattr(moe, request.param)
    return lambda **case: way(**jax.tree.map(jnp.asarray, case))


@pytest.mark.parametrize(
    "routing", ["random", "all to the same", "few tokens", "nobody's", "sorted"]
)
def test_experts_match_float64(run, routing, monkeypatch):
    num_tokens, k, num_experts = (3, 2, 40) if routing == "few tokens" else (150, 3, 7)
    case = make_experts(num_experts, num_tokens, k)
    if routing == "all to the same":
        case["experts"][:] = [4, 1, 6]
    if routing in ("nobody's", "sorted"):
        case["experts"][::2, 1] = 7 + np.arange(75)  # past the last
        case["shares"][::2, 1] = 0
    if routing == "sorted":
        monkeypatch.setattr(moe, "_ROWS_COUNTED", 0)
    out = jax.jit(lambda case: run(**case))(case)
    np.testing.assert_allclose(out, oracle_experts(**case), atol=1e-5)


@pytest.mark.parametrize("what", ["weights", "tokens", "shares"])
def test_the_derivative_is_that_of_the_definition(what):
    """Along a random direction, against differences of the float64 sum."""
    case = make_experts(5, 9, 2)
    rng = np.random.default_rng(7)
    upwards = rng.standard_normal((9, HIDDEN))
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), case[what])

    def loss(x):
        return (moe.routed_experts(**jax.tree.map(jnp.asarray, {**case, what: x})) * upwards).sum()

    gradient = jax.jit(jax.grad(loss))(case[what])
    slope = sum(
        np.vdot(g, d)
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )

    def moved(step: float) -> float:
        x = jax.tree.map(lambda x, d: x + step * d.astype(np.float64), case[what], direction)
        return float((oracle_experts(**{**case, what: x}) * upwards).sum())

    assert slope == pytest.approx((moved(1e-4) - moved(-1e-4)) / 2e-4, rel=1e-4)


def test_experts_have_no_capacity(run):
    """A token's output does not depend on those beside it, however many want its experts."""
    case = make_experts(4, 60, 2)
    case["experts"][:] = [1, 2]
    alone = {name: case[name][:1] for name in ("tokens", "experts", "shares")}
    np.testing.assert_allclose(
        run(**case)[:1], run(weights=case["weights"], **alone), rtol=1e-5, atol=1e-6
    )


def shapes_of(num_experts: int) -> dict:
    """Six tokens of a decode step, which choose four experts each."""
    return {
        "weights": moe.Experts(*(jax.ShapeDtypeStruct((num_experts, 8, 8), jnp.float32),) * 3),
        "tokens": jax.ShapeDtypeStruct((6, 8), jnp.float32),
        "experts": jax.ShapeDtypeStruct((6, 4), jnp.int32),
        "shares": jax.ShapeDtypeStruct((6, 4), jnp.float32),
    }


def test_experts_do_not_multiply_every_token_with_every_expert():
    """The loop runs over blocks of rows, whose number does not follow that of the experts."""

    def num_blocks(num_experts: int) -> int:
        jaxpr = jax.make_jaxpr(lambda case: moe._loop(**case))(shapes_of(num_experts)).jaxpr
        (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        return scan.params["length"]

    assert num_blocks(256) == num_blocks(64) == 24  # one for each of 6 x 4 rows at most


def test_on_the_cpu_a_step_does_not_read_every_expert():
    """Temporary memory would hold masked rows for each of them."""
    compiled = jax.jit(moe.routed_experts).lower(**shapes_of(256)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 24 * 8 * 4 / 4


@pytest.mark.parametrize("is_built", [True, False])
def test_what_is_lowered_for_a_gpu(monkeypatch, is_built):
    """More rows than a sum of products is for: the kernels, where there are any, or the loop."""
    monkeypatch.setattr(
        _ffi, "why_no_kernel", lambda *_, **__: None if is_built else "there is none"
    )

    def lowered(dtype, size=8, num_tokens=6):
        shapes = shapes_of(256)
        for name in ("tokens", "experts", "shares"):
            shapes[name] = shapes[name].update(shape=(num_tokens, *shapes[name].shape[1:]))
        weights = shapes["weights"]
        weights = weights._replace(
            gate=weights.gate.update(shape=(256, size, 8)),
            up=weights.up.update(shape=(256, size, 8)),
            down=weights.down.update(shape=(256, 8, size)),
        )
        shapes = jax.tree.map(
            lambda x: x.update(dtype=dtype) if x.dtype == jnp.float32 else x,
            {**shapes, "weights": weights},
        )
        traced = jax.jit(lambda **case: moe.routed_experts(**case)).trace(**shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    for dtype in (jnp.bfloat16, jnp.float16):
        text = lowered(dtype)
        assert (_ffi.GROUPED_MLP in text) == is_built
        assert ("stablehlo.while" in text) != is_built
    for other in (lowered(jnp.float32), lowered(jnp.bfloat16, size=12)):
        assert _ffi.GROUPED_MLP not in other
        assert "stablehlo.while" in other
    few = lowered(jnp.bfloat16, num_tokens=3)
    assert _ffi.GROUPED_MLP not in few
    assert "stablehlo.while" not in few


def test_inside_shard_map(monkeypatch):
    """Tokens differ between devices, and experts do not: kernels or not, that is a program."""
    monkeypatch.setattr(_ffi, "why_no_kernel", lambda *_, **__: None)
    case = make_experts(7, 30, 3)
    case = {
        name: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16 if x.dtype != int else x.dtype), x)
        if name in ("weights", "tokens")
        else jnp.asarray(x)
        for name, x in case.items()
    }
    mesh = jax.sharding.Mesh(jax.devices("cpu")[:1], ("d",))
    divided = jax.sharding.PartitionSpec("d")
    specs = (jax.sharding.PartitionSpec(), divided, divided, divided)
    run = jax.shard_map(moe.routed_experts, mesh=mesh, in_specs=specs, out_specs=divided)
    out = jax.jit(run)(*case.values())
    np.testing.assert_array_equal(out, jax.jit(moe._loop)(**case).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("mapped", [False, True])
def test_sums_are_of_float32(dtype, mapped):
    """Whatever is given; only then they are rounded."""
    case = make_experts(5, 40, 4)
    case = {
        name: x if name == "experts" else jax.tree.map(lambda x: jnp.asarray(x, dtype), x)
        for name, x in case.items()
    }
    rows = [case[name] for name in ("tokens", "experts", "shares")]
    run = moe.routed_experts
    if mapped:
        rows = [x.reshape(2, 20, -1) for x in rows]
        run = jax.vmap(run, (None, 0, 0, 0))
    out = run(case["weights"], *rows)
    assert out.dtype == dtype
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), case)
    want = oracle_experts(**{**exact, "experts": case["experts"]})
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(out, np.float64).reshape(want.shape), want, rtol=epsilon, atol=2 * epsilon
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": (6, SIZE, HIDDEN)}, "up must be as gate"),
        ({"down": (7, SIZE, HIDDEN)}, "down must be"),
        ({"tokens": (9, SIZE)}, r"tokens must be \[num_tokens, 32\], got \(9, 64\)"),
        ({"experts": (8, 2)}, r"experts must be \[9, k\], got \(8, 2\)"),
        ({"shares": (9, 3)}, r"shares must be as experts \(9, 2\), got \(9, 3\)"),
        ({"gate": (0, SIZE, HIDDEN)}, "there must be an expert"),
    ],
)
def test_bad_shapes(change, message):
    case = {**make_experts(7, 9, 2)}
    for name, shape in change.items():
        if name in ("gate", "up", "down"):
            case["weights"] = case["weights"]._replace(**{name: np.zeros(shape, np.float32)})
        else:
            case[name] = np.zeros(shape, case[name].dtype)
    with pytest.raises(ValueError, match=message):
        moe.routed_experts(**case)


def test_same_numbers_in_c():
    text = (ROOT / "csrc" / "params.h").read_text()
    assert re.findall(r"kGroupedAlignment = (\d+);", text) == [str(moe._ALIGNMENT)]
