"""Gated Slot Attention's kernels: what the contract's tests do not reach.

The step's values and aliasing, sequences in pieces, ABC, and that the kernels fit at full size.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal, relative_error

import jla
import jla.pallas
from jla import GSAState
from jla.pallas import gsa as kernels
from jla.pallas.common import chunks
from jla.pallas.gsa import states

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


def arguments(leading, H=1, HQ=2, K=32, V=64, M=16, dtype=bf16):
    q, k, v = (normal(i, *leading, h, d) for i, (h, d) in enumerate(((HQ, K), (H, K), (H, V))))
    s, g = jax.nn.sigmoid(normal(3, *leading, H, M)), -jax.nn.softplus(normal(4, *leading, H, M))
    state = GSAState(normal(5, leading[0], H, K, M), normal(6, leading[0], H, M, V))
    return *(x.astype(dtype) for x in (q, k, v, s)), g, state


def pallas_step(*args, **scale):
    with jla.pallas.interpret():
        return jla.gsa_step(*args, **scale, implementation="pallas")


@pytest.mark.parametrize(
    "sizes, scale",
    [
        (dict(H=2, HQ=4, dtype=f16), None),
        (dict(K=16, V=48, M=48, dtype=f32), -2.0),  # tiles of 16 columns
        (dict(K=256, V=256, M=128), None),  # four tiles a state
    ],
    ids=str,
)
def test_step_is_the_reference(sizes, scale):
    args = arguments((2,), **sizes)
    o, state = pallas_step(*args, scale=scale)
    want_o, want_state = jla.gsa_step(*args, scale=scale, implementation="reference")
    assert o.dtype == args[2].dtype and state.hk.dtype == state.hv.dtype == f32
    # In 16 bits both round the same float32 sum, up to its last bits.
    assert relative_error(o, want_o) < (2e-6 if o.dtype == f32 else 1e-3)
    for got, want in zip(state, want_state, strict=True):
        assert relative_error(got, want) < 2e-6


def test_step_with_strong_decays():
    q, k, v, s, g, state = arguments((1,), V=32)
    g = jnp.full_like(g, -30.0).at[..., ::3].set(-1e4).at[..., ::4].set(0.0)
    got = pallas_step(q, k, v, s, g, state)
    want = jla.gsa_step(q, k, v, s, g, state, implementation="reference")
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(ours.astype(f32), theirs.astype(f32)) < 1e-3


def test_step_leaves_a_state_that_is_not_donated():
    args = arguments((1,), V=32)
    before = [np.array(x) for x in args[-1]]
    _, state = pallas_step(*args)
    for old, kept, new in zip(before, args[-1], state, strict=True):
        np.testing.assert_array_equal(kept, old)
        assert np.any(np.asarray(new) != old)


@pytest.mark.parametrize(
    "B, sizes", [(128, dict(H=16, HQ=16, K=128, V=128, M=64)), (2, dict(HQ=2, K=48, V=80, M=32))]
)
def test_step_lowers_for_cuda_in_place(B, sizes):
    shapes = jax.eval_shape(functools.partial(arguments, (B,), **sizes))
    step = jax.jit(functools.partial(kernels.gsa_step, scale=1.0), donate_argnames="state")
    text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    # The program's last two arguments are its last two results ...
    for argument, result in ((5, 1), (6, 2)):
        assert re.search(rf"%arg{argument}: [^%]*tf.aliasing_output = {result}", text)
    # ... and in the program so are the only kernel's.
    (call,) = (line for line in text.splitlines() if "@mosaic_gpu" in line)
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", call)
    assert aliases == [("1", "5"), ("2", "6")]


@pytest.mark.parametrize(
    "reverse, separate",
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_pieces_are_the_whole(monkeypatch, reverse, separate):
    """Also where the first pass is one over all pieces, for an exchange between the two."""
    # Five chunks, the last of 8 tokens; a warpgroup has two tiles of a state.
    B, T, H, HQ, D, M = 1, 264, 1, 2 if reverse else 1, 128, 64
    x = [normal(i, B, T, HQ, D).astype(bf16) for i in range(2)]
    w = [normal(2 + i, B, T, HQ, M).astype(bf16) for i in range(2)]
    gates = chunks.decay_operand(-0.02 * jnp.abs(normal(4, B, T, H, M)))
    starts = normal(5, B, H, D, M), normal(6, B, H, M, D)

    def run(pieces, **made):
        with jla.pallas.interpret():
            options = dict(reverse=reverse, pieces=pieces, **made)
            return states.through_chunks(x, w, gates, starts, **options)

    whole, made = run(1), None
    monkeypatch.setattr(states, "number_of_pairs", lambda *_: 3)
    if separate:
        with jla.pallas.interpret():
            decays, *ends, hk, hv, of_pieces = states.summary(x, w, gates, starts, reverse=reverse)
        made = hk, hv, of_pieces
        assert relative_error(decays, jnp.exp2(gates.astype(f32).sum(1))) < 1e-5
        for got, want in zip(ends, whole[2:], strict=True):
            assert relative_error(got, want) < 1e-5
    for got, want in zip(run(None, made=made), whole, strict=True):
        # Up to the last bit of what is rounded to bfloat16 at the chunks' borders.
        assert relative_error(got, want) < (1e-5 if want.dtype == f32 else 1e-3)


def test_abc():
    *qkvs, _, _ = arguments((1, 100))
    with jla.pallas.interpret():
        got = jla.gsa(*qkvs, implementation="pallas")
    want = jla.gsa(*(x.astype(f32) for x in qkvs), implementation="reference")
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(ours.astype(f32), theirs) < 1e-2


def test_too_many_slots():
    args = arguments((1, 8), M=144)
    with pytest.raises(NotImplementedError, match=r"M = 144.*at most 128 slots"):
        jla.gsa(*args[:5], implementation="pallas")


@pytest.mark.parametrize(
    "sizes",
    [
        dict(H=16, HQ=16, K=128, V=128, M=64),
        pytest.param(dict(HQ=2, K=256, V=256, M=128), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lowers_for_cuda(sizes):
    """Lowering checks layouts and the size of SMEM, which the interpreter does not."""
    shapes = jax.eval_shape(functools.partial(arguments, (8, 512), **sizes))

    @jax.jit
    def run(*args):
        outputs, vjp = jax.vjp(lambda *args: kernels.gsa(*args, None, scale=1.0), *args)
        return vjp(outputs)

    text = run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    # The states, the outputs; the logits' gradients, the states' in reverse, and both passes'.
    assert text.count("@mosaic_gpu") == 5
