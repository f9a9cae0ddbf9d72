"""Which tokens a layer's output depends on before any training, for every mixer.

    JAX_PLATFORMS=cpu python -m benchmarks.reach --out benchmarks/results/reach.json

The gradient of the last token's output, by random cotangents, has a length at each token; squared,
and divided by their sum, these are shares. `last_1`, `last_4` and `last_16` are those of the last
tokens, `tokens` is how many tokens share equally in a sum of squares as large, and `size` is the
root mean square of the output, for inputs of 1. Models that see little of the last tokens, or whose
outputs are small, learn slowly at first.
"""

import argparse
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import quality_models, side_by_side

KEYS = ("model", "length", "width", "heads")
MODELS = "kda,kda:conv_size=None,mesa,log_linear,log_linear:init_D=0.0,gsa,"
MODELS += "gsa:gate_logit_normalizer=1,gsa:scale=16,path,path:use_forget_gate=True,path:shift=True,"
MODELS += "attention,attention:shift=True"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reach", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--models", default=MODELS, help="by commas (default: %(default)s)")
    add("--length", type=int, default=512, help="tokens (default: %(default)s)")
    add("--width", type=int, default=256, help="(default: %(default)s)")
    add("--heads", type=int, default=2, help="(default: %(default)s)")
    add("--out", help="write JSON to this file; its other rows stay")
    options = parser.parse_args(argv)
    report = side_by_side.Report(options.out, KEYS, "reach", argv)
    for model in options.models.split(","):
        row = dict(model=model, length=options.length)
        row |= dict(width=options.width, heads=options.heads)
        report.measure(row, measured(model, options))
        numbers = (f"{name} {x:.3f}" for name, x in row.items() if isinstance(x, float))
        print(model, *numbers, flush=True)
    return 1 if report.failed else 0


def measured(model, options):
    """Yields the row's numbers."""
    (mixer,), settings = quality_models.parsed(model)
    sizes = dict(num_heads=options.heads, key_dim=options.width // options.heads)
    layer = quality_models.template(mixer, settings, sizes, options.length)
    if "implementation" in {field.name for field in dataclasses.fields(layer)}:
        layer = layer.clone(implementation="reference")
    x = jax.random.normal(jax.random.key(0), (1, options.length, options.width))
    params = quality_models.filled(model, layer.init(jax.random.key(1), x[:, :2]))
    yield reach(lambda x: layer.apply(params, x), x)


def reach(function, x, cotangents=4):
    """The numbers of a function of x [1, T, D]."""
    y, pull = jax.vjp(lambda x: function(x)[0, -1], x)
    squares = np.zeros(x.shape[1])
    for i in range(cotangents):
        (gradient,) = pull(jax.random.normal(jax.random.key(2 + i), y.shape))
        squares += np.square(np.asarray(gradient[0])).sum(axis=-1)
    shares = squares / squares.sum()
    found = {f"last_{n}": float(shares[-n:].sum()) for n in (1, 4, 16)}
    size = float(jnp.sqrt(jnp.mean(y**2)))
    return found | dict(tokens=float(1 / np.square(shares).sum()), size=size)


if __name__ == "__main__":
    sys.exit(main())
