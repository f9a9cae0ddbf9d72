"""How the fuzzer runs a drawn call, and what it compares it with."""

import contextlib
import functools

import fuzz_layers
import jax
import jax.numpy as jnp
import numpy as np
import triton_interpreter
from fuzz_draw import TABLE, Shape, build, generator
from harness import cut, error, is_float, upcast, with_gradients

import jla

KINDS = ("values", "gradients")
# What rounding to each dtype changes at most, relative to the number.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
# A case may be off by this many times what one such rounding changes in the judge: several
# roundings lie between the arguments and the result.
ROUNDINGS = 4
# A gradient's elements count as this large at least, relative to those of the median argument,
# before an error is called a failure.
NEGLIGIBLE = 0.5


def tolerances_of(shape):
    """The largest relative error of values, and of gradients."""
    if shape.mechanism in fuzz_layers.NAMES:
        return fuzz_layers.tolerances(shape)
    return TABLE[shape.mechanism].tolerances[shape.dtype]


def judge_of(shape):
    itself = (shape.implementation, shape.dtype) == ("xla", "float32")
    return "reference" if itself else "xla"


def context_of(implementation):
    interpreters = dict(pallas=jla.pallas.interpret, triton=triton_interpreter.interpreting)
    interpreted = implementation in interpreters and jax.default_backend() == "cpu"
    return interpreters[implementation]() if interpreted else contextlib.nullcontext()


class Programs:
    """The compiled functions of a shape."""

    def __init__(self, shape):
        self.shape, self.mechanism = shape, TABLE[shape.mechanism]

    def _run(self, implementation, args, ids):
        optional = {"g": None} if "g" in self.shape.without else {}
        return self.mechanism.run(
            **args, **optional, **self.shape.options, segment_ids=ids, implementation=implementation
        )

    @functools.cached_property
    def run(self):
        return jax.jit(functools.partial(self._run, self.shape.implementation))

    @functools.cached_property
    def judge(self):
        return jax.jit(functools.partial(self._run, judge_of(self.shape)))

    def _both(self, implementation, args, ids, cotangents):
        return with_gradients(lambda a: self._run(implementation, a, ids), args, cotangents)

    @functools.cached_property
    def run_both(self):
        return jax.jit(functools.partial(self._both, self.shape.implementation))

    @functools.cached_property
    def judge_both(self):
        return jax.jit(functools.partial(self._both, judge_of(self.shape)))

    @functools.cached_property
    def steps(self):
        mechanism, shape = self.mechanism, self.shape

        @jax.jit
        def steps(state, tokens, shared):
            def token(state, now):
                optional = {"g": None} if "g" in shape.without else {}
                options = optional | shape.options | {mechanism.state[1]: state}
                implementation = shape.implementation
                o, state = mechanism.step(**now, **shared, **options, implementation=implementation)
                return state, o

            state, o = jax.lax.scan(token, state, tokens)
            return jnp.moveaxis(o, 0, 1), state

        return steps


@functools.lru_cache(maxsize=1)
def programs(text):
    return Programs(eval(text, {"Shape": Shape}))


def subject(shape, args, ids, cotangents):
    """What the implementation under test makes of a call: values, and gradients or None."""
    ours, mechanism = programs(repr(shape)), TABLE[shape.mechanism]
    if shape.check == "gradients":
        return ours.run_both(args, ids, cotangents)
    before = None if ids is None else ids[:, : shape.at]
    o, state = ours.run(cut(mechanism, args, 0, shape.at), before)
    rest = cut(mechanism, args, shape.at, None)
    if shape.check == "split":
        after = None if ids is None else ids[:, shape.at :]
        later, state = ours.run(rest | {mechanism.state[0]: state}, after)
    else:
        tokens = {n: jnp.moveaxis(rest[n], 1, 0) for n in mechanism.tokenwise() if n in rest}
        later, state = ours.steps(state, tokens, {n: args[n] for n in mechanism.shared()})
    return (jnp.concatenate([o, later], axis=1), state), None


def judgement(shape, args, ids, cotangents):
    """What `subject` should return, by the judge."""
    ours = programs(repr(shape))
    if shape.check == "gradients":
        return ours.judge_both(upcast(args), ids, upcast(cotangents))
    return ours.judge(upcast(args), ids), None


def errors(kind, got, want, floor=0.0):
    """Name of each leaf of these values or gradients to its error.

    Relative, in the Frobenius norm; and at least a fifth of the worst token's of a head, for what
    is wrong at one place is lost in the norm of thousands. Elements are taken to be as large as
    `floor` at least.
    """
    if want is None:
        return {}
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves(want)
    named = {}
    for (path, x), y in zip(got, want, strict=True):
        leaf = kind + jax.tree_util.keystr(path)
        if not is_float(y):  # a position or a length
            named[leaf] = 0.0 if np.array_equal(x, y) else np.inf
            continue
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if leaf == "values[1].levels":  # NaN in both where L levels cannot hold the state
            both = np.isnan(x) & np.isnan(y)
            x, y = np.where(both, 0, x), np.where(both, 0, y)
        # [B, T, H, ...] and [B, T, H]; of states [B, H, K, V] a head's row counts as a token.
        inner = tuple(range(3 if x.ndim > 3 else 2, x.ndim))
        off, size = (np.sqrt(np.sum(np.square(z), axis=inner)) for z in (x - y, y))
        size = np.maximum(size, floor * np.sqrt(x.size / off.size))
        place = np.max(off / np.maximum(size + np.sqrt(np.mean(np.square(size))), 1e-10)) / 5
        whole = error(x, y)
        if floor:
            whole = np.linalg.norm(off) / np.linalg.norm(size)
        named[leaf] = float(max(whole, place, key=_size))
    return named


