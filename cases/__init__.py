"""The arguments that tests, the fuzzer and benchmarks give the mechanisms; not installed.

A module for each mechanism. Its `arguments` makes those of the tests and the fuzzer. Benchmarks
draw what a layer's projections give, and take from here the arguments' shapes and the states.

`sizes` maps the letters of axes (`jla.<mechanism>.AXES`) to numbers. `normal(*shape)` draws float32
numbers: `numpy_normal` for tests, since JAX would compile for every shape, and `jax_normal` for
benchmarks, whose gigabytes are drawn on the GPU.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def shape_of(axes, sizes):
    """The shape of an argument with these axes: a step's, if `sizes` has no T."""
    return tuple(sizes[letter] for letter in axes.split() if letter != "T" or "T" in sizes)


def numpy_normal(random):
    """`normal` from a NumPy generator."""
    return lambda *shape: random.standard_normal(shape, np.float32)


def jax_normal(key):
    """`normal` from a JAX key, on the device; every call draws other numbers."""
    keys = (jax.random.fold_in(key, i) for i in itertools.count())
    return lambda *shape: jax.random.normal(next(keys), shape, jnp.float32)


def keep(there, x):
    """x where `there`, and 0 elsewhere; NumPy's or JAX's, as x is."""
    return x.__array_namespace__().where(there, x, 0.0)


def unit(x):
    """x with last axes of norm 1; NumPy's or JAX's, as x is."""
    return x / x.__array_namespace__().linalg.norm(x, axis=-1, keepdims=True)


def softplus(x):
    return np.logaddexp(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
