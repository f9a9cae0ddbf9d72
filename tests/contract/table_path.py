"""PaTH attention's entry."""

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
import jla.pallas
from cases.path import arguments
from jla import PathCache
from jla._core.axes import letters
from jla.path_attention import AXES


def _spike(args):
    """One gate of -1e4 among weak ones: beside it, cumulated sums keep no digit of the others."""
    return args | dict(g=put(0.1 * args["g"], np.s_[:, args["g"].shape[1] // 3, ::2], -1e4))


def _reflections(args):
    """Every map reflects; half the heads at one mirror, the chunk's system then being at its
    worst."""
    w = args["w"]
    w = put(w, np.s_[:, :, ::2], w[:, :1, ::2])
    return args | dict(beta=np.full_like(args["beta"], 2.0), w=w)


def _projections(args):
    """Every map projects, and after the first nothing is left along the heads' one direction."""
    w = args["w"]
    return args | dict(beta=np.ones_like(args["beta"]), w=np.broadcast_to(w[:, :1], w.shape))


def _later(name, x):
    """w keeps unit rows, and another sign would be the same map."""
    changed = {"w": x[..., ::-1], "g": 40.0 * x - 1.0}
    return changed.get(name, 2.5 - x)


def _cache(**edits):
    """An edit of the cache's fields."""
    return edit(cache=lambda c: c._replace(**{n: e(getattr(c, n)) for n, e in edits.items()}))


def _unused(cache, number):
    there = np.arange(cache.key.shape[1])[None] < cache.length[:, None]

    def fill(x):
        there_too = there.reshape(*there.shape, *[1] * (x.ndim - 2))
        return np.where(there_too, x, np.asarray(number, x.dtype))

    return cache._replace(**{n: fill(getattr(cache, n)) for n in ("key", "value", "decay")})


def _cut_cache(args, capacity):
    key, value, decay, length = args["cache"]
    cut = PathCache(key[:, :capacity], value[:, :capacity], decay[:, :capacity], length)
    return args | dict(cache=cut)


# Of the first row's two segments the first continues from the cache. On the host, so that they are
# known under jit.
_IDS = np.array([[0] * 50 + [1] * 50, [1] * 49 + [2] * 51])

_SHARED_MISTAKES = (
    *COMMON_MISTAKES,
    *GATE_MISTAKES,
    ("w of integers", edit(w=lambda x: x.astype(jnp.int32)), TypeError, ("w ", "int32")),
    ("w of another K", edit(w=lambda x: x[..., :-1]), ValueError, ("w ", "K")),
    ("beta in float16", edit(beta=lambda x: x.astype(jnp.float16)), TypeError, ("beta ", "16")),
    ("beta of another H", edit(beta=lambda x: x[..., :1]), ValueError, ("beta ", "H")),
    ("g of another HQ", edit(g=lambda x: x[..., :2]), ValueError, ("g ", "HQ")),
    ("cache a plain tuple", edit(cache=tuple), TypeError, ("cache", "PathCache", "tuple")),
    (
        "keys in bfloat16",
        _cache(key=lambda x: x.astype(jnp.bfloat16)),
        TypeError,
        ("cache.key", "bfloat16", "float32"),
    ),
    (
        "cached values of another dtype",
        _cache(value=lambda x: x.astype(jnp.bfloat16)),
        TypeError,
        ("cache.value", "float32", "bfloat16"),
    ),
    (
        "cached values of another capacity",
        _cache(value=lambda x: x[:, 1:]),
        ValueError,
        ("cache.value", "S"),
    ),
    (
        "lengths in int8",
        _cache(length=lambda x: x.astype(jnp.int8)),
        TypeError,
        ("cache.length", "int8", "int32"),
    ),
    ("one length", _cache(length=lambda x: x[0]), ValueError, ("cache.length", "[B]")),
    ("gates for a cache without", _cache(decay=lambda _: None), ValueError, ("decay is None", "g")),
    ("no gates for a cache with", edit(g=None), ValueError, ("g is None", "cache.decay")),
    (
        "cache full",
        _cache(length=lambda x: x + x.shape[0] * 106),
        ValueError,
        ("cache has room for 212 tokens", "row 0", "221"),
    ),
)

_SMALL = dict(B=2, T=100, H=2, HQ=4, K=16, V=24)

_STATE = PathCache(*letters(AXES, "cache.key cache.value cache.decay cache.length"))

PATH = Mechanism(
    name="path",
    run=jla.path_attention,
    step=jla.path_step,
    axes=dict(
        q=AXES["q"],
        k=AXES["k"],
        v=AXES["v"],
        w=AXES["w"],
        beta=AXES["beta"],
        g=AXES["g"],
        cache=_STATE,
    ),
    outputs=(AXES["o"], _STATE),
    make=arguments,
    stress={
        "no decay": lambda args: args | dict(g=np.zeros_like(args["g"])),
        "strong everywhere": lambda args: args | dict(g=np.full_like(args["g"], -30.0)),
        "one gate of -1e4": _spike,
        "reflections": _reflections,
        "projections": _projections,
    },
    undamped={"reflections": 500},
    later=_later,
    operations=1160,
    unrolls=True,  # up to 16 steps, of chunks and of their groups
    heads=("H", "HQ"),
    optional=("g",),
    state=("cache", "cache"),
    unused=_unused,
    always_returns_state=False,
    slow=(
        *SHOWN_BY_ANOTHER,
        "test_any_batch_and_length_alone",
        "test_any_batch_and_length_from_a_state_with_segments",
    ),
    implementations=(
        Implementation(REFERENCE, sizes=_SMALL, slow=("test_good_inputs_make_no_nan",)),
        Implementation(
            XLA,
            sizes=_SMALL,
            full=dict(B=2, T=1000, H=2, HQ=4, K=128, V=128),
            lengths=(1, 130),
            head_dims=(dict(T=70, HQ=6, K=63, V=256),),  # golden vectors have K = V = 128
            ends_together=True,
        ),
        Implementation(
            PALLAS,
            sizes=dict(B=1, T=100, H=1, HQ=1, K=16, V=32),
            slow=(  # half a minute and more each
                "test_causal_to_the_bit",
                "test_decode_is_forward",
                "test_extreme_gates_keep_values_and_gradients",
                "test_head_dimensions",
                "test_same_inputs_same_bits",
            ),
            full=dict(B=2, T=1000, H=2, HQ=4, K=128, V=128),
            lengths=(130,),
            head_dims=(
                dict(T=20, HQ=1, K=63, V=81),
                dict(T=20, H=2, HQ=2, K=63, V=128),
                dict(T=20, HQ=1, K=128, V=81),
            ),
            beyond=("strong everywhere",),
            ends_together=True,
        ),
        Implementation(
            TRITON,
            sizes=dict(B=1, T=100, H=1, HQ=2, K=16, V=24),
            full=dict(B=2, T=1000, H=2, HQ=4, K=128, V=128),
            lengths=(1, 330),
            head_dims=(dict(T=70, HQ=1, K=63, V=81), dict(T=20, HQ=1, K=256, V=40)),
            ends_together=True,
        ),
    ),
    golden=("path_small", "path_d128", "path_fox_gqa"),
    golden_outputs=("o",),
    golden_state=("key", "value", "decay", "length"),
    mistakes=(
        *_SHARED_MISTAKES,
        *(mistake for mistake in COMMON_RUN_MISTAKES if mistake[0] != "V too small"),
        (
            "V too small",
            edit(v=lambda x: x[..., :8], cache=None),
            ValueError,
            ("dimension V must be 16 to 256", "8"),
        ),
        (
            "K too large",
            lambda args: (
                args | {n: np.tile(args[n], 17) for n in ("q", "k", "w")} | dict(cache=None)
            ),
            ValueError,
            ("dimension K must be 16 to 256", "272"),
        ),
        ("q without heads", edit(q=lambda x: x[:, :, 0]), ValueError, ("q ", "[B, T, HQ, K]")),
        (
            "no tokens",
            lambda args: args | {n: args[n][:, :0] for n in ("q", "k", "v", "w", "beta", "g")},
            ValueError,
            ("q ", "empty", "T"),
        ),
        (
            "HQ no multiple of H",
            lambda args: args | {n: args[n][:, :, :3] for n in "qg"} | dict(cache=None),
            ValueError,
            ("HQ = 3", "multiple", "H = 2"),
        ),
        (
            "cache too small",
            lambda args: _cut_cache(args, 100),
            ValueError,
            ("cache has room for 100 tokens", "row 0 has 9", "109"),
        ),
        (
            "cache too small for one segment",
            lambda args: _cut_cache(args, 50) | dict(segment_ids=_IDS),
            ValueError,
            ("cache has room for 50 tokens", "row 0", "59"),
        ),
    ),
    step_mistakes=(
        *_SHARED_MISTAKES,
        ("q with a time axis", edit(q=lambda x: x[:, None]), ValueError, ("q ", "[B, HQ, K]")),
        ("no cache", edit(cache=None), TypeError, ("cache", "PathCache", "NoneType")),
    ),
)