def typical_size(gradients):
    """The root mean square of a gradient's elements, the median over all arguments."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients) if is_float(x)]
    return np.median([np.sqrt(np.mean(np.square(x))) for x in leaves]) if leaves else 0.0


def _size(error):
    """For an order in which NaN is the largest."""
    return np.inf if np.isnan(error) else error


def beyond(errors, tolerance):
    """The leaves that are not within the tolerance, which may be one number for each."""
    each = tolerance if isinstance(tolerance, dict) else dict.fromkeys(errors, tolerance)
    return [leaf for leaf, error in errors.items() if not error <= each[leaf]]


def rounded(rng, tree, dtype):
    """The numbers after a rounding in this dtype: another one for every call."""

    def change(path, x):
        if not is_float(x):
            return x
        # Gates are float32 in every implementation.
        rounding = ROUNDING["float32" if path[0] == jax.tree_util.DictKey("g") else dtype]
        x = np.asarray(x, np.float32)
        return jnp.asarray(x * (1 + rounding * rng.uniform(-1, 1, x.shape).astype(np.float32)))

    return jax.tree_util.tree_map_with_path(change, tree)


def cotangents_of(shape, content, args, ids):
    rng = generator("cotangents", content.seed)
    shapes = jax.eval_shape(programs(repr(shape)).judge, args, ids)

    def draw(x):
        numbers = rng.standard_normal(x.shape) if is_float(x) else np.zeros(x.shape)
        return jnp.asarray(numbers.astype(x.dtype))

    return jax.tree.map(draw, shapes)


def compare(shape, content):
    """The relative errors of a call: of values and of gradients, each leaf by name; and the leaves
    for which the judge explains no such error by the rounding of its arguments.

    Raises:
      NotImplementedError: jla refuses the call.
    """
    with jax.numpy_dtype_promotion("strict"), jax.default_matmul_precision("highest"):
        if shape.mechanism in fuzz_layers.NAMES:
            return compare_layer(shape, content)
        args, ids = build(shape, content)
        cotangents = None
        if shape.check == "gradients":
            cotangents = cotangents_of(shape, content, args, ids)
        with context_of(shape.implementation):
            # What jla refuses it refuses here, before the rest of the call is compiled.
            jax.eval_shape(functools.partial(subject, shape), args, ids, cotangents)
            got = subject(shape, args, ids, cotangents)
        want = judgement(shape, args, ids, cotangents)
        found = [errors(*each) for each in zip(KINDS, got, want, strict=True)]
        tolerances = tolerances_of(shape)
        if not any(map(beyond, found, tolerances)):
            return *found, []
        unexplained = []
        rng = generator("rounding", content.seed)
        others = [
            judgement(
                shape,
                rounded(rng, upcast(args), shape.dtype),
                ids,
                cotangents and rounded(rng, upcast(cotangents), shape.dtype),
            )
            for _ in range(2)
        ]
        # Of a gradient that cancels to nothing the roundings of its terms are left.
        floors = 0.0, NEGLIGIBLE * typical_size(want[1])
        for kind, tolerance, floor, ours, judged, *moved in zip(
            KINDS, tolerances, floors, got, want, *others, strict=True
        ):
            ours = errors(kind, ours, judged, floor)
            moved = [errors(kind, other, judged, floor) for other in moved]
            limits = {n: max(tolerance, *(ROUNDINGS * m[n] for m in moved)) for n in ours}
            unexplained += beyond(ours, limits)
        return *found, unexplained


def compare_layer(shape, content):
    """As `compare`, of a layer."""
    x, mask, ids = fuzz_layers.inputs(shape, content)
    with context_of(shape.implementation):
        got = fuzz_layers.run(shape, x, mask, ids)
    want = fuzz_layers.definition(shape, x, mask, ids)
    found, tolerance = errors("values", got, want), tolerances_of(shape)[0]
    if not beyond(found, tolerance):
        return found, {}, []
    rng = generator("rounding", content.seed)
    other = np.asarray(rounded(rng, {"x": x}, shape.dtype)["x"])
    moved = errors("values", fuzz_layers.definition(shape, other, mask, ids), want)
    limits = {leaf: max(tolerance, ROUNDINGS * moved[leaf]) for leaf in found}
    return found, {}, beyond(found, limits)


def same_bits(shape, content):
    """Whether a call returns the same bits again, and the same earlier outputs where later tokens
    differ; the names of what does not."""
    with jax.numpy_dtype_promotion("strict"), jax.default_matmul_precision("highest"):
        args, ids = build(shape, content)
        cotangents = cotangents_of(shape, content, args, ids)
        t = int(generator("later", content.seed).integers(shape.sizes["T"]))
        later = dict(args)
        for name in TABLE[shape.mechanism].tokenwise():
            if name in args:
                changed = TABLE[shape.mechanism].later(name, args[name][:, t + 1 :])
                later[name] = args[name].at[:, t + 1 :].set(changed)
        with context_of(shape.implementation):
            first, again, other = (subject(shape, a, ids, cotangents) for a in (args, args, later))
    different = []
    if not all(jax.tree.leaves(jax.tree.map(_equal, first, again))):
        different.append("the same call again")
    if not _equal(first[0][0][:, : t + 1], other[0][0][:, : t + 1]):
        different.append(f"outputs up to token {t} after later tokens changed")
    return different


def _equal(x, y):
    return np.asarray(x).tobytes() == np.asarray(y).tobytes()
