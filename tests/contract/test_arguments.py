"""Wrong arguments raise (docs/contract.md): before anything runs, and with a clear message."""

import functools

import jax
import numpy as np
import pytest
from evaluator import evaluated
from harness import assert_close, assert_same_bits, inputs
from mechanisms import MECHANISMS, SMALL, marked
from test_transforms import compilations

from jla._dispatch import choose


def mistakes(table):
    for mechanism in MECHANISMS:
        for label, edit, exception, fragments in getattr(mechanism, table):
            values = (mechanism, edit, exception, fragments)
            yield pytest.param(*values, id=f"{mechanism.name}-{label}")


def check(function, good, edit, exception, fragments):
    bad = edit(good)
    with compilations() as events, pytest.raises(exception) as caught:
        function(**bad)
    assert not events, "something ran before the argument was refused"
    name = f"jla.{function.__name__}: "
    message = str(caught.value)
    assert message.startswith(name)
    for fragment in fragments:
        assert fragment in message
    # The same under jit, where only shapes and dtypes are known; but segments, which come from the
    # host, are.
    arrays = {n: x for n, x in bad.items() if isinstance(x, jax.Array | np.ndarray)}
    arrays.pop("segment_ids", None)
    others = {n: x for n, x in bad.items() if n not in arrays}
    with pytest.raises(exception, match=f"^{name}"):
        jax.eval_shape(lambda a: function(**a, **others), arrays)


@pytest.mark.parametrize("mechanism, edit, exception, fragments", list(mistakes("mistakes")))
def test_run_refuses(mechanism, edit, exception, fragments):
    good, _ = inputs(mechanism, mechanism.implementations[0].sizes)
    check(mechanism.run, good, edit, exception, fragments)


@pytest.mark.parametrize("mechanism, edit, exception, fragments", list(mistakes("step_mistakes")))
def test_step_refuses(mechanism, edit, exception, fragments):
    args, _ = inputs(mechanism, mechanism.implementations[0].sizes)
    good = {n: args[n][:, 0] for n in mechanism.tokenwise()}
    good |= {n: args[n] for n in mechanism.shared()}
    good[mechanism.state[1]] = args[mechanism.state[0]]
    check(mechanism.step, good, edit, exception, fragments)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_settings_are_by_name_only(mechanism):
    """One mathematical signature: no unknown setting is taken, and none by position."""
    args, _ = inputs(mechanism, mechanism.implementations[0].sizes)
    with pytest.raises(TypeError, match="chunk_size"):
        mechanism.run(**args, chunk_size=64)
    arrays = [x for name, x in args.items() if name != mechanism.state[0]]
    with pytest.raises(TypeError, match="positional"):
        mechanism.run(*arrays, 0.5)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_without_a_gpu_the_default_is_xla(mechanism):
    for name in (mechanism.run.__name__, mechanism.step.__name__):
        assert choose(name, None) is choose(name, "xla")


@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    marked(
        "test_no_initial_state_is_zeros", [row for row in SMALL if not row.values[1].interpreted]
    ),
)
def test_no_initial_state_is_zeros(mechanism, implementation, sizes):
    # Log-linear attention has a form of its own without a state, which rounds alike where levels
    # are few.
    T = 5 if mechanism.name == "log_linear" else 32
    args, _ = inputs(mechanism, dict(sizes) | dict(T=T))
    zeros = {mechanism.state[0]: jax.tree.map(np.zeros_like, args.pop(mechanism.state[0]))}
    run = jax.jit(functools.partial(mechanism.run, implementation=implementation.name))
    got, want = evaluated(run)(**args), evaluated(run)(**args, **zeros)
    if mechanism.always_returns_state:
        assert_same_bits(got, want)
    else:
        assert got[1] is None
        assert_close(got[0], want[0], 1e-6)
