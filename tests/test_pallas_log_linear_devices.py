"""Log-linear attention's kernels with a piece of the sequence on each device.

vmap's axis is in the place of a mesh's: the exchange works over it, too, and the pieces are rows to
the kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal
from evaluator import evaluated

import jla
import jla.pallas
from jla.pallas import log_linear as kernels
from jla.pallas.log_linear import tree

f32, bf16 = jnp.float32, jnp.bfloat16


def arguments(B, T, gate, H=1, HK=1, K=64, V=64):
    L = (T - 1).bit_length() + 2  # one more than is needed: the last state is whole
    q, k = (normal(i, B, T, HK, K).astype(bf16) for i in range(2))
    g = -gate * jax.nn.softplus(2 * normal(3, B, T, H))
    return q, k, normal(2, B, T, H, V).astype(bf16), g, normal(4, B, T, H, L)


def both(implementation, args, cotangents, **options):
    def run(*args):
        o, state = jla.log_linear_attention(*args, implementation=implementation, **options)
        return o, state.levels

    (o, levels), vjp = jax.vjp(run, *args)
    return (o, levels), vjp((cotangents[0].astype(o.dtype), cotangents[1]))


def check(size, T, gate, tolerance=5e-3, context=jla.pallas.interpret, **sizes):
    args = arguments(1, size * T, gate, **sizes)
    (B, _, H, L), K, V = args[4].shape, args[1].shape[3], args[2].shape[3]
    cotangents = normal(9, *args[2].shape), normal(8, B, H, L, K, V)
    of_state = jnp.stack([cotangents[1]] + [jnp.zeros_like(cotangents[1])] * (size - 1))

    def pieces(x):
        return jnp.stack(jnp.split(x, size, axis=1))

    mapped = functools.partial(both, "pallas", axis_name="seq")
    mapped = jax.jit(jax.vmap(mapped, axis_name="seq"))
    with context():
        got = mapped(tuple(map(pieces, args)), (pieces(cotangents[0]), of_state))
    (o, levels), gradients = got
    joined = [jnp.concatenate(list(x), axis=1) for x in (o, *gradients)]
    whole = tuple(x.astype(f32) for x in args)
    want = evaluated(jax.jit(functools.partial(both, "reference")))(whole, cotangents)
    for ours, theirs in zip([levels[0], *joined], [want[0][1], want[0][0], *want[1]], strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "size, T, gate",
    [
        (2, 256, 0.01),  # two leaf blocks a device, and the state of the other is read by all
        pytest.param(2, 256, 1.5, marks=pytest.mark.slow),  # by the first chunk alone
        pytest.param(3, 128, 0.01, marks=pytest.mark.slow),  # one leaf block
        pytest.param(4, 16, 0.1, marks=pytest.mark.slow),  # less than a chunk
    ],
)
def test_is_the_reference(monkeypatch, size, T, gate):
    monkeypatch.setattr(kernels, "LEAF_BLOCK", 128)
    monkeypatch.setattr(tree, "SPAN", 1)
    monkeypatch.setattr(tree, "OTHERS_SPAN", 2)
    check(size, T, gate)
