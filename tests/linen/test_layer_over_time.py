"""Layers on the pieces of a sequence, each on a device of its own, in shard_map."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layers import D, each_layer, entry, layer, normal, parameters, rich_first, trees_close

DEVICES = 2
# A border inside a piece and a segment over the edge; a border on the edge.
IDS = np.array([[0] * 5 + [1] * 11, [2] * 8 + [3] * 8], np.int32)


def over_time(case, **options):
    """The layer's outputs for inputs of which each device has a part, jitted."""
    mesh = jax.make_mesh((DEVICES,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:DEVICES])
    module = layer(case, axis_name="seq", **options)
    split = P(None, "seq")

    def apply(params, x, ids, mask):
        return module.apply({"params": params}, x, mask=mask, segment_ids=ids)

    return jax.shard_map(apply, mesh=mesh, in_specs=(P(), split, split, split), out_specs=split)


@rich_first
@pytest.mark.slow  # two programs of a layer each
def test_values_and_gradients(case):
    """Parameters, on all devices the same, get the sum of what the devices say."""
    x, params, target = normal(2, 2, 16, D), parameters(case), normal(3, 2, 16, D)

    def both(run):
        def loss(params, x):
            y = run(params, x)
            return (y * target).sum(), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

    whole = layer(case)
    want = both(lambda params, x: whole.apply({"params": params}, x, segment_ids=IDS))
    got = both(lambda params, x: over_time(case)(params, x, IDS, None))
    trees_close(jax.device_get(got), jax.device_get(want))


@each_layer
def test_traces_with_every_option(name):
    """Shapes and types, those of gradients too; "xla" for its loops."""
    case = f"{name}-rich"
    run = over_time(case, implementation="xla")
    loss = functools.partial(lambda params, x, ids: run(params, x, ids, None).sum(), ids=IDS)
    params, x = parameters(case), normal(2, 2, 16, D)
    gradients = jax.eval_shape(jax.grad(loss, (0, 1)), params, x)
    assert jax.tree.map(np.shape, gradients) == jax.tree.map(np.shape, (params, x))


@each_layer
def test_init_needs_no_mesh(name):
    case = f"{name}-plain"
    x = np.zeros((2, 16, D), np.float32)
    inside, whole = (
        jax.eval_shape(layer(case, **options).init, jax.random.key(0), x)
        for options in (dict(axis_name="seq"), {})
    )
    assert inside == whole


@each_layer
def test_what_is_not_split_raises(name):
    case, x = f"{name}-plain", normal(2, 2, 16, D)
    refused = f"{entry(case).module.__name__}: mask is not supported with axis_name = 'seq'"
    mask = np.ones((2, 16), bool)
    with pytest.raises(NotImplementedError, match=refused):
        jax.eval_shape(over_time(case), parameters(case), x, None, mask)
    with pytest.raises(NotImplementedError, match="decode is not supported with axis_name = 'seq'"):
        jax.eval_shape(over_time(case, decode=True), parameters(case), x, None, None)
