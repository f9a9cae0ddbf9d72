"""The text, the models and the bookkeeping of benchmarks.quality, without training."""

import fcntl
import functools
import json
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import made_up
import numpy as np
import pytest
from evaluator import evaluated
from flax import linen as nn

from benchmarks import (
    corpus,
    peer_models,
    quality,
    quality_models,
    quality_tables,
    reach,
    recall_sizes,
    side_by_side,
)

# Of the examples, whose folder side_by_side has added to the path.
import recall  # isort: skip
import train_lm  # isort: skip

pytestmark = pytest.mark.optax

SIZES = dict(width=32, depth=4, heads=2, vocabulary=256, longest=64, implementation="xla")


@pytest.fixture
def installation(tmp_path):
    """Two folders as of an installation, one inside the other; 26 of the files are text to keep."""
    library = tmp_path / "lib"
    packages = library / "site-packages"
    (packages / "some").mkdir(parents=True)
    for i in range(25):
        (packages / "some" / f"{i:02}.py").write_text(f"line {i}\n" * 40)
    (library / "one.txt").write_text("é" * 200)
    (library / "two.txt").write_text("é" * 200)  # a copy
    (library / "latin.py").write_bytes(b"\xe9" * 400)
    (library / "nul.py").write_text("a\0b")
    (library / "table.py").write_text("0" * (corpus.LARGEST + 1))
    (library / "data.bin").write_text("no text")
    return [library, packages]


@pytest.fixture
def text(installation, tmp_path, monkeypatch):
    """A folder written by benchmarks.corpus, of bytes."""
    monkeypatch.setattr(corpus, "roots", lambda: installation)
    folder = tmp_path / "corpus"
    options = ["--bytes", "6e3", "--held-out", "1e3", "--vocabulary", "256"]
    corpus.main([*options, "--out", str(folder)])
    return folder


def test_text_is_chosen_by_content(installation, text):
    files = corpus.collect(installation)
    assert len(files) == 26 and {"one.txt", "some/00.py"} <= {file.path for file in files}
    assert [file.digest for file in files] == sorted(file.digest for file in files)
    facts = json.loads((text / "corpus.json").read_text())
    lines = (text / "paths.txt").read_text().splitlines()
    for part, least in (("train", 6e3), ("held_out", 1e3)):
        found = facts[part]
        assert found["files"] == sum(line.split()[0] == part for line in lines)
        assert least <= found["bytes"] == found["tokens"] < least + 500
        assert sum(found["packages"].values()) == found["bytes"] - found["files"]  # NULs
    train, held_out = (np.load(text / f"{part}.npy") for part in ("train", "held_out"))
    assert bytes(train.astype(np.uint8)).split(b"\0")[0] not in bytes(held_out.astype(np.uint8))
    with pytest.raises(SystemExit, match="ask for less"):
        corpus.choose(files, 1e3, 1e6)
    assert corpus.roots()[0].is_dir()


def test_models_by_name():
    assert quality_models.parsed("gsa:scale=4:feature_map=None") == (
        ("gsa",),
        dict(scale=4, feature_map=None),
    )
    for name, words in {"rnn": "known: kda", "gsa:scale": "field=value"}.items():
        with pytest.raises(ValueError, match=words):
            quality_models.parsed(name)
    with pytest.raises(ValueError, match="gsa has no setting scales"):
        quality_models.make_model("gsa:scales=4", parameters=1e5, **SIZES)
    params = dict(mixer=dict(D=np.ones(2), L=np.ones(2)))
    filled = quality_models.filled("log_linear:init_D=0.5", params)["mixer"]
    assert filled["D"].tolist() == [0.5, 0.5] and filled["L"] is params["mixer"]["L"]
    quality_models.template("log_linear", dict(init_D=0.5), dict(num_heads=1), 8)


@pytest.mark.parametrize("name", ["hybrid", "log_linear", "path:shift=True"])
def test_models_have_the_wanted_size(name):
    model = quality_models.make_model(name, parameters=2e5, **SIZES)
    step = 3 * 32 * 4 * quality_models.MULTIPLE
    assert abs(quality_models.count(model) - 2e5) <= step / 2
    kinds = [type(layer.mixer).__name__ for layer in model.config.layers]
    last = dict(hybrid="PaTHAttention", log_linear="LogLinearMamba2").get(name, "Shifted")
    assert kinds[:3] == kinds[:1] * 3 and kinds[3] == last
    assert model.stacked == (name != "hybrid")


