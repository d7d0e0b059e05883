"""Loads the compiled module and registers its FFI targets.

The module is optional at import time, so that `flashmla_jax` can be imported from a source tree:
without it every op lowers to the reference.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flashmla_jax.ops import _sharding

_flashmla: ModuleType | None
try:
    _flashmla = importlib.import_module("flashmla_jax._flashmla")
except ImportError as error:
    _flashmla = None
    _import_error: str | None = str(error)
else:
    _import_error = None

CPU: Final = "cpu"
CUDA: Final = "cuda"
HOPPER: Final = "9.0"

# The FFI targets. Exported programs outlive a release, and call them by these names. A name ends in
# a version, to be raised when operands, results (the GPU workspace is some of them), attributes or
# what they mean change: a program of before then finds no such target, and is never misread. (Where
# a target takes more than it did, programs of before mean the same, and it keeps its name.) The
# same names stand in csrc/ffi/handlers.h; a test compares them.
DENSE_DECODE: Final = "flashmla_dense_decode_v1"
CACHE_APPEND: Final = "flashmla_cache_append_v2"
SPARSE_ATTENTION: Final = "flashmla_sparse_attention_v2"
# The same on a GPU, but never recorded in CUDA graphs.
DENSE_DECODE_NO_GRAPH: Final = "flashmla_dense_decode_no_graph_v1"
CACHE_APPEND_NO_GRAPH: Final = "flashmla_cache_append_no_graph_v2"
# On a GPU only.
INDEX_TOPK: Final = "flashmla_index_topk_v1"
# Of models.few_tokens, on a GPU only.
FEW_TOKENS: Final = "flashmla_few_tokens_v2"
FEW_LOGITS: Final = "flashmla_few_logits_v1"
# Of routed_experts, on a GPU only.
GROUPED_MLP: Final = "flashmla_grouped_mlp_v1"
TARGETS: Final = (
    DENSE_DECODE,
    CACHE_APPEND,
    SPARSE_ATTENTION,
    DENSE_DECODE_NO_GRAPH,
    CACHE_APPEND_NO_GRAPH,
    INDEX_TOPK,
    FEW_TOKENS,
    FEW_LOGITS,
    GROUPED_MLP,
)


def _register_targets() -> frozenset[str]:
    if _flashmla is None:
        return frozenset()
    platforms = _flashmla.registrations()
    for platform, targets in platforms.items():
        for name, capsule in targets.items():
            jax.ffi.register_ffi_target(name, capsule, platform=platform)
    return frozenset({"cpu": CPU, "CUDA": CUDA}[platform] for platform in platforms)


_PLATFORMS = _register_targets()


def build_info() -> dict[str, Any]:
    """What the compiled module was built with; {} without a module."""
    return {} if _flashmla is None else dict(_flashmla.build_info())


def import_error() -> str | None:
    """Why the compiled module did not load, or None."""
    return _import_error


@functools.cache
def _foreign_gpus() -> tuple[str, ...]:
    """Compute capabilities of the local GPUs that the Hopper kernels cannot run on.

    One such GPU decides for all: a program is lowered for a platform, not for a device of it.
    """
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError:
        return ()
    found = {str(getattr(device, "compute_capability", "unknown")) for device in devices}
    return tuple(sorted(found - {HOPPER}))


def why_no_kernel(platform: str, *, elsewhere: bool = False) -> str | None:
    """Why ops lower to the reference on `platform`, or None when there is a kernel.

    Args:
      platform: "cpu", "cuda", or another of JAX's.
      elsewhere: the program is exported, to run with what is built and found on other machines.
    """
    if elsewhere and platform in (CPU, CUDA):
        return None
    if _flashmla is None:
        return f"its compiled module did not load ({_import_error})"
    if platform not in (CPU, CUDA):
        return f"it has no kernels for {platform}"
    if platform not in _PLATFORMS:
        return "it was built without CUDA (FLASHMLA_CUDA=ON builds the Hopper kernels)"
    if platform == CUDA and _foreign_gpus():
        capabilities = ", ".join(_foreign_gpus())
        return (
            f"its GPU kernels need compute capability {HOPPER}, and a GPU here has {capabilities}"
        )
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"flashmla_jax runs the much slower jax.numpy reference here: {reason}.", stacklevel=3
    )


def define_primitive(name: str, abstract_eval: Callable[..., Any]) -> Primitive:
    """A primitive with several results. Outside `jit` it runs as a compiled call of its own."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract_eval)

    @functools.cache
    def compiled(**params: Any) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **params))

    def run(*operands: Any, **params: Any) -> Any:
        with jax.disable_jit(False):  # there is nothing below it
            return compiled(**params)(*operands)

    primitive.def_impl(run)
    return primitive


