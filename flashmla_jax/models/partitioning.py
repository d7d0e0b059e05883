"""How the parameters of a model are divided over devices."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flashmla_jax.layers import mla
from flashmla_jax.models.deepseek import DeepSeekConfig


def tensor_parallel(
    config: DeepSeekConfig, mesh: Mesh, axis: str, expert_axis: str | None = None
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Where a model's parameters go, so that each device does its part of every layer.

    Attention is divided by heads (`mla.head_partitioning`), every MLP by its size, that of the
    routed experts too, and the head by the vocabulary. No weight moves when the model runs: devices
    add up what they have after attention and after MLPs, activations of a layer. Embedding,
    norms, routers, what makes latents, and indexers are the same on all devices, and so is the
    cache.

        config = DeepSeekConfig.from_json(path)
        mesh = jax.make_mesh((8,), ("model",))
        shardings = tensor_parallel(config, mesh, "model")
        config, params = load_checkpoint(path, shardings=shardings)

    Args:
      config: the model's configuration.
      mesh: of devices. Its axes are automatic for the model, of whatever kind they are.
      axis: of the mesh, or its name.
      expert_axis: another axis of the mesh, over which the routed experts themselves are divided.

    Returns:
      From a parameter's name, as `load_checkpoint` has it, and its shape to its sharding.

    Raises:
      ValueError: there is no such axis, or heads, sizes or experts do not divide evenly.
    """
    for name, value in (("axis", axis), ("expert_axis", expert_axis)):
        if value is not None and value not in mesh.shape:
            raise ValueError(f"{name}={value!r} is none of the mesh's axes {mesh.axis_names}")
    if expert_axis == axis:
        raise ValueError(f"axis and expert_axis must be two axes, both are {axis!r}")
    divided = {axis: ["num_attention_heads", "intermediate_size", "moe_intermediate_size"]}
    if expert_axis is not None:
        divided[expert_axis] = ["n_routed_experts"]
    for name, fields in divided.items():
        for field in fields:
            if getattr(config, field) % mesh.shape[name]:
                raise ValueError(
                    f"{field}={getattr(config, field)} does not divide into "
                    f"{name}={mesh.shape[name]} parts"
                )
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    heads = mla.head_partitioning(config.mla, axis)
    columns, rows = (None, axis), (axis, None)
    mlp = {"gate_proj": columns, "up_proj": columns, "down_proj": rows}
    experts = {"gate_proj": (axis, None), "up_proj": (axis, None), "down_proj": (None, axis)}
    divides_vocab = config.vocab_size % mesh.shape[axis] == 0

    def spec_of(name: str) -> P:
        *blocks, projection, _leaf = ("", *name.split("."))
        if "experts" in blocks:
            return P(expert_axis, *experts[projection])
        if blocks[-1] == "self_attn" and projection in heads:
            return P(*heads[projection])
        if blocks[-1] in ("mlp", "shared_experts") and projection in mlp:
            return P(*mlp[projection])
        if projection == "lm_head" and divides_vocab:
            return P(*columns)
        return P()

    def sharding_of(name: str, shape: tuple[int, ...]) -> NamedSharding:
        # Of a bias there is the axis of the results.
        spec = spec_of(name)
        return NamedSharding(mesh, P(*spec[len(spec) - len(shape) :]) if spec else spec)

    return sharding_of
