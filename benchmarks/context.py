"""Time split over all devices: the efficiency of a mechanism, and one long sequence in a layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import turns
from benchmarks.measure import compiling, input_sets, key, timed
from benchmarks.mechanisms import MECHANISMS
from jla.linen import KimiDeltaAttention

AXIS = "seq"
WHOLE, TOKENS = PartitionSpec(), PartitionSpec(None, AXIS)


def measure(name, shape, what, implementation, seconds):
    """A case of the group "context": of a mechanism, or of the layer around it (`what` "layer")."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,))
    found = dict(devices=devices, mesh={AXIS: devices}, collectives={})
    if what == "layer":
        return found | layer(shape, implementation, mesh, seconds)
    return found | mechanism(name, shape, what == "backward", implementation, mesh, seconds)


def mechanism(name, shape, backward, implementation, mesh, seconds):
    """The shape's T are the tokens of each device. First one device has them alone.

    `efficiency` is the time that the same tokens take one device alone, by the time over all
    devices. The work of PaTH grows with the square of a sequence, so on P devices each has P times
    the work that one has alone; `work` says so.
    """
    entry = MECHANISMS[name]
    run = functools.partial(called, entry, implementation)
    sets = input_sets(name, shape, False)
    alone = compiling(lambda raw, _: run(raw), sets, backward)
    draw, places, over = spread(entry, shape, implementation, mesh)
    raw = jax.jit(draw, out_shardings=places)()
    place = NamedSharding(mesh, TOKENS)
    both = compiling(lambda raw, _: over(raw), [(raw, {})], backward, place)
    alone, both = alone(), both()
    turns.to_time()
    alone, numbers = alone(seconds), both(seconds)
    work = mesh.size if entry.quadratic else 1
    return numbers | dict(
        tokens_per_device=shape.T,
        work=work,
        alone_ms=alone["ms"],
        alone_memory_gib=alone["memory_gib"],
        efficiency=work * alone["ms"] / numbers["ms"],
    )


def called(entry, implementation, raw, **options):
    arguments = entry.prepare(raw)
    return entry.function(**arguments, implementation=implementation, **options)[0]


def spread(entry, shape, implementation, mesh):
    """Of a mechanism whose shape's T are the tokens of each device of a mesh: a function that draws
    its inputs, where they lie, and a function of them, the outputs."""
    longer = dataclasses.replace(shape, T=shape.T * mesh.size)

    def draw():
        return entry.raw(key(0), longer.sizes)

    specs = jax.tree.map(
        lambda x: TOKENS if x.shape[:2] == (longer.B, longer.T) else WHOLE, jax.eval_shape(draw)
    )
    run = functools.partial(called, entry, implementation, axis_name=AXIS)
    over = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=TOKENS)
    return draw, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs), over


def layer(shape, implementation, mesh, seconds):
    """KimiDeltaAttention forward and backward, of a sequence of T tokens over all devices.

    Nothing inside of it is kept from the forward pass, as where a model has many layers.
    """
    D = shape.H * shape.D
    module = KimiDeltaAttention(
        num_heads=shape.H,
        key_dim=shape.D,
        dtype=jnp.bfloat16,
        implementation=implementation,
        axis_name=AXIS,
    )

    def make():
        params = module.init(key(0), jnp.zeros((1, 1, D), jnp.bfloat16))["params"]
        return dict(params=params, x=jax.random.normal(key(1), (shape.B, shape.T, D), jnp.bfloat16))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(WHOLE, TOKENS), out_specs=TOKENS)
    @jax.checkpoint
    def run(params, x):
        return module.apply({"params": params}, x)

    places = dict(params=NamedSharding(mesh, WHOLE), x=NamedSharding(mesh, TOKENS))
    inputs = jax.jit(make, out_shardings=places)()
    numbers = timed(
        lambda inputs, _: run(inputs["params"], inputs["x"]),
        [(inputs, {})],
        True,
        seconds,
        places["x"],
    )
    return numbers | dict(tokens_per_device=shape.T // mesh.size)
