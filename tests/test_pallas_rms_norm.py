"""The norm's kernels: values, gradients, races in the interpreter; who uses them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
from comparing import close, normal, run_in
from flax import linen as nn
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jla.pallas
from jla.linen import RMSNorm
from jla.pallas.layers import rms_norm as kernels

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16
EPSILON = 1e-3


def arguments(shape, row=1, kind=None, dtype=bf16, bias=False):
    """x, scale and, for an activation as the kind, a gate and its bias; the results' gradients.

    For the kind "update" an update, whose sum with x 16 bits hold exactly.
    """
    x, gate, dy = (normal((shape[1], i), *shape).astype(dtype) for i in range(3))
    # Rows of all sizes: to their gradients that is all that matters.
    sizes = jnp.exp2((jnp.arange(shape[1]) % 8 - 4).astype(dtype))
    x = x * sizes.reshape(1, -1, *[1] * (x.ndim - 2))
    scale = 1 + 0.3 * normal((shape[1], 3), *shape[-row:])
    if kind == "branch":
        return (x, scale), (dy, gate)
    if kind == "update":
        update = jnp.where(gate > 0, x, -x / 2)
        return (x, scale, update), (dy, gate)
    gates = gate, normal((shape[1], 4), *shape[2:])
    return (x, scale, *gates[: 0 if kind is None else 1 + bias]), dy


def formula(
    x, scale, gate=None, gate_bias=None, *, kind=None, input_activation=None, epsilon=EPSILON
):
    """The layer's own form, in x's dtype."""
    layer = RMSNorm(
        epsilon,
        axes=scale.ndim,
        activation=getattr(nn, kind, None) if gate is not None else None,
        input_activation=input_activation and getattr(nn, input_activation),
        implementation="xla",
        parent=None,
    )
    variables = {"params": {"scale": scale}}
    if kind in ("branch", "update"):
        return layer.apply(variables, x, gate, method="branch")
    return layer.apply(variables, x, gate, gate_bias)


def kernel(*args, kind=None, epsilon=EPSILON, **options):
    if kind in ("branch", "update"):
        return kernels.rms_norm_branch(*args, epsilon=epsilon)
    return kernels.rms_norm(*args, epsilon=epsilon, activation=kind, **options)


def with_gradients(run, args, cotangents):
    y, vjp = jax.vjp(run, *args)
    return y, vjp(cotangents)


@pytest.mark.parametrize(
    "sizes",
    [
        # Heads with a gate: a batch row is several tiles, the last of them not full. Without an
        # epsilon the rows behind the last must stay zero by themselves.
        dict(shape=(2, 23, 3, 128), kind="sigmoid", epsilon=0.0),
        # A bias of the gate: a group of rows has every head equally often, or not.
        dict(shape=(2, 9, 2, 128), kind="silu", bias=True),
        # Several rows a warp.
        dict(shape=(1, 23, 3, 64), kind="sigmoid", bias=True, dtype=f16),
        # An activation of the input: rows that registers hold, and rows that are read twice.
        dict(shape=(1, 19, 2, 128), kind="sigmoid", input_activation="silu"),
        dict(shape=(2, 3, 8, 128), row=2, input_activation="silu"),
        # Whole tokens beside a stream; rows too long for registers are read twice.
        dict(shape=(2, 5, 512), kind="branch"),
        dict(shape=(2, 9, 256), kind="update"),
        # Several rows a warp, without a bias.
        pytest.param(dict(shape=(1, 19, 3, 64), kind="silu", dtype=f16), marks=pytest.mark.slow),
        # Rows of two axes.
        pytest.param(dict(shape=(2, 7, 4, 32), row=2), marks=pytest.mark.slow),
        # Several tiles of a CTA, whose SMEM is used again, and several CTAs.
        pytest.param(dict(shape=(1, 2900, 64)), marks=pytest.mark.slow),
        pytest.param(dict(shape=(1, 9, 2, 512), kind="silu"), marks=pytest.mark.slow),
        # More heads than a group has rows; tokens, and rows of two axes, with a bias.
        pytest.param(dict(shape=(1, 5, 12, 128), kind="silu", bias=True), marks=pytest.mark.slow),
        pytest.param(dict(shape=(1, 5, 16, 128), kind="silu", bias=True), marks=pytest.mark.slow),
        pytest.param(dict(shape=(2, 9, 512), kind="sigmoid", bias=True), marks=pytest.mark.slow),
        pytest.param(
            dict(shape=(2, 7, 2, 64), row=2, kind="silu", bias=True), marks=pytest.mark.slow
        ),
        pytest.param(
            dict(shape=(1, 9, 64), dtype=f16, input_activation="sigmoid"), marks=pytest.mark.slow
        ),
        pytest.param(dict(shape=(1, 9, 1024), kind="branch"), marks=pytest.mark.slow),
        pytest.param(dict(shape=(1, 5, 2048), kind="branch"), marks=pytest.mark.slow),
        pytest.param(dict(shape=(1, 21, 1024), kind="update"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_is_the_formula(sizes):
    check(jla.pallas.interpret, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "sigmoid", "silu"])
@pytest.mark.parametrize("T", [1024, 1001])
@pytest.mark.parametrize("D", [64, 128, 256, 384])
def test_heads_on_a_gpu(D, T, kind):
    """Also where the last tile of a batch row is not full, and the next batch row follows."""
    check(contextlib.nullcontext, (3, T, 5, D), kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1024, 1001])
@pytest.mark.parametrize("H, D", [(8, 128), (6, 128), (16, 64), (2, 256)])
def test_biases_on_a_gpu(H, D, T):
    check(contextlib.nullcontext, (3, T, H, D), kind="sigmoid", bias=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "silu"])
@pytest.mark.parametrize("T", [1024, 1001])
@pytest.mark.parametrize("H, row", [(8, 2), (4, 2), (8, 1)])
def test_activated_inputs_on_a_gpu(H, row, T, kind):
    check(contextlib.nullcontext, (3, T, H, 128), row, kind, input_activation="silu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "branch", "update"])
@pytest.mark.parametrize("T", [4096, 1001])
@pytest.mark.parametrize("D", [768, 1024, 2048])
def test_tokens_on_a_gpu(D, T, kind):
    check(contextlib.nullcontext, (4, T, D), kind=kind)


def check(context, shape, row=1, kind=None, dtype=bf16, bias=False, **options):
    args, cotangents = arguments(shape, row, kind, dtype, bias)
    run = functools.partial(kernel, kind=kind, **options)
    run = jax.jit(functools.partial(with_gradients, run))
    got = run_in(context, run, args, cotangents)
    wide = functools.partial(jax.tree.map, lambda x: x.astype(f32))
    run = functools.partial(formula, kind=kind, **options)
    run = jax.jit(functools.partial(with_gradients, run))
    want = run(wide(args), wide(cotangents))
    # The scale's gradient. The bias's may be a sum of what has been rounded.
    close(got[1][1], want[1][1], 1e-5)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # All but the gradients of scale and bias is rounded to 16 bits, once.
        assert ours.dtype == (dtype if ours.shape == shape else f32)
        # Token by token where it has tokens, for they are of all sizes.
        close(ours, theirs, 3e-3)
        if ours.dtype != f32:
            for t in range(min(shape[1], 8)):
                close(ours[:, t], theirs[:, t], 3e-3)


@pytest.mark.parametrize(
    "shape, kind, bias",
    [
        ((16, 4096, 512), "branch", False),
        ((16, 4096, 1024), "update", False),
        ((16, 4096, 8, 128), "sigmoid", False),
        ((16, 4096, 8, 128), "sigmoid", True),
        pytest.param((2, 1001, 2048), None, False, marks=pytest.mark.slow),
        pytest.param((2, 1001, 3, 384), "silu", False, marks=pytest.mark.slow),
        pytest.param((2, 1001, 3, 384), "silu", True, marks=pytest.mark.slow),
    ],
)
def test_lowers_for_the_gpu(shape, kind, bias):
    args, cotangents = jax.eval_shape(lambda: arguments(shape, kind=kind, bias=bias))
    run = functools.partial(with_gradients, functools.partial(kernel, kind=kind))
    traced = jax.jit(run).trace(args, cotangents)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_an_activated_input_lowers_for_the_gpu():
    args, cotangents = jax.eval_shape(lambda: arguments((16, 4096, 8, 128), row=2))
    run = functools.partial(with_gradients, functools.partial(kernel, input_activation="silu"))
    traced = jax.jit(run).trace(args, cotangents)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "shape, row, dtype, gate, word",
    [
        ((1, 3, 64), 1, f32, None, "x is float32"),
        ((1, 3, 64), 1, bf16, f16, "with it float16"),
        ((1, 3, 96), 1, bf16, None, "96 elements"),
        ((1, 3, 192), 1, bf16, None, "192 elements"),
        ((1, 3, 2, 2048), 2, bf16, None, "4096 elements"),
        ((3, 64), 1, bf16, None, "1 axes before"),
        ((1, 2, 2, 2, 64), 1, bf16, None, "4 axes before"),
        ((5, 1, 2, 64), 1, bf16, None, "one token"),
    ],
)
def test_says_what_it_does_not_take(shape, row, dtype, gate, word):
    x, scale = (jax.ShapeDtypeStruct(s, dtype) for s in (shape, shape[-row:]))
    gates = () if gate is None else (jax.ShapeDtypeStruct(shape, gate),)
    assert word in kernels.unsupported("rms_norm", x, scale, *gates)


def test_a_gates_bias_is_that_of_a_token():
    x, scale = jnp.zeros((1, 3, 2, 64), bf16), jnp.ones((64,))
    assert "bias is (64,)" in kernels.unsupported("rms_norm", x, scale, x, scale)


X = jnp.zeros((1, 3, 2, 64))


@pytest.mark.parametrize(
    "options, arguments, error, message",
    [
        ({}, dict(gate_bias=X[0, 0]), ValueError, "gate_bias is given, but no gate"),
        ({}, dict(gate=X[:, :1]), ValueError, r"gate must have x's shape .*got \(1, 1, 2, 64\)"),
        ({}, dict(gate=X, gate_bias=X[0, 0, :, :1]), ValueError, "gate_bias must have the shape"),
        ({}, dict(x=X.astype(jnp.int32)), TypeError, "x must be an array of a float.*got int32"),
        ({}, dict(x=[1.0]), TypeError, "x must be an array of a float dtype, got <class 'list'>"),
        (dict(axes=0), {}, ValueError, "axes must be at least 1, got 0"),
        (dict(axes=5), {}, ValueError, "axes must be at most x's 4, got 5"),
        (dict(epsilon=-1.0), {}, ValueError, "epsilon must be at least 0, got -1.0"),
        (dict(activation="silu"), dict(gate=X), TypeError, "activation must be a function, got"),
    ],
)
def test_wrong_arguments_raise(options, arguments, error, message):
    with pytest.raises(error, match=rf"^jla\.linen\.RMSNorm: {message}"):
        RMSNorm(**options).apply({"params": {"scale": jnp.ones(64)}}, **dict(x=X) | arguments)


def test_a_streams_update_has_its_shape():
    with pytest.raises(ValueError, match=r"^jla\.linen\.RMSNorm\.branch: update must have x's"):
        RMSNorm().apply({"params": {"scale": jnp.ones(64)}}, X, X[:, :1], method="branch")


@pytest.fixture
def calls(monkeypatch):
    """The kernels' calls, answered by the formula."""
    made = []

    def stand_in(x, scale, *gates, epsilon, activation=None, input_activation=None):
        made.append((*(activation, "bias")[: len(gates)], *filter(None, [input_activation])))
        options = dict(kind=activation, input_activation=input_activation)
        return formula(x, scale, *gates, **options, epsilon=epsilon)

    def branch(*args, epsilon, input_activation):
        assert input_activation is None
        made.append(("branch", "update")[: len(args) - 1])
        return formula(*args, kind="branch", epsilon=epsilon)

    monkeypatch.setattr(kernels, "rms_norm", stand_in)
    monkeypatch.setattr(kernels, "rms_norm_branch", branch)
    return made


