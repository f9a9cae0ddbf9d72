"""The training example's parts by their numbers: schedule, step, evaluation, text, sampling."""

import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import text
import train_lm

pytestmark = pytest.mark.optax


@pytest.mark.parametrize(("steps", "warmup"), [(4, 1), (240, 24), (50_000, 1000)])
def test_the_learning_rate_at_the_beginning_the_peak_and_the_end(steps, warmup):
    _, rate = train_lm.make_optimizer(steps, 0.5, 0.1)
    rates = [float(rate(step)) for step in (0, warmup - 1, warmup, steps, steps + 9)]
    assert rates[0] == 0
    assert rates[1] == pytest.approx(0.5 * (warmup - 1) / warmup)
    assert rates[2] == pytest.approx(0.5)
    assert rates[3:] == pytest.approx([0.025, 0.025])
    middle = (steps + warmup) // 2
    cosine = 0.5 * (1 + math.cos(math.pi * (middle - warmup) / (steps - warmup)))
    assert float(rate(middle)) == pytest.approx(0.5 * (0.05 + 0.95 * cosine))


def updates(gradient, weight_decay):
    """What the second step of a run adds to parameters of 1; its learning rate is the peak, 0.5."""
    optimizer, _ = train_lm.make_optimizer(4, 0.5, weight_decay)
    params = {"kernel": jnp.ones(2), "scale": jnp.ones(2)}
    gradient = jax.tree.map(lambda x: x * jnp.asarray(gradient), params)

    def two(params):
        state = optimizer.init(params)
        _, state = optimizer.update(gradient, state, params)
        return optimizer.update(gradient, state, params)

    return jax.jit(two)(params)


def test_weight_decay_is_that_of_the_marked_parameters():
    added, _ = updates(0.0, weight_decay=0.3)
    np.testing.assert_allclose(added["kernel"], -0.5 * 0.3, rtol=1e-6)
    np.testing.assert_array_equal(added["scale"], 0.0)


def test_gradients_are_clipped_and_moments_are_adams():
    """A gradient of norm 8 is of norm 1; Adam's first steps are of the learning rate's size."""
    added, state = updates(4.0, weight_decay=0.0)
    np.testing.assert_allclose(added["kernel"], -0.5, rtol=1e-5)
    ((mu, nu),) = [
        (leaf.mu, leaf.nu)
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(leaf, "mu")
    ]
    np.testing.assert_allclose(mu["scale"], (1 - 0.9**2) * 0.5, rtol=1e-5)
    np.testing.assert_allclose(nu["scale"], (1 - 0.95**2) * 0.25, rtol=1e-5)


class Shifted:
    """A model that is sure, by a margin of 5, that each byte is the one before it plus `by`."""

    def __init__(self, by):
        self.by = by

    def apply(self, variables, tokens):
        return 5.0 * jax.nn.one_hot((tokens + self.by) % 256, 256)


RIGHT = math.log(math.exp(5) + 255) - 5  # nats of a byte that such a model gets right, and wrong
WRONG = RIGHT + 5


def test_the_loss_is_that_of_the_next_byte():
    tokens = jnp.arange(6)[None]
    nats = train_lm.cross_entropy(Shifted(1), None, tokens)
    np.testing.assert_allclose(nats, np.full((1, 5), RIGHT), rtol=1e-5)
    np.testing.assert_allclose(train_lm.cross_entropy(Shifted(0), None, tokens), WRONG, rtol=1e-5)


def test_evaluation_counts_each_byte_once_and_no_padding(monkeypatch):
    """Three windows in batches of two. The padding, zeros, is what the second model is sure of."""
    monkeypatch.setattr(train_lm, "forward", lambda params, x, model: model.apply(params, x))
    data = np.arange(1, 14, dtype=np.uint8)
    for by, nats in ((1, RIGHT), (0, WRONG)):
        bits = train_lm.evaluate(Shifted(by), None, data, batch=2, length=4)
        assert bits == pytest.approx(nats / math.log(2), rel=1e-5)


