"""How XLA divides an op over devices when its arguments are, under plain `jit`.

To XLA's partitioner a custom call is opaque: without a rule it gathers every operand on every
device. So in a program for several devices an op becomes a call of a target of its own, which
says how shardings follow from each other (a Shardy rule), and which the partitioner replaces by
what `_partition` returns: the op as it is on one device, on the shapes that are left there.

`jax.experimental.custom_partitioning` does the same through pointers to Python objects in the
program, which change from process to process: the persistent compilation cache misses, and
`jax.export` fails. A partitioner that is registered by name needs none. jax has no public function
for that, hence two private imports: the registry, and the hook that registers with the partitioners
of plug-ins, as the one for CUDA, which are loaded later. jax's own custom_partitioning uses both in
the same way.
"""

from __future__ import annotations

import ast
import concurrent.futures
import copy
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.export import is_symbolic_dim
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from flashmla_jax._private import xla_bridge
from flashmla_jax._private import xla_client as xla

_MANUAL = xla.OpSharding.Type.MANUAL
_REPLICATED = xla.OpSharding.Type.REPLICATED

# The targets of programs for several devices, as they are registered. Exported programs call them,
# with the primitive's parameters in writing: the version is raised when those change.
TARGETS: list[str] = []
VERSION = "v2"
# Of what `_partition` makes of them. It is in the program, so that compilation caches know.
_REVISION = 2

Axes = tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]  # of devices


def _factors(axis: str) -> Axes:
    """What an axis is made of: a KV head serves a group of query heads."""
    return {"h_kv": ("kv_head",), "h_q": ("kv_head", "group")}.get(axis, (axis,))


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which axes of an op may be divided over devices.

    Axes have the names that the op's docstring gives them. Those of one name are divided alike.
    """

    operands: dict[str, Axes]
    """The axes of each operand."""
    results: tuple[Axes, ...]
    divided: Axes
    """The axes that may be divided. All others are whole on every device."""
    small: tuple[str, ...]
    """The operands that may be gathered without a word."""
    advice: str
    """What to do about an axis that cannot be divided."""
    pool: str | None = None
    """The operand that is too large to be gathered: its other axes must be whole beforehand."""
    summed: Axes = ()
    """Divided axes that the result is a sum over, which devices add up, each with its part."""

    @property
    def leading(self) -> str:
        """The operand whose sharding the others follow."""
        return next(operand for operand in self.operands if operand != self.pool)

    @property
    def leading_summed(self) -> str:
        """The first operand with all axes of `summed`, as which others with them are divided."""
        return next(x for x, axes in self.operands.items() if set(self.summed) <= set(axes))

    def over(self, mapped: tuple[bool, ...]) -> Rule:
        """The rule with mapped axes in front, as _mapped.py has them. They may be divided."""
        names = tuple(f"mapped axis {i}" for i in range(len(mapped)))
        own = tuple(name for name, pools in zip(names, mapped, strict=True) if pools)
        return dataclasses.replace(
            self,
            operands={
                operand: (own if operand == self.pool else names) + axes
                for operand, axes in self.operands.items()
            },
            results=tuple(names + axes for axes in self.results),
            divided=names + self.divided,
        )

    def sizes(self, operands: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """The size of each factor, from the shapes of the operands."""
        size = {
            axis: n
            for axes, shape in zip(self.operands.values(), operands, strict=True)
            for axis, n in zip(axes, shape, strict=True)
        }
        if "h_kv" not in size:
            return size
        group = size.get("h_q", size["h_kv"]) // size["h_kv"]
        return size | {"kv_head": size["h_kv"], "group": group}

    def problem(self, operand: str, dimension: int) -> str:
        axis = self.operands[operand][dimension]
        return (
            f"{operand} is sharded along axis {dimension} ({axis}), which every device needs whole"
        )


def is_divided(ctx: Any) -> bool:
    """Whether a lowering's program runs on several devices, among which XLA divides arrays."""
    context = ctx.module_context.axis_context
    if manual := _manual_axes(ctx):
        return any(size > 1 for name, size in context.mesh.shape.items() if name not in manual)
    return (getattr(context, "num_devices", None) or 1) > 1


def is_partly_manual(ctx: Any) -> bool:
    """Whether `shard_map` divides arrays over some axes of the mesh, and XLA over others."""
    return bool(_manual_axes(ctx)) and is_divided(ctx)


