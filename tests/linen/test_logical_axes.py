"""Names for the axes of parameters, and flax's rules upon them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layers import CASES, D, each_rich, entry, init_shapes, options

from jla.linen import GatedSlotAttention, KimiDeltaAttention, logical_axes
from jla.models import Attention, Config, Experts, LanguageModel, LatentAttention, Layer, SwiGLU


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def sizes_of(names, shapes):
    """The sizes that each name stands for."""
    sizes = {}
    for path, spec in names.items():
        assert len(spec) == len(shapes[path].shape), path
        for name, size in zip(spec, shapes[path].shape, strict=True):
            sizes.setdefault(name, set()).add(size)
    return sizes


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_of_every_layer_has_names(case):
    shapes = init_shapes(case, 1, 3)["params"]
    names = logical_axes(shapes)
    assert jax.tree.structure(names) == jax.tree.structure(shapes)
    names, shapes = by_path(names), by_path(shapes)
    sizes = sizes_of(names, shapes)
    given = options(case)
    assert sizes["embed"] == {D} and sizes["heads"] == {given["num_heads"]}
    assert sizes.get("conv", {given.get("conv_size") or 4}) <= {given.get("conv_size") or 4, 3}
    if "key_heads" in sizes:
        assert sizes["key_heads"] == {given.get("num_key_heads", 1)}
    # The feature map of GSA has the same features on both sides.
    assert [path for path, spec in names.items() if None in spec] == (
        ["feature_map/kernel"] if "feature_map/kernel" in names else []
    )


@each_rich
def test_names_are_the_same_for_blocks_in_a_stack(case):
    shapes = init_shapes(case, 1, 3)["params"]
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), shapes)
    want = {path: P("layers", *spec) for path, spec in by_path(logical_axes(shapes)).items()}
    assert by_path(logical_axes({"blocks": stacked})) == {f"blocks/{n}": x for n, x in want.items()}


def test_of_a_layer():
    module = KimiDeltaAttention(num_heads=4, num_key_heads=2, key_dim=16)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3, D)))["params"]
    assert by_path(logical_axes(shapes)) == {
        "A_log": P("heads"),
        "b_proj/kernel": P("embed", "heads"),
        "dt_bias": P("heads", "head_dim"),
        "f_proj_down/kernel": P("embed", "rank"),
        "f_proj_up/kernel": P("rank", "heads", "head_dim"),
        "g_proj_down/kernel": P("embed", "rank"),
        "g_proj_up/bias": P("heads", "head_dim"),
        "g_proj_up/kernel": P("rank", "heads", "head_dim"),
        "k_conv1d/kernel": P("conv", "key_heads", "head_dim"),
        "k_proj/kernel": P("embed", "key_heads", "head_dim"),
        "o_norm/scale": P("head_dim"),
        "o_proj/kernel": P("heads", "head_dim", "embed"),
        "q_conv1d/kernel": P("conv", "key_heads", "head_dim"),
        "q_proj/kernel": P("embed", "key_heads", "head_dim"),
        "v_conv1d/kernel": P("conv", "heads", "head_dim"),
        "v_proj/kernel": P("embed", "heads", "head_dim"),
    }


def model_shapes(stacked=False):
    experts = Experts(num_experts=4, experts_per_token=2, hidden=8, shared_hidden=16)
    latent = LatentAttention(num_heads=2, latent_dim=8, nope_dim=4, rope_dim=4, value_dim=6)
    queries = latent.clone(query_latent_dim=12)
    attention = Attention(num_heads=4, num_key_heads=2, key_dim=8, use_bias=True)
    gsa = GatedSlotAttention(num_heads=2, key_dim=16)
    layers = (
        Layer(gsa, SwiGLU(40)),
        Layer(latent, experts),
        Layer(queries, experts),
        Layer(attention, experts),
    )
    layers = layers[:1] * 2 if stacked else layers
    model = LanguageModel(Config(128, D, layers, tied=stacked), stacked=stacked)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]


def test_of_a_model():
    shapes = model_shapes()
    names, shapes = by_path(logical_axes(shapes)), by_path(shapes)
    sizes = sizes_of(names, shapes)
    assert sizes["embed"] == {D} and sizes["vocab"] == {128} and sizes["mlp"] == {40, 8, 16}
    assert sizes["heads"] == {2, 4} and sizes["key_heads"] == {2} and sizes["rank"] == {8, 12}
    assert sizes["experts"] == {4}
    some = {
        "embed/embedding": P("vocab", "embed"),
        "head/kernel": P("embed", "vocab"),
        "final_norm/scale": P("norm"),
        "block_0/mixer/o_proj/kernel": P("heads", "head_dim", "embed"),
        "block_0/mlp/down/kernel": P("mlp", "embed"),
        "block_1/mixer/latent_up/kernel": P("rank", "heads", "head_dim"),
        "block_1/mixer/latent_norm/scale": P("norm"),
        "block_1/mlp/up": P("experts", "embed", "mlp"),
        "block_1/mlp/shared/up/kernel": P("embed", "mlp"),
        "block_1/mlp/router/kernel": P("embed", None),
        "block_3/mixer/key/bias": P("key_heads", "head_dim"),
    }
    assert some.items() <= names.items()
    without = {path.split("/", 1)[1] for path, spec in names.items() if None in spec}
    # latent_down makes a key for all heads, too.
    assert without == {"mlp/router/kernel", "mlp/router/correction_bias"}


def test_of_a_stacked_model_and_its_moments():
    shapes = model_shapes(stacked=True)
    names = by_path(logical_axes(shapes))
    assert names["blocks/mixer/g_norm/scale"] == P("layers", "heads", "head_dim")
    assert names["blocks/mlp/up/kernel"] == P("layers", "embed", "mlp")
    assert names["blocks/mlp_norm/scale"] == P("layers", "norm")
    moments = jax.eval_shape(optax.scale_by_adam().init, shapes)
    of_moments = logical_axes(moments)
    assert by_path(of_moments.mu) == by_path(of_moments.nu) == names
    assert of_moments.count == P()


def test_what_is_unknown_has_no_names():
    others = {"dense": {"kernel": np.zeros((3, 4))}, "gate": {"kernel": np.zeros((3, 4))}}
    assert logical_axes(others) == {
        "dense": {"kernel": P(None, None)},
        "gate": {"kernel": P(None, None)},
    }
    with pytest.raises(TypeError, match=r"linen.logical_axes: params must be .* got 3 at a/b"):
        logical_axes({"a": {"b": 3}})


@each_rich
def test_flax_makes_shardings_of_names(case):
    """As rules for FSDP and tensor parallelism say."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4]
    )
    rules = [("embed", "data"), ("heads", "model"), ("key_heads", "model")]
    names = logical_axes(entry_shapes(case))
    shardings = nn.logical_to_mesh_sharding(names, mesh, rules)
    assert shardings["v_proj"]["kernel"].spec == P("data", "model", None)
    assert shardings["o_proj"]["kernel"].spec == P("model", None, "data")
    for path, sharding in by_path(shardings).items():
        shape = by_path(entry_shapes(case))[path].shape
        sharding.shard_shape(shape)  # raises unless all parts are equal


def entry_shapes(case):
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x, jnp.float32), entry(case).parameters, is_leaf=is_shape
    )
