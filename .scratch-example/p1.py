import re, pathlib
p = pathlib.Path("examples/devices.py"); s = p.read_text()
a = s.index("# Where heads, or what is inside of an MLP"); b = s.index("@dataclasses.dataclass(frozen=True)\nclass Gather")
new = '''# What lies where, by the names of `jla.linen.logical_axes`: FSDP, then tensor parallelism. An axis
# whose name is not here is whole on all devices.
RULES = {"embed": "data", "heads": "model", "key_heads": "model", "mlp": "model", "vocab": "model"}


def shardings_of(tree, mesh):
    """The shardings of parameters, or of a state with moments, which lie as their parameters.

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
                    f"{joined(path)} has {name} = {size}, which must be a multiple of the "
                    f"{mesh.shape[axis]} devices of {axis} in --mesh"
                )
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(of, tree, jla.linen.logical_axes(tree))


def joined(path):
    """A path of jax.tree_util as "blocks/mixer/o_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


'''
s = s[:a] + new + s[b:]
s = s.replace('''        self.shardings = state_shardings(state, optimizer, mesh, whole=whole)
''', '''        everywhere = NamedSharding(mesh, PartitionSpec())
        if whole:
            self.shardings = jax.tree.map(lambda _: everywhere, state)
        else:
            self.shardings = shardings_of(state, mesh)
''')
s = s.replace('''        # The new state lies as the old one: else XLA chooses, and the second step is compiled anew.
        everywhere = NamedSharding(mesh, PartitionSpec())
        out =''', '''        # The new state lies as the old one: else XLA chooses, and the second step is compiled anew.
        out =''')
s = s.replace("import numpy as np\nimport optax\nfrom command_line", "import numpy as np\nfrom command_line")
s = s.replace("from processes import is_first\n", "from processes import is_first\n\nimport jla.linen\n")
p.write_text(s)

p = pathlib.Path("examples/train_lm.py"); s = p.read_text()
s = s.replace('''    spread = devices.Spread(mesh, local, optimizer, shapes, nats, advance)
    # Before anything is deleted: what the mechanism cannot do on such a mesh.
    windows = np.zeros((options.batch, options.length + 1), np.int32)
    try:
        jax.eval_shape(spread.step, shapes, *spread.inputs_and_targets(windows))
    except (ValueError, NotImplementedError) as error:
''', '''    # Before anything is deleted: what parameters and the mechanism do not allow on such a mesh.
    windows = np.zeros((options.batch, options.length + 1), np.int32)
    try:
        spread = devices.Spread(mesh, local, optimizer, shapes, nats, advance)
        jax.eval_shape(spread.step, shapes, *spread.inputs_and_targets(windows))
    except (InputError, ValueError, NotImplementedError) as error:
''')
p.write_text(s)

p = pathlib.Path("examples/from_checkpoint.py"); s = p.read_text()
s = s.replace("from devices import mesh_sizes, placed\n", "from devices import mesh_sizes, shardings_of\n")
s = s.replace('''    mesh = make_mesh(options.mesh, options.batch)
    with writing(out):
''', '''    mesh = make_mesh(options.mesh, options.batch)
    # Equal layers are compiled once; a GPU is faster without the copies of a loop's stacks.
    layers = model.config.layers
    equal = all(layer == layers[0] for layer in layers)
    unroll = jax.default_backend() == "gpu"
    model = model.clone(stacked=equal, unroll=equal and unroll, remat=kept)
    shardings = shardings_of(shapes_of(model), mesh)
    with writing(out):
''')
s = s.replace('''        # Equal layers are compiled once; a GPU is faster without the copies of a loop's stacks.
        layers = model.config.layers
        equal = all(layer == layers[0] for layer in layers)
        unroll = jax.default_backend() == "gpu"
        model = model.clone(stacked=equal, unroll=equal and unroll, remat=kept)
        params = jla.hub.load(options.checkpoint, model, sharding=functools.partial(placed, mesh))
''', '''        params = jla.hub.load(options.checkpoint, model, sharding=shardings)
''')
s = s.replace('''    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    console.print(f"{config''', '''    console.print(f"{config''')
s = s.replace("    for line in described(model, shapes):", "    for line in described(model, shapes_of(model)):")
s = s.replace('''def described(model, shapes):
''', '''def shapes_of(model):
    """The shapes of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def described(model, shapes):
''')
p.write_text(s)
