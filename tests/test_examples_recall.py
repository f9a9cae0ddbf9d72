"""examples/recall.py: its sequences, and a small run from end to end."""

import errno
import json
import pathlib
import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import assert_fails
from rich.console import Console

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import recall

pytestmark = [pytest.mark.optax, pytest.mark.usefixtures("begun_by_numpy")]

TASK = recall.Task(pairs=(1, 3, 6), length=27, vocabulary=16)


make_batch = jax.jit(recall.make_batch, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def sequences():
    return jax.tree.map(np.asarray, make_batch(jax.random.key(0), 9000, TASK))


def test_every_query_asks_for_the_value_beside_its_key(sequences):
    for tokens, targets, n in zip(*sequences, TASK.pairs * 3000, strict=True):
        keys, values, rest = tokens[: 2 * n : 2], tokens[1 : 2 * n : 2], tokens[2 * n :]
        assert len(set(keys)) == len(set(values)) == n
        assert keys.min() >= 0 and keys.max() < 8 <= values.min() and values.max() < 16
        (asked,) = np.nonzero(targets != recall.NO_TARGET)
        assert asked.min() >= 2 * n and (asked % 2 == 0).all()
        assert dict(zip(tokens[asked], targets[asked], strict=True)) == dict(
            zip(keys, values, strict=True)
        )
        # No key comes anywhere else.
        assert len(asked) == n == np.isin(rest, keys).sum()
        assert tokens.min() >= 0 and tokens.max() < 16


def test_sequences_depend_on_the_key_alone(sequences):
    again = make_batch(jax.random.key(0), 9000, TASK)
    jax.tree.map(np.testing.assert_array_equal, again, sequences)
    other, _ = make_batch(jax.random.key(1), 9000, TASK)
    assert (other != sequences[0]).any(axis=1).all()
    assert len({tuple(row) for row in sequences[0]}) == 9000


def test_queries_lie_by_a_power_law(sequences):
    """The one query of every third sequence has twelve places."""
    asked = sequences[1][::3] != recall.NO_TARGET
    place = (np.argmax(asked, axis=1) - 2) // 2
    law = np.arange(1, 13) ** (recall.POWER - 1)
    shares = np.bincount(place, minlength=12) / 3000
    np.testing.assert_allclose(shares, law / law.sum(), atol=0.03)


class Bias:
    """A model whose logits are its one parameter, whatever the tokens are."""

    def apply(self, variables, tokens):
        return jnp.broadcast_to(variables["params"]["bias"], (*tokens.shape, 16))


def test_a_score_is_that_of_the_queries():
    """The model is sure, by a margin of 4, of token 9; of three queries two have this value."""
    targets = jnp.full((2, 5), recall.NO_TARGET).at[0, jnp.array([2, 4])].set(jnp.array([9, 8]))
    targets = targets.at[1, 3].set(9)
    params = {"bias": 4.0 * jax.nn.one_hot(9, 16)}
    nats, right = recall.score(Bias(), params, jnp.zeros((2, 5), jnp.int32), targets)
    sure = np.log(np.exp(4) + 15) - 4
    np.testing.assert_allclose(nats, [sure + 2, sure], rtol=1e-5)
    np.testing.assert_array_equal(right, [0.5, 1.0])


def test_steps_have_their_own_sequences_and_learning_rate():
    task = recall.Task(pairs=(1, 2), length=12, vocabulary=16)
    shared = dict(model=Bias(), optimizer=optax.sgd(1.0), task=task, batch=4)

    def run(lr, first, last):
        params = {"bias": jnp.zeros(16).at[8].set(1.0)}
        state = params, shared["optimizer"].init(params)
        state, loss, accuracy = recall.train_steps(
            state, jax.random.key(3), lr, first, last, **shared
        )
        return state[0]["bias"], loss, accuracy

    # Without a learning rate a mean over two steps is that of the single ones.
    _, *both = run(0.0, 0, 2)
    _, *one = run(0.0, 0, 1)
    _, *other = run(0.0, 1, 2)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, one, other)
    chex.assert_trees_all_close(both, mean, rtol=1e-6)
    assert float(jnp.abs(one[0] - other[0])) > 1e-3
    start = run(0.0, 0, 1)[0]
    moved = [run(lr, 0, 1)[0] - start for lr in (0.1, 0.3)]
    np.testing.assert_allclose(3 * moved[0], moved[1], rtol=1e-4, atol=1e-6)


def test_the_best_learning_rate_is_reported(monkeypatch):
    """It has the highest accuracy; one whose loss is not finite is none."""

    def train_with(lr, state, run, mixer, options, console):
        assert float(jnp.std(state[0]["embed"]["embedding"])) == pytest.approx(0.5, rel=0.1)
        if lr == 0.3:
            raise FloatingPointError("its loss is inf")
        accuracy = {0.1: 0.4, 0.2: 0.9, 0.4: 0.6}[lr]
        return [dict(accuracy=accuracy, lr=lr, compile_seconds=10 * lr)] * 2, [lr]

    monkeypatch.setattr(recall, "train_with", train_with)
    options = recall.parse([*TINY, "--lr", "0.1,0.2,0.3,0.4"])
    rows, curve = recall.train("attention", options, Console(quiet=True))
    assert curve == [0.2]
    assert rows == [dict(accuracy=0.9, lr=0.2, compile_seconds=1.0)] * 2
    options.lr = [0.3]
    with pytest.raises(recall.InputError, match="no loss stayed finite"):
        recall.train("attention", options, Console(quiet=True))


