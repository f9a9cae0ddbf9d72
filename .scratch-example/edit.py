import re, pathlib
# ---- the model's hook
p = pathlib.Path("jla/models/language_model.py"); s = p.read_text()
s = s.replace("""        such as `jla.models.kept`; None keeps all.
    \"\"\"
""", """        such as `jla.models.kept`; None keeps all.
      gather: makes a block's parameters (a dict with "params") whole where it runs, and again in
        its backward pass if there is `remat`; None for parameters that are whole. Inside
        `jax.shard_map`, with parameters split over devices; examples/devices.py has one.
    \"\"\"
""")
s = s.replace("""    remat: Callable[..., bool] | None = None

    @nn.compact""", """    remat: Callable[..., bool] | None = None
    gather: Callable[[Any], Any] | None = None

    @nn.compact""")
s = s.replace("""        block = Block
        if self.remat""", """        block = Block
        if self.gather is not None and not self.is_initializing():
            block = nn.map_variables(block, "params", trans_in_fn=self.gather)
        if self.remat""")
p.write_text(s)
# ---- examples' model
p = pathlib.Path("examples/model.py"); s = p.read_text()
s = s.replace("vocabulary=VOCABULARY, **settings):", "vocabulary=VOCABULARY, axis_name=None, **settings\n):")
s = s.replace("def make_model(mixer, width, depth, heads, *, longest=2**14, vocab", "def make_model(\n    mixer, width, depth, heads, *, longest=2**14, vocab")
s = s.replace("""      settings: fields""", """      axis_name: inside `jax.shard_map`, the axis of the mesh that splits time; None for none.
      settings: fields""")
s = s.replace("""    template = MIXERS[mixer](longest, num_heads=heads, key_dim=width // heads)
""", """    sizes = dict(num_heads=heads, key_dim=width // heads)
    if axis_name is not None:
        sizes["axis_name"] = axis_name
    template = MIXERS[mixer](longest, **sizes)
""")
p.write_text(s)
# ---- train_lm
p = pathlib.Path("examples/train_lm.py"); s = p.read_text()
s = s.replace('''def cross_entropy(model, params, tokens):
    """Returns the nats of every byte but the first, [B, T], of windows int32 [B, T + 1]."""
    logits = model.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


''', '''def cross_entropy(model, params, tokens):
    """Returns the nats of every byte but the first, [B, T], of windows int32 [B, T + 1]."""
    return nats(model, params, tokens[:, :-1], tokens[:, 1:])


def nats(model, params, inputs, targets):
    """Returns those of targets int32 [B, T], each the byte behind its input."""
    logits = model.apply({"params": params}, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def advance(state, loss_of, optimizer):
    """One step down a loss of the parameters; returns as `train_step`."""
    params, moments = state["params"], state["moments"]
    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, moments = optimizer.update(gradient, moments, params)
    state = {"params": optax.apply_updates(params, updates), "moments": moments}
    return state, loss, optax.tree.norm(gradient)


''')
s = s.replace('''    params, moments = state["params"], state["moments"]
    loss, gradient = jax.value_and_grad(lambda p: cross_entropy(model, p, tokens).mean())(params)
    updates, moments = optimizer.update(gradient, moments, params)
    state = {"params": optax.apply_updates(params, updates), "moments": moments}
    return state, loss, optax.tree.norm(gradient)


@functools.partial(jax.jit, static_argnames="model")
def forward''', '''    return advance(state, lambda p: cross_entropy(model, p, tokens).mean(), optimizer)


@functools.partial(jax.jit, static_argnames="model")
def forward''')
s = s.replace('''def evaluate(model, params, text, *, batch, length):
    """Returns the bits per byte of a text cut into windows; each begins with an empty context."""
''', '''def evaluate(model, params, text, *, batch, length, spread=None):
    """Returns the bits per byte of a text cut into windows; each begins with an empty context."""
''')
s = s.replace('''        logits = forward(params, group[:, :-1], model=model)
        nats.append(optax.softmax_cross_entropy_with_integer_labels(logits, group[:, 1:]))
    return float(np.concatenate(nats)[''', '''        if spread is not None:
            scores.append(spread.scores(params, group))
            continue
        logits = forward(params, group[:, :-1], model=model)
        scores.append(optax.softmax_cross_entropy_with_integer_labels(logits, group[:, 1:]))
    return float(np.concatenate(scores)[''').replace("    nats = []\n    for group", "    scores = []\n    for group")
