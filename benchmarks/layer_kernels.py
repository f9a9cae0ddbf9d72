"""Times the layers' own kernels (norms, convolutions, gates) beside XLA's form of the same.

Sizes are those of the language model's step: 16 x 4096 tokens of 8 heads of 128, bfloat16.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp

import jla
from benchmarks import measure, side_by_side
from benchmarks.mechanisms import MECHANISMS

# Private, for only layers call these operations, and what is timed is their share of a layer.
# Other benchmarks use public names; tests/test_layout.py has the exceptions.
from jla import _fused

KEYS = ("case", "implementation")
B, T, H, D = 16, 4096, 8, 128


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def parameter(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


ROWS, HEADS, BIAS = array(B, T, H * D), array(B, T, H, D), array(H, D)
SCALE, SCALE_OF_HEAD, SCALE_OF_ALL = parameter(H * D), parameter(D), parameter(H, D)
TAPS = parameter(4, H, D)

norm = functools.partial(_fused.rms_norm, epsilon=1e-6)
branch = functools.partial(_fused.rms_norm_branch, epsilon=1e-6)
gated_norm = functools.partial(_fused.gated_norm, epsilon=1e-6)
convolution = _fused.short_convolution
silu_gate = dict(activation=jax.nn.silu)

# Each operation, its arrays and its settings.
CASES = {
    "norm": (norm, [ROWS, SCALE], {}),
    "norm of heads": (norm, [HEADS, SCALE_OF_HEAD], {}),
    "norm, gate": (norm, [HEADS, SCALE_OF_HEAD, HEADS], silu_gate),
    "norm, gate, bias": (norm, [HEADS, SCALE_OF_HEAD, HEADS, BIAS], silu_gate),
    "norm of silu(x)": (norm, [HEADS, SCALE_OF_HEAD], dict(input_activation=jax.nn.silu)),
    "branch": (branch, [ROWS, SCALE], {}),
    "branch, update": (branch, [ROWS, SCALE, ROWS], {}),
    "gated norm": (gated_norm, [HEADS, HEADS, SCALE_OF_ALL], {}),
    "convolution": (convolution, [HEADS, TAPS], {}),
    "convolution, bias": (convolution, [HEADS, TAPS, BIAS], {}),
    "convolution, norm": (convolution, [HEADS, TAPS], dict(normalize=True)),
    "convolution, two SiLUs": (convolution, [HEADS, TAPS], dict(silu_twice=True)),
    "convolution, two SiLUs, norm": (
        *(convolution, [HEADS, TAPS]),
        dict(silu_twice=True, normalize=True),
    ),
}


def kda_from_decays(q, k, v, f, A_log, dt_bias, beta, *, lower_bound, implementation):
    """`kda_from_projection` with its decays by XLA."""
    g = jla.kda_gate(f, A_log, dt_bias, lower_bound)
    return jla.kda(q, k, v, g, beta, implementation=implementation)


# KDA with its gates, by its kernels: made in them, or by XLA before them.
GATES = {
    "kda, gates in kernels": (_fused.kda_from_projection, None),
    "kda, gates by XLA": (kda_from_decays, None),
    "kda, bounded gates in kernels": (_fused.kda_from_projection, -5.0),
    "kda, bounded gates by XLA": (kda_from_decays, -5.0),
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_kernels", description=__doc__)
    parser.add_argument("--out", help="write JSON to this file")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one repeat")
    options = parser.parse_args(argv)
    report = side_by_side.Report(options.out, KEYS, "layer_kernels", argv)
    for case, (operation, shapes, settings) in CASES.items():
        for implementation in ("pallas", "xla"):
            row = dict(case=case, implementation=implementation)
            run = functools.partial(operation, **settings, implementation=implementation)
            sets = (draw(measure.key(i), shapes) for i in range(2))
            show(report.measure(row, forward_and_both(run, sets, options.seconds)))
    for case, (operation, lower_bound) in GATES.items():
        row = dict(case=case, implementation="pallas")
        run = functools.partial(operation, lower_bound=lower_bound, implementation="pallas")
        sets = (draw_kda(measure.key(i)) for i in range(2))
        show(report.measure(row, forward_and_both(run, sets, options.seconds)))
    return 1 if report.failed else 0


def draw(key, shapes):
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, shapes, strict=True)]


def draw_kda(key):
    """The arrays that `kda_from_projection` takes."""
    kda = MECHANISMS["kda"]
    raw = kda.raw(key, dict(B=B, T=T, H=H, HV=H, K=D, V=D))
    ready = kda.prepare(raw)
    projected = raw["g"], raw["A_log"], raw["dt_bias"]
    return [ready["q"], ready["k"], ready["v"], *projected, ready["beta"]]


def forward_and_both(run, sets, seconds):
    """Yields the time of the forward pass, and with that of the gradients of all arrays."""
    sets = list(sets)

    def both(cotangent, *arguments):
        y, pull = jax.vjp(run, *arguments)
        return y, pull(cotangent)

    cotangent = jax.eval_shape(run, *sets[0])
    cotangent = jax.tree.map(
        lambda x: jax.random.normal(measure.key(9), x.shape, x.dtype), cotangent
    )
    yield dict(forward_ms=milliseconds(run, sets, seconds))
    yield dict(both_ms=milliseconds(both, [(cotangent, *x) for x in sets], seconds))


def milliseconds(run, sets, seconds):
    run = jax.jit(run)
    return measure.device_time(lambda i: run(*sets[i % len(sets)]), seconds)["ms"]


def show(row):
    numbers = {key: f"{x:.3f}" for key, x in row.items() if key.endswith("_ms")}
    print(f"{row['case']:32} {row['implementation']:8}", *numbers.items(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
