"""PaTH attention's arguments."""

import numpy as np

from cases import keep, shape_of, sigmoid, softplus, unit
from jla import PathCache
from jla.path_attention import AXES

# How many tokens the rows have before the first.
LENGTHS = (9, 0, 4, 1)


def arguments(sizes, normal, dtype):
    """Arguments of `jla.path_attention`, NumPy's; q, k, v and the cached values of this dtype.

    The cache has room for more tokens than there are.
    """
    length = np.resize(LENGTHS, sizes["B"])
    sizes = dict(sizes) | dict(S=sizes["T"] + 112)

    def draw(name):
        return normal(*shape_of(AXES[name], sizes))

    def gates(*shape):
        return -0.2 * softplus(2 * normal(*shape))

    return dict(
        q=draw("q").astype(dtype),
        k=draw("k").astype(dtype),
        v=draw("v").astype(dtype),
        w=unit(draw("w")),
        beta=2 * sigmoid(draw("beta") + 1.0),
        g=gates(*shape_of(AXES["g"], sizes)),
        cache=cache(sizes, normal, dtype, length, lambda *shape: 10 * gates(*shape)),
    )


def cache(sizes, normal, dtype, length, decays=None):
    """A cache of S places that holds `length` tokens, NumPy's [B], and zeros behind them.

    Args:
      dtype: of the values.
      decays: draws the decays of this shape; None for a cache without.
    """
    there = np.arange(sizes["S"]) < length[:, None]

    def draw(name, normal):
        shape = shape_of(AXES[f"cache.{name}"], sizes)
        return keep(there.reshape(*there.shape, *[1] * (len(shape) - 2)), normal(*shape))

    return PathCache(
        draw("key", normal),
        draw("value", normal).astype(dtype),
        None if decays is None else draw("decay", decays),
        length.astype(np.int32),
    )
