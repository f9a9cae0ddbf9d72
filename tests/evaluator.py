"""Evaluates a jaxpr with NumPy, equation by equation: nothing is lowered, and nothing compiled.

For what runs once or twice and took XLA longer to compile than to run: interpreted kernels, each a
program of a thousand callbacks on small arrays, and the definitions at a test's own sizes. What has
no rule here is run by JAX, one operation at a time.
"""

import functools
import math
import threading

import jax
import numpy as np
from jax._src import core
from jax._src.random import prng

_RULES = {}
_KERNELS = "mpmd_map", "pallas_call"  # JAX interprets them, see interpreter.py
_building = threading.Lock()
_flushing = False  # see assert_no_nan


def evaluate(jaxpr, consts, args):
    """What the jaxpr returns for these constants and arguments: a list of NumPy arrays."""
    with _building:  # threads wait for the first
        run = _program(jaxpr)
    with np.errstate(all="ignore"):
        return run(consts, args)


def evaluated(jitted):
    """The jitted function without its compilation, for small arrays: on a GPU, where tests have
    large ones, it stays as it is."""
    if jax.default_backend() == "gpu":
        return jitted

    def run(*args, **named):
        traced = jitted.trace(*args, **named)
        leaves = jax.tree.leaves((args, named))
        values = evaluate(traced.jaxpr.jaxpr, traced.jaxpr.consts, leaves)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), values)

    return run


def assert_no_nan(function, *args):
    """What JAX's debug_nans does where a function is not jitted: it looks at all that is computed,
    but not into functions that are jitted. As XLA does, it takes the smallest numbers for zero."""
    global _flushing
    closed = jax.make_jaxpr(function)(*args)
    with _building:
        run = _program(closed.jaxpr, looking=True)
    _flushing = True
    try:
        with np.errstate(all="ignore"):
            run(closed.consts, jax.tree.leaves(args))
    finally:
        _flushing = False


# A kernel's threads and the steps of its grid share one program; so do all runs of one function.
@functools.lru_cache(maxsize=2048)
def _program(jaxpr, looking=False):
    """The jaxpr as a function of its constants and its arguments."""
    places, values = {}, []  # each variable has a place in a list of values

    def place(var):
        if var not in places:
            places[var] = len(values)
            values.append(None)
        return places[var]

    def read(atom):
        if not isinstance(atom, core.Literal):
            return places[atom]
        values.append(np.asarray(atom.val, atom.aval.dtype))
        return len(values) - 1

    inputs = [place(var) for var in (*jaxpr.constvars, *jaxpr.invars)]
    steps = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        make = _LOOKED_INTO.get(name) if looking else None
        make = make or _RULES.get(name)
        run = make(**eqn.params) if make else _by_jax(eqn.primitive, eqn.params)
        if not eqn.primitive.multiple_results:
            run = _several(run)
        if looking:
            run = _without_nan(run, eqn)
        operands = [read(x) for x in eqn.invars]
        steps.append((run, operands, [place(var) for var in eqn.outvars]))
    results = [read(x) for x in jaxpr.outvars]

    def run(consts, args):
        known = values.copy()
        for i, x in zip(inputs, (*consts, *args), strict=True):
            known[i] = _array(x) if hasattr(x, "dtype") else np.asarray(x)
        for step, operands, outputs in steps:
            for i, x in zip(outputs, step(*[known[i] for i in operands]), strict=True):
                known[i] = _flushed(x) if _flushing else x
        return [known[i] for i in results]

    return run


def _several(run):
    return lambda *operands: (run(*operands),)


def _without_nan(run, eqn):
    def looked_at(*operands):
        results = run(*operands)
        for x in results:
            floating = jax.dtypes.issubdtype(x.dtype, np.floating)
            assert not (floating and np.isnan(x).any()), f"NaN of {eqn}"
        return results

    return looked_at


def _flushed(x):
    """Numbers below the smallest normal one are zero, as in XLA's programs."""
    if x.dtype not in (np.float32, jax.numpy.bfloat16):
        return x
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.zeros_like(x), x)


def _array(x):
    """Of NumPy, but for the keys of random numbers."""
    return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x)


def _by_jax(primitive, params):
    params = primitive.get_bind_params(params)
    if primitive.name in _KERNELS:  # or each call would trace it anew
        bind = jax.jit(functools.partial(primitive.bind, **params))
        return lambda *operands: jax.tree.map(_array, bind(*operands))

    def run(*operands):
        with jax.enable_x64(True):  # an operand's dtype stays what it is
            return jax.tree.map(_array, primitive.bind(*operands, **params))

    return run


def _rule(*names):
    """Registers a function from an equation's parameters to a function of its operands."""

    def register(make):
        _RULES.update(dict.fromkeys(names, make))
        return make

    return register


def _closed(closed, looking=False):
    run = _program(closed.jaxpr, looking)
    return lambda *args: run(closed.consts, args)


@_rule("jit", "pjit")
def _jit(*, jaxpr, **_):
    return _closed(jaxpr)


