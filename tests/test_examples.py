"""The examples: a small run from end to end, resuming, sampling, and what they say of mistakes."""

import json
import math
import pathlib
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from programs import assert_fails

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import checkpoint
import generate
import text
import train_lm
from model import MIXERS, LanguageModel

pytestmark = pytest.mark.optax

# The reference compiles in a fraction of the chunked implementation's time.
TINY = (
    "--width 32 --depth 1 --heads 2 --length 16 --batch 2 --steps 4 --sample-length 20 "
    "--implementation reference"
).split()
EVERY_TWO = ["--save-every", "2", "--evaluate-every", "2"]


def train(*arguments):
    train_lm.main([*TINY, *EVERY_TWO, *map(str, arguments)])


def load_state(out, step):
    manager = checkpoint.open_manager(out)
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


# Not of the module: pytest-xdist sends a process its tests in parts, and ends the module with each.
@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of four steps, with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("run")
    train("--out", out)
    return out


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_what_it_promises(trained):
    lines = metrics(trained)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out_bits_per_byte" in line] == [2, 4]
    first = lines[0]["loss"]
    assert first == pytest.approx(math.log(256), rel=0.05)  # an untrained model knows nothing
    assert lines[-1]["held_out_bits_per_byte"] < 8.0
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_is_the_uninterrupted_one(trained, copy, capsys):
    shutil.rmtree(copy / "checkpoints" / "4")
    train("--out", copy, "--resume")
    assert "resumed from step 2" in capsys.readouterr().out
    chex.assert_trees_all_equal(load_state(copy, 4), load_state(trained, 4))

    def numbers(out):
        return [
            {k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics(out)
        ]

    assert numbers(copy) == numbers(trained)


def test_generate_continues_the_prompt(trained, capsys):
    def run(*arguments):
        generate.main(
            ["--checkpoint", str(trained), "--prompt", "The", "--length", "30", *arguments]
        )
        return capsys.readouterr().out

    assert run().startswith("The")
    drawn = run("--seed", "1")
    assert drawn == run("--seed", "1") != run("--seed", "2")
    greedy = run("--temperature", "0", "--seed", "1")
    assert drawn != greedy == run("--temperature", "0", "--seed", "2")


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param(None, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "mixer",
    [
        # The layers' tests have all of them.
        pytest.param(name, marks=() if name in ("kda", "path", "attention") else pytest.mark.slow)
        for name in MIXERS
    ],
)
def test_decoding_is_the_forward(mixer, implementation):
    model = LanguageModel(mixer, width=32, depth=2, heads=2, implementation=implementation)
    prompt = jax.random.randint(jax.random.key(0), (2, 5), 0, 256)
    params = jax.jit(model.init)(jax.random.key(1), prompt)["params"]
    tokens, logits = generate.sample(model, params, prompt, jax.random.key(2), 1.0, length=12)
    distance = train_lm.check_decoding(model, params, prompt, tokens, logits, length=16)
    assert distance < 1e-4
    with pytest.raises(RuntimeError, match="disagree"):
        wrong = logits.at[1, 3].add(0.1 * jnp.abs(logits).max())
        train_lm.check_decoding(model, params, prompt, tokens, wrong, length=16)


@pytest.mark.parametrize(
    ("mixer", "others"),
    [
        ("kda", {"bias", "A_log", "dt_bias"}),
        ("log_linear", {"A_log", "dt_bias", "D", "L"}),
        ("mesa", {"bias", "lambda_params"}),
    ],
)
def test_weight_decay_spares_norms_biases_and_gates(mixer, others):
    tokens = jnp.zeros((1, 2), jnp.int32)
    model = LanguageModel(mixer, width=32, depth=1, heads=2)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    marked = jax.tree_util.tree_leaves_with_path(train_lm.decays(params))
    spared = {path[-1].key for path, decayed in marked if not decayed}
    decayed = {path[-1].key for path, decayed in marked if decayed}
    assert spared == {"scale"} | others
    assert decayed == {"kernel", "embedding"}


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--steps 0", "--steps integer >= 1 '0'"),
        ("--lr nan", "--lr number > 0 'nan'"),
        ("--width 30 --heads 4", "--width 30 --heads 4 multiple"),
        ("--mixer lstm", "--mixer 'lstm' kda attention"),
        ("--mixer attention --implementation xla", "--implementation attention"),
        ("--resume --overwrite", "--overwrite not allowed --resume"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    assert_fails(capsys, 2, words, train_lm.main, *arguments.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read No such file"), (b"", "empty"), (b"short", "5 bytes at least 2570")],
)
def test_bad_texts_are_named(content, words, capsys, tmp_path):
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    assert_fails(capsys, 1, words, train_lm.main, "--text", path, "--out", tmp_path / "out")


def test_a_model_that_cannot_be_built_is_explained(capsys, tmp_path):
    options = ("--out", tmp_path, "--width", 16, "--heads", 2)
    assert_fails(capsys, 1, "cannot build head dimension 16 256 8", train_lm.main, *options)


def test_an_existing_run_is_not_overwritten(copy, capsys):
    assert_fails(capsys, 1, "already --resume --overwrite", train_lm.main, "--out", copy)


def test_a_missing_checkpoint_is_named(trained, capsys, tmp_path):
    missing = tmp_path / "nothing"
    assert_fails(capsys, 1, "no checkpoint nothing", train_lm.main, "--resume", "--out", missing)
    assert_fails(capsys, 1, "no checkpoint nothing", generate.main, "--checkpoint", missing)
    options = ("--checkpoint", trained, "--step", 3)
    assert_fails(capsys, 1, "no checkpoint step 3 [2, 4]", generate.main, *options)
    options = ("--checkpoint", trained, "--prompt", "")
    assert_fails(capsys, 2, "--prompt empty", generate.main, *options)


def test_a_checkpoint_of_another_model_is_refused(copy, capsys):
    options = [*TINY, "--resume", "--out", copy, "--width", 64, "--seed", 7]
    assert_fails(capsys, 1, "--width (32, now 64) --seed (0, now 7)", train_lm.main, *options)


@pytest.mark.parametrize("part", ["state", "settings"])
def test_a_damaged_checkpoint_is_named(part, copy, capsys):
    for path in (copy / "checkpoints" / "4" / part).rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    words = "cannot read checkpoints/4 damaged"
    assert_fails(capsys, 1, words, train_lm.main, *TINY, "--resume", "--out", copy)
    assert_fails(capsys, 1, words, generate.main, "--checkpoint", copy)
