"""Several devices: the mesh, and what lies where on it.

data    splits the batch, and with it what is kept of the parameters and of Adam's moments
seq     splits time
model   splits heads, and the inside of MLPs
"""

import argparse
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import InputError
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import is_first

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
    if options.mixer == "attention" and sizes.get("seq", 1) > 1:
        raise InputError("--mixer attention cannot be split over time; use seq=1 in --mesh")
    return make_mesh(sizes, devices)


def shown(sizes):
    return ",".join(f"{name}={size}" for name, size in sizes.items())


# Where heads, or what is inside of an MLP, are not the second axis of a kernel.
FIRST = ("o_proj", "out", "down")
OF_EXPERTS = {"gate": 2, "up": 2, "down": 1}


def placed(mesh, path, shape):
    """The sharding of a parameter, for `jla.hub.load` too.

    Heads, the inside of MLPs and the vocabulary are split over "model", another axis over "data",
    where their sizes allow it; vectors and the router are on all devices.
    """
    parts = path.split("/")
    behind = int(parts[0] == "blocks")  # of the axis of blocks
    spec = [None] * len(shape)
    if len(shape) < 2 + behind or "router" in parts:
        return NamedSharding(mesh, PartitionSpec())
    if parts[-1] in OF_EXPERTS:
        axis = OF_EXPERTS[parts[-1]]
    else:
        axis = 0 if parts[-1] == "embedding" or parts[-2] in FIRST else 1
    axis += behind
    if shape[axis] % mesh.shape["model"] == 0:
        spec[axis] = "model"
    others = [i for i in range(behind, len(shape)) if i != axis]
    largest = max(others, key=lambda i: shape[i])
    if shape[largest] % mesh.shape["data"] == 0:
        spec[largest] = "data"
    return NamedSharding(mesh, PartitionSpec(*spec))


def param_shardings(params, mesh):
    """The shardings of a tree of parameters."""

    def of(path, x):
        return placed(mesh, joined(path), x.shape)

    return jax.tree_util.tree_map_with_path(of, params)


def state_shardings(state, optimizer, mesh, *, whole=False):
    """Where a state lies: moments as their parameters, a step's number on all devices.

    `whole` has all of it on all devices.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(state["params"], mesh)
    if whole:
        params = jax.tree.map(lambda _: everywhere, params)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state["moments"],
        params,
        transform_non_params=lambda _: everywhere,
    )
    return {"params": params, "moments": moments}


def joined(path):
    """A path of jax.tree_util as "blocks/mixer/o_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class Gather:
    """Makes whole the parameters that are split over "data": those at `axes`' paths.

    Its transpose sums the devices' gradients, and leaves each device the part that it keeps.
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
            return x if axis is None else jax.lax.all_gather(x, "data", axis=axis, tiled=True)

        return jax.tree_util.tree_map_with_path(whole, params)


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
        self.shardings = state_shardings(state, optimizer, mesh, whole=whole)
        manual = ("data", "seq")
        specs = jax.tree.map(
            lambda x: PartitionSpec(*(name if name in manual else None for name in x.spec)),
            self.shardings["params"],
        )
        blocks = {"params": specs["blocks"]}
        model = model.clone(gather=Gather.of(blocks, behind=1))
        others = Gather.of({name: specs[name] for name in specs if name != "blocks"})
        tokens = PartitionSpec(*manual)

        def of_device(params, inputs, targets):
            return nats(model, others(params), inputs, targets)

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
        everywhere = NamedSharding(mesh, PartitionSpec())
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
