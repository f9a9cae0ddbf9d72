"""Running a mechanism, its gradients and its definition, for the contract's tests."""

import functools
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
from mechanisms import MECHANISMS


def inputs(mechanism, sizes, dtype="float32", seed=0):
    """Random arguments and random cotangents of everything `run` returns."""
    # crc32, for str's own hash changes from process to process.
    key = jax.random.key(seed + zlib.crc32(mechanism.name.encode()))
    key, cotangents = jax.random.split(key)
    args = mechanism.make(sizes, key, jnp.dtype(dtype))
    shapes = jax.eval_shape(lambda a: mechanism.run(**a, implementation="reference"), args)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(cotangents, len(leaves))
    leaves = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return args, tree.unflatten(leaves)


def upcast(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@functools.cache
def _forward(name, implementation):
    run = {m.name: m.run for m in MECHANISMS}[name]
    return jax.jit(
        lambda args, segment_ids: run(
            **args, segment_ids=segment_ids, implementation=implementation
        )
    )


@functools.cache
def _value_and_vjp(name, implementation):
    forward = _forward(name, implementation)

    def both(args, cotangents, segment_ids):
        outputs, vjp = jax.vjp(lambda a: forward(a, segment_ids), args)
        return outputs, vjp(cotangents)[0]

    return jax.jit(both)


def forward(mechanism, implementation, args, segment_ids=None):
    """What `run` returns."""
    with implementation.context():
        return _forward(mechanism.name, implementation.name)(args, segment_ids)


def value_and_vjp(mechanism, implementation, args, cotangents, segment_ids=None):
    """What `run` returns, and the cotangent of every argument."""
    with implementation.context():
        run = _value_and_vjp(mechanism.name, implementation.name)
        return run(args, cotangents, segment_ids)


def definition(mechanism, args, cotangents, segment_ids=None):
    """As `value_and_vjp`, by the reference on the same arguments in float32."""
    run = _value_and_vjp(mechanism.name, "reference")
    return run(upcast(args), upcast(cotangents), segment_ids)


def error(got, want):
    """Relative Frobenius error; a norm below 1e-10 counts as 1e-10."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = np.linalg.norm(want)
    return np.linalg.norm(got - want) / max(scale, 1e-10)


def assert_close(got, want, tolerance):
    """Every leaf is finite and as near to the wanted one as the tolerance says."""
    chex.assert_tree_all_finite(got)
    errors = jax.tree.map(error, got, want)
    assert max(jax.tree.leaves(errors)) <= tolerance, errors


def assert_agrees(mechanism, dtype, got, want):
    """Values and gradients, each a tree as the definition's, within the dtype's tolerances."""
    for ours, theirs, tolerance in zip(got, want, mechanism.tolerances[dtype], strict=True):
        assert_close(ours, theirs, tolerance)


def assert_same_bits(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want
    )


def cut(mechanism, args, start, stop):
    """The tokens start to stop of the tokenwise arguments; the others as they are."""
    tokenwise = mechanism.tokenwise()
    return {n: x[:, start:stop] if n in tokenwise else x for n, x in args.items()}
