"""MesaNet's arguments."""

from cases import shape_of, sigmoid, softplus, unit
from jla import MesaState
from jla.mesa_net import AXES


def arguments(sizes, normal, dtype):
    """Arguments of `jla.mesa_net`, NumPy's; q, k and v of this dtype."""

    def draw(name):
        return normal(*shape_of(AXES[name], sizes))

    kk = covariance(sizes, normal)
    return dict(
        q=unit(draw("q")).astype(dtype),
        k=unit(draw("k")).astype(dtype),
        v=draw("v").astype(dtype),
        g=-0.1 * softplus(2 * draw("g")),
        beta=sigmoid(draw("beta")),
        lamb=0.25 + softplus(draw("lamb")),
        initial_state=MesaState(kk, draw("initial_state.kv")),
    )


def state(sizes, normal):
    kk = covariance(sizes, normal)
    return MesaState(kk, normal(*shape_of(AXES["initial_state.kv"], sizes)))


def covariance(sizes, normal):
    """A state's kk: symmetric and positive definite, as after any tokens."""
    past = normal(*shape_of(AXES["initial_state.kk"], sizes))
    return past @ past.mT / sizes["K"]
