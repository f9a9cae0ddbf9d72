"""Counting what a traced function has XLA compile."""

import collections

import jax


def primitives(jaxpr):
    """How many equations of each primitive a jaxpr has, those inside of equations too."""
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                counts += primitives(inner)
    return counts