@_rule("custom_jvp_call", "custom_vjp_call", "eval_jaxpr")
def _call(*, call_jaxpr, **_):
    return _closed(call_jaxpr)


@_rule("remat2", "checkpoint")
def _remat(*, jaxpr, **_):
    run = _program(jaxpr)
    return lambda *args: run((), args)


# JAX, too, calls these one operation at a time.
_LOOKED_INTO = dict.fromkeys(
    ("custom_jvp_call", "custom_vjp_call"),
    lambda *, call_jaxpr, **_: _closed(call_jaxpr, looking=True),
)


@_rule("custom_partitioning", "custom_vmap_call")
def _custom(*, call, **_):
    return _closed(call)


@_rule("custom_linear_solve")
def _custom_linear_solve(*, const_lengths, jaxprs, **_):
    solve, count = _closed(jaxprs.solve), sum(const_lengths)
    start = const_lengths.matvec + const_lengths.vecmat
    consts = slice(start, start + const_lengths.solve)
    return lambda *operands: solve(*operands[consts], *operands[count:])


@_rule("io_callback", "pure_callback")
def _io_callback(*, callback, **_):
    # Copies: what is read from a buffer must not change with it.
    return lambda *operands: [np.array(x) for x in callback(*operands)]


@_rule("optimization_barrier")
def _barrier(**_):
    return lambda *operands: operands


@_rule("cond")
def _cond(*, branches, **_):
    branches = [_closed(x) for x in branches]
    last = len(branches) - 1
    return lambda index, *operands: branches[min(max(int(index), 0), last)](*operands)


@_rule("while")
def _while(*, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr, **_):
    condition, body = _closed(cond_jaxpr), _closed(body_jaxpr)

    def run(*operands):
        of_condition, rest = operands[:cond_nconsts], operands[cond_nconsts:]
        of_body, carry = rest[:body_nconsts], rest[body_nconsts:]
        while condition(*of_condition, *carry)[0]:
            carry = body(*of_body, *carry)
        return carry

    return run


@_rule("scan")
def _scan(*, length, reverse, jaxpr, ft_in, **_):
    body = _closed(jaxpr)
    num_consts, num_carry, _ = map(len, ft_in.unpack())

    def run(*operands):
        consts, rest = operands[:num_consts], operands[num_consts:]
        carry, xs, ys = rest[:num_carry], rest[num_carry:], [None] * length
        for i in range(length)[:: -1 if reverse else 1]:
            out = body(*consts, *carry, *(x[i] for x in xs))
            carry, ys[i] = out[:num_carry], out[num_carry:]
        return [*carry, *(np.stack(y) for y in zip(*ys, strict=True))]

    return run


_OF_NUMPY = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "eq": np.equal,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "ge": np.greater_equal,
    "gt": np.greater,
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
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": lambda x: x,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}


def _of_numpy(function):
    def make(*, out_dtype=None, **_):
        if out_dtype is None:
            return function
        return lambda *operands: function(*operands).astype(out_dtype)

    return make


_RULES.update({name: _of_numpy(function) for name, function in _OF_NUMPY.items()})


@_rule("integer_pow")
def _integer_pow(*, y, **_):
    return lambda x: np.power(x, np.asarray(y, x.dtype))


@_rule("select_n")
def _select_n(**_):
    def run(which, *cases):
        return np.where(which, *cases[::-1]) if len(cases) == 2 else np.choose(which, cases)

    return run


@_rule("div")
def _div(**_):
    def run(x, y):
        if x.dtype.kind in "iu":  # towards zero
            return (x - np.fmod(x, y)) // y
        return x / y

    return run


@_rule("shift_right_logical")
def _shift_right_logical(**_):
    def run(x, n):
        unsigned = f"u{x.dtype.itemsize}"
        return np.right_shift(x.view(unsigned), n.view(unsigned)).view(x.dtype)

    return run


@_rule("convert_element_type")
def _convert_element_type(*, new_dtype, **_):
    def run(x):
        if np.dtype(new_dtype).kind in "iu" and x.dtype.kind not in "iub":
            # NumPy does not say what becomes of a number beyond the range.
            return np.asarray(jax.lax.convert_element_type(x, new_dtype))
        return x.astype(new_dtype)

    return run


@_rule("bitcast_convert_type")
def _bitcast_convert_type(*, new_dtype, **_):
    return lambda x: x.view(new_dtype)


@_rule("broadcast_in_dim")
def _broadcast_in_dim(*, shape, broadcast_dimensions, **_):
    def run(x):
        sizes = dict(zip(broadcast_dimensions, x.shape, strict=True))
        return np.broadcast_to(x.reshape([sizes.get(i, 1) for i in range(len(shape))]), shape)

    return run


@_rule("reshape")
def _reshape(*, new_sizes, **_):
    return lambda x: x.reshape(new_sizes)


@_rule("squeeze")
def _squeeze(*, dimensions, **_):
    return lambda x: x.squeeze(dimensions)


@_rule("transpose")
def _transpose(*, permutation, **_):
    return lambda x: x.transpose(permutation)


