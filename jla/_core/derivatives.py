"""Kernels are differentiated once and in reverse; these functions refuse the rest by name."""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(name):
    """Decorates a function of arrays that runs kernels: forward mode raises, with its name.

    JAX's own message, from the `custom_vjp` inside, names no function. Here the tangents pass
    through a linear operation that has a transpose, which reverse mode needs, but no value, which
    forward mode would need.

    Args:
      name: the function's public name.
    """

    def decorate(function):
        backend = function.__module__.removeprefix("jla.").split(".")[0]

        @jax.custom_jvp
        def unchanged(arrays):
            return arrays

        def rule(primals, tangents):
            def linear(tangent):
                if isinstance(tangent, SymbolicZero):
                    return tangent
                return _tangent_p.bind(tangent, function=name, backend=backend)

            return primals[0], [linear(x) for x in tangents[0]]

        unchanged.defjvp(rule, symbolic_zeros=True)

        @functools.wraps(function)
        def run(*arguments, **options):
            leaves, tree = jax.tree.flatten(arguments)
            places = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
            for i, x in zip(places, unchanged([leaves[i] for i in places]), strict=True):
                leaves[i] = x
            return function(*tree.unflatten(leaves), **options)

        run.reverse_only = True  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate


def is_reverse_only(run):
    """Whether `reverse_only` decorates a function, or that of which it is a partial or a jit."""
    while isinstance(run, functools.partial):
        run = run.func
    return hasattr(inspect.unwrap(run, stop=lambda f: hasattr(f, "reverse_only")), "reverse_only")


_tangent_p = Primitive("reverse_only")


def _raise(*_, function, backend, **__):
    raise NotImplementedError(
        f'{function}: the kernels of implementation="{backend}" have no forward-mode derivative '
        '(jax.jvp, jax.jacfwd, jax.linearize). implementation="xla" has one.'
    )


_tangent_p.def_impl(_raise)
_tangent_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_tangent_p, lambda context, x, **names: _raise(**names))
ad.deflinear2(_tangent_p, lambda cotangent, x, **_: [cotangent])
batching.primitive_batchers[_tangent_p] = _raise  # reverse mode only transposes it


def no_derivative(function, name):
    """`function`, from arrays to a tuple of arrays, which raises where it is differentiated.

    Second derivatives would differentiate the kernels themselves. So would `jax.hessian`, which
    takes forward-mode derivatives of reverse-mode ones.
    """
    run = jax.custom_jvp(lambda *arrays: function(*arrays))

    @run.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            f"{name}: the kernels have no derivatives of derivatives (jax.hessian, jax.grad "
            'twice). implementation="xla" has them.'
        )

    return run
