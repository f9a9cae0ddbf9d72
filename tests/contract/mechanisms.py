"""The tables through which a mechanism joins the contract's tests.

A mechanism is one `Mechanism` in `MECHANISMS`, and an implementation one `Implementation` in it; no
test names either. `GRID` and its kin are the parametrisations the tests use.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import pytest

import jla

f32 = jnp.float32
FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation and what of the suite it takes.

    name: as `implementation=` takes it.
    sizes: the shape letters of the small case that most clauses use.
    full: those of the case that runs on the GPU, in tests marked `gpu`; None for none.
    dtypes: of q, k and v; the first serves every clause that needs only one.
    lengths, head_dims: what clause 2 tries: values of T, and edits of `sizes`.
    context: entered around every small call; an interpreter, for kernels.
    beyond: the stress cases that its precision does not reach; its documentation says so.
    compiled_on: the platform of what only a compiled program shows: sharding, rematerialization,
      how often is compiled. Interpreted kernels have effects, which stand in the way of all three.
    linearizes: whether it has a forward-mode derivative.
    """

    name: str
    sizes: Mapping[str, int]
    full: Mapping[str, int] | None = None
    dtypes: tuple[str, ...] = FLOATS
    lengths: tuple[int, ...] = ()
    head_dims: tuple[Mapping[str, int], ...] = ()
    context: Callable = contextlib.nullcontext
    beyond: tuple[str, ...] = ()
    compiled_on: str = "cpu"
    linearizes: bool = True


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One mechanism.

    axes: every float argument and its axis letters; those with a T are the tokens', the others (the
      initial state's) have none. All are differentiated.
    outputs: the axis letters of what `run` returns, a tree.
    make: (sizes, key, dtype) to a dict of the arguments in `axes`.
    stress: name to an edit of that dict; values and gradients must stay right under each.
    later: an edit of one argument's tokens: (name, array) to an array that differs everywhere.
    state: the name of the argument that the returned state goes into: for `run`, and for `step`.
    tolerances: dtype to the largest relative error of values and of gradients.
    golden: the files in tests/golden, and the flat names of the outputs there.
    mistakes, step_mistakes: (id, edit of the arguments, exception, fragments of its message).
    """

    name: str
    run: Callable
    step: Callable
    axes: Mapping[str, str]
    outputs: tuple
    make: Callable
    stress: Mapping[str, Callable]
    later: Callable
    state: tuple[str, str]
    implementations: tuple[Implementation, ...]
    golden: tuple[str, ...]
    golden_outputs: tuple[str, ...]
    mistakes: tuple
    step_mistakes: tuple
    tolerances: Mapping[str, tuple[float, float]] = dataclasses.field(
        default_factory=lambda: {
            "float32": (1e-4, 1e-4),
            "bfloat16": (1e-2, 2e-2),
            "float16": (1e-2, 2e-2),
        }
    )

    def tokenwise(self):
        """The names of the arguments with a time axis."""
        return [name for name, axes in self.axes.items() if "T" in axes.split()]


def _kda_make(sizes, key, dtype):
    B, T, H, HV, K, V = (sizes[letter] for letter in ("B", "T", "H", "HV", "K", "V"))
    keys = iter(jax.random.split(key, 6))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, f32)

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return dict(
        q=unit(normal(B, T, H, K)).astype(dtype),
        k=unit(normal(B, T, H, K)).astype(dtype),
        v=normal(B, T, HV, V).astype(dtype),
        g=-0.3 * jax.nn.softplus(2 * normal(B, T, HV, K)),
        beta=jax.nn.sigmoid(normal(B, T, HV)),
        initial_state=normal(B, HV, K, V),
    )


def _kda_spike(args):
    """One gate of -1e4 among weak ones: beside it, cumulated sums keep no digit of the others."""
    return args | dict(g=(0.01 * args["g"]).at[:, args["g"].shape[1] // 3].set(-1e4))


def _kda_twins(args):
    """The same key at every token, written with beta = 2 and no decay."""
    k = jnp.broadcast_to(args["k"][:, :1], args["k"].shape)
    return args | dict(k=k, beta=jnp.full_like(args["beta"], 2.0), g=jnp.zeros_like(args["g"]))


def _kda_later(name, x):
    """Keys keep their norm: with larger ones the recurrence has no finite value."""
    if name in ("q", "k"):
        return -jnp.flip(x, -1)
    return {"g": 40.0 * x - 1.0, "beta": 1.0 - 0.5 * x}.get(name, 3.0 - x)


def _edit(**edits):
    """An edit of the arguments: each value is the new one, or a function of the old one."""
    return lambda args: args | {n: e(args.get(n)) if callable(e) else e for n, e in edits.items()}


_KDA_SHARED_MISTAKES = (
    ("q is a list", _edit(q=[1.0, 2.0]), TypeError, ("q ", "array", "list")),
    ("q of integers", _edit(q=lambda x: x.astype(jnp.int32)), TypeError, ("q ", "int32")),
    (
        "k of another dtype",
        _edit(k=lambda x: x.astype(jnp.bfloat16)),
        TypeError,
        ("k ", "bfloat16"),
    ),
    ("k of another K", _edit(k=lambda x: x[..., :-1]), ValueError, ("k ", "K")),
    ("v of another B", _edit(v=lambda x: x[:1]), ValueError, ("v ", "B")),
    ("V too small", _edit(v=lambda x: x[..., :8]), ValueError, ("V", "8", "16")),
    ("g in bfloat16", _edit(g=lambda x: x.astype(jnp.bfloat16)), TypeError, ("g ", "bfloat16")),
    ("g per head", _edit(g=lambda x: x[..., 0]), ValueError, ("g ", "shape")),
    ("beta of integers", _edit(beta=lambda x: x.astype(jnp.int32)), TypeError, ("beta", "int32")),
    ("beta per channel", _edit(beta=lambda x: x[..., None]), ValueError, ("beta", "shape")),
    ("scale an array", _edit(scale=lambda _: jnp.ones(())), TypeError, ("scale", "number")),
    ("scale a string", _edit(scale="big"), TypeError, ("scale", "str")),
    (
        "no such implementation",
        _edit(implementation="cuda"),
        ValueError,
        ("implementation", "'cuda'"),
    ),
)

KDA = Mechanism(
    name="kda",
    run=jla.kda,
    step=jla.kda_step,
    axes=dict(
        q="B T H K",
        k="B T H K",
        v="B T HV V",
        g="B T HV K",
        beta="B T HV",
        initial_state="B HV K V",
    ),
    outputs=("B T HV V", "B HV K V"),
    make=_kda_make,
    stress={
        "no decay": lambda args: args | dict(g=jnp.zeros_like(args["g"])),
        "strong everywhere": lambda args: args | dict(g=jnp.full_like(args["g"], -30.0)),
        "one gate of -1e4": _kda_spike,
        "equal keys, beta = 2": _kda_twins,
    },
    later=_kda_later,
    state=("initial_state", "state"),
    implementations=(
        Implementation(
            "reference",
            sizes=dict(B=2, T=100, H=2, HV=4, K=16, V=24),
            dtypes=("float32", "bfloat16", "float16"),
        ),
        Implementation(
            "xla",
            sizes=dict(B=2, T=100, H=2, HV=4, K=16, V=24),
            full=dict(B=2, T=2000, H=4, HV=8, K=128, V=128),
            lengths=(1, 2, 62, 63, 64, 65, 1000),
            head_dims=(dict(K=16, V=256), dict(K=256, V=16), dict(K=63, V=81), dict(K=128, V=128)),
        ),
        Implementation(
            "pallas",
            sizes=dict(B=1, T=100, H=1, HV=2, K=16, V=32),
            full=dict(B=2, T=2000, H=8, HV=16, K=128, V=128),
            dtypes=("bfloat16", "float16"),
            lengths=(1, 63, 64, 130),
            head_dims=(
                dict(HV=1, K=128, V=81),
                dict(HV=1, K=63, V=128),
                dict(HV=1, T=70, K=256, V=256),
            ),
            context=jla.pallas.interpret,
            beyond=("equal keys, beta = 2",),
            compiled_on="gpu",
            linearizes=False,  # a custom_vjp
        ),
    ),
    golden=("kda_small", "kda_d128", "kda_gva_strong_decay"),
    golden_outputs=("o", "final_state"),
    mistakes=(
        *_KDA_SHARED_MISTAKES,
        ("q without heads", _edit(q=lambda x: x[:, :, 0]), ValueError, ("q ", "[B, T, H, K]")),
        ("k of another T", _edit(k=lambda x: x[:, 1:]), ValueError, ("k ", "T")),
        (
            "no tokens",
            lambda args: args | {n: args[n][:, :0] for n in ("q", "k", "v", "g", "beta")},
            ValueError,
            ("q ", "empty", "T"),
        ),
        (
            "HV no multiple of H",
            lambda args: (
                args
                | {n: args[n][:, :, :3] for n in ("v", "g", "beta")}
                | dict(initial_state=args["initial_state"][:, :3])
            ),
            ValueError,
            ("HV = 3", "multiple", "H = 2"),
        ),
        (
            "K too large",
            lambda args: (
                args
                | {n: jnp.tile(args[n], 17) for n in ("q", "k", "g")}
                | dict(initial_state=None)
            ),
            ValueError,
            ("K", "272", "256"),
        ),
        (
            "initial_state in bfloat16",
            _edit(initial_state=lambda x: x.astype(jnp.bfloat16)),
            TypeError,
            ("initial_state", "bfloat16", "float32"),
        ),
        (
            "initial_state transposed",
            _edit(initial_state=lambda x: jnp.swapaxes(x, 2, 3)),
            ValueError,
            ("initial_state", "K"),
        ),
        (
            "segment_ids of floats",
            _edit(segment_ids=lambda _: jnp.zeros((2, 100))),
            TypeError,
            ("segment_ids", "float32"),
        ),
        (
            "segment_ids of one row",
            _edit(segment_ids=lambda _: jnp.zeros(100, jnp.int32)),
            ValueError,
            ("segment_ids", "[B, T]"),
        ),
    ),
    step_mistakes=(
        *_KDA_SHARED_MISTAKES,
        ("q with a time axis", _edit(q=lambda x: x[:, None]), ValueError, ("q ", "[B, H, K]")),
        ("no state", _edit(state=None), TypeError, ("state", "array")),
        (
            "state in float16",
            _edit(state=lambda x: x.astype(jnp.float16)),
            TypeError,
            ("state", "float16"),
        ),
    ),
)

MECHANISMS = (KDA,)


def _grid(full=True, only=lambda implementation: True):
    """Mechanism, implementation and sizes, for every small case and every full one (on the GPU)."""
    rows = []
    for mechanism in MECHANISMS:
        for implementation in filter(only, mechanism.implementations):
            label = f"{mechanism.name}-{implementation.name}"
            rows.append(pytest.param(mechanism, implementation, implementation.sizes, id=label))
            if full and implementation.full:
                bare = dataclasses.replace(implementation, context=contextlib.nullcontext)
                row = (mechanism, bare, implementation.full)
                rows.append(pytest.param(*row, id=f"{label}-full", marks=pytest.mark.gpu))
    return rows


# The definition agrees with itself: only its low precisions and golden vectors say anything.
GRID = _grid()
SMALL = _grid(full=False)


def _compiled(row):
    mechanism, implementation, sizes = row.values
    if implementation.compiled_on == "cpu":
        return row
    bare = dataclasses.replace(implementation, context=contextlib.nullcontext)
    return pytest.param(mechanism, bare, sizes, id=row.id, marks=pytest.mark.gpu)


COMPILED = [_compiled(row) for row in SMALL]
AGAINST_REFERENCE = _grid(only=lambda implementation: implementation.name != "reference")
