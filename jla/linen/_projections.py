"""The layers' matrix products, where heads lie on several devices too."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jla import _token
from jla._core import whole
from jla._core.states import with_rank
from jla._core.types import Implementation

ROWS = 16  # the fewest of a product that a GPU's tensor cores do


def product(x, kernel, dimensions, *, implementation="xla", **options):
    """`lax.dot_general` of x and a kernel, as flax's dense layers ask for it (`dot_general`).

    A single token gets rows of zeros beside it on a GPU. Of a vector and a matrix of less than ten
    million elements XLA makes a sum of products, which it may write to memory as a matrix. What has
    rows stays a product, and products of the same x become one where their kernels are small.

    Few rows are a kernel's, where one serves and `implementation`, that of a layer's norms, lets
    it.
    """
    (axes, _), (batch, _) = dimensions
    rows = [i for i in range(x.ndim) if i not in axes]
    if not batch and all(option is None for option in options.values()):
        flat = _as_matrices(x, kernel, axes, dimensions[0][1])
        typed = whole.carries_shardings(x)
        if flat and not typed and _token.serves("product_of_few", implementation, *flat):
            flat = (a.reshape(shape.shape) for a, shape in zip((x, kernel), flat, strict=True))
            y = _token.product_of_few(*flat, implementation=implementation)
            return y.reshape(*(x.shape[i] for i in rows), *kernel.shape[len(axes) :])
    few = rows and not batch and math.prod(x.shape[i] for i in rows) == 1
    if not few or x.dtype.itemsize != 2 or jax.default_backend() != "gpu":
        return dot(x, kernel, dimensions, **options)
    # Not `jnp.pad`, which XLA puts into Triton's product and then finds no configuration for.
    row = lax.broadcasted_iota(jnp.int32, (ROWS, *x.shape[1:]), rows[0])
    x = jnp.where(row == 0, jnp.broadcast_to(x, row.shape), 0)
    return lax.dot_general(x, kernel, dimensions, **options)[:1]


def _as_matrices(x, kernel, axes, kernel_axes):
    """The shapes of x as rows and of the kernel as a matrix, if the last axes of the one meet the
    first of the other; else None."""
    n = len(axes)
    last, first = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
    if tuple(axes) != last or tuple(kernel_axes) != first or n == x.ndim:
        return None
    D = math.prod(kernel.shape[:n])
    shape = jax.ShapeDtypeStruct
    return shape((x.size // D, D), x.dtype), shape((D, kernel.size // D), kernel.dtype)


def dot(x, kernel, dimensions, **options):
    """`lax.dot_general`, but a kernel of another dtype is cast to x's, and its gradient is not cast
    from it: devices sum it in the kernel's own."""
    if kernel.dtype == x.dtype:
        return lax.dot_general(x, kernel, dimensions, **options)
    (axes, kernel_axes), (batch, kernel_batch) = dimensions
    dimensions = (tuple(axes), tuple(kernel_axes)), (tuple(batch), tuple(kernel_batch))
    return _dot_of_wide(x, kernel, dimensions, tuple(options.items()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot_of_wide(x, kernel, dimensions, options):
    return lax.dot_general(x, kernel.astype(x.dtype), dimensions, **dict(options))


def _dot_forward(x, kernel, dimensions, options):
    return _dot_of_wide(x, kernel, dimensions, options), (x, kernel)


def _dot_backward(dimensions, options, arrays, dy):
    x, kernel = arrays
    narrow = kernel.astype(x.dtype)
    _, pull = jax.vjp(lambda x: lax.dot_general(x, narrow, dimensions, **dict(options)), x)
    (axes, kernel_axes), (batch, kernel_batch) = dimensions
    rows = [i for i in range(x.ndim) if i not in (*axes, *batch)]
    rows_of_y = range(len(batch), len(batch) + len(rows))
    features = [i for i in range(kernel.ndim) if i not in (*kernel_axes, *kernel_batch)]
    summed = [kernel_axes[axes.index(i)] for i in sorted(axes)]
    order = (*kernel_batch, *summed, *features)
    more = {name: value for name, value in options if name != "out_sharding"}
    mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(kernel).sharding.spec
    if AxisType.Explicit in mesh.axis_types:
        more["out_sharding"] = NamedSharding(mesh, PartitionSpec(*(spec[i] for i in order)))
    gradient = lax.dot_general(
        x,
        dy,
        ((rows, rows_of_y), (batch, range(len(batch)))),
        preferred_element_type=jnp.float32,
        **more,
    )
    places = [order.index(i) for i in range(kernel.ndim)]
    return *pull(dy), jnp.transpose(gradient, places).astype(kernel.dtype)


_dot_of_wide.defvjp(_dot_forward, _dot_backward)


def dense(
    split,
    features,
    *,
    kind: type[nn.Module] = nn.DenseGeneral,
    use_bias=False,
    implementation: Implementation | None = "xla",
    **options,
):
    """The module of a projection, `implementation` as `product` has it. With a `split` devices sum
    its parameters' gradients in their dtype; flax casts them first, and so 16 bits would be summed.
    """
    if split is None:
        by = functools.partial(product, implementation=implementation)
        return kind(features, use_bias=use_bias, dot_general=by, **options)
    kind = _WithBias if use_bias else kind
    return kind(features, use_bias=False, dot_general=product, promote_dtype=only_inputs, **options)


def only_inputs(inputs, *parameters, dtype=None):
    """`promote_dtype` of flax's layers: parameters stay as they are, for `dot`."""
    inputs, *_ = nn.dtypes.promote_dtype(inputs, *parameters, dtype=dtype)
    return inputs, *parameters


class _WithBias(nn.DenseGeneral):
    """`nn.DenseGeneral` with a bias that is added in its own dtype."""

    @nn.compact
    def __call__(self, inputs):
        y = super().__call__(inputs)
        features = (self.features,) if isinstance(self.features, int) else self.features
        bias = self.param("bias", self.bias_init, features, self.param_dtype)
        return plus(y, bias)


def plus(y, bias):
    """y and a bias, added in the bias' dtype; in y's."""
    return (y.astype(bias.dtype) + with_rank(bias, y.ndim)).astype(y.dtype)


def sum_over_heads(implementation="xla"):
    """`dot_general_cls` of the output projection, a DenseGeneral over heads and features."""
    return functools.partial(_product, implementation=implementation)


def _product(o, kernel, dimensions, **options):
    """`product`. If types carry shardings, and heads are split in both arrays, JAX asks where the
    sum lies: its rows as those of o, its features as those of the kernel."""
    rows, features = (jax.typeof(x).sharding for x in (o, kernel))
    batch, time, heads, _ = rows.spec
    if heads is not None and heads == features.spec[0]:
        spec = PartitionSpec(batch, time, features.spec[2])
        options["out_sharding"] = NamedSharding(rows.mesh, spec)
    return product(o, kernel, dimensions, **options)


def copies(x, split):
    """x [B, T, D] once for each of the devices that heads are split over, [devices, B, T, D]; or
    None, if they are not, or if types carry shardings.

    Each device has one, and nothing moves. Its gradient is one sum over these devices, however many
    projections of x there are: of x itself, XLA may sum that of each projection.
    """
    over = () if split is None else split["H"]
    if not over:
        return None
    mesh = whole.mesh_with(split)
    if AxisType.Explicit in mesh.axis_types:
        return None
    place = whole.places(split, mesh, dict(zip("BT", x.shape, strict=False)))
    place = PartitionSpec(over, place["B"] or None, place["T"] or None, None)
    x = jnp.broadcast_to(x[None], (whole.devices(over), *x.shape))
    return lax.with_sharding_constraint(x, NamedSharding(mesh, place))


def by_heads():
    """`dot_general_cls` of a projection of `copies` to heads, or to heads and features: its result
    is [1, B, T, H, ...], for flax adds biases of as many axes as the copies have."""
    return lambda *arrays, **options: product_by_heads(*arrays, **options)[None]


def product_by_heads(x, kernel, _=None, **options):
    """[B, T, H, ...] of x [devices, B, T, D] and a kernel [D, H, ...]: heads of each device by its
    own copy."""
    D, H, *features = kernel.shape
    kernel = kernel.reshape(D, x.shape[0], -1, *features)
    y = dot(x, kernel, (((3,), (0,)), ((0,), (1,))), **options)
    return jnp.moveaxis(y, 0, 2).reshape(*x.shape[1:3], H, *features)
