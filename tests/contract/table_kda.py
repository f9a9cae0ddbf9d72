"""Kimi Delta Attention's entry."""

import jax.numpy as jnp
import numpy as np
from table import (
    COMMON_MISTAKES,
    COMMON_RUN_MISTAKES,
    GATE_MISTAKES,
    PALLAS,
    REFERENCE,
    TRITON,
    XLA,
    Implementation,
    Mechanism,
    edit,
    put,
)

import jla
from cases.kda import arguments
from jla.kda import AXES


def _spike(args):
    """One gate of -1e4 among weak ones: beside it, cumulated sums keep no digit of the others."""
    return args | dict(g=put(0.01 * args["g"], np.s_[:, args["g"].shape[1] // 3], -1e4))


def _twins(args):
    """The same key at every token, written with beta = 2 and no decay."""
    k = np.broadcast_to(args["k"][:, :1], args["k"].shape)
    return args | dict(k=k, beta=np.full_like(args["beta"], 2.0), g=np.zeros_like(args["g"]))


def _later(name, x):
    """Keys keep their norm: with larger ones the recurrence has no finite value."""
    if name in ("q", "k"):
        return -np.flip(x, -1)
    return {"g": 40.0 * x - 1.0, "beta": 1.0 - 0.5 * x}.get(name, 3.0 - x)


_SHARED_MISTAKES = (
    *COMMON_MISTAKES,
    *GATE_MISTAKES,
    (
        "beta of integers",
        edit(beta=lambda x: x.astype(jnp.int32)),
        TypeError,
        ("beta must be float32, got int32",),
    ),
    ("beta per channel", edit(beta=lambda x: x[..., None]), ValueError, ("beta", "shape")),
)

KDA = Mechanism(
    name="kda",
    run=jla.kda,
    step=jla.kda_step,
    axes=dict(
        q=AXES["q"],
        k=AXES["k"],
        v=AXES["v"],
        g=AXES["g"],
        beta=AXES["beta"],
        initial_state=AXES["initial_state"],
    ),
    outputs=(AXES["o"], AXES["initial_state"]),
    make=arguments,
    stress={
        "no decay": lambda args: args | dict(g=np.zeros_like(args["g"])),
        "strong everywhere": lambda args: args | dict(g=np.full_like(args["g"], -30.0)),
        "one gate of -1e4": _spike,
        "equal keys, beta = 2": _twins,
    },
    undamped={"equal keys, beta = 2": 500},
    later=_later,
    operations=1150,
    heads=("H", "HV"),
    state=("initial_state", "state"),
    slow=("test_any_batch_and_length_alone", "test_values_under_x64"),
    implementations=(
        Implementation(
            REFERENCE,
            sizes=dict(B=2, T=100, H=2, HV=4, K=16, V=24),
            slow=("test_good_inputs_make_no_nan",),
        ),
        Implementation(
            XLA,
            sizes=dict(B=2, T=100, H=2, HV=4, K=16, V=24),
            full=dict(B=2, T=2000, H=4, HV=8, K=128, V=128),
            lengths=(1, 2, 62, 63, 64, 65, 1000),
            head_dims=(dict(K=16, V=256), dict(K=256, V=16), dict(K=63, V=81), dict(K=128, V=128)),
        ),
        Implementation(
            PALLAS,
            sizes=dict(B=1, T=100, H=1, HV=1, K=16, V=32),
            full=dict(B=2, T=2000, H=8, HV=16, K=128, V=128),
            lengths=(1, 63, 64, 130),
            head_dims=(
                # Two rows, and two value heads to each of two key heads; two tiles of features.
                dict(B=2, T=20, H=2, HV=4, K=81, V=40),
                dict(HV=1, T=70, K=63, V=81),
                dict(HV=1, K=128, V=81),
                dict(HV=1, K=63, V=128),
                dict(HV=1, T=70, K=256, V=256),
            ),
            beyond=("equal keys, beta = 2",),
        ),
        Implementation(
            TRITON,
            sizes=dict(B=1, T=100, H=1, HV=1, K=16, V=32),
            full=dict(B=2, T=2000, H=8, HV=16, K=128, V=128),
            lengths=(1, 63, 64, 130),
            head_dims=(
                # Two value heads to each of two key heads; padded features.
                dict(T=20, H=2, HV=4, K=33, V=40),
                dict(T=70, K=63, V=81),
                dict(K=128, V=16),
                dict(T=70, K=256, V=256),
            ),
        ),
    ),
    golden=("kda_small", "kda_d128", "kda_gva_strong_decay"),
    golden_outputs=("o", "final_state"),
    golden_state=("initial_state",),
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
                args | {n: np.tile(args[n], 17) for n in ("q", "k", "g")} | dict(initial_state=None)
            ),
            ValueError,
            ("dimension K must be 16 to 256", "272"),
        ),
        (
            "initial_state in bfloat16",
            edit(initial_state=lambda x: x.astype(jnp.bfloat16)),
            TypeError,
            ("initial_state", "bfloat16", "float32"),
        ),
        (
            "initial_state transposed",
            edit(initial_state=lambda x: np.swapaxes(x, 2, 3)),
            ValueError,
            ("initial_state", "K"),
        ),
    ),
    step_mistakes=(
        *_SHARED_MISTAKES,
        ("q with a time axis", edit(q=lambda x: x[:, None]), ValueError, ("q ", "[B, H, K]")),
        ("no state", edit(state=None), TypeError, ("state", "array")),
        (
            "state in float16",
            edit(state=lambda x: x.astype(jnp.float16)),
            TypeError,
            ("state", "float16"),
        ),
    ),
)
