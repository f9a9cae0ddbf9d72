"""Several devices: the mesh, and what lies where on it.

data    splits the batch, and with it what is kept of the parameters and of Adam's moments
seq     splits time
model   splits heads, and the inside of MLPs
"""

import argparse
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from command_line import InputError
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import is_first

import jla.linen

AXES = ("data", "seq", "model")


def mesh_sizes(axes=AXES):
    """Returns an argparse type: "data=2,model=1" as a dict, of some of these axes."""

    def convert(string):
        parts = [part.partition("=") for part in string.split(",")]
        sizes = {name: int(size) for name, _, size in parts if size.isdecimal()}
        if len(sizes) < len(parts) or not set(sizes) <= set(axes) or 0 in sizes.values():
            example = ",".join(f"{name}={2 if name == axes[0] else 1}" for name in axes)
            raise argparse.ArgumentTypeError(f"must be like {example}, got {string!r}")
        return sizes

    return convert


def make_mesh(sizes, devices):
    """A mesh of the first devices, with all AXES; those that are not given have one device."""
    shape = [sizes.get(name, 1) for name in AXES]
    used = devices[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=used)


def chosen_mesh(options):
    """The mesh of --mesh; by default one device, and all are "data" with several processes.

    Returns None for a single device, on which nothing is to be placed.

    Raises:
      InputError: there are more devices, or fewer; a size that the mesh does not divide.
    """
    devices, sizes = jax.devices(), options.mesh
    if sizes is None:
        sizes = {"data": len(devices) if jax.process_count() > 1 else 1}
    elif (count := math.prod(sizes.values())) != len(devices):
        raise InputError(
            f"--mesh {shown(sizes)} needs {count} devices, but there are {len(devices)}; the sizes "
            "multiplied must be that (CUDA_VISIBLE_DEVICES can leave some of a host's GPUs out)"
        )
    if set(sizes.values()) == {1}:
        return None
    divided = dict(batch="data", length="seq", heads="model")
    for option, axis in divided.items():
        size, parts = getattr(options, option), sizes.get(axis, 1)
        if size % parts:
            raise InputError(
                f"--{option} {size} must be a multiple of the {parts} devices of {axis} in "
                f"--mesh {shown(sizes)}"
            )
    return make_mesh(sizes, devices)


def shown(sizes):
    return ",".join(f"{name}={size}" for name, size in sizes.items())


# What lies where, by the names of `jla.linen.logical_axes`: FSDP, then tensor parallelism. An axis
# whose name is not here is whole on all devices.
RULES = {"embed": "data", "heads": "model", "key_heads": "model", "mlp": "model", "vocab": "model"}


def shardings_of(tree, mesh):
    """The shardings of parameters, or of their moments, which lie as they do.

    One key head for all heads is on all devices.

    Raises:
      InputError: an axis is no multiple of the devices that split it.
    """

    def of(path, x, names):
        spec = []
        for size, name in zip(x.shape, names, strict=True):
            axis = None if (name, size) == ("key_heads", 1) else RULES.get(name)
            if axis and size % mesh.shape[axis]:
                raise InputError(
                    f"parameter {joined(path)} has {name} = {size}, which must be a multiple of "
                    f"the {mesh.shape[axis]} devices of {axis} in --mesh"
                )
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(of, tree, jla.linen.logical_axes(tree))


