"""Attention, latent attention and experts over a mesh: one device's values and gradients."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close
from equations import gradients_are_wide
from evaluator import evaluated
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from model_formulas import normal, random_params

from jla.linen import logical_axes
from jla.models import Attention, Config, Experts, LanguageModel, LatentAttention, Layer, SwiGLU

B, T, D = 2, 12, 16
AXES = dict(B="data", T="seq", H="model")
RULES = [("embed", "data"), ("heads", "model"), ("key_heads", "model"), ("mlp", "model")]
COLLECTIVES = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
Latents = functools.partial(
    LatentAttention, latent_dim=6, nope_dim=4, rope_dim=2, value_dim=3, rope_theta=100.0
)
LAYERS = {
    "heads for time": Attention(4, 4, use_bias=True, window=7),
    "keys move": Attention(4, 2, key_dim=4),
    "keys in a window move": Attention(4, 2, key_dim=4, window=4),
    "latents, heads for time": Latents(4, query_latent_dim=5),
    "latents move": Latents(2),
    "experts": Experts(6, 2, 8, shared_hidden=4),
}
# What each sends of tokens between the devices of time, forward and backward.
EXCHANGES = {"heads for time": "all-to-all", "latents, heads for time": "all-to-all", "experts": ""}
SEGMENTS = np.stack([np.arange(T) >= 2, np.arange(T) >= T // 2]).astype(np.int32)
each_layer = pytest.mark.parametrize("name", LAYERS)


def mesh_of(*shape):
    devices = jax.devices("cpu")[: math.prod(shape)]
    return jax.make_mesh(shape, tuple(AXES.values()), (AxisType.Auto,) * 3, devices=devices)


def applied(layer, segments):
    options = {} if isinstance(layer, Experts) or segments is None else dict(segment_ids=segments)
    return lambda params, x: layer.apply({"params": params}, x, **options)


def with_gradients(apply):
    def run(cotangent, params, x):
        y, pull = jax.vjp(apply, params, x)
        return y, pull(cotangent)

    return run


@each_layer
def test_traces(name):
    """On whole arrays, and inside of a shard_map over rows and time."""
    layer = LAYERS[name]
    params, x = random_params(layer, jnp.zeros((1, 2, D))), normal(1, B, T, D)
    shapes = jax.tree.map(np.shape, (x, (params, x)))

    def traced(layer):
        return jax.tree.map(
            np.shape, jax.eval_shape(with_gradients(applied(layer, SEGMENTS)), x, params, x)
        )

    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert traced(layer.clone(mesh_axes=AXES)) == shapes
        inside = layer if name == "experts" else layer.clone(axis_name="seq")

        def of_device(params, x, segments):
            return applied(inside, segments)(params, x)

        tokens = P("data", "seq")
        over = jax.shard_map(of_device, in_specs=(P(), tokens, tokens), out_specs=tokens)
        run = with_gradients(lambda params, x: over(params, x, SEGMENTS))
        assert jax.tree.map(np.shape, jax.eval_shape(run, x, params, x)) == shapes


@pytest.mark.slow  # a program of eight devices each
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@each_layer
def test_is_one_devices(name, packed):
    """Parameters split too. No device has all tokens, but of the heads that are exchanged."""
    layer, mesh = LAYERS[name], mesh_of(2, 2, 2)
    params = random_params(layer, jnp.zeros((1, 2, D)))
    arrays = normal(2, B, T, D), params, normal(1, B, T, D)
    segments = SEGMENTS if packed else None
    want = evaluated(jax.jit(with_gradients(applied(layer, segments))))(*arrays)

    tokens = P("data", "seq")
    specs = tokens, nn.logical_to_mesh(logical_axes(params), RULES), tokens
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    over = with_gradients(applied(layer.clone(mesh_axes=AXES), segments))
    with jax.set_mesh(mesh):
        run = jax.jit(over, out_shardings=(places[0], places[1:]))
        program = run.lower(*jax.device_put(arrays, places)).compile()
        got = jax.device_get(program(*jax.device_put(arrays, places)))
    jax.tree.map(functools.partial(close, tolerance=2e-5), got, want)

    found = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", program.as_text())
    exchange = EXCHANGES.get(name, "collective-permute")
    assert not exchange or exchange in {kind for _, kind in found}
    gathered = [shape for shape, kind in found if kind == "all-gather" and "f32" in shape]
    assert not [x for x in gathered if re.search(rf"\[(1|{B}),{T}\b", x)]


def test_a_model_traces_on_a_mesh():
    layers = tuple(
        Layer(mixer, mlp)
        for mixer, mlp in ((LAYERS["keys move"], SwiGLU(8)), (Latents(4), LAYERS["experts"]))
    )
    model = LanguageModel(Config(32, D, layers, tied=True), mesh_axes=AXES, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((B, T), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def loss(params, tokens):
        return model.apply({"params": params}, tokens).sum()

    with jax.set_mesh(mesh_of(2, 2, 2)):
        gradients_are_wide(jax.grad(loss), params, tokens)


def test_what_is_refused():
    layer = Attention(4, mesh_axes=AXES)
    params, x = random_params(Attention(4), jnp.zeros((1, 2, D))), normal(1, B, T, D)
    run = functools.partial(layer.apply, {"params": params})
    with jax.set_mesh(mesh_of(2, 2, 2)):
        with pytest.raises(NotImplementedError, match="mask is not supported with mesh_axes"):
            run(x, mask=np.ones((B, T), bool))
        with pytest.raises(ValueError, match="T = 11 must be a multiple of the 2 devices of 'seq'"):
            run(x[:, :11])
        with pytest.raises(NotImplementedError, match=r"decode is not .*mesh_axes=None"):
            layer.clone(decode=True).apply({"params": params}, x)
        with pytest.raises(ValueError, match="HK = 3 must be a multiple of the 2 devices"):
            odd = Attention(6, 3, key_dim=4)
            odd_params = random_params(odd, jnp.zeros((1, 2, D)))
            odd.clone(mesh_axes=AXES).apply({"params": odd_params}, x)
