"""Hugging Face checkpoints of DeepSeek models: safetensors to parameters and back.

A checkpoint may be far larger than the host's memory. Loading holds a piece of a tensor there at a
time, some of its rows: their parts go to the devices that are to have them, and are transposed and
converted there, to their place in the parameter. The experts of a layer, which are tensors of their
own in a file, are parts of one parameter. Saving gathers the tensors of one file at a time.

DeepSeek's FP8 checkpoints have e4m3 tensors `X`, and beside each a float32 `X_scale_inv` with one
number for each block of 128 x 128 (fewer at the ends), by which the block is multiplied.

The `safetensors` package checks and writes the files; only loading and saving import it. Their
numbers are read here, for NumPy has no name for half of the dtypes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from flashmla_jax.layers.indexer import IndexerConfig
from flashmla_jax.models.deepseek import DeepSeekConfig, read_json_object

Shardings = Sharding | Callable[[str, tuple[int, ...]], Sharding] | Mapping[str, Any]
"""Where parameters go, see `load_checkpoint`."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_FP8 = "F8_E4M3"
_READABLE = _DTYPES | {_FP8: np.dtype(ml_dtypes.float8_e4m3fn)}
_SCALE = "_scale_inv"
_BLOCK = 128
# Rows of a tensor that are read at a time. XLA sends them to a GPU by way of a pool of pinned
# memory, which grows with the largest array that has been sent, and is never given back.
_PIECE_BYTES = 1 << 22
_MAX_NAMED = 20  # tensors in a message


def load_checkpoint(
    path: str | os.PathLike[str],
    config: DeepSeekConfig | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    *,
    shardings: Shardings | None = None,
    mtp: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DeepSeekConfig, dict[str, Any]]:
    """Reads a checkpoint, of which the host holds 4 MB at a time, or a row of a tensor.

    (Beside that, XLA has what it sends to a GPU in memory of its own.)

    All names, shapes and dtypes are checked before the first number is read. To show a bar:

        with tqdm(unit="B", unit_scale=True) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            config, params = load_checkpoint(path, progress=progress)

    or, with rich, `progress=lambda done, total: bar.update(task, completed=done, total=total)`.

    Args:
      path: a folder with `config.json` and either `model.safetensors` or shards and
        `model.safetensors.index.json`. Stop tokens also come from `generation_config.json`, if it
        has that, see `DeepSeekConfig.from_json`.
      config: used in place of both.
      dtype: of the parameters, whatever that of the file (float32, float16, bfloat16, or DeepSeek's
        FP8 with block scales, multiplied out in float32). The routers' stay float32.
      shardings: where the parameters go, by default to the default device. A
        `jax.sharding.Sharding` for all; or a function from a parameter's name, as in
        "layers.3.mlp.experts.up_proj.weight", and its shape in the model to one; or a tree like the
        parameters, in which a sharding may also stand for all that would be below it. A process
        reads the tensors of which its own devices get a part, and nothing goes through others.
      mtp: whether to read the multi-token prediction module, if there is one (`config.has_mtp`, and
        the tensors, which many conversions drop). Its copies of embedding and head are not read.
      progress: called after each tensor with the bytes read so far and the bytes to read.

    Returns:
      The configuration and the parameters, laid out as `flashmla_jax.models.deepseek` describes.
      Other layers past `num_hidden_layers` than the module are left out.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged; tensors are missing, have the wrong shape, or have no place in
        the model; `shardings` lacks a parameter, or does not divide one.
      NotImplementedError: the model is none this library has code for, or its weights are
        quantised in another way.
      ImportError: the `safetensors` package is missing.
    """
    path = Path(path)
    if config is None:
        config = DeepSeekConfig.from_json(path)
    checkpoint = _Checkpoint(path)
    mtp = mtp and config.has_mtp and checkpoint.has_mtp(config)
    parameters = list(_parameters(config, mtp))
    checkpoint.check_names([name for p in parameters for name in p.names], config, mtp)
    for parameter in parameters:
        checkpoint.check(parameter)
    places = {p.path: _Placement.of(p, shardings) for p in parameters}
    needed = [name for place in places.values() for _, name in place.needed]
    checkpoint.make_room_for(needed)
    total = sum(map(checkpoint.nbytes, needed))
    done = 0

    def read(parameter: _Parameter) -> jax.Array:
        nonlocal done
        place = places.pop(parameter.path)
        place.allocate(parameter.dtype(dtype))
        for expert, name in place.needed:
            for piece in checkpoint.read(name):
                place.put(expert, piece)
            done += checkpoint.nbytes(name)
            if progress is not None:
                progress(done, total)
        return place.assemble()

    return config, _build(config, parameters, read)


