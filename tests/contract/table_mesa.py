"""MesaNet's entry."""

import jax
import jax.numpy as jnp
import numpy as np
from table import (
    COMMON_MISTAKES,
    COMMON_RUN_MISTAKES,
    GATE_MISTAKES,
    PALLAS,
    REFERENCE,
    SCALE_MISTAKES,
    SHOWN_BY_ANOTHER,
    TRITON,
    XLA,
    Implementation,
    Mechanism,
    edit,
    put,
)

import jla
from cases.mesa import arguments
from jla import MesaState
from jla._core.axes import letters
from jla.mesa_net import AXES

f32 = jnp.float32


def _spike(args):
    """One gate of -1e4 among weak ones: beside it, cumulated sums keep no digit of the others."""
    return args | dict(g=put(0.1 * args["g"], np.s_[:, args["g"].shape[1] // 3], -1e4))


def _twins(args):
    """The same key at every token and no decay, on a weak ridge: the condition is near 1e3."""
    k = np.broadcast_to(args["k"][:, :1], args["k"].shape)
    return args | dict(k=k, g=np.zeros_like(args["g"]), lamb=0.1 * args["lamb"])


def _nothing(args):
    """A row of zeros in turn for q, k and beta, and at the start no state: Hkk is 0 there."""
    zero = {n: put(args[n], np.s_[:, i : i + 3], 0) for i, n in enumerate(("q", "k", "beta"))}
    return args | zero | dict(initial_state=jax.tree.map(np.zeros_like, args["initial_state"]))


def _small(args):
    """Queries whose squares float32 cannot hold."""
    return args | dict(q=(1e-25 * args["q"].astype(f32)).astype(args["q"].dtype))


def _later(name, x):
    """Keys keep their norm and betas their sign: the matrix must stay positive definite."""
    if name in ("q", "k"):
        return -np.flip(x, -1)
    return {"g": 40.0 * x - 1.0, "beta": 1.0 - 0.5 * x}.get(name, 3.0 - x)


def _state(**edits):
    """An edit of the initial state's fields."""
    return lambda args: (
        args
        | dict(
            initial_state=args["initial_state"]._replace(
                **{name: e(getattr(args["initial_state"], name)) for name, e in edits.items()}
            )
        )
    )


_SHARED_MISTAKES = (
    *(mistake for mistake in COMMON_MISTAKES if mistake not in SCALE_MISTAKES),
    *GATE_MISTAKES,
    ("beta of integers", edit(beta=lambda x: x.astype(jnp.int32)), TypeError, ("beta", "int32")),
    ("beta per channel", edit(beta=lambda x: x[..., None]), ValueError, ("beta", "shape")),
    ("lamb per head", edit(lamb=lambda x: x[:, 0]), ValueError, ("lamb", "[H, K]")),
    ("lamb of another K", edit(lamb=lambda x: x[:, 1:]), ValueError, ("lamb", "K")),
    (
        "lamb in float16",
        edit(lamb=lambda x: x.astype(jnp.float16)),
        TypeError,
        ("lamb", "float16", "float32"),
    ),
    ("cg_steps zero", edit(cg_steps=0), ValueError, ("cg_steps", "at least 1", "0")),
    ("cg_steps a float", edit(cg_steps=30.0), TypeError, ("cg_steps", "integer", "float")),
    ("cg_steps a bool", edit(cg_steps=True), TypeError, ("cg_steps", "integer", "bool")),
    ("cg_steps an array", edit(cg_steps=lambda _: jnp.ones((), int)), TypeError, ("cg_steps",)),
    (
        "no kernel",
        edit(implementation="pallas"),
        NotImplementedError,
        ("mesa", '"pallas"', 'implementation="xla" can'),
    ),
)

_SMALL = dict(B=2, T=100, H=2, K=16, V=24)

_STATE = MesaState(*letters(AXES, "initial_state.kk initial_state.kv"))

MESA = Mechanism(
    name="mesa",
    run=jla.mesa_net,
    step=jla.mesa_step,
    axes=dict(
        q=AXES["q"],
        k=AXES["k"],
        v=AXES["v"],
        g=AXES["g"],
        beta=AXES["beta"],
        lamb=AXES["lamb"],
        initial_state=_STATE,
    ),
    outputs=(AXES["o"], _STATE),
    make=arguments,
    stress={
        "no decay": lambda args: args | dict(g=np.zeros_like(args["g"])),
        "strong everywhere": lambda args: args | dict(g=np.full_like(args["g"], -30.0)),
        "one gate of -1e4": _spike,
        "equal keys, weak ridge": _twins,
        "zeros": _nothing,
        "tiny queries": _small,
    },
    undamped={"equal keys, weak ridge": 50},
    later=_later,
    operations=590,
    state=("initial_state", "state"),
    tolerances={
        "float32": (1e-3, 1e-3),
        "bfloat16": (1e-2, 2e-2),
        "float16": (1e-2, 2e-2),
    },
    slow=(
        *SHOWN_BY_ANOTHER,
        "test_any_batch_and_length_alone",
        "test_any_batch_and_length_from_a_state_with_segments",
        "test_values_under_x64",
    ),
    implementations=(
        Implementation(REFERENCE, sizes=_SMALL, slow=("test_good_inputs_make_no_nan",)),
        Implementation(
            XLA,
            sizes=_SMALL,
            full=dict(B=2, T=2000, H=4, K=128, V=128),
            lengths=(1, 65, 200),
            head_dims=(dict(T=70, K=128, V=16), dict(T=70, K=63, V=256)),
            ends_together=True,
        ),
        Implementation(
            PALLAS,
            sizes=dict(B=1, T=100, H=1, K=16, V=32),
            full=dict(B=2, T=2000, H=8, K=128, V=128),
            lengths=(1, 63, 64, 130),
            head_dims=(
                dict(B=2, T=20, H=2, K=63, V=81),
                dict(T=70, K=63, V=81),
                dict(K=128, V=81),
                dict(T=70, K=63, V=128),
            ),
            beyond=("equal keys, weak ridge",),
        ),
        Implementation(
            TRITON,
            sizes=dict(B=1, T=100, H=1, K=16, V=24),
            full=dict(B=2, T=2000, H=8, K=128, V=128),
            lengths=(1, 64, 130),
            head_dims=(dict(T=20, K=63, V=40), dict(T=70, K=200, V=16)),
        ),
    ),
    golden=("mesa_small", "mesa_d64", "mesa_d128_nodecay"),
    golden_outputs=("o", "final_kk", "final_kv"),
    golden_state=("initial_kk", "initial_kv"),
    mistakes=(
        *_SHARED_MISTAKES,
        *COMMON_RUN_MISTAKES,
        ("q without heads", edit(q=lambda x: x[:, :, 0]), ValueError, ("q ", "[B, T, H, K]")),
        (
            "no tokens",
            lambda args: args | {n: args[n][:, :0] for n in ("q", "k", "v", "g", "beta")},
            ValueError,
            ("q ", "empty", "T"),
        ),
        (
            "K too large",
            lambda args: (
                args
                | {n: np.tile(args[n], 17) for n in ("q", "k", "lamb")}
                | dict(initial_state=None)
            ),
            ValueError,
            ("dimension K must be 16 to 256", "272"),
        ),
        (
            "initial_state a plain tuple",
            edit(initial_state=tuple),
            TypeError,
            ("initial_state", "MesaState", "tuple"),
        ),
        (
            "initial_state in float16",
            _state(kk=lambda x: x.astype(jnp.float16)),
            TypeError,
            ("initial_state.kk", "float16", "float32"),
        ),
        (
            "initial_state transposed",
            _state(kv=lambda x: np.swapaxes(x, 2, 3)),
            ValueError,
            ("initial_state.kv", "K"),
        ),
    ),
    step_mistakes=(
        *_SHARED_MISTAKES,
        ("q with a time axis", edit(q=lambda x: x[:, None]), ValueError, ("q ", "[B, H, K]")),
        ("no state", edit(state=None), TypeError, ("state", "MesaState", "NoneType")),
        (
            "state in float16",
            edit(state=lambda x: x._replace(kk=x.kk.astype(jnp.float16))),
            TypeError,
            ("state.kk", "float16"),
        ),
    ),
)
