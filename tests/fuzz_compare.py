"""How the fuzzer runs a drawn call, and what it compares it with."""

import contextlib
import functools

import fuzz_layers
import jax
import jax.numpy as jnp
import numpy as np
from fuzz_draw import TABLE, Shape, build, generator
from harness import cut, error, is_float, upcast, with_gradients

import jla

KINDS = ("values", "gradients")
# What rounding to each dtype changes at most, relative to the number.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
# A case may be off by this many times what one such rounding changes in the judge: several
# roundings lie between the arguments and the result.
ROUNDINGS = 4


def tolerances_of(shape):
    """The largest relative error of values, and of gradients."""
    if shape.mechanism in fuzz_layers.NAMES:
        return fuzz_layers.tolerances(shape)
    return TABLE[shape.mechanism].tolerances[shape.dtype]


def judge_of(shape):
    itself = (shape.implementation, shape.dtype) == ("xla", "float32")
    return "reference" if itself else "xla"


def context_of(implementation):
    interpreted = implementation == "pallas" and jax.default_backend() == "cpu"
    return jla.pallas.interpret() if interpreted else contextlib.nullcontext()


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


def errors(kind, got, want):
    """Name of each leaf of these values or gradients to its error.

    Relative, in the Frobenius norm; and at least a fifth of the worst token's of a head, for what
    is wrong at one place is lost in the norm of thousands.
    """
    if want is None:
        return {}
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves(want)
    named = {}
    for (path, x), y in zip(got, want, strict=True):
        if not is_float(y):  # a position or a length
            named[kind + jax.tree_util.keystr(path)] = 0.0 if np.array_equal(x, y) else np.inf
            continue
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # A state that L levels cannot hold is NaN.
        same = np.isnan(x) & np.isnan(y)
        x, y = np.where(same, 0, x), np.where(same, 0, y)
        # [B, T, H, ...] and [B, T, H]; of states [B, H, K, V] a head's row counts as a token.
        inner = tuple(range(3 if x.ndim > 3 else 2, x.ndim))
        off, size = (np.sqrt(np.sum(np.square(z), axis=inner)) for z in (x - y, y))
        place = np.max(off / np.maximum(size + np.mean(size), 1e-10))
        named[kind + jax.tree_util.keystr(path)] = float(max(error(x, y), place / 5, key=_size))
    return named


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
            with context_of(shape.implementation):
                found = errors("values", *fuzz_layers.run_layer(shape, content))
            return found, {}, beyond(found, tolerances_of(shape)[0])
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
        for kind, ours, tolerance, judged, *moved in zip(
            KINDS, found, tolerances, want, *others, strict=True
        ):
            moved = [errors(kind, other, judged) for other in moved]
            limits = {n: max(tolerance, *(ROUNDINGS * m[n] for m in moved)) for n in ours}
            unexplained += beyond(ours, limits)
        return *found, unexplained


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
