"""Reading and writing Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load_file, save_file

import flashmla_jax
from flashmla_jax.models import (
    DeepSeekConfig,
    checkpoint,
    deepseek,
    init_params,
    load_checkpoint,
    save_checkpoint,
)

pytestmark = pytest.mark.usefixtures("on_cpu")

GOLDENS = Path(__file__).parent / "goldens"
CONFIG = DeepSeekConfig(
    model_type="deepseek_v3",
    vocab_size=11,
    hidden_size=6,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=7,
    qk_nope_head_dim=3,
    v_head_dim=5,
    moe_intermediate_size=4,
    n_routed_experts=4,
    n_shared_experts=2,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    attention_bias=True,
)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def params(random_params):
    return random_params(CONFIG)


@pytest.fixture
def sharded(tmp_path, params) -> Path:
    save_checkpoint(tmp_path / "model", CONFIG, params, max_shard_size=20_000)
    return tmp_path / "model"


@pytest.fixture
def single(tmp_path, params) -> Path:
    save_checkpoint(tmp_path / "model", CONFIG, params)
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    """Passes the tensors of a single-file checkpoint through `change`."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- What is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_lite"])
def test_reads_what_hugging_face_wrote(name):
    config, params = load_checkpoint(GOLDENS / name, dtype=jnp.float32)
    tensors = load_file(GOLDENS / name / "model.safetensors")
    moe, at = params["layers"][1]["mlp"], "model.layers.1.mlp"
    for e in range(config.n_routed_experts):
        np.testing.assert_array_equal(
            moe["experts"]["down_proj"]["weight"][e],
            tensors[f"{at}.experts.{e}.down_proj.weight"].astype(np.float32),
        )
    assert moe["gate"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(
        params["layers"][0]["self_attn"]["kv_b_proj"]["kernel"],
        tensors["model.layers.0.self_attn.kv_b_proj.weight"].T.astype(np.float32),
    )
    np.testing.assert_array_equal(
        params["embed_tokens"]["embedding"],
        tensors["model.embed_tokens.weight"].astype(np.float32),
    )
    leaves = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert leaves == sum(tensor.size for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_converts_to_the_dtype_asked_for(single, params, dtype):
    _, loaded = load_checkpoint(single, dtype=dtype)
    assert loaded["layers"][1]["mlp"]["gate"]["kernel"].dtype == jnp.float32
    assert loaded["norm"]["scale"].dtype == dtype
    got = loaded["lm_head"]["kernel"]
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, params["lm_head"]["kernel"].astype(dtype))


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_reads_other_dtypes(single, params, stored):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(stored)

    rewrite(single, change)
    _, loaded = load_checkpoint(single)
    assert loaded["norm"]["scale"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(loaded["lm_head"]["kernel"]), np.float32(params["lm_head"]["kernel"]), atol=1e-3
    )


def test_reads_experts_of_different_dtypes(single, params):
    def change(tensors):
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    rewrite(single, change)
    _, loaded = load_checkpoint(single)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_ignores_multi_token_prediction_and_frequencies(single):
    def change(tensors):
        tensors["model.layers.2.eh_proj.weight"] = np.zeros((6, 12), np.float32)
        tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((6, 12), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(32, np.float32)

    rewrite(single, change)
    _, loaded = load_checkpoint(single)
    assert len(loaded["layers"]) == 2


def test_parameters_do_not_alias_the_files(single):
    _, loaded = load_checkpoint(single, dtype=jnp.bfloat16)
    before = jax.tree.map(np.array, loaded)
    file = single / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    jax.tree.map(np.testing.assert_array_equal, loaded, before)


def test_configuration_can_be_given(single):
    (single / "config.json").unlink()
    config, _ = load_checkpoint(single, CONFIG)
    assert config is CONFIG


# --- What is written -----------------------------------------------------------------------------


def test_sharded_round_trip(sharded, params):
    config, loaded = load_checkpoint(sharded)
    assert config == CONFIG
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) >= 2
    total = 0
    for file in files:
        tensors = load_file(sharded / file)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1
        total += sum(t.nbytes for t in tensors.values())
        assert {name for name, f in index["weight_map"].items() if f == file} == set(tensors)
    assert index["metadata"]["total_size"] == total
    assert sorted(path.name for path in sharded.iterdir()) == sorted([*files, INDEX, "config.json"])
    assert [path.name for path in sharded.parent.iterdir()] == ["model"]


def test_float32_round_trip(tmp_path, random_params):
    params = random_params(CONFIG, 1, jnp.float32)
    save_checkpoint(tmp_path / "deep" / "model", CONFIG, params)
    _, loaded = load_checkpoint(tmp_path / "deep" / "model", dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_tensors_are_aligned_within_a_file(single):
    """PyTorch cannot view a float32 tensor that begins at an odd place."""
    with open(single / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        assert file.tell() % 8 == 0
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"F32", "BF16"}
    for entry in header.values():
        assert entry["data_offsets"][0] % (4 if entry["dtype"] == "F32" else 2) == 0


def test_files_are_as_readable_as_any(single, tmp_path):
    (tmp_path / "any").touch()
    mode = (tmp_path / "any").stat().st_mode
    assert {path.stat().st_mode for path in single.iterdir()} == {mode}


def test_does_not_overwrite(single, params):
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        save_checkpoint(single, CONFIG, params)


def test_a_failed_write_leaves_nothing(tmp_path, params, monkeypatch):
    monkeypatch.setattr(DeepSeekConfig, "to_dict", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path / "model", CONFIG, params)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, params, monkeypatch):
    def fail(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: No space left"):
        save_checkpoint(tmp_path / "model", CONFIG, params)
    assert list(tmp_path.iterdir()) == []


def test_writing_checks_the_parameters(tmp_path, params):
    def save():
        save_checkpoint(tmp_path / "model", CONFIG, params)

    kernel = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = kernel[:, :-1]
    with pytest.raises(ValueError, match=r"lm_head.kernel has shape \(6, 10\), .* \(6, 11\)"):
        save()
    params["lm_head"]["kernel"] = kernel.astype(jnp.int32)
    with pytest.raises(ValueError, match=r"lm_head.kernel is int32"):
        save()
    del params["layers"][1]["mlp"]["gate"]
    with pytest.raises(ValueError, match=r"lack layers.1.mlp.gate.kernel"):
        save()


def test_init_params():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=0)
    params = init_params(config, jax.random.key(0))
    again = init_params(config, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    layer = params["layers"][0]
    kernel = np.float32(layer["self_attn"]["kv_b_proj"]["kernel"])
    assert kernel.std() == pytest.approx(512**-0.5, rel=0.05)
    np.testing.assert_array_equal(layer["input_layernorm"]["scale"], 1)
    np.testing.assert_array_equal(layer["self_attn"]["o_proj"]["bias"], 0)
    assert layer["mlp"]["gate"]["kernel"].dtype == jnp.float32


# --- What transformers reads ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type", ["demo", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"]
)
def test_transformers_reads_models_without_experts(model_type, tmp_path, random_params):
    """The one that the package has, and those that are written: the same logits, and no tensor
    too many or too few."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    folder = Path(flashmla_jax.__file__).parent / "demo_checkpoint"
    if model_type != "demo":
        folder = tmp_path / "model"
        index = {"index_n_heads": 2, "index_head_dim": 128, "index_topk": 16}
        config = dataclasses.replace(
            CONFIG,
            model_type=model_type,
            n_routed_experts=0,
            attention_bias=False,
            qk_nope_head_dim=4,  # transformers' V2 takes no odd one
            **index if model_type == "deepseek_v32" else {},
        )
        save_checkpoint(folder, config, random_params(config))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    config, params = load_checkpoint(folder, dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9), np.int32)
    with torch.no_grad():
        want = model(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(deepseek.forward(params, config, ids), want, atol=1e-4, rtol=0)


# --- DeepSeek's FP8 ------------------------------------------------------------------------------

FP8_CONFIG = dataclasses.replace(CONFIG, hidden_size=150, intermediate_size=260)
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 numbers and float32 scales of blocks of 128 x 128, which span e4m3's range."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = np.empty((rows, columns), np.float32)
    numbers = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    for i, j in np.ndindex(rows, columns):
        block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        scales[i, j] = np.abs(weight[block]).max() / 448
        numbers[block] = (weight[block] / scales[i, j]).astype(numbers.dtype)
    return numbers, scales


def multiply_out(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    product = numbers.astype(np.float32)
    for i, j in np.ndindex(scales.shape):
        product[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j]
    return product


def write_fp8(folder: Path, config: DeepSeekConfig, params: dict) -> None:
    """A checkpoint as DeepSeek publishes them: projections in FP8, the rest in bfloat16."""
    save_checkpoint(folder, config, params)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "_proj" in name and name.endswith(".weight")]:
        numbers, scales = quantise(tensors[name].astype(np.float32))
        tensors |= {name: numbers, f"{name}_scale_inv": scales}
    save_file(tensors, file, metadata={"format": "pt"})
    contents = json.loads((folder / "config.json").read_text())
    contents["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(contents))


@pytest.fixture
def fp8(tmp_path, random_params) -> Path:
    write_fp8(tmp_path / "model", FP8_CONFIG, random_params(FP8_CONFIG))
    return tmp_path / "model"


@pytest.fixture
def fp8_expected(tmp_path, random_params) -> tuple[Path, dict]:
    """An FP8 checkpoint, and its parameters, read at once."""
    folder = tmp_path / "fp8"
    write_fp8(folder, FP8_CONFIG, random_params(FP8_CONFIG))
    return folder, load_checkpoint(folder)[1]


def change_fp8(folder: Path, change) -> None:
    """Passes the tensors of an FP8 checkpoint through `change`."""
    data = (folder / "model.safetensors").read_bytes()
    dtypes = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
    tensors = {
        name: np.frombuffer(tensor["data"], dtypes[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in deserialize(data)
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_fp8_is_multiplied_out(fp8, dtype):
    tensors = {}
    change_fp8(fp8, tensors.update)

    def expected(name):
        return multiply_out(tensors[name], tensors[f"{name}_scale_inv"]).astype(dtype)

    config, params = load_checkpoint(fp8, dtype=dtype)
    assert config == FP8_CONFIG
    assert tensors[UP_PROJ].shape == (260, 150)  # more than a block, and not a multiple of it
    np.testing.assert_array_equal(
        params["layers"][0]["mlp"]["up_proj"]["kernel"], expected(UP_PROJ).T
    )
    down = params["layers"][1]["mlp"]["experts"]["down_proj"]["weight"]
    for e in range(config.n_routed_experts):
        name = f"model.layers.1.mlp.experts.{e}.down_proj.weight"
        np.testing.assert_array_equal(down[e], expected(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype), np.dtype("f4")}


def test_fp8_beside_other_experts(fp8):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    plain = {}

    def change(tensors):
        plain[name] = multiply_out(tensors[name], tensors.pop(f"{name}_scale_inv"))
        tensors[name] = plain[name]

    _, before = load_checkpoint(fp8, dtype=jnp.float32)
    change_fp8(fp8, change)
    _, params = load_checkpoint(fp8, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_fp8_runs(fp8, random_params):
    config, params = load_checkpoint(fp8, dtype=jnp.float32)
    logits = deepseek.forward(params, config, np.arange(6, dtype=np.int32)[None])
    original = random_params(FP8_CONFIG)
    original = jax.tree.map(lambda x: x.astype(jnp.float32), original)
    close = deepseek.forward(original, config, np.arange(6, dtype=np.int32)[None])
    assert np.corrcoef(np.ravel(logits), np.ravel(close))[0, 1] > 0.98


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.pop(f"{UP_PROJ}_scale_inv"),
            ValueError,
            r"lacks model\.layers\.0\.mlp\.up_proj\.weight_scale_inv, scales of an F8_E4M3",
        ),
        (
            lambda t: t.update({f"{UP_PROJ}_scale_inv": np.ones((3, 3), np.float32)}),
            ValueError,
            r"up_proj\.weight_scale_inv has shape \(3, 3\), .* \(3, 2\)",
        ),
        (
            lambda t: t.update({f"{UP_PROJ}_scale_inv": np.ones((3, 2), ml_dtypes.bfloat16)}),
            NotImplementedError,
            r"up_proj\.weight_scale_inv .* is BF16",
        ),
        (
            lambda t: t.update({UP_PROJ: t[UP_PROJ].astype(np.float32)}),
            ValueError,
            r"up_proj\.weight_scale_inv beside a tensor not of F8_E4M3",
        ),
        (
            lambda t: t.update(
                {"model.norm.weight": t["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)}
            ),
            NotImplementedError,
            r"model\.norm\.weight is F8_E4M3, which only matrices may be",
        ),
    ],
)
def test_fp8_errors(fp8, change, error, message):
    change_fp8(fp8, change)
    with pytest.raises(error, match=message):
        load_checkpoint(fp8)


# --- How it is read ------------------------------------------------------------------------------

LARGE = dataclasses.replace(
    CONFIG, vocab_size=4096, hidden_size=256, moe_intermediate_size=256, n_routed_experts=32
)


# Bytes of a piece: a few rows or one, a block of rows.
@pytest.mark.parametrize("piece_bytes", [3000, 30_000])
def test_in_pieces(sharded, params, fp8_expected, monkeypatch, piece_bytes):
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", piece_bytes)
    pieces = []
    get = checkpoint._Checkpoint._get

    def count(self, name, rows, buffer):
        pieces.append(name)
        return get(self, name, rows, buffer)

    monkeypatch.setattr(checkpoint._Checkpoint, "_get", count)
    for folder, expected in ((sharded, params), fp8_expected):
        _, loaded = load_checkpoint(folder, dtype=jnp.bfloat16)
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    rows = -(-piece_bytes // 150)  # at most, of UP_PROJ
    assert pieces.count(UP_PROJ) >= 260 / rows > 1


def test_the_host_holds_a_piece_at_a_time(tmp_path, random_params, loading_peak, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 1 << 19)
    save_checkpoint(tmp_path / "model", LARGE, random_params(LARGE))
    largest = 4096 * 256 * 2
    assert 1 << 19 <= loading_peak(tmp_path / "model") < largest / 2


def test_the_host_holds_one_tensor_at_a_time(tmp_path, random_params, loading_peak):
    """Not even all experts of a layer, which take twice as much as the largest tensor."""
    save_checkpoint(tmp_path / "model", LARGE, random_params(LARGE))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) > 8 * largest
    stacked = random_params(LARGE)["layers"][1]["mlp"]["experts"]["up_proj"]
    assert stacked["weight"].nbytes >= 2 * largest
    del tensors, stacked

    for dtype in (jnp.bfloat16, jnp.float32):
        assert largest <= loading_peak(tmp_path / "model", dtype=dtype) < 1.5 * largest


def test_the_host_holds_one_fp8_tensor_at_a_time(tmp_path, random_params, loading_peak):
    """As it is in the file: multiplied out it would be two or four times as large."""
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=8192)
    write_fp8(tmp_path / "model", config, random_params(config))
    for dtype in (jnp.bfloat16, jnp.float32):
        peak = loading_peak(tmp_path / "model", dtype=dtype)
        assert 8192 * 256 <= peak < 1.5 * 8192 * 256


def test_progress(sharded):
    calls = []
    load_checkpoint(sharded, progress=lambda *call: calls.append(call))
    tensors = {}
    for file in sharded.glob("*.safetensors"):
        tensors |= load_file(file)
    sizes = sorted(tensor.nbytes for tensor in tensors.values())
    done = [done for done, _ in calls]
    assert sorted(np.diff([0, *done])) == sizes
    assert {total for _, total in calls} == {sum(sizes)} == {done[-1]}


def test_progress_counts_scales(fp8):
    calls = []
    load_checkpoint(fp8, progress=lambda *call: calls.append(call))
    tensors = {}
    change_fp8(fp8, tensors.update)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[-1] == (total, total)


def test_everything_is_checked_before_a_number_is_read(sharded, monkeypatch):
    """The last tensor of the model has the wrong shape; its shards are far from the first."""
    (file,) = {f for n, f in weight_map(sharded).items() if n == "lm_head.weight"}
    tensors = load_file(sharded / file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    save_file(tensors, sharded / file)
    monkeypatch.setattr(
        checkpoint._Checkpoint, "read", lambda *args: pytest.fail("numbers were read")
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(10, 6\), .* \(11, 6\)"):
        load_checkpoint(sharded)


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_stop_tokens_are_those_of_both_files_and_are_written(single, tmp_path, params):
    """Chats of Kimi-K2 end at a token that `config.json` has not."""
    file = single / "generation_config.json"
    (single / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "eos_token_id": 8}))
    assert load_checkpoint(single)[0].eos_token_id == 8
    file.write_text(json.dumps({"eos_token_id": 9, "temperature": 0.6}))
    config, _ = load_checkpoint(single)
    assert config == dataclasses.replace(CONFIG, eos_token_id=(8, 9))
    assert load_checkpoint(single, CONFIG)[0] == CONFIG
    save_checkpoint(tmp_path / "again", config, params)
    assert load_checkpoint(tmp_path / "again")[0] == config
    file.write_text(json.dumps({"eos_token_id": ["9"]}))
    with pytest.raises(ValueError, match=rf"{file}: eos_token_id must be .* got \['9'\]"):
        load_checkpoint(single)


# --- What is refused -----------------------------------------------------------------------------


def test_missing_files(sharded, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_checkpoint(tmp_path, CONFIG)
    next(sharded.glob("*-of-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that .* lacks: model-0000\d-of"):
        load_checkpoint(sharded)


def test_missing_tensors(single):
    rewrite(single, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors: model\.layers\.1\.mlp\.experts\.3\.up"):
        load_checkpoint(single)


def test_missing_tensors_are_named_but_for_very_many(single):
    experts = dataclasses.replace(CONFIG, n_routed_experts=10)  # 6 more, of 3 tensors each
    with pytest.raises(ValueError, match=r"lacks 18 tensors: ") as info:
        load_checkpoint(single, experts)
    for e in range(4, 10):
        for name in ("gate", "up", "down"):
            assert f"model.layers.1.mlp.experts.{e}.{name}_proj.weight" in str(info.value)
    assert " more" not in str(info.value)
    experts = dataclasses.replace(CONFIG, n_routed_experts=12)
    with pytest.raises(ValueError, match=r"lacks 24 tensors: .* and 4 more$") as info:
        load_checkpoint(single, experts)
    assert str(info.value).count("_proj.weight") == 20


def test_wrong_shape(single):
    def change(tensors):
        tensors["model.norm.weight"] = np.ones(5, np.float32)

    rewrite(single, change)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(5,\), .* \(6,\)"):
        load_checkpoint(single)


def test_unexpected_tensors(single):
    def change(tensors):
        tensors["model.layers.0.self_attn.indexer.wk.weight"] = np.ones(5, np.float32)

    rewrite(single, change)
    with pytest.raises(ValueError, match=r"1 tensors that the model has no place for: .*indexer"):
        load_checkpoint(single)


def test_missing_and_unexpected_tensors_are_told_together(single):
    def change(tensors):
        tensors["model.norm.wight"] = tensors.pop("model.norm.weight")

    rewrite(single, change)
    message = r"lacks 1 tensors: model\.norm\.weight; it has 1 .*no place for: model\.norm\.wight"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(single)


def test_other_quantisations(single):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight_scale"] = np.ones((1, 1), np.float32)

    rewrite(single, change)
    with pytest.raises(NotImplementedError, match=r"quantised weights .*convert the checkpoint"):
        load_checkpoint(single)


def test_unknown_dtype(single):
    def change(tensors):
        tensors["model.norm.weight"] = np.ones(6, np.int32)

    rewrite(single, change)
    with pytest.raises(NotImplementedError, match=r"model\.norm\.weight .* is I32"):
        load_checkpoint(single)


def test_truncated_and_damaged_files(sharded):
    file = sorted(sharded.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    header_size = int.from_bytes(whole[:8], "little")
    damaged = [whole[:size] for size in (0, 5, 8 + header_size // 2, len(whole) - 1)]
    damaged.append(whole[:8] + b"?" * header_size + whole[8 + header_size :])
    for contents in damaged:
        file.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"{file.name} is truncated or damaged: ") as info:
            load_checkpoint(sharded)
        assert isinstance(info.value.__cause__, SafetensorError)


def test_damaged_index(sharded):
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][name] = files[1]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks .*, which the index says it has"):
        load_checkpoint(sharded)
    (sharded / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is no JSON"):
        load_checkpoint(sharded)


def test_config_that_disagrees_with_the_tensors(tmp_path):
    shutil.copytree(GOLDENS / "deepseek_v3", tmp_path / "model")
    contents = json.loads((tmp_path / "model" / "config.json").read_text())
    contents["num_attention_heads"] = 4
    (tmp_path / "model" / "config.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"q_b_proj\.weight has shape \(264, 48\), .* \(352, 48\)"):
        load_checkpoint(tmp_path / "model")


def test_without_safetensors(single, tmp_path, params, monkeypatch):
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install flashmla-jax\[hf\]"):
        load_checkpoint(single)
    with pytest.raises(ImportError, match=r"pip install flashmla-jax\[hf\]"):
        save_checkpoint(tmp_path / "other", CONFIG, params)
