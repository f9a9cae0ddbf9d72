"""The layers' own operations, `jla._fused`: every implementation is the same function, and a named
one never falls back. Values of the kernels are in tests/test_pallas_*."""

import dataclasses
import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import assert_close

from jla import _dispatch, _fused
from jla._core.parts import mamba2_operands

f32, bf16 = jnp.float32, jnp.bfloat16


@dataclasses.dataclass
class Operation:
    """`shapes`: of the arguments, in their order; `wide`: the arguments that stay float32 where the
    others have 16 bits; `optional`: shapes by name; `options`: settings."""

    function: Callable
    shapes: dict
    wide: tuple = ()
    optional: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)

    def arrays(self, dtype=f32):
        shapes = self.shapes | self.optional
        keys = jax.random.split(jax.random.key(3), len(shapes))
        return {
            name: 0.5 * jax.random.normal(key, shape, f32 if name in self.wide else dtype)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def run(self, implementation, **more):
        options = self.options | more | dict(implementation=implementation)
        return lambda arrays: self.function(**arrays, **options)


B, T, H, D = 2, 5, 2, 64
TOKENS, BY_HEAD = (B, T, H, D), (B, T, H)
NORM = dict(x=TOKENS, scale=(D,))
OPERATIONS = {
    "kda_from_projection": Operation(
        _fused.kda_from_projection,
        dict(q=TOKENS, k=TOKENS, v=TOKENS, f=TOKENS, A_log=(H,), dt_bias=(H, D), beta=BY_HEAD),
        wide=("A_log", "dt_bias", "beta", "initial_state"),
        optional=dict(initial_state=(B, H, D, D)),
        options=dict(lower_bound=-2.0, normalize=True),
    ),
    "log_linear_mamba2": Operation(
        _fused.log_linear_mamba2,
        dict(q=TOKENS, k=TOKENS, u=TOKENS, g=BY_HEAD, logits=(*BY_HEAD, 4), dt=BY_HEAD, skip=(H,)),
        wide=("g", "dt", "skip"),
    ),
    "rms_norm": Operation(
        _fused.rms_norm,
        NORM | dict(gate=TOKENS, gate_bias=(H, D)),
        options=dict(epsilon=1e-3, activation=jax.nn.silu, input_activation=jax.nn.silu),
    ),
    "rms_norm_branch": Operation(
        _fused.rms_norm_branch, NORM | dict(update=TOKENS), options=dict(epsilon=1e-3)
    ),
    "gated_norm": Operation(
        _fused.gated_norm, dict(x=TOKENS, gate=TOKENS, scale=(H, D)), options=dict(epsilon=1e-3)
    ),
    "short_convolution": Operation(
        _fused.short_convolution,
        dict(x=TOKENS, taps=(3, H, D), bias=(H, D)),
        options=dict(normalize=True, silu_twice=True),
    ),
}
# What two of them are built around.
MECHANISMS = {"kda_from_projection": "kda", "log_linear_mamba2": "log_linear_attention"}
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def with_gradients(run, arrays):
    y, vjp = jax.vjp(run, arrays)
    return y, vjp(jax.tree.map(jnp.ones_like, y))


@each_operation
def test_xla_is_the_definition(name, monkeypatch):
    """It is the same function, or gives its own mechanism the same and takes the same from it."""
    run, definition = (_dispatch.choose(name, x) for x in ("xla", "reference"))
    if run is definition:
        return
    arrays = OPERATIONS[name].arrays()

    def outcome(implementation):
        given, settings = [], []

        def mechanism(*arguments, **options):
            given.append(arguments)
            settings.append(options)
            return arguments[2], arguments[-2]

        where = f"jla.{implementation}.{_dispatch._MODULES[name]}.{MECHANISMS[name]}"
        monkeypatch.setattr(where, mechanism)
        return (OPERATIONS[name].run(implementation)(arrays), given), settings

    (got, settings), (want, expected) = (outcome(x) for x in ("xla", "reference"))
    assert settings == expected
    assert_close(got, want, 1e-7)


@pytest.mark.slow  # The mechanisms have tests of their own.
@pytest.mark.parametrize("name", MECHANISMS)
def test_xla_is_the_definition_with_its_mechanism(name):
    """Values and gradients."""
    arrays = OPERATIONS[name].arrays()
    if "g" in arrays:
        arrays["g"] = -jnp.abs(arrays["g"])
    got, want = (
        jax.jit(functools.partial(with_gradients, OPERATIONS[name].run(implementation)))(arrays)
        for implementation in ("xla", "reference")
    )
    assert_close(got, want, 1e-4)


def test_a_skip_for_each_feature_is_added_to_what_kernels_give(monkeypatch):
    """They have one for each head, which is then zero; with an initial state it is the formula."""
    arrays = OPERATIONS["log_linear_mamba2"].arrays() | dict(skip=jnp.arange(H * D, dtype=f32))
    arrays["skip"] = arrays["skip"].reshape(H, D) / 7
    v, _, skipped = mamba2_operands(*(arrays[name] for name in ("u", "logits", "dt", "skip")))

    def attention(q, k, v, *_, **__):
        return v, None

    def served(q, k, u, g, logits, dt, skip, segment_ids):
        assert skip.shape == (H,) and not np.any(skip)
        return v

    monkeypatch.setattr(_fused, "choose", lambda *_: served)
    monkeypatch.setattr(_fused, "log_linear_attention", attention)
    for state in (None, "a state"):
        y, _ = _fused.log_linear_mamba2(**arrays, initial_state=state)
        assert_close(y, v + skipped, 1e-6)


@each_operation
def test_the_kernels_have_the_same_types(name, monkeypatch):
    """Of results and gradients, as traced for a GPU."""
    monkeypatch.setattr("jla.pallas.unsupported_device", lambda: None)
    arrays = jax.eval_shape(lambda: OPERATIONS[name].arrays(bf16))
    got, want = (
        jax.eval_shape(functools.partial(with_gradients, OPERATIONS[name].run(x)), arrays)
        for x in ("pallas", "reference")
    )
    assert got == want


@each_operation
def test_a_named_implementation_never_falls_back(name, on_a_gpu, monkeypatch):
    """Each says why it cannot serve and what can; `None` takes what can."""
    monkeypatch.setattr("jla.pallas.unsupported_device", lambda: None)
    arrays = jax.eval_shape(OPERATIONS[name].arrays)
    with pytest.raises(NotImplementedError, match=r'float32.*implementation="xla" can\.'):
        jax.eval_shape(OPERATIONS[name].run("pallas"), arrays)
    jax.eval_shape(OPERATIONS[name].run(None), arrays)
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        jax.eval_shape(OPERATIONS[name].run("fast"), arrays)


def test_every_backend_gives_its_reason(monkeypatch):
    """In the order of preference, the named one first."""
    reasons = {"pallas": "too old", "triton": "too new"}
    monkeypatch.setattr(_dispatch, "BACKENDS", tuple(reasons))
    monkeypatch.setattr(_dispatch, "_why_not", lambda backend, *_, **__: reasons[backend])
    with pytest.raises(NotImplementedError) as caught:
        _dispatch.choose("kda", "pallas")
    message = 'implementation="pallas" cannot serve this call: too old; nor can "triton": too new. '
    assert str(caught.value) == message + 'implementation="xla" can.'
    assert _dispatch.choose("kda", None) is _dispatch.choose("kda", "xla")
    reasons["triton"] = None
    with pytest.raises(NotImplementedError, match='"triton" or implementation="xla" can'):
        _dispatch.choose("kda", "pallas")


def test_without_a_name_the_first_that_serves_is_taken(monkeypatch):
    """Pallas, Triton, then XLA; and nothing is asked of those behind the one taken."""
    reasons, asked = {"pallas": None, "triton": None}, []

    def why_not(backend, *_, asked_for, **__):
        assert not asked_for
        asked.append(backend)
        return reasons[backend]

    monkeypatch.setattr(_dispatch, "_why_not", why_not)
    monkeypatch.setattr(_dispatch, "_module", lambda package, _: types.SimpleNamespace(kda=package))
    assert _dispatch.choose("kda", None) == "pallas" and asked == ["pallas"]
    reasons["pallas"] = "too old"
    assert _dispatch.choose("kda", None) == "triton"
    reasons["triton"] = "too new"
    assert _dispatch.choose("kda", None) == "xla"