def _manual_axes(ctx: Any) -> set[str]:
    """The axes of the `shard_map`s that a lowering is for the inside of."""
    context = ctx.module_context.axis_context
    if not hasattr(context, "manual_axes"):
        return set()
    # Of nested ones, jax 0.9 has only the inner one's axes here, and all in the types.
    return {*context.manual_axes, *ctx.avals_in[0].sharding.mesh.manual_axes}


def register(primitive: Primitive, rule: Rule, name: str) -> Callable[..., Any]:
    """Registers how `primitive` is divided. Returns its lowering for several devices.

    The lowering takes a platform and what it runs there (compilation caches tell programs apart
    by that), and then what lowerings take. On each device it becomes what the primitive lowers to
    for one.
    """
    target = f"{name}_divided_{VERSION}"
    TARGETS.append(target)
    callbacks = {
        "name": target,
        "prop_user_sharding": lambda sharding, *_: sharding,
        "partition": functools.partial(_partition, primitive, rule),
        "infer_sharding_from_operands": functools.partial(_infer, rule),
        "can_side_effecting_have_replicated_sharding": True,
    }
    xla.register_custom_call_partitioner(**callbacks)
    xla_bridge.register_plugin_callbacks(
        functools.partial(xla.register_custom_call_partitioner, **callbacks)
    )

    def lower(platform: str, kernels: str, ctx: Any, *operands: Any, **params: Any) -> Any:
        over = rule.over(params.get("mapped", ()))
        shapes = [x.shape for x in ctx.avals_in]
        if not all(isinstance(size, int) for shape in shapes for size in shape):
            raise NotImplementedError(
                f"{primitive} in a program for several devices needs constant sizes, got {shapes}"
            )
        notation = _shardy(over, shapes, [x.shape for x in ctx.avals_out])
        call = jax.ffi.ffi_lowering(
            target,
            backend_config=repr((platform, params, kernels, _REVISION)),
            api_version=2,
            skip_ffi_layout_processing=True,
            extra_attributes={"sdy.sharding_rule": ir.Attribute.parse(notation)},
        )
        return call(ctx, *operands)

    return lower


# --- Types ------------------------------------------------------------------------------------


def result_types(
    rule: Rule, operands: Sequence[Any], results: Sequence[tuple[tuple[int, ...], Any]]
) -> tuple[jax.core.ShapedArray, ...]:
    """The types of an op's results, of these shapes and dtypes, from those of its operands.

    They vary along the axes of `shard_map`'s mesh that any operand varies along, and are divided
    over the explicit axes of a mesh that operands are divided over.

    Raises:
      ValueError: an operand is divided, over explicit axes, as it cannot be, or otherwise than
        another one; or it is unreduced.
    """
    for operand, x in zip(rule.operands, operands, strict=True):
        manual = getattr(x, "manual_axis_type", None)
        unreduced = {*x.sharding.spec.unreduced, *getattr(manual, "unreduced", ())}
        if unreduced:
            raise ValueError(f"{operand} is unreduced over {sorted(unreduced)}: reduce it first")
    mesh = next((x.sharding.mesh for x in operands if not x.sharding.mesh.empty), None)
    if mesh is None:
        return tuple(jax.core.ShapedArray(shape, dtype) for shape, dtype in results)
    over = _explicit_axes(rule, operands)
    types = []
    for axes, (shape, dtype) in zip(rule.results, results, strict=True):
        spec = PartitionSpec(*(over.get(axis) for axis in axes))
        plain = jax.core.ShapedArray(shape, dtype, sharding=NamedSharding(mesh, spec))
        types.append(_varying(plain, operands))
    return tuple(types)


def _varying(plain: jax.core.ShapedArray, operands: Sequence[Any]) -> jax.core.ShapedArray:
    older = hasattr(plain, "vma")  # jax 0.9
    axes = [x.vma if older else x.manual_axis_type.varying for x in operands]
    varying = frozenset().union(*axes)
    if varying and any(map(is_symbolic_dim, plain.shape)):
        # It would be exported, but no JAX so far runs it: 0.12 ends the process.
        raise NotImplementedError(
            f"JAX cannot run exported programs with symbolic dimensions, here {plain.shape}, "
            "inside shard_map: export for sizes that are numbers"
        )
    if older:
        return plain.update(vma=varying)
    return plain.update(manual_axis_type=type(plain.manual_axis_type)(varying=varying))