class Same(nn.Module):
    """A mixer that returns its input."""

    @nn.compact
    def __call__(self, x, *, mask, segment_ids):
        return x


def test_shifted_features_are_the_token_before():
    x = np.arange(24.0).reshape(1, 3, 8)
    y = quality_models.Shifted(Same).apply({}, x)
    np.testing.assert_array_equal(y[..., :4], x[..., :4])
    np.testing.assert_array_equal(y[0, 1:, 4:], x[0, :-1, 4:])
    assert not y[0, 0, 4:].any()


def test_one_step_serves_all_rates_and_lengths():
    """Given each step's rate, the optimizer of a rate of 1 makes the updates of the example's."""
    params = dict(kernel=np.array([1.0, -2.0], np.float32))
    example, _ = train_lm.make_optimizer(20, 0.5, weight_decay=0.1)
    optimizer, rates = quality.adjustable(train_lm.with_rate(1.0, 0.1)), quality.rates(0.5, 20)
    want_state, state = example.init(params), optimizer.init(params)
    for step in range(4):
        gradient = dict(kernel=np.array([1.0, step], np.float32))
        want, want_state = example.update(gradient, want_state, params)
        got, state = optimizer.update(gradient, (state[0], rates[step]), params)
        np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-6)
        assert state[1] == rates[step] and got["kernel"].any() == (step > 0)


def test_windows_are_read_once():
    batches = quality.Batches(np.arange(101, dtype=np.uint16), 3, 2, 10)
    first = np.concatenate([batches[step] for step in range(5)])
    assert sorted(first[:, 0]) == list(range(0, 100, 10))
    assert (np.diff(first, axis=1) == 1).all() and first.dtype == np.int32


def made(value):
    future = Future()
    future.set_result(value)
    return future


@pytest.fixture
def calls(monkeypatch):
    """Programs that compute nothing: a step's loss is its rate, each byte costs one bit. Returns
    the models whose programs were asked for."""
    asked = []

    def begin(seed, rate):
        return dict(params=np.zeros(7), moments=(None, np.float32(rate)))

    def step(state, x):
        return state, state["moments"][1] * np.log(2), None

    def nats(params, x):
        return np.full((len(x), x.shape[1] - 1), np.log(2))

    def programs(self, name):
        asked.append(name)
        model = quality_models.make_model(name, parameters=2e5, **SIZES)
        found = dict(model=made(model), step=made((step, 1.5, 2.0)), initial=made(begin))
        return found | {16 * times: made(nats) for times in (1, 2, 4)}

    monkeypatch.setattr(quality.Programs, "begin", lambda self, name: None)
    monkeypatch.setattr(quality.Programs, "get", programs)
    monkeypatch.setattr(quality, "rates", lambda lr, steps: np.full(steps, lr))
    return asked


TINY = "--length 16 --batch 4 --steps 20 --width 32 --depth 4 --heads 2".split()
TINY += "--models attention,kda --lr 0.5,1".split()


def runs(path):
    rows = json.loads(path.read_text())["results"]
    return [(row["model"], row["lr"]) for row in rows if "unfinished" not in row]


def test_runs_are_kept_and_not_repeated(text, tmp_path, calls):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    options = ["--corpus", str(text), *TINY]
    assert quality.main([*options, "--out", str(one)]) == 0
    assert calls == ["attention"] * 2 + ["kda"] * 2
    assert runs(one) == [("attention", 0.5), ("attention", 1), ("kda", 0.5), ("kda", 1)]
    for row in json.loads(one.read_text())["results"]:
        assert row["losses"] == pytest.approx([row["lr"]] * 2) and row["tokens"] == 20 * 64
        assert row["held_out_by_length"] == pytest.approx({"1": 1.0, "2": 1.0, "4": 1.0})
        assert len(row["held_out_by_place"]) == quality.BINS and row["parameters"] == 7
        assert row["curve"][-1] == dict(step=20, held_out_bits_per_byte=pytest.approx(1))
        assert row["train_s"] == pytest.approx(row["step_ms"] * 20e-3, rel=0.9)
    more = [*options, "--lr", "1", "--seeds", "0,1", "--add", str(one), "--out", str(two)]
    assert quality.main(["--add", str(one), "--out", str(two)]) == 0
    assert quality.main([*more, "--limit", "0"]) == 0
    assert len(calls) == 4 and json.loads(two.read_text()) == json.loads(one.read_text())
    assert quality.main(more) == 0
    assert calls[4:] == ["attention", "kda"] and len(json.loads(two.read_text())["results"]) == 6
    with pytest.raises(SystemExit, match="--steps must be 10 to"):
        quality.load(quality.parse([*options, "--steps", "1000"]))


