"""Kernels under vmap and under a sharded jit.

A Pallas call is opaque to XLA's partitioner, which would gather its operands. What is computed for
every batch row and head by itself says so here, and then runs shard by shard.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jla._core.derivatives import no_derivative
from jla._core.interpreter import interpreting
from jla._core.types import Sizes
from jla._core.varying import varying_as, without_varying_types

# Of jax-triton 0.3 and 0.4. `jax.export` guarantees nothing for programs with them that another
# version of JAX reads; those made here are called in the same process.
_TRITON_CALLS = ("triton_kernel_call", "triton_kernel_call_ffi")

# The axis letters of some arrays; the names of the mesh's axes over which each dimension is split.
type Letters = Sequence[str]
type Split = Sequence[tuple[str, ...]]
type Arrays = tuple[jax.Array, ...]


def shardwise(
    function: Callable[..., Arrays], operands: Letters, results: Letters
) -> Callable[..., Arrays]:
    """Wraps a function of arrays that works on every batch row and head by itself.

    Sharded over batch and heads it runs shard by shard, without communication; any other axis is
    gathered. `vmap` folds the mapped axis into the batch. docs/sharding.md says what is split if
    there are fewer key heads than devices.

    A step on a pool has arrays of R rows, `R` in the place of `B`; the last operand is then
    `slots`, the row of the pool for each batch row. Any batch row may need any row of the pool, so
    both stay whole: a pool whose rows are split raises NotImplementedError.

    Args:
      function: takes arrays, returns a tuple of arrays.
      operands, results: each array's axis letters, the first of them `B`. `H` are key heads; `HV`
        are value heads, or `HQ` query heads, a multiple of `H`.
    """

    def run(*arrays):
        sizes, letters = _sizes(operands, arrays), tuple(operands)
        if _shares_key_heads(sizes, results) and sizes["H"] > 1:
            # A device's part of it says which value heads it has, and so which key heads it needs.
            grouped = _grouped(sizes)
            arrays = *arrays, jnp.arange(sizes[grouped], dtype=jnp.int32)
            letters = *letters, grouped
        call = _Call(function, letters, tuple(results), sizes)
        mesh, names = _explicit(arrays)
        if names:
            return call.by_type(mesh, names, run, arrays)
        return without_varying_types(call.by_partitioner, arrays)

    # Inside, so that a checkpoint policy sees the kernels' results as those of custom_vmap.
    run = custom_vmap(no_derivative(run, functools.partial(function).func.__module__))

    @run.def_vmap
    def fold(size, in_batched, *arrays):
        _, names = _explicit(arrays)
        splits = [
            _split_by_type(x, names)[batched] for x, batched in zip(arrays, in_batched, strict=True)
        ]
        # JAX merges axes whose types carry shardings if it is the first of them that is split.
        last = any(splits)

        def merge(array, batched):
            if not batched:
                array = jnp.broadcast_to(array, (size, *array.shape))
            array = jnp.moveaxis(array, 0, int(last))
            return array.reshape(-1, *array.shape[2:])

        behind = [x.shape[int(one_more) :] for x, one_more in zip(arrays, in_batched, strict=True)]
        rows = _sizes_of_shapes(operands, behind).get("R")
        if rows is not None:
            # Slots of the pool that all pools together are.
            *arrays, slots = arrays
            slots = slots if in_batched[-1] else jnp.broadcast_to(slots, (size, *slots.shape))
            number = jnp.arange(size, dtype=jnp.int32)[:, None]
            of_all = slots * size + number if last else number * rows + slots
            arrays = *arrays, jnp.where((slots >= 0) & (slots < rows), of_all, -1)
            in_batched = [*in_batched[:-1], True]

        def unmerge(array):
            parts = (-1, size) if last else (size, -1)
            return jnp.moveaxis(array.reshape(*parts, *array.shape[1:]), int(last), 0)

        out = tuple(map(unmerge, run(*map(merge, arrays, in_batched))))
        return out, (True,) * len(out)

    return run


def defvjp(
    function: jax.custom_vjp[Any], forward: Callable[..., Any], backward: Callable[..., Any]
) -> None:
    """`function.defvjp(forward, backward)`, and each gradient lies where its array does.

    JAX asks for it where types carry shardings. The arguments that are not differentiated are the
    last ones.
    """
    options = len(function.nondiff_argnums)

    def forward_and_types(*args):
        given = args[: len(args) - options]
        types = None
        if _explicit(jax.tree.leaves(given))[1]:
            types = tuple(map(_shardings, given))
        out, residuals = forward(*args)
        return out, (residuals, _Static(types))

    def place(gradient, types):
        if gradient is None:
            return None
        shardings, tree = types
        gradients = zip(tree.flatten_up_to(gradient), shardings, strict=True)
        placed = [
            x if x is None else jax.sharding.reshard(x, sharding) for x, sharding in gradients
        ]
        return tree.unflatten(placed)

    def backward_by_types(*args):
        *options, (residuals, types), cotangents = args
        gradients = backward(*options, residuals, cotangents)
        if types.value is None:
            return gradients
        return tuple(map(place, gradients, types.value))

    function.defvjp(forward_and_types, backward_by_types)


def _shardings(arrays: Any) -> tuple[tuple[Any, ...], Any]:
    leaves, tree = jax.tree.flatten(arrays)
    return tuple(jax.typeof(x).sharding for x in leaves), tree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    value: object


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a function that `shardwise` wraps.

    letters: those of the operands and, if there are such, of the numbers of the value heads.
    sizes: the size of each axis letter.
    """

    function: Callable[..., Arrays]
    letters: tuple[str, ...]
    results: tuple[str, ...]
    sizes: Sizes

    def by_type(
        self, mesh: Any, names: Sequence[str], run: Callable[..., Arrays], arrays: Arrays
    ) -> Arrays:
        """Calls `run` in a shard_map over the explicit axes of a mesh, which have these names.

        Pallas refuses refs whose types carry shardings; shard_map's have none.
        """
        axes = {name: mesh.shape[name] for name in names}
        splits = [_split_by_type(x, names) for x in arrays]
        in_specs, out_specs = self._specs(axes, splits)
        by_shard = jax.shard_map(
            functools.partial(self._of_shards, run),
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(names),
            # JAX cannot see that what has no heads is the same for all of them.
            check_vma=len({frozenset(x for x in spec if x) for spec in out_specs}) == 1,
        )
        placed = (NamedSharding(mesh, spec) for spec in in_specs)
        return by_shard(*map(jax.sharding.reshard, arrays, placed))

    def by_partitioner(self, *arrays: jax.Array) -> Arrays:
        """Calls the function, and XLA's partitioner says what each device gets."""
        # Inside a shard_map over some of the mesh's axes the partitioner knows of the others alone.
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        automatic = [size for size, kind in kinds if kind != AxisType.Manual]
        # JAX 0.11 and 0.12 refuse to partition if these have one device each; all is whole then.
        whole = AxisType.Manual in mesh.axis_types and math.prod(automatic) == 1
        if whole or interpreting():  # the interpreter's ordered callbacks cannot be partitioned
            return self._of_shards(self.function, *arrays)

        def shardings(mesh, args):
            mesh = _factored(mesh, automatic, [x.sharding for x in args if x.sharding])
            splits = [_split(x.sharding, len(x.shape), mesh) for x in args]
            sides = self._specs(mesh.shape, splits)
            return mesh, *(tuple(NamedSharding(mesh, spec) for spec in side) for side in sides)

        def partition(mesh, args, _):
            mesh, inputs, outputs = shardings(mesh, args)
            shapes = (placed.shard_shape(x.shape) for x, placed in zip(args, inputs, strict=True))
            shards = [jax.ShapeDtypeStruct(n, x.dtype) for n, x in zip(shapes, args, strict=True)]
            shards = jax.eval_shape(functools.partial(self._of_shards, lambda *x: x), *shards)
            run = _lowered_once(self.function, shards, mesh.devices.flat[0])
            return mesh, functools.partial(self._of_shards, run), outputs, inputs

        # A plain function: custom_partitioning cannot read a partial's signature.
        partitioned = custom_partitioning(lambda *arrays: self._of_shards(self.function, *arrays))
        partitioned.def_partition(
            partition,
            infer_sharding_from_operands=lambda mesh, args, _: shardings(mesh, args)[2],
            # By itself JAX refuses a part of a mesh's axis, which Shardy may use.
            decode_shardings=False,
            **_rule(self.letters, self.results, self.sizes),
        )
        return partitioned(*arrays)

    def _specs(
        self, axes: Mapping[str, int], splits: Sequence[Split]
    ) -> tuple[tuple[PartitionSpec, ...], ...]:
        """The PartitionSpecs of operands and of results. See `_placement`."""
        _refuse_split_pools(self.letters, splits, axes)
        place = _placement(self.letters, splits, axes, self.sizes, self.results)
        return tuple(
            tuple(PartitionSpec(*(place.get(x) for x in axes.split())) for axes in arrays)
            for arrays in (self.letters, self.results)
        )

    def _of_shards(self, run: Callable[..., Arrays], *arrays: jax.Array) -> Arrays:
        """Calls `run` with one device's arrays, the key heads those of its value heads."""
        group = self.sizes[_grouped(self.sizes)] // self.sizes["H"]
        if not _shares_key_heads(self.sizes, self.results) or self.sizes["H"] == 1:
            return run(*arrays)
        *shards, numbers = arrays
        letters = [axes.split() for axes in self.letters[:-1]]
        if len(numbers) != group * _sizes(self.letters[:-1], shards)["H"]:
            # As many key heads as make equal groups of the device's value heads.
            wanted = numbers[:: math.gcd(group, len(numbers))] // group
            shards = [
                jnp.take(x, wanted, axis=axes.index("H"), mode="clip") if "H" in axes else x
                for x, axes in zip(shards, letters, strict=True)
            ]
        return run(*shards)


