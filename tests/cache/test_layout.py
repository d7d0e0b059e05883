"""The FP8 page formats."""

from __future__ import annotations

import fp8_oracle as oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flashmla_jax.cache import layout

FORMATS = {"FP8": layout.FP8, "FP8_512": layout.FP8_512}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def make_kv(rng: np.random.Generator, head_dim: int, pages: int = 2, rows: int = 5) -> np.ndarray:
    """Tokens of very different sizes, zeros, and the largest number of a tile a power of two."""
    kv = rng.standard_normal((pages, rows, 1, head_dim), np.float32)
    kv *= np.exp2(rng.integers(-20, 20, (pages, rows, 1, 1))).astype(np.float32)
    kv[0, 0] = 0
    kv[0, 1, 0, :128] = np.clip(kv[0, 1, 0, :128], -1, 1)
    kv[0, 1, 0, [3, 70]] = 448 * 2.0**-6
    kv[0, 2, 0, 7] = 3e38
    return kv.astype(ml_dtypes.bfloat16)


def quantize(kv: np.ndarray, **options: bool) -> np.ndarray:
    fmt = layout.FP8 if kv.shape[-1] == 576 else layout.FP8_512
    return np.array(jax.jit(lambda x: layout.quantize(x, fmt, **options))(kv))


def test_sizes() -> None:
    fmt = layout.FP8
    assert (fmt.token_bytes, fmt.num_codes, fmt.num_scales) == (656, 512, 4)
    fmt = layout.FP8_512
    assert (fmt.token_bytes, fmt.num_codes, fmt.num_scales) == (584, 448, 7)


def test_quantize_656(rng: np.random.Generator) -> None:
    kv = make_kv(rng, 576)
    actual = quantize(kv)
    assert actual.dtype == np.uint8
    assert actual.shape == (2, 5, 1, 656)
    np.testing.assert_array_equal(actual, oracle.quantize_656(kv))
    np.testing.assert_array_equal(quantize(kv[1, 2, 0]), oracle.quantize_656(kv[1, 2, 0]))


def test_largest_numbers_and_their_scales() -> None:
    """Powers of two are the least that will do: around 448 times one, the next."""
    for power in (-13, -6, 0, 40):
        edge = np.float32(448 * 2.0**power)
        for largest in (np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.inf)):
            kv = np.zeros(576, np.float32)
            kv[[5, 200]] = largest, -largest
            scales = np.asarray(layout.quantize(jnp.asarray(kv)))[512:528].view(np.float32)
            least = 2.0 ** (power if largest <= edge else power + 1)
            np.testing.assert_array_equal(scales, [least, least, 2.0**-13, 2.0**-13])


def test_quantize_with_any_scales(rng: np.random.Generator) -> None:
    kv = make_kv(rng, 576)
    actual, expected = quantize(kv, powers_of_two=False), oracle.quantize_656(kv, False)
    scales = [np.ascontiguousarray(x[..., 512:528]).view(np.float32) for x in (actual, expected)]
    np.testing.assert_allclose(*scales, rtol=2.0**-22)
    # A quotient's last bit decides between two codes that are as near.
    codes = [np.concatenate([x[..., :512], x[..., 528:]], axis=-1) for x in (actual, expected)]
    assert np.mean(codes[0] != codes[1]) < 0.01
    numbers = [oracle.dequantize_656(x) for x in (actual, expected)]
    np.testing.assert_allclose(*numbers, rtol=0.13, atol=2.0**-9 * scales[0].max())


