"""Exported programs: for other platforms and any sizes, through bytes, in other processes."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import make_step
from jax import export
from oracle import HEAD_DIM, PAGE_SIZE, Problem, assert_matches, attend, make_problem

import flashmla_jax as fm
from flashmla_jax import parallel
from flashmla_jax.cache import paged
from flashmla_jax.ops import _ffi, _sharding, dense_decode

BOTH = ("cpu", "cuda")
PLATFORMS = pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), BOTH], ids="+".join)


def dims(names: str = "batch, num_pages, pages") -> Sequence[Any]:
    return export.symbolic_shape(names)


def struct(*shape: Any, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def attend_shapes(
    batch: Any,
    num_pages: Any,
    pages: Any,
    *,
    s_q: Any = 2,
    h_q: Any = 16,
    dtype: Any = jnp.bfloat16,
) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        struct(batch, s_q, h_q, HEAD_DIM, dtype=dtype),
        struct(num_pages, PAGE_SIZE, 1, HEAD_DIM, dtype=dtype),
        struct(batch, pages, dtype=jnp.int32),
        struct(batch, dtype=jnp.int32),
    )


def append_shapes(
    batch: Any, num_pages: Any, pages: Any, *, tokens: Any = 3
) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        struct(num_pages, PAGE_SIZE, 1, HEAD_DIM),
        struct(batch, tokens, 1, HEAD_DIM),
        struct(batch, pages, dtype=jnp.int32),
        struct(batch, dtype=jnp.int32),
        struct(batch, dtype=jnp.int32),
    )


def exported(
    function: Callable[..., Any], *shapes: Any, platforms: Sequence[str] = BOTH
) -> export.Exported:
    """`function` for `shapes`, exported without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return export.export(
            jax.jit(function), platforms=platforms, disabled_checks=fm.export_disabled_checks()
        )(*shapes)


def through_bytes(program: export.Exported) -> export.Exported:
    return export.deserialize(program.serialize())


def calls(program: export.Exported) -> Counter[tuple[str, str, str]]:
    """Our custom calls in a program: target, attributes, and types of operands and results."""
    lines = [x for x in program.mlir_module().splitlines() if "custom_call @flashmla" in x]
    pattern = (
        r"custom_call @(\w+)\(.*mhlo\.backend_config = (\{.*?\}).* : (\(.*\) -> .*?)(?: loc.*)?$"
    )
    matches = [re.search(pattern, line) for line in lines]
    return Counter(match.groups() for match in matches if match)


causal = functools.partial(fm.flash_mla_with_kvcache, causal=True)
invariant = functools.partial(causal, deterministic="batch_invariant")
BOTH_KINDS = pytest.mark.parametrize("function", [causal, invariant], ids=["default", "invariant"])


# --- Names -----------------------------------------------------------------------------------


def test_targets_are_those_of_the_module() -> None:
    registrations = _ffi._flashmla.registrations()
    on_both = {_ffi.DENSE_DECODE, _ffi.CACHE_APPEND, _ffi.SPARSE_ATTENTION}
    assert set(registrations.pop("cpu")) == on_both
    for targets in registrations.values():
        assert set(targets) == set(_ffi.TARGETS)


def test_disabled_checks() -> None:
    checks = fm.export_disabled_checks()
    names = [check.is_custom_call() for check in checks]
    ours = {*_ffi.TARGETS, *_sharding.TARGETS}
    assert ours < set(names)
    assert all(re.fullmatch(r"flashmla_[a-z_]+_v\d+", name) for name in ours)
    assert all(name.startswith("__cudnn$") for name in set(names) - ours)
    with pytest.raises(ValueError, match=_ffi.DENSE_DECODE):
        export.export(jax.jit(causal), platforms=BOTH)(*attend_shapes(2, 4, 3))


# --- What a program holds --------------------------------------------------------------------


