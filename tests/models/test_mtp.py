"""Multi-token prediction: its parameters in checkpoints, and the module.

The goldens are made of Hugging Face's layers, see goldens/make_goldens.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashmla_jax.cache.paged import PagedKVCache
from flashmla_jax.models import (
    DeepSeekConfig,
    deepseek,
    init_params,
    load_checkpoint,
    save_checkpoint,
)

pytestmark = pytest.mark.usefixtures("on_cpu")

GOLDEN = Path(__file__).parent / "goldens" / "deepseek_v3"
LOGITS = {"atol": 1e-5, "rtol": 0}
COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def write(folder: Path, change=lambda tensors: None, **fields) -> Path:
    """A checkpoint with multi-token prediction, its tensors passed through `change`."""
    tensors = load_file(GOLDEN / "model.safetensors") | load_file(GOLDEN / "mtp.safetensors")
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((GOLDEN / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"))


# --- Checkpoints -----------------------------------------------------------------------------


def test_reads_the_module_and_not_its_copies(checkpoint):
    calls = []
    config, params = load_checkpoint(
        checkpoint, dtype=jnp.float32, progress=lambda *call: calls.append(call)
    )
    assert config.has_mtp
    tensors = load_file(GOLDEN / "mtp.safetensors")
    module, at = params["mtp"], "model.layers.3"
    for name in ("enorm", "hnorm", "input_layernorm"):
        np.testing.assert_array_equal(
            module[name]["scale"], tensors[f"{at}.{name}.weight"].astype(np.float32)
        )
    np.testing.assert_array_equal(
        module["shared_head"]["norm"]["scale"],
        tensors[f"{at}.shared_head.norm.weight"].astype(np.float32),
    )
    np.testing.assert_array_equal(
        module["eh_proj"]["kernel"], tensors[f"{at}.eh_proj.weight"].T.astype(np.float32)
    )
    for e in range(config.n_routed_experts):
        np.testing.assert_array_equal(
            module["mlp"]["experts"]["up_proj"]["weight"][e],
            tensors[f"{at}.mlp.experts.{e}.up_proj.weight"].astype(np.float32),
        )
    own = [tensor for name, tensor in tensors.items() if not name.endswith(COPIES)]
    assert sum(leaf.size for leaf in jax.tree.leaves(module)) == sum(x.size for x in own)
    main = load_file(GOLDEN / "model.safetensors").values()
    total = sum(tensor.nbytes for tensor in [*own, *main])
    assert calls[-1] == (total, total)


def test_models_without_it_are_read_as_before(checkpoint, tmp_path):
    _, expected = load_checkpoint(GOLDEN)
    assert "mtp" not in expected
    _, left_out = load_checkpoint(checkpoint, mtp=False)
    jax.tree.map(np.testing.assert_array_equal, left_out, expected)
    for layers in (0, None, 2):
        folder = write(tmp_path / "model", num_nextn_predict_layers=layers)
        config, params = load_checkpoint(folder)
        assert not config.has_mtp
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_copies_may_be_missing(checkpoint, tmp_path):
    def change(tensors):
        for copy in COPIES:
            del tensors[f"model.layers.3.{copy}"]

    _, params = load_checkpoint(write(tmp_path / "model", change))
    jax.tree.map(np.testing.assert_array_equal, params, load_checkpoint(checkpoint)[1])


def test_missing_and_unexpected_tensors(tmp_path):
    def change(tensors):
        tensors["model.layers.3.mlp.experts.8.up_proj.weight"] = tensors.pop(
            "model.layers.3.mlp.experts.7.up_proj.weight"
        )
        tensors["model.layers.4.enorm.weight"] = np.ones(60, np.float32)

    folder = write(tmp_path / "model", change)
    message = r"lacks 1 tensors: model\.layers\.3\.mlp\.experts\.7\.up_proj\.weight; it has 1 .*8\."
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)
    load_checkpoint(folder, mtp=False)


def test_fp8(tmp_path):
    """Matrices in one block each, the copies too."""
    products = {}

    def change(tensors):
        names = [name for name in tensors if "_proj" in name or name.endswith(COPIES)]
        for name in names:
            if tensors[name].ndim < 2 or max(tensors[name].shape) > 128:
                continue
            values = tensors[name].astype(np.float32)
            scale = np.float32(np.abs(values).max() / 448)
            tensors[name] = (values / scale).astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = np.full((1, 1), scale)
            products[name] = tensors[name].astype(np.float32) * scale

    folder = write(tmp_path / "model", change)
    _, params = load_checkpoint(folder, dtype=jnp.float32)
    module, at = params["mtp"], "model.layers.3"
    np.testing.assert_array_equal(module["eh_proj"]["kernel"], products[f"{at}.eh_proj.weight"].T)
    np.testing.assert_array_equal(
        module["mlp"]["experts"]["down_proj"]["weight"][5],
        products[f"{at}.mlp.experts.5.down_proj.weight"],
    )


def test_round_trip(checkpoint, tmp_path):
    config, params = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "model", config, params)
    again, loaded = load_checkpoint(tmp_path / "model")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    all_names = load_file(checkpoint / "model.safetensors").keys()
    assert names == {
        name for name in all_names if not name.endswith(COPIES) or "layers" not in name
    }

    without = {name: value for name, value in params.items() if name != "mtp"}
    save_checkpoint(tmp_path / "without", config, without)
    _, loaded = load_checkpoint(tmp_path / "without")
    jax.tree.map(np.testing.assert_array_equal, loaded, without)
    other = dataclasses.replace(config, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"have mtp, with .*num_nextn_predict_layers=0"):
        save_checkpoint(tmp_path / "other", other, params)


def test_init_params(checkpoint):
    config, params = load_checkpoint(checkpoint)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), shapes, params)
    other = dataclasses.replace(config, num_nextn_predict_layers=0)
    assert "mtp" not in jax.eval_shape(lambda: init_params(other, jax.random.key(0)))


# --- The module ------------------------------------------------------------------------------


class Golden(NamedTuple):
    config: DeepSeekConfig
    params: dict
    ids: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray

    def cache(self, fill: float = 0.0) -> PagedKVCache:
        cache = PagedKVCache.create(
            num_layers=self.config.num_hidden_layers + 1,
            num_pages=3,
            batch=2,
            max_pages_per_seq=2,
            dtype=jnp.float32,
        )
        return dataclasses.replace(
            cache, pages=tuple(jnp.full_like(pool, fill) for pool in cache.pages)
        )


@pytest.fixture(scope="module", params=["as loaded", "absorbed"])
def golden(request, checkpoint) -> Golden:
    """`ids` are the two sequences, of `lengths`, of which the last token is only a next one."""
    config, params = load_checkpoint(checkpoint, dtype=jnp.float32)
    if request.param == "absorbed":
        params = deepseek.absorb(params, config)
        assert "kernel" not in str(jax.tree.map(lambda x: None, params))
    with np.load(GOLDEN / "goldens.npz") as file:
        lengths = file["lengths"] + file["next_ids"].shape[1]
        ids = np.zeros((2, lengths.max()), np.int32)
        for row, prompt, n, next_ids in zip(
            ids, file["prompts"], file["lengths"], file["next_ids"], strict=True
        ):
            row[: n + len(next_ids)] = [*prompt[:n], *next_ids]
    with np.load(GOLDEN / "mtp.npz") as file:
        return Golden(config, params, ids, lengths, file["logits"])


@functools.partial(jax.jit, static_argnames="config")
def extend(params, config, ids, next_ids, rows, num_tokens, cache):
    _, hidden, cache, ok = deepseek.extend(params, config, ids, rows, num_tokens, cache)
    hidden, cache = deepseek.mtp_extend(params, config, hidden, next_ids, rows, cache)
    return deepseek.head(params, config, hidden), cache, ok


@functools.partial(jax.jit, static_argnames="config")
def decode(params, config, ids, next_ids, cache):
    cache, ok = cache.allocate(jnp.full(len(ids), ids.shape[1]))
    hidden, cache = deepseek.decode_hidden(params, config, ids, cache)
    hidden, cache = deepseek.mtp_decode(params, config, hidden, next_ids, cache)
    return deepseek.head(params, config, hidden), cache, ok


def test_a_whole_prompt(golden):
    """Padding, and rows that come in another order than the sequences."""
    rows = np.array([1, 0, 2])
    ids = np.zeros((3, 50), np.int32)
    ids[:2, :48] = golden.ids[::-1]
    num_tokens = np.array([*golden.lengths[::-1] - 1, 0])
    logits, cache, ok = extend(
        golden.params,
        golden.config,
        ids,
        np.roll(ids, -1, axis=1),
        rows,
        num_tokens,
        golden.cache(np.nan),
    )
    assert ok.all()
    np.testing.assert_array_equal(cache.cache_seqlens, golden.lengths - 1)
    for row, sequence in enumerate(rows[:2]):
        n = golden.lengths[sequence] - 1
        np.testing.assert_allclose(logits[row, :n], golden.logits[sequence, :n], **LOGITS)


def test_chunks_and_steps(golden):
    """Of one token and of several, after chunks of a prompt."""
    cache, begin = golden.cache(np.nan), 0
    for function, count in ((extend, 7), (extend, 12), (decode, 1), (decode, 4), (decode, 1)):
        end = begin + count
        args = golden.ids[:, begin:end], golden.ids[:, begin + 1 : end + 1]
        if function is extend:
            args = (*args, np.arange(2), np.full(2, count))
        logits, cache, ok = function(golden.params, golden.config, *args, cache)
        assert ok.all()
        np.testing.assert_allclose(logits, golden.logits[:, begin:end], **LOGITS)
        begin = end


def test_other_ways_to_connect_it_are_far_off(golden):
    """What the tests above would tell."""
    params, module = golden.params, golden.params["mtp"]
    norm, scale = params["norm"], module["shared_head"]["norm"]["scale"]
    projection = module["eh_proj"]
    (name,) = projection
    swapped = jnp.roll(projection[name], 60, axis=projection[name].shape.index(120))
    wrong = {
        "hidden state and embedding the other way round": {"eh_proj": {name: swapped}},
        "no norm of the embedding": {"enorm": {"scale": jnp.ones(60)}},
        "the hidden state before the norm": {
            "hnorm": {"scale": module["hnorm"]["scale"] / norm["scale"]}
        },
        "the model's norm before the head": {
            "shared_head": {"norm": {"scale": norm["scale"] + 0 * scale}}
        },
    }
    for changes in wrong.values():
        changed = {**params, "mtp": {**module, **changes}}
        args = golden.ids[:, :19], golden.ids[:, 1:20], np.arange(2), np.full(2, 19)
        logits, _, _ = extend(changed, golden.config, *args, golden.cache())
        assert np.abs(logits - golden.logits[:, :19]).max() > 0.1
