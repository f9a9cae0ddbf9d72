"""Names for the axes of parameters, for rules that say how parameters lie on a mesh."""

import re
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jla._core import checks

# Parameters of the layers with heads, "module/parameter", and their axes. Axes in brackets are not
# in every layer. A layer is what has the first of them.
_OUT = r"(o_proj|out)/kernel"
_OF_LAYERS = (
    (_OUT, "heads head_dim embed"),
    (r"(o_proj|out)/bias", "embed"),
    (r"(\w+_proj|query|latent)_down/kernel", "embed rank"),
    (r"(\w+_proj|query|latent)_up/kernel", "rank heads head_dim"),
    (r"level_proj/kernel", "embed heads levels"),
    (r"level_proj/bias|L", "heads levels"),
    (r"(\w+_proj|query|key|value)/kernel", "embed heads [head_dim]"),
    (r"\w+_conv1d/kernel", "conv heads head_dim"),
    (r"(\w+_proj|\w+_proj_up|\w+_conv1d|query|key|value)/bias", "heads [head_dim]"),
    (r"A_log|dt_bias|D|lambda_params", "heads [head_dim]"),
    (r"feature_map/kernel", "head_dim None"),
    (r"[og]_norm/scale", "[heads] head_dim"),
    (r"[qk]_norm/scale", "head_dim"),
    (r"(query|latent)_norm/scale", "norm"),
)
_OF_EXPERTS = (
    (r"gate|up", "experts embed mlp"),
    (r"down", "experts mlp embed"),
    (r"router/kernel", "embed None"),
    (r"router/correction_bias", "None"),
)
_OF_MLPS = ((r"(gate|up)/kernel", "embed mlp"), (r"down/kernel", "mlp embed"))
_OF_MODELS = (
    (r"embed/embedding", "vocab embed"),
    (r"head/kernel", "embed vocab"),
    (r"(mixer|mlp|final)_norm/scale", "norm"),
)


@checks.named
def logical_axes(params: Any) -> Any:
    """Names for the axes of every parameter of the layers of `jla.linen` and of `jla.models`.

    ==========  ======================================================================
    embed       D, the features of the residual stream: split it for FSDP
    heads       as many as the layer's outputs have: split it for tensor parallelism
    key_heads   heads where there are fewer (num_key_heads)
    head_dim    features of a head, K or V, and slots
    mlp         the inside of an MLP or of an expert: split it with the heads
    vocab       the tokens of the embedding and the head
    experts     the experts of `jla.models.Experts`
    layers      the blocks of a model whose parameters are stacked
    conv        the taps of a convolution
    rank        the inside of a projection by two matrices
    levels      of log-linear attention
    norm        features of a norm of whole vectors
    ==========  ======================================================================

    flax's rules map names to axes of a mesh; see docs/scale.md. The parameters are known by their
    paths, so the tree may be larger: a whole model, or an optimizer's state with moments in it.
    Arrays of other modules have no names.

    Example:
      layer, x = jla.linen.MesaNet(num_heads=4), jnp.ones((2, 8, 64))
      params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
      names = jla.linen.logical_axes(params)
      print(*names["q_proj"]["kernel"])  # embed heads head_dim

    Args:
      params: a tree of arrays, or of anything with a shape, such as `jax.ShapeDtypeStruct`.

    Returns:
      The same tree of `PartitionSpec`s, with a name, or None, for each axis.

    Raises:
      TypeError: a leaf of the tree has no shape.
    """
    leaves, tree = jax.tree.flatten_with_path(params)
    shapes = {_parts(path): _shape(path, leaf) for path, leaf in leaves}
    heads = {
        path[:-2]: (shape[-3], len(shape) - 3)
        for path, shape in shapes.items()
        if len(shape) > 2 and re.fullmatch(_OUT, "/".join(path[-2:]))
    }
    return tree.unflatten(
        PartitionSpec(*_names(path, shape, heads, shapes)) for path, shape in shapes.items()
    )


def _parts(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _shape(path: Any, leaf: Any) -> tuple[int, ...]:
    shape = getattr(leaf, "shape", None)
    if shape is None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise TypeError(f"params must be a tree of arrays, got {leaf!r} at {name}")
    return shape


def _names(path, shape, heads, shapes):
    """The names of the axes of one array.

    Args:
      heads: by the path of each layer, how many heads it has, and how many axes its parameters have
        in front of their own.
      shapes: all paths, with the arrays' shapes.
    """
    for i in (1, 2):
        scope, name = path[:-i], "/".join(path[-i:])
        if scope in heads and (axes := _axes(_OF_LAYERS, name)):
            count, stacked = heads[scope]
            names = _fitting(axes, len(shape) - stacked)
            if names is None:
                return [None] * len(shape)
            sizes = shape[stacked:]
            names = [
                "key_heads" if axis == "heads" and size != count else axis
                for axis, size in zip(names, sizes, strict=True)
            ]
            return _behind(names, shape)
        tables = [_OF_MODELS]
        if (*scope, "router", "kernel") in shapes:
            tables.append(_OF_EXPERTS)
        elif all((*scope, part, "kernel") in shapes for part in ("gate", "up", "down")):
            tables.append(_OF_MLPS)
        for table in tables:
            axes = _axes(table, name)
            if axes and len(axes.split()) <= len(shape):
                return _behind([None if x == "None" else x for x in axes.split()], shape)
    return [None] * len(shape)


def _axes(table, name):
    return next((axes for pattern, axes in table if re.fullmatch(pattern, name)), None)


def _fitting(axes, ndim):
    """As many of these axes, those in brackets or not, or None if no choice fits."""
    names = axes.split()
    if len(names) > ndim:
        names = [x for x in names if not x.startswith("[")]
    if len(names) != ndim:
        return None
    return [None if x == "None" else x.strip("[]") for x in names]


def _behind(names, shape):
    """The names, behind those of the axes of stacked parameters."""
    front = len(shape) - len(names)
    return [*("layers", *[None] * front)[:front], *names]
