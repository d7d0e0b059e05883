"""The dense decode custom call: what it lowers to, what it needs, and what it refuses."""

from __future__ import annotations

import functools
import shutil
import subprocess
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashmla_jax as fm
from flashmla_jax.cache import layout
from flashmla_jax.ops import _ffi, dense_decode

TARGET = _ffi.DENSE_DECODE
ROOT = Path(__file__).parents[2]


def shapes(batch=2, s_q=1, h_q=16, h_kv=1, num_pages=8, pages=4, dtype=jnp.bfloat16):
    return (
        jax.ShapeDtypeStruct((batch, s_q, h_q, 576), dtype),
        jax.ShapeDtypeStruct((num_pages, 64, h_kv, 576), dtype),
        jax.ShapeDtypeStruct((batch, pages), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


def attend(*operands):
    return fm.flash_mla_with_kvcache(*operands, causal=True)


# --- Lowering --------------------------------------------------------------------------------


def test_compiles_to_one_custom_call() -> None:
    """The kernel and nothing else: no gather of pages, no copy of the cache, no product."""
    text = jax.jit(attend).lower(*shapes()).compile().as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    for operation in (" gather(", " dot(", " copy(", " transpose(", " convert("):
        assert operation not in text


def test_vmap_stays_one_custom_call() -> None:
    q, *rest = shapes()
    mapped = jax.vmap(attend, (0, None, None, None))
    many = jax.ShapeDtypeStruct((3, *q.shape), q.dtype)
    assert jax.jit(mapped).lower(many, *rest).as_text().count(TARGET) == 1


def test_temporary_memory_does_not_grow() -> None:
    """Neither with the length of the sequences, nor, beyond the outputs, with the batch."""

    def temporary(**sizes):
        analysis = jax.jit(attend).lower(*shapes(**sizes)).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    base = temporary()
    assert temporary(num_pages=4096, pages=1024) == base
    assert temporary(batch=256) <= base + 4096


def test_platforms_without_a_kernel_get_the_reference() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = jax.jit(attend).trace(*shapes()).lower(lowering_platforms=("tpu",)).as_text()
    assert TARGET not in text
    assert "dot_general" in text


def test_platforms_without_a_kernel_are_not_batch_invariant() -> None:
    attend = functools.partial(fm.flash_mla_with_kvcache, deterministic="batch_invariant")
    traced = jax.jit(attend).trace(*shapes())
    with pytest.raises(NotImplementedError, match="batch_invariant"):
        traced.lower(lowering_platforms=("tpu",))


def test_the_reference_is_announced_once() -> None:
    def lower(h_q):
        jax.jit(attend).trace(*shapes(h_q=h_q)).lower(lowering_platforms=("tpu",))

    _ffi._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"flashmla_jax runs .* reference"):
        lower(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower(2)


def test_a_module_for_several_platforms_names_those_without_a_kernel() -> None:
    _ffi._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no kernels for tpu") as caught:
        lowered = jax.jit(attend).trace(*shapes()).lower(lowering_platforms=("cpu", "tpu"))
    assert not any("cpu" in str(w.message) for w in caught)
    text = lowered.as_text()
    assert TARGET in text
    assert "dot_general" in text


# --- One truth -------------------------------------------------------------------------------


def test_sizes_agree_with_the_compiled_module() -> None:
    info = _ffi.build_info()
    assert (info["page_size"], info["head_dim"], info["head_dim_v"]) == (
        layout.PAGE_SIZE,
        layout.HEAD_DIM,
        layout.HEAD_DIM_V,
    )
    assert info["fp8_tile"] == layout.FP8.tile
    assert info["fp8_token_bytes"] == layout.FP8.token_bytes
    assert info["fp8_512_tile"] == layout.FP8_512.tile
    assert info["fp8_512_token_bytes"] == layout.FP8_512.token_bytes
    assert info["narrow_rows"] == dense_decode.NARROW_ROWS
    assert info["row_tile"] == dense_decode.ROW_TILE
    assert info["max_partitions"] == dense_decode.MAX_PARTITIONS
    assert info["merge_words"] == dense_decode.MERGE_WORDS
    assert info["chunk_pages"] == dense_decode.CHUNK_PAGES
    assert info["max_chunks"] == dense_decode.MAX_CHUNKS


# --- The checks that protect memory, made again in C++ ---------------------------------------


def call(q, k_cache, block_table, cache_seqlens, *, out=None, lse=None):
    batch, s_q, h_q, _ = (*q.shape, 1, 1, 1)[:4]
    results = [
        out or jax.ShapeDtypeStruct((batch, s_q, h_q, 512), q.dtype),
        lse or jax.ShapeDtypeStruct((batch, h_q, s_q), jnp.float32),
    ]
    attributes = {"softmax_scale": np.float32(1), "causal": False}
    if jax.devices()[0].platform == "gpu":
        results += dense_decode._workspace((batch, max(s_q, 1), max(h_q, 1), 576), 1, 1, False)
        attributes["batch_invariant"] = False
    f = jax.ffi.ffi_call(TARGET, results)
    operands = [jnp.zeros(x.shape, x.dtype) for x in (q, k_cache, block_table, cache_seqlens)]
    return jax.block_until_ready(f(*operands, **attributes))


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_the_bare_call_works() -> None:
    out, lse, *_ = call(*shapes())
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == -np.inf).all()


@pytest.mark.parametrize(
    ("position", "operand", "message"),
    [
        (0, struct(2, 1, 16, 512), "q"),
        (0, struct(3, 1, 16, 576), "batch size"),
        (0, struct(2, 1, 15, 576), "multiple of h_kv"),
        (0, struct(2, 1, 16, 576, dtype=jnp.float16), "share one of"),
        (1, struct(8, 32, 2, 576), "k_cache"),
        (1, struct(8, 64, 576), "k_cache"),
        (1, struct(8, 64, 2, 512), "k_cache"),
        (1, struct(0, 64, 2, 576), "at least one page"),
        (1, struct(8, 64, 2, 576, dtype=jnp.float32), "share one of"),
        (2, struct(3, 4, dtype=jnp.int32), "batch size"),
        (2, struct(2, 0, dtype=jnp.int32), "at least one page"),
        (3, struct(3, dtype=jnp.int32), "batch size"),
    ],
)
def test_the_handler_refuses_operands(position, operand, message) -> None:
    operands = list(shapes(h_kv=2))
    operands[position] = operand
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{TARGET}.*{message}"):
        call(*operands)


@pytest.mark.parametrize("q", [struct(2, 0, 16, 576), struct(2, 1, 0, 576)], ids=str)
def test_the_handler_refuses_an_empty_query(q) -> None:
    # A result that is not empty, or XLA would leave the call out.
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{TARGET}.*a token and a head"):
        call(q, *shapes()[1:], out=struct(2, 1, 16, 512))


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"out": struct(2, 1, 16, 576)}, "out"),
        ({"out": struct(2, 1, 16, 512, dtype=jnp.float16)}, "share one of"),
        ({"lse": struct(2, 1, 16, dtype=jnp.float32)}, "lse"),
    ],
)
def test_the_handler_refuses_results(results, message) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{TARGET}.*{message}"):
        call(*shapes(), **results)