def save_checkpoint(
    path: str | os.PathLike[str],
    config: DeepSeekConfig,
    params: Mapping[str, Any],
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint that this module and, of most models, Hugging Face transformers can read.

    Transformers 5 does not know Kimi-K2's `model_type`, and refuses the experts of LongCat-Flash.

    The folder appears whole or not at all: it is written under another name beside `path` and
      renamed.

    Args:
      path: the folder to make; it must not exist, or be empty.
      config: goes to `config.json`, with all stop tokens; there is no `generation_config.json`.
      params: as `load_checkpoint` returns them, float32, float16 or bfloat16; with or without
        `mtp`, of which no copies of embedding and head are written.
      max_shard_size: bytes of tensors per file, which only a tensor larger than that exceeds; a
        file's tensors are in host memory together. With more than one file there is a
        `model.safetensors.index.json`.

    Raises:
      FileExistsError: `path` exists and is not an empty folder.
      ValueError: a parameter is missing, or has the wrong shape or dtype; or there is `mtp` where
        the configuration has none.
      OSError: a file cannot be written.
      ImportError: the `safetensors` package is missing.
    """
    safetensors = _import_safetensors()
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder")

    mtp = "mtp" in params
    if mtp and not config.has_mtp:
        raise ValueError(f"the parameters have mtp, with {config.num_nextn_predict_layers=}")
    tensors = [
        tensor for parameter in _parameters(config, mtp) for tensor in _tensors(parameter, params)
    ]
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes

    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.mkdir(parents=True)
    try:
        config_file = scratch / "config.json"
        config_file.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) == 1:
                file = _SINGLE
            weight_map.update({tensor.name: file for tensor in shard})
            try:
                safetensors.numpy.save_file(
                    {tensor.name: tensor.host() for tensor in shard},
                    scratch / file,
                    metadata={"format": "pt"},
                )
            except safetensors.SafetensorError as error:
                raise OSError(f"{path / file} cannot be written: {error}") from error
            # safetensors 0.8 leaves a file readable by its owner alone, whatever the umask.
            shutil.copymode(config_file, scratch / file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (scratch / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        os.replace(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def init_params(
    config: DeepSeekConfig, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> dict[str, Any]:
    """Random parameters: normal, weights scaled by `in ** -0.5`; norms 1, biases 0.

    Args:
      config: the model's configuration.
      key: a `jax.random` key.
      dtype: of the parameters; the routers' are float32.

    Returns:
      Parameters laid out as `flashmla_jax.models.deepseek` describes, with `mtp` if the
      configuration has it.
    """
    numbers = itertools.count()

    def draw(parameter: _Parameter) -> jax.Array:
        shape, to = parameter.model_shape, parameter.dtype(dtype)
        number = next(numbers)
        if parameter.leaf in ("kernel", "weight"):
            size = shape[-2] if parameter.transposed else shape[-1]
            return _normal(jax.random.fold_in(key, number), shape, to, size**-0.5)
        if parameter.leaf == "embedding":
            return _normal(jax.random.fold_in(key, number), shape, to, 1.0)
        return jnp.full(shape, 1 if parameter.leaf == "scale" else 0, to)

    return _build(config, _parameters(config, config.has_mtp), draw)


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """One parameter of the model and the tensors of the checkpoint that hold it.

    Attributes:
      path: keys into the nested parameters, joined by dots.
      shape: of its tensor in the checkpoint, where a kernel is `[out, in]`.
      num_experts: if not 0, it is this many such tensors, stacked along a new first axis.
      float32: whether it is float32 whatever the model's dtype.
      stored_path: what the checkpoint has in place of `path`, if not the same.
    """

    path: str
    shape: tuple[int, ...]
    num_experts: int = 0
    float32: bool = False
    stored_path: str = ""

    @property
    def leaf(self) -> str:
        """The last key."""
        return self.path.rpartition(".")[2]

    @property
    def transposed(self) -> bool:
        """Whether the model has the last two axes the other way round."""
        return self.leaf == "kernel"

    @property
    def model_shape(self) -> tuple[int, ...]:
        """The shape of the parameter in the model."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (self.num_experts, *shape) if self.num_experts else shape

    @property
    def names(self) -> list[str]:
        """The names of its tensors in the checkpoint."""
        module, _, leaf = (self.stored_path or self.path).rpartition(".")
        name = f"{module}.{'weight' if leaf in ('kernel', 'scale', 'embedding') else leaf}"
        if not name.startswith("lm_head."):
            name = f"model.{name}"
        if not self.num_experts:
            return [name]
        return [name.replace(".experts.", f".experts.{e}.") for e in range(self.num_experts)]

    def dtype(self, dtype: jax.typing.DTypeLike) -> np.dtype[Any]:
        """Its dtype in a model of `dtype`."""
        return np.dtype(np.float32) if self.float32 else np.dtype(dtype)

    def get(self, params: Mapping[str, Any]) -> Any:
        """Its value among the nested `params`."""
        node: Any = params
        for key in self.path.split("."):
            try:
                node = node[int(key) if key.isdigit() else key]
            except (KeyError, IndexError):
                raise ValueError(f"the parameters lack {self.path}") from None
        return node


def _parameters(config: DeepSeekConfig, mtp: bool) -> Iterator[_Parameter]:
    """All parameters of a model: the one list that loading, saving and initialising go by.

    `mtp` says whether there are those of the multi-token prediction module.
    """
    for parameter in _model(config):
        yield _as_longcat(parameter) if config.is_longcat else parameter
    for parameter in _mtp(config) if mtp else ():
        rest = parameter.path.removeprefix("mtp.")
        stored_path = f"layers.{config.num_hidden_layers}.{rest}"
        yield dataclasses.replace(parameter, stored_path=stored_path)


def _as_longcat(parameter: _Parameter) -> _Parameter:
    """The parameter with the name that LongCat's checkpoints have, where two layers are one."""
    layer = re.fullmatch(r"layers\.(\d+)\.(\w+)\.(.*)", parameter.path)
    if layer is None:
        return parameter
    pair, one = divmod(int(layer[1]), 2)
    module, rest = f"{layer[2]}.{one}", layer[3]
    if layer[2] == "mlp":
        module = f"mlps.{one}"
    elif layer[2] == "shortcut":
        module = "mlp"
        rest = rest.replace("gate.kernel", "router.classifier.kernel").replace("gate.", "router.")
    return dataclasses.replace(parameter, stored_path=f"layers.{pair}.{module}.{rest}")


def _model(config: DeepSeekConfig) -> Iterator[_Parameter]:
    hidden = config.hidden_size
    yield _Parameter("embed_tokens.embedding", (config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers):
        yield from _layer(f"layers.{layer}", layer, config)
        if config.has_shortcut(layer):
            yield from _moe(f"layers.{layer}.shortcut", config)
    yield _Parameter("norm.scale", (hidden,))
    if not config.tie_word_embeddings:
        yield _Parameter("lm_head.kernel", (config.vocab_size, hidden))


def _mtp(config: DeepSeekConfig) -> Iterator[_Parameter]:
    hidden = config.hidden_size
    yield _Parameter("mtp.enorm.scale", (hidden,))
    yield _Parameter("mtp.hnorm.scale", (hidden,))
    yield _Parameter("mtp.eh_proj.kernel", (hidden, 2 * hidden))
    yield from _layer("mtp", config.num_hidden_layers, config)
    yield _Parameter("mtp.shared_head.norm.scale", (hidden,))


def _layer(at: str, layer: int, config: DeepSeekConfig) -> Iterator[_Parameter]:
    hidden = config.hidden_size
    yield _Parameter(f"{at}.input_layernorm.scale", (hidden,))
    yield from _attention(f"{at}.self_attn", config)
    yield _Parameter(f"{at}.post_attention_layernorm.scale", (hidden,))
    if config.is_moe(layer):
        yield from _moe(f"{at}.mlp", config)
    else:
        yield from _mlp(f"{at}.mlp", hidden, config.intermediate_size)


def _attention(at: str, config: DeepSeekConfig) -> Iterator[_Parameter]:
    hidden, mla = config.hidden_size, config.mla
    q_size = mla.num_heads * mla.qk_head_dim
    latent, cached = mla.kv_lora_rank, mla.kv_lora_rank + mla.qk_rope_head_dim
    kv_size = mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    biased = {"kv_a_proj_with_mqa": cached, "o_proj": hidden}
    if mla.q_lora_rank is None:
        yield _Parameter(f"{at}.q_proj.kernel", (q_size, hidden))
    else:
        biased["q_a_proj"] = mla.q_lora_rank
        yield _Parameter(f"{at}.q_a_proj.kernel", (mla.q_lora_rank, hidden))
        yield _Parameter(f"{at}.q_a_layernorm.scale", (mla.q_lora_rank,))
        yield _Parameter(f"{at}.q_b_proj.kernel", (q_size, mla.q_lora_rank))
    yield _Parameter(f"{at}.kv_a_proj_with_mqa.kernel", (cached, hidden))
    yield _Parameter(f"{at}.kv_a_layernorm.scale", (latent,))
    yield _Parameter(f"{at}.kv_b_proj.kernel", (kv_size, latent))
    yield _Parameter(f"{at}.o_proj.kernel", (hidden, mla.num_heads * mla.v_head_dim))
    if config.indexer is not None:
        yield from _indexer(f"{at}.indexer", config, config.indexer)
    if config.attention_bias:
        for name, size in biased.items():
            yield _Parameter(f"{at}.{name}.bias", (size,))


def _indexer(at: str, config: DeepSeekConfig, index: IndexerConfig) -> Iterator[_Parameter]:
    hidden, q_latent = config.hidden_size, config.q_lora_rank or 0
    yield _Parameter(f"{at}.wq_b.kernel", (index.num_heads * index.head_dim, q_latent))
    yield _Parameter(f"{at}.wk.kernel", (index.head_dim, hidden))
    yield _Parameter(f"{at}.k_norm.scale", (index.head_dim,))
    yield _Parameter(f"{at}.k_norm.bias", (index.head_dim,))
    yield _Parameter(f"{at}.weights_proj.kernel", (index.num_heads, hidden), float32=True)


def _mlp(at: str, hidden: int, size: int, num_experts: int = 0) -> Iterator[_Parameter]:
    leaf = "weight" if num_experts else "kernel"
    yield _Parameter(f"{at}.gate_proj.{leaf}", (size, hidden), num_experts)
    yield _Parameter(f"{at}.up_proj.{leaf}", (size, hidden), num_experts)
    yield _Parameter(f"{at}.down_proj.{leaf}", (hidden, size), num_experts)


def _moe(at: str, config: DeepSeekConfig) -> Iterator[_Parameter]:
    hidden, size = config.hidden_size, config.moe_intermediate_size
    experts = config.n_routed_experts
    places = experts + config.zero_expert_num
    yield _Parameter(f"{at}.gate.kernel", (places, hidden), float32=True)
    if config.topk_method == "noaux_tc":
        yield _Parameter(f"{at}.gate.e_score_correction_bias", (places,), float32=True)
    yield from _mlp(f"{at}.experts", hidden, size, experts)
    if config.n_shared_experts:
        yield from _mlp(f"{at}.shared_experts", hidden, size * config.n_shared_experts)


def _build(
    config: DeepSeekConfig,
    parameters: Iterable[_Parameter],
    make: Callable[[_Parameter], jax.Array],
) -> dict[str, Any]:
    """The nested parameters of a model, each made by `make`."""
    params: dict[str, Any] = {"layers": [{} for _ in range(config.num_hidden_layers)]}
    for parameter in parameters:
        node: Any = params
        *parents, leaf = parameter.path.split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[leaf] = make(parameter)
    return params


_Index = tuple[slice, ...]
"""A box of an array; the slices have a start and a stop."""


class _Placement:
    """One parameter, on the devices of this process that are to have a part of it."""

    def __init__(
        self,
        parameter: _Parameter,
        sharding: Sharding | None,
        index_of: Mapping[jax.Device | None, _Index],
    ) -> None:
        self._parameter = parameter
        self._sharding = sharding
        self._index_of = index_of  # None is the default device
        self._parts: dict[jax.Device | None, jax.Array] = {}

    @classmethod
    def of(cls, parameter: _Parameter, shardings: Shardings | None) -> _Placement:
        shape = parameter.model_shape
        if shardings is None:
            return cls(parameter, None, {None: tuple(slice(0, size) for size in shape)})
        sharding = _sharding_of(parameter, shardings)
        try:
            sharding.shard_shape(shape)
            index_of = sharding.addressable_devices_indices_map(shape)
        except (ValueError, IndexError) as error:  # the latter for a spec that is too long
            raise ValueError(
                f"{parameter.path} {shape} cannot be divided as shardings says: {error}"
            ) from error
        return cls(
            parameter,
            sharding,
            {
                device: tuple(
                    slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)
                )
                for device, index in index_of.items()
                if index is not None
            },
        )

    @property
    def needed(self) -> list[tuple[int, str]]:
        """The tensors of which these devices have a part: the expert's number, or 0, and a name."""
        names = list(enumerate(self._parameter.names))
        if self._parameter.num_experts:
            experts = {e for i in self._index_of.values() for e in range(i[0].start, i[0].stop)}
            return [(e, name) for e, name in names if e in experts]
        return names if self._index_of else []

    def allocate(self, dtype: np.dtype[Any]) -> None:
        """Makes room for the tensors, which come piece by piece."""
        for device, index in self._index_of.items():
            shape = tuple(part.stop - part.start for part in index)
            self._parts[device] = jnp.zeros(shape, dtype, device=device)

    def put(self, expert: int, piece: _Piece) -> None:
        """Gives each device its part of a piece of a tensor, and waits for it."""
        for device, index in self._index_of.items():
            at = []  # in the part that is the device's
            if self._parameter.num_experts:
                if not index[0].start <= expert < index[0].stop:
                    continue
                at = [expert - index[0].start]
                index = index[1:]
            transposed = self._parameter.transposed
            rows, *columns = index[::-1] if transposed else index
            own = _overlap(rows, piece.rows)
            if own.start >= own.stop:
                continue
            place = [own.start - rows.start, *(0 for _ in columns)]
            at += place[::-1] if transposed else place
            start = own.start - piece.rows.start
            x = piece.x[(slice(start, start + own.stop - own.start), *columns)]
            scales, first = None, [0, 0]
            if piece.scales is not None:
                box = (own, *columns)
                blocks = tuple(slice(i.start // _BLOCK, -(-i.stop // _BLOCK)) for i in box)
                scales = jax.device_put(piece.scales[blocks], device)
                first = [i.start % _BLOCK for i in box]
            x = jax.device_put(x, device)  # on a CPU this may be `piece.x` itself
            part = self._parts[device]
            self._parts[device] = _store(
                part, x, scales, np.array(first, np.int32), np.array(at, np.int32), transposed
            )
        jax.block_until_ready(list(self._parts.values()))

    def assemble(self) -> jax.Array:
        """The parameter, once all tensors are there."""
        if self._sharding is None:
            return self._parts[None]
        return jax.make_array_from_single_device_arrays(
            self._parameter.model_shape, self._sharding, list(self._parts.values())
        )


def _sharding_of(parameter: _Parameter, shardings: Shardings) -> Sharding:
    """What `shardings` says of a parameter."""
    node: Any = shardings
    if callable(shardings):
        node = shardings(parameter.path, parameter.model_shape)
    else:
        for key in parameter.path.split("."):
            if isinstance(node, Mapping) and key in node:
                node = node[key]
            elif isinstance(node, Sequence) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            else:
                break
    if not isinstance(node, Sharding):
        raise ValueError(
            f"shardings must give a jax.sharding.Sharding for {parameter.path} "
            f"{parameter.model_shape}, it gives {node!r}"
        )
    return node


def _overlap(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


@functools.partial(jax.jit, static_argnames="transposed", donate_argnames="part")
def _store(
    part: jax.Array,
    x: jax.Array,
    scales: jax.Array | None,
    first: jax.Array,
    at: jax.Array,
    transposed: bool,
) -> jax.Array:
    """`part` with `x`, as the checkpoint has it, times its blocks' scales, from `at` on.

    `first` is the place of `x[0, 0]` within its block.
    """
    if scales is not None:
        scales = jnp.repeat(jnp.repeat(scales, _BLOCK, axis=0), _BLOCK, axis=1)
        x = x.astype(jnp.float32) * jax.lax.dynamic_slice(scales, tuple(first), x.shape)
    x = x.astype(part.dtype)
    x = x.T if transposed else x
    x = x.reshape((1,) * (part.ndim - x.ndim) + x.shape)
    return jax.lax.dynamic_update_slice(part, x, tuple(at))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(
    key: jax.Array, shape: tuple[int, ...], dtype: np.dtype[Any], std: jax.typing.ArrayLike
) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)


class _Entry(NamedTuple):
    """Where a tensor is in a file, and what."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _row_bytes(entry: _Entry) -> int:
    return entry.nbytes // entry.shape[0]


def _rows_of_piece(entry: _Entry) -> int:
    """At least one, and whole blocks if it is more than a block's: pieces are of one shape then."""
    rows = min(max(_PIECE_BYTES // _row_bytes(entry), 1), entry.shape[0])
    return rows if rows < _BLOCK or rows == entry.shape[0] else rows - rows % _BLOCK


class _Piece(NamedTuple):
    """Rows of a tensor."""

    rows: slice
    x: np.ndarray  # these rows
    scales: np.ndarray | None  # of the whole tensor


class _Checkpoint:
    """The tensors of a checkpoint folder, wherever in it they are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._safetensors = _import_safetensors()
        self._entries: dict[str, dict[str, _Entry]] = {}  # by file, once needed
        self._buffer = np.empty(0, np.uint8)
        index = path / _INDEX
        if index.exists():
            self._file_of: dict[str, str] = read_json_object(index).get("weight_map", {})
            files = set(self._file_of.values())
            if missing := sorted(file for file in files if not (path / file).is_file()):
                raise FileNotFoundError(f"{_INDEX} names files that {path} lacks: {_some(missing)}")
        elif (path / _SINGLE).is_file():
            self._file_of = dict.fromkeys(self._entries_of(_SINGLE), _SINGLE)
        else:
            raise FileNotFoundError(f"{path} has neither {_SINGLE} nor {_INDEX}")

    def has_mtp(self, config: DeepSeekConfig) -> bool:
        """Whether there is a module for multi-token prediction, to go by its projection."""
        return f"model.layers.{config.num_hidden_layers}.eh_proj.weight" in self._file_of

    def check_names(self, names: list[str], config: DeepSeekConfig, mtp: bool) -> None:
        """Raises unless the checkpoint has the tensors `names` and no others that matter.

        Those of multi-token prediction matter with `mtp`, but for its copies of others.
        """
        missing = [name for name in names if name not in self._file_of]
        known = {*names, *(name + _SCALE for name in names)}
        known |= {
            f"model.layers.{config.num_hidden_layers}.{copy}.weight{suffix}"
            for copy in ("embed_tokens", "shared_head.head")
            for suffix in ("", _SCALE)
        }
        unexpected = []
        for name in self._file_of:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            is_left_out = layer is not None and int(layer[1]) >= config.num_hidden_layers + mtp
            is_left_out |= name.startswith("model.mtp.")  # LongCat's
            if name not in known and not is_left_out and not name.endswith(".rotary_emb.inv_freq"):
                unexpected.append(name)
        quantised = r"(weight_scale|weight_packed|qweight|qzeros|scales|g_idx)$"
        if names_of_it := [name for name in unexpected if re.search(quantised, name)]:
            raise NotImplementedError(
                f"{self._path} has quantised weights ({_some(names_of_it)}), which are not "
                "supported: convert the checkpoint to bfloat16"
            )
        faults = []
        if missing:
            faults.append(f"lacks {len(missing)} tensors: {_some(missing)}")
        if unexpected:
            faults.append(
                f"has {len(unexpected)} tensors that the model has no place for: "
                f"{_some(unexpected)}"
            )
        if faults:
            raise ValueError(f"{self._path} {'; it '.join(faults)}")

    def check(self, parameter: _Parameter) -> None:
        """Raises unless the tensors of `parameter` have its shape and can be read."""
        for name in parameter.names:
            dtype = self._check(name, parameter.shape, [*_READABLE])
            scales = name + _SCALE
            if dtype != _FP8:
                if scales in self._file_of:
                    raise ValueError(f"{self._path} has {scales} beside a tensor not of {_FP8}")
                continue
            if len(parameter.shape) != 2:
                raise NotImplementedError(f"{name} is {_FP8}, which only matrices may be")
            if scales not in self._file_of:
                raise ValueError(f"{self._path} lacks {scales}, scales of an {_FP8} tensor")
            self._check(scales, tuple(-(-size // _BLOCK) for size in parameter.shape), ["F32"])

    def _check(self, name: str, shape: tuple[int, ...], dtypes: list[str]) -> str:
        """The dtype of tensor `name`; raises unless it is one of these, and the shape is this."""
        entry = self._entry(name)
        if entry.dtype not in dtypes:
            raise NotImplementedError(
                f"{name} in {self._path / self._file_of[name]} is {entry.dtype}, which is not "
                f"supported; only {', '.join(dtypes)} are"
            )
        if entry.shape != shape:
            raise ValueError(f"{name} has shape {entry.shape}, the configuration wants {shape}")
        return entry.dtype

    def nbytes(self, name: str) -> int:
        """The bytes of tensor `name`, and of its scales if it has any."""
        names = [name, name + _SCALE]
        return sum(self._entry(name).nbytes for name in names if name in self._file_of)

    def make_room_for(self, names: Iterable[str]) -> None:
        """Allocates what the pieces of these tensors are read into.

        One buffer for all: JAX may keep an array for a while after it has copied it.
        """
        entries = map(self._entry, names)
        largest = max((_rows_of_piece(e) * _row_bytes(e) for e in entries), default=0)
        self._buffer = np.empty(largest, np.uint8)

    def read(self, name: str) -> Iterator[_Piece]:
        """The tensor `name`, in pieces, each of which is there until the next one is read."""
        entry, scales = self._entry(name), None
        if name + _SCALE in self._file_of:
            its = self._entry(name + _SCALE)
            all_rows, room = slice(0, its.shape[0]), np.empty(its.nbytes, np.uint8)
            scales = self._get(name + _SCALE, all_rows, room)
        count = _rows_of_piece(entry)
        for start in range(0, entry.shape[0], count):
            rows = slice(start, min(start + count, entry.shape[0]))
            yield _Piece(rows, self._get(name, rows, self._buffer), scales)

    def _get(self, name: str, rows: slice, buffer: np.ndarray) -> np.ndarray:
        entry, path = self._entry(name), self._path / self._file_of[name]
        data = buffer[: (rows.stop - rows.start) * _row_bytes(entry)]
        with open(path, "rb") as stream:
            stream.seek(entry.start + rows.start * _row_bytes(entry))
            if stream.readinto(data.data) != len(data):
                raise ValueError(f"{path} ends within {name}")
        return data.view(_READABLE[entry.dtype]).reshape(-1, *entry.shape[1:])

    def _entry(self, name: str) -> _Entry:
        file = self._file_of[name]
        entry = self._entries_of(file).get(name)
        if entry is None:
            raise ValueError(f"{self._path / file} lacks {name}, which the index says it has")
        return entry

    def _entries_of(self, file: str) -> dict[str, _Entry]:
        """The tensors of a file, which has the length of its header, that in JSON, and numbers."""
        if file not in self._entries:
            path = self._path / file
            try:
                with self._safetensors.safe_open(path, framework="np"):
                    pass  # it has checked the file's length and all of the header
            except self._safetensors.SafetensorError as error:
                raise ValueError(f"{path} is truncated or damaged: {error}") from error
            with open(path, "rb") as stream:
                header_size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(header_size))
            header.pop("__metadata__", None)
            self._entries[file] = {
                name: _Entry(
                    tensor["dtype"],
                    tuple(tensor["shape"]),
                    8 + header_size + tensor["data_offsets"][0],
                    tensor["data_offsets"][1] - tensor["data_offsets"][0],
                )
                for name, tensor in header.items()
            }
        return self._entries[file]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor to be written: all of a parameter, or one expert's part of it."""

    name: str
    parameter: _Parameter
    value: Any
    expert: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.parameter.shape) * int(np.dtype(self.value.dtype).itemsize)

    def host(self) -> np.ndarray:
        """Its numbers in the checkpoint's layout, contiguous as `save_file` takes them to be."""
        value = self.value[self.expert] if self.parameter.num_experts else self.value
        array = np.asarray(value)
        return np.ascontiguousarray(array.T if self.parameter.transposed else array)


def _tensors(parameter: _Parameter, params: Mapping[str, Any]) -> list[_Tensor]:
    """The tensors that hold `parameter`, whose value is among `params`."""
    value = parameter.get(params)
    if value.shape != parameter.model_shape:
        raise ValueError(
            f"{parameter.path} has shape {value.shape}, the configuration wants "
            f"{parameter.model_shape}"
        )
    if np.dtype(value.dtype) not in _DTYPES.values():
        raise ValueError(
            f"{parameter.path} is {value.dtype}; only {', '.join(_DTYPES)} are written"
        )
    return [_Tensor(name, parameter, value, e) for e, name in enumerate(parameter.names)]


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install flashmla-jax[hf]") from error
    return safetensors


def _some(names: list[str]) -> str:
    """The names, for a message; of many, the first."""
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
