"""Mamba-2's norm behind a gate: values, gradients, races in the interpreter; who uses it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close, normal, run_in
from flax import linen as nn
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jla.pallas
from jla.linen import LogLinearMamba2
from jla.linen._normalize import GatedRMSNorm
from jla.pallas.layers import gated_norm as kernels

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16
EPSILON = 1e-3
NAMES = "x", "gate", "scale"


def arguments(shape, dtype=bf16):
    """x, gate and scale; the result's gradient."""
    x, gate, dy = (normal((shape[1], i), *shape).astype(dtype) for i in range(3))
    # Rows of all sizes: to their gradients that is all that matters.
    sizes = jnp.exp2((jnp.arange(shape[1]) % 8 - 4).astype(dtype))[None, :, None, None]
    return (x * sizes, gate, 1 + 0.3 * normal((shape[1], 3), *shape[2:])), dy


def formula(x, gate, scale, **options):
    """The layer's own form, in x's dtype."""
    module = GatedRMSNorm(EPSILON, implementation="xla", **options)
    return module.apply({"params": {"scale": scale}}, x, gate)


kernel = functools.partial(kernels.gated_norm, epsilon=EPSILON)


def with_gradients(run, args, cotangent):
    y, vjp = jax.vjp(run, *args)
    return y, vjp(cotangent)


