"""KDA's gates in kernels: values, gradients, races in the interpreter; who uses them."""

import contextlib
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close, normal, run_in
from evaluator import evaluated
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jla
import jla.pallas
from jla import _fused
from jla._core.segments import segment_starts
from jla._core.shardwise import for_each_row
from jla.linen import KimiDeltaAttention
from jla.pallas.common import chunks
from jla.pallas.kda import gate
from jla.reference.kda import kda as reference

kernels = importlib.import_module("jla.pallas.kda")
f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


def arguments(B, T, HV, K, dtype=bf16):
    # Some of these softplus takes to 1e-5 and less.
    f = (4 * normal((T, 0), B, T, HV, K) - 2).astype(dtype)
    return f, normal((T, 1), HV), normal((T, 2), HV, K)


def packed(B, T):
    """Segments of 1 to 7 tokens."""
    return jnp.broadcast_to(jnp.cumsum(jnp.arange(T) * 5 % 7 < 2, dtype=jnp.int32), (B, T))


def kernel(f, A_log, dt_bias, dg, ids=None, *, lower_bound):
    """The gates, and the gradients of f, A_log and dt_bias."""

    def coefficients(A_log, dt_bias):
        return for_each_row(gate.coefficients(A_log, dt_bias, lower_bound), f)

    made, vjp = jax.vjp(coefficients, A_log, dt_bias)
    borders, bounded = gate.borders(ids, *f.shape[:2]), lower_bound is not None
    gates = gate.decay_operand(f, made, borders, bounded=bounded)
    df, by_coefficient = gate.gradients(f, made, borders, dg, bounded=bounded)
    return gates, df, *vjp(by_coefficient)


def formula(f, A_log, dt_bias, dg, ids=None, *, lower_bound):
    def log_decays(f, A_log, dt_bias):
        g = jla.kda_gate(f, A_log, dt_bias, lower_bound=lower_bound)
        if ids is not None:
            g = jnp.where(segment_starts(ids)[:, :, None, None], -jnp.inf, g)
        return g

    g, vjp = jax.vjp(log_decays, f, A_log, dt_bias)
    return chunks.decay_operand(g), *vjp(dg[:, : f.shape[1]])


SIZES = [
    # Two tiles, the last not full, and a token's columns in three parts of 64.
    (dict(B=2, T=43, HV=3, K=64), None, True),
    # Two CTAs; a token's columns lie right behind another's.
    (dict(B=2, T=300, HV=1, K=128, dtype=f16), -5.0, False),
    pytest.param(dict(B=1, T=192, HV=2, K=192), None, False, marks=pytest.mark.slow),
    pytest.param(dict(B=2, T=70, HV=2, K=64), -1.0, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes, lower_bound, segments", SIZES, ids=str)
def test_is_the_formula(sizes, lower_bound, segments):
    check(jla.pallas.interpret, sizes, lower_bound, segments)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "B, T, HV, K, segments, lower_bound",
    # Any two settings meet: all together would compile for minutes.
    [
        (16, 4096, 8, 128, False, None),
        (16, 4096, 8, 128, True, -5.0),
        (3, 1001, 1, 128, True, None),
        (3, 1001, 1, 128, False, -5.0),
        (3, 1001, 3, 64, False, None),
        (3, 1001, 3, 64, True, -5.0),
        (3, 1001, 1, 64, True, None),
        (3, 1001, 1, 64, False, -5.0),
        (3, 992, 5, 256, False, None),
        (3, 992, 5, 256, True, -5.0),
    ],
)
def test_is_the_formula_on_a_gpu(B, T, HV, K, segments, lower_bound):
    """Also where the last tile of a batch row is not full, and the next batch row follows."""
    check(contextlib.nullcontext, dict(B=B, T=T, HV=HV, K=K), lower_bound, segments)


def check(context, sizes, lower_bound, segments):
    args = f, *_ = arguments(**sizes)
    B, T, HV, K = f.shape
    ids = packed(B, T) if segments else None
    dg = 1 + normal(1, B, T, HV, K)
    if lower_bound is not None:
        # The terms of A's gradient have the sign of f + dt_bias; with this they do not cancel.
        dg = dg * jnp.where(f.astype(f32) + args[2][None, None] > 0, 1.0, -1.0)
    # What follows the last token is anybody's guess.
    dg = jnp.pad(dg, ((0, 0), (0, -T % 64), (0, 0), (0, 0)), constant_values=1e9)
    run = jax.jit(functools.partial(kernel, lower_bound=lower_bound))
    got = run_in(context, run, *args, dg, ids)
    expected = evaluated(jax.jit(functools.partial(formula, lower_bound=lower_bound)))
    want = expected(f.astype(f32), *args[1:], dg, ids)
    gates, df, dA, dbias = got
    assert gates.dtype == f16 and df.dtype == f.dtype and dA.dtype == dbias.dtype == f32
    same_gates(gates, want[0])
    close(df, want[1], 3e-3)
    if segments:
        assert not df[segment_starts(ids)].any()
    close(dA, want[2], 1e-5)
    close(dbias, want[3], 1e-5)


def same_gates(ours, theirs):
    """Both rounded to float16, of numbers that differ by 1e-5, which is a fiftieth of its step."""
    # A zero's sign says nothing.
    ours, theirs = (jnp.where(x == 0, jnp.zeros((), f16), x) for x in (ours, theirs))
    steps = [jax.lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32) for x in (ours, theirs)]
    apart = jnp.abs(steps[0] - steps[1])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02


