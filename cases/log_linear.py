"""Log-linear attention's arguments."""

import numpy as np

from cases import keep, shape_of, softplus
from jla import LogLinearState
from jla.log_linear import AXES

# Where the rows continue from: in turn an odd position with bits above and below those of T, the
# start, a power of two, and just before one.
POSITIONS = (37, 0, 64, 1023)


def arguments(sizes, normal, dtype):
    """Arguments of `jla.log_linear_attention`, NumPy's; q, k, v and the scales of this dtype.

    They have as many levels as the last of the POSITIONS takes.
    """
    position = np.resize(POSITIONS, sizes["B"])
    sizes = dict(sizes) | dict(L=int(position.max() + sizes["T"]).bit_length() + 1)

    def draw(name):
        return normal(*shape_of(AXES[name], sizes))

    return dict(
        q=draw("q").astype(dtype),
        k=draw("k").astype(dtype),
        v=draw("v").astype(dtype),
        g=-0.1 * softplus(2 * draw("g")),
        level_scales=draw("level_scales").astype(dtype),
        initial_state=state(sizes, normal, position),
    )


def state(sizes, normal, position):
    """A state after `position` tokens, NumPy's [B]; zeros in levels that hold nothing."""
    levels = normal(*shape_of(AXES["initial_state.levels"], sizes))
    there = in_use(position, sizes["L"])[:, None, :, None, None]
    return LogLinearState(keep(there, levels), position.astype(np.int32))


def in_use(position, levels):
    """Which levels hold something after `position` tokens [...]: bool [..., levels].

    Level l does if bit l - 1 of the position is set; level 0 is that of a token itself.
    """
    level = np.arange(levels)
    bit = np.asarray(position)[..., None] >> np.maximum(level - 1, 0)
    return (level > 0) & (bit % 2 == 1)