def test_calls_that_stay_out_of_cuda_graphs() -> None:
    """They have targets of their own on a GPU, and mean the same."""

    def step(pool, kv, q, table, lengths):
        pool = fm.cache_append(pool, kv, table, lengths - 1, lengths * 0 + 1, cuda_graph=False)
        return fm.flash_mla_with_kvcache(q, pool, table, lengths, cuda_graph=False)

    q, pool, table, lengths = attend_shapes(2, 4, 3)
    kv = jax.ShapeDtypeStruct((2, 1, 1, 576), pool.dtype)
    arguments = pool, kv, q, table, lengths
    for platform, names in (
        ("cuda", {_ffi.DENSE_DECODE_NO_GRAPH, _ffi.CACHE_APPEND_NO_GRAPH}),
        ("cpu", {_ffi.DENSE_DECODE, _ffi.CACHE_APPEND}),
    ):
        checks = fm.export_disabled_checks()
        exported = export.export(jax.jit(step), platforms=[platform], disabled_checks=checks)
        assert set(re.findall(r"flashmla_\w+_v\d", exported(*arguments).mlir_module())) == names


@PLATFORMS
@BOTH_KINDS
@pytest.mark.parametrize("h_q", [1, 16, 128])
def test_attention_is_one_custom_call_for_each_platform(platforms, function, h_q) -> None:
    """Also for CUDA, from whatever machine this is, and nothing of the reference."""
    program = exported(function, *attend_shapes(*dims(), h_q=h_q), platforms=platforms)
    assert Counter(target for target, _, _ in calls(program).elements()) == {
        _ffi.DENSE_DECODE: len(platforms)
    }
    attributes = [attributes for _, attributes, _ in calls(program)]
    assert all("causal = true" in x and "softmax_scale = " in x for x in attributes)
    wanted = f"batch_invariant = {str(function is invariant).lower()}"
    assert sum(wanted in x for x in attributes) == platforms.count("cuda")
    assert "dot_general" not in program.mlir_module()
    assert "gather" not in program.mlir_module()


@PLATFORMS
def test_append_is_one_custom_call_for_each_platform(platforms) -> None:
    program = exported(fm.cache_append, *append_shapes(*dims()), platforms=platforms)
    assert Counter(target for target, _, _ in calls(program).elements()) == {
        _ffi.CACHE_APPEND: len(platforms)
    }
    assert "scatter" not in program.mlir_module()
    assert program.mlir_module().count("output_operand_alias<") == len(platforms)


@pytest.mark.parametrize("built", [frozenset({"cpu"}), frozenset()], ids=["cpu only", "nothing"])
def test_needs_no_kernels_here(monkeypatch, built) -> None:
    wanted = calls(exported(causal, *attend_shapes(*dims())))
    if not built:
        monkeypatch.setattr(_ffi, "_flashmla", None)
    monkeypatch.setattr(_ffi, "_PLATFORMS", built)
    assert calls(exported(causal, *attend_shapes(*dims()))) == wanted


def test_needs_no_hopper_gpu_here(monkeypatch) -> None:
    monkeypatch.setattr(_ffi, "_foreign_gpus", lambda: ("8.0",))
    assert calls(exported(causal, *attend_shapes(*dims()), platforms=["cuda"]))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 1), (2, 16), (1, 128), (3, 128), (70, 64)])
