"""Kernels under vmap and under a sharded jit.

A Pallas call is opaque to XLA's partitioner, which would gather its operands. What is computed for
every batch row and head by itself says so here, and then runs shard by shard.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jla.pallas.derivatives import no_derivative
from jla.pallas.mosaic import interpreting


def shardwise(function, operands, results):
    """Wraps a function of arrays that works on every batch row and head by itself.

    Sharded over batch and heads it runs shard by shard, without communication; any other axis is
    gathered. `vmap` folds the mapped axis into the batch.

    Args:
      function: takes arrays, returns a tuple of arrays.
      operands, results: each array's axis letters, the first of them `B`. `H` are key heads; value
        heads `HV` or query heads `HQ`, a multiple of `H`, are split as `H` is.
    """

    def run(*arrays):
        mesh = _explicit_mesh(arrays)
        if mesh is None:
            return _without_varying_types(place, arrays)
        # Pallas refuses refs whose types carry shardings; shard_map's have none.
        types = [jax.typeof(x) for x in arrays]
        inputs, outputs = (shardings(mesh, types, sides) for sides in (operands, results))
        by_shard = jax.shard_map(
            lambda *shards: _without_varying_types(function, shards),
            mesh=mesh,
            in_specs=tuple(x.spec for x in inputs),
            out_specs=tuple(x.spec for x in outputs),
        )
        return by_shard(*map(jax.sharding.reshard, arrays, inputs))

    def place(*arrays):
        if interpreting():  # its ordered callbacks cannot be partitioned
            return function(*arrays)
        sizes = {}
        for array, axes in zip(arrays, operands, strict=True):
            sizes |= dict(zip(axes.split(), array.shape, strict=True))
        # A plain function: custom_partitioning cannot read a partial's signature.
        partitioned = custom_partitioning(lambda *operands: function(*operands))
        partitioned.def_partition(
            partition,
            infer_sharding_from_operands=lambda mesh, args, _: shardings(mesh, args, results),
            **_rule(operands, results, sizes["H"], sizes[_grouped(sizes)] // sizes["H"]),
        )
        return partitioned(*arrays)

    def shardings(mesh, args, sides):
        batch, heads = _placement(operands, args)
        place = {"B": batch, "H": heads, "HV": heads, "HQ": heads}
        specs = (PartitionSpec(*(place.get(x) for x in axes.split())) for axes in sides)
        return tuple(NamedSharding(mesh, spec) for spec in specs)

    def partition(mesh, args, _):
        run = _lowered_once(function, mesh.devices.flat[0].platform)
        return mesh, run, shardings(mesh, args, results), shardings(mesh, args, operands)

    run = custom_vmap(run)

    @run.def_vmap
    def fold(size, in_batched, *arrays):
        def merge(array, batched):
            if not batched:
                array = jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        out = run(*map(merge, arrays, in_batched))
        out = tuple(x.reshape(size, -1, *x.shape[1:]) for x in out)
        return out, (True,) * len(out)

    return no_derivative(run, functools.partial(function).func.__module__)


def for_each_row(weights, x):
    """Weights [W, H, D] that the rows of x [B, T, H, ...] share: a copy for each, [B, W, H, D].

    It is placed as x is, so that it is computed shard by shard, as `shardwise` wants it; the
    transpose is the sum over rows, on all devices.
    """
    shape = (x.shape[0], *weights.shape)
    mesh = _explicit_mesh((x, weights))
    if mesh is None:
        missing = tuple(_varying(x) - _varying(weights))
        if missing:
            weights = lax.pcast(weights, missing, to="varying")
        return jnp.broadcast_to(weights, shape)
    batch, heads = _placement(("B T H",), (jax.typeof(x),))
    weights = jax.sharding.reshard(weights, NamedSharding(mesh, PartitionSpec(None, heads)))
    placed = NamedSharding(mesh, PartitionSpec(batch, None, heads))
    return lax.broadcast_in_dim(weights, shape, (1, 2, 3), out_sharding=placed)


def _without_varying_types(function, arrays):
    """Calls a function that knows nothing of the mesh axes over which shard_map's values vary.

    Refs that vary are refused by Pallas, and what a kernel returns would not vary, though all of it
    depends on all operands.
    """
    axes = frozenset().union(*map(_varying, arrays))
    if not axes:
        return function(*arrays)
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    # Under jit it is one operation, in which nobody asks whether an iota varies as its users do.
    out = jaxpr_as_fun(jax.make_jaxpr(jax.jit(lambda *x: function(*x)))(*shapes))(*arrays)
    missing = (tuple(axes - _varying(x)) for x in out)
    return tuple(
        lax.pcast(x, names, to="varying") if names else x
        for x, names in zip(out, missing, strict=True)
    )


def _lowered_once(function, platform):
    """The function, lowered but once for all partitioned calls with arrays of the same shapes.

    JAX lowers each call by itself, a second or more for each kernel of each layer of a model: what
    is called here is a module that was lowered before. `function` is told by what it is a partial
    of and by its arguments; one that has a closure is another each time, and stays as it is.
    """
    if getattr(function, "__closure__", None):
        return function
    platform = {"gpu": "cuda"}.get(platform, platform)
    partial = functools.partial(function)  # of what `function` is a partial of, if it is one
    options = tuple(partial.keywords.items())

    def run(*arrays):
        shapes = tuple((x.shape, x.dtype) for x in arrays)
        return _lowered(partial.func, partial.args, options, shapes, platform).call(*arrays)

    return run


@functools.lru_cache(maxsize=1024)
def _lowered(function, leading, options, shapes, platform):
    arrays = (jax.ShapeDtypeStruct(*x) for x in shapes)
    run = functools.partial(function, *leading, **dict(options))
    return export.export(jax.jit(run), platforms=[platform])(*arrays)


def _explicit_mesh(arrays):
    """The mesh over which types of the arrays are sharded, or None."""
    for x in arrays:
        mesh = jax.typeof(x).sharding.mesh
        if any(kind == AxisType.Explicit for kind in mesh.axis_types):
            return mesh
    return None


def _varying(x):
    return jax.typeof(x).manual_axis_type.varying


def _placement(operands, args):
    """The mesh axes that batch and heads are split over: those of the first array that has both."""
    grouped = _grouped(" ".join(operands).split())
    for axes, arg in zip(operands, args, strict=True):
        letters = axes.split()
        if grouped in letters and isinstance(arg.sharding, NamedSharding):
            spec = (*arg.sharding.spec, *(None,) * len(letters))
            return spec[0], spec[letters.index(grouped)]
    return None, None


def _grouped(letters):
    """The letter of the heads that come in groups; `H` if none do."""
    return next((x for x in letters if x in ("HV", "HQ")), "H")


def _rule(operands, results, heads, group):
    """Shardy's rule: batch and key heads are split together everywhere, all else stays whole."""
    # Shardy refuses a factor of one beside another, so a group of one key head stands by itself.
    grouped = "h" if group == 1 else "group" if heads == 1 else "(h group)"
    names = {"B": "b", "H": "h", "HV": grouped, "HQ": grouped}

    def side(arrays):
        return ", ".join(" ".join(names.get(x, x.lower()) for x in axes.split()) for axes in arrays)

    sizes = {"group": group} if "(" in grouped else {}
    rule = f"{side(operands)} -> {side(results)}"
    # Shardy wants the factors in the order in which they first appear.
    whole = tuple(x for x in dict.fromkeys(re.findall(r"\w+", rule)) if x not in ("b", "h"))
    return dict(sharding_rule=rule, need_replication_factors=whole, **sizes)
