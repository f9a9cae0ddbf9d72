"""LatentAttention: against a float64 definition; decoding, padding and segments against itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated

from jla.models.latent_attention import LatentAttention

D, T = 24, 11
KIMI = dict(num_heads=3, latent_dim=12, nope_dim=8, rope_dim=4, value_dim=6)
CASES = {"kimi": KIMI, "rotated": KIMI | dict(rope_theta=100.0, query_latent_dim=10)}
DECODE = "rotated"  # and its shapes in all that follows: they share compiled programs


@functools.cache
def made(name, decode=False):
    """A layer, its parameters and an evaluated call `f(variables, x, mask, segment_ids)`."""
    layer = LatentAttention(**CASES[name], decode=decode)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((2, T, D)))["params"]
    draw = np.random.default_rng(1)

    def parameter(path, leaf):
        values = draw.normal(size=leaf.shape) * leaf.shape[0] ** -0.5
        return jnp.asarray(1 + values if path[-1].key == "scale" else values, jnp.float32)

    def call(variables, x, mask, segment_ids):
        return layer.apply(variables, x, mask=mask, segment_ids=segment_ids, mutable=["cache"])

    parameters = jax.tree_util.tree_map_with_path(parameter, shapes)
    return layer, parameters, evaluated(jax.jit(call))


def inputs(seed=0, tokens=T):
    return np.random.default_rng(seed).normal(size=(2, tokens, D)).astype(np.float32)


def definition(options, params, x):
    """The layer of one row x [T, D] in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    c, n, r = (options[name] for name in ("latent_dim", "nope_dim", "rope_dim"))
    theta = options.get("rope_theta")

    def norm(name, z):
        return z / np.sqrt(np.mean(z**2, -1, keepdims=True) + 1e-6) * p[name]["scale"]

    def turned(z):
        """z [T, ..., r], each pair of features as a complex number."""
        if theta is None:
            return z
        angle = np.arange(len(z))[:, None] * theta ** (-np.arange(r // 2) / (r // 2))
        pairs = z[..., : r // 2] + 1j * z[..., r // 2 :]
        pairs = pairs * np.exp(1j * angle).reshape(len(z), *[1] * (z.ndim - 2), -1)
        return np.concatenate([pairs.real, pairs.imag], -1)

    if "query" in p:
        q = np.einsum("td,dhk->thk", x, p["query"]["kernel"])
    else:
        z = norm("query_norm", x @ p["query_down"]["kernel"])
        q = np.einsum("td,dhk->thk", z, p["query_up"]["kernel"])
    a, b = q[..., :n], turned(q[..., n:])
    z, s = np.split(x @ p["latent_down"]["kernel"], [c], -1)
    z, s = norm("latent_norm", z), turned(s)
    k, v = np.split(np.einsum("tc,chd->thd", z, p["latent_up"]["kernel"]), [n], -1)
    logits = (np.einsum("thn,shn->hts", a, k) + np.einsum("thr,sr->hts", b, s)) * (n + r) ** -0.5
    logits = np.where(np.tri(len(x), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shv,hvd->td", weights, v, p["out"]["kernel"])


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    _, params, call = made(name)
    x = inputs()
    y, _ = call({"params": params}, x, None, None)
    for row, ours in zip(x, y, strict=True):
        np.testing.assert_allclose(ours, definition(CASES[name], params, row), atol=2e-5)


def test_many_queries_go_block_by_block(monkeypatch):
    layer, params, call = made(DECODE)
    x = inputs()
    want, _ = call({"params": params}, x, None, None)
    monkeypatch.setattr("jla.models.intervals.QUERIES_AT_ONCE", 4)
    got = evaluated(jax.jit(layer.apply))({"params": params}, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_decoding_is_the_forward_pass_and_ignores_padding():
    """A prefill with padding anywhere, then token by token; the last call finds no room."""
    _, params, forward = made(DECODE)
    layer, _, call = made(DECODE, decode=True)
    x = inputs()
    want, _ = forward({"params": params}, x, None, None)
    # Row 0 begins with 7 real tokens, row 1 with 5, among 9; the padding is NaN.
    mask = np.ones((2, 9), bool)
    mask[0, [0, 4]] = mask[1, [2, 3, 5, 8]] = False
    prefill = np.full((2, 9, D), np.nan, np.float32)
    lengths = mask.sum(1)
    for b in range(2):
        prefill[b, mask[b]] = x[b, : lengths[b]]
    cache = jax.eval_shape(layer.init, jax.random.key(0), x)["cache"]
    cache = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), cache)
    cache |= dict(length=jnp.zeros(2, jnp.int32), start=jnp.zeros(2, jnp.int32))
    y, updated = call({"params": params, "cache": cache}, prefill, mask, None)
    assert not np.asarray(y)[~mask].any()
    for b in range(2):
        np.testing.assert_allclose(y[b][mask[b]], want[b, : lengths[b]], atol=1e-5)
    for _ in range(4):
        token = np.stack([x[b, lengths[b]] for b in range(2)])[:, None]
        y, updated = call({"params": params} | updated, token, None, None)
        for b in range(2):
            np.testing.assert_allclose(y[b, 0], want[b, lengths[b]], atol=1e-5)
        lengths = lengths + 1
    np.testing.assert_array_equal(updated["cache"]["length"], lengths)
    assert updated["cache"]["latent"].shape == (2, T, 12)
    assert updated["cache"]["shared_key"].shape == (2, T, 4)
    y, updated = call({"params": params} | updated, token, None, None)  # row 0 is full
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()
    with pytest.raises(ValueError, match="the cache has room for 11 tokens, but row 0 has 12"):
        layer.apply({"params": params} | updated, token, mutable=["cache"])


def test_segments_are_rows_of_their_own():
    """With padding among them, and from call to call."""
    _, params, forward = made(DECODE)
    x = inputs(2)
    mask = np.ones((2, T), bool)
    mask[:, [1, 5]] = False
    ids = np.array([[3, 9, 3, 3, 7, 9, 7, 7, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2]])
    y, _ = forward({"params": params}, x, mask, ids)
    want = np.zeros_like(x)
    for b in range(2):
        for i in set(ids[b][mask[b]]):
            at = mask[b] & (ids[b] == i)
            want[b, at] = definition(CASES[DECODE], params, x[b, at])
    np.testing.assert_allclose(y, want, atol=2e-5)

    layer, _, call = made(DECODE, decode=True)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["cache"]
    updated = dict(cache=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
    # The first call ends within the last segment, which the second continues.
    for part in (slice(0, 9), slice(9, 10), slice(10, 11)):
        first = ids[:, part] if part.start == 0 else None
        real = mask[:, part] if part.start == 0 else None
        y, updated = call({"params": params} | updated, x[:, part], real, first)
        np.testing.assert_allclose(y, want[:, part], atol=2e-5)


def test_one_token_is_decoded_without_all_keys():
    """No array of a decoding call has an axis of places and one of heads and features."""
    layer, params, _ = made(DECODE, decode=True)
    S = 1000
    token = jnp.zeros((1, 1, D))
    cache = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, S, D)))["cache"]
    jaxpr = jax.make_jaxpr(functools.partial(layer.apply, mutable=["cache"]))(
        {"params": params, "cache": cache}, token
    )
    most = S * CASES[DECODE]["latent_dim"]  # its own copy of the cache
    assert max(eqn.outvars[0].aval.size for eqn in jaxpr.eqns) <= most


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(latent_dim=0), "latent_dim must be at least 1, got 0"),
        (dict(query_latent_dim=0), "query_latent_dim must be at least 1, got 0; None is"),
        (dict(rope_dim=3, rope_theta=10.0), "rope_dim must be even with rope_theta, got 3"),
        (dict(rope_theta=-1.0), "rope_theta must be positive, got -1.0"),
    ],
)
def test_wrong_attributes_are_named(options, message):
    layer = LatentAttention(**KIMI | options)
    with pytest.raises(ValueError, match=f"LatentAttention: {message}"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 2, D)))
