"""What NumPy does for each of JAX's operations on arrays; see evaluator.py."""

import math

import jax
import numpy as np
import scipy.linalg
import scipy.special
from jax.lax import GatherScatterMode

RULES = {}


def rule(*names):
    """Registers a function from an equation's parameters to a function of its operands."""

    def register(make):
        RULES.update(dict.fromkeys(names, make))
        return make

    return register


def _wide(x):
    narrow = x.dtype.itemsize == 2 and x.dtype.kind not in "iu"
    return x.astype(np.float32) if narrow else x


def _leading_zeros(x):
    dtype, bits, x = x.dtype, 8 * x.itemsize, x.view(f"u{x.itemsize}")
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | x >> min(shift, bits - 1)
    return (bits - np.bitwise_count(x)).astype(dtype)


_OF_NUMPY = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "ceil": np.ceil,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "clz": _leading_zeros,
    "cos": np.cos,
    "eq": np.equal,
    "erf_inv": lambda x: scipy.special.erfinv(_wide(x)).astype(x.dtype),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "lt": np.less,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.bitwise_not,
    "name": lambda x: x,
    "or": np.bitwise_or,
    "population_count": lambda x: np.bitwise_count(x.view(f"u{x.itemsize}")).astype(x.dtype),
    "rem": np.fmod,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "shift_left": np.left_shift,
    "shift_right_arithmetic": np.right_shift,
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": lambda x: x,
    "sub": np.subtract,
    "tanh": np.tanh,
    "xor": np.bitwise_xor,
}


def _of_numpy(function):
    def make(*, out_dtype=None, **_):
        if out_dtype is None:
            return function
        return lambda *operands: function(*operands).astype(out_dtype)

    return make


RULES.update({name: _of_numpy(function) for name, function in _OF_NUMPY.items()})


@rule("integer_pow")
def _integer_pow(*, y, **_):
    return lambda x: np.power(x, np.asarray(y, x.dtype))


@rule("select_n")
def _select_n(**_):
    def run(which, *cases):
        return np.where(which, *cases[::-1]) if len(cases) == 2 else np.choose(which, cases)

    return run


@rule("div")
def _div(**_):
    def run(x, y):
        if x.dtype.kind in "iu":  # towards zero
            return (x - np.fmod(x, y)) // y
        return x / y

    return run


@rule("shift_right_logical")
def _shift_right_logical(**_):
    def run(x, n):
        unsigned = f"u{x.dtype.itemsize}"
        return np.right_shift(x.view(unsigned), n.view(unsigned)).view(x.dtype)

    return run


@rule("convert_element_type")
def _convert_element_type(*, new_dtype, **_):
    def run(x):
        if np.dtype(new_dtype).kind in "iu" and x.dtype.kind not in "iub":
            # NumPy does not say what becomes of a number beyond the range.
            return np.asarray(jax.lax.convert_element_type(x, new_dtype))
        return x.astype(new_dtype)

    return run


@rule("bitcast_convert_type")
def _bitcast_convert_type(*, new_dtype, **_):
    return lambda x: x.view(new_dtype)


@rule("broadcast_in_dim")
def _broadcast_in_dim(*, shape, broadcast_dimensions, **_):
    def run(x):
        sizes = dict(zip(broadcast_dimensions, x.shape, strict=True))
        return np.broadcast_to(x.reshape([sizes.get(i, 1) for i in range(len(shape))]), shape)

    return run


@rule("reshape")
def _reshape(*, new_sizes, **_):
    return lambda x: x.reshape(new_sizes)


@rule("squeeze")
def _squeeze(*, dimensions, **_):
    return lambda x: x.squeeze(dimensions)


@rule("transpose")
def _transpose(*, permutation, **_):
    return lambda x: x.transpose(permutation)


@rule("slice")
def _slice(*, start_indices, limit_indices, strides, **_):
    strides = strides or (1,) * len(start_indices)
    place = tuple(map(slice, start_indices, limit_indices, strides))
    return lambda x: x[place]


@rule("dynamic_slice")
def _dynamic_slice(*, slice_sizes, **_):
    def run(x, *starts):
        rows = zip(map(int, starts), x.shape, slice_sizes, strict=True)
        starts = [min(max(start, 0), n - size) for start, n, size in rows]
        ends = [start + size for start, size in zip(starts, slice_sizes, strict=True)]
        return x[tuple(map(slice, starts, ends))]

    return run


@rule("concatenate")
def _concatenate(*, dimension, **_):
    return lambda *xs: np.concatenate(xs, dimension)


@rule("stack")
def _stack(*, axis, **_):
    return lambda *xs: np.stack(xs, axis)


@rule("iota")
def _iota(*, dtype, shape, dimension, **_):
    line = np.arange(shape[dimension], dtype=dtype)
    line = line.reshape([-1 if i == dimension else 1 for i in range(len(shape))])
    made = np.broadcast_to(line, shape)
    return lambda: made


