import dataclasses, jax, jax.numpy as jnp, sys
import jla.pallas
jla.pallas.unsupported_device = lambda: None
jla.pallas.missing_packages = lambda: None
exec(open(".scratch-example/tracepallas.py").read().split("for name in")[0])
(shape,) = [s for s in mechanisms.MECHANISMS["kda"].shapes["small"] if "layer" in s.measures]
context.measure("kda", dataclasses.replace(shape, T=512, D=64, H=4), "layer", "pallas", 0)