# --- The CPU kernel by itself ----------------------------------------------------------------


def compile_with(flags: list[str], source: Path, program: Path) -> bool:
    compiler = shutil.which("c++")
    command = [str(compiler), *flags, str(source), "-o", str(program)]
    return compiler is not None and subprocess.run(command, check=False).returncode == 0


@pytest.mark.skipif(jax.devices()[0].platform != "cpu", reason="the CPU kernel's own test")
@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"], ids=lambda s: s or "-")
def test_cpu_kernel(tmp_path, sanitizers) -> None:
    """Every instruction set and thread pools of every kind, in a program of its own."""
    flags = ["-std=c++20", "-O2", "-pthread", f"-I{ROOT / 'csrc'}"]
    if sanitizers:
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g1"]
    empty = tmp_path / "empty.cc"
    empty.write_text("int main() {}")
    if not compile_with(flags, empty, tmp_path / "empty"):
        pytest.skip(f"needs a C++ compiler that knows {' '.join(flags)}")
    if subprocess.run([str(tmp_path / "empty")], check=False).returncode != 0:
        pytest.skip(f"programs with -fsanitize={sanitizers} do not run on this kernel")
    program = tmp_path / "dense_decode_test"
    assert compile_with(flags, ROOT / "tests" / "ops" / "dense_decode_test.cc", program)
    command = [str(program), *(["quick"] if sanitizers else [])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