@rule("pad")
def _pad(*, padding_config, **_):
    ends = [(low, high) for low, high, _ in padding_config]
    between = [inner for *_, inner in padding_config]
    # Not np.pad, which takes long on small arrays. A negative width cuts.
    inside = tuple(slice(max(low, 0), -max(high, 0) or None) for low, high in ends)
    kept = tuple(slice(max(-low, 0), -max(-high, 0) or None) for low, high in ends)

    def run(x, value):
        if any(between):
            sizes = [n + max(n - 1, 0) * inner for n, inner in zip(x.shape, between, strict=True)]
            wide = np.full(sizes, value, x.dtype)
            wide[tuple(slice(None, None, inner + 1) for inner in between)] = x
            x = wide
        shape = [n + low + high for n, (low, high) in zip(x.shape, ends, strict=True)]
        padded = np.full(shape, value, x.dtype)
        padded[inside] = x[kept]
        return padded

    return run


@rule("dynamic_update_slice")
def _dynamic_update_slice(**_):
    def run(x, update, *starts):
        rows = zip(map(int, starts), x.shape, update.shape, strict=True)
        starts = [min(max(start, 0), n - size) for start, n, size in rows]
        ends = [start + size for start, size in zip(starts, update.shape, strict=True)]
        x = x.copy()
        x[tuple(map(slice, starts, ends))] = update
        return x

    return run


@rule("rev")
def _rev(*, dimensions, **_):
    return lambda x: np.flip(x, dimensions)


@rule("split")
def _split(*, sizes, axis, **_):
    borders = np.cumsum(sizes)[:-1]
    return lambda x: np.split(x, borders, axis)


def _reduction(function):
    return lambda *, axes, **_: lambda x: function(x, axes)


RULES.update(
    reduce_and=_reduction(np.logical_and.reduce),
    reduce_max=_reduction(np.max),
    reduce_or=_reduction(np.logical_or.reduce),
)


def _cumulative(function):
    def make(*, axis, reverse, **_):
        def run(x):
            if reverse:
                return np.flip(function(np.flip(x, axis), axis), axis)
            return function(x, axis)

        return run

    return make


def _sums(x, axis):
    wide = _wide(x)
    return np.cumsum(wide, axis, dtype=wide.dtype).astype(x.dtype)


RULES.update(cumsum=_cumulative(_sums))
RULES.update(cummax=_cumulative(np.maximum.accumulate), cummin=_cumulative(np.minimum.accumulate))


@rule("reduce_sum")
def _reduce_sum(*, axes, **_):
    def run(x):
        wide = np.float32 if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x.dtype
        return np.sum(x, axes, dtype=wide).astype(x.dtype)

    return run


@rule("dot_general")
def _dot_general(*, dimension_numbers, preferred_element_type, **_):
    inner, batch = dimension_numbers

    def matrices(x, inner, batch, left):
        """As one matrix for each place of `batch`, and the sizes of the other axes."""
        outer = [i for i in range(x.ndim) if i not in (*inner, *batch)]
        order = (*batch, *outer, *inner) if left else (*batch, *inner, *outer)
        depth = math.prod(x.shape[i] for i in inner)
        shape = [x.shape[i] for i in batch] + ([-1, depth] if left else [depth, -1])
        return _wide(x).transpose(order).reshape(shape), [x.shape[i] for i in outer]

    def run(x, y):
        dtype = preferred_element_type or x.dtype
        sizes = [x.shape[i] for i in batch[0]]
        x, rows = matrices(x, inner[0], batch[0], True)
        y, columns = matrices(y, inner[1], batch[1], False)
        return np.matmul(x, y).reshape(*sizes, *rows, *columns).astype(dtype)

    return run


@rule("threefry2x32")
def _threefry2x32(**_):
    """JAX's random bits: XLA compiles them for each array that is drawn."""

    def run(key, other, x, y):
        keys = key, other, key ^ other ^ np.uint32(0x1BD11BDA)
        x, y = x + keys[0], y + keys[1]
        for i in range(1, 6):
            for left in (13, 15, 26, 6) if i % 2 else (17, 29, 16, 24):
                x = x + y
                y = x ^ (y << np.uint32(left) | y >> np.uint32(32 - left))
            x, y = x + keys[i % 3], y + keys[(i + 1) % 3] + np.uint32(i)
        return x, y

    return run


@rule("iota_2x32_shape")
def _iota_2x32_shape(*, shape):
    numbers = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    made = (numbers >> np.uint64(32)).astype(np.uint32), numbers.astype(np.uint32)
    return lambda: made


@rule("unstack")
def _unstack(*, axis):
    return lambda x: list(np.moveaxis(x, axis, 0))


@rule("empty")
def _empty(*, shape, dtype, **_):
    return lambda: np.zeros(shape, dtype)


