"""Layers where types carry shardings: a trace alone shows whether all of them are known."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from layers import RICH, entry, implementations, layer

import jla.pallas
from jla import _dispatch
from jla.linen import RMSNorm

P = PartitionSpec
B, T, D = 4, 20, 64
# Sizes that all kernels take.
SIZES = dict(key_dim=64, value_dim=64, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


@pytest.fixture
def mesh():
    types = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), types, devices=jax.devices("cpu")[:4])
    with jax.set_mesh(mesh):
        yield mesh


def context(implementation):
    return jla.pallas.interpret() if implementation == "pallas" else contextlib.nullcontext()


def heads_axis(path, ndim):
    """Which axis of a parameter, or of an array of the cache but for its batch, has heads."""
    first, last = path[0].key, path[-1].key
    if first in ("o_proj", "o_norm", "g_norm"):
        return 0 if ndim > 1 else None
    if last in ("kernel", "inputs"):
        return None if first.endswith("down") or first == "feature_map" else 1
    others = {"length": None, "position": None, "scale": None, "key": 1, "value": 1, "decay": 1}
    return others.get(last, 0)


def placed(mesh, tree, rows, by_heads):
    """Shapes with shardings: each axis of heads over the mesh's, if it is no single head."""

    def place(path, x):
        spec = [*rows, *[None] * (x.ndim - len(rows))]
        axis = heads_axis(path, x.ndim - len(rows)) if by_heads else None
        if axis is not None and spec and x.shape[axis + len(rows)] % 2 == 0:
            spec[axis + len(rows)] = "heads"
        return typed(mesh, x.shape, x.dtype, *spec)

    return jax.tree.map_with_path(place, tree)


def typed(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def with_gradients(run, *args):
    """Each gradient has the type, and so the sharding, of its array."""

    def loss(*args):
        return jnp.sum(run(*args).astype(jnp.float32))

    gradients = jax.grad(loss, argnums=tuple(range(len(args))))(*args)
    assert jax.tree.map(jax.typeof, gradients) == jax.tree.map(jax.typeof, args)
    return gradients


def traces():
    """Layers, implementations, and whether parameters are split by heads: quick are those pairs of
    the latter that between them show all there is."""
    for case, implementation, by_heads in itertools.product(RICH, ["xla", "pallas"], [False, True]):
        if implementation not in implementations(case, "xla", "pallas"):
            continue
        quick = by_heads == (implementation == "pallas")
        label = f"{case}-{implementation}-{'heads' if by_heads else 'whole'}"
        marks = [] if quick else [pytest.mark.slow]
        yield pytest.param(case, implementation, by_heads, id=label, marks=marks)


@pytest.mark.parametrize("case, implementation, by_heads", list(traces()))
@pytest.mark.parametrize("part", ["gradients", "prefill", "step"])
def test_traces_where_types_carry_shardings(
    case, implementation, by_heads, part, mesh, monkeypatch, on_a_gpu
):
    """Parameters are whole or split by heads, the cache with them, and inputs split by rows.

    A prefill has a mask and segments.
    """
    options = SIZES | entry(case).size_for_kernels
    decoding = layer(case, decode=True, **options)
    made = jax.eval_shape(decoding.init, jax.random.key(0), jnp.zeros((B, T, D), jnp.bfloat16))
    params = placed(mesh, made["params"], (), by_heads)
    cache = placed(mesh, made["cache"], ("rows",), by_heads)
    tokens = typed(mesh, (B, 1 if part == "step" else T, D), jnp.bfloat16, "rows")
    real = typed(mesh, tokens.shape[:2], bool, "rows")
    module = layer(case, implementation=implementation, precision=None, **options)
    served, why_not = [], _dispatch._why_not

    def recorded(*arguments, **options):
        reason = why_not(*arguments, **options)
        if "few" not in arguments[1]:  # products of few rows, which are not split over devices
            served.append(reason is None)
        return reason

    monkeypatch.setattr(_dispatch, "_why_not", recorded)

    def forward(params, x):
        return module.apply({"params": params}, x)

    def advance(params, cache, x, real=None):
        variables, options = {"params": params, "cache": cache}, {}
        if real is not None:
            options = dict(mask=real, segment_ids=real.astype(jnp.int32))
        y, after = module.clone(decode=True).apply(variables, x, **options, mutable=["cache"])
        return y, after["cache"]

    with context(implementation):
        if part == "gradients":
            jax.jit(lambda *args: with_gradients(forward, *args)).trace(params, tokens)
            # The layers' own kernels, too.
            assert all(served) and bool(served) == (implementation == "pallas")
        else:
            masked = (real,) if part == "prefill" else ()
            jax.jit(advance).trace(params, cache, tokens, *masked)


def test_branch_of_a_stream_traces_where_types_carry_shardings(mesh):
    """The norm that no layer has."""
    norm = RMSNorm(implementation="pallas")
    x = typed(mesh, (B, T, D), jnp.bfloat16, "rows")
    scale = typed(mesh, (D,), jnp.float32)

    def run(scale, x, update):
        y, x = norm.apply({"params": {"scale": scale}}, x, update, method="branch")
        return y + x

    with context("pallas"):
        jax.jit(lambda *args: with_gradients(run, *args)).trace(scale, x, x)
