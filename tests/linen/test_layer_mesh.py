"""Layers of whole arrays under jit: parameters, rows, time and heads split over a mesh.

What devices tell each other is read from the compiled programs; "xla" has the loops of real use.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layers import D, each_layer, entry, layer, normal, parameters, trees_close

from jla.linen import logical_axes

B, T = 2, 64
NAMES = ("data", "seq", "model")
AXES = dict(B="data", T="seq", H="model")
RULES = [("embed", "data"), ("heads", "model"), ("key_heads", "model"), ("mlp", "model")]
# FSDP and tensor parallelism; time, with FSDP.
SHAPES = {"heads": (2, 1, 2), "time": (2, 2, 1)}
COLLECTIVES = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"


def mesh_of(shape, kind=AxisType.Auto):
    devices = jax.devices("cpu")[: math.prod(shape)]
    return jax.make_mesh(shape, NAMES, (kind,) * 3, devices=devices)


def borders(T):
    """A border inside of a device's tokens and a segment over the edge; a border on the edge."""
    return np.stack([np.arange(T) >= T // 4, np.arange(T) >= T // 2]).astype(np.int32)


def with_gradients(module, segment_ids=None):
    """Of parameters, inputs and the output's cotangent: the output, and the gradients."""
    options = {} if segment_ids is None else dict(segment_ids=segment_ids)

    def run(params, x, cotangent):
        apply = lambda params, x: module.apply({"params": params}, x, **options)  # noqa: E731
        y, pull = jax.vjp(apply, params, x)
        return y, pull(cotangent)

    return run


@functools.cache
def compiled(case, kind):
    """The program on a mesh, and the places of parameters and of tokens."""
    mesh = mesh_of(SHAPES[kind])
    params = parameters(case)
    places = nn.logical_to_mesh_sharding(logical_axes(params), mesh, RULES)
    tokens = NamedSharding(mesh, P("data", "seq"))
    module = layer(case, implementation="xla", mesh_axes=AXES)

    def typed(x, place):
        return jax.ShapeDtypeStruct(np.shape(x), jnp.float32, sharding=place)

    x = typed(np.zeros((B, T, D)), tokens)
    run = jax.jit(
        with_gradients(module, borders(T)), out_shardings=(tokens, (places, tokens))
    )
    with jax.set_mesh(mesh):
        return run.lower(jax.tree.map(typed, params, places), x, x).compile(), places, tokens


def collectives(program):
    """Kind and shapes of each collective; XLA may make one of several arrays' sums."""
    found = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", program.as_text())
    return [(kind, shapes_in(text)) for text, kind in found]


def shapes_in(text):
    return [tuple(map(int, x.split(","))) for x in re.findall(r"\[([\d,]+)\]", text)]


@pytest.mark.parametrize("kind", SHAPES)
@each_layer
def test_values_and_gradients(name, kind):
    """Equal to one device's; each gradient lies where its parameter does."""
    case = case_of(name, kind)
    program, places, tokens = compiled(case, kind)
    params, x, target = parameters(case), normal(2, B, T, D), normal(3, B, T, D)
    got = program(jax.device_put(params, places), *jax.device_put((x, target), tokens))
    want = jax.jit(with_gradients(layer(case), borders(T)))(params, x, target)
    trees_close(jax.device_get(got), jax.device_get(want))
    assert jax.tree.map(lambda x: x.sharding.spec, got[1][0]) == jax.tree.map(
        lambda x: x.spec, places
    )


def case_of(name, kind):
    """PaTH exchanges heads, of which "rich" has two; "plain" is the other layers' quickest."""
    return f"{name}-rich"


@pytest.mark.parametrize("kind", SHAPES)
@each_layer
def test_no_activation_moves_but_sums_over_heads(name, kind):
    """One sum of tokens [B, T, D] forward and one backward where heads are split, whatever the
    number of projections; a number or a few of a low rank beside. Gathers are of parameters, one
    each, and of states."""
    case = case_of(name, kind)
    program, places, tokens = compiled(case, kind)
    found = collectives(program)
    b, t = tokens.shard_shape((B, T))
    sizes = jax.tree.leaves(jax.tree.map(np.size, parameters(case)))
    with_tokens = [
        (what, shape) for what, shapes in found for shape in shapes if {t, T} & set(shape[1:3])
    ]
    assert not with_tokens


@each_layer
def test_traces(name):
    pass