def joined(path):
    """A path of jax.tree_util as "blocks/mixer/o_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class Gather:
    """Makes whole the parameters that are split over "data": those at `axes`' paths.

    Its transpose sums the devices' gradients, and leaves each device the part that it keeps. They
    are summed in float32, whatever they are: 16 bits would round at every addition.
    """

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, specs, *, behind=0):
        """For a tree of PartitionSpecs; `behind` axes in front are gone where it is called."""
        leaves = jax.tree_util.tree_leaves_with_path(specs)
        axes = (
            (path, list(spec).index("data") - behind) for path, spec in leaves if "data" in spec
        )
        return cls(tuple((joined(path), axis) for path, axis in axes))

    def __call__(self, params):
        axes = dict(self.axes)

        def whole(path, x):
            axis = axes.get(joined(path))
            return x if axis is None else gathered(x, axis)

        return jax.tree_util.tree_map_with_path(whole, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x, axis):
    return jax.lax.all_gather(x, "data", axis=axis, tiled=True)


def _gathered_backward(axis, _, gradient):
    part = jax.lax.psum_scatter(
        gradient.astype(jnp.float32), "data", scatter_dimension=axis, tiled=True
    )
    return (part.astype(gradient.dtype),)


gathered.defvjp(lambda x, axis: (gathered(x, axis), None), _gathered_backward)


def own(params, axes):
    """Parameters as each device's own along these manual axes, and its gradients as well.

    The sum of the devices' gradients is the transpose. It is taken here, of the parameters as they
    are kept, and not where they have been cast: of 16 bits it would be rounded at every addition,
    and XLA's CPU aborts on it (JAX 0.11 and 0.12).
    """

    def vary(x):
        missing = tuple(set(axes) - set(jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, params)


class Spread:
    """Training and scoring on a mesh. The state is a tree of arrays that lie as `shardings` say.

    The model runs in a shard_map over rows and time, and gathers what is split over "data" block by
    block; heads are left to XLA's partitioner.

    Args:
      model: whose mixers have `axis_name="seq"` if the mesh splits time.
      state: a state's shapes.
      nats: `nats(model, params, inputs, targets)`, the loss of each target.
      advance: `advance(state, loss_of, optimizer)`, one step.
      whole: whether every device keeps the whole state, for comparison.
    """

    def __init__(self, mesh, model, optimizer, state, nats, advance, *, whole=False):
        self.mesh = mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
        if whole:
            self.shardings = jax.tree.map(lambda _: everywhere, state)
        else:
            # Parameters first: these are named, not their moments, if they do not fit.
            self.shardings = {x: shardings_of(state[x], mesh) for x in ("params", "moments")}
        # XLA's partitioner refuses sums over manual axes that have one device (JAX 0.12).
        manual = tuple(name for name in ("data", "seq") if mesh.shape[name] > 1)
        specs = jax.tree.map(
            lambda x: PartitionSpec(*(name if name in manual else None for name in x.spec)),
            self.shardings["params"],
        )
        blocks = {"params": specs["blocks"]}
        model = model.clone(gather=Gather.of(blocks, behind=1))
        others = Gather.of({name: specs[name] for name in specs if name != "blocks"})
        tokens = PartitionSpec(*(x if x in manual else None for x in ("data", "seq")))

        def of_device(params, inputs, targets):
            params = own(params, manual)
            return nats(model, others(params), inputs, targets)

        self.nats = of_device
        if manual:
            self.nats = jax.shard_map(
                of_device,
                mesh=mesh,
                in_specs=(specs, tokens, tokens),
                out_specs=tokens,
                axis_names=set(manual),
            )

        def step(state, inputs, targets):
            return advance(state, lambda p: self.nats(p, inputs, targets).mean(), optimizer)

        # The new state lies as the old one: else XLA chooses, and the second step is compiled anew.
        out = (self.shardings, everywhere, everywhere)
        self.step = jax.jit(step, donate_argnums=0, out_shardings=out)
        self.score = jax.jit(self.nats, out_shardings=everywhere)

    def inputs_and_targets(self, windows):
        """Windows int32 [B, T + 1] as two arrays [B, T] on the mesh.

        The target of the last token on a device is the first token of its neighbour. So targets are
        shifted here, before anything is split.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec("data", "seq"))

        def placed(x):
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return placed(windows[:, :-1]), placed(windows[:, 1:])

    def train_step(self, state, windows):
        """As train_lm.py's."""
        return self.step(state, *self.inputs_and_targets(windows))

    def scores(self, params, windows):
        """The nats of each byte but the first, [B, T], in each process."""
        return np.asarray(self.score(params, *self.inputs_and_targets(windows)))


def place(tree, shardings):
    """Puts a tree, which each process has, on the mesh."""

    def put(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def on_one_device(tree):
    """A tree of arrays of the mesh on one device of the first process; None in the others."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
        return jax.tree.map(jnp.asarray, tree) if is_first() else None
    return jax.device_put(tree, jax.devices()[0])