@_rule("slice")
def _slice(*, start_indices, limit_indices, strides, **_):
    strides = strides or (1,) * len(start_indices)
    place = tuple(map(slice, start_indices, limit_indices, strides))
    return lambda x: x[place]


@_rule("dynamic_slice")
def _dynamic_slice(*, slice_sizes, **_):
    def run(x, *starts):
        rows = zip(map(int, starts), x.shape, slice_sizes, strict=True)
        starts = [min(max(start, 0), n - size) for start, n, size in rows]
        ends = [start + size for start, size in zip(starts, slice_sizes, strict=True)]
        return x[tuple(map(slice, starts, ends))]

    return run


@_rule("concatenate")
def _concatenate(*, dimension, **_):
    return lambda *xs: np.concatenate(xs, dimension)


@_rule("stack")
def _stack(*, axis, **_):
    return lambda *xs: np.stack(xs, axis)


@_rule("iota")
def _iota(*, dtype, shape, dimension, **_):
    line = np.arange(shape[dimension], dtype=dtype)
    line = line.reshape([-1 if i == dimension else 1 for i in range(len(shape))])
    made = np.broadcast_to(line, shape)
    return lambda: made


@_rule("pad")
def _pad(*, padding_config, **_):
    if any(inner for _, _, inner in padding_config):
        return _by_jax(jax.lax.pad_p, dict(padding_config=padding_config))
    ends = [(low, high) for low, high, _ in padding_config]
    # Not np.pad, which takes long on small arrays. A negative width cuts.
    inside = tuple(slice(max(low, 0), -max(high, 0) or None) for low, high in ends)
    kept = tuple(slice(max(-low, 0), -max(-high, 0) or None) for low, high in ends)

    def run(x, value):
        shape = [n + low + high for n, (low, high) in zip(x.shape, ends, strict=True)]
        padded = np.full(shape, value, x.dtype)
        padded[inside] = x[kept]
        return padded

    return run


@_rule("dynamic_update_slice")
def _dynamic_update_slice(**_):
    def run(x, update, *starts):
        rows = zip(map(int, starts), x.shape, update.shape, strict=True)
        starts = [min(max(start, 0), n - size) for start, n, size in rows]
        ends = [start + size for start, size in zip(starts, update.shape, strict=True)]
        x = x.copy()
        x[tuple(map(slice, starts, ends))] = update
        return x

    return run


@_rule("rev")
def _rev(*, dimensions, **_):
    return lambda x: np.flip(x, dimensions)


@_rule("split")
def _split(*, sizes, axis, **_):
    borders = np.cumsum(sizes)[:-1]
    return lambda x: np.split(x, borders, axis)


def _reduction(function):
    return lambda *, axes, **_: lambda x: function(x, axes)


_RULES.update(
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


_RULES.update(cummax=_cumulative(np.maximum.accumulate), cummin=_cumulative(np.minimum.accumulate))


@_rule("reduce_sum")
def _reduce_sum(*, axes, **_):
    def run(x):
        wide = np.float32 if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x.dtype
        return np.sum(x, axes, dtype=wide).astype(x.dtype)

    return run


@_rule("dot_general")
def _dot_general(*, dimension_numbers, preferred_element_type, **_):
    inner, batch = dimension_numbers

    def matrices(x, inner, batch, left):
        """As one matrix for each place of `batch`, and the sizes of the other axes."""
        outer = [i for i in range(x.ndim) if i not in (*inner, *batch)]
        order = (*batch, *outer, *inner) if left else (*batch, *inner, *outer)
        depth = math.prod(x.shape[i] for i in inner)
        shape = [x.shape[i] for i in batch] + ([-1, depth] if left else [depth, -1])
        wide = x.astype(np.float32) if x.dtype.itemsize == 2 else x
        return wide.transpose(order).reshape(shape), [x.shape[i] for i in outer]

    def run(x, y):
        dtype = preferred_element_type or x.dtype
        sizes = [x.shape[i] for i in batch[0]]
        x, rows = matrices(x, inner[0], batch[0], True)
        y, columns = matrices(y, inner[1], batch[1], False)
        return np.matmul(x, y).reshape(*sizes, *rows, *columns).astype(dtype)

    return run


@_rule("threefry2x32")
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


@_rule("iota_2x32_shape")
def _iota_2x32_shape(*, shape):
    numbers = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    made = (numbers >> np.uint64(32)).astype(np.uint32), numbers.astype(np.uint32)
    return lambda: made


@_rule("random_bits")
def _random_bits(**params):
    @functools.cache
    def program(impl, shape):
        """What JAX makes of the keys' numbers."""

        def bits(numbers):
            return prng.random_bits_impl_base(impl, numbers, len(shape) - 1, **params)

        return jax.make_jaxpr(bits)(np.zeros(shape, np.uint32))

    def run(keys):
        numbers = np.asarray(jax.random.key_data(keys))
        return _closed(program(keys.dtype._impl, numbers.shape))(numbers)[0]

    return run
