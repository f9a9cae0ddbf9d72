"""A token of a layer by kernels of all of it: the values are those of the layer's own way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal, random_parameters, relative_error

import jla.linen
import jla.pallas
from jla import _dispatch, _token
from jla.models.language_model import cast_matrices

f32, bf16 = jnp.float32, jnp.bfloat16
D, HEADS = 64, dict(num_heads=2, key_dim=32, dtype=bf16)
LAYERS = {
    "kda": jla.linen.KimiDeltaAttention(**HEADS),
    "kda full": jla.linen.KimiDeltaAttention(
        num_key_heads=1, allow_negative_eigenvalues=True, gate_lower_bound=-4.0,
        full_rank_decay=True, full_rank_gate=True, output_gate_bias=False, **HEADS,
    ),
    "gsa": jla.linen.GatedSlotAttention(conv_size=4, **HEADS),
    "gsa grouped": jla.linen.GatedSlotAttention(
        conv_size=2, num_key_heads=1, num_slots=16, scale=None, norm_scale=False, **HEADS
    ),
    "mesa": jla.linen.MesaNet(**HEADS),
    "mesa gated": jla.linen.MesaNet(use_output_gate=True, **HEADS),
    "path": jla.linen.PaTHAttention(lazy_keys=bf16, **HEADS),
    "path full": jla.linen.PaTHAttention(lazy_keys=f32, num_key_heads=1, w_rank=None, **HEADS),
    "log_linear": jla.linen.LogLinearMamba2(use_bias=False, num_levels=8, **HEADS),
    "log_linear more heads": jla.linen.LogLinearMamba2(
        use_bias=False, num_levels=8, num_key_heads=2, norm_before_gate=True, **HEADS
    ),
}  # fmt: skip
KERNELS = dict(kda="kda_token", gsa="gsa_token", mesa="mesa_token", log_linear="log_linear_token")
KERNELS |= dict(path="path_token")


@pytest.mark.parametrize("name", LAYERS)
def test_is_the_layers_own_way(name, monkeypatch):
    layer = LAYERS[name].clone(decode=True)
    x = normal(0, 2, 4, D).astype(bf16)
    variables = random_parameters(layer, x[:, :1])
    params = cast_matrices(dict(layer=variables["params"]), bf16)["layer"]
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["cache"]
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    formula = layer.clone(implementation="xla")
    _, started = formula.apply({"params": params} | dict(cache=cache), x[:, :3], mutable=["cache"])
    given = {"params": params} | started
    want, after = formula.apply(given, x[:, 3:], mutable=["cache"])

    called = []
    kernel = getattr(_token, KERNELS[name.split()[0]])
    monkeypatch.setattr(
        _token, kernel.__name__, lambda *a, **o: called.append(kernel) or kernel(*a, **o)
    )
    monkeypatch.setattr(_dispatch, "has_gpu", lambda: True)
    with jla.pallas.interpret():
        got, moved = layer.apply(given, x[:, 3:], mutable=["cache"])
    assert called
    assert got.dtype == want.dtype and got.shape == want.shape
    assert relative_error(got.astype(f32), want.astype(f32)) < 2e-2
    assert jax.tree.structure(moved) == jax.tree.structure(after)
    for path, x in jax.tree_util.tree_leaves_with_path(_settled(moved["cache"])):
        y = dict(jax.tree_util.tree_leaves_with_path(_settled(after["cache"])))[path]
        assert x.dtype == y.dtype
        assert relative_error(x.astype(f32), y.astype(f32)) < 1e-2, path


@pytest.mark.parametrize("name", KERNELS)
def test_derivatives_and_vmap_are_the_formula(name, monkeypatch):
    layer = LAYERS[name].clone(decode=True)
    x = normal(0, 2, 1, D).astype(bf16)
    variables = random_parameters(layer, x)
    params = cast_matrices(dict(layer=variables["params"]), bf16)["layer"]
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["cache"]
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def run(implementation):
        one = layer.clone(implementation=implementation)

        def token(x):
            return one.apply({"params": params, "cache": cache}, x, mutable=["cache"])[0]

        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(token(x).astype(f32))))(jnp.asarray(x))
        return gradient, jax.vmap(token)(jnp.stack([x, 2 * x]))

    want = run("xla")
    monkeypatch.setattr(_dispatch, "has_gpu", lambda: True)
    with jla.pallas.interpret():
        got = run(None)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a.astype(f32), b.astype(f32)) < 6e-2  # of roundings to 16 bits


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 64])
@pytest.mark.parametrize("name", LAYERS)
def test_full_size(name, B):
    """As near to float32 as XLA's form in 16 bits, and twice the same bits."""
    width = dict(num_heads=8, key_dim=128)
    of_keys = (
        {} if getattr(LAYERS[name], "num_key_heads", None) in (None, 1) else dict(num_key_heads=8)
    )
    layer = LAYERS[name].clone(decode=True, **width, **of_keys)
    x = normal(0, B, 33, 1024)
    variables = random_parameters(layer, x[:, :1])
    params = jax.tree.map(lambda p: p * 0.1 if p.ndim > 1 else p, variables["params"])
    params = cast_matrices(dict(layer=params), bf16)["layer"]

    def run(implementation, dtype, cache, tokens):
        one = layer.clone(implementation=implementation, dtype=dtype)
        made = jax.tree.map(lambda p: p if dtype == bf16 else p.astype(f32), params)
        apply = jax.jit(lambda p, c, x: one.apply({"params": p, "cache": c}, x, mutable=["cache"]))
        return apply(made, cache, tokens.astype(dtype))

    def empty(dtype):
        one = layer.clone(dtype=dtype)
        shapes = jax.eval_shape(one.init, jax.random.key(0), x[:, :1].astype(dtype))["cache"]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    with jax.default_matmul_precision("highest"):
        _, started = run("xla", f32, empty(f32), x[:, :32])
        exact, _ = run("xla", f32, started["cache"], x[:, 32:])
    cache = jax.tree.map(lambda a, b: a.astype(b.dtype), started["cache"], empty(bf16))
    plain, _ = run("xla", bf16, cache, x[:, 32:])
    got, moved = run(None, bf16, cache, x[:, 32:])
    again = run(None, bf16, cache, x[:, 32:])
    for a, b in zip(
        jax.tree.leaves((got, _settled(moved["cache"]))),
        jax.tree.leaves((again[0], _settled(again[1]["cache"]))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert relative_error(got.astype(f32), exact) < 1.1 * relative_error(plain.astype(f32), exact)


def _settled(cache):
    """The cache without what means nothing: levels that are not in use."""
    if "change" in cache:
        names = "key", "value", "decay", "length", "recent", "change"
        exact = jla.LazyPathCache(*(cache.get(name) for name in names)).settled()
        rest = {name: x for name, x in cache.items() if name not in names}
        return rest | dict(key=exact.key, value=exact.value, length=exact.length)
    if "levels" not in cache:
        return cache
    names = "levels", "position", "log_decays"
    state = jla.LazyLogLinearState(*(cache[name] for name in names)).settled()
    rest = {name: x for name, x in cache.items() if name not in names}
    return rest | dict(levels=state.levels, position=state.position)
