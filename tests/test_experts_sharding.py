"""Routed experts under plain `jit`, with arrays that are divided over a mesh of virtual devices.

Results are the oracle's, and the compiled programs are read: no weight travels between devices.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import elsewhere, make_mesh, meshes, run_on_eight_devices
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import assert_sharded, collectives, kinds

from flashmla_jax.ops import _ffi, _sharding
from flashmla_jax.ops import routed_experts as moe

sys.path.append(str(Path(__file__).parent / "ops"))
from test_routed_experts import HIDDEN, SIZE, make_experts, oracle_experts

EXPERTS, TOKENS, K = 8, 48, 3
WHOLE = P()


@elsewhere
def test_on_eight_devices() -> None:
    run_on_eight_devices(__file__)


def make(num_tokens: int = TOKENS) -> dict[str, Any]:
    """Some experts are nobody's."""
    case = make_experts(EXPERTS, num_tokens, K, seed=3)
    number = len(case["experts"][::5])
    case["experts"][::5, 1] = EXPERTS + np.arange(number)
    case["shares"][::5, 1] = 0
    return case


def put(mesh: Mesh, case: dict[str, Any], gate: P, down: P, tokens: P) -> dict[str, Any]:
    def place(x: np.ndarray, spec: P) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, spec))

    weights = (place(x, s) for x, s in zip(case["weights"], (gate, gate, down), strict=True))
    rows = {name: place(case[name], tokens) for name in ("tokens", "experts", "shares")}
    return {"weights": moe.Experts(*weights), **rows}


def largest_that_travels(compiled: Any) -> int:
    """The numbers of the largest array that devices send each other."""
    results = [re.split(r" (?:all|collective|reduce)-", line)[0] for line in collectives(compiled)]
    shapes = re.findall(r"\w+\[([\d,]+)\]", "\n".join(results))
    return max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)


# The mesh, how `gate` and `up`, `down` and the tokens are divided, into how many parts the tokens
# still are where they are multiplied, and whether they travel before.
CASES = {
    "experts": ({"x": 8}, P("x"), P("x"), WHOLE, 1, False),
    "sizes": ({"x": 8}, P(None, "x"), P(None, None, "x"), WHOLE, 1, False),
    "experts and sizes": ({"x": 4, "y": 2}, P("x", "y"), P("x", None, "y"), WHOLE, 1, False),
    "over two axes, turned": ({"x": 4, "y": 2}, P(("y", "x")), P(("y", "x")), WHOLE, 1, False),
    "tokens": ({"x": 8}, WHOLE, WHOLE, P("x"), 8, False),
    "tokens beside": ({"x": 4, "y": 2}, P("x"), P("x"), P("y"), 2, False),
    "tokens over some": ({"x": 2, "y": 2, "z": 2}, P("x"), P("x"), P("y"), 2, False),
    "tokens over the same": ({"x": 8}, P("x"), P("x"), P("x"), 1, True),
    "tokens over more": ({"x": 4, "y": 2}, P("x"), P("x"), P(("x", "y")), 2, True),
    "tokens over more, turned": ({"x": 4, "y": 2}, P("x"), P("x"), P(("y", "x")), 2, True),
    "nothing": ({"x": 8}, WHOLE, WHOLE, WHOLE, 1, False),
}


@meshes
@kinds
@pytest.mark.parametrize("name", CASES)
def test_divided(name: str, kind: AxisType) -> None:
    sizes, gate, down, tokens, parts, travel = CASES[name]
    mesh, case = make_mesh(kind, **sizes), make()
    placed = put(mesh, case, gate, down, tokens)
    run = jax.jit(lambda **case: moe.routed_experts(**case))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(gather|moves)")
        compiled = run.lower(**placed).compile()
    out = run(**placed)
    np.testing.assert_allclose(out, oracle_experts(**case), atol=1e-5)
    assert_sharded(out, mesh, tokens)

    # At most the tokens travel: all of them are less than one expert's weights of a product.
    assert TOKENS * HIDDEN < HIDDEN * SIZE
    assert largest_that_travels(compiled) <= TOKENS * HIDDEN
    sums = [line for line in collectives(compiled) if "all-reduce" in line]
    divides = math.prod(mesh.shape[axis] for axis in axes_of(gate))
    assert len(sums) == (divides > 1)
    assert (len(collectives(compiled)) > len(sums)) == travel
    for line in sums:
        assert f"f32[{TOKENS // parts},{HIDDEN}]" in line
        assert len(re.search(r"replica_groups=\{\{([\d,]+)\}", line)[1].split(",")) == divides