def test_quantize_584(rng: np.random.Generator) -> None:
    kv = make_kv(rng, 512)
    actual, expected = quantize(kv), oracle.quantize_584(kv)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_dequantize(rng: np.random.Generator, fmt: layout.FP8Format, dtype: jnp.dtype) -> None:
    pages = quantize(make_kv(rng, fmt.head_dim))
    read = oracle.dequantize_656 if fmt is layout.FP8 else oracle.dequantize_584
    expected = read(pages).astype(dtype)
    for same in (pages, pages.view(ml_dtypes.float8_e4m3fn)):
        actual = np.asarray(layout.dequantize(same, fmt, dtype))
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_all_codes(fmt: layout.FP8Format) -> None:
    """Each of the 256, beside scales from next to nothing to huge."""
    tokens = np.zeros((256, fmt.head_dim), np.float32)
    pages = quantize(tokens.reshape(4, 64, 1, -1).astype(ml_dtypes.bfloat16))
    flat = pages.reshape(4, -1)
    for code in range(256):
        page, row = divmod(code, 64)
        if fmt is layout.FP8:
            flat[page, 656 * row : 656 * row + 512] = code
            scales = np.array([2.0**-100, 0.37, 1, 2.0**100], np.float32)
            flat[page, 656 * row + 512 : 656 * row + 528] = scales.view(np.uint8)
        else:
            flat[page, 576 * row : 576 * row + 448] = code
            flat[page, 576 * 64 + 8 * row :][:8] = [1, 60, 126, 127, 128, 200, 255, 99]
    read = oracle.dequantize_656 if fmt is layout.FP8 else oracle.dequantize_584
    with np.errstate(all="ignore"):
        expected = read(pages).astype(np.float32)
    actual = np.asarray(layout.dequantize(pages, fmt, jnp.float32))
    normal = ~((np.abs(expected) < 2.0**-126) & (expected != 0))  # XLA may flush the others
    assert normal.mean() > 0.8
    np.testing.assert_array_equal(actual[normal], expected[normal])


def test_dequantized_tokens_are_near(rng: np.random.Generator) -> None:
    kv = rng.standard_normal((2, 64, 1, 576), np.float32).astype(ml_dtypes.bfloat16)
    exact = kv.astype(np.float64)
    again = np.asarray(layout.dequantize(quantize(kv)), np.float64)
    np.testing.assert_array_equal(again[..., 512:], exact[..., 512:])
    # Half of the last of three bits, of numbers that are not among the smallest.
    near = np.abs(again - exact) <= np.maximum(np.abs(exact) / 16, 2.0**-9 * 2.0**-6)
    assert near.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_what_is_not_finite_becomes_nan(fmt: layout.FP8Format, bad: float) -> None:
    kv = np.ones((1, 4, 1, fmt.head_dim), np.float32)
    kv[0, 2, 0, fmt.tile + 3] = bad
    again = np.array(layout.dequantize(layout.quantize(jnp.asarray(kv), fmt), fmt))
    of_its_tile = slice(fmt.tile, 2 * fmt.tile)
    assert np.isnan(again[0, 2, 0, of_its_tile]).all()
    again[0, 2, 0, of_its_tile] = 1
    np.testing.assert_array_equal(again, 1)


@pytest.mark.parametrize("fmt", [None, *FORMATS.values()], ids=["numbers", *FORMATS])
def test_take_tokens(rng: np.random.Generator, fmt: layout.FP8Format | None) -> None:
    pool = make_kv(rng, 576 if fmt is None else fmt.head_dim, pages=3, rows=16)
    numbers = pool
    if fmt is not None:
        pool = quantize(pool)
        numbers = np.asarray(layout.dequantize(pool, fmt))
    places = rng.integers(0, 3 * 16, (2, 7), np.int32)
    actual = layout.take_tokens(jnp.asarray(pool), jnp.asarray(places), fmt, jnp.bfloat16)
    np.testing.assert_array_equal(actual, numbers.reshape(48, -1)[places])


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("kv must be floating point", lambda: layout.quantize(jnp.zeros(576, jnp.int32))),
        ("kv must be .*576", lambda: layout.quantize(jnp.zeros(512))),
        (
            "powers_of_two",
            lambda: layout.quantize(jnp.zeros((1, 4, 1, 512)), layout.FP8_512, powers_of_two=False),
        ),
        ("FP8_512 pages", lambda: layout.quantize(jnp.zeros((1, 4, 2, 512)), layout.FP8_512)),
        ("pages must be .*656", lambda: layout.dequantize(jnp.zeros(655, jnp.uint8))),
        ("uint8 or float8_e4m3fn", lambda: layout.dequantize(jnp.zeros(656, jnp.int8))),
        (
            "FP8_512 pages",
            lambda: layout.dequantize(jnp.zeros((4, 584), jnp.uint8), layout.FP8_512),
        ),
    ],
)
def test_refuses(message: str, call) -> None:
    with pytest.raises(ValueError, match=message):
        call()
