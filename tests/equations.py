"""Counting what a traced function has XLA compile."""

import collections

import jax
import jax.extend.core
import numpy as np


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


def gradients_are_wide(gradient, params, *arrays):
    """Traces the gradient of float32 parameters, and asserts that none was cast from 16 bits."""
    jaxpr, shapes = jax.make_jaxpr(gradient, return_shape=True)(params, *arrays)
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    found = zip(paths, jaxpr.jaxpr.outvars, strict=True)
    assert not [path for path, output in found if _was_cast(jaxpr.jaxpr, output)]


def _was_cast(jaxpr, output):
    """Whether an output of a jaxpr was cast from 16 bits after all else but moves and additions:
    after a sum over devices, then."""
    made_by = {var: e for e in jaxpr.eqns for var in e.outvars}
    moves = "reshape transpose squeeze split copy sharding_constraint add_any convert_element_type"

    def was_cast(var):
        equation = made_by.get(var) if isinstance(var, jax.extend.core.Var) else None
        if equation is None:
            return False
        name, inner = equation.primitive.name, _inner(equation)
        if name == "convert_element_type" and equation.invars[0].aval.dtype.itemsize == 2:
            return True
        if len(inner) == 1:
            return _was_cast(inner[0], inner[0].outvars[equation.outvars.index(var)])
        return name in moves.split() and any(map(was_cast, equation.invars))

    return was_cast(output)
