"""What devices would exchange: programs compiled for meshes of CPU devices, and not run.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m benchmarks.meshes

The example's training step, blocks in a scan, on each mesh, and every mechanism with its time split
over four and eight devices, forward and backward. For each kind of collective: how often a device
takes part in one step or call, and the bytes of their results on one device. These are of XLA's
programs for CPUs, which move 16-bit numbers as float32 and combine nothing, and of the
implementation "xla"; a GPU has fewer and smaller ones.
"""

import argparse
import collections
import dataclasses
import math
import re
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import context, language_model
from benchmarks.mechanisms import MECHANISMS

# Behind benchmarks.language_model, which has added the examples' folder to the path.
import devices  # isort: skip

MESHES = "data=4 data=2,seq=2 seq=4 seq=2,model=2 data=8 seq=8"
KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s32=4, u32=4, f32=4)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meshes", description=__doc__)
    add = parser.add_argument
    add("--mixers", default="kda", help="of the model, by commas (default: %(default)s)")
    add("--meshes", nargs="*", default=MESHES.split(), help="default: " + MESHES)
    add("--mechanism", default=",".join(MECHANISMS), help="names, by commas; none with ''")
    add("--devices", nargs="*", type=int, default=[4, 8], help="of the mechanisms")
    add("--tokens", type=int, default=512, help="in a window, or of one device of seq")
    options = parser.parse_args(argv)
    print("| program | mesh | a device's collectives | MB | compiled in s |\n|---|---|---|---|---|")
    for mixer in filter(None, options.mixers.split(",")):
        for mesh in options.meshes:
            show(f"model, {mixer}", mesh, lambda m=mesh, x=mixer: step(x, m, options.tokens))
    for name in filter(None, options.mechanism.split(",")):
        for count in options.devices:
            show(name, f"seq={count}", lambda n=name, c=count: call(n, c, options.tokens))


def show(name, mesh, lower):
    began = time.process_time()
    found = exchanged(lower().compile().as_text())
    kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in found.items())
    bytes_ = sum(size for _, size in found.values())
    seconds = time.process_time() - began
    print(f"| {name} | {mesh} | {kinds} | {bytes_ / 1e6:.2f} | {seconds:.0f} |", flush=True)


def step(mixer, mesh, tokens):
    """The lowered training step of benchmarks.language_model on this mesh, "data=2,seq=2"."""
    sizes = devices.mesh_sizes()(mesh)
    length = tokens * sizes.get("seq", 1)
    words = f"--mixers {mixer} --scan --batch 1 --length {length} --mesh {mesh}"
    options = language_model.parse([*words.split(), "--implementation", "xla"])
    B, T, model = language_model.model_of(mixer, options)
    optimizer, _ = language_model.make_optimizer(options.steps, options.lr, weight_decay=0.1)

    def first():
        params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return dict(params=params, moments=optimizer.init(params))

    shapes = jax.eval_shape(first)
    places, _, lower = language_model.over_mesh(model, optimizer, shapes, options)
    tokens = NamedSharding(jax.tree.leaves(places)[0].mesh, PartitionSpec("data", "seq"))
    windows = typed(jax.ShapeDtypeStruct((B, T), jnp.int32), tokens)
    return lower(jax.tree.map(typed, shapes, places), windows, windows)


def call(name, count, tokens):
    """The lowered forward and backward pass of a mechanism with so many tokens on each device."""
    mesh = jax.make_mesh((count,), (context.AXIS,), (AxisType.Auto,), devices=jax.devices()[:count])
    entry = MECHANISMS[name]
    shape = next(x for x in entry.shapes["full"] if x.name == "context")
    shape = dataclasses.replace(shape, T=tokens)
    draw, places, over = context.spread(entry, shape, "xla", mesh)
    raw = jax.tree.map(typed, jax.eval_shape(draw), places)
    gradient = jax.grad(lambda raw: over(raw).astype(jnp.float32).sum())
    return jax.jit(gradient, out_shardings=places).lower(raw)


def typed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def exchanged(text):
    """By kind: how many collectives one run of a compiled program has, and their results' bytes on
    one device. Those in a loop count once for each of its turns."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{$(.*?)^\}", text, re.M | re.S))
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)[1]
    found = collections.defaultdict(lambda: [0, 0])

    def read(name, times):
        for line in bodies[name].splitlines():
            if match := re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line):
                found[match[2]][0] += times
                found[match[2]][1] += times * size(match[1])
            elif " while(" in line:
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                read(re.search(r"body=%?([\w.-]+)", line)[1], times * int(turns[1] if turns else 1))
            else:
                for inner in re.findall(r"(?:to_apply|calls)=%?([\w.-]+)", line):
                    read(inner, times)

    read(entry, 1)
    return dict(found)


def size(types):
    shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types)
    return sum(BYTES[t] * math.prod(map(int, filter(None, dims.split(",")))) for t, dims in shapes)


if __name__ == "__main__":
    sys.exit(main())