@pytest.mark.parametrize(
    "options, kind, bias, dtype, used",
    [
        (dict(implementation="pallas"), None, False, bf16, ()),
        (dict(implementation="pallas"), "sigmoid", False, bf16, ("sigmoid",)),
        (dict(implementation="pallas"), "sigmoid", True, bf16, ("sigmoid", "bias")),
        (dict(implementation="pallas", activation=nn.silu), "silu", False, bf16, ("silu",)),
        (dict(implementation="pallas", axes=2), "branch", False, bf16, ("branch",)),
        (dict(implementation="pallas"), "update", False, bf16, ("branch", "update")),
        (dict(implementation="pallas", input_activation=nn.silu), None, False, bf16, ("silu",)),
        (dict(implementation="pallas", use_scale=False), "sigmoid", False, bf16, ("sigmoid",)),
        (dict(), "branch", False, bf16, ("branch",)),
        (dict(input_activation=nn.relu), None, False, bf16, None),
        (dict(input_activation=nn.silu), "branch", False, bf16, None),
        (dict(activation=nn.gelu), "gelu", False, bf16, None),
        (dict(), "branch", False, f32, None),
        (dict(implementation="xla"), "sigmoid", True, bf16, None),
    ],
)
def test_the_layer_uses_it_where_it_serves(calls, on_a_gpu, options, kind, bias, dtype, used):
    args, _ = arguments((1, 3, 2, 64), options.get("axes", 1), kind, dtype, bias)
    x, scale, *gates = args
    params = {"scale": scale}
    if not options.get("use_scale", True):
        params, args = {}, (x, jnp.ones_like(scale), *gates)
    layer = RMSNorm(**options)
    with jla.pallas.interpret():
        method = "branch" if kind in ("branch", "update") else None
        y = layer.apply({"params": params}, x, *gates, method=method)
    assert calls == ([] if used is None else [used])
    before = options.get("input_activation")
    before = None if before is None else before.__name__
    want = formula(*args, kind=kind, input_activation=before, epsilon=1e-6)
    jax.tree.map(lambda ours, theirs: close(ours, theirs, 0.0), y, want)


