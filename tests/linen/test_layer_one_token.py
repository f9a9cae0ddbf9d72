"""A token of a layer by kernels of all of it: the values are those of the layer's own way."""

import jax
import jax.numpy as jnp
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
