"""A model as an argument of compiled programs that are called once for every token."""

from __future__ import annotations

import dataclasses
import functools

import jax

from flashmla_jax.layers.mla import Params
from flashmla_jax.models.deepseek import DeepSeekConfig


@dataclasses.dataclass(frozen=True, eq=False)
class _Kind:
    """What of a model is known when a program is compiled."""

    tree: jax.tree_util.PyTreeDef
    config: DeepSeekConfig


# Equal ones are the same object, so that to look a program up is to compare addresses. (Another
# one, of a copy or another thread, costs a compilation.)
_the_kind = functools.cache(_Kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatModel:
    """Parameters, whose tree is taken apart once, and the configuration.

    With a tree of dicts, JAX sorts and compares all their keys whenever a program is called: for
    the 404 arrays of DeepSeek-V2-Lite 0.4 ms of the host's time (beside an NVIDIA H200,
    2026-11-30), where a step takes the GPU 1.7 ms.

    Attributes:
      leaves: the parameters' arrays.
      kind: their tree and the configuration.
    """

    leaves: tuple[jax.Array, ...]
    kind: _Kind = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, params: Params, config: DeepSeekConfig) -> FlatModel:
        """Of a model's parameters and its configuration."""
        leaves, tree = jax.tree.flatten(params)
        return cls(tuple(leaves), _the_kind(tree, config))

    @property
    def params(self) -> Params:
        """The parameters as a tree."""
        return jax.tree.unflatten(self.kind.tree, self.leaves)

    @property
    def config(self) -> DeepSeekConfig:
        """The configuration."""
        return self.kind.config
