"""The short convolution's kernels: values, gradients, races in the interpreter; who uses them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
from comparing import close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jla.pallas
from jla.linen._short_convolution import ShortConvolution
from jla.pallas import short_convolution as kernels

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


def arguments(B, T, H, D, W, dtype=bf16):
    keys = jax.random.split(jax.random.key(T), 3)
    x, dy = (jax.random.normal(key, (B, T, H, D)).astype(dtype) for key in keys[:2])
    return x, jax.random.normal(keys[2], (W, H, D)), dy


def formula(x, kernel, normalize):
    """The layer's own form, in x's dtype."""
    layer = ShortConvolution(kernel.shape[0], normalize=normalize, implementation="xla")
    return layer.apply({"params": {"kernel": kernel}}, x)


def with_gradients(run, x, kernel, dy):
    y, vjp = jax.vjp(run, x, kernel)
    return y, *vjp(dy)


@pytest.mark.parametrize(
    "sizes, normalize",
    [
        (dict(B=1, T=133, H=2, D=128, W=4), True),  # several tiles of tokens in both passes
        # Fewer tokens than taps, fewer channels than a tile has.
        (dict(B=2, T=2, H=1, D=24, W=3, dtype=f16), False),
    ],
    ids=str,
)
def test_is_the_formula(sizes, normalize):
    check(jla.pallas.interpret, sizes, normalize)


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("H, D", [(6, 128), (1, 128), (2, 64), (1, 256), (2, 96)])
def test_is_the_formula_on_the_card(H, D, normalize):
    """Also where one token's channels lie right behind another's, and the last tile is not full."""
    check(contextlib.nullcontext, dict(B=3, T=300, H=H, D=D, W=4), normalize)


def check(context, sizes, normalize):
    x, kernel, dy = arguments(**sizes)
    run = functools.partial(kernels.short_convolution, normalize=normalize)
    with context():
        got = jax.jit(functools.partial(with_gradients, run))(x, kernel, dy)
    run = functools.partial(formula, normalize=normalize)
    want = jax.jit(functools.partial(with_gradients, run))(x.astype(f32), kernel, dy.astype(f32))
    assert [a.dtype for a in got] == [x.dtype, x.dtype, f32]
    for ours, theirs, tolerance in zip(got, want, (3e-3, 3e-3, 1e-5), strict=True):
        close(ours, theirs, tolerance)


def test_wide_heads_lower_for_the_gpu():
    x, kernel, dy = jax.eval_shape(lambda: arguments(2, 1001, 3, 256, 2))
    run = functools.partial(kernels.short_convolution, normalize=True)
    traced = jax.jit(functools.partial(with_gradients, run)).trace(x, kernel, dy)
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
    x, kernel, _ = jax.eval_shape(lambda: arguments(**dict(B=1, T=3, H=1, D=16, W=4) | changes))
    assert word in kernels.unsupported("short_convolution", x, kernel)


@pytest.fixture
def calls(monkeypatch):
    """The kernels' calls, answered by the formula."""
    made = []

    def stand_in(x, kernel, *, normalize):
        made.append(normalize)
        return formula(x, kernel, normalize)

    monkeypatch.setattr(kernels, "short_convolution", stand_in)
    return made


@pytest.mark.parametrize(
    "options, segments, dtype, used",
    [
        (dict(implementation="pallas"), False, bf16, True),
        (dict(implementation="pallas", normalize=True), False, bf16, True),
        (dict(implementation="pallas"), False, f32, False),
        (dict(implementation="pallas"), True, bf16, False),
        (dict(implementation="pallas", decode=True), False, bf16, False),
        (dict(implementation="xla"), False, bf16, False),
        (dict(), False, bf16, False),  # there is no GPU
    ],
    ids=str,
)
def test_the_layer_uses_it_where_it_serves(calls, options, segments, dtype, used):
    x, kernel, _ = arguments(1, 5, 1, 16, 3, dtype)
    segments = jnp.zeros((1, 5), jnp.int32) if segments else None
    variables = {"params": {"kernel": kernel}}
    with jla.pallas.interpret():
        y = ShortConvolution(3, **options).apply(variables, x, segments, mutable=["cache"])[0]
    assert calls == [options.get("normalize", False)] * used
    close(y, formula(x, kernel, options.get("normalize", False)), 0.0)


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_sharded_over_batch_and_heads(monkeypatch, kind):
    """The kernel's gradient is summed over the batch's shards. Around plain functions, for no
    Pallas kernel runs on several CPU devices."""

    def forward(x, kernel, *, normalize):
        return (jax.vmap(lambda x, kernel: formula(x[None], kernel, normalize)[0])(x, kernel),)

    def backward(x, kernel, dy, *, normalize):
        return jax.vjp(lambda x, kernel: forward(x, kernel, normalize=normalize)[0], x, kernel)[1](
            dy
        )

    monkeypatch.setattr(kernels, "_forward", forward)
    monkeypatch.setattr(kernels, "_backward", backward)
    arrays = arguments(4, 5, 2, 8, 3, f32)
    run = functools.partial(kernels.short_convolution, normalize=True)
    both = functools.partial(with_gradients, run)
    want = jax.jit(functools.partial(with_gradients, functools.partial(formula, normalize=True)))(
        *arrays
    )
    axes = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axes, devices=jax.devices("cpu")[:4])
    specs = PartitionSpec("x", None, "y"), PartitionSpec(None, "y"), PartitionSpec("x", None, "y")
    if kind == "shard_map":
        out_specs = specs[0], *specs[:2]
        both = jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=out_specs)
    placed = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True))
    for ours, theirs in zip(jax.jit(both)(*placed), want, strict=True):
        close(ours, theirs, 1e-5)
