"""The letters of axes, and the axes of every mechanism's arguments: stated here and nowhere else.

    B   batch rows                              K   key dimension
    T   time, tokens                            V   value dimension
    H   heads; where there are several counts,  M   slots (gsa)
        those of the keys and the values        L   levels (log-linear attention)
    HQ  query heads, a multiple of H            S   capacity of a cache, in tokens (PaTH)
    HK  key heads, a divisor of H
    HV  value heads, a multiple of H (kda, where H are the heads of q and k)
    C   tokens whose keys a lazy cache keeps apart (PaTH)
    N   segments of a row, where states have an axis of them

The public functions check their arguments against these tables, the kernels' wrappers tell from
them what can be split over devices, and the contract's tests make their arguments' shapes of them.

A table has a run's arguments by name, the fields of a state by the argument's name and theirs, and
the outputs as `o`. `of_step` makes the step's of it.
"""

from collections.abc import Mapping

type Axes = Mapping[str, str]

KDA: dict[str, str] = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T HV V",
    "g": "B T HV K",
    "beta": "B T HV",
    "initial_state": "B HV K V",
    "segment_ids": "B T",
    "o": "B T HV V",
}

GSA: Axes = {
    "q": "B T HQ K",
    "k": "B T H K",
    "v": "B T H V",
    "s": "B T H M",
    "g": "B T H M",
    "initial_state.hk": "B H K M",
    "initial_state.hv": "B H M V",
    "segment_ids": "B T",
    "o": "B T HQ V",
}

LOG_LINEAR: dict[str, str] = {
    "q": "B T HK K",
    "k": "B T HK K",
    "v": "B T H V",
    "g": "B T H",
    "level_scales": "B T H L",
    "initial_state.levels": "B H L K V",
    "initial_state.position": "B",
    "segment_ids": "B T",
    "o": "B T H V",
}

# What a `LazyLogLinearState` has beside.
LAZY_LOG_LINEAR: Axes = {"initial_state.log_decays": "B H L"}

MESA_NET: Axes = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "g": "B T H",
    "beta": "B T H",
    "lamb": "H K",
    "initial_state.kk": "B H K K",
    "initial_state.kv": "B H K V",
    "segment_ids": "B T",
    "o": "B T H V",
}

PATH: Axes = {
    "q": "B T HQ K",
    "k": "B T H K",
    "v": "B T H V",
    "w": "B T H K",
    "beta": "B T H",
    "g": "B T HQ",
    "cache.key": "B S H K",
    "cache.value": "B S H V",
    "cache.decay": "B S HQ",
    "cache.length": "B",
    "segment_ids": "B T",
    "o": "B T HQ V",
}

# What a `LazyPathCache` has beside; C is 64.
LAZY_PATH: Axes = {"cache.recent": "B C H K", "cache.change": "B H K K"}

# Of `jla._fused`: with a layer's projections in the place of what they become.
KDA_FROM_PROJECTION: Axes = KDA | {
    "f": "B T HV K",
    "A_log": "HV",
    "dt_bias": "HV K",
    "real": "B T",
}

LOG_LINEAR_MAMBA2: Axes = LOG_LINEAR | {
    "u": "B T H V",
    "logits": "B T H L",
    "dt": "B T H",
    "skip": "H",
}


def of_step(axes: Axes) -> dict[str, str]:
    """A step's axes: a run's without T. What a run calls `initial_state`, a step calls `state`."""
    return {
        name.removeprefix("initial_"): " ".join(x for x in letters.split() if x != "T")
        for name, letters in axes.items()
        if name != "segment_ids"
    }


def of_segments(axes: Axes) -> dict[str, str]:
    """A run's axes where the initial state has an axis of segments after the batch."""
    return {
        name: letters.replace("B", "B N", 1) if name.startswith("initial_state") else letters
        for name, letters in axes.items()
    }


def letters(axes: Axes, names: str) -> tuple[str, ...]:
    """The axes of some arguments, in this order; `names` has spaces between them."""
    return tuple(axes[name] for name in names.split())


def shared_heads(axes: Axes) -> tuple[str, ...]:
    """The letters of key heads of which one may serve all heads: no state has them."""
    in_state = {x for name, letters in axes.items() if "." in name for x in letters.split()}
    return tuple(sorted({"H", "HK"} - in_state))


def with_value_heads(axes: Axes) -> dict[str, str]:
    """A table with HK and H, in other letters: H for the key heads and HV for all heads.

    These are the letters by which `shardwise` knows heads that come in groups.
    """
    names = {"HK": "H", "H": "HV"}
    return {
        name: " ".join(names.get(x, x) for x in letters.split()) for name, letters in axes.items()
    }