# options
s = s.replace('''    add("--sample-length", type=whole, default=400, metavar="BYTES")
''', '''    add("--sample-length", type=whole, default=400, metavar="BYTES")
    add("--mesh", type=devices.mesh_sizes(), help="several devices, as data=2,seq=2,model=1")
    processes.add_options(parser)
''')
s = s.replace('''    return None


LAST = 0''', '''    return processes.find_conflict(options)


LAST = 0''')
s = s.replace("import checkpoint\nimport jax\n", "import checkpoint\nimport devices\nimport jax\n")
s = s.replace("import optax\nfrom command_line", "import optax\nimport processes\nfrom command_line")
# train
s = s.replace('''def train(model, optimizer, rate, state, first_step, options, data, metrics, save, console):
    """Runs the steps after `first_step`; returns the final state.
''', '''def train(
    model, optimizer, rate, state, first_step, options, data, metrics, save, console, spread=None
):
    """Runs the steps after `first_step`, on the mesh of `spread` if there is one; returns the final
    state.
''')
s = s.replace('''            state, loss, norm = train_step(state, tokens, model=model, optimizer=optimizer)
            pending''', '''            if spread is None:
                state, loss, norm = train_step(state, tokens, model=model, optimizer=optimizer)
            else:
                state, loss, norm = spread.train_step(state, tokens)
            pending''')
s = s.replace('''            stopping = bool(signals)  # one that comes later is for the next step
            saving = step % options.save_every == 0 or step == options.steps or stopping

            # Reading a loss waits for the device, so it is done for several steps at once.
            if step == first_step + 1 or step % 10 == 0 or evaluating or saving:
                losses = jax.device_get(pending)
''', '''            saving = step % options.save_every == 0 or step == options.steps
            # Reading a loss waits for the device, so it is done for several steps at once.
            reading = step == first_step + 1 or step % 10 == 0 or evaluating or saving
            # A signal that comes later is for the next step.
            stopping = processes.stop_signal(signals, asking=reading)
            if stopping:
                reading = saving = True
            if reading:
                losses = jax.device_get(pending)
''')
s = s.replace('''                        raise InputError(f"the loss of step {past} is {loss}; try a lower --lr")
''', '''                        processes.fail(f"the loss of step {past} is {loss}; try a lower --lr")
''')
s = s.replace('''held_out, **windowed)
                metrics.write(step=step, held''', '''held_out, spread=spread, **windowed)
                metrics.write(step=step, held''')
s = s.replace("raise Stopped(step, signals[0])", "raise Stopped(step, stopping)")
# metrics in the first process alone
s = s.replace('''        self.path, self.lines = path, []
        if not first_step''', '''        self.path, self.lines = path, []
        if not processes.is_first():
            return
        if not first_step''')
s = s.replace('''        self.lines.append(line)
        with writing(self.path)''', '''        if not processes.is_first():
            return
        self.lines.append(line)
        with writing(self.path)''')
# run
s = s.replace('''    out = pathlib.Path(options.out)
    if options.resume is None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    elif not out.is_dir():
        raise InputError(f"--resume: there is no folder {out}")
    with locked(out):
        first_step, saved = open_run(options, out)
''', '''    out = pathlib.Path(options.out)
    with contextlib.ExitStack() as stack:
        with processes.agreed():
            if processes.is_first():
                if options.resume is None:
                    with writing(out):
                        out.mkdir(parents=True, exist_ok=True)
                elif not out.is_dir():
                    raise InputError(f"--resume: there is no folder {out}")
                stack.enter_context(locked(out))
        with processes.agreed():
            if not out.is_dir():
                raise InputError(f"there is no folder {out}; all processes need the same files")
            first_step, saved = open_run(options, out)
''')
s = s.replace('''    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        text = load_text(options.text)
        data = split_text(text, options.length)
    except ValueError as error:
        raise InputError(error) from None
    settings = describe(options, text)
    changed = check_settings(saved, settings, first_step) if first_step else []
''', '''    quiet = not processes.is_first()
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)
    with processes.agreed():
        mesh = devices.chosen_mesh(options)
        try:
            text = load_text(options.text)
            data = split_text(text, options.length)
        except ValueError as error:
            raise InputError(error) from None
        settings = describe(options, text)
        changed = check_settings(saved, settings, first_step) if first_step else []
    processes.check_same(json.dumps(settings | dict(mesh=options.mesh)))
''')
s = s.replace('''    state = initialise(model, optimizer, options.seed)
    size = sum(''', '''    spread = None
    if mesh is None:
        state = initialise(model, optimizer, options.seed)
    else:
        spread, state = spread_over(mesh, model, optimizer, options, settings["model"])
    size = sum(''')
s = s.replace('''    console.print(
        f"{options.mixer} model, {size:,} parameters, on {jax.devices()[0].device_kind}; "
''', '''    on = "" if mesh is None else f", mesh {devices.shown(mesh.shape)}"
    console.print(
        f"{options.mixer} model, {size:,} parameters, on {jax.devices()[0].device_kind}{on}; "
''')
s = s.replace('''    metrics = Metrics(out / "metrics.jsonl", first_step)
    checkpoint.delete_after(out, first_step)
    manager''', '''    with processes.agreed():
        metrics = Metrics(out / "metrics.jsonl", first_step)
        if processes.is_first():
            checkpoint.delete_after(out, first_step)
    manager''')