def register_tangents(
    primitive: Primitive,
    rule: Callable[..., Any],
) -> None:
    """Registers how `primitive` is differentiated.

    Args:
      primitive: an operation with several results.
      rule: a function of the operands, the results, the tangents of the operands (None for those
        of integers), and the parameters. It returns the results' tangents.
    """

    def zeros_of(operand: jax.Array) -> jax.Array | None:
        floating = jnp.issubdtype(operand.dtype, jnp.floating)
        return jnp.zeros_like(operand) if floating else None

    def jvp(
        operands: tuple[jax.Array, ...], tangents: tuple[Any, ...], **params: Any
    ) -> tuple[Any, Any]:
        if jax.__version_info__ < (0, 10):  # which cannot transpose a scan traced in such a rule
            raise NotImplementedError(
                f"differentiating {primitive} needs jax 0.10 or later, this is {jax.__version__}"
            )
        results = primitive.bind(*operands, **params)
        given = [
            x if type(x) is not ad.Zero else zeros_of(operand)
            for operand, x in zip(operands, tangents, strict=True)
        ]
        return results, _sharding.auto(rule, results, **params)(operands, results, given)

    ad.primitive_jvps[primitive] = jvp


def register_transpose(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Registers how `primitive`, linear in some operands, is transposed.

    Args:
      primitive: an operation with one result in a list.
      rule: a function of the result's cotangent and the operands, of which those that it is linear
        in are `jax.ShapeDtypeStruct`s. It returns their cotangents, and None for the others.
    """

    def transpose(cotangents: Any, *operands: Any, **params: Any) -> Any:
        (cotangent,) = cotangents
        if type(cotangent) is ad.Zero:
            return [None] * len(operands)
        known = [
            jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) if ad.is_undefined_primal(x) else x
            for x in operands
        ]
        return rule(cotangent, *known, **params)

    ad.primitive_transposes[primitive] = transpose


def register_lowerings(
    primitive: Primitive,
    *,
    kernels: dict[str, Callable[..., Any]],
    reference: Callable[..., Any],
    sharding: _sharding.Rule,
    name: str,
) -> None:
    """Registers what `primitive` lowers to.

    Args:
      primitive: an operation with several results.
      kernels: per platform, a function of the operands and parameters that makes the FFI call.
      reference: the same in `jax.numpy`, for every other platform.
      sharding: how it is divided over devices, on platforms that have kernels.
      name: of the target that XLA divides.
    """
    lower_divided = _sharding.register(primitive, sharding, name)
    lower_reference = mlir.lower_fun(reference, multiple_results=True)

    def lowering_for(platform: str | None) -> Callable[..., Any]:
        kernel = kernels.get(platform) if platform else None
        lower_kernel = mlir.lower_fun(kernel, multiple_results=True) if kernel else None

        def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
            module = ctx.module_context
            # A module for several platforms takes this way only on those that have none of theirs.
            name = platform or "/".join(p for p in module.platforms if p not in kernels)
            reason = why_no_kernel(name, elsewhere=module.lowering_parameters.for_export)
            if sharding.summed and _sharding.is_partly_manual(ctx):
                # There the partitioner numbers devices in ways of its own, which sums do not know.
                reason = (
                    f"{primitive} is inside shard_map over some axes of the mesh and divided by "
                    "XLA over others; over all axes, or outside shard_map, kernels run"
                )
            elif platform and _sharding.is_divided(ctx):
                runs = "reference" if reason else " ".join(TARGETS)
                return lower_divided(platform, runs, ctx, *operands, **params)
            if reason is None and lower_kernel is not None:
                return lower_kernel(ctx, *operands, **params)
            _warn_once(reason or f"it has no kernels for {name}")
            return lower_reference(ctx, *operands, **params)

        return lower

    for platform in kernels:
        mlir.register_lowering(primitive, lowering_for(platform), platform=platform)
    mlir.register_lowering(primitive, lowering_for(None))


def register_batching(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Registers how `vmap` maps `primitive`.

    Args:
      primitive: an operation with several results.
      rule: a function of the size of the mapped axis (one or more, or symbolic), the operands, the
        place of the mapped axis in each (or None), and the parameters. It returns the results,
        mapped in front.
    """

    def batch(
        operands: tuple[jax.Array, ...], dims: tuple[int | None, ...], **params: Any
    ) -> tuple[list[jax.Array], list[int]]:
        size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
        if is_symbolic_dim(size) or size > 0:
            results = rule(size, operands, dims, **params)
        else:
            shapes = [
                x.shape if d is None else (*x.shape[:d], *x.shape[d + 1 :])
                for x, d in zip(operands, dims, strict=True)
            ]
            elements = [
                jax.ShapeDtypeStruct(shape, x.dtype)
                for shape, x in zip(shapes, operands, strict=True)
            ]
            one = jax.eval_shape(lambda *args: primitive.bind(*args, **params), *elements)
            results = [jnp.zeros((0, *x.shape), x.dtype) for x in one]
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = batch