def test_processes_share_the_runs(text, tmp_path, calls):
    """A model that another has begun comes last, and of it what the other has not begun."""
    out, folder = tmp_path / "out.json", tmp_path / "share"
    other = side_by_side.Shares(folder)
    assert other.take("model", "attention") and other.take("attention", 0.5, 0)
    assert not other.take("attention", 0.5, 0) and other.has_or_takes("attention", 0.5, 0)
    options = ["--corpus", str(text), *TINY, "--out", str(out), "--share", str(folder)]
    assert quality.main([*options, "--vocabulary", "256"]) == 0
    assert runs(out) == [("kda", 0.5), ("kda", 1), ("attention", 1)]
    assert not side_by_side.Shares(folder).has_or_takes("kda", 1.0, 0)
    with pytest.raises(SystemExit, match="--vocabulary 100 is not that of"):
        quality.load(quality.parse([*options, "--vocabulary", "100"]))
    with pytest.raises(SystemExit, match="benchmarks\\.corpus writes it"):
        quality.load(quality.parse(["--corpus", str(tmp_path)]))


def test_what_is_unfinished_is_done_again(text, tmp_path, calls, monkeypatch):
    """A run that would end after --limit is given up; a process may be stopped at any time."""
    out = tmp_path / "out.json"
    options = ["--corpus", str(text), *TINY, "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(quality.Training, "left", lambda training: 100 - training.steps)
        assert quality.main([*options, "--limit", "50"]) == 0
    assert runs(out) == [] and len(json.loads(out.read_text())["results"]) == 4

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quality, "evaluate", stopped)
        quality.main(options)
    assert runs(out) == []
    assert quality.main(options) == 0
    rows = json.loads(out.read_text())["results"]
    assert len(rows) == 4 and all(map(side_by_side.is_whole, rows))
    # Nor does what is unfinished, of an --add, take the place of what is whole.
    report = side_by_side.Report(str(out), quality.KEYS, "quality", [])
    report.keep(rows[0] | dict(unfinished="interrupted"))
    assert json.loads(out.read_text())["results"] == rows


def test_groups_of_steps_overlap():
    """One group is awaited when the next is there to be run."""
    waited = []

    class Loss:
        def __init__(self, step):
            self.step = step

        def __float__(self):
            waited.append(self.step)
            return float(self.step)

    def run(state, tokens):
        assert state["moments"][1] == 0.5 + tokens
        return state, Loss(tokens), None

    training = quality.Training(run, dict(params=3, moments=(0, 0)), 0.5 + np.arange(9))
    training.enqueue([0, 1])
    assert waited == [] and training.params == 3 and training.left() == 0
    training.enqueue([2, 3])
    assert waited == [0, 1] and training.losses == [0.5]
    training.finish()
    assert waited == [0, 1, 2, 3] and len(training.ms) == 2 and training.seconds > 0
    training.ms = [9e9, *[500.0] * 4]  # the first is the longest
    assert training.left() == 5 * 0.5


def test_recall_is_measured_by_size(tmp_path, monkeypatch):
    """By a program whose accuracy is its learning rate: one seed tries all, the others the best."""

    class Program:
        def __init__(self, name, key_dim, options):
            mixer = quality_models.template(name, {}, dict(num_heads=2, key_dim=key_dim), 16)
            layer = quality_models.Layer(mixer, quality_models.SwiGLU(32))
            self.model = quality_models.LanguageModel(quality_models.Config(8, 32, (layer,)))

        def state(self, seeds):
            trained.append(seeds)
            return (np.zeros((len(seeds), 5)), None), None

        def run(self, state, keys, lr, first, last):
            loss = np.where(lr == 9, np.nan, np.ones(len(lr)))
            return state, loss, np.stack([lr, lr], axis=1)

    trained = []
    monkeypatch.setattr(recall_sizes, "Program", Program)
    out = tmp_path / "recall.json"
    options = ["--models", "kda", "--key-dims", "16", "--pairs", "2,4", "--length", "16"]
    options += ["--batch", "2", "--steps", "40", "--lr", "0.25,0.5,9", "--out", str(out)]
    assert recall_sizes.main(options) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(row["seed"], row["lr"]) for row in rows] == [
        *((0, 0.25), (0, 0.5), (0, 9.0)),
        *((1, 0.5), (2, 0.5)),
    ]
    assert rows[1]["accuracy"] == [0.5, 0.5] and len(rows[1]["curve"]) == recall_sizes.PARTS
    assert rows[2]["diverged_after"] == 0 and rows[2]["accuracy"] == [0, 0]
    assert trained == [[0, 0, 0], [1, 2]]  # side by side
    state = 2 * 16 * 16 * 4 + 3 * 3 * 32 * 4  # and the last inputs of three convolutions
    assert rows[0]["state_bytes"] == state and rows[0]["parameters"] == 5
    monkeypatch.setattr(recall_sizes, "Program", pytest.fail)
    assert recall_sizes.main(options) == 0  # all is there
    side_by_side.Shares(tmp_path).take("kda", 16)
    another = [*options, "--steps", "20", "--share", str(tmp_path)]
    assert recall_sizes.main(another) == 0  # another process does it
    with pytest.raises(SystemExit):
        recall_sizes.parse(["--models", "hybrid"])