@pytest.mark.parametrize(
    "options, kind, dtype, word",
    [
        (dict(input_activation=nn.relu), None, bf16, "kernels have sigmoid and silu"),
        (dict(input_activation=nn.silu), "branch", bf16, "residual stream has none"),
        (dict(activation=nn.gelu), "gelu", bf16, "kernels have sigmoid and silu"),
        (dict(), None, f32, "x is float32"),
        (dict(), "branch", f32, "x is float32"),
    ],
)
def test_the_named_kernels_never_fall_back(calls, options, kind, dtype, word):
    args, _ = arguments((1, 3, 2, 64), 1, kind, dtype)
    x, scale, *gates = args
    layer = RMSNorm(**options, implementation="pallas")
    method = "branch" if kind == "branch" else None
    with jla.pallas.interpret(), pytest.raises(NotImplementedError, match=word) as caught:
        layer.apply({"params": {"scale": scale}}, x, *gates, method=method)
    assert str(caught.value).startswith("jla.linen.RMSNorm")
    assert 'implementation="xla" can.' in str(caught.value) and not calls


def test_the_input_is_activated_before_the_norm():
    (x, scale), _ = arguments((1, 3, 2, 64), dtype=f32)
    y = formula(x, scale, input_activation="silu")
    close(y, formula(nn.silu(x), scale), 1e-6)


