"""Sharded without gathers (docs/contract.md): kernels, where heads are grouped and each device has
a part of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import assert_close, inputs, shapes, with_gradients
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mechanisms import MECHANISMS

from jla._dispatch import BACKENDS

P = PartitionSpec

HEADS = ("H", "HV", "HQ", "HK")


def kernels():
    """Each mechanism, its kernels' entry, and the number of key heads: two, and in groups one."""
    for mechanism in MECHANISMS:
        for entry in filter(None, map(mechanism.form, BACKENDS)):
            keys, grouped = mechanism.heads
            for heads in (1, 2) if keys != grouped else (2,):
                yield mechanism, entry, heads


def label_of(mechanism, entry, heads):
    return f"{mechanism.name}-{entry.name}-{heads} key heads"


def sizes_of(mechanism, sizes, heads, **more):
    keys, grouped = mechanism.heads
    return dict(sizes) | {keys: heads, grouped: heads * (1 + (keys != grouped))} | more


def placed(mesh, axes, x, names, place):
    """x, or its shape, split over the mesh: `names` maps axis letters to the mesh's axes. Heads
    that are fewer than devices are on all of them."""
    names = [names.get(letter) for letter in axes.split()]
    parts = [1 if name is None else mesh.shape[name] for name in names]
    pairs = zip(names, x.shape, parts, strict=True)
    return place(x, NamedSharding(mesh, P(*(name if n % m == 0 else None for name, n, m in pairs))))


def typed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@pytest.mark.parametrize(
    "mechanism, entry, heads",
    [pytest.param(*row, id=label_of(*row)) for row in kernels()],
)
@pytest.mark.parametrize("part", ["gradients", "no state", "step"])
def test_trace_where_types_carry_shardings(mechanism, entry, heads, part):
    """A trace alone shows whether all shardings are known, and each gradient has its array's."""
    types = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), types, devices=jax.devices("cpu")[:4])
    names = dict.fromkeys(HEADS, "heads") | dict(B="rows")
    sizes, dtype = sizes_of(mechanism, entry.sizes, heads, B=2), entry.dtypes[0]
    split = functools.partial(placed, mesh, names=names, place=typed)
    args = jax.tree.map(split, dict(mechanism.axes), shapes(mechanism, sizes, dtype))
    state, state_of_step = mechanism.state
    run = functools.partial(mechanism.run, implementation=entry.name)

    def step(args):
        tokens = {name: args[name][:, 0] for name in mechanism.tokenwise()}
        shared = {name: args[name] for name in mechanism.shared()}
        rest = shared | {state_of_step: args[state], "implementation": entry.name}
        return mechanism.step(**tokens, **rest), None

    def gradients(args):
        outputs = jax.eval_shape(lambda args: run(**args), args)
        cotangents = jax.tree.map(lambda x: typed_zeros(x), outputs)
        return with_gradients(lambda args: run(**args), args, cotangents)

    def typed_zeros(x):
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)

    if part == "no state":
        del args[state]
    with jax.set_mesh(mesh), entry.context():
        jax.jit(step if part == "step" else gradients).trace(args)


# By rows, by heads, and the first argument by rows and the others by heads.
PLACEMENTS = {
    "rows": lambda first: dict(B="devices"),
    "heads": lambda first: dict.fromkeys(HEADS, "devices"),
    "mixed": lambda first: dict(B="devices") if first else dict.fromkeys(HEADS, "devices"),
}


def on_two_gpus():
    """Every placement of one key head; two are split as they are, so that the mixed one will do."""
    for mechanism, entry, heads in kernels():
        for placement in PLACEMENTS if heads == 1 else ("mixed",):
            label = f"{label_of(mechanism, entry, heads)}-{placement}"
            yield pytest.param(mechanism, entry.compiled(), heads, placement, id=label)


@pytest.mark.gpu
@pytest.mark.parametrize("mechanism, entry, heads, placement", list(on_two_gpus()))
def test_values_on_two_gpus(mechanism, entry, heads, placement):
    """Outputs and gradients are those of one GPU."""
    devices = jax.devices("gpu")
    if len(devices) < 2:
        pytest.skip("needs 2 GPUs")
    mesh = jax.make_mesh((2,), ("devices",), (AxisType.Auto,), devices=devices[:2])
    sizes = sizes_of(mechanism, entry.sizes, heads, B=2, T=256, K=64, V=64)
    dtype = entry.dtypes[0]
    args, cotangents = inputs(mechanism, sizes, dtype)
    split = {
        name: jax.tree.map(
            functools.partial(
                placed, mesh, names=PLACEMENTS[placement](n == 0), place=jax.device_put
            ),
            axes,
            args[name],
        )
        for n, (name, axes) in enumerate(mechanism.axes.items())
    }
    run = functools.partial(mechanism.run, implementation=entry.name)
    both = jax.jit(lambda *pair: with_gradients(lambda args: run(**args), *pair))
    want = both(args, cotangents)
    got = both(split, jax.device_put(cotangents, NamedSharding(mesh, P())))
    assert_close(jax.tree.map(np.asarray, got), want, mechanism.tolerances[dtype][1])
