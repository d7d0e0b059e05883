"""What `jax.export` has to be told about programs with this package's operations."""

from __future__ import annotations

from jax.export import DisabledSafetyCheck

from flashmla_jax.ops import (
    _ffi,
    _sharding,
    routed_experts,  # noqa: F401 - registers its target, which exported programs may call
)

# cuDNN's attention.
_OF_JAX = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


def export_disabled_checks() -> list[DisabledSafetyCheck]:
    """The checks that `jax.export` has to leave out, as by itself it exports only JAX's own calls.

    A program can be exported for "cpu", for "cuda" (Hopper GPUs) and for both, wherever this
    package is installed: the kernels need not be built there, nor a GPU be found. batch,
    num_pages and max_pages_per_seq may be symbolic dimensions, and so may the number of new tokens
    of `cache_append`; the other axes are numbers:

        batch, num_pages, pages = jax.export.symbolic_shape("batch, num_pages, pages")
        create = functools.partial(PagedKVCache.create, num_layers=2)
        cache = jax.eval_shape(functools.partial(
            create, num_pages=num_pages, batch=batch, max_pages_per_seq=pages))
        kv = jax.ShapeDtypeStruct((batch, 1, 1, 576), jnp.bfloat16)
        exported = jax.export.export(
            jax.jit(step), platforms=("cpu", "cuda"),
            disabled_checks=flashmla_jax.export_disabled_checks())(cache, kv)
        data = exported.serialize()  # needs the package flatbuffers

    A process that runs it imports `flashmla_jax`, for the kernels. What may be updated in place is
    said there, not here:

        step = jax.jit(jax.export.deserialize(data).call, donate_argnums=0)

    In programs for several devices all axes are numbers, and the kernels are found when they are
    compiled, on the machine that runs them.

    The names of the custom calls have a version. Where the installed kernels have other operands,
    results or attributes than those that a program was exported for, JAX says that there is no
    handler of that name.

    Returns:
      A check for each of this package's custom calls, and of those of JAX that layers and models
      make on a machine with a GPU, which JAX promises nothing about.
    """
    names = (*_ffi.TARGETS, *_sharding.TARGETS, *_OF_JAX)
    return [DisabledSafetyCheck.custom_call(name) for name in names]
