"""Layers of whole arrays under jit: parameters, rows, time and heads split over a mesh.

What devices tell each other is read from the compiled programs.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import equations, gradients_are_wide
from evaluator import evaluated
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layers import LAYERS, D, each_layer, entry, layer, normal, parameters, trees_close

import jla.pallas
from jla.linen import RMSNorm, logical_axes
from jla.linen._normalize import GatedRMSNorm
from jla.linen._projections import by_heads, copies, dense
from jla.linen._short_convolution import ShortConvolution
from jla.models import Config, LanguageModel, Layer, SwiGLU, kept

B, T, H, V = 2, 40, 4, 16
AXES = dict(B="data", T="seq", H="model")
SPLIT = {letter: (name,) for letter, name in AXES.items()}
# FSDP, and tensor parallelism.
RULES = [("embed", "data"), ("heads", "model"), ("key_heads", "model"), ("mlp", "model")]
COLLECTIVES = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"


def mesh_of(*shape, kind=AxisType.Auto):
    devices = jax.devices("cpu")[: math.prod(shape)]
    return jax.make_mesh(shape, tuple(AXES.values()), (kind,) * 3, devices=devices)


def with_gradients(apply):
    """Of some arrays and the output's cotangent: the output, and the arrays' gradients."""

    def run(cotangent, *arrays):
        y, pull = jax.vjp(apply, *arrays)
        return y, pull(cotangent)

    return run


def compiled(apply, mesh, cotangent, *arrays, places):
    """The program of `with_gradients`; `places` are PartitionSpecs, of cotangent and arrays."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), places)

    def typed(x, sharding):
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    shapes = jax.tree.map(typed, (cotangent, *arrays), shardings)
    out = shardings[0], shardings[1:]
    with jax.set_mesh(mesh):
        program = jax.jit(with_gradients(apply), out_shardings=out).lower(*shapes).compile()
    return program, jax.device_get(program(*jax.device_put((cotangent, *arrays), shardings)))


def moved(program):
    """Kind and shape of what each collective has; XLA may make one of several arrays' sums."""
    found = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", program.as_text())
    return sorted(
        (kind, tuple(map(int, shape.split(","))) if shape else ())
        for text, kind in found
        for shape in re.findall(r"[a-z]\d+\[([\d,]*)\]", text)
    )


def in_loops(program):
    """The collectives in bodies and conditions of loops: devices would wait at each turn."""
    text = program.as_text()
    loops = set(re.findall(r"(?:body|condition)=%?([\w.-]+)", text))
    parts = dict(re.findall(r"^%?([\w.-]+) (\(.*?^})", text, re.M | re.S))
    assert bool(loops) == (" while(" in text) and loops <= set(parts)
    return [x for x in loops if re.search(rf" (?:{COLLECTIVES})(?:-start)?\(", parts[x])]


def borders():
    """A border inside of a device's tokens and a segment over the edge; a border on the edge."""
    return np.stack([np.arange(T) >= T // 4, np.arange(T) >= T // 2]).astype(np.int32)


def split_layer(name):
    """A layer, its parameters and their places on a mesh; PaTH needs heads to exchange."""
    more = dict(num_heads=4, num_key_heads=4) if name == "path" else {}
    case = f"{name}-rich"
    module = layer(case, implementation="xla", **more)
    if not more:
        return module, parameters(case)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3, D)))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    values = [0.3 * normal(i, *x.shape) for i, x in enumerate(leaves)]
    return module, tree.unflatten(values)


# One shows what all share; each takes a program of many seconds for itself.
ONE_LAYER = [pytest.param(n, marks=[] if n == "mesa" else pytest.mark.slow) for n in LAYERS]


