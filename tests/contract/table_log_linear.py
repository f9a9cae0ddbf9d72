"""Log-linear attention's entry."""

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
from cases.log_linear import arguments, in_use
from jla import LogLinearState
from jla._core.axes import letters
from jla.log_linear import AXES

f32 = jnp.float32


def _spike(args):
    """One gate of -1e4 among weak ones: beside it, cumulated sums keep no digit of the others."""
    return args | dict(g=put(0.1 * args["g"], np.s_[:, args["g"].shape[1] // 3], -1e4))


def _unused(state, number):
    used = in_use(state.position, state.levels.shape[2])[:, None, :, None, None]
    return state._replace(levels=np.where(used, state.levels, number))


def _fill(args):
    """Every row continues from where its tokens are the last that the levels serve."""
    T, L = args["level_scales"].shape[1::2]
    state, position = args["initial_state"], 2 ** (L - 1) - T
    levels = np.where(in_use(position, L)[:, None, None], state.levels + 1.0, 0.0)
    state = LogLinearState(levels, np.full_like(state.position, position))
    return args | dict(initial_state=state)


def _tight(args):
    T = args["level_scales"].shape[1]
    return args | dict(level_scales=args["level_scales"][..., : (T - 1).bit_length() + 1])


def _later(name, x):
    return {"g": 40.0 * x - 1.0}.get(name, 3.0 - x)


def _state(name="initial_state", **edits):
    """An edit of a state's fields."""
    return lambda args: (
        args
        | {name: args[name]._replace(**{n: e(getattr(args[name], n)) for n, e in edits.items()})}
    )


_SHARED_MISTAKES = (
    *(mistake for mistake in COMMON_MISTAKES if mistake not in SCALE_MISTAKES),
    *GATE_MISTAKES,
    ("k of another HK", edit(k=lambda x: np.repeat(x, 2, -2)), ValueError, ("k ", "HK")),
    (
        "level_scales in float16",
        edit(level_scales=lambda x: x.astype(jnp.float16)),
        TypeError,
        ("level_scales", "float16"),
    ),
    (
        "level_scales of one level",
        edit(level_scales=lambda x: x[..., 0]),
        ValueError,
        ("level_scales", "shape"),
    ),
    (
        "level_scales for one head",
        edit(level_scales=lambda x: x[..., :1, :]),
        ValueError,
        ("level_scales", "H = 1"),
    ),
    (
        "HK does not divide H",
        lambda args: args | {n: np.repeat(args[n], 3, -2) for n in ("q", "k")},
        ValueError,
        ("H = 2", "multiple", "HK = 3"),
    ),
)

_SMALL = dict(B=2, T=100, H=2, HK=1, K=16, V=24)

_STATE = LogLinearState(*letters(AXES, "initial_state.levels initial_state.position"))

LOG_LINEAR = Mechanism(
    name="log_linear",
    run=jla.log_linear_attention,
    step=jla.log_linear_step,
    axes=dict(
        q=AXES["q"],
        k=AXES["k"],
        v=AXES["v"],
        g=AXES["g"],
        level_scales=AXES["level_scales"],
        initial_state=_STATE,
    ),
    outputs=(AXES["o"], _STATE),
    make=arguments,
    stress={
        "no decay": lambda args: args | dict(g=np.zeros_like(args["g"])),
        "strong everywhere": lambda args: args | dict(g=np.full_like(args["g"], -30.0)),
        "one gate of -1e4": _spike,
        "up to the last position": _fill,
    },
    later=_later,
    operations=1410,
    heads=("HK", "H"),
    unrolls=True,  # a level for each doubling of the chunks
    tight=_tight,
    state=("initial_state", "state"),
    unused=_unused,
    slow=(*SHOWN_BY_ANOTHER, "test_sharded_under_jit"),
    implementations=(
        Implementation(REFERENCE, sizes=_SMALL),
        Implementation(
            XLA,
            sizes=_SMALL,
            full=dict(B=2, T=2000, H=4, HK=1, K=128, V=128),
            lengths=(1, 130),
            head_dims=(
                dict(T=40, H=4, HK=2, K=63, V=256),
                dict(T=40, H=3, HK=3, K=63, V=16),
                dict(T=20, H=4, HK=2, K=256, V=128),
            ),
            ends_together=True,  # whether any row has a past
        ),
        Implementation(
            PALLAS,
            sizes=dict(B=1, T=100, H=1, HK=1, K=16, V=32),
            slow=("test_unused_places_of_a_state_may_hold_nan",),
            full=dict(B=2, T=2000, H=8, HK=1, K=128, V=128),
            lengths=(130,),
            head_dims=(
                # Two rows, and two heads to each of two key heads.
                dict(B=2, T=20, H=4, HK=2, K=81, V=40),
                dict(T=20, H=2, HK=1, K=128, V=81),
            ),
            ends_together=True,
        ),
        Implementation(
            TRITON,
            sizes=dict(B=1, T=100, H=2, HK=1, K=16, V=24),
            full=dict(B=2, T=2000, H=8, HK=1, K=128, V=128),
            lengths=(1, 200),
            head_dims=(
                # Two rows, two heads to each of two key heads, and two blocks of each dimension.
                dict(B=2, T=20, H=4, HK=2, K=63, V=40),
                dict(T=70, H=1, HK=1, K=200, V=144),
            ),
            ends_together=True,
        ),
    ),
    golden=("log_linear_small", "log_linear_odd", "log_linear_256"),
    golden_outputs=("o", "final_levels", "final_position"),
    golden_state=("initial_levels", "initial_position"),
    mistakes=(
        *_SHARED_MISTAKES,
        *COMMON_RUN_MISTAKES,
        ("q without heads", edit(q=lambda x: x[:, :, 0]), ValueError, ("q ", "[B, T, HK, K]")),
        (
            "no tokens",
            lambda args: args | {n: args[n][:, :0] for n in ("q", "k", "v", "g", "level_scales")},
            ValueError,
            ("q ", "empty", "T"),
        ),
        (
            "K too large",
            lambda args: args | {n: np.tile(args[n], 17) for n in "qk"} | dict(initial_state=None),
            ValueError,
            ("dimension K must be 16 to 256", "272"),
        ),
        (
            "too few levels for T",
            edit(level_scales=lambda x: x[..., :7], initial_state=None),
            ValueError,
            ("L = 7", "T = 100", "at least 8"),
        ),
        (
            "too many levels",
            edit(level_scales=lambda x: np.tile(x, 4), initial_state=None),
            ValueError,
            ("level_scales", "at most L = 32", "36"),
        ),
        (
            "too few levels for the positions",
            _state(position=lambda x: x + 120),
            ValueError,
            ("initial_state.position is 157", "position 256", "L = 9", "below 2**(L-1) = 256"),
        ),
        (
            "a negative position",
            _state(position=lambda x: x - 40),
            ValueError,
            ("initial_state.position", "negative", "-40"),
        ),
        (
            "initial_state a plain tuple",
            edit(initial_state=tuple),
            TypeError,
            ("initial_state", "LogLinearState", "tuple"),
        ),
        (
            "initial_state in bfloat16",
            _state(levels=lambda x: x.astype(jnp.bfloat16)),
            TypeError,
            ("initial_state.levels", "bfloat16", "float32"),
        ),
        (
            "initial_state transposed",
            _state(levels=lambda x: np.swapaxes(x, 3, 4)),
            ValueError,
            ("initial_state.levels", "K"),
        ),
        (
            "float32 for the kernels",
            edit(implementation="pallas"),
            NotImplementedError,
            ("log_linear", '"pallas"', "float32", 'implementation="xla" can'),
        ),
        (
            "initial_state of other levels",
            _state(levels=lambda x: x[:, :, 1:]),
            ValueError,
            ("initial_state.levels", "L = 8"),
        ),
        (
            "a position of floats",
            _state(position=lambda x: x.astype(f32)),
            TypeError,
            ("initial_state.position", "float32", "int32"),
        ),
        (
            "one position for all",
            _state(position=lambda x: x[0]),
            ValueError,
            ("initial_state.position", "[B]"),
        ),
    ),
    step_mistakes=(
        *_SHARED_MISTAKES,
        ("q with a time axis", edit(q=lambda x: x[:, None]), ValueError, ("q ", "[B, HK, K]")),
        ("no state", edit(state=None), TypeError, ("state", "LogLinearState", "NoneType")),
        (
            "state in float16",
            _state("state", levels=lambda x: x.astype(jnp.float16)),
            TypeError,
            ("state.levels", "float16"),
        ),
        (
            "a full state",
            _state("state", position=lambda x: x + 219),
            ValueError,
            ("state.position is 256", "L = 9", "below 2**(L-1) = 256"),
        ),
    ),
)