@meshes
@pytest.mark.parametrize("number", [8, 6])
def test_devices_in_any_order(number: int) -> None:
    """All of them, or some."""
    devices = np.array(jax.devices())[np.random.default_rng(number).permutation(8)[:number]]
    mesh = Mesh(devices.reshape(2, -1), ("x", "y"))
    case = make()
    run = jax.jit(lambda **case: moe.routed_experts(**case))
    specs = (
        (P("x"), P("x"), P("y")),
        (P(None, "x"), P(None, None, "x"), WHOLE),
        (P("x"), P("x"), P(("y", "x"))),
    )
    for gate, down, tokens in specs:
        out = run(**put(mesh, case, gate, down, tokens))
        np.testing.assert_allclose(out, oracle_experts(**case), atol=1e-5)


@kinds
def test_one_device(kind: AxisType) -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,), devices=jax.devices("cpu")[:1])
    case = make()
    placed = put(mesh, case, P("x"), P("x"), P("x"))
    out = jax.jit(lambda **case: moe.routed_experts(**case))(**placed)
    np.testing.assert_allclose(out, oracle_experts(**case), atol=1e-5)
    assert_sharded(out, mesh, P("x"))


@meshes
def test_precision_is_that_around_the_program() -> None:
    """Though XLA asks for the products of each device later, and from elsewhere."""
    placed = put(make_mesh(x=8), make(), P("x"), P("x"), WHOLE)
    run = jax.jit(lambda **case: moe.routed_experts(**case))
    for precision in (None, "highest", None):
        with jax.default_matmul_precision(precision):
            text = run.lower(**placed).compile().as_text()
        assert ("operand_precision={highest,highest}" in text) == (precision is not None)


def axes_of(spec: P) -> list[str]:
    return [x for entry in spec if entry for x in (entry if isinstance(entry, tuple) else [entry])]


@meshes
def test_the_sum_is_rounded_once() -> None:
    """Parts are added in float32: bfloat16 results are as near as those of one device."""
    case = make()
    weights, tokens = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16), (case["weights"], case["tokens"])
    )
    case |= {"weights": weights, "tokens": tokens}
    mesh = make_mesh(x=8)
    out = jax.jit(lambda **case: moe.routed_experts(**case))(
        **put(mesh, case, P("x"), P("x"), WHOLE)
    )
    assert out.dtype == jnp.bfloat16
    want = oracle_experts(
        **jax.tree.map(lambda x: np.asarray(x, np.float64), case) | {"experts": case["experts"]}
    )
    alone = jax.jit(moe.routed_experts)(
        **{k: jax.tree.map(jnp.asarray, v) for k, v in case.items()}
    )
    error, of_one = (np.linalg.norm(np.asarray(x, np.float64) - want) for x in (out, alone))
    assert error < 1.1 * of_one


@meshes
def test_what_does_not_fit_is_said() -> None:
    case = make()
    run = jax.jit(lambda **case: moe.routed_experts(**case))
    mesh = make_mesh(x=8)
    for specs, message in (
        (
            (P("x"), P(None, None, "x")),
            r"down is divided along axis 2 \(size\) otherwise than gate",
        ),
        ((P(None, None, "x"), WHOLE), r"gate is sharded along axis 2 \(hidden\), which every"),
    ):
        with pytest.warns(UserWarning, match=message):
            out = run(**put(mesh, case, *specs, WHOLE))
        np.testing.assert_allclose(out, oracle_experts(**case), atol=1e-5)
    explicit = make_mesh(AxisType.Explicit, x=8)
    with pytest.raises(
        ValueError, match=r"hidden\), which every device needs whole: over \('x',\)"
    ):
        run(**put(explicit, case, P(None, None, "x"), WHOLE, WHOLE))


@meshes
def test_sizes_that_do_not_come_out_even() -> None:
    """XLA divides 50 tokens by four for a product before; here they are whole."""
    case = make(50)
    mesh = make_mesh(x=4, y=2)
    placed = put(mesh, case, P("x"), P("x"), WHOLE)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, WHOLE))
    def run(**case: Any) -> jax.Array:
        tokens = jax.lax.with_sharding_constraint(case["tokens"] * 2, NamedSharding(mesh, P("x")))
        return moe.routed_experts(**{**case, "tokens": tokens})

    want = oracle_experts(**{**case, "tokens": 2 * case["tokens"]})
    with pytest.warns(UserWarning, match="num_tokens = 50 cannot be divided evenly"):
        out = run(**placed)
    np.testing.assert_allclose(out, want, atol=1e-5)


