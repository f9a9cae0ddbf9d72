"""MesaNet with a ridge that is not positive: NaN in that head, the same in every implementation."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal
from evaluator import evaluated

import jla
from jla.xla.conjugate_gradients import solve

B, T, H, K = 1, 3, 3, 16
f32 = jnp.float32
each_implementation = pytest.mark.parametrize(
    "implementation, context",
    [
        ("reference", contextlib.nullcontext),
        ("xla", contextlib.nullcontext),
        ("pallas", functools.partial(jla.pallas.interpret, detect_races=False)),
        pytest.param("pallas", contextlib.nullcontext, marks=pytest.mark.gpu),
    ],
    ids=["reference", "xla", "interpreted", "pallas"],
)
# The axis of heads.
HEADS = dict(q=2, k=2, v=2, g=2, beta=2, lamb=0, kk=1, kv=1)


def arguments(implementation, *bad):
    """Random arguments; the first heads have one `lamb` of these."""
    dtype = jnp.bfloat16 if implementation == "pallas" else f32
    q, k, v = (normal(i, B, T, H, K).astype(dtype) for i in range(3))
    g, beta = -jnp.ones((B, T, H)), jnp.ones((B, T, H))
    kk = jnp.broadcast_to(jnp.eye(K), (B, H, K, K))
    kv = normal(3, B, H, K, K)
    lamb = jnp.ones((H, K)).at[: len(bad), 3].set(jnp.array(bad))
    return dict(q=q, k=k, v=v, g=g, beta=beta, lamb=lamb, kk=kk, kv=kv)


def call(q, k, v, g, beta, lamb, kk, kv, implementation, step=False):
    arrays, state = (q, k, v, g, beta), jla.MesaState(kk, kv)
    if step:
        tokens = (x[:, 0] for x in arrays)
        o, state = jla.mesa_step(*tokens, lamb, state, implementation=implementation)
        return o[:, None], state
    return jla.mesa_net(*arrays, lamb, initial_state=state, implementation=implementation)


@functools.cache
def without_bad(step):
    return call(**arguments("reference"), implementation="reference", step=step)


def assert_first_two_heads_are_nan(x, axis):
    missing = np.moveaxis(np.isnan(np.asarray(x, np.float32)), axis, 0).reshape(H, -1)
    assert missing[:2].all() and not missing[2].any()


@pytest.mark.parametrize("step", [False, True], ids=["run", "step"])
@each_implementation
def test_outputs_and_gradients_are_nan(implementation, context, step):
    """Those heads' outputs, and every gradient through them; not their state, nor other heads."""

    @evaluated
    @jax.jit
    def both(args):
        def loss(args):
            o, state = call(**args, implementation=implementation, step=step)
            return jnp.sum(o.astype(f32)), (o, state)

        return jax.grad(loss, has_aux=True)(args)

    with context():
        gradients, (o, state) = both(arguments(implementation, -0.1, 0.0))
    want, good = without_bad(step)
    assert_first_two_heads_are_nan(o, 2)
    for got, wanted in ((o[:, :, 2], want[:, :, 2]), *zip(state, good, strict=True)):
        np.testing.assert_allclose(f32(got), f32(wanted), rtol=3e-2, atol=3e-2)
    for name, axis in HEADS.items():
        used = gradients[name][:, :1] if step and axis == 2 else gradients[name]
        assert_first_two_heads_are_nan(used, axis)


@pytest.mark.parametrize("step", [False, True], ids=["run", "step"])
@pytest.mark.parametrize("bad", [0.0, -0.1, np.nan])
def test_raises_outside_of_jit(step, bad):
    name = "mesa_step" if step else "mesa_net"
    with pytest.raises(ValueError, match=rf"^jla\.{name}: lamb must be positive, got .* {bad}"):
        call(**arguments("xla", bad), implementation="xla", step=step)


@pytest.mark.parametrize("step", [False, True], ids=["run", "step"])
def test_nothing_is_read_while_tracing(step, monkeypatch):
    """Neither an argument of the traced function, nor what it closes over."""
    monkeypatch.setattr(jax, "device_get", lambda x: pytest.fail("waits for the device"))
    args = arguments("xla", -0.1)
    jax.eval_shape(lambda args: call(**args, implementation="xla", step=step), args)
    lamb = args.pop("lamb")
    jax.eval_shape(lambda args: call(**args, lamb=lamb, implementation="xla", step=step), args)


def test_what_is_nan_is_not_hidden():
    """Beside rows that iterate and alone, when no iteration is made; nor does it reach others."""

    def solution(b, diagonal=1.0):
        diagonal = jnp.full(b.shape, diagonal)
        return solve(lambda matrix, x: matrix * x, 5, 1e-6, 2.0 * diagonal, diagonal, b)

    b = jnp.ones((3, 4)).at[1, 2].set(jnp.nan)
    x = solution(b)
    np.testing.assert_array_equal(np.isnan(x).any(-1), [False, True, False])
    np.testing.assert_allclose(x[::2], 0.5)
    assert np.isnan(solution(b[1])).any()
    assert np.isnan(solution(b[0], diagonal=jnp.nan)).all()
