"""MesaNet's kernels: what the contract's tests do not reach, sequences in pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal, relative_error
from evaluator import evaluated

import jla
import jla.pallas
from jla import MesaState
from jla.pallas import mesa_net as kernels
from jla.pallas.mesa_net import states

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


def arguments(B, T, H, K, V):
    """Hardly any decay, so that the states, and not only the last tokens, decide the values."""

    def unit(x):
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(bf16)

    past = normal(7, B, H, K, K)
    return dict(
        q=unit(normal(0, B, T, H, K)),
        k=unit(normal(1, B, T, H, K)),
        v=normal(2, B, T, H, V).astype(bf16),
        g=-1e-3 * jnp.abs(normal(3, B, T, H)),
        beta=jax.nn.sigmoid(normal(4, B, T, H)),
        lamb=0.25 + jax.nn.softplus(normal(5, H, K)),
        initial_state=MesaState(past @ past.mT / K, normal(6, B, H, K, V)),
    )


def run(segment_ids, implementation, arguments, cotangents):
    """Values, then gradients."""
    mesa_net = functools.partial(
        jla.mesa_net, segment_ids=segment_ids, implementation=implementation
    )
    (o, state), vjp = jax.vjp(lambda arguments: mesa_net(**arguments), arguments)
    return (o, state), vjp((cotangents[0].astype(o.dtype), cotangents[1]))[0]


def test_pieces_are_the_reference(monkeypatch):
    B, T, H, K, V = 2, 173, 1, 64, 48  # three pieces of a chunk, the last of 45 tokens
    asked = []
    monkeypatch.setattr(states, "number_of_pairs", lambda *shape: asked.append(shape) or 3)
    args = arguments(B, T, H, K, V)
    # Row 0: all pieces pass their states on. Row 1: a segment starts with the second piece, another
    # in its midst, and a gate in the last piece leaves nothing of what was before it.
    segment_ids = jnp.zeros((B, T), int).at[1, 64:].set(1).at[1, 100:].set(2)
    args["g"] = args["g"].at[1, 150].set(-1e4)
    cotangents = normal(8, B, T, H, V), MesaState(normal(9, B, H, K, K), normal(10, B, H, K, V))

    with jla.pallas.interpret():
        kernels = jax.jit(functools.partial(run, segment_ids, "pallas"))
        got = evaluated(kernels)(args, cotangents)
    assert set(asked) == {(B * H, 3)}
    args = jax.tree.map(lambda x: x.astype(f32), args)
    want = evaluated(jax.jit(functools.partial(run, segment_ids, "reference")))(args, cotangents)
    for ours, theirs, tolerance in zip(got, want, (1e-2, 2e-2), strict=True):
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            for row in range(len(x)):  # of lamb's gradient, heads
                assert np.linalg.norm(x[row] - y[row]) <= tolerance * np.linalg.norm(y[row])


@pytest.mark.parametrize(
    "reverse, separate",
    [
        (False, True),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_pieces_are_the_whole(monkeypatch, reverse, separate):
    """Also where the first pass is one over all pieces, for an exchange between the two."""
    B, T, H, K, V, L = 1, 264, 1, 128, 64, 320  # five chunks, the last of 8 tokens
    vectors = [normal(i, B, T, H, d) for i, d in enumerate((K, K, V))]
    gates = (-0.02 * jnp.abs(normal(3, B, H, L))).reshape(B, H, -1, 64)
    decays = jnp.exp2(jnp.cumsum(gates, -1)).reshape(B, H, L)
    ends = normal(4, B, H, K, K), normal(5, B, H, K, V)
    if reverse:
        operands = *(x.astype(bf16) for x in vectors), decays, ends
        run, summary = states.reverse, states.gradient_summary
    else:
        weights = jax.nn.sigmoid(normal(6, B, H, L))
        operands = *(x.astype(f16) for x in vectors[1:]), decays, weights, ends
        run, summary = states.forward, states.summary

    def through_chunks(pieces, made=None):
        with jla.pallas.interpret():
            return run(*operands, pieces=pieces, made=made)

    whole, made = through_chunks(1), None
    if separate:
        monkeypatch.setattr(states, "number_of_pairs", lambda *_: 3)
        with jla.pallas.interpret():
            decay, *last, kk, kv = summary(*operands[: None if reverse else -1])
        made = kk, kv
        assert relative_error(decay, jnp.exp2(gates.sum((2, 3)))) < 1e-5
        if not reverse:
            last = [decay[..., None, None] * x + y for x, y in zip(ends, last, strict=True)]
        for got, want in zip(last, whole[2:4], strict=True):
            assert relative_error(got, want) < 1e-5
    for got, want in zip(through_chunks(3, made), whole, strict=True):
        # Up to the last bit of what is rounded to 16 bits at the chunks' borders.
        assert relative_error(got, want) < (1e-5 if want.dtype == f32 else 1e-3)


@pytest.mark.slow
def test_few_long_heads_take_two_passes():
    """And all lowers for CUDA, which checks layouts and the size of SMEM."""
    shapes = jax.eval_shape(lambda: arguments(1, 32768, 16, 128, 128))

    @jax.jit
    def both(args):
        f = functools.partial(kernels.mesa_net, cg_steps=30, segment_ids=None)
        outputs, vjp = jax.vjp(lambda args: f(**args), args)
        return vjp(outputs)

    text = both.trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    # Both passes of the states, forward and in reverse, two solves and the chunks' gradients.
    assert text.count("@mosaic_gpu") == 7
