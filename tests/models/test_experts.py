"""Experts: against a loop over tokens and experts in float64, and what must not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jla.models import experts
from jla.models.experts import Experts

D = 16
PLAIN = dict(num_experts=4, experts_per_token=2, hidden=8)
CASES = {
    "kimi": dict(
        num_experts=8, experts_per_token=3, hidden=8, shared_hidden=24, routed_scale=2.446
    ),
    "grouped": dict(
        num_experts=12,
        experts_per_token=4,
        hidden=8,
        num_groups=4,
        groups_per_token=2,
        renormalize=False,
    ),
}


@functools.cache
def made(name):
    """A layer, its parameters, with a correction bias that matters, and its jitted call."""
    layer = Experts(**CASES[name])
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, D)))["params"]
    draw = np.random.default_rng(len(name))
    params = jax.tree.map(
        lambda leaf: draw.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5, shapes
    )
    params["router"]["correction_bias"] = draw.uniform(0, 0.4, layer.num_experts)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return layer, params, jax.jit(lambda params, x: layer.apply({"params": params}, x))


def inputs(tokens=20):
    return np.random.default_rng(0).normal(size=(2, tokens // 2, D)).astype(np.float32)


def definition(layer, params, x):
    """The layer, token by token and expert by expert, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    def swiglu(z, gate, up, down):
        return (z @ gate * sigmoid(z @ gate) * (z @ up)) @ down

    size = layer.num_experts // layer.num_groups
    outputs = []
    for z in x.reshape(-1, D).astype(np.float64):
        scores = sigmoid(z @ p["router"]["kernel"])
        merits = scores + p["router"]["correction_bias"]
        best_two = [
            np.sort(merits[size * g : size * g + size])[-2:].sum() for g in range(layer.num_groups)
        ]
        groups = np.argsort(best_two)[-layer.groups_per_token :]
        allowed = [e for e in range(layer.num_experts) if e // size in groups]
        chosen = sorted(allowed, key=lambda e, merits=merits: -merits[e])
        chosen = chosen[: layer.experts_per_token]
        total = sum(scores[e] for e in chosen) if layer.renormalize else 1.0
        y = sum(
            layer.routed_scale
            * scores[e]
            / total
            * swiglu(z, p["gate"][e], p["up"][e], p["down"][e])
            for e in chosen
        )
        if layer.shared_hidden:
            y = y + swiglu(z, *(p["shared"][name]["kernel"] for name in ("gate", "up", "down")))
        outputs.append(y)
    return np.reshape(outputs, x.shape)


@pytest.mark.parametrize("tokens", [20, 2])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_tokens_and_experts(name, tokens):
    """Two tokens have fewer rows than experts: each reads its own expert's matrices."""
    layer, params, apply = made(name)
    x = inputs(tokens)
    np.testing.assert_allclose(apply(params, x), definition(layer, params, x), rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_a_dense_sum():
    """The dense sum multiplies all tokens by all experts. The correction bias has no gradient."""
    layer, params, _ = made("kimi")
    x = inputs()
    draw = jnp.asarray(np.random.default_rng(5).normal(size=x.shape).astype(np.float32))

    def loss(params, x, mixture):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experts, "mixture", mixture)
            return jnp.sum(draw * layer.apply({"params": params}, x))

    def dense(x, chosen, weights, gate, up, down):
        each = jnp.einsum("nd,edi->eni", x, gate), jnp.einsum("nd,edi->eni", x, up)
        each = jnp.einsum("eni,eid->end", jax.nn.silu(each[0]) * each[1], down)
        picked = jax.nn.one_hot(chosen, len(gate)) * weights[:, :, None]
        return jnp.einsum("end,nke->nd", each, picked)

    both = jax.jit(
        lambda params, x: [
            jax.grad(loss, argnums=(0, 1))(params, x, mixture)
            for mixture in (experts.mixture, dense)
        ]
    )
    ours, theirs = both(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
    assert not ours[0]["router"]["correction_bias"].any()
    assert ours[0]["router"]["kernel"].any()


def test_tokens_do_not_see_each_other():
    """In another order, or beside NaN, a token's result has the same bits."""
    _, params, apply = made("grouped")
    x = inputs()
    y = np.asarray(apply(params, x))
    order = np.random.default_rng(0).permutation(x.shape[1])
    np.testing.assert_array_equal(apply(params, x[:, order]), y[:, order])
    x[0, 3] = np.nan
    others = np.ones(x.shape[:2], bool)
    others[0, 3] = False
    np.testing.assert_array_equal(np.asarray(apply(params, x))[others], y[others])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_groups=3), "num_experts = 4 must be a multiple of num_groups = 3"),
        (dict(groups_per_token=2), "groups_per_token must be at most num_groups = 1, got 2"),
        (dict(num_groups=4), "experts_per_token must be at most 1, the experts of"),
        (dict(hidden=0), "hidden must be at least 1, got 0"),
    ],
)
def test_wrong_attributes_are_named(options, message):
    layer = Experts(**PLAIN | options)
    with pytest.raises(ValueError, match=f"Experts: {message}"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, D)))


def test_the_router_is_float32():
    layer = Experts(**PLAIN, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jnp.ones((1, 3, D), jnp.bfloat16)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["router"])} == {jnp.dtype("float32")}
    assert shapes["gate"].dtype == jnp.bfloat16
    assert jax.eval_shape(layer.apply, {"params": shapes}, x).dtype == jnp.bfloat16
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16), shapes)
    with pytest.raises(TypeError, match="the parameter kernel must be float32"):
        jax.eval_shape(layer.apply, {"params": params}, x)