def test_models_beside_each_other_are_those_alone(begun_by_numpy):
    """Two rates and two seeds in one program have each the numbers of a program of its own."""
    options = "--models attention --key-dims 16 --pairs 1,2 --length 8 --vocabulary 8 --width 32"
    options += " --depth 1 --heads 1 --batch 2 --steps 20 --dtype float32"
    options = recall_sizes.parse([*options.split(), "--implementation", "reference"])
    program = recall_sizes.Program("attention", 16, options)
    state, keys = program.state([3, 4])
    lr = jnp.array([0.01, 0.02])
    alone = jax.tree.map(lambda x: x[1], (state, keys))
    static = dict(model=program.model, optimizer=program.optimizer, batch=2)
    static |= dict(task=recall.Task((1, 2), 8, 8))
    one = jax.jit(lambda *x: recall.train_steps(*x, 0, 1, **static))
    want = evaluated(one)(*alone, lr[1])
    (params, _), losses, accuracies = evaluated(program.run)(state, keys, lr, 0, 1)
    got = jax.tree.map(lambda x: x[1], (params, losses, accuracies))
    want = (want[0][0], *want[1:])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, want)


def test_tables_say_what_was_found(tmp_path):
    written = (quality_tables.quality, quality_tables.recall_sizes, quality_tables.peer_models)
    assert [write(tmp_path) for write in written] == [""] * 3
    made_up.write(tmp_path)
    losses, recall, peers = (write(tmp_path) for write in written)
    row = "| `kda` | 113.0 | 0.003 | 1.0100 (1.0000 to 1.0200) | 1.0000 (0.9900 to 1.0100) |"
    assert row in losses and "| 2 | 0.001: 1.1000 | 500,000 | 9.5 |" in losses
    assert "| 3 `kda` : 1 `path_attention` | 113.0 |" in losses and "`gsa`, `scale=4`" in losses
    assert "| `mesa_net` | 64 | 128 | 1.000 | 0.850 (0.800 to 0.900) |" in recall
    words = "- `kda`: 3.8% beside products and kernels: `mlp/mul` 3.0%, 2 others 0.8%."
    assert words in peers
    assert "| `kda` | 500,000 | 250,000 | 2.00 | 30.0 | 40.0 | 118.0 | 118.0 |" in peers


def test_peers_are_put_beside_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made_up.write(tmp_path)
    ours, out = tmp_path / "peer_models.json", tmp_path / "out.json"
    options = ["--add", str(ours), "--out", str(out)]
    assert peer_models.main([*options, "--limit", "0"]) == 0  # PyTorch is not needed so far
    assert json.loads(out.read_text()) == json.loads(ours.read_text())
    # Of two GPUs there is a row of its own, which no table has beside fla's.
    report = side_by_side.Report(str(out), peer_models.KEYS, "peer_models", [])
    report.keep(report.rows[0] | dict(gpus=2, tokens_per_s=9e5))
    out.rename(ours)
    assert "| `kda` | 500,000 |" in quality_tables.peer_models(tmp_path)
    with peer_models.turn(tmp_path), open(tmp_path / "gpu_") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(SystemExit):
        peer_models.parse(["--precision", "float8"])
    assert "unknown float8; known: bfloat16, autocast" in capsys.readouterr().err


def test_reach_of_a_mean():
    found = reach.reach(lambda x: x.at[:, -1].set(x[:, -8:].mean(axis=1)), jnp.ones((1, 32, 4)))
    assert found["last_1"] == pytest.approx(1 / 8) and found["last_4"] == pytest.approx(1 / 2)
    assert found["last_16"] == pytest.approx(1) and found["tokens"] == pytest.approx(8)
    assert found["size"] == pytest.approx(1)
