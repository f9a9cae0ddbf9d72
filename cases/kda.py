"""Kimi Delta Attention's arguments."""

from cases import shape_of, sigmoid, softplus, unit
from jla.kda import AXES


def arguments(sizes, normal, dtype):
    """Arguments of `jla.kda`, NumPy's; q, k and v of this dtype."""

    def draw(name):
        return normal(*shape_of(AXES[name], sizes))

    return dict(
        q=unit(draw("q")).astype(dtype),
        k=unit(draw("k")).astype(dtype),
        v=draw("v").astype(dtype),
        g=-0.3 * softplus(2 * draw("g")),
        beta=sigmoid(draw("beta")),
        initial_state=state(sizes, normal),
    )


def state(sizes, normal):
    return normal(*shape_of(AXES["initial_state"], sizes))
