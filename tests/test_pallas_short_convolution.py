"""The short convolution's kernels: values, gradients, races in the interpreter; who uses them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close, normal
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jla.pallas
from jla.linen._short_convolution import ShortConvolution
from jla.pallas.layers import short_convolution as kernels

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


def arguments(B, T, H, D, W, dtype=bf16):
    """All heads but the first have a small convolution, whose squares' sum is near the epsilon."""
    x, dy = (normal((T, i), B, T, H, D).astype(dtype) for i in range(2))
    small = jnp.where(jnp.arange(H) > 0, 2e-3 / (W * D) ** 0.5, 1.0)
    return x, small[None, :, None] * normal((T, 2), W, H, D), dy


def bias_of(taps):
    """As large as the taps."""
    return jnp.roll(taps[0], 1, axis=-1)


def formula(x, taps, bias=None, *, normalize, silu_twice=False):
    """The layer's own form, in x's dtype."""
    options = dict(normalize=normalize, silu_twice=silu_twice, implementation="xla")
    layer = ShortConvolution(taps.shape[0], use_bias=bias is not None, **options)
    params = {"kernel": taps} if bias is None else {"kernel": taps, "bias": bias}
    return layer.apply({"params": params}, x)


def with_gradients(run, dy, *arrays):
    y, vjp = jax.vjp(run, *arrays)
    return y, *vjp(dy)


@pytest.mark.parametrize(
    "sizes, biased, options",
    [
        # Several tiles of tokens in both passes.
        (dict(B=1, T=133, H=2, D=128, W=4), False, dict(normalize=True)),
        # Fewer tokens than taps, fewer channels than a tile has.
        (dict(B=2, T=2, H=1, D=24, W=3, dtype=f16), True, dict(normalize=False)),
        (dict(B=2, T=45, H=1, D=128, W=4), True, dict(normalize=False, silu_twice=True)),
        (dict(B=1, T=5, H=1, D=64, W=2), False, dict(normalize=True, silu_twice=True)),
    ],
    ids=str,
)
def test_is_the_formula(sizes, biased, options):
    check(jla.pallas.interpret, sizes, biased, options)


@pytest.mark.gpu
@pytest.mark.parametrize("silu_twice", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "H, D, biased",
    [
        (6, 128, False),
        (6, 128, True),
        (1, 128, True),
        (2, 64, False),
        (1, 256, False),
        (1, 256, True),
        (2, 96, True),
    ],
)
def test_is_the_formula_on_a_gpu(H, D, biased, normalize, silu_twice):
    """Also where one token's channels lie right behind another's, and the last tile is not full."""
    options = dict(normalize=normalize, silu_twice=silu_twice)
    check(contextlib.nullcontext, dict(B=3, T=300, H=H, D=D, W=4), biased, options)


def check(context, sizes, biased, options):
    x, taps, dy = arguments(**sizes)
    weights = (taps, bias_of(taps)) if biased else (taps,)
    run = functools.partial(kernels.short_convolution, **options)
    with context():
        got = jax.jit(functools.partial(with_gradients, run))(dy, x, *weights)
    run = functools.partial(formula, **options)
    want = jax.jit(functools.partial(with_gradients, run))(dy.astype(f32), x.astype(f32), *weights)
    assert [a.dtype for a in got] == [x.dtype, x.dtype, *(w.dtype for w in weights)]
    tolerances = (3e-3, 3e-3, *(1e-5 for _ in weights))
    for ours, theirs, tolerance in zip(got, want, tolerances, strict=True):
        for h in range(x.shape[2]):
            close(ours[..., h, :], theirs[..., h, :], tolerance)


def test_the_norms_epsilon():
    """A vector whose squares' sum is 1e-6 is divided by the square root of 2e-6."""
    x, taps, _ = arguments(1, 5, 2, 64, 3, f32)
    y = np.asarray(formula(x, taps, normalize=False), np.float64)
    squares = np.sum(y**2, axis=-1, keepdims=True)
    assert 1e-7 < np.median(squares[..., 1, :]) < 1e-5
    close(formula(x, taps, normalize=True), y / np.sqrt(squares + 1e-6), 1e-6)


@pytest.mark.parametrize("silu_twice", [False, True])
def test_wide_heads_lower_for_the_gpu(silu_twice):
    x, taps, dy = jax.eval_shape(lambda: arguments(2, 1001, 3, 256, 2))
    bias = jax.eval_shape(bias_of, taps)
    run = functools.partial(kernels.short_convolution, normalize=True, silu_twice=silu_twice)
    traced = jax.jit(functools.partial(with_gradients, run)).trace(dy, x, taps, bias)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(dtype=f32), "float32"),
        (dict(D=20), "20 channels"),
        (dict(D=264), "264 channels"),
        (dict(W=9), "9 taps"),
    ],
    ids=str,
)
def test_says_what_it_does_not_take(changes, word):
    x, taps, _ = jax.eval_shape(lambda: arguments(**dict(B=1, T=3, H=1, D=16, W=4) | changes))
    assert word in kernels.unsupported("short_convolution", x, taps)


@pytest.fixture
def calls(monkeypatch):
    """The kernels' calls, answered by the formula."""
    made = []

    def stand_in(x, taps, bias, past, segments, **options):
        assert past is segments is None
        made.append(options | dict(use_bias=bias is not None))
        return formula(x, taps, bias, **options)

    monkeypatch.setattr(kernels, "short_convolution", stand_in)
    return made


