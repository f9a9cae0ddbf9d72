"""Times a layer of Kimi Delta Attention, of the package `jla` that Python finds: that of this
repository, or of the distribution jax-linear-attention, whose package has the same name. So nothing
of this folder is imported here, and this is run as a program:

    PYTHONPATH=. python benchmarks/kda_layer.py --out ours.json
    PYTHONPATH=/tmp/peer python benchmarks/kda_layer.py --out peer.json

with jax-linear-attention unpacked into /tmp/peer (it needs equinox). Inputs are bfloat16 and
parameters float32; `backward` is forward and gradients of the parameters and the inputs.
"""

import argparse
import datetime
import importlib
import json
import math
import pathlib
import shlex
import statistics
import sys
import time

import jax
import jax.numpy as jnp

import jla


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--batch", type=int, default=16)
    add("--length", type=int, default=4096)
    add("--width", type=int, default=1024)
    add("--heads", type=int, default=8)
    add("--seconds", type=float, default=0.3, help="of one repeat")
    add("--out", help="write JSON to this file")
    options = parser.parse_args()
    package, implementation, params, apply = (ours if hasattr(jla, "linen") else peer)(options)
    shape = options.batch, options.length, options.width
    x, cotangent = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in (1, 2))

    def backward(params, x):
        o, pull = jax.vjp(apply, params, x)
        return o, pull(cotangent)

    rows = []
    for measure, function in (("forward", apply), ("backward", backward)):
        row = dict(package=package, implementation=implementation, measure=measure)
        row |= {name: getattr(options, name) for name in ("batch", "length", "width", "heads")}
        row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
        row |= timed(jax.jit(function), (params, x), options.seconds)
        print(row, flush=True)
        rows.append(row)
    meta = dict(
        card=jax.devices()[0].device_kind,
        jax=jax.__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "benchmarks/kda_layer.py", *sys.argv[1:]]),
    )
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(dict(meta=meta, layers=rows), indent=1))


def ours(options):
    """The package's name and version, its implementation, a layer's parameters, and the layer as a
    function of parameters and inputs."""
    from jla.linen import KimiDeltaAttention

    implementation = "pallas" if jax.default_backend() == "gpu" else "xla"
    layer = KimiDeltaAttention(
        num_heads=options.heads, dtype=jnp.bfloat16, implementation=implementation
    )
    few = jnp.zeros((1, 2, options.width), jnp.bfloat16)
    params = layer.clone(implementation="reference").init(jax.random.key(0), few)
    return f"jla {jla.__version__}", implementation, params, layer.apply


def peer(options):
    """As `ours`."""
    import equinox

    # By name, for in this repository there are none.
    make_mixer = importlib.import_module("jla.layers.linear_attention").make_mixer
    config_of = importlib.import_module("jla.models.config").LinearAttentionConfig
    head_dim = options.width // options.heads
    config = config_of(options.heads, options.heads, head_dim, head_dim)
    layer = make_mixer("kda", options.width, config, key=jax.random.key(0), std=0.02, norm_eps=1e-5)
    params, rest = equinox.partition(layer, equinox.is_inexact_array)
    name = f"jax-linear-attention {jla.__version__}"
    return name, config.implementation, params, lambda p, x: equinox.combine(p, rest)(x)


def timed(function, arguments, seconds, repeats=5):
    """Compiles and times calls enqueued back to back: the median repeat's mean, of two rounds the
    faster."""
    began = time.perf_counter()
    run = function.lower(*arguments).compile()
    plan = run.memory_analysis()
    jax.block_until_ready(run(*arguments))
    first_call_s = time.perf_counter() - began

    def mean(n):
        began = time.perf_counter()
        for _ in range(n):
            out = run(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / n

    n = max(1, math.ceil(seconds / mean(3)))
    rounds = [statistics.median(mean(n) for _ in range(repeats)) for _ in range(2)]
    memory = plan.temp_size_in_bytes + plan.output_size_in_bytes
    spread = max(rounds) / min(rounds) - 1
    return dict(
        ms=1e3 * min(rounds), spread=spread, memory_gib=memory / 2**30, first_call_s=first_call_s
    )


if __name__ == "__main__":
    main()