def _explicit_axes(rule: Rule, operands: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """The mesh axes that each axis is divided over, as the types of the operands say."""
    over: dict[str, tuple[str, ...]] = {}
    for (operand, axes), x in zip(rule.operands.items(), operands, strict=True):
        for dimension, entry in enumerate(x.sharding.spec):
            names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            if not names:
                continue
            axis = axes[dimension]
            if axis not in rule.divided and operand in rule.small:
                continue
            if axis not in rule.divided:
                raise ValueError(
                    f"{rule.problem(operand, dimension)}: over {names}. {rule.advice} "
                    "(jax.sharding.reshard makes an array whole.)"
                )
            if over.setdefault(axis, names) != names:
                raise ValueError(
                    f"{operand} is sharded along {axis} over {names}, others over {over[axis]}: "
                    "divide them alike (jax.sharding.reshard)"
                )
    kv, heads = over.get("h_kv", ()), over.get("h_q", ())
    if "h_q" in rule.divided and heads[: len(kv)] != kv:
        raise ValueError(
            f"{rule.pool} is sharded along h_kv over {kv}, and q along h_q over {heads}: the heads "
            "that a KV head serves must be where it is (jax.sharding.reshard)"
        )
    results = [axis for axis in over if any(axis in axes for axes in rule.results)]
    for one, other in itertools.combinations(results, 2):
        if set(over[one]) & set(over[other]):
            raise ValueError(
                f"{one} is divided over {over[one]}, and {other} over {over[other]}: a mesh axis "
                "can divide one of them (jax.sharding.reshard)"
            )
    return over


def auto(function: Callable[..., Any], results: Any, **params: Any) -> Callable[..., Any]:
    """`function` with XLA's choice of shardings inside, where a mesh is explicit.

    It gives arrays, in a tree like that of `results`, that are divided as those are.
    """
    function = functools.partial(function, **params)
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, results)
    mesh = jax.tree.leaves(shardings)[0].mesh
    if not mesh.explicit_axes:
        return function
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=shardings)


def of_axes(*axes: tuple[jax.Array, int] | None) -> jax.sharding.NamedSharding | None:
    """The sharding of an array with such axes of others, on an explicit mesh; else None.

    None stands for an axis that is whole.
    """
    types = {i: jax.typeof(axis[0]).sharding for i, axis in enumerate(axes) if axis}
    mesh = next(iter(types.values())).mesh
    if not mesh.explicit_axes:
        return None
    spec = [axis and types[i].spec[axis[1]] for i, axis in enumerate(axes)]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def auto_along(
    function: Callable[..., jax.Array], *axes: tuple[jax.Array, int] | None
) -> Callable[..., jax.Array]:
    """As `auto`, for one result that is divided as `of_axes` says."""
    sharding = of_axes(*axes)
    if sharding is None:
        return function
    explicit = sharding.mesh.explicit_axes
    along: Callable[..., jax.Array] = jax.sharding.auto_axes(
        function, axes=explicit, out_sharding=sharding
    )
    return along


# --- Shardy -----------------------------------------------------------------------------------


def _shardy(rule: Rule, operands: list[tuple[int, ...]], results: list[tuple[int, ...]]) -> str:
    """The rule in Shardy's notation: a letter for each factor of an axis, and their sizes.

    Axes that are not divided have a letter each, so that no sharding travels along them.
    """
    letters = itertools.chain("ijklmnopqrstuvwxyz", map("z_{}".format, itertools.count(1)))
    size_of = rule.sizes(operands)
    letter_of: dict[str, str] = {}
    size_by_letter: dict[str, int] = {}
    whole: list[str] = []

    def letter(size: int) -> str:
        new = next(letters)
        size_by_letter[new] = size
        return new

    def mapping(axes: Axes, shape: tuple[int, ...]) -> str:
        dimensions = []
        for axis, size in zip(axes, shape, strict=True):
            if axis in rule.divided:
                factors = _factors(axis)
                factors = tuple(x for x in factors if size_of[x] > 1) or factors[-1:]
                for x in factors:
                    if x not in letter_of:
                        letter_of[x] = letter(size_of[x])
                dimensions.append("".join(letter_of[x] for x in factors))
            else:
                whole.append(letter(size))
                dimensions.append(whole[-1])
        return f"[{', '.join(dimensions)}]"

    inputs = ", ".join(map(mapping, rule.operands.values(), operands))
    outputs = ", ".join(map(mapping, rule.results, results))
    sizes = ", ".join(f"{letter}={size}" for letter, size in size_by_letter.items())
    return (
        f"#sdy.op_sharding_rule<({inputs})->({outputs}) {{{sizes}}} "
        f"need_replication={{{', '.join(whole)}}}, custom>"
    )