@pytest.mark.parametrize(
    "sizes",
    [
        # The model's rows; the last tile is not full.
        dict(shape=(2, 5, 8, 128)),
        # One chunk a row: several rows a warp at once, several groups a tile.
        dict(shape=(2, 43, 2, 64), dtype=f16),
        # A chunk has several heads, and a row several chunks.
        dict(shape=(1, 7, 4, 96)),
        # Another kernel.
        pytest.param(dict(shape=(1, 3, 2, 64), norm_before_gate=True), marks=pytest.mark.slow),
        # Two rows a warp.
        pytest.param(dict(shape=(1, 37, 2, 32)), marks=pytest.mark.slow),
        # The longest.
        pytest.param(dict(shape=(2, 5, 16, 128)), marks=pytest.mark.slow),
        # Several tiles of a CTA, whose SMEM is used again, and several CTAs.
        pytest.param(dict(shape=(1, 150, 4, 128)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_is_the_formula(sizes):
    check(jla.pallas.interpret, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        (16, 4096, 8, 128),
        (3, 1001, 8, 128),
        (3, 1001, 16, 64),
        (3, 1001, 16, 128),
        (3, 1001, 12, 128),
        (3, 1001, 4, 64),
        (3, 1001, 2, 64),
        (3, 1001, 2, 32),
    ],
    ids=str,
)
def test_on_a_gpu(shape):
    """Also where the last tile of a batch row is not full, and the next batch row follows."""
    check(contextlib.nullcontext, shape)


def check(context, shape, dtype=bf16, **options):
    args, cotangent = arguments(shape, dtype)
    run = jax.jit(functools.partial(with_gradients, functools.partial(kernel, **options)))
    got = run_in(context, run, args, cotangent)
    wide = functools.partial(jax.tree.map, lambda x: x.astype(f32))
    run = jax.jit(functools.partial(with_gradients, functools.partial(formula, **options)))
    want = run(wide(args), wide(cotangent))
    pairs = {"y": (got[0], want[0])}
    pairs |= {n: pair for n, *pair in zip(NAMES, got[1], want[1], strict=True)}
    close(*pairs.pop("scale"), 1e-5)
    for ours, theirs in pairs.values():
        assert ours.dtype == dtype  # rounded once
        close(ours, theirs, 3e-3)
        # Token by token, for they are of all sizes.
        for t in range(min(shape[1], 8)):
            close(ours[:, t], theirs[:, t], 3e-3)


def test_before_the_gate_it_is_the_kernel_of_rms_norm(monkeypatch):
    """Whose values have tests of their own."""
    made = []

    def stand_in(x, scale, gate, **options):
        made.append((x.shape, scale.shape, gate.shape, options))
        return x

    monkeypatch.setattr(kernels, "rms_norm", stand_in)
    run = functools.partial(kernels.gated_norm.__wrapped__, epsilon=EPSILON, norm_before_gate=True)
    args, _ = jax.eval_shape(lambda: arguments((1, 3, 2, 64)))
    jax.eval_shape(run, *args)
    tokens = 1, 3, 2, 64
    assert made == [(tokens, (2, 64), tokens, dict(epsilon=EPSILON, activation="silu"))]


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_formula_in_float64(groups, norm_before_gate):
    """A group of neighbouring heads is normalised for itself."""
    (x, gate, scale), _ = arguments((1, 3, 4, 8), f32)
    x, gate, scale = (np.asarray(a, np.float64) for a in (x, gate, scale))
    factor = gate / (1 + np.exp(-gate))
    want = x if norm_before_gate else x * factor
    want = np.concatenate(
        [
            part / np.sqrt(np.mean(part**2, axis=(2, 3), keepdims=True) + EPSILON)
            for part in np.split(want, groups, axis=2)
        ],
        axis=2,
    )
    want = want * scale * (factor if norm_before_gate else 1)
    options = dict(groups=groups, norm_before_gate=norm_before_gate)
    close(formula(*(a.astype(np.float32) for a in (x, gate, scale)), **options), want, 1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        (16, 4096, 8, 128),
        pytest.param((2, 1001, 16, 128), marks=pytest.mark.slow),
        (2, 1001, 4, 64),
    ],
)
def test_lowers_for_the_gpu(shape):
    args, cotangent = jax.eval_shape(lambda: arguments(shape))
    traced = jax.jit(functools.partial(with_gradients, kernel)).trace(args, cotangent)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_says_what_it_does_not_take():
    def reason(shape=(1, 3, 2, 64), dtype=bf16, gate_dtype=bf16, **options):
        x, gate = (jax.ShapeDtypeStruct(shape, d) for d in (dtype, gate_dtype))
        scale = jax.ShapeDtypeStruct(shape[2:], f32)
        return kernels.unsupported("gated_norm", x, gate, scale, **options)

    assert reason() is None and reason(norm_before_gate=True) is None
    assert "2 groups of heads" in reason(groups=2)
    assert "x is float32" in reason(dtype=f32)
    assert "with it float32" in reason(gate_dtype=f32)
    assert "with it float16" in reason(gate_dtype=f16)
    assert "96 elements" in reason((1, 3, 2, 48))
    assert "4096 elements" in reason((1, 3, 16, 256))
    assert "one token" in reason((5, 1, 2, 64))


@pytest.mark.parametrize(
    "options, T, masked, used",
    [
        (dict(), 9, False, True),
        (dict(implementation="pallas"), 9, False, True),
        (dict(), 9, True, False),
        (dict(), 1, False, False),
        (dict(dtype=f32), 9, False, False),
        (dict(implementation="xla"), 9, False, False),
        (dict(norm_before_gate=True), 9, False, True),
        (dict(norm_groups=2), 9, False, False),
        (dict(use_norm=False), 9, False, False),
    ],
)
def test_the_layer_uses_it_where_it_serves(
    monkeypatch, on_a_gpu, only_kernels_of, options, T, masked, used
):
    """Values are in tests/contract/test_fused.py; here, that the call has the layer's arguments."""
    made = []

    def counted(x, gate, scale, *, epsilon, groups, norm_before_gate):
        made.append((x.shape, gate.shape, scale.shape, epsilon, groups, norm_before_gate))
        return x

    monkeypatch.setattr(kernels, "gated_norm", counted)
    only_kernels_of("gated_norm", "log_linear_mamba2")
    sizes = dict(num_heads=2, key_dim=16, value_dim=64, num_levels=5, norm_epsilon=1e-4)
    layer = LogLinearMamba2(**sizes | dict(dtype=bf16, conv_size=None) | options)
    x = jax.ShapeDtypeStruct((2, T, 32), bf16)
    mask = jnp.arange(T)[None] < jnp.array([[T], [5]]) if masked else None
    with jla.pallas.interpret():
        params = jax.eval_shape(layer.init, jax.random.key(1), x)
        made.clear()
        jax.eval_shape(functools.partial(layer.apply, mask=mask), params, x)
    order = options.get("norm_before_gate", False)
    assert made == [((2, T, 2, 64), (2, T, 2, 64), (2, 64), 1e-4, 1, order)] * used


@pytest.mark.parametrize("mesh_kind", ["auto", "explicit", "shard_map"])
def test_sharded(monkeypatch, mesh_kind):
    """The gradient of the scale is summed over all shards of the batch; heads, over which rows go,
    are gathered. Around plain functions, for no Pallas kernel runs on several CPU devices.
    """

    def forward(x, gate, scale, *, epsilon):
        def one(x, gate, scale):
            # [T, 1, N, D] with [N, 1, D].
            x = x[:, 0] * nn.silu(gate[:, 0])
            mean_square = jnp.mean(x * x, axis=(1, 2), keepdims=True)
            return (x * jax.lax.rsqrt(mean_square + epsilon) * scale[None, :, 0])[:, None]

        return (jax.vmap(one)(x, gate, scale),)

    def backward(*inputs_and_dy, epsilon):
        *inputs, dy = inputs_and_dy
        return jax.vjp(lambda *inputs: forward(*inputs, epsilon=epsilon)[0], *inputs)[1](dy)

    monkeypatch.setattr(kernels, "_forward", forward)
    monkeypatch.setattr(kernels, "_backward", backward)
    args, cotangent = arguments((4, 5, 2, 8), f32)
    want = jax.jit(functools.partial(with_gradients, formula))(args, cotangent)
    axes = (AxisType.Explicit if mesh_kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axes, devices=jax.devices("cpu")[:4])
    heads = None if mesh_kind == "shard_map" else "y"  # which would norm each shard's by themselves

    def spec(x):
        return PartitionSpec("x", None, heads) if x.ndim == 4 else PartitionSpec(heads)

    specs = jax.tree.map(spec, args), PartitionSpec("x")
    run = functools.partial(with_gradients, kernel)
    if mesh_kind == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[::-1])
    arrays = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), (args, cotangent), specs
    )
    got = jax.jit(run)(*arrays)
    jax.tree.map(lambda ours, theirs: close(ours, theirs, 1e-5), got, want)


def test_a_policy_that_keeps_kernels_results_keeps_its_inputs_alone(capsys):
    """It is made again from what was there before it, see jla.models.kept."""
    args, _ = arguments((1, 3, 2, 64))

    def keep_kernels(primitive, *_, **__):
        return primitive.name == "custom_vmap_call"

    def loss(*args):
        return jnp.sum(kernel(*args).astype(f32) ** 2)

    print_saved_residuals(jax.checkpoint(loss, policy=keep_kernels), *args)
    kept = capsys.readouterr().out.splitlines()
    assert len(kept) == len(args) and all("from the argument" in line for line in kept)
