"""examples/recall.py: its sequences, and a small run from end to end."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from programs import assert_fails

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import recall

pytestmark = pytest.mark.optax

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
    second = run("--mixers", "gsa")
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
    assert_fails(capsys, 1, "cannot build kda head dimension 16 256 8", *run, "--width", 16)
    # The kernels that the full setting asks for are not there on a CPU.
    assert_fails(capsys, 1, "cannot build kda pallas xla", *run, "--setting", "full")
