"""Time over devices (docs/contract.md): every piece of a sequence on a device of its own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import assert_agrees, assert_same_bits, definition, inputs, with_gradients
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mechanisms import MECHANISMS
from test_transforms import specs

P = PartitionSpec


def devices_for(mechanism, sizes):
    """Four, or two where heads are exchanged for time and there are no more."""
    return 2 if mechanism.name == "path" and sizes["H"] < 4 else 4


def case(mechanism, sizes, dtype="float32", seed=0):
    """Arguments without a cache, cotangents, and what the definition makes of them, packed."""
    args, cotangents = inputs(mechanism, sizes, dtype, seed)
    if not mechanism.always_returns_state:
        del args[mechanism.state[0]]
        cotangents = cotangents[0], None
    return args, cotangents


def borders(B, T, size):
    """Segment ids with borders inside a piece and between two, a segment over several pieces, one
    that continues the state past whole pieces, equal ids in turn."""
    L, time = T // size, np.arange(T)
    first = np.searchsorted([L // 2, L, T - L // 2], time, side="right")
    second = np.searchsorted([T // 2 + 3, T // 2 + 5, T - L], time, side="right")
    return np.stack([first % 2, second])[np.arange(B) % 2].astype(np.int32)


@functools.cache
def over_time(name, implementation, size, packed=True):
    """The jitted value and gradients of a run in shard_map over `size` devices."""
    mechanism = {m.name: m for m in MECHANISMS}[name]
    mesh = jax.make_mesh((size,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:size])
    axes, outputs = (specs(x, {"T": "seq"}) for x in (mechanism.axes, mechanism.outputs))
    run = functools.partial(mechanism.run, implementation=implementation, axis_name="seq")

    def both(args, cotangents, ids):
        args_specs = {n: axes[n] for n in args}
        out = outputs if cotangents[1] is not None else (outputs[0], None)
        sharded = jax.shard_map(
            lambda args, ids: run(**args, segment_ids=ids),
            mesh=mesh,
            in_specs=(args_specs, P(None, "seq")),
            out_specs=out,
        )
        return with_gradients(lambda args: sharded(args, ids), args, cotangents)

    def compiled(args, cotangents, ids):
        places = [
            jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree)
            for tree in ({n: axes[n] for n in args}, outputs, P(None, "seq"))
        ]
        if cotangents[1] is None:
            places[1] = places[1][0], None
        given = [jax.device_put(x, place) for x, place in zip((args, cotangents, ids), places)]
        return given

    return jax.jit(both), compiled


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_packed(mechanism):
    sizes = mechanism.form("xla").sizes
    size = devices_for(mechanism, sizes)
    args, cotangents = case(mechanism, sizes)
    ids = borders(sizes["B"], sizes["T"], size)
    both, place = over_time(mechanism.name, "xla", size)
    given = place(args, cotangents, ids)
    program = both.lower(*given).compile()
    got = jax.device_get(program(*given))
    want = definition(mechanism, args, cotangents, ids)
    assert_agrees(mechanism, "float32", got, want)
    found = re.findall(r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)[\w-]*\(", program.as_text())
    print(found)
