"""Counting what a traced function has XLA compile."""

import collections

import jax


def equations(jaxpr):
    """All equations of a jaxpr, those inside of equations too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from equations(inner)


def _inner(equation):
    """The jaxprs inside of an equation."""
    parameters = jax.tree.leaves(list(equation.params.values()))
    parameters = [getattr(parameter, "jaxpr", parameter) for parameter in parameters]
    return [parameter for parameter in parameters if hasattr(parameter, "eqns")]


def operations(jaxpr):
    """How many equations have none inside."""
    return sum(not _inner(equation) for equation in equations(jaxpr))


def primitives(jaxpr):
    """How many equations of each primitive a jaxpr has, those inside of equations too."""
    return collections.Counter(equation.primitive.name for equation in equations(jaxpr))