# --- XLA's partitioner ------------------------------------------------------------------------


class _Layout:
    """Which devices have which part of each factor, as the sharding of one array tells."""

    def __init__(self, rule: Rule, sizes: dict[str, int], axes: Axes, sharding: Any) -> None:
        self.uneven: list[str] = []  # axes that stay whole, because they cannot be divided so
        self._rule = rule
        self._sizes = sizes
        self._factors: list[str] = []
        # Devices by their parts of each factor; then those that have the same parts; then those
        # that a `shard_map` around this op divides arrays over.
        self._devices: np.ndarray | None = None
        if not sharding.is_tiled():
            return
        tiles = sharding.tile_assignment_dimensions()
        beyond = sharding.subgroup_types()
        if sharding.replicate_on_last_tile_dim():
            beyond = [_REPLICATED]
        manual = [len(axes) + i for i, kind in enumerate(beyond) if kind == _MANUAL]
        taken: list[int] = []
        shape: list[int] = []
        for place, axis in enumerate(axes):
            if axis not in rule.divided:
                continue
            parts = _parts(axis, tiles[place], sizes)
            if parts is None:
                self.uneven.append(axis)
                continue
            taken.append(place)
            shape += parts
            self._factors += _factors(axis)
        copies = [i for i in range(len(tiles)) if i not in taken + manual]
        devices = np.array(sharding.tile_assignment_devices()).reshape(tiles)
        devices = devices.transpose(taken + copies + manual)
        self._devices = devices.reshape(*shape, math.prod(tiles[i] for i in copies), -1)

    @property
    def parts(self) -> int:
        """Into how many parts the work is divided."""
        return 1 if self._devices is None else math.prod(self._devices.shape[:-2])

    def divided_by(self, other: _Layout) -> _Layout:
        """Devices that have the same parts here share the work by the other's parts.

        They do so as far as they have different ones of them, in the same order: all where the two
        divide over different axes of a mesh, and none where over the same.
        """
        if self._devices is None:
            return other
        if other._devices is None or not other._factors:
            return self
        (factor,) = other._factors
        parts = other._devices.reshape(len(other._devices), -1)
        part_of = np.zeros(parts.max() + 1, np.int64)
        part_of[parts] = np.arange(len(parts))[:, None]
        owned = part_of[self._devices]
        order = np.argsort(owned, axis=-2, kind="stable")
        owned = np.take_along_axis(owned, order, axis=-2)
        copies = owned.shape[-2]
        count = len(np.unique(owned[..., 0][(0,) * (owned.ndim - 2)]))
        even = np.repeat(np.arange(count), copies // count)
        rank = (np.diff(owned, axis=-2, prepend=owned[..., :1, :]) > 0).cumsum(axis=-2)
        if copies % count or not (rank == even[:, None]).all() or self._sizes[factor] % count:
            return self
        devices = np.take_along_axis(self._devices, order, axis=-2)
        new = copy.copy(self)
        new._factors = [*self._factors, factor]
        new._devices = devices.reshape(*devices.shape[:-2], count, copies // count, -1)
        return new

    def sums(self) -> Groups:
        """The devices that add up their results, if there are several."""
        summed = [i for i, x in enumerate(self._factors) if x in self._rule.summed]
        if self._devices is None or not summed:
            return ()
        rest = [i for i in range(self._devices.ndim) if i not in summed]
        groups = self._devices.transpose(rest + summed)
        groups = groups.reshape(-1, math.prod(groups.shape[len(rest) :]))
        return tuple(map(tuple, groups.tolist())) if groups.shape[1] > 1 else ()

    def sharding(self, axes: Axes) -> Any:
        """That of an array."""
        if self._devices is None:
            return xla.HloSharding.replicate()
        places: list[list[int]] = []
        for axis in axes:
            factors = _factors(axis) if axis in self._rule.divided else ()
            known = set(factors) <= set(self._factors)
            places.append([self._factors.index(x) for x in factors] if known else [])
        count = len(self._factors)
        taken = list(itertools.chain(*places))
        copies = [i for i in range(count + 1) if i not in taken]
        shape = self._devices.shape
        tiles = [math.prod(shape[i] for i in each) for each in places]
        beyond = {_REPLICATED: math.prod(shape[i] for i in copies), _MANUAL: shape[count + 1]}
        beyond = {kind: devices for kind, devices in beyond.items() if devices > 1}
        if math.prod(tiles) == 1 and _MANUAL not in beyond:
            return xla.HloSharding.replicate()
        devices = self._devices.transpose([*taken, *copies, count + 1])
        return xla.HloSharding.subgroup_with_device_ordering(
            np.ascontiguousarray(devices.reshape(*tiles, *beyond.values()), np.int64),
            subgroup_types=list(beyond),
        )


def _parts(axis: str, count: int, sizes: dict[str, int]) -> tuple[int, ...] | None:
    """Into how many parts the factors of an axis are divided, or None if not evenly."""
    parts = []
    for factor in _factors(axis):
        parts.append(math.gcd(count, sizes[factor]))
        count //= parts[-1]
        if count > 1 and parts[-1] < sizes[factor]:
            return None
    return tuple(parts) if count == 1 else None


def _partition(
    primitive: Primitive,
    rule: Rule,
    operands: list[Any],
    operand_shardings: list[Any],
    result: Any,
    result_sharding: Any,
    config: bytes,
) -> tuple[bytes, list[Any], Any]:
    """The program for one device, and how its operands and results are to be divided."""
    platform, params, *_ = ast.literal_eval(config.decode())
    rule = rule.over(params.get("mapped", ()))
    shapes = [x.dimensions() for x in operands]
    sizes = rule.sizes(shapes)
    several = result.is_tuple()
    wanted = result_sharding.tuple_elements() if several else [result_sharding]
    layouts = [
        _Layout(rule, sizes, rule.results[0], wanted[0]),
        _Layout(rule, sizes, next(iter(rule.operands.values())), operand_shardings[0]),
    ]
    # Where results are to be whole and queries are not, results travel, and work is divided.
    layout = max(layouts, key=lambda x: x.parts)
    if rule.summed:
        place = list(rule.operands).index(rule.leading_summed)
        axes = rule.operands[rule.leading_summed]
        layouts.append(_Layout(rule, sizes, axes, operand_shardings[place]))
        layout = layouts[-1].divided_by(layout)
    needed = [layout.sharding(axes) for axes in rule.operands.values()]
    given = [layout.sharding(axes) for axes in rule.results]
    _explain_uneven(sizes, layouts)
    for name, before, after in zip(rule.operands, operand_shardings, needed, strict=True):
        _check(rule, name, before, after)
    pool = rule.operands[rule.pool] if rule.pool else None
    for axes, before, after in zip(rule.results, given, wanted, strict=True):
        if axes == pool and (moved := _moved(before, after, len(axes))):
            raise ValueError(_conflict(rule, moved[0], axes[moved[0]]))
    local = tuple(
        (tuple(sharding.tile(x).dimensions()), np.dtype(x.numpy_dtype()))
        for sharding, x in zip(needed, operands, strict=True)
    )
    return (
        _program(primitive, platform, tuple(sorted(params.items())), local, layout.sums()),
        needed,
        xla.HloSharding.tuple_sharding(result, given) if several else given[0],
    )


def _infer(
    rule: Rule, operands: list[Any], operand_shardings: list[Any], result: Any, config: bytes
) -> Any:
    """How results are divided where operands are; Shardy has its own rule for this."""
    _, params, *_ = ast.literal_eval(config.decode())
    rule = rule.over(params.get("mapped", ()))
    sizes = rule.sizes([x.dimensions() for x in operands])
    axes = next(iter(rule.operands.values()))
    layout = _Layout(rule, sizes, axes, operand_shardings[0])
    given = [layout.sharding(axes) for axes in rule.results]
    return xla.HloSharding.tuple_sharding(result, given) if result.is_tuple() else given[0]


def _explain_uneven(sizes: dict[str, int], layouts: list[_Layout]) -> None:
    for axis in dict.fromkeys(itertools.chain(*(layout.uneven for layout in layouts))):
        what = f"{axis} = {sizes[axis]}"
        if "kv_head" in _factors(axis):
            what += f", {sizes['kv_head']} KV heads of {sizes['group']} query heads each,"
        warnings.warn(
            f"{what} cannot be divided evenly as it is sharded. XLA gathers it.", stacklevel=2
        )


def _check(rule: Rule, operand: str, given: Any, needed: Any) -> None:
    """Says what it costs that an operand is divided otherwise than it is needed, or refuses it."""
    axes = rule.operands[operand]
    moved = _moved(given, needed, len(axes))
    if operand == rule.pool:
        for dimension in moved:
            if axes[dimension] in rule.divided:
                raise ValueError(_conflict(rule, dimension, axes[dimension]))
            raise ValueError(f"{rule.problem(operand, dimension)}. {rule.advice}")
        for dimension, axis in enumerate(axes):
            parts, wanted = (_parts_along(x, dimension) for x in (given, needed))
            if parts < wanted:
                state = f"divided by {parts}" if parts > 1 else "not divided"
                warnings.warn(
                    f"{operand} is {state} along axis {dimension} ({axis}), where {wanted} "
                    "parts are needed: XLA copies them at every call. Divide it like "
                    f"{rule.leading}.",
                    stacklevel=2,
                )
        return
    for dimension in moved:
        # About what does not come out even there is a warning.
        if operand not in rule.small and axes[dimension] not in rule.divided:
            problem = rule.problem(operand, dimension)
            warnings.warn(f"{problem}. XLA gathers it.", stacklevel=2)
        elif operand not in rule.small and axes[dimension] in rule.summed:
            warnings.warn(
                f"{operand} is divided along axis {dimension} ({axes[dimension]}) otherwise than "
                f"{rule.leading_summed}: XLA moves it between devices at every call. Divide them "
                "alike.",
                stacklevel=2,
            )


def _conflict(rule: Rule, dimension: int, axis: str) -> str:
    return (
        f"{rule.pool} is divided along axis {dimension} ({axis}) otherwise than {rule.leading} or "
        "the results are, so that XLA would move it between devices: divide them alike"
    )


def _parts_along(sharding: Any, dimension: int) -> int:
    return sharding.tile_assignment_dimensions()[dimension] if sharding.is_tiled() else 1


def _moved(given: Any, needed: Any, ndim: int) -> list[int]:
    """The axes along which some device needs what it has not."""

    def parts(sharding: Any) -> tuple[list[int], np.ndarray]:
        """How many there are along each axis, and which each device has: [devices, ndim]."""
        tiles = sharding.tile_assignment_dimensions()
        places = np.indices(tiles)[:ndim].reshape(ndim, -1).T
        order = np.argsort(sharding.tile_assignment_devices())
        return tiles[:ndim], places[order]

    if not given.is_tiled():
        return []
    tiles, have = parts(given)
    other, need = parts(needed) if needed.is_tiled() else ([1] * ndim, np.zeros_like(have))
    counts, wanted = np.array(tiles), np.array(other)
    inside = (have * wanted <= need * counts) & ((need + 1) * counts <= (have + 1) * wanted)
    return np.flatnonzero(~inside.all(axis=0)).tolist()


@functools.lru_cache(maxsize=256)  # a model's layers are alike
def _program(
    primitive: Primitive,
    platform: str,
    params: tuple[tuple[str, Any], ...],
    operands: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...],
    sums: Groups,
) -> bytes:
    def op(*operands: jax.Array) -> list[jax.Array]:
        results = primitive.bind(*operands, **dict(params))
        return [_sum_p.bind(x, groups=sums) for x in results] if sums else results

    def make() -> bytes:
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in operands]
        lowered = jax.jit(op).trace(*shapes).lower(lowering_platforms=(platform,))
        return mlir.module_to_bytecode(lowered.compiler_ir())

    # A thread has none of what is set around the program that is compiled: with `jax.set_mesh`, jax
    # 0.12 would make this, too, a program for all devices of that mesh.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


# The sum over devices, where there are no named axes, as `psum` would have them.
_sum_p = Primitive("sum_over_devices")
_sum_p.def_abstract_eval(lambda x, groups: x)


def _lower_sum(ctx: Any, x: Any, *, groups: Groups) -> Any:
    del ctx
    call = stablehlo.AllReduceOp(
        [x.type],
        [x],
        replica_groups=ir.Attribute.parse(
            f"dense<{list(map(list, groups))}> : tensor<{len(groups)}x{len(groups[0])}xi64>"
        ),
        channel_handle=stablehlo.ChannelHandle.get(handle=1, type=1),  # the partitioner numbers it
        use_global_device_ids=True,
    )
    scalar = ir.RankedTensorType.get([], ir.RankedTensorType(x.type).element_type)
    block = call.regions[0].blocks.append(scalar, scalar)
    with ir.InsertionPoint(block):
        stablehlo.return_([stablehlo.add(*block.arguments)])
    return call.results


mlir.register_lowering(_sum_p, _lower_sum)