def test_softplus_keeps_its_digits():
    """Those of z that a float32 has are left aside: 2^z takes z times their error."""
    z = np.linspace(-50, 100, 300001, dtype=np.float32)
    value, slope = (np.asarray(x, np.float64) for x in jax.jit(gate._softplus)(z))
    exact = np.logaddexp2(0, z.astype(np.float64))
    np.testing.assert_allclose(value, exact, rtol=1.2e-5)
    np.testing.assert_allclose(slope, np.exp2(z - exact), rtol=5e-6)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_extreme_projections(lower_bound):
    f, A_log, dt_bias = arguments(1, 64, 1, 64)
    f = jnp.full_like(f, 3e38).at[:, ::2].set(-3e38)
    dg = jnp.ones(f.shape)
    with jla.pallas.interpret():
        run = jax.jit(functools.partial(kernel, lower_bound=lower_bound))
        gates, *gradients = run(f, A_log, dt_bias, dg)
    assert not gates[:, ::2].any()
    np.testing.assert_array_equal(
        gates[:, 1::2], f16(chunks.STRONGEST if lower_bound is None else -5 * chunks.LOG2E)
    )
    # Of A_log, for a softplus so large, infinite, as the formula's.
    assert all(jnp.isfinite(x).all() for x in (gradients[0], gradients[2]))


def mechanism_arguments(T, H, HV, K, V, B=2):
    q, k = (normal((V, i), B, T, H, K) for i in range(2))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = normal((V, 2), B, T, HV, V)
    f, A_log, dt_bias = arguments(B, T, HV, K)
    beta = jax.nn.sigmoid(normal((V, 3), B, T, HV))
    state = normal((V, 4), B, HV, K, V)
    return *(x.astype(bf16) for x in (q, k, v)), f - 1, A_log, dt_bias, beta, state


def gated(q, k, v, f, A_log, dt_bias, beta, state=None, *, ids=None, lower_bound=None):
    return kernels.kda_from_projection(
        q, k, v, f, A_log, dt_bias, beta, state, ids, scale=0.1, lower_bound=lower_bound
    )


def in_two_steps(
    q, k, v, f, A_log, dt_bias, beta, state=None, *, ids=None, lower_bound=None, run=kernels.kda
):
    g = jla.kda_gate(f, A_log, dt_bias, lower_bound=lower_bound)
    return run(q, k, v, g, beta, state, ids, scale=0.1)


def with_gradients(run, args):
    """Of all arguments, for a loss whose gradients do not cancel."""
    (o, state), vjp = jax.vjp(run, *args)
    return o, state, *vjp((o, 0.1 * state))


