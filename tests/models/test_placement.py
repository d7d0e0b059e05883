"""Checkpoints that are loaded onto several devices."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import elsewhere, make_mesh, meshes, run_on_eight_devices
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors import deserialize
from safetensors.numpy import save_file
from test_sharding import collectives

from flashmla_jax import PagedKVCache
from flashmla_jax.models import (
    DeepSeekConfig,
    checkpoint,
    deepseek,
    load_checkpoint,
    save_checkpoint,
    tensor_parallel,
)

CONFIG = DeepSeekConfig(
    model_type="deepseek_v3",
    vocab_size=16,
    hidden_size=160,
    intermediate_size=272,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    moe_intermediate_size=8,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
)


@elsewhere
def test_on_eight_devices() -> None:
    run_on_eight_devices(__file__)


@pytest.fixture
def saved(tmp_path, random_params) -> Path:
    save_checkpoint(tmp_path / "model", CONFIG, random_params(CONFIG))
    return tmp_path / "model"


@pytest.fixture
def mesh():
    return make_mesh(expert=4, model=2)


def spec_of(name: str, shape: tuple[int, ...]) -> P:
    """Experts over one axis, and whatever is two-dimensional over the other."""
    if ".experts." in name:
        return P("expert", None, "model") if "down" not in name else P("expert", "model")
    if len(shape) == 2:
        return P("model") if "o_proj" in name or "down" in name else P(None, "model")
    return P()


def assert_placed_as(params, expected, mesh) -> None:
    """Every part is where it belongs, has its size, and its numbers."""
    leaves, paths = jax.tree.leaves(params), jax.tree_util.tree_leaves_with_path(expected)
    assert len(leaves) == len(paths)
    for leaf, (path, whole) in zip(leaves, paths, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        sharding = NamedSharding(mesh, spec_of(name, whole.shape))
        assert leaf.sharding.is_equivalent_to(sharding, whole.ndim), name
        for shard in leaf.addressable_shards:
            assert shard.data.shape == sharding.shard_shape(whole.shape)
            np.testing.assert_array_equal(shard.data, np.asarray(whole)[shard.index])


@meshes
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_shardings_as_a_function(saved, mesh, dtype):
    _, expected = load_checkpoint(saved, dtype=dtype)
    names = []

    def shardings(name, shape):
        names.append(name)
        return NamedSharding(mesh, spec_of(name, shape))

    _, params = load_checkpoint(saved, dtype=dtype, shardings=shardings)
    assert_placed_as(params, expected, mesh)
    assert "layers.1.mlp.experts.up_proj.weight" in names
    assert len(names) == len(set(names)) == len(jax.tree.leaves(expected))


def make_fp8(folder: Path) -> None:
    """Makes projections FP8, with any scales."""
    file = folder / "model.safetensors"
    tensors = {}
    rng = np.random.default_rng(0)
    for name, tensor in deserialize(file.read_bytes()):
        dtype = {"BF16": jnp.bfloat16, "F32": np.float32}[tensor["dtype"]]
        array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
        if "_proj" in name:
            array = array.astype(jnp.float8_e4m3fn)
            blocks = [-(-size // 128) for size in array.shape]
            tensors[f"{name}_scale_inv"] = rng.uniform(0.5, 2, blocks).astype(np.float32)
        tensors[name] = array
    save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))


@meshes
@pytest.mark.parametrize("fp8", [False, True])
def test_pieces_of_tensors_on_several_devices(saved, mesh, monkeypatch, fp8):
    """Some pieces are one device's, some are several ones', some begin within a block."""
    if fp8:
        make_fp8(saved)
    _, expected = load_checkpoint(saved)
    for piece_bytes in (3000, 25_000):  # of rows of up to 544 bytes
        monkeypatch.setattr(checkpoint, "_PIECE_BYTES", piece_bytes)
        _, params = load_checkpoint(
            saved, shardings=lambda name, shape: NamedSharding(mesh, spec_of(name, shape))
        )
        assert_placed_as(params, expected, mesh)


@meshes
def test_fp8_on_several_devices(saved, mesh):
    """The parts begin within a block, at row 80 of `hidden_size` 160 and 136 of 272."""
    make_fp8(saved)
    _, expected = load_checkpoint(saved, dtype=jnp.float32)
    _, params = load_checkpoint(
        saved,
        dtype=jnp.float32,
        shardings=lambda name, shape: NamedSharding(mesh, spec_of(name, shape)),
    )
    assert_placed_as(params, expected, mesh)


@meshes
@pytest.mark.parametrize("fp8", [False, True])
def test_the_host_holds_one_tensor_at_a_time(tmp_path, mesh, random_params, loading_peak, fp8):
    """And no copies of its columns, which do not lie in one piece."""
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=8192)
    save_checkpoint(tmp_path / "model", config, random_params(config))
    if fp8:
        make_fp8(tmp_path / "model")
    largest = 8192 * 256 * (1 if fp8 else 2)

    def of_columns(name: str, shape: tuple[int, ...]) -> NamedSharding:
        if len(shape) < 2:
            return NamedSharding(mesh, P())
        spec = ("model", None) if name.endswith(".kernel") else (None, "model")
        return NamedSharding(mesh, P(*[None] * (len(shape) - 2), *spec))

    for dtype in (jnp.bfloat16, jnp.float32):
        peak = loading_peak(tmp_path / "model", dtype=dtype, shardings=of_columns)
        assert largest <= peak < 1.5 * largest


@meshes
def test_shardings_as_a_tree(saved, mesh):
    """A sharding may stand for a whole branch."""
    everywhere = NamedSharding(mesh, P())
    experts = NamedSharding(mesh, P("expert"))
    moe = {"gate": everywhere, "experts": experts, "shared_experts": everywhere}
    attention = dict.fromkeys(
        ("self_attn", "input_layernorm", "post_attention_layernorm"), everywhere
    )
    shardings = {
        "embed_tokens": {"embedding": NamedSharding(mesh, P("model"))},
        "layers": [everywhere, {**attention, "mlp": moe}],
        "norm": everywhere,
        "lm_head": everywhere,
    }
    _, params = load_checkpoint(saved, shardings=shardings)
    for leaf in jax.tree.leaves(params["layers"][1]["mlp"]["experts"]):
        assert leaf.sharding.is_equivalent_to(experts, 3)
        assert leaf.addressable_shards[0].data.shape[0] == 2
    assert params["embed_tokens"]["embedding"].addressable_shards[0].data.shape == (8, 160)
    del shardings["layers"][1]["mlp"]["gate"]
    with pytest.raises(ValueError, match=r"must give .* for layers\.1\.mlp\.gate\.kernel"):
        load_checkpoint(saved, shardings=shardings)


@meshes
def test_a_sharded_model_computes_the_same(saved, mesh):
    config, params = load_checkpoint(saved, dtype=jnp.float32)
    ids = np.arange(10, dtype=np.int32).reshape(2, 5)
    expected = deepseek.forward(params, config, ids)
    _, params = load_checkpoint(
        saved,
        dtype=jnp.float32,
        shardings=lambda name, shape: NamedSharding(mesh, spec_of(name, shape)),
    )
    got = deepseek.forward(params, config, ids)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


@meshes
def test_shardings_that_do_not_divide(saved, mesh, random_params):
    with pytest.raises(ValueError, match=r"embed_tokens\.embedding \(16, 160\) cannot be divided"):
        load_checkpoint(saved, shardings=NamedSharding(mesh, P(None, None, "expert")))
    config = dataclasses.replace(CONFIG, vocab_size=15)
    save_checkpoint(saved.with_name("odd"), config, random_params(config))
    vocabulary = NamedSharding(mesh, P("model"))
    with pytest.raises(ValueError, match=r"embed_tokens\.embedding \(15, 160\) cannot be divided"):
        load_checkpoint(saved.with_name("odd"), shardings=lambda name, shape: vocabulary)


@meshes
def test_one_device_of_many(saved):
    device = jax.devices()[5]
    calls = []
    _, params = load_checkpoint(
        saved,
        shardings=SingleDeviceSharding(device),
        progress=lambda *call: calls.append(call),
    )
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(params))
    assert calls[-1][0] == calls[-1][1]


def test_shardings_that_are_none(saved):
    with pytest.raises(ValueError, match=r"for embed_tokens\.embedding \(16, 160\), it gives None"):
        load_checkpoint(saved, shardings=lambda name, shape: None)


# --- Tensor parallelism -----------------------------------------------------------------------


@meshes
@pytest.mark.parametrize("expert_axis", [None, "expert"])
def test_tensor_parallel(saved, mesh, expert_axis):
    """What every device has, what its steps send, and that logits are those of one device."""
    shardings = tensor_parallel(CONFIG, mesh, "model", expert_axis)
    _, whole = load_checkpoint(saved, dtype=np.float32)
    _, params = load_checkpoint(saved, dtype=np.float32, shardings=shardings)
    absorbed = deepseek.absorb(params, CONFIG)
    for divided in (params, absorbed):
        layer = divided["layers"][1]
        for block, parts in (
            (divided["lm_head"], 2),
            (layer["self_attn"]["kv_b_proj"], 2),
            (layer["self_attn"]["q_b_proj"], 2),
            (layer["self_attn"]["o_proj"], 2),
            (layer["mlp"]["shared_experts"], 2),
            (divided["layers"][0]["mlp"], 2),
            (layer["mlp"]["experts"], 8 if expert_axis else 2),
        ):
            for leaf in jax.tree.leaves(block):
                assert all(x.data.size * parts == leaf.size for x in leaf.addressable_shards)

    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 5))
    forward = jax.jit(deepseek.forward, static_argnames="config")
    expected = forward(whole, config=CONFIG, ids=ids)
    np.testing.assert_allclose(forward(params, config=CONFIG, ids=ids), expected, atol=1e-5)

    cache = PagedKVCache.create(
        num_layers=2, num_pages=3, batch=3, max_pages_per_seq=1, dtype=np.float32
    )
    cache = jax.device_put(cache, NamedSharding(mesh, P()))
    step = jax.jit(deepseek.decode_step, static_argnames="config")
    for divided in (params, absorbed):
        compiled = step.lower(divided, config=CONFIG, ids=ids[:, :1], cache=cache).compile()
        # After attention, dense MLP or shared experts, and routed experts: an activation.
        sent = collectives(compiled)
        assert 0 < len(sent) <= 2 + 2 + 1
        for line in sent:
            results, _ = line.split(" all-reduce(")
            assert set(re.findall(r"f32\[([\d,]+)\]", results)) <= {"3,1,160", "3,160"}, line
        now = cache
        for i in range(ids.shape[1]):
            logits, now, ok = step(divided, config=CONFIG, ids=ids[:, i : i + 1], cache=now)
            assert ok.all()
            np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=1e-4)


@meshes
@pytest.mark.parametrize(
    ("change", "axes", "message"),
    [
        ({}, ("tensor",), "axis='tensor' is none of the mesh's axes"),
        ({}, ("model", "pipeline"), "expert_axis='pipeline' is none"),
        ({}, ("model", "model"), "must be two axes, both are 'model'"),
        ({"num_attention_heads": 5}, ("model",), "num_attention_heads=5 does not divide into mod"),
        ({"n_routed_experts": 6}, ("model", "expert"), "n_routed_experts=6 does not divide into"),
    ],
)
def test_what_cannot_be_divided(mesh, change, axes, message):
    with pytest.raises(ValueError, match=message):
        tensor_parallel(dataclasses.replace(CONFIG, **change), mesh, *axes)
