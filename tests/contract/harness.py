"""Running a mechanism, its gradients and its definition, for the contract's tests."""

import collections
import dataclasses
import functools
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
from evaluator import evaluated
from mechanisms import MECHANISMS
from table import Mechanism

from cases import numpy_normal


def inputs(mechanism, sizes, dtype="float32", seed=0):
    """Random arguments and random cotangents of everything `run` returns, as NumPy arrays."""
    # crc32, for str's own hash changes from process to process.
    random = np.random.default_rng([seed, zlib.crc32(mechanism.name.encode())])
    normal = numpy_normal(random)
    args = mechanism.make(sizes, normal, jnp.dtype(dtype))
    outputs = normal(*(sizes[n] for n in mechanism.outputs[0].split())).astype(dtype)
    # The state that is returned is like the one that is given.
    state = jax.tree.map(
        lambda x: normal(*x.shape).astype(x.dtype) if is_float(x) else np.zeros_like(x),
        args[mechanism.state[0]],
    )
    return args, (outputs, state)


def shapes(mechanism, sizes, dtype="float32"):
    """The shapes and dtypes of the arguments."""
    args, _ = inputs(mechanism, sizes, dtype)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)


def one_segment(implementation, sizes):
    """Segment ids for rows that are one segment each; None at full size.

    With them the program is that of packed rows, and need not be compiled without. Golden vectors,
    other sizes and low precision of "xla" and the definition are run without ids.
    """
    if sizes is implementation.full:
        return None
    return np.zeros((sizes["B"], sizes["T"]), np.int32)


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def upcast(tree):
    return with_floats(tree, [x.astype(jnp.float32) for x in floats(tree)])


def floats(tree):
    """The leaves that have gradients; a position in a state, an integer, has none."""
    return [x for x in jax.tree.leaves(tree) if is_float(x)]


def with_floats(tree, leaves):
    """`tree` with these in the place of its `floats`."""
    leaves = iter(leaves)
    return jax.tree.map(lambda x: next(leaves) if is_float(x) else x, tree)


def on_floats(run, args):
    """`run(args)` as a function from the `floats` of its arguments to those of what it returns."""
    return lambda leaves: floats(run(with_floats(args, leaves)))


def with_gradients(run, args, cotangents):
    """What `run(args)` returns, and the cotangent of `args`; that of an integer is zeros."""

    def both(leaves):
        outputs = run(with_floats(args, leaves))
        return floats(outputs), outputs

    _, pull, outputs = jax.vjp(both, floats(args), has_aux=True)
    return outputs, with_floats(jax.tree.map(jnp.zeros_like, args), *pull(floats(cotangents)))


def evaluated_if_interpreted(implementation, jitted):
    """The jitted function; around interpreted kernels, NumPy evaluates it.

    XLA would compile what is around them for seconds, and it runs once or twice. On a GPU, and in
    the tests of norms, gates, convolutions and states over devices, it does compile it.
    """
    return evaluated(jitted) if implementation.interpreted else jitted


@functools.cache
def _forward(name, implementation):
    run = {m.name: m.run for m in MECHANISMS}[name]
    return jax.jit(
        lambda args, segment_ids: run(
            **args, segment_ids=segment_ids, implementation=implementation
        )
    )


@functools.cache
def _value_and_vjp(name, implementation):
    forward = _forward(name, implementation)

    def both(args, cotangents, segment_ids):
        return with_gradients(lambda a: forward(a, segment_ids), args, cotangents)

    return jax.jit(both)


def forward(mechanism, implementation, args, segment_ids=None):
    """What `run` returns.

    Kernels have a forward pass of their own for what is not differentiated. Elsewhere it is the
    program of `value_and_vjp`, so that XLA does not compile the forward pass once more.
    """
    with implementation.context():
        if not implementation.linearizes:
            run = _forward(mechanism.name, implementation.name)
            run = evaluated_if_interpreted(implementation, run)
            return jax.device_get(run(args, segment_ids))
        sizes = {}
        jax.tree.map(
            lambda axes, x: sizes.update(zip(axes.split(), x.shape, strict=True)),
            {name: mechanism.axes[name] for name in args},
            args,
        )
        o = np.zeros([sizes[letter] for letter in mechanism.outputs[0].split()], args["q"].dtype)
        cotangents = o, jax.tree.map(np.zeros_like, args[mechanism.state[0]])
        run = _value_and_vjp(mechanism.name, implementation.name)
        return jax.device_get(run(args, cotangents, segment_ids)[0])


