"""Evaluates a jaxpr with NumPy, equation by equation: nothing is lowered, and nothing compiled.

For what runs once or twice and took XLA longer to compile than to run: interpreted kernels, each a
program of a thousand callbacks on small arrays, and the definitions at a test's own sizes. What has
no rule here is run by JAX, one operation at a time.
"""

import functools
import threading

import jax
import numpy as np
from jax._src import core
from jax._src.random import prng
from rules import RULES, rule

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
        make = make or RULES.get(name)
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


def _closed(closed, looking=False):
    run = _program(closed.jaxpr, looking)
    return lambda *args: run(closed.consts, args)


@rule("jit", "pjit")
def _jit(*, jaxpr, **_):
    return _closed(jaxpr)


@rule("custom_jvp_call", "custom_vjp_call", "eval_jaxpr")
def _call(*, call_jaxpr, **_):
    return _closed(call_jaxpr)


@rule("remat2", "checkpoint")
def _remat(*, jaxpr, **_):
    run = _program(jaxpr)
    return lambda *args: run((), args)


# JAX, too, calls these one operation at a time.
_LOOKED_INTO = dict.fromkeys(
    ("custom_jvp_call", "custom_vjp_call"),
    lambda *, call_jaxpr, **_: _closed(call_jaxpr, looking=True),
)


@rule("custom_partitioning", "custom_vmap_call")
def _custom(*, call, **_):
    return _closed(call)


@rule("custom_linear_solve")
def _custom_linear_solve(*, const_lengths, jaxprs, **_):
    solve, count = _closed(jaxprs.solve), sum(const_lengths)
    start = const_lengths.matvec + const_lengths.vecmat
    consts = slice(start, start + const_lengths.solve)
    return lambda *operands: solve(*operands[consts], *operands[count:])


@rule("io_callback", "pure_callback")
def _io_callback(*, callback, **_):
    # Copies: what is read from a buffer must not change with it.
    return lambda *operands: [np.array(x) for x in callback(*operands)]


@rule("optimization_barrier")
def _barrier(**_):
    return lambda *operands: operands


@rule("cond")
def _cond(*, branches, **_):
    branches = [_closed(x) for x in branches]
    last = len(branches) - 1
    return lambda index, *operands: branches[min(max(int(index), 0), last)](*operands)


def _like(mask, x):
    return mask.reshape(mask.shape + (1,) * (np.ndim(x) - mask.ndim))


@rule("while")
def _while(*, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr, **_):
    condition, body = _closed(cond_jaxpr), _closed(body_jaxpr)

    def run(*operands):
        of_condition, rest = operands[:cond_nconsts], operands[cond_nconsts:]
        of_body, carry = rest[:body_nconsts], rest[body_nconsts:]
        # Under vmap each has a condition of its own, and those that have ended stay as they are.
        while np.any(goes_on := np.asarray(condition(*of_condition, *carry)[0])):
            after = body(*of_body, *carry)
            if goes_on.ndim:
                after = [
                    np.where(_like(goes_on, x), x, y) for x, y in zip(after, carry, strict=True)
                ]
            carry = after
        return carry

    return run


@rule("scan")
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


@rule("random_bits")
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


@rule("reduce_precision")
def _reduce_precision(**params):
    by_jax = _by_jax(jax.lax.reduce_precision_p, params)
    bfloat16 = params == dict(exponent_bits=8, mantissa_bits=7)

    def run(x):
        if bfloat16 and x.dtype == np.float32:
            return x.astype(jax.numpy.bfloat16).astype(x.dtype)
        return by_jax(x)

    return run