def test_batches_depend_on_seed_and_step_alone():
    data = np.arange(200, dtype=np.uint8)
    options = dict(batch=4, length=16)
    batch = text.batch_at(data, 3, seed=1, **options)
    np.testing.assert_array_equal(batch, text.batch_at(data, 3, seed=1, **options))
    np.testing.assert_array_equal(np.diff(batch), 1)
    assert batch.shape == (4, 17)
    for step, seed in ((4, 1), (3, 2)):
        assert (batch != text.batch_at(data, step, seed=seed, **options)).any()


def test_windows_predict_every_byte_once():
    data = np.arange(23, dtype=np.uint8)
    np.testing.assert_array_equal(text.windows(data, 5)[:, 1:].ravel(), np.arange(1, 21))


def test_no_paragraph_is_both_trained_on_and_held_out():
    paragraphs = [p.strip() for p in text.python_documentation().decode().split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_byte_models_by_hand():
    data = np.frombuffer(b"aabab", np.uint8)
    a, b, z = b"abz"
    # Three of five bytes are "a"; one pseudo-count for each of 256 bytes.
    np.testing.assert_allclose(text.unigram(data, 1.0)[z, [a, b, z]], np.array([4, 3, 1]) / 261)
    # After "a" come a, b, b; after "b" comes a; after "z" nothing is known.
    table = text.bigram(data, 1.0, 2.0)
    np.testing.assert_allclose(table.sum(axis=1), 1.0)
    np.testing.assert_allclose(table[a, b], (2 + 2 * 3 / 261) / (3 + 2))
    np.testing.assert_allclose(table[b, a], (1 + 2 * 4 / 261) / (1 + 2))
    np.testing.assert_allclose(table[z, a], 4 / 261)
    expected = -(math.log2(table[a, b]) + math.log2(table[b, a])) / 2
    assert text.bits_per_byte(table, np.frombuffer(b"aba", np.uint8)) == pytest.approx(expected)


def test_the_bigram_model_learns_what_the_unigram_model_cannot():
    data = np.frombuffer(b"ab" * 2000, np.uint8)
    bits = text.ngram_baselines(data[:3000], data[3000:])
    assert bits["unigram"] == pytest.approx(1.0, abs=0.01)
    assert bits["bigram"] == pytest.approx(0.0, abs=0.01)


def test_the_held_out_text_is_the_end():
    data = np.arange(100, dtype=np.uint8)
    train, held_out = text.split_text(data, 9)
    np.testing.assert_array_equal(train, data[:90])
    np.testing.assert_array_equal(held_out, data[90:])


def test_batches_reach_the_first_and_the_last_window():
    data = np.arange(6, dtype=np.uint8)
    batch = text.batch_at(data, 1, seed=0, batch=100, length=3)
    assert set(batch[:, 0]) == {0, 1, 2} and batch.max() == 5


class Bias:
    """A model whose logits are its one parameter, whatever the tokens are."""

    def apply(self, variables, tokens):
        return jnp.broadcast_to(variables["params"]["bias"], (*tokens.shape, 256))


def test_a_step_returns_the_loss_and_gradient_of_the_parameters_it_took():
    optimizer, _ = train_lm.make_optimizer(4, 0.5, 0.0)
    params = {"bias": jnp.zeros(256)}
    state = {"params": params, "moments": optimizer.init(params)}
    tokens = jnp.array([[0, 1, 1, 1, 2]])  # three of the four bytes to predict are the same
    for _ in range(2):  # the first step's learning rate is 0
        state, loss, norm = train_lm.train_step(state, tokens, model=Bias(), optimizer=optimizer)
        assert float(loss) == pytest.approx(math.log(256), rel=1e-5)
        gradient = np.full(256, 1 / 256) - np.bincount([1, 1, 1, 2], minlength=256) / 4
        assert float(norm) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    np.testing.assert_allclose(state["params"]["bias"], -0.5 * np.sign(gradient), rtol=1e-3)
