"""The product of all heads with the output projection."""

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def sum_over_heads():
    """`dot_general_cls` of that projection, a DenseGeneral over heads and features."""
    return _product


def _product(o, kernel, dimensions, **options):
    """`lax.dot_general`. If types carry shardings, and heads are split in both arrays, JAX asks
    where the sum lies: its rows as those of o, its features as those of the kernel."""
    rows, features = (jax.typeof(x).sharding for x in (o, kernel))
    batch, time, heads, _ = rows.spec
    if heads is not None and heads == features.spec[0]:
        spec = PartitionSpec(batch, time, features.spec[2])
        options["out_sharding"] = NamedSharding(rows.mesh, spec)
    return lax.dot_general(o, kernel, dimensions, **options)