def test_symbolic_workspaces_have_the_size_of_numbers(invariant, s_q, h_q) -> None:
    def sizes(table: jax.Array) -> list[jax.Array]:
        batch, pages = table.shape
        structs = dense_decode._workspace((batch, s_q, h_q, HEAD_DIM), 1, pages, invariant)
        return [jnp.zeros(x.shape[:1], bool) for x in structs]

    shape = struct(*dims("batch, pages"), dtype=bool)
    with jax.default_device(jax.devices("cpu")[0]):
        program = exported(sizes, shape, platforms=["cpu"])
        for batch, pages in [(1, 1), (5, 30), (3, 31), (2, 32), (2, 33), (7, 2000), (3, 9000)]:
            wanted = dense_decode._workspace((batch, s_q, h_q, HEAD_DIM), 1, pages, invariant)
            symbolic = program.call(jnp.zeros((batch, pages), bool))
            assert [x.size for x in symbolic] == [x.shape[0] for x in wanted]
            # As csrc/params.h counts them.
            tiles = -(-s_q * h_q // 64)
            each, parts = 2, max(1, 144 // tiles)
            if invariant:
                each, parts = batch, min(-(-(pages + -(-s_q // 64)) // 32), 128)
            assert wanted[0].shape[0] == (tiles * each * parts if parts > 1 else 1)


@pytest.mark.parametrize("name", ["s_q", "h_q"])
def test_sizes_that_choose_a_kernel_are_numbers(name) -> None:
    (size,) = dims("size")
    with pytest.raises(NotImplementedError, match=rf"{name} must be a number .* dimension size"):
        exported(fm.flash_mla_with_kvcache, *attend_shapes(2, 4, 3, **{name: size}))


def test_symbolic_sizes_that_do_not_fit_are_refused() -> None:
    batch, other, num_pages, pages = dims("batch, other, num_pages, pages")
    q, k_cache, _, lengths = attend_shapes(batch, num_pages, pages)
    with pytest.raises(ValueError, match=r"block_table must be .* got shape \(other, pages\)"):
        exported(causal, q, k_cache, struct(other, pages, dtype=jnp.int32), lengths)


def test_sizes_inside_shard_map_are_numbers() -> None:
    mesh = jax.make_mesh((1,), ("head",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = functools.partial(parallel.flash_mla_with_kvcache, mesh=mesh, head_axis="head")
    with pytest.raises(NotImplementedError, match=r"inside shard_map: export for sizes that are"):
        exported(divided, *attend_shapes(*dims()))
    problem = make_problem(np.random.default_rng(), [5, 70], s_q=2)
    sizes = len(problem.q), len(problem.k_cache), problem.block_table.shape[1]
    program = through_bytes(exported(divided, *attend_shapes(*sizes)))
    assert_matches(program.call(*problem), attend(problem))


# --- What it gives ---------------------------------------------------------------------------

LENGTHS = (
    [5, 70],
    [0, 1, 300, 64, 65],
    [129],
)  # batches, and by that pools and tables, of any size


@pytest.mark.parametrize("platforms", [None, BOTH], ids=["this platform", "cpu+cuda"])
@BOTH_KINDS
def test_attention_of_any_size(platforms, function) -> None:
    shapes = attend_shapes(*dims())
    program = through_bytes(exported(function, *shapes, platforms=platforms))
    rng = np.random.default_rng()
    for lengths in LENGTHS:
        problem = make_problem(rng, lengths, s_q=2, spare_entries=len(lengths))
        assert_matches(program.call(*problem), attend(problem, causal=True))


def test_batch_invariance_of_long_tables() -> None:
    """Where, on a GPU, sequences are cut into chunks."""
    program = exported(invariant, *attend_shapes(*dims(), s_q=1))
    problem = make_problem(np.random.default_rng(), [5000, 70, 2049], spare_entries=9)
    out, lse = program.call(*problem)
    assert_matches((out, lse), attend(problem, causal=True))
    alone = [x[:1] if x is not problem.k_cache else x for x in problem]
    for one, all_of_them in zip(program.call(*alone), (out, lse), strict=True):
        np.testing.assert_array_equal(one[0], all_of_them[0])


def test_metadata_and_merging() -> None:
    """The functions around the op, in the same program: two halves of the heads' keys, merged."""

    def halves(q, k_cache, block_table, cache_seqlens):
        metadata, num_splits = fm.get_mla_metadata(cache_seqlens, 32, 1)
        out, lse = causal(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            tile_scheduler_metadata=metadata,
            num_splits=num_splits,
        )
        nothing = jnp.full_like(out, jnp.nan), jnp.full_like(lse, -jnp.inf)
        return fm.merge_attention_states(*map(jnp.stack, zip((out, lse), nothing, strict=True)))

    program = exported(halves, *attend_shapes(*dims()))
    problem = make_problem(np.random.default_rng(), [80, 3], s_q=2)
    assert_matches(program.call(*problem), attend(problem, causal=True))


def test_append_of_any_size() -> None:
    batch, num_pages, pages, tokens = dims("batch, num_pages, pages, tokens")
    shapes = append_shapes(batch, num_pages, pages, tokens=tokens)
    program = through_bytes(exported(fm.cache_append, *shapes))
    rng = np.random.default_rng()
    for size in (2, 5):
        pool = rng.standard_normal((2 * size, PAGE_SIZE, 1, HEAD_DIM)).astype(jnp.bfloat16)
        kv = rng.standard_normal((size, size, 1, HEAD_DIM)).astype(jnp.bfloat16)
        table = rng.permutation(2 * size).reshape(size, 2).astype(np.int32)
        start = rng.integers(0, PAGE_SIZE, size, np.int32)
        count = rng.integers(0, size + 1, size, np.int32)
        wanted = pool.copy()
        for i in range(size):
            for j in range(count[i]):
                slot, row = divmod(start[i] + j, PAGE_SIZE)
                wanted[table[i, slot], row] = kv[i, j]
        assert np.asarray(program.call(pool, kv, table, start, count)).tobytes() == wanted.tobytes()


def test_nothing_in_a_dimension() -> None:
    """Dimensions that may be 0: an empty batch is one, a pool without a page is refused."""
    batch, num_pages, pages = (x - 1 for x in dims())
    program = exported(causal, *attend_shapes(batch, num_pages, pages))
    problem = make_problem(np.random.default_rng(), [5, 70], s_q=2)
    assert_matches(program.call(*problem), attend(problem, causal=True))
    out, lse = program.call(*make_problem(np.random.default_rng(), [], s_q=2))
    assert (out.shape, lse.shape) == ((0, 2, 16, 512), (0, 16, 2))
    no_page = problem.replace(k_cache=problem.k_cache[:0])
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{_ffi.DENSE_DECODE}.*one page"):
        jax.block_until_ready(program.call(*no_page))

    append = exported(fm.cache_append, *append_shapes(batch, num_pages, pages))
    pool = np.ones((2, PAGE_SIZE, 1, HEAD_DIM), jnp.bfloat16)
    empty = [np.zeros(x, np.int32) for x in ((0, 3), (0,), (0,))]
    result = append.call(pool, np.zeros((0, 3, 1, HEAD_DIM), jnp.bfloat16), *empty)
    np.testing.assert_array_equal(result, pool)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, 0, 0), (0, None, None, None)], ids=str)
def test_vmap_over_a_symbolic_axis(axes) -> None:
    size, *rest = dims("size, batch, num_pages, pages")
    shapes = [
        struct(size, *x.shape, dtype=x.dtype) if axis == 0 else x
        for x, axis in zip(attend_shapes(*rest), axes, strict=True)
    ]
    program = exported(jax.vmap(causal, axes), *shapes)
    rng = np.random.default_rng()
    first = make_problem(rng, [5, 70], s_q=2)
    others = [make_problem(rng, [5, 70], s_q=2) for _ in range(2)]
    # What is not mapped is the first's; with its pool, the others need its tables.
    shared = [field for field, axis in zip(("q", "k_cache"), axes, strict=False) if axis is None]
    shared += ["block_table", "cache_seqlens"] if shared else []
    others = [x.replace(**{name: getattr(first, name) for name in shared}) for x in others]
    problems = [first, *others]
    arguments = [
        np.stack(fields) if axis == 0 else fields[0]
        for *fields, axis in zip(*problems, axes, strict=True)
    ]
    out, lse = program.call(*arguments)
    for i, problem in enumerate(problems):
        assert_matches((out[i], lse[i]), attend(problem, causal=True))


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="derivatives need jax 0.10")
def test_derivative() -> None:
    def loss(q, *rest):
        return causal(q, *rest)[0].astype(jnp.float32).sum()

    program = exported(jax.grad(loss), *attend_shapes(*dims()))
    problem = make_problem(np.random.default_rng(), [5, 70], s_q=2)
    gradient = np.asarray(program.call(*problem), np.float32)
    assert gradient.any()
    wanted = jax.grad(loss)(*map(jnp.asarray, problem))
    np.testing.assert_allclose(gradient, np.asarray(wanted, np.float32), rtol=0.02, atol=1e-4)


# --- The paged cache -------------------------------------------------------------------------


def check_steps(
    call: Callable[..., Any], batch: int, num_pages: int, pages: int, steps: int = 4
) -> fm.PagedKVCache:
    """Runs `make_step.step` several times, on sequences that grow differently."""
    rng = np.random.default_rng()
    cache = fm.PagedKVCache.create(
        num_layers=make_step.LAYERS, num_pages=num_pages, batch=batch, max_pages_per_seq=pages
    )
    history: list[list[np.ndarray]] = [[] for _ in range(batch)]
    for _ in range(steps):
        num_tokens = rng.integers(0, make_step.TOKENS + 1, batch, np.int32)
        kv = rng.standard_normal((batch, make_step.TOKENS, 1, HEAD_DIM)).astype(jnp.bfloat16)
        q = rng.standard_normal((batch, make_step.TOKENS, make_step.HEADS, HEAD_DIM))
        q = q.astype(jnp.bfloat16)
        cache, ok, results = call(cache, num_tokens, kv, q)
        assert ok.all()
        for i in range(batch):
            history[i] += list(kv[i, : num_tokens[i]])
        lengths = [len(tokens) for tokens in history]
        np.testing.assert_array_equal(cache.cache_seqlens, lengths)
        for layer, result in enumerate(results):
            pool, table = np.asarray(cache.pages[layer]), np.asarray(cache.block_table)
            for i, tokens in enumerate(history):
                for t, token in enumerate(tokens):
                    cached = pool[table[i, t // PAGE_SIZE], t % PAGE_SIZE]
                    np.testing.assert_array_equal(cached, token)
            problem = Problem(q, pool, table, np.asarray(cache.cache_seqlens))
            assert_matches(result, attend(problem, causal=True))
    return cache


@pytest.mark.parametrize("platforms", [None, BOTH], ids=["this platform", "cpu+cuda"])
def test_cache_of_any_size(platforms) -> None:
    spec, *rest = make_step.shapes()
    step = through_bytes(exported(make_step.step, spec, *rest, platforms=platforms))
    mask = struct(spec.batch, dtype=bool)
    free = through_bytes(exported(fm.PagedKVCache.free, spec, mask, platforms=platforms))
    for batch, num_pages, pages in [(2, 9, 3), (5, 7, 2)]:
        cache = check_steps(step.call, batch, num_pages, pages)
        freed = free.call(cache, np.arange(batch) % 2 == 0)
        seqlens = np.where(np.arange(batch) % 2 == 0, 0, cache.cache_seqlens)
        np.testing.assert_array_equal(freed.cache_seqlens, seqlens)
        freed.check()
        assert freed.num_used == np.sum(-(-seqlens // PAGE_SIZE))


def test_one_pool_of_any_size_in_a_scan() -> None:
    def step(cache, num_tokens, kv):
        def body(cache, operands):
            cache = cache.append(*operands)
            return cache, cache.gather(operands[0])

        cache, ok = cache.allocate(num_tokens)
        cache, dense = jax.lax.scan(body, cache, (jnp.arange(len(kv)), kv))
        return cache, ok, dense

    create = functools.partial(fm.PagedKVCache.create, num_layers=2, one_pool=True)
    batch, num_pages, pages = export.symbolic_shape("batch, num_pages, pages")
    spec = jax.eval_shape(
        functools.partial(create, num_pages=num_pages, batch=batch, max_pages_per_seq=pages)
    )
    assert spec.num_layers == 2
    operands = struct(batch, dtype=jnp.int32), struct(2, batch, 5, 1, HEAD_DIM, dtype=jnp.bfloat16)
    program = through_bytes(exported(step, spec, *operands))
    rng = np.random.default_rng()
    for batch, num_pages, pages in [(2, 4, 2), (3, 3, 1)]:
        kv = rng.standard_normal((2, batch, 5, 1, HEAD_DIM)).astype(jnp.bfloat16)
        cache = create(num_pages=num_pages, batch=batch, max_pages_per_seq=pages)
        cache, ok, dense = program.call(cache, np.full(batch, 5, np.int32), kv)
        assert ok.all()
        np.testing.assert_array_equal(dense[:, :, :5], kv)


def test_a_full_pool_is_told() -> None:
    program = exported(make_step.step, *make_step.shapes())
    cache = fm.PagedKVCache.create(num_layers=2, num_pages=1, batch=2, max_pages_per_seq=1)
    tokens = np.ones((2, make_step.TOKENS, 1, HEAD_DIM), jnp.bfloat16)
    q = np.ones((2, make_step.TOKENS, make_step.HEADS, HEAD_DIM), jnp.bfloat16)
    after, ok, _ = program.call(cache, np.ones(2, np.int32), tokens, q)
    assert ok.tolist() == [True, False]
    assert after.num_used == 1
    assert all(pool.any() for pool in after.pages)
    after, ok, _ = program.call(after, np.int32((64, 1)), tokens, q)
    assert not ok.any()
    assert after.cache_seqlens.tolist() == [1, 0]


def test_cache_is_updated_in_place() -> None:
    """Where it is donated to what calls the program."""

    def arguments():
        cache = fm.PagedKVCache.create(num_layers=2, num_pages=99, batch=2, max_pages_per_seq=2)
        tokens = jnp.ones((2, make_step.TOKENS, 1, HEAD_DIM), jnp.bfloat16)
        q = jnp.ones((2, make_step.TOKENS, make_step.HEADS, HEAD_DIM), jnp.bfloat16)
        return cache, jnp.ones(2, jnp.int32), tokens, q

    def addresses(cache):
        return [pool.unsafe_buffer_pointer() for pool in cache.pages]

    program = through_bytes(exported(make_step.step, *make_step.shapes()))
    cache, *rest = arguments()
    donated = jax.jit(program.call, donate_argnums=0)
    analysis = donated.lower(cache, *rest).compile().memory_analysis()
    kept = jax.jit(program.call).lower(cache, *rest).compile().memory_analysis()
    pools = sum(pool.nbytes for pool in cache.pages)
    assert analysis.alias_size_in_bytes >= pools > kept.alias_size_in_bytes
    before = addresses(cache)
    after, ok, _ = donated(cache, *rest)
    assert ok.all()
    assert addresses(after) == before
    assert all(pool.is_deleted() for pool in cache.pages)
    assert all(pool[0, 0].any() and not pool[-1].any() for pool in after.pages)

    cache, *rest = arguments()
    after, _, _ = program.call(cache, *rest)
    assert not set(addresses(after)) & set(addresses(cache))
    assert not any(pool.any() for pool in cache.pages)


def test_a_cache_of_other_fields_is_refused(monkeypatch) -> None:
    data = exported(make_step.step, *make_step.shapes()).serialize()
    fields = [field.name for field in dataclasses.fields(fm.PagedKVCache)]
    monkeypatch.setattr(paged, "_FIELDS", " ".join(reversed(fields)))
    with pytest.raises(ValueError, match="with a PagedKVCache of the fields 'pages block_table"):
        export.deserialize(data)


# --- Other processes -------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
import jax
import numpy as np
{imports}
folder = Path(sys.argv[1])
attend = jax.export.deserialize((folder / "program").read_bytes()).call
for file in sorted(folder.glob("problem*.npz")):
    with np.load(file) as problem:
        out, lse = attend(*problem.values())
    np.savez(folder / file.name.replace("problem", "result"), out=out, lse=lse)
"""


def run_in_a_fresh_process(folder: Path, imports: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", PROGRAM.format(imports=imports), str(folder)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_fresh_process_needs_the_package_alone(tmp_path: Path) -> None:
    """One program, for batches, pools and tables of different sizes."""
    shapes = attend_shapes(*dims(), dtype=jnp.float16)
    (tmp_path / "program").write_bytes(exported(causal, *shapes).serialize())
    rng = np.random.default_rng()
    problems = [
        make_problem(rng, lengths, s_q=2, dtype=np.float16, spare_entries=len(lengths))
        for lengths in LENGTHS
    ]
    for i, problem in enumerate(problems):
        np.savez(tmp_path / f"problem{i}.npz", **vars(problem))

    ran = run_in_a_fresh_process(tmp_path, "")
    assert ran.returncode != 0
    assert re.search(f"JaxRuntimeError.*{_ffi.DENSE_DECODE}", ran.stderr), ran.stderr

    ran = run_in_a_fresh_process(tmp_path, "import flashmla_jax")
    assert ran.returncode == 0, ran.stderr
    for i, problem in enumerate(problems):
        with np.load(tmp_path / f"result{i}.npz") as result:
            assert_matches((result["out"], result["lse"]), attend(problem, causal=True))


DIVIDED = """
import sys
import jax
import numpy as np
import flashmla_jax as fm
with np.load(sys.argv[1]) as arrays:
    problem = list(arrays.values())
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
specs = jax.P(None, None, "x"), jax.P(), jax.P(), jax.P()
shardings = [jax.NamedSharding(mesh, spec) for spec in specs]
program = jax.export.export(
    jax.jit(fm.flash_mla_with_kvcache, in_shardings=shardings),
    platforms=("cpu", "cuda"),
    disabled_checks=fm.export_disabled_checks(),
)(*[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem])
program = jax.export.deserialize(program.serialize())
out, lse = jax.jit(program.call)(*jax.device_put(problem, shardings))
assert not out.is_fully_replicated
np.savez(sys.argv[2], out=out, lse=lse)
"""


def test_a_program_for_several_devices(tmp_path: Path) -> None:
    problem = make_problem(np.random.default_rng(), [5, 70], dtype=np.float16)
    np.savez(tmp_path / "problem.npz", **vars(problem))
    command = [sys.executable, "-P", "-c", DIVIDED]
    command += [str(tmp_path / name) for name in ("problem.npz", "result.npz")]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    ran = subprocess.run(
        command, env=os.environ | flags, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / "result.npz") as result:
        assert_matches((result["out"], result["lse"]), attend(problem))


# --- Programs of before ----------------------------------------------------------------------


def test_programs_of_before_run() -> None:
    program = export.deserialize(make_step.STEP.read_bytes())
    assert program.platforms == BOTH
    for batch, num_pages, pages in [(2, 9, 3), (5, 7, 2)]:
        check_steps(program.call, batch, num_pages, pages)


def test_programs_of_before_make_the_calls_of_today() -> None:
    """On both platforms: names, attributes, operands, results and workspaces.

    If this fails, other people's programs fail: `exported/make_step.py` says what to do.
    """
    before = calls(export.deserialize(make_step.STEP.read_bytes()))
    assert before.total() == 8  # two operations, two layers, two platforms
    assert before == calls(make_step.export_step())
