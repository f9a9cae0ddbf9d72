"""Times the layers' own kernels (norms, convolutions, gates) beside XLA's form of the same.

Sizes are those of the language model's step: 16 x 4096 tokens of 8 heads of 128, bfloat16.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks import measure, side_by_side
from jla._core.shardwise import for_each_row
from jla.linen import RMSNorm
from jla.linen._normalize import GatedRMSNorm
from jla.linen._short_convolution import ShortConvolution
from jla.pallas.kda import gate

KEYS = ("case", "implementation")
B, T, H, D = 16, 4096, 8, 128
ROWS, HEADS = (B, T, H * D), (B, T, H, D)


class Branch(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, *arrays):
        return RMSNorm(implementation=self.implementation).branch(*arrays)


def kda_gates(f, dg, *, bounded):
    """The gates, and the gradient of f for the float32 gradient dg: what KDA's kernels call."""
    A_log, bias = jnp.zeros(H), jnp.zeros((H, D))
    coefficients = for_each_row(gate.coefficients(A_log, bias, -5.0 if bounded else None), f)
    if dg is None:
        return gate.decay_operand(f, coefficients, None, bounded=bounded)
    return gate.gradients(f, coefficients, None, dg, bounded=bounded)


def norm(**options):
    return lambda implementation: RMSNorm(implementation=implementation, **options)


def convolution(**options):
    return lambda implementation: ShortConvolution(4, implementation=implementation, **options)


# Each layer, and the shapes of its inputs.
CASES = {
    "norm": (norm(), [ROWS]),
    "norm of heads": (norm(), [HEADS]),
    "norm, gate": (norm(activation=nn.silu), [HEADS, HEADS]),
    "norm, gate, bias": (norm(activation=nn.silu), [HEADS, HEADS, (H, D)]),
    "norm of silu(x)": (norm(input_activation=nn.silu), [HEADS]),
    "branch": (Branch, [ROWS]),
    "branch, update": (Branch, [ROWS, ROWS]),
    "gated norm": (lambda x: GatedRMSNorm(implementation=x), [HEADS, HEADS]),
    "convolution": (convolution(), [HEADS]),
    "convolution, norm": (convolution(normalize=True), [HEADS]),
    "convolution, two SiLUs": (convolution(silu_twice=True), [HEADS]),
    "convolution, two SiLUs, norm": (convolution(silu_twice=True, normalize=True), [HEADS]),
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_kernels", description=__doc__)
    parser.add_argument("--out", help="write JSON to this file")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one repeat")
    options = parser.parse_args(argv)
    report = side_by_side.Report(options.out, KEYS, "layer_kernels", argv)
    for case, (make, shapes) in CASES.items():
        for implementation in ("pallas", "xla"):
            row = dict(case=case, implementation=implementation)
            show(report.measure(row, times(make(implementation), shapes, options.seconds)))
    for case, bounded in (("gates", False), ("gates, bound", True)):
        row = dict(case=case, implementation="pallas")
        show(report.measure(row, gate_times(bounded, options.seconds)))
    return 1 if report.failed else 0


def times(layer, shapes, seconds):
    """Yields the time of the forward pass, and with that of the gradients of all inputs."""
    draws = [jax.random.split(measure.key(i), len(shapes)) for i in range(2)]
    sets = [
        [
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(draw, shapes, strict=True)
        ]
        for draw in draws
    ]
    params = layer.init(jax.random.key(0), *(x[:1, :2] if x.ndim > 2 else x for x in sets[0]))
    yield from forward_and_both(layer.apply, [(params, *x) for x in sets], seconds)


def forward_and_both(run, sets, seconds):
    def both(cotangent, *arguments):
        y, pull = jax.vjp(run, *arguments)
        return y, pull(cotangent)

    cotangent = jax.eval_shape(run, *sets[0])
    cotangent = jax.tree.map(
        lambda x: jax.random.normal(measure.key(9), x.shape, x.dtype), cotangent
    )
    yield dict(forward_ms=milliseconds(run, sets, seconds))
    yield dict(both_ms=milliseconds(both, [(cotangent, *x) for x in sets], seconds))


def gate_times(bounded, seconds):
    f = [jax.random.normal(measure.key(i), HEADS, jnp.bfloat16) for i in range(2)]
    dg = jax.random.normal(measure.key(9), HEADS)
    run = functools.partial(kda_gates, bounded=bounded)
    yield dict(forward_ms=milliseconds(run, [(x, None) for x in f], seconds))
    yield dict(backward_ms=milliseconds(run, [(x, dg) for x in f], seconds))


def milliseconds(run, sets, seconds):
    run = jax.jit(run)
    return measure.device_time(lambda i: run(*sets[i % len(sets)]), seconds)["ms"]


def show(row):
    numbers = {key: f"{x:.3f}" for key, x in row.items() if key.endswith("_ms")}
    print(f"{row['case']:32} {row['implementation']:8}", *numbers.items(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
