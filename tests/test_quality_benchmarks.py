"""The text, the models and the bookkeeping of benchmarks.quality, without training."""

import json
from concurrent.futures import Future

import jax.numpy as jnp
import made_up
import numpy as np
import optax
import pytest
from flax import linen as nn

from benchmarks import (
    corpus,
    peer_models,
    quality,
    quality_models,
    quality_tables,
    reach,
    recall_sizes,
)

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


def test_rates_are_part_of_the_state():
    optimizer = quality.adjustable(optax.identity())
    gradient = dict(kernel=np.array([1.0, -2.0], np.float32))
    inner, _ = optimizer.init(gradient)
    updates, after = optimizer.update(gradient, (inner, np.float32(0.5)))
    np.testing.assert_array_equal(updates["kernel"], [0.5, -1.0])
    assert after[1] == 0.5


def test_windows_are_read_once():
    batches = quality.Batches(np.arange(101, dtype=np.uint16), 3, 2, 10)
    first = np.concatenate([batches[step] for step in range(5)])
    assert sorted(first[:, 0]) == list(range(0, 100, 10))
    assert (np.diff(first, axis=1) == 1).all() and first.dtype == np.int32


def made(value):
    future = Future()
    future.set_result(value)
    return future


def test_runs_are_kept_and_not_repeated(text, tmp_path, monkeypatch):
    """By programs that compute nothing: a step's loss is its rate, each byte costs one bit."""
    calls = []

    def begin(seed, rate):
        return dict(params=np.zeros(7), moments=(None, np.float32(rate)))

    def step(state, x):
        return state, state["moments"][1] * np.log(2), None

    def nats(params, x):
        return np.full((len(x), x.shape[1] - 1), np.log(2))

    def programs(self, name):
        calls.append(name)
        model = quality_models.make_model(name, parameters=2e5, **SIZES)
        found = dict(model=made(model), step=made((step, 1.5, 2.0)), initial=made(begin))
        return found | {16 * times: made(nats) for times in (1, 2, 4)}

    monkeypatch.setattr(quality.Programs, "get", programs)
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    options = ["--corpus", str(text), "--length", "16", "--batch", "4", "--steps", "20"]
    options += ["--width", "32", "--depth", "4", "--heads", "2", "--models", "attention,kda"]
    assert quality.main([*options, "--lr", "0.5,1", "--out", str(one)]) == 0
    assert calls == ["attention"] * 2 + ["kda"] * 2
    rows = json.loads(one.read_text())["results"]
    assert [(row["model"], row["lr"]) for row in rows] == [
        *(("attention", 0.5), ("attention", 1.0)),
        *(("kda", 0.5), ("kda", 1.0)),
    ]
    for row in rows:
        assert row["losses"] == pytest.approx([row["lr"]] * 2) and row["tokens"] == 20 * 64
        assert row["held_out_by_length"] == pytest.approx({"1": 1.0, "2": 1.0, "4": 1.0})
        assert len(row["held_out_by_place"]) == quality.BINS and row["parameters"] == 7
        assert row["curve"][-1] == dict(step=20, held_out_bits_per_byte=pytest.approx(1))
    more = [*options, "--lr", "1", "--seeds", "0,1", "--add", str(one), "--out", str(two)]
    assert quality.main(["--add", str(one), "--out", str(two)]) == 0
    assert quality.main([*more, "--limit", "0"]) == 0
    assert len(calls) == 4 and json.loads(two.read_text()) == json.loads(one.read_text())
    assert quality.main(more) == 0
    assert calls[4:] == ["attention", "kda"] and len(json.loads(two.read_text())["results"]) == 6
    with pytest.raises(SystemExit, match="--steps must be 10 to"):
        quality.load(quality.parse([*options, "--steps", "1000"]))


def test_recall_is_measured_by_size(tmp_path, monkeypatch):
    """By a program whose accuracy is its learning rate: one seed tries all, the others the best."""

    class Program:
        def __init__(self, name, key_dim, options):
            mixer = quality_models.template(name, {}, dict(num_heads=2, key_dim=key_dim), 16)
            layer = quality_models.Layer(mixer, quality_models.SwiGLU(32))
            self.model = quality_models.LanguageModel(quality_models.Config(8, 32, (layer,)))

        def state(self, seed):
            return np.zeros(5), None

        def run(self, state, key, lr, first, last):
            return state, np.float32(np.nan if lr == 9 else 1), np.full(2, lr)

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
    state = 2 * 16 * 16 * 4 + 3 * 3 * 32 * 4  # and the last inputs of three convolutions
    assert rows[0]["state_bytes"] == state and rows[0]["parameters"] == 5
    monkeypatch.setattr(recall_sizes, "Program", pytest.fail)
    assert recall_sizes.main(options) == 0  # all is there
    with pytest.raises(SystemExit):
        recall_sizes.parse(["--models", "hybrid"])


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


def test_peers_are_put_beside_ours(tmp_path, capsys):
    made_up.write(tmp_path)
    ours, out = tmp_path / "peer_models.json", tmp_path / "out.json"
    options = ["--add", str(ours), "--out", str(out)]
    assert peer_models.main([*options, "--limit", "0"]) == 0  # PyTorch is not needed so far
    assert json.loads(out.read_text()) == json.loads(ours.read_text())
    with pytest.raises(SystemExit):
        peer_models.parse(["--precision", "float8"])
    assert "unknown float8; known: bfloat16, autocast" in capsys.readouterr().err


def test_reach_of_a_mean():
    found = reach.reach(lambda x: x.at[:, -1].set(x[:, -8:].mean(axis=1)), jnp.ones((1, 32, 4)))
    assert found["last_1"] == pytest.approx(1 / 8) and found["last_4"] == pytest.approx(1 / 2)
    assert found["last_16"] == pytest.approx(1) and found["tokens"] == pytest.approx(8)
    assert found["size"] == pytest.approx(1)