@pytest.mark.parametrize(
    "options, segments, dtype, used",
    [
        (dict(implementation="pallas"), False, bf16, True),
        (dict(implementation="pallas", normalize=True), False, bf16, True),
        (dict(implementation="pallas", silu_twice=True), False, bf16, True),
        (dict(implementation="pallas", use_bias=True), False, bf16, True),
        (dict(), False, bf16, True),
        (dict(), False, f32, False),
        (dict(silu_twice=True), True, bf16, False),
        (dict(decode=True), False, bf16, False),
        (dict(implementation="xla"), False, bf16, False),
    ],
    ids=str,
)
def test_the_layer_uses_it_where_it_serves(calls, on_a_gpu, options, segments, dtype, used):
    x, taps, _ = arguments(1, 5, 1, 16, 3, dtype)
    segments = jnp.zeros((1, 5), jnp.int32) if segments else None
    params = {"kernel": taps, "bias": bias_of(taps)}
    variables = {"params": params, "cache": {"inputs": jnp.zeros((1, 2, 1, 16), dtype)}}
    with jla.pallas.interpret():
        y = ShortConvolution(3, **options).apply(variables, x, segments, mutable=["cache"])[0]
    names = "normalize", "silu_twice", "use_bias"
    options = {name: options.get(name, False) for name in names}
    assert calls == [options] * used
    bias = params["bias"] if options.pop("use_bias") else None
    close(y, formula(x, taps, bias, **options), 0.0)


@pytest.mark.parametrize(
    "options, segments, dtype, word",
    [
        (dict(), False, f32, "x is float32"),
        (dict(), True, bf16, "there are segments"),
        (dict(decode=True), False, bf16, "tokens before x"),
    ],
    ids=str,
)
def test_the_named_kernel_never_falls_back(calls, options, segments, dtype, word):
    x, taps, _ = arguments(1, 5, 1, 16, 3, dtype)
    segments = jnp.zeros((1, 5), jnp.int32) if segments else None
    variables = {"params": {"kernel": taps}, "cache": {"inputs": jnp.zeros((1, 2, 1, 16), dtype)}}
    layer = ShortConvolution(3, **options, implementation="pallas")
    with jla.pallas.interpret(), pytest.raises(NotImplementedError, match=word):
        layer.apply(variables, x, segments, mutable=["cache"])
    assert not calls


@pytest.mark.parametrize("decode", [False, True])
def test_silu_twice_is_silu_of_silu(decode):
    x, taps, _ = arguments(1, 5, 1, 16, 3, f32)
    layer = ShortConvolution(3, silu_twice=True, decode=decode)
    variables = {"params": {"kernel": taps}, "cache": {"inputs": jnp.zeros((1, 2, 1, 16))}}
    y, _ = layer.apply(variables, x, mutable=["cache"])
    close(y, nn.silu(formula(x, taps, normalize=False)), 1e-6)


def test_the_bias_is_added_before_silu():
    """To every token; also to the zeros before a segment, and after the cache's inputs."""
    x, taps = map(np.asarray, arguments(2, 6, 1, 16, 3, f32)[:2])
    x[0, :3] = 0.0
    bias, before = bias_of(taps), np.stack([np.zeros_like(x[1, :2]), x[1, 1:3]])
    segments = np.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]], np.int32)
    layer = ShortConvolution(3, use_bias=True, decode=True)
    variables = {"params": {"kernel": taps, "bias": bias}, "cache": {"inputs": before}}
    y, mutated = layer.apply(variables, x, segments, mutable=["cache"])
    close(y[0, :3], nn.silu(np.stack([bias] * 3)), 1e-6)
    wide = np.concatenate([before, x], axis=1)
    for row, start, stop in ((0, 0, 2), (0, 2, 6), (1, 0, 4), (1, 4, 6)):
        tokens = wide[row, start : stop + 2].copy()
        tokens[:2] *= start == 0
        sums = sum(taps[i] * tokens[i : i + stop - start] for i in range(3)) + np.asarray(bias)
        close(y[row, start:stop], nn.silu(sums), 1e-6)
    assert np.array_equal(mutated["cache"]["inputs"], x[:, -2:])


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_sharded_over_batch_and_heads(monkeypatch, kind):
    """The gradients of the taps and the bias are summed over the batch's shards. Around plain
    functions, for no Pallas kernel runs on several CPU devices."""

    def forward(x, rows, *, biased, **options):
        assert biased
        run = jax.vmap(lambda x, w: formula(x[None], w[:-1], w[-1], **options)[0])
        return (run(x, rows),)

    def backward(x, rows, dy, **options):
        return jax.vjp(lambda x, rows: forward(x, rows, **options)[0], x, rows)[1](dy)

    monkeypatch.setattr(kernels, "_forward", forward)
    monkeypatch.setattr(kernels, "_backward", backward)
    x, taps, dy = arguments(4, 5, 2, 8, 3, f32)
    arrays = dy, x, taps, bias_of(taps)
    options = dict(normalize=True, silu_twice=True)
    both = functools.partial(
        with_gradients, functools.partial(kernels.short_convolution, **options)
    )
    expected = functools.partial(formula, **options)
    want = jax.jit(functools.partial(with_gradients, expected))(*arrays)
    axes = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axes, devices=jax.devices("cpu")[:4])
    tokens = PartitionSpec("x", None, "y")
    specs = tokens, tokens, PartitionSpec(None, "y"), PartitionSpec("y")
    if kind == "shard_map":
        out_specs = specs
        both = jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=out_specs)
    placed = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True))
    for ours, theirs in zip(jax.jit(both)(*placed), want, strict=True):
        close(ours, theirs, 1e-5)
