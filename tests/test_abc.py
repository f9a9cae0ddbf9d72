"""jla.gsa without gates: ABC, whose writes are normalised over each slot's past."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal
from evaluator import evaluated

import jla

f32 = jnp.float32
B, T, H, HQ, K, V, M = 2, 70, 1, 2, 16, 24, 20
STARTS = (0, 1, 32, 47)
IDS = jnp.broadcast_to(jnp.repeat(jnp.arange(4), np.diff([*STARTS, T])), (B, T))
each_implementation = pytest.mark.parametrize("implementation", ["reference", "xla"])


def arguments():
    shapes = dict(q=(HQ, K), k=(H, K), v=(H, V), s=(H, M))
    args = {n: jnp.asarray(normal(i, B, T, *shape)) for i, (n, shape) in enumerate(shapes.items())}
    return args | dict(s=2.0 * args["s"])


def value_and_gradients(args, segment_ids, implementation):
    """o, the state, and the gradients of a weighted sum of them; `test_export` compiles "xla"."""
    return evaluated(_value_and_gradients(implementation))(args, segment_ids)


@functools.cache
def _value_and_gradients(implementation):
    return jax.jit(functools.partial(_both, implementation))


def _both(implementation, args, segment_ids):
    def run(args):
        return jla.gsa(**args, segment_ids=segment_ids, implementation=implementation)

    out, vjp = jax.vjp(run, args)
    leaves, tree = jax.tree.flatten(out)
    weights = [jnp.cos(jnp.arange(x.size, dtype=f32)).reshape(x.shape) for x in leaves]
    return *out, vjp(tree.unflatten(weights))[0]


def numpy_abc(q, k, v, s):
    """The formulas for one row, [T, H, ...], in float64."""
    o = np.zeros((len(q), HQ, V))
    for j in range(HQ):
        h = j // (HQ // H)
        hk, hv, z = np.zeros((K, M)), np.zeros((M, V)), np.full(M, -np.inf)
        for t in range(len(q)):
            z, before = np.logaddexp(z, s[t, h]), z
            decay, write = np.exp(before - z), np.exp(s[t, h] - z)
            hk = hk * decay + np.outer(k[t, h], write)
            hv = decay[:, None] * hv + np.outer(write, v[t, h])
            logits = K**-0.5 * hk.T @ q[t, j]
            p = np.exp(logits - logits.max())
            o[t, j] = hv.T @ (p / p.sum())
    return o


def close(got, want, tolerance=1e-4):
    """Relative Frobenius errors, and 1e-6 an entry: where all slots are alike, the gradient of q is
    zero but for rounding."""
    chex.assert_tree_all_finite(got)

    def check(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-6 * b.size**0.5

    jax.tree.map(check, got, want)


@each_implementation
def test_formulas_and_segments(implementation):
    args = arguments()
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), args)
    whole = value_and_gradients(args, jnp.zeros_like(IDS), implementation)[0]
    packed = value_and_gradients(args, IDS, implementation)[0]
    for row in range(B):
        one = {n: x[row] for n, x in exact.items()}
        close(whole[row], numpy_abc(**one))
        for start, stop in zip(STARTS, (*STARTS[1:], T), strict=True):
            segment = {n: x[start:stop] for n, x in one.items()}
            close(packed[row, start:stop], numpy_abc(**segment))


@each_implementation
def test_no_segments_is_one_segment(implementation):
    args = arguments()
    want = value_and_gradients(args, jnp.zeros_like(IDS), implementation)[:2]
    alone = evaluated(jax.jit(functools.partial(jla.gsa, implementation=implementation)))
    close(alone(**args), want, 1e-6)


@pytest.mark.slow
@each_implementation
def test_gradients_are_those_through_the_gates(implementation):
    """With s and g made by hand, by lax.cumlogsumexp, and given to the gated reference."""

    def gated(args):
        z = jax.lax.cumlogsumexp(args["s"], axis=1)
        g = jnp.pad(z[:, :-1] - z[:, 1:], ((0, 0), (1, 0), (0, 0), (0, 0)))
        return args | dict(s=jnp.exp(args["s"] - z), g=g)

    args = arguments()
    _, vjp = jax.vjp(gated, args)
    o, state, gradients = value_and_gradients(gated(args), jnp.zeros_like(IDS), "reference")
    got = value_and_gradients(args, jnp.zeros_like(IDS), implementation)
    close(got, (o, state, vjp(gradients)[0]))


@pytest.mark.slow
@each_implementation
def test_causal_to_the_bit(implementation):
    args = arguments()
    before = value_and_gradients(args, IDS, implementation)[0]
    for t in (0, 31, 40, T - 2):
        later = {n: x.at[:, t + 1 :].add(30.0) for n, x in args.items()}
        after = value_and_gradients(later, IDS, implementation)[0]
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
        assert not np.array_equal(after[:, t + 1 :], before[:, t + 1 :])


LOGITS = {
    "equal": lambda s: jnp.zeros_like(s),
    "wide": lambda s: 30.0 * s,
    "one of 1e4": lambda s: s.at[:, T // 3, :, ::2].set(1e4),
    "one of -1e4": lambda s: s.at[:, T // 3, :, ::2].set(-1e4),
    "rising by 40": lambda s: s + 40.0 * jnp.arange(T, dtype=s.dtype)[None, :, None, None],
    "falling by 40": lambda s: s - 40.0 * jnp.arange(T, dtype=s.dtype)[None, :, None, None],
    "slots apart": lambda s: s.at[..., ::2].multiply(100.0),
}


@pytest.mark.parametrize("logits", LOGITS)
def test_extreme_logits(logits):
    args = arguments()
    args |= dict(s=LOGITS[logits](args["s"]))
    want = value_and_gradients(args, jnp.zeros_like(IDS), "reference")
    close(value_and_gradients(args, jnp.zeros_like(IDS), "xla"), want)
    chex.assert_tree_all_finite(want)


@each_implementation
@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)],  # rounded less
)
def test_low_precision_inputs(implementation, dtype):
    args = jax.tree.map(lambda x: x.astype(dtype), arguments())
    o, state = evaluated(jax.jit(functools.partial(jla.gsa, implementation=implementation)))(**args)
    chex.assert_type([o, *state], [dtype, jnp.float32, jnp.float32])
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    want = value_and_gradients(exact, jnp.zeros_like(IDS), "reference")[:2]
    close((o.astype(jnp.float32), state), want, 1e-2)
