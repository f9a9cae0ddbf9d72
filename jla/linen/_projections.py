"""The projection of all heads to the layer's output."""

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def projected(o, dense, features):
    """ "o_proj" of o [B, T, H, V], a `dense` with these features: [B, T, features]."""
    return dense(features, axis=(-2, -1), dot_general_cls=_sum_over_heads, name="o_proj")(o)


def _sum_over_heads():
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