@pytest.mark.parametrize(
    "kind, bias",
    [
        pytest.param("sigmoid", False, marks=pytest.mark.slow),
        ("sigmoid", True),
        pytest.param("branch", False, marks=pytest.mark.slow),
        ("update", False),
    ],
    ids=str,
)
@pytest.mark.parametrize("mesh_kind", ["auto", "explicit", "shard_map"])
def test_sharded_over_batch_and_heads(monkeypatch, mesh_kind, kind, bias):
    """The gradients of scale and bias are summed over all shards. Around plain functions, for no
    Pallas kernel runs on several CPU devices."""

    def forward(x, scale, *gates, epsilon, activation=None, input_activation=None, adds=False):
        def one(x, scale, gate=None, bias=None):
            bias = None if bias is None else bias.swapaxes(0, 1)
            options = dict(kind=activation, input_activation=input_activation)
            return formula(x, scale[:, 0], gate, bias, **options)

        if adds:
            (update,) = gates
            return jax.vmap(one)(x + update, scale), x + update
        return (jax.vmap(one)(x, scale, *gates),)

    def backward(x, scale, dy, *gates, residual=0.0, activation=None, **options):
        def one(x, scale, *gates):
            return forward(x, scale, *gates, activation=activation, **options)[0]

        dx, dscale, *dgates = jax.vjp(one, x, scale, *gates)[1](dy)
        return dx + residual, dscale, *dgates

    monkeypatch.setattr(kernels, "_forward", forward)
    monkeypatch.setattr(kernels, "_backward", backward)
    args, cotangents = arguments((4, 5, 2, 8), kind=kind, dtype=f32, bias=bias)
    run = functools.partial(with_gradients, functools.partial(kernel, kind=kind))
    expected = functools.partial(with_gradients, functools.partial(formula, kind=kind))
    want = jax.jit(expected)(args, cotangents)
    axes = (AxisType.Explicit if mesh_kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axes, devices=jax.devices("cpu")[:4])
    placed = PartitionSpec("x", None, "y")

    def spec(x):
        return {4: placed, 2: PartitionSpec("y"), 1: PartitionSpec()}[x.ndim]

    specs = jax.tree.map(spec, (args, cotangents))
    if mesh_kind == "shard_map":
        out_specs = jax.tree.map(spec, want)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs)
    arrays = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), (args, cotangents)
    )
    got = jax.jit(run)(*arrays)
    jax.tree.map(lambda ours, theirs: close(ours, theirs, 1e-5), got, want)