@pytest.mark.parametrize(
    "sizes, lower_bound, segments",
    [
        # Tokens to be padded: their gates are zero, or the last state would decay.
        (dict(T=75, H=1, HV=1, K=64, V=64), None, True),
        # Features to be padded, values in two parts.
        pytest.param(dict(T=20, H=1, HV=1, K=192, V=256), -5.0, False, marks=pytest.mark.slow),
        pytest.param(dict(T=64, H=1, HV=1, K=128, V=200), None, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_with_the_mechanism(sizes, lower_bound, segments):
    args = mechanism_arguments(**sizes, B=1)
    ids = packed(1, sizes["T"]) // 8 if segments else None
    run = functools.partial(gated, ids=ids, lower_bound=lower_bound)
    with jla.pallas.interpret(detect_races=False):
        got = jax.jit(functools.partial(with_gradients, run))(args)
    run = functools.partial(in_two_steps, ids=ids, lower_bound=lower_bound, run=reference)
    wide = [x.astype(f32) for x in args]
    want = evaluated(jax.jit(functools.partial(with_gradients, run)))(wide)
    assert [x.dtype for x in got[2:]] == [x.dtype for x in args]
    for ours, theirs, tolerance in zip(got, want, [5e-3] * 2 + [2e-2] * 8, strict=True):
        close(ours, theirs, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [dict(T=4096, H=8, HV=8, K=128, V=128)], ids=str)
def test_with_the_mechanism_on_a_gpu(sizes):
    args = mechanism_arguments(**sizes)
    got, want = (jax.jit(functools.partial(with_gradients, x))(args) for x in (gated, in_two_steps))
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs, 4e-3)


@pytest.mark.parametrize(
    "T, HV, K, ids",
    [(4096, 8, 128, False), pytest.param(1001, 3, 64, True, marks=pytest.mark.slow)],
)
def test_lowers_for_the_gpu(T, HV, K, ids):
    args = jax.eval_shape(lambda: mechanism_arguments(T, HV, HV, K, K))
    ids = packed(2, T) if ids else None
    run = jax.jit(functools.partial(with_gradients, functools.partial(gated, ids=ids)))
    text = run.trace(args).lower(lowering_platforms=("cuda",)).as_text()
    # The four of the mechanism, the gates twice (their maker once in the text), their gradients.
    assert text.count("@mosaic_gpu") >= 6


def test_says_of_what_it_makes_no_gates():
    def reason(T=3, K=64, dtype=bf16):
        return gate.unsupported(jax.ShapeDtypeStruct((1, T, 2, K), dtype))

    assert reason() is None
    assert "f is float32" in reason(dtype=f32)
    assert "96 features" in reason(K=96)
    assert "one token" in reason(T=1)


@pytest.mark.parametrize(
    "changes, makes_gates",
    [
        (dict(), True),
        (dict(f=f32), False),
        (dict(K=96), False),
        (dict(T=1), False),
        (dict(real=True), False),
    ],
    ids=str,
)
def test_the_mechanisms_kernels_run_whoever_makes_the_gates(monkeypatch, changes, makes_gates):
    """No cliff: where the kernel of the gates cannot serve the formula makes them, and all other
    kernels are those of `kda`. Nothing runs."""
    calls = []
    for name in ("_decay_operand", "_forward"):
        wrapped = getattr(gate if name == "_decay_operand" else kernels, name)

        def counted(*args, name=name, wrapped=wrapped, **options):
            calls.append(name)
            return wrapped(*args, **options)

        monkeypatch.setattr(gate if name == "_decay_operand" else kernels, name, counted)
    sizes = dict(T=9, K=64, f=bf16, real=False) | changes
    T, K = sizes["T"], sizes["K"]
    q, k, v, f, A_log, dt_bias, beta, _ = jax.eval_shape(lambda: mechanism_arguments(T, 2, 2, K, K))
    f = jax.ShapeDtypeStruct(f.shape, sizes["f"])
    real = jax.ShapeDtypeStruct((2, T), bool) if sizes["real"] else None

    def run(*args, real=None):
        return _fused.kda_from_projection(*args, real=real, implementation="pallas")

    with jla.pallas.interpret():
        o, state = jax.eval_shape(run, q, k, v, f, A_log, dt_bias, beta, real=real)
    assert calls == ["_decay_operand"] * makes_gates + ["_forward"]
    assert (o.shape, o.dtype, state.shape) == (v.shape, v.dtype, (2, 2, K, K))


@pytest.mark.parametrize("options", [dict(), dict(gate_lower_bound=-5.0)], ids=str)
@pytest.mark.parametrize("arrays", [(), ("ids",), ("mask",)], ids=str)
def test_the_layer_uses_it(monkeypatch, options, arrays):
    """With its arguments; the values that `_fused` promises for them are tested there."""
    made = []

    def stand_in(
        q, k, v, f, A_log, dt_bias, beta, state, ids, real, *, scale, lower_bound, normalize
    ):  # fmt: skip
        assert not normalize  # the convolution has done it
        present = [x is not None for x in (state, ids, real)]
        made.append((scale, lower_bound, *present))
        return v, jnp.zeros((2, 2, 64, 64))

    monkeypatch.setattr(kernels, "kda_from_projection", stand_in)
    layer = KimiDeltaAttention(
        num_heads=2, key_dim=64, conv_size=None, dtype=bf16, implementation="pallas", **options
    )
    x = jax.ShapeDtypeStruct((2, 9, 32), bf16)
    call = {}
    if "ids" in arrays:
        call["segment_ids"] = packed(2, 9)
    if "mask" in arrays:
        call["mask"] = jnp.arange(9)[None] < jnp.array([[9], [5]])
    with jla.pallas.interpret():
        params = jax.eval_shape(layer.init, jax.random.key(1), x)
        made.clear()
        jax.eval_shape(functools.partial(layer.apply, **call), params, x)
    bound = options.get("gate_lower_bound")
    assert made == [(64**-0.5, bound, False, "ids" in arrays, "mask" in arrays)]


def elementwise(function, arrays, coefficients, dtype, sums=0):
    """`gate._elementwise` by XLA, for no Pallas kernel runs on several CPU devices."""
    T = arrays[0].shape[1]
    arrays = (x[:, :T].astype(f32) for x in arrays)
    arrays = [x if x.ndim == 4 else x[..., None, None] for x in arrays]
    factors = [coefficients[:, i : i + 1] for i in range(3)]
    value, sums = function(factors, *arrays, sums=[0.0] * sums)
    return (value.astype(dtype), *([jnp.stack([x.sum(1) for x in sums], 1)] if sums else []))


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("mesh_kind", ["auto", "explicit", "shard_map"])
def test_sharded_over_batch_and_heads(monkeypatch, mesh_kind, lower_bound):
    """The gradients of A_log and dt_bias are summed over all shards of the batch."""
    monkeypatch.setattr(gate, "_elementwise", elementwise)
    args = arguments(4, 9, 2, 8, f32)
    dg = jnp.pad(args[0], ((0, 0), (0, 55), (0, 0), (0, 0)))
    want = jax.jit(functools.partial(formula, lower_bound=lower_bound))(*args, dg)
    axes = (AxisType.Explicit if mesh_kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axes, devices=jax.devices("cpu")[:4])
    tokens, heads = PartitionSpec("x", None, "y"), PartitionSpec("y")
    specs = tokens, heads, heads, tokens
    run = functools.partial(kernel, lower_bound=lower_bound)
    if mesh_kind == "shard_map":
        out_specs = tokens, tokens, heads, heads
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs)
    arrays = (
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip((*args, dg), specs, strict=True)
    )
    got = jax.jit(run)(*arrays)
    same_gates(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        close(ours, theirs, 1e-5)


def test_gates_are_not_kept_for_the_backward_pass(capsys):
    """They are of float16, and nothing else is. `kda` by itself keeps them in place of g."""
    args = jax.eval_shape(lambda: mechanism_arguments(64, 1, 1, 64, 64))

    def kept(run):
        def loss(*args):
            return sum(jnp.sum(x.astype(f32) ** 2) for x in run(*args))

        print_saved_residuals(loss, *args)
        return len(re.findall(r"\bf16\[", capsys.readouterr().out))

    assert kept(gated) == 0 and kept(in_two_steps) == 1