def _starts(indices, rank, axes, batching, batching_of_indices):
    """Where the windows of a gather or scatter begin: for each axis an array, one place a window.

    The last axis of `indices` is along `axes`; windows of a place in a batch are in that place.
    """
    windows = indices.shape[:-1]
    starts = [np.zeros(windows, np.int64)] * rank
    for i, axis in enumerate(axes):
        starts[axis] = indices[..., i].astype(np.int64)
    for axis, i in zip(batching, batching_of_indices, strict=True):
        starts[axis] = np.indices(windows)[i]
    return starts


def _places(starts, sizes, kept):
    """What takes the windows out of an array, [windows, places in one]: those of the kept axes."""
    lines = np.ogrid[tuple(slice(sizes[axis]) for axis in kept)] if kept else ()
    offsets = dict(zip(kept, lines, strict=True))
    behind = (..., *[None] * len(kept))
    return tuple(start[behind] + offsets.get(axis, 0) for axis, start in enumerate(starts))


def _inside(starts, shape, sizes):
    return np.logical_and.reduce(
        [(0 <= x) & (x <= n - m) for x, n, m in zip(starts, shape, sizes, strict=True)]
    )


def _moved_inside(starts, shape, sizes):
    return [np.clip(x, 0, n - m) for x, n, m in zip(starts, shape, sizes, strict=True)]


@rule("gather")
def _gather(*, dimension_numbers, slice_sizes, mode, fill_value, **_):
    d = dimension_numbers
    gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    kept = [axis for axis in range(len(slice_sizes)) if axis not in gone]
    fills = mode == GatherScatterMode.FILL_OR_DROP

    def run(x, indices):
        batching = d.operand_batching_dims, d.start_indices_batching_dims
        starts = _starts(indices, x.ndim, d.start_index_map, *batching)
        inside = _inside(starts, x.shape, slice_sizes)
        found = x[_places(_moved_inside(starts, x.shape, slice_sizes), slice_sizes, kept)]
        if fills:
            found = np.where(inside[(..., *[None] * len(kept))], found, _fill(x, fill_value))
        windows = range(inside.ndim, inside.ndim + len(kept))
        return np.moveaxis(found, windows, d.offset_dims)

    return run


def _fill(x, value):
    if value is None:
        value = np.iinfo(x.dtype).min if x.dtype.kind == "i" else np.nan
        value = np.iinfo(x.dtype).max if x.dtype.kind == "u" else value
    return np.asarray(value, x.dtype)


def _scatter(put):
    def make(*, dimension_numbers, mode, **_):
        d = dimension_numbers
        gone = (*d.inserted_window_dims, *d.operand_batching_dims)

        def run(x, indices, updates):
            kept = [axis for axis in range(x.ndim) if axis not in gone]
            windows = range(updates.ndim - len(kept), updates.ndim)
            updates = np.moveaxis(updates, d.update_window_dims, windows)
            sizes = dict(zip(kept, updates.shape[updates.ndim - len(kept) :], strict=True))
            sizes = [sizes.get(axis, 1) for axis in range(x.ndim)]
            batching = d.operand_batching_dims, d.scatter_indices_batching_dims
            starts = _starts(indices, x.ndim, d.scatter_dims_to_operand_dims, *batching)
            inside = _inside(starts, x.shape, sizes)
            if mode == GatherScatterMode.CLIP:
                starts, inside = _moved_inside(starts, x.shape, sizes), np.ones_like(inside)
            out = _wide(x).copy()
            places = _places([start[inside] for start in starts], sizes, kept)
            put(out, places, updates[inside].astype(out.dtype))
            return out.astype(x.dtype)

        return run

    return make


def _replace(x, places, updates):
    x[places] = updates


RULES.update({"scatter": _scatter(_replace), "scatter-add": _scatter(np.add.at)})


@rule("sort")
def _sort(*, dimension, num_keys, **_):
    def run(*operands):
        order = np.lexsort([_wide(x) for x in operands[num_keys - 1 :: -1]], dimension)
        return [np.take_along_axis(x, order, dimension) for x in operands]

    return run


@rule("lu")
def _lu(**_):
    def run(a):
        factors, pivots = a.copy(), np.zeros((*a.shape[:-2], min(a.shape[-2:])), np.int32)
        rows = np.empty((*a.shape[:-2], a.shape[-2]), np.int32)
        for i in np.ndindex(a.shape[:-2]):
            factors[i], pivots[i], _ = scipy.linalg.get_lapack_funcs("getrf", (a,))(a[i])
            rows[i] = range(a.shape[-2])
            for row, other in enumerate(pivots[i]):
                rows[i][[row, other]] = rows[i][[other, row]]
        return factors, pivots, rows

    return run


@rule("triangular_solve")
def _triangular_solve(*, left_side, lower, transpose_a, unit_diagonal, **_):
    options = dict(side=not left_side, lower=lower, trans_a=transpose_a, diag=unit_diagonal)

    def run(a, b):
        solve, x = scipy.linalg.get_blas_funcs("trsm", (a, b)), np.empty_like(b)
        for i in np.ndindex(a.shape[:-2]):
            x[i] = solve(1.0, a[i], b[i], **options)
        return x

    return run