@pytest.mark.parametrize("kind, bias", [("sigmoid", True), ("branch", False)])
def test_a_policy_that_keeps_kernels_results_keeps_no_norm(capsys, kind, bias):
    """It is made again from what was there before it, see jla.models.kept."""
    args, _ = arguments((1, 3, 2, 64), kind=kind, bias=bias)

    def keep_kernels(primitive, *_, **__):
        return primitive.name == "custom_vmap_call"

    def loss(*args):
        return sum(jnp.sum(y.astype(f32) ** 2) for y in jax.tree.leaves(kernel(*args, kind=kind)))

    print_saved_residuals(jax.checkpoint(loss, policy=keep_kernels), *args)
    kept = capsys.readouterr().out.splitlines()
    assert len(kept) == len(args) and all("from the argument" in line for line in kept)


def test_a_policy_keeps_the_stream_and_not_what_it_is_the_sum_of(capsys):
    args, _ = arguments((1, 3, 64), kind="update")

    def keep(primitive, *_, **parameters):
        name = parameters.get("name")
        return primitive.name == "custom_vmap_call" or name == "residual_stream"

    def loss(*args):
        y, stream = kernel(*args, kind="update")
        return jnp.sum(y.astype(f32) ** 2) + jnp.sum(stream.astype(f32) ** 2)

    print_saved_residuals(jax.checkpoint(loss, policy=keep), *args)
    kept = capsys.readouterr().out.splitlines()
    # y, the stream, and of the arguments the scale.
    assert len(kept) == 3
    assert ["args[1]" in line for line in kept if "from the argument" in line] == [True]
