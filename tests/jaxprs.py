"""What programs are made of."""

from __future__ import annotations

import jax


def calls(jaxpr, *names: str) -> list:
    """The equations of some primitives, those of inner programs included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in names:
            found.append(eqn)
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += calls(inner, *names)
    return found


def products(jaxpr) -> list:
    """The products of a program."""
    return calls(jaxpr, "dot_general", "ragged_dot_general")


def has_precision(product, precision: jax.lax.Precision | None) -> bool:
    """Whether a product asks for this precision of both of its factors, or for none."""
    both = None if precision is None else (precision, precision)
    return product.params["precision"] in (both, precision)