s = s.replace('''    state = train(model, optimizer, rate, state, first_step, options, data, metrics, save, console)
    report(model, state["params"], options, data, metrics, console)
''', '''    parts = options, data, metrics
    state = train(model, optimizer, rate, state, first_step, *parts, save, console, spread)
    report(model, state["params"], *parts, console, spread)


def spread_over(mesh, model, optimizer, options, settings):
    """The step and the scores on a mesh, and the state before the first step, spread over it."""
    shapes = jax.eval_shape(lambda: initialise(model, optimizer, options.seed))
    time = "seq" if mesh.shape["seq"] > 1 else None
    implementation, unroll = model.implementation, model.unroll
    local = make_model(**settings, implementation=implementation, unroll=unroll, axis_name=time)
    spread = devices.Spread(mesh, local, optimizer, shapes, nats, advance)
    # Before anything is deleted: what the mechanism cannot do on such a mesh.
    windows = np.zeros((options.batch, options.length + 1), np.int32)
    try:
        jax.eval_shape(spread.step, shapes, *spread.inputs_and_targets(windows))
    except (ValueError, NotImplementedError) as error:
        processes.fail(f"cannot train this model on the mesh: {error}", error)
    start = jax.jit(lambda: initialise(model, optimizer, options.seed))
    return spread, devices.place(start(), spread.shardings)
''')
s = s.replace('''def report(model, params, options, data, metrics, console):
    """Compares''', '''def report(model, params, options, data, metrics, console, spread=None):
    """Compares''')
s = s.replace('''    baselines = ngram_baselines(text, scored)
    bits = evaluate(model, params, held_out, batch=options.batch, length=options.length)
''', '''    windowed = dict(batch=options.batch, length=options.length)
    bits = evaluate(model, params, held_out, spread=spread, **windowed)
    if spread is not None:
        params = devices.on_one_device(params)
    if not processes.is_first():
        return
    baselines = ngram_baselines(text, scored)
''')
s = s.replace('''        try:
            run(options)
        except Stopped as stopped:
            step, number = stopped.args
            instead''', '''        try:
            processes.start(options)
            run(options)
        except Stopped as stopped:
            step, number = stopped.args
            if not processes.is_first():
                sys.exit(128 + number)
            instead''')
s = s.replace("import argparse\nimport functools", "import argparse\nimport contextlib\nimport functools")
p.write_text(s)
# ---- checkpoint: several processes
p = pathlib.Path("examples/checkpoint.py"); s = p.read_text()
s = s.replace('''        (path / CHECKSUMS).write_text(json.dumps(_checksums(path)))
    except BaseException as error:
        _remove_unfinished(path)
''', '''        if is_first():
            (path / CHECKSUMS).write_text(json.dumps(_checksums(path)))
    except BaseException as error:
        if is_first():
            _remove_unfinished(path)
''')
s = s.replace("from command_line import InputError, writing\n", "from command_line import InputError, writing\nfrom processes import is_first\n")
s = s.replace('''    To write, one process alone: the folder''', '''    To write, those of one run alone, all of them: the folder''')
p.write_text(s)
# ---- devices
p = pathlib.Path("examples/devices.py"); s = p.read_text()
i, j = s.index("def in_force"), s.index("def inputs_and_targets")
s = s[:i] + s[j:]
i, j = s.index("def inputs_and_targets"), s.index("def on_one_device")
s = s[:i] + '''# Where heads, or what is inside of an MLP, are not the second axis of a kernel.
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
        return placed(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), x.shape)

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
        names = ((jax.tree_util.keystr(path, simple=True, separator="/"), s) for path, s in leaves)
        return cls(tuple((name, list(s).index("data") - behind) for name, s in names if "data" in s))

    def __call__(self, params):
        axes = dict(self.axes)

        def whole(path, x):
            axis = axes.get(jax.tree_util.keystr(path, simple=True, separator="/"))
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


''' + s[s.index("def on_one_device"):s.index("def read(x)")].rstrip() + "\n"
i, j = s.index("# What a layer's mesh_axes"), s.index("def mesh_sizes")
s = s[:i].rstrip() + "\n\n\n" + s[j:]
s = s.replace("import argparse\nimport contextlib\nimport math\n", "import argparse\nimport dataclasses\nimport math\n")
s = s.replace("from flax import linen as nn\n", "").replace("\n\nimport jla.linen\n", "\n")
s = s.replace("heads=\"model\", width=\"data\")\n    what = dict(width=\", over which parameters are split\")\n", "heads=\"model\")\n").replace("{what.get(option, '')}", "").replace('''multiple of the {parts} devices of {axis} in the mesh"
                f" {shown(sizes)}"''','''multiple of the {parts} devices of {axis} in "
                f"--mesh {shown(sizes)}"''')
p.write_text(s)
