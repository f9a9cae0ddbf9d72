"""The recurrence's kernels by themselves, over so many chunks that every ring in SMEM is reused."""

import functools

import jax
import jax.numpy as jnp
import pytest
from comparing import close, normal

import jla.pallas
from jla.pallas.common import recurrence
from jla.pallas.common.chunks import CHUNK

f32, bf16 = jnp.float32, jnp.bfloat16
CHUNKS = 4  # a ring of two tiles is written again where the third chunk's are stored
T, V = CHUNKS * CHUNK - 8, 64


def arguments(K):
    """q, w, kg and u, the decays, the scores and beta of one head; small, for states to stay so."""
    vectors = [normal(i, 1, CHUNKS * CHUNK, 1, D) for i, D in enumerate((K, K, K, V))]
    q, w, kg, u = ((0.8 * K**-0.5 * x).astype(bf16) for x in vectors)
    decay = jax.nn.sigmoid(normal(4, 1, 1, CHUNKS, K))
    aq = (0.1 * normal(5, 1, 1, CHUNKS, CHUNK, CHUNK)).astype(bf16)
    return q, w, kg, u, decay, aq, jax.nn.sigmoid(normal(6, 1, 1, len(q[0])))


def formula(q, w, kg, u, decay, aq, beta, state):
    """The outputs, the last state and the states before each chunk, of one head in float32."""
    q, w, kg, u = (x[0, :, 0].astype(f32).reshape(CHUNKS, CHUNK, -1) for x in (q, w, kg, u))
    outputs, states = [], []
    for n in range(CHUNKS):
        states.append(state)
        write = beta[0, 0, n * CHUNK : (n + 1) * CHUNK, None] * (u[n] - w[n] @ state)
        outputs.append(q[n] @ state + aq[0, 0, n].astype(f32) @ write)
        state = decay[0, 0, n][:, None] * state + kg[n].T @ write
    return jnp.concatenate(outputs)[:T], state, jnp.stack(states)


@pytest.mark.parametrize(
    "K, keep", [pytest.param(64, False, marks=pytest.mark.slow), (64, True), (256, False)]
)
def test_forward(K, keep):
    q, w, kg, u, *others = arguments(K)
    run = functools.partial(recurrence.forward, starts=None, length=T, keep_states=keep)
    with jla.pallas.interpret():
        o, last, *states = jax.jit(run)(q, w, u, kg, *others)
    want_o, want_last, want_states = formula(q, w, kg, u, *others, jnp.zeros((K, V)))
    close(o[0, :, 0], want_o, 1e-2)
    close(last[0, 0], want_last, 1e-2)
    assert len(states) == keep
    for x in states:
        close(x[0, 0].mT, want_states, 1e-2)


@pytest.mark.parametrize("K", [64, 256])
def test_backward(K):
    q, w, kg, u, *others = arguments(K)
    do = normal(7, T, V).astype(bf16)
    end = normal(8, K, V)
    with jla.pallas.interpret():
        run = jax.jit(recurrence.backward)
        got, start = run(q, w, kg, do[None, :, None], *others, end[None, None, None])

    def both(state):
        return formula(q, w, kg, u, *others, state)[:2]

    (want,) = jax.vjp(both, jnp.zeros((K, V)))[1]((do.astype(f32), end))
    close(start[0, 0], want, 1e-2)
    # Transposed, and after each chunk: after the last it is the one that was given.
    close(got[0, 0, -1].T, end, 1e-2)