def value_and_vjp(
    mechanism, implementation, args, cotangents, segment_ids=None, *, compiled=True
):  # fmt: skip
    """What `run` returns, and the cotangent of every argument; `compiled` where XLA may."""
    with implementation.context():
        run = _value_and_vjp(mechanism.name, implementation.name)
        # XLA compiles the definition for `forward`, and products of 16 bits for MesaNet: what it
        # makes of them in the others is the same.
        narrow = args["q"].dtype.itemsize == 2 and mechanism.name != "mesa"
        once = not compiled or implementation.interpreted or implementation.name == "reference"
        once = once or (implementation.name == "xla" and narrow)
        run = evaluated(run) if once else run
        return jax.device_get(run(args, cotangents, segment_ids))


def definition(mechanism, args, cotangents, segment_ids=None):
    """As `value_and_vjp`, by the reference on the same arguments in float32.

    Evaluated with NumPy: each size would take XLA seconds to compile.
    """
    run = evaluated(_value_and_vjp(mechanism.name, "reference"))
    return jax.device_get(run(upcast(args), upcast(cotangents), segment_ids))


@dataclasses.dataclass(frozen=True)
class Case:
    """A mechanism's arguments and cotangents, and what an implementation makes of them."""

    mechanism: Mechanism
    args: dict
    cotangents: tuple
    got: tuple
    segment_ids: np.ndarray | None = None

    @functools.cached_property
    def want(self):
        """What the definition makes of them."""
        return definition(self.mechanism, self.args, self.cotangents, self.segment_ids)


_cases = collections.OrderedDict()


def case(mechanism, implementation, sizes, dtype=None):
    """The `Case` of the first seed. Tests share it: it is run once for all of them."""
    dtype = dtype or implementation.dtypes[0]
    key = mechanism.name, implementation.name, tuple(sizes.items()), dtype
    if key not in _cases:
        args, cotangents = inputs(mechanism, sizes, dtype)
        shared = sizes is implementation.sizes and dtype == implementation.dtypes[0]
        ids = one_segment(implementation, sizes) if shared else None
        got = value_and_vjp(mechanism, implementation, args, cotangents, ids)
        _cases[key] = Case(mechanism, args, cotangents, got, ids)
        if len(_cases) > 6:  # at full size each takes a gigabyte
            _cases.popitem(last=False)
    return _cases[key]


def error(got, want):
    """Relative Frobenius error; a norm below 1e-10 counts as 1e-10."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = np.linalg.norm(want)
    return np.linalg.norm(got - want) / max(scale, 1e-10)


def assert_close(got, want, tolerance):
    """Every leaf is finite and as near to the wanted one as the tolerance says; integers equal."""
    chex.assert_tree_all_finite(got)
    errors = jax.tree.map(error, got, want)
    assert max(jax.tree.leaves(errors)) <= tolerance, errors
    exact = jax.tree.map(lambda x, e: e if not is_float(x) else 0.0, got, errors)
    assert not any(jax.tree.leaves(exact)), exact


def assert_agrees(mechanism, dtype, got, want):
    """Values and gradients, each a tree as the definition's, within the dtype's tolerances."""
    for ours, theirs, tolerance in zip(got, want, mechanism.tolerances[dtype], strict=True):
        assert_close(ours, theirs, tolerance)


def assert_same_bits(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want
    )


def cut(mechanism, args, start, stop):
    """The tokens start to stop of the tokenwise arguments; the others as they are."""
    tokenwise = mechanism.tokenwise()
    return {n: x[:, start:stop] if n in tokenwise else x for n, x in args.items()}