@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_layer_on_a_mesh(name):
    """Output and gradients are one device's, and no device has another's tokens.

    Of [B, T, D] there is the output's sum over heads, and one of the inputs' gradient, whatever the
    number of projections. Parameters are gathered whole, each at once: a convolution's taps too.
    """
    mesh = mesh_of(2, 2, 2)
    module, params = split_layer(name)
    places = nn.logical_to_mesh(logical_axes(params), RULES)
    tokens = P("data", "seq")
    over = module.clone(mesh_axes=AXES)
    ids = borders()

    def apply_(module):
        return lambda params, x: module.apply({"params": params}, x, segment_ids=ids)

    arrays = normal(3, B, T, D), params, normal(2, B, T, D)
    program, got = compiled(apply_(over), mesh, *arrays, places=(tokens, places, tokens))
    trees_close(got, evaluated(jax.jit(with_gradients(apply_(module))))(*arrays))

    found = moved(program)
    b, t = B // 2, T // 2
    of_tokens = [x for x in found if x[1][:2] in ((b, t), (B, t), (b, T), (B, T))]
    assert [x for x in of_tokens if x[1][2:] == (D,)] == [("all-reduce", (b, t, D))] * 2
    # The inside of a projection by two matrices, and a norm's number for each token.
    others = {x for x in of_tokens if x[1][2:] != (D,)}
    if name == "path":  # exchanges heads
        others = {x for x in others if x[0] == "all-reduce"}
    assert others <= {("all-reduce", (b, t, 5)), ("all-reduce", (b, t, 1, 1))}
    assert not in_loops(program)
    # What is not of tokens is no larger than the largest parameter, or a state.
    sizes = [math.prod(shape) for _, shape in found if (_, shape) not in of_tokens]
    whole = max(map(np.size, jax.tree.leaves(params)))
    states = 2 * (B // 2) * entry_states(name)
    assert max(sizes) <= max(whole, states)


def entry_states(name):
    """Elements of what one device's heads exchange over time, at most: M and N."""
    H, K, V, L = 2, 16, 32, 8
    return {
        "kda": H * K * (K + V),
        "gsa": H * 20 * (1 + K + V),
        "log_linear": H * (1 + L * K * V),
        "mesa": H * (1 + K * K + K * V),
        "path": 0,
    }[name]


ROWS_AND_HEADS = dict(B="data", H="model")
TRACES = [
    pytest.param(AxisType.Auto, AXES, id="Auto"),
    pytest.param(AxisType.Explicit, AXES, id="Explicit", marks=pytest.mark.slow),
    pytest.param(AxisType.Auto, ROWS_AND_HEADS, id="masked", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, axes", TRACES)
@each_layer
def test_layers_trace(name, kind, axes):
    """On meshes of either kind, and with a mask where time is whole; a second each. No gradient of
    the float32 parameters was one of 16 bits, which devices would sum."""
    module, params = split_layer(name)
    x, ids = normal(2, B, T, D).astype(jnp.bfloat16), borders()
    mask = None if "T" in axes else ids == 0

    def loss(params, x):
        over = module.clone(mesh_axes=axes, dtype=jnp.bfloat16)
        y = over.apply({"params": params}, x, mask=mask, segment_ids=ids)
        return y.astype(jnp.float32).sum()

    with jax.set_mesh(mesh_of(2, 2, 2, kind=kind)):
        gradients_are_wide(jax.grad(loss), params, x)


def test_a_projections_gradients_are_summed_in_float32():
    """Of two devices, whose parts are 256 and 1: in bfloat16 their sum would be 256."""
    mesh, split = mesh_of(2, 1, 1), SPLIT | dict(T=(), H=())
    module = dense(split, (3, 2), use_bias=True, dtype=jnp.bfloat16)
    params = dict(kernel=jnp.ones((4, 3, 2)), bias=jnp.zeros((3, 2)))
    parts = jnp.ones((2, 1, 3, 2), jnp.bfloat16).at[0].set(256)
    arrays = parts, params, jnp.ones((2, 1, 4), jnp.bfloat16)

    def apply(params, x):
        return module.apply({"params": params}, x)

    places = P("data"), dict(kernel=P(), bias=P()), P("data")
    _, (_, (gradients, _)) = compiled(apply, mesh, *arrays, places=places)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, 257.0)


def test_inputs_gradient_is_summed_once():
    """Over heads on several devices, of three projections."""
    mesh = mesh_of(2, 1, 2)
    split = SPLIT | dict(T=())

    class Three(nn.Module):
        over: bool

        @nn.compact
        def __call__(self, x):
            if not self.over:
                return [nn.DenseGeneral((H, V), name=f"p{i}")(x) for i in range(3)]
            dense = functools.partial(nn.DenseGeneral, (H, V), dot_general_cls=by_heads)
            x = copies(x, split)
            return [dense(name=f"p{i}")(x)[0] for i in range(3)]

    params = {f"p{i}": dict(kernel=normal(i, D, H, V), bias=normal(3 + i, H, V)) for i in range(3)}
    kernel = dict(kernel=P("data", "model"), bias=P("model"))
    rows, heads = P("data"), P("data", None, "model")
    places = [heads] * 3, dict.fromkeys(params, kernel), rows
    arrays = [normal(7 + i, B, T, H, V) for i in range(3)], params, normal(10, B, T, D)

    def apply(over):
        return lambda params, x: Three(over).apply({"params": params}, x)

    want = evaluated(jax.jit(with_gradients(apply(False))))(*arrays)
    program, got = compiled(apply(True), mesh, *arrays, places=places)
    trees_close(got, want)
    sums = [x for x in moved(program) if x[1] == (B // 2, T, D)]
    assert sums == [("all-reduce", (B // 2, T, D))]


def test_the_inside_of_an_mlp_is_split():
    """One sum of tokens forward, and one backward for both projections."""
    mesh = mesh_of(2, 1, 2)
    module = SwiGLU(40)
    params = {
        name: dict(kernel=normal(i, *shape) / 5)
        for i, (name, shape) in enumerate(dict(gate=(D, 40), up=(D, 40), down=(40, D)).items())
    }
    places = nn.logical_to_mesh(logical_axes(params), RULES)

    def apply(module):
        return lambda params, x: module.apply({"params": params}, x)

    arrays = normal(4, B, T, D), params, normal(5, B, T, D)
    over = module.clone(mesh_axes=dict(B="data", H="model"))
    program, got = compiled(apply(over), mesh, *arrays, places=(P("data"), places, P("data")))
    trees_close(got, evaluated(jax.jit(with_gradients(apply(module))))(*arrays))
    of_tokens = [x for x in moved(program) if T in x[1]]
    assert of_tokens == [("all-reduce", (B // 2, T, D))] * 2


@pytest.mark.parametrize("axes", [AXES, dict(B="data", H="model")], ids=["time", "heads"])
def test_a_convolutions_taps_are_gathered_at_once(axes):
    """Under FSDP, and not tap by tap; the only tokens that move are those of the left edge."""
    W = 4
    mesh = mesh_of(2, 2 if "T" in axes else 1, 2)
    module = ShortConvolution(W, use_bias=True, normalize=True, implementation="xla")

    def apply(module):
        return lambda params, x: module.apply({"params": params}, x)

    params = dict(kernel=normal(0, W, H, V), bias=normal(1, H, V))
    tokens = P("data", "seq", "model")
    fsdp = dict(kernel=P(None, "model", "data"), bias=P("model", "data"))
    arrays = normal(2, B, T, H, V), params, normal(3, B, T, H, V)
    over = module.clone(mesh_axes=axes, axis_name=axes.get("T"))
    program, got = compiled(apply(over), mesh, *arrays, places=(tokens, fsdp, tokens))
    trees_close(got, evaluated(jax.jit(with_gradients(apply(module))))(*arrays))
    found = moved(program)
    assert [x for x in found if x[0] == "all-gather"] == [
        ("all-gather", (W, H // 2, V)),
        ("all-gather", (H // 2, V)),
    ][:: 1 if (H // 2, V) > (W, H // 2, V) else -1]
    edges = [x for x in found if x[0] == "collective-permute"]
    assert edges == [("collective-permute", (B // 2, W - 1, H // 2, V))] * (2 * ("T" in axes))
    rest = {shape for kind, shape in found if kind in ("all-reduce", "reduce-scatter")}
    assert max(map(math.prod, rest)) <= W * H // 2 * V


NORMS = {
    "heads": (RMSNorm(axes=2, input_activation=nn.silu), "x"),
    "gated": (RMSNorm(activation=nn.silu), "x gate"),
    "mamba2": (GatedRMSNorm(norm_before_gate=True), "x gate"),
    "groups": (GatedRMSNorm(groups=2), "x gate"),
}


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_over_heads_moves_a_number_for_each_token(kind):
    """Heads lie on several devices: none of them gathers any."""
    mesh = mesh_of(1, 2, 2)
    module, names = NORMS[kind]
    shape = (H, V)[-module.axes :]
    tokens = P("data", "seq", "model")

    def apply(module):
        return lambda scale, *x: module.apply({"params": dict(scale=scale)}, *x)

    arrays = [normal(i, B, T, H, V) for i in range(1 + len(names.split()))]
    arrays = [arrays[0], normal(9, *shape), *arrays[1:]]
    places = [tokens, P("model") if len(shape) == 2 else P(), *[tokens] * len(names.split())]
    over = module.clone(mesh_axes=AXES)
    program, got = compiled(apply(over), mesh, *arrays, places=tuple(places))
    trees_close(got, evaluated(jax.jit(with_gradients(apply(module))))(*arrays))
    shapes = {shape for _, shape in moved(program)}
    number = {(B, T // 2, 1, 1)} if kind in ("heads", "mamba2") else set()
    # The scale's gradient, a device's heads of it or what all heads have.
    scales = {(1,) * n + last for n in range(4) for last in ((H // 2, V), (H, V), (V,))}
    assert shapes - scales == number


def test_kernels_of_norms_and_convolutions_have_one_devices_tokens():
    """They would gather T, which the partition rule does not split."""
    dtype = jnp.bfloat16
    x, y = jnp.zeros((B, T, 64), dtype), jnp.zeros((B, T, H, 64), dtype)
    axes = dict(T="seq", H="model")
    options = dict(implementation="pallas", mesh_axes=axes)

    def branch(x):
        params = dict(scale=jnp.ones(64))
        return RMSNorm(**options).apply({"params": params}, x, x, method="branch")

    def convolution(y):
        params = dict(kernel=jnp.ones((4, H, 64)))
        module = ShortConvolution(4, axis_name="seq", **options)
        return module.apply({"params": params}, y)

    for run, array in ((branch, x), (convolution, y)):
        with jla.pallas.interpret(), jax.set_mesh(mesh_of(1, 2, 2)):
            jaxpr = jax.make_jaxpr(run)(array).jaxpr
        kernels = [e for e in equations(jaxpr) if e.primitive.name == "custom_vmap_call"]
        assert kernels and {k.invars[0].aval.shape[:2] for k in kernels} == {(B, T // 2)}


def test_named_kernels_of_norms_over_devices_are_refused():
    norm = RMSNorm(axes=2, implementation="pallas", mesh_axes=AXES)
    with jax.set_mesh(mesh_of(2, 2, 2)), pytest.raises(NotImplementedError, match="over heads on"):
        norm.apply({"params": dict(scale=jnp.ones((H, V)))}, jnp.ones((B, T, H, V)))


MISTAKES = [
    (dict(mesh_axes="data"), TypeError, "mesh_axes must be None or a dict .*, got 'data'"),
    (dict(mesh_axes=dict(D="data")), ValueError, r"mesh_axes must be .*, got {'D': 'data'}"),
    (dict(mesh_axes=dict(T=("a", "b"))), TypeError, r"mesh_axes\['T'\] must be a string or None"),
    (dict(mesh_axes=dict(B=3)), TypeError, r"mesh_axes\['B'\] must be a string, several, or None"),
    (dict(mesh_axes=dict(B="rows")), ValueError, "B must be an axis of the mesh, one of 'data'"),
    (dict(mesh_axes=AXES, axis_name="data"), ValueError, "axis_name = 'data' and mesh_axes = "),
    (dict(mesh_axes=AXES, decode=True), NotImplementedError, "decode is not .*mesh_axes=None"),
    (dict(mesh_axes=dict(H=("model", "data"))), ValueError, "multiple of the 4 devices of 'model'"),
]


@pytest.mark.parametrize("options, error, message", MISTAKES)
def test_mistakes(options, error, message):
    module = layer("mesa-plain", implementation="xla", **options)
    with jax.set_mesh(mesh_of(2, 2, 2)), pytest.raises(error, match=message):
        x = normal(0, B, T, D)
        jax.eval_shape(lambda p, x: module.apply({"params": p}, x), parameters("mesa-plain"), x)


def test_what_time_does_not_allow():
    module = layer("mesa-plain", implementation="xla", mesh_axes=AXES)
    run = functools.partial(module.apply, {"params": parameters("mesa-plain")})
    with pytest.raises(ValueError, match=r"no mesh is set.*jax\.set_mesh"):
        run(normal(0, B, T, D))
    with jax.set_mesh(mesh_of(2, 2, 2)):
        with pytest.raises(NotImplementedError, match="mask is not supported with mesh_axes"):
            run(normal(0, B, T, D), mask=np.ones((B, T), bool))
        with pytest.raises(ValueError, match="T = 39 must be a multiple of the 2 devices of 'seq'"):
            run(normal(0, B, 39, D))


def model(name, **options):
    mixer = entry(f"{name}-rich").module(num_heads=4, key_dim=16)
    layers = (Layer(mixer, SwiGLU(40)),) * 2
    return LanguageModel(Config(64, D, layers), stacked=True, remat=kept, **options)


def model_arrays():
    tokens = np.random.default_rng(0).integers(0, 64, (B, T), np.int32)
    module = model("kda")
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.3 * normal(i, *x.shape) for i, x in enumerate(leaves)]), tokens


def test_a_model_traces():
    """With the field of templates that are the model's to set; one that decodes is a clone."""
    params, tokens = model_arrays()

    def loss(params, **options):
        return model("kda", **options).apply({"params": params}, tokens).sum()

    options = dict(mesh_axes=AXES, dtype=jnp.bfloat16)
    with jax.set_mesh(mesh_of(2, 2, 2)):
        gradients_are_wide(jax.grad(functools.partial(loss, **options)), params)


@pytest.mark.slow  # two programs of a model
def test_a_model_on_a_mesh():
    """FSDP, tensor parallelism and time; blocks' parameters are gathered inside the scan."""
    params, tokens = model_arrays()
    places = nn.logical_to_mesh(logical_axes(params), [*RULES, ("vocab", "model")])
    mesh = mesh_of(2, 2, 2)

    def apply(**options):
        module = model("kda", implementation="xla", **options)
        return lambda params: module.apply({"params": params}, tokens)

    arrays = normal(1, B, T, 64), params
    program, got = compiled(apply(mesh_axes=AXES), mesh, *arrays, places=(P("data", "seq"), places))
    trees_close(got, jax.device_get(jax.jit(with_gradients(apply()))(*arrays)), 1e-3)
    gathered = [shape for kind, shape in moved(program) if kind == "all-gather"]
    assert not [shape for shape in gathered if shape[0] == 2 and len(shape) > 3]