def test_results_stay_where_new_ones_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "recall.json"
    path.write_text("earlier")

    def full(self, text):
        pathlib.Path(self).touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    names = ("width", "depth", "length", "steps", "batch", "lr", "weight_decay", "pairs")
    report = dict(
        meta=dict(card="cpu", jax="0", date="2026-11-28"),
        settings=dict.fromkeys(names, 1),
        results=[],
    )
    with pytest.raises(recall.InputError, match=r"recall.json: No space left on device"):
        recall.write(report, path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_ctrl_c_says_how_to_add_the_rest(tmp_path, monkeypatch, capsys):
    def train(mixer, options, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(recall, "train", train)
    arguments = [*TINY, "--mixers", "kda,gsa", "--out", tmp_path / "recall.json"]
    assert_fails(capsys, 130, "interrupted --mixers kda,gsa adds", recall.main, *arguments)


def test_help_has_the_settings_defaults(capsys):
    with pytest.raises(SystemExit):
        recall.main(["--help"])
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    help = dict(re.findall(r"--([a-z-]+) (.*?)(?= --[a-z-]+ |$)", text))
    assert "(small: 2,4,8,16; full: 4,8,16,32,64,128)" in help["pairs"]
    for setting, values in recall.SETTINGS.items():
        for name, value in values.items():
            shown = f"{setting}: {recall.as_argument(value)}"
            assert shown in help[name.replace("_", "-")]


# The reference compiles fastest.
TINY = (
    "--width 32 --depth 1 --heads 1 --length 8 --pairs 1,2 --vocabulary 8 --batch 16 --steps 60 "
    "--lr 0.01 --implementation reference"
).split()


def test_a_run_and_another_that_joins_it(tmp_path, capsys):
    out = tmp_path / "new" / "recall.json"

    def run(*arguments):
        recall.main([*TINY, "--out", str(out), *arguments])
        return json.loads(out.read_text())

    first = run("--mixers", "attention,gsa")
    assert [(row["mixer"], row["pairs"]) for row in first["results"]] == [
        *(("attention", 1), ("attention", 2)),
        *(("gsa", 1), ("gsa", 2)),
    ]
    for row in first["results"]:
        assert row["steps"] == 60 and row["tokens_per_second"] > 0 and row["parameters"] > 0
        assert row["queries"] == 3 * 8 * row["pairs"]
    for curve in first["curves"].values():
        assert curve[-1]["step"] == 60 and len(curve[-1]["accuracy"]) == 2
        assert curve[-1]["loss"] < curve[0]["loss"]
    assert first["meta"].keys() == {"card", "jax", "date", "command"}
    assert "--mixers attention,gsa" in first["meta"]["command"]
    picture = out.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")

    # Once more: the same numbers from the same seed, and the other mixer's are kept.
    picture.unlink()
    second = run("--mixers", "attention")  # it compiles fastest
    rows = sorted(second["results"], key=lambda row: row["mixer"])
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in first["results"]]
    assert second["meta"]["command"].startswith(first["meta"]["command"] + " && ")
    assert picture.exists()

    again = [*TINY, "--mixers", "gsa", "--out", out]
    assert_fails(capsys, 1, "lr ([0.01], now [0.5]) --out", recall.main, *again, "--lr", 0.5)
    out.write_text("[]")
    assert_fails(capsys, 1, "recall.json no results", recall.main, *again)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--pairs 4,x", "--pairs integer >= 1 'x'"),
        ("--pairs 4,17", "--length 64 17 --pairs"),
        ("--pairs 2,4,8", "--batch 32 multiple 3 --pairs"),
        ("--vocabulary 31", "--vocabulary 31 even"),
        ("--vocabulary 30", "--vocabulary 30 16 --pairs"),
        ("--width 30 --heads 4", "--width 30 --heads 4 multiple"),
        ("--mixers kda,lstm", "--mixers 'lstm' kda attention"),
        ("--setting large", "--setting 'large' small full"),
        ("--out recall.txt", "--out recall.txt .json"),
        ("--steps 0", "--steps integer >= 1 '0'"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    assert_fails(capsys, 2, words, recall.main, *arguments.split())


def test_a_model_that_cannot_be_built_is_explained(capsys, tmp_path):
    run = recall.main, "--out", tmp_path / "recall.json", "--mixers", "kda"
    assert_fails(capsys, 1, "cannot build kda key_dim 16 256 8", *run, "--width", 16)
    # The kernels that the full setting asks for are not there on a CPU.
    assert_fails(capsys, 1, "cannot build kda pallas xla", *run, "--setting", "full")
