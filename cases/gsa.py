"""Gated Slot Attention's arguments."""

from cases import shape_of, sigmoid, softplus
from jla import GSAState
from jla.gsa import AXES


def arguments(sizes, normal, dtype):
    """Arguments of `jla.gsa`, NumPy's; q, k, v and s of this dtype."""

    def draw(name):
        return normal(*shape_of(AXES[name], sizes))

    return dict(
        q=draw("q").astype(dtype),
        k=draw("k").astype(dtype),
        v=draw("v").astype(dtype),
        s=sigmoid(draw("s") - 1.0).astype(dtype),
        g=-0.3 * softplus(2 * draw("g")),
        initial_state=state(sizes, normal),
    )


def state(sizes, normal):
    names = ("initial_state.hk", "initial_state.hv")
    return GSAState(*(normal(*shape_of(AXES[name], sizes)) for name in names))