def for_each_row(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Weights [W, H, D] that the rows of x [B, T, H, ...] share: a copy for each, [B, W, H, D].

    The copies have x's sharding, so that they are computed shard by shard, as `shardwise` needs
    them; the transpose is the sum over rows, on all devices.
    """
    shape = (x.shape[0], *weights.shape)
    mesh, names = _explicit((x, weights))
    if not names:
        return jnp.broadcast_to(varying_as(weights, x), shape)
    batch, _, heads, *_ = _split_by_type(x, names)
    weights = jax.sharding.reshard(weights, NamedSharding(mesh, PartitionSpec(None, heads)))
    placed = NamedSharding(mesh, PartitionSpec(batch, None, heads))
    return lax.broadcast_in_dim(weights, shape, (1, 2, 3), out_sharding=placed)


def _lowered_once(
    function: Callable[..., Arrays], arrays: Sequence[jax.ShapeDtypeStruct], device: Any
) -> Callable[..., Any]:
    """The function, lowered but once for all partitioned calls with arrays of the same shapes.

    Without this, JAX lowers each call by itself, a second or more for each kernel of each layer of
    a model. `function` is identified by the function of which it is a partial and by its arguments.
    One with a closure is a new function each time, and is returned unchanged.
    """
    if getattr(function, "__closure__", None):
        return function
    partial = functools.partial(function)  # of what `function` is a partial of, if it is one
    shapes = tuple((x.shape, x.dtype) for x in arrays)
    options = tuple(partial.keywords.items())
    # With a mesh that the user has set it would be a program for that many devices.
    with jax.set_mesh(Mesh([device], ["one"])):
        return _lowered(partial.func, partial.args, options, shapes, device.platform).call


@functools.lru_cache(maxsize=1024)
def _lowered(
    function: Callable[..., Arrays],
    leading: tuple[Any, ...],
    options: tuple[tuple[str, Any], ...],
    shapes: tuple[tuple[Any, Any], ...],
    platform: str,
) -> export.Exported:
    arrays = (jax.ShapeDtypeStruct(*x) for x in shapes)
    run = functools.partial(function, *leading, **dict(options))
    platform = "cuda" if platform == "gpu" else platform
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in _TRITON_CALLS]
    return export.export(jax.jit(run), platforms=[platform], disabled_checks=checks)(*arrays)


def _refuse_split_pools(letters: Letters, splits: Sequence[Split], axes: Mapping[str, int]) -> None:
    """Raises NotImplementedError if several devices have a part of a pool's rows each."""
    for of_array, split in zip(letters, splits, strict=True):
        for letter, names in zip(of_array.split(), split, strict=True):
            if letter == "R" and math.prod(axes[name] for name in names) > 1:
                raise NotImplementedError(
                    "slots: the rows of the pool are split over devices, and a kernel reads those "
                    "of one device. Keep the rows whole and split heads; or call the step in "
                    "jax.shard_map, each device with slots of its own rows; or use "
                    'implementation="xla"'
                )


def _sizes(letters: Letters, arrays: Sequence[jax.Array]) -> Sizes:
    """The size of each axis letter."""
    return _sizes_of_shapes(letters, [x.shape for x in arrays])


def _sizes_of_shapes(letters: Letters, shapes: Sequence[tuple[int, ...]]) -> Sizes:
    sizes: Sizes = {}
    for axes, shape in zip(letters, shapes, strict=True):
        sizes |= dict(zip(axes.split(), shape, strict=True))
    return sizes


def _grouped(sizes: Sizes) -> str:
    """The letter of the heads that come in groups; `H` if none do."""
    return next((x for x in ("HV", "HQ") if x in sizes), "H")


def _shares_key_heads(sizes: Sizes, results: Letters) -> bool:
    """Whether several devices may have the same key head.

    Only if no result has key heads: it would be a sum over these devices, or the same on all.
    """
    grouped = _grouped(sizes)
    return sizes[grouped] > sizes["H"] and not any("H" in axes.split() for axes in results)


def _placement(
    letters: Letters,
    splits: Sequence[Split],
    axes: Mapping[str, int],
    sizes: Sizes,
    results: Letters,
) -> dict[str, tuple[str, ...]]:
    """The mesh's axes over which each axis letter is split.

    They are those of the first array that is split, arrays with all heads first, as far as they
    divide the axis into equal parts.

    Args:
      letters: each operand's axis letters. splits: each operand's mesh axes, by dimension.
      axes: the size of each axis of the mesh. sizes: the size of each axis letter.
      results: the results' axis letters.
    """
    grouped = _grouped(sizes)
    found: dict[str, tuple[str, ...]] = {"B": (), "heads": ()}
    # Of a pool any row may be needed.
    most = {"B": 1 if "R" in sizes else sizes["B"], "heads": sizes["H"]}
    if _shares_key_heads(sizes, results):
        most["heads"] = sizes[grouped]
    arrays = [(x.split(), split) for x, split in zip(letters, splits, strict=True)]
    for dimensions, split in sorted(arrays, key=lambda array: grouped not in array[0]):
        for letter, names in zip(dimensions, split, strict=True):
            part = "heads" if letter in ("H", grouped) else letter
            if found.get(part) == ():
                taken = (*found["B"], *found["heads"])
                free = [name for name in names if name not in taken]
                found[part] = _dividing(free, axes, most[part])
    heads = found["heads"]
    keys = heads if heads == _dividing(heads, axes, sizes["H"]) else ()
    return {"H": keys, grouped: heads, "B": found["B"]}


def _dividing(names: Sequence[str], axes: Mapping[str, int], size: int) -> tuple[str, ...]:
    """As many of these mesh axes, from the first on, as cut `size` into equal parts."""
    parts = np.cumprod([axes[name] for name in names], dtype=int)
    return tuple(name for name, n in zip(names, parts, strict=True) if size % n == 0)


def _explicit(arrays: Iterable[jax.Array]) -> tuple[Any, list[str]]:
    """The mesh over which types of the arrays are sharded and the names of its axes that do so."""
    for x in arrays:
        mesh = jax.typeof(x).sharding.mesh
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        if names := [name for name, kind in kinds if kind == AxisType.Explicit]:
            return mesh, names
    return None, []


def _split_by_type(x: jax.Array, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The names of the mesh axes over which each dimension of x is split."""
    spec: Any = jax.typeof(x).sharding.spec
    spec = [x if isinstance(x, tuple) else (x,) for x in (*spec, *(None,) * (x.ndim - len(spec)))]
    return [tuple(name for name in part if name in names) for part in spec]


def _factored(mesh: Any, automatic: Sequence[int], shardings: Sequence[Any]) -> Mesh:
    """A mesh of axes of prime size, in which parts of the mesh's axes are axes.

    Args:
      mesh: the partitioner's; empty where that does not know it.
      automatic: the sizes of the axes that shard_map left to the partitioner.
      shardings: those of operands.
    """
    devices, sizes = mesh.devices.flat, mesh.axis_sizes
    if mesh.empty:
        devices = sorted(shardings[0].device_set, key=lambda device: device.id)
        sizes = automatic or [len(devices)]
    factors = [prime for size in sizes for prime in _primes(size)]
    # Shardings tell devices apart by their place alone.
    devices = np.array(list(devices)[: math.prod(factors)])
    return Mesh(devices.reshape(factors), [str(i) for i in range(len(factors))])


def _primes(n: int) -> list[int]:
    primes: list[int] = []
    while n > 1:
        primes.append(next(p for p in range(2, n + 1) if n % p == 0))
        n //= primes[-1]
    return primes


def _split(sharding: Any, ndim: int, mesh: Mesh) -> Split:
    """The names of the factored mesh's axes over which each dimension is split."""
    if sharding is None:
        return [()] * ndim
    sizes = mesh.axis_sizes
    # Of another shape than the array's: JAX refuses one that is cut into unequal parts.
    shape = (math.prod(sizes),) * ndim
    if shape[0] != sharding.num_devices:
        return _split_in_order(sharding, shape, mesh)
    parts = sharding.devices_indices_map(shape).values()
    starts = np.array([[part.start or 0 for part in parts] for parts in parts])
    starts = starts.reshape(*sizes, ndim)
    steps = [starts.take(1, axis).ravel()[:ndim] for axis in range(len(sizes))]
    split = []
    for dimension in range(ndim):
        axes = sorted(range(len(sizes)), key=lambda axis: -steps[axis][dimension])
        axes = [axis for axis in axes if steps[axis][dimension]]
        split.append(tuple(mesh.axis_names[axis] for axis in axes))
    return split


def _split_in_order(sharding: Any, shape: tuple[int, ...], mesh: Mesh) -> Split:
    """What `_split` returns, guessed where devices are those of a part of the mesh.

    JAX says into how many parts each dimension is cut, but not over which axes: they are taken in
    order. Where the order is another, arrays are moved.
    """
    axes, split = dict(mesh.shape), []
    for size, part in zip(shape, sharding.shard_shape(shape), strict=True):
        parts, names = size // part, []
        for name in list(axes):
            if parts % axes[name] == 0:
                parts //= axes.pop(name)
                names.append(name)
        split.append(tuple(names))
    return split


def _rule(letters: Letters, results: Letters, sizes: Sizes) -> dict[str, Any]:
    """Shardy's rule: batch and heads are split everywhere, all else stays whole.

    With a pool the batch stays whole; if its rows are split, that is refused, and not gathered.
    """
    grouped = _grouped(sizes)
    # Not `(h group)` for all heads: what divides them need not divide key heads.
    of_groups = "h" if sizes[grouped] == sizes["H"] else "groups"
    names: dict[str, str] = {"B": "b", "H": "h", grouped: of_groups}

    def name(letter: str) -> str:
        return names.get(letter, letter.lower())

    def side(arrays: Letters) -> str:
        return ", ".join(" ".join(map(name, axes.split())) for axes in arrays)

    rule = f"{side(letters)} -> {side(results)}"
    # Shardy wants the factors in the order in which they first appear.
    factors = dict.fromkeys(re.findall(r"\w+", rule))
    rows = "r" if "R" in sizes else "b"
    whole = tuple(x for x in factors if x not in (rows, "h", "groups"))
    return dict(sharding_rule=rule, need_replication_factors=whole)