@meshes
def test_inside_shard_map_over_all_that_divides() -> None:
    """Other axes are of one device: it is the op, and nothing travels."""
    case = make()
    mesh = make_mesh(x=8, y=1)
    run = jax.shard_map(
        lambda *case: moe.routed_experts(*case),
        mesh=mesh,
        in_specs=(WHOLE, P("x"), P("x"), P("x")),
        out_specs=P("x"),
        axis_names={"x"},
    )
    placed = put(mesh, case, WHOLE, WHOLE, P("x"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ffi._warn_once.cache_clear()
        compiled = jax.jit(run).lower(*placed.values()).compile()
    assert collectives(compiled) == []
    np.testing.assert_allclose(jax.jit(run)(*placed.values()), oracle_experts(**case), atol=1e-5)


@meshes
@pytest.mark.parametrize("manual", ["x", "y"])
def test_beside_shard_map(manual: str) -> None:
    """Tokens divided by `shard_map` over one axis of the mesh, experts by XLA over the other.

    It is XLA's loop then, and said.
    """
    _ffi._warn_once.cache_clear()
    case = make()
    mesh = make_mesh(x=4, y=2)
    experts = "y" if manual == "x" else "x"
    run = jax.shard_map(
        lambda *case: moe.routed_experts(*case),
        mesh=mesh,
        in_specs=(WHOLE, P(manual), P(manual), P(manual)),
        out_specs=P(manual),
        axis_names={manual},
    )
    placed = put(mesh, case, P(experts), P(experts), P(manual))
    with pytest.warns(UserWarning, match="routed_experts is inside shard_map over some axes"):
        out = jax.jit(run)(*placed.values())
    np.testing.assert_allclose(out, oracle_experts(**case), atol=1e-5)


@meshes
@kinds
@pytest.mark.parametrize("over", [P(), P("y"), P(None, "y")], ids=str)
def test_mapped(over: P, kind: AxisType) -> None:
    """The mapped axis or the tokens may be divided, too."""
    case = make()
    mesh = make_mesh(kind, x=4, y=2)
    weights = put(mesh, case, P("x"), P("x"), WHOLE)["weights"]
    rows = [
        jax.device_put(case[name].reshape(4, 12, -1), NamedSharding(mesh, over))
        for name in ("tokens", "experts", "shares")
    ]
    run = jax.jit(jax.vmap(moe.routed_experts, (None, 0, 0, 0)))
    compiled = run.lower(weights, *rows).compile()
    assert largest_that_travels(compiled) <= TOKENS * HIDDEN
    out = run(weights, *rows)
    whole = np.asarray(out).reshape(TOKENS, HIDDEN)
    np.testing.assert_allclose(whole, oracle_experts(**case), atol=1e-5)
    if kind is AxisType.Explicit:
        assert_sharded(out, mesh, over)
    tokens = jnp.asarray(case["tokens"][:12])
    shared = jax.jit(jax.vmap(moe.routed_experts, (None, None, 0, 0)))(weights, tokens, *rows[1:])
    for number, each in enumerate(np.asarray(shared)):
        part = slice(12 * number, 12 * number + 12)
        chosen = {name: case[name][part] for name in ("experts", "shares")}
        want = oracle_experts(case["weights"], case["tokens"][:12], **chosen)
        np.testing.assert_allclose(each, want, atol=1e-5)


@meshes
@kinds
@pytest.mark.parametrize("name", ["experts and sizes", "tokens beside", "tokens over the same"])
def test_derivative(name: str, kind: AxisType) -> None:
    """Of divided arrays it is that of one device's."""
    sizes, gate, down, tokens, *_ = CASES[name]
    case = make()
    placed = put(make_mesh(kind, **sizes), case, gate, down, tokens)

    def loss(weights: moe.Experts, tokens: jax.Array, case: dict[str, Any]) -> jax.Array:
        rest = {name: case[name] for name in ("experts", "shares")}
        return (moe.routed_experts(weights, tokens, **rest) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    alone = jax.tree.map(jnp.asarray, case)
    for got, want in zip(
        jax.tree.leaves(gradient(placed["weights"], placed["tokens"], placed)),
        jax.tree.leaves(gradient(alone["weights"], alone["tokens"], alone)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_on_gpus_devices_run_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What XLA puts in the place of the call, on each device that has two of eight experts."""
    monkeypatch.setattr(_ffi, "why_no_kernel", lambda *_, **__: None)
    dtype = np.dtype(jnp.bfloat16)
    operands = (
        ((TOKENS, HIDDEN), dtype),
        ((TOKENS, K), np.dtype(np.int32)),
        ((TOKENS, K), np.dtype(np.float32)),
        ((2,), np.dtype(np.int32)),
        ((2, SIZE, HIDDEN), dtype),
        ((2, SIZE, HIDDEN), dtype),
        ((2, HIDDEN, SIZE), dtype),
    )
    params = (("num_experts", EXPERTS), ("precision", None))
    groups = ((0, 2, 1, 3), (4, 5, 6, 7))
    make = _sharding._program.__wrapped__
    with mlir.make_ir_context():
        program = make(moe.routed_experts_p, "cuda", params, operands, groups)
        text = str(ir.Module.parse(program))
    assert _ffi.GROUPED_MLP in text
    assert "replica_groups = dense<[[0, 2, 1, 3], [4, 5, 6, 7]]>" in text
    assert "while" not in text
