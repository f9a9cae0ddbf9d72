"""How the kernels' tests compare arrays, and with what."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import core

import jla


def normal(seed, *shape):
    """Random numbers of NumPy's: XLA compiles its own for longer than most kernels' tests take.

    In a trace, as `eval_shape` makes one, they are not made.
    """
    return _drawn(np.random.Generator.standard_normal, seed, shape)


def uniform(seed, *shape):
    return _drawn(np.random.Generator.random, seed, shape)


def _drawn(draw, seed, shape):
    def numbers():
        return draw(np.random.default_rng(seed), shape, np.float32)

    if core.trace_state_clean():
        return numbers()
    return jax.pure_callback(numbers, jax.ShapeDtypeStruct(shape, np.float32))


def run_in(context, run, *args):
    """run(*args) in the context; where it is that of a GPU, twice, and bit for bit the same."""
    with context():
        got = run(*args)
        if context is contextlib.nullcontext:
            jax.tree.map(np.testing.assert_array_equal, got, run(*args))
    return got


def random_parameters(layer, x, **changes):
    """The variables of a flax layer for inputs x: `init` by itself takes long to compile."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(layer.init, jax.random.key(0), x))
    values = [0.3 * normal((9, i), *leaf.shape).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    variables = jax.tree.unflatten(tree, values)
    return variables | {"params": variables["params"] | changes}


def close(ours, theirs, tolerance):
    """Asserts that the relative Frobenius error is at most the tolerance."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def relative_error(got, want):
    """The relative Frobenius error."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def mamba2_in_steps(
    q, k, u, g, logits, value_scales, skip, ids, *, implementation
):  # fmt: skip
    """What `log_linear_mamba2` of jla.pallas.log_linear makes, made of the public function."""
    level_scales = jax.nn.softplus(logits.astype(jnp.float32))
    v = (value_scales[..., None] * u.astype(jnp.float32)).astype(u.dtype)
    options = dict(segment_ids=ids, implementation=implementation)
    o, _ = jla.log_linear_attention(q, k, v, g, level_scales, **options)
    return (o.astype(jnp.float32) + skip[None, None, :, None] * u.astype(jnp.float32)).astype(
        u.dtype
    )
