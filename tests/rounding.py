"""How far "reference" and "xla" are from float64 where nothing decays, so that rounding adds up.

    python tests/rounding.py --lengths 500,2000 --out benchmarks/results/rounding.json

The cases are the contract's `undamped` ones, at full size. The judge is the definition in float64.
"""

import argparse
import importlib
import inspect
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "contract"), str(HERE.parent)]

from harness import definition, error, inputs, value_and_vjp, with_gradients  # noqa: E402
from mechanisms import MECHANISMS  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="500,2000", help="numbers of tokens, by commas")
    parser.add_argument("--mechanism", default="", help="names, by commas; all by default")
    parser.add_argument("--out", help="a file for the numbers, JSON")
    options = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    names = options.mechanism.split(",") if options.mechanism else [m.name for m in MECHANISMS]
    device = jax.devices()[0].device_kind
    meta = dict(device=device, jax=jax.__version__, command=" ".join(["tests/rounding.py", *argv]))
    rows = []
    for mechanism in MECHANISMS:
        for stress in mechanism.undamped if mechanism.name in names else ():
            for T in map(int, options.lengths.split(",")):
                rows.append(errors(mechanism, stress, T))
                print(rows[-1], flush=True)
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(dict(meta=meta, rounding=rows), indent=1))


def errors(mechanism, stress, T):
    """The largest relative error of values and of gradients, of "xla" and of "reference"."""
    xla = mechanism.form("xla")
    sizes = dict(xla.full) | dict(T=T)
    args, cotangents = inputs(mechanism, sizes, "float32")
    args = mechanism.stress[stress](args)
    found = dict(
        xla=value_and_vjp(mechanism, xla, args, cotangents),
        reference=definition(mechanism, args, cotangents),
    )
    found = jax.tree.map(np.asarray, found)
    row = dict(mechanism=mechanism.name, stress=stress, **sizes, dtype="float32")
    judge = in_float64(mechanism, args, cotangents)
    for name, (values, gradients) in found.items():
        for kind, got, want in zip(
            ("values", "gradients"), (values, gradients), judge, strict=True
        ):
            row[f"{name} {kind}"] = float(max(jax.tree.leaves(jax.tree.map(error, got, want))))
    return row


def largest(got, want):
    return float(max(jax.tree.leaves(jax.tree.map(error, got, want))))


def in_float64(mechanism, args, cotangents):
    """The definition's values and gradients, its module's float32 being float64."""
    module = importlib.import_module(
        inspect.getmodule(mechanism.run).__name__.replace("jla.", "jla.reference.")
    )
    function = getattr(module, mechanism.run.__name__)
    settings = {"scale": args["q"].shape[-1] ** -0.5, "cg_steps": 30}
    parameters = inspect.signature(function).parameters
    settings = {name: value for name, value in settings.items() if name in parameters}

    def widened(x):
        x = np.asarray(x)
        return jnp.asarray(x, jnp.float64 if np.issubdtype(x.dtype, np.floating) else x.dtype)

    def run(given):
        names = [name for name in parameters if name not in settings]
        return function(*(given.get(name) for name in names), **settings)

    float32 = module.f32
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        module.f32 = jnp.float64
        try:
            result = with_gradients(run, *jax.tree.map(widened, (args, cotangents)))
            return jax.tree.map(np.asarray, result)
        finally:
            module.f32 = float32


if __name__ == "__main__":
    main(sys.argv[1:])
