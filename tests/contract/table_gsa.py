"""Gated Slot Attention's entry."""

import jax.numpy as jnp
import numpy as np
from table import (
    COMMON_MISTAKES,
    COMMON_RUN_MISTAKES,
    GATE_MISTAKES,
    PALLAS,
    REFERENCE,
    SHOWN_BY_ANOTHER,
    TRITON,
    XLA,
    Implementation,
    Mechanism,
    edit,
    put,
)

import jla
from cases.gsa import arguments
from jla import GSAState
from jla._core.axes import letters
from jla.gsa import AXES


def _spike(args):
    """One gate of -1e4, in every other slot, among weak ones: beside it, cumulated sums keep no
    digit of the others."""
    g = args["g"]
    return args | dict(g=put(0.01 * g, np.s_[:, g.shape[1] // 3, :, ::2], -1e4))


def _later(name, x):
    return {"s": 1.0 - 0.5 * x, "g": 40.0 * x - 1.0}.get(name, 3.0 - x)


def _of_width(K, **more):
    """An edit: queries and keys of K features, without a state."""
    widened = {n: lambda x: np.resize(x, (*x.shape[:-1], K)) for n in ("q", "k")}
    return edit(**widened, initial_state=None, **more)


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
    *COMMON_MISTAKES,
    *GATE_MISTAKES,
    ("s of integers", edit(s=lambda x: x.astype(jnp.int32)), TypeError, ("s ", "int32")),
    ("s without slots", edit(s=lambda x: x[..., 0]), ValueError, ("s ", "shape")),
    ("s of another H", edit(s=lambda x: x[..., :1, :]), ValueError, ("s ", "H")),
    ("g of another M", edit(g=lambda x: x[..., :-1]), ValueError, ("g ", "M")),
)

_SMALL = dict(B=2, T=100, H=2, HQ=4, K=16, V=24, M=20)

_STATE = GSAState(*letters(AXES, "initial_state.hk initial_state.hv"))

GSA = Mechanism(
    name="gsa",
    run=jla.gsa,
    step=jla.gsa_step,
    axes=dict(
        q=AXES["q"],
        k=AXES["k"],
        v=AXES["v"],
        s=AXES["s"],
        g=AXES["g"],
        initial_state=_STATE,
    ),
    outputs=(AXES["o"], _STATE),
    make=arguments,
    stress={
        "no decay": lambda args: args | dict(g=np.zeros_like(args["g"])),
        "strong everywhere": lambda args: args | dict(g=np.full_like(args["g"], -30.0)),
        "one gate of -1e4": _spike,
    },
    later=_later,
    operations=1220,
    heads=("H", "HQ"),
    unrolls=True,  # for its run time
    optional=("g",),
    state=("initial_state", "state"),
    slow=(
        *SHOWN_BY_ANOTHER,
        "test_any_batch_and_length_alone",
        "test_any_batch_and_length_from_a_state_with_segments",
        "test_sharded_under_jit",
        "test_values_under_x64",
    ),
    implementations=(
        Implementation(REFERENCE, sizes=_SMALL, slow=("test_good_inputs_make_no_nan",)),
        Implementation(
            XLA,
            sizes=_SMALL,
            full=dict(B=2, T=2000, H=4, HQ=8, K=128, V=128, M=64),
            lengths=(1, 63, 65, 1000),
            head_dims=(
                dict(HQ=6, K=63, V=256, M=81),
                dict(HQ=6, K=256, V=16, M=16),
                dict(T=40, H=1, HQ=2, K=512, V=300, M=64),
                dict(T=40, H=1, HQ=1, K=16, V=512, M=400),
                dict(HQ=2, K=63, V=256, M=81),
            ),
        ),
        Implementation(
            PALLAS,
            sizes=dict(B=1, T=100, H=1, HQ=1, K=16, V=32, M=16),
            full=dict(B=2, T=2000, H=8, HQ=16, K=128, V=128, M=64),
            lengths=(1, 64, 130),
            head_dims=(
                # Two rows, and two query heads to each of two key heads; two tiles of slots.
                dict(B=2, T=20, H=2, HQ=4, V=40, M=100),
                dict(HQ=1, T=70, K=250, V=81, M=100),
                dict(HQ=1, T=70, K=128, V=81, M=64),
                dict(HQ=1, T=70, K=63, V=256, M=20),
                dict(HQ=1, T=40, K=256, V=16, M=128),
            ),
        ),
        Implementation(
            TRITON,
            sizes=dict(B=1, T=100, H=1, HQ=1, K=16, V=16, M=16),
            full=dict(B=2, T=2000, H=8, HQ=16, K=128, V=128, M=64),
            lengths=(1, 64, 130),
            head_dims=(
                # Two rows, and two query heads to each of two key heads; two tiles of slots.
                dict(B=2, T=20, H=2, HQ=4, V=40, M=100),
                dict(HQ=1, T=20, K=250, V=81, M=20),
                dict(HQ=1, T=20, K=63, V=256, M=256),
            ),
        ),
    ),
    golden=("gsa_small", "gsa_d128", "gsa_gqa"),
    golden_outputs=("o", "final_hk", "final_hv"),
    golden_state=("initial_hk", "initial_hv"),
    mistakes=(
        *_SHARED_MISTAKES,
        *COMMON_RUN_MISTAKES,
        ("q without heads", edit(q=lambda x: x[:, :, 0]), ValueError, ("q ", "[B, T, HQ, K]")),
        (
            "no tokens",
            lambda args: args | {n: args[n][:, :0] for n in ("q", "k", "v", "s", "g")},
            ValueError,
            ("q ", "empty", "T"),
        ),
        (
            "HQ no multiple of H",
            edit(q=lambda x: x[:, :, :3]),
            ValueError,
            ("HQ = 3", "multiple", "H = 2"),
        ),
        (
            "M too small",
            lambda args: (
                args | {n: args[n][..., :15] for n in ("s", "g")} | dict(initial_state=None)
            ),
            ValueError,
            ("dimension M must be 16 to 512", "15"),
        ),
        (
            "K too large",
            _of_width(513),
            ValueError,
            ("dimension K must be 16 to 512", "513"),
        ),
        (
            "K too large for the kernels",  # tests/triton/test_launch.py: Triton's
            _of_width(257, implementation="pallas"),
            NotImplementedError,
            ('"pallas"', "K=257, V=24 and M=20", "at most 256", 'implementation="xla" can'),
        ),
        (
            "initial_state a plain tuple",
            edit(initial_state=tuple),
            TypeError,
            ("initial_state", "GSAState", "tuple"),
        ),
        (
            "initial_state in bfloat16",
            _state(hv=lambda x: x.astype(jnp.bfloat16)),
            TypeError,
            ("initial_state.hv", "bfloat16", "float32"),
        ),
        (
            "initial_state transposed",
            _state(hk=lambda x: np.swapaxes(x, 2, 3)),
            ValueError,
            ("initial_state.hk", "K"),
        ),
        ("ABC with a state", edit(g=None), ValueError, ("initial_state", "ABC")),
        (
            "float32 for the kernels",
            edit(implementation="pallas"),
            NotImplementedError,
            ("gsa", '"pallas"', "float32", 'implementation="xla" can'),
        ),
    ),
    step_mistakes=(
        *_SHARED_MISTAKES,
        ("q with a time axis", edit(q=lambda x: x[:, None]), ValueError, ("q ", "[B, HQ, K]")),
        ("no state", edit(state=None), TypeError, ("state", "GSAState", "NoneType")),
        (
            "state in float16",
            edit(state=lambda x: x._replace(hk=x.hk.astype(jnp.float16))),
            TypeError,
            ("state.hk", "float16"),
        ),
        ("ABC", edit(g=None), TypeError, ("g ", "ABC has no step")),
    ),
)
