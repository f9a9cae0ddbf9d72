"""from_checkpoint.py: what it says of a checkpoint, a short fine-tuning on a mesh, mistakes."""

import functools
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import assert_fails

import jla.hub
from jla.linen import PaTHAttention
from jla.models import Config, Experts, LanguageModel, Layer, SwiGLU

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import from_checkpoint
from command_line import InputError

pytestmark = [pytest.mark.optax, pytest.mark.usefixtures("begun_by_numpy")]

TEXT = str(pathlib.Path(__file__).parents[1] / "LICENSE")
# Of fla's hybrid models; softmax attention compiles in a fraction of the others' time.
CONFIG = dict(
    model_type="gsa",
    dtype="bfloat16",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_heads=2,
    vocab_size=300,
    attn=dict(layers=[0], num_heads=2),
)
SHAPES = [(300, 32), (32, 300), *[(32, 32)] * 4, *[(32, 48)] * 3, *[(32,)] * 3]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint of one layer."""
    path = tmp_path_factory.mktemp("checkpoint") / "hybrid"
    model = jla.hub.model(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(x.dtype) / 6, shapes)
    jla.hub.save(path, model, params, CONFIG)
    return path


def run(*arguments):
    from_checkpoint.main([*map(str, arguments), "--implementation", "reference"])


def test_it_says_what_a_checkpoint_is(folder, capsys):
    run(folder)
    printed = capsys.readouterr().out
    assert "gsa model on cpu" in printed and "width 32, vocabulary 300" in printed
    assert "layers: 1 of Attention and SwiGLU" in printed
    assert f"{sum(map(np.prod, SHAPES)):,} parameters in bfloat16" in printed


def test_fine_tuning_on_a_mesh_and_generating_from_the_result(
    folder, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "tuned"
    window = ["--batch", "2", "--length", "4", "--steps", "2", "--lr", "0.1"]
    new = ["--tokens", "7,1", "--new-tokens", "2"]

    def generate(model, params, tokens, **options):
        assert model.stacked and params["blocks"]["mlp"]["up"]["kernel"].sharding.mesh.size == 4
        return tokens

    monkeypatch.setattr(jla.hub, "generate", generate)
    made = []
    first_state = from_checkpoint.first_state
    monkeypatch.setattr(
        from_checkpoint, "first_state", lambda *args: made.append(first_state(*args)) or made[0]
    )
    run(folder, "--text", TEXT, "--out", out, "--mesh", "data=2,model=2", *window, *new)
    ((state, step),) = made
    assert step._cache_size() == 1  # the second step is not compiled anew
    matrices = [x for x in jax.tree.leaves(state) if x.ndim > 2]
    assert {x.sharding.shard_shape(x.shape) != x.shape for x in matrices} == {True}
    printed = capsys.readouterr().out
    assert "mesh data=2,seq=1,model=2" in printed and "2 steps: " in printed
    assert f"saved in bfloat16 under {out}" in printed
    model = jla.hub.model(jla.hub.read_config(out))
    before, after = (jla.hub.load(path, model) for path in (folder, out))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(changed))
    assert printed.endswith("\n7,1\n")


def shardings_of(mesh, key_heads):
    mixer = PaTHAttention(num_heads=4, num_key_heads=key_heads, key_dim=16)
    experts = Experts(num_experts=7, experts_per_token=2, hidden=48)
    layers = Layer(mixer, SwiGLU(48)), Layer(mixer, experts)
    shapes = from_checkpoint.shapes_of(LanguageModel(Config(300, 32, layers, tied=False)))
    return from_checkpoint.shardings_of(shapes, mesh)


def test_the_mesh_splits_heads_and_the_inside_of_mlps():
    mesh = from_checkpoint.chosen_mesh(dict(data=2, model=4), 8)
    found = shardings_of(mesh, key_heads=1)  # which all heads share
    split = {
        "embed/embedding": ("model", "data"),
        "head/kernel": ("data", "model"),
        "block_0/mixer/q_proj/kernel": ("data", "model", None),
        "block_0/mixer/k_proj/kernel": ("data", None, None),
        "block_0/mixer/o_proj/kernel": ("model", None, "data"),
        "block_0/mlp/down/kernel": ("model", "data"),
        "block_1/mlp/gate": (None, "data", "model"),
        "block_1/mlp/down": (None, "model", "data"),
        "block_1/mixer_norm/scale": (None,),
    }
    for path, spec in split.items():
        at = functools.reduce(lambda tree, name: tree[name], path.split("/"), found)
        assert at.spec == jax.P(*spec), path
    words = "parameter block_0/mixer/.* has key_heads = 2, .* of the 4 devices of model in --mesh"
    with pytest.raises(InputError, match=words):
        shardings_of(mesh, key_heads=2)


def test_correction_biases_are_kept_out_of_the_optimizer():
    router = {"kernel": jnp.ones((2, 2)), "correction_bias": jnp.ones(2)}
    optimizer = from_checkpoint.make_optimizer(2, 0.1, 0.1)
    moments = optimizer.init({"router": router})
    shapes = [leaf.shape for leaf in jax.tree.leaves(moments)]
    assert (2, 2) in shapes and (2,) not in shapes
    twice = jax.jit(lambda g, m: optimizer.update(g, optimizer.update(g, m, g)[1], g)[0])
    updates = twice({"router": router}, moments)  # the first step's rate is 0
    assert not updates["router"]["correction_bias"].any() and updates["router"]["kernel"].any()


class Words:
    """A tokenizer of words."""

    words = ("a", "rose", "is")

    @classmethod
    def from_pretrained(cls, folder, **options):
        assert options == dict(local_files_only=True)
        return cls()

    def encode(self, text):
        return [self.words.index(word) for word in text.split()]

    def decode(self, tokens):
        return " ".join(self.words[token] for token in tokens)

    def save_pretrained(self, folder):
        (folder / "words.json").write_text("a rose is")


def test_text_goes_through_the_tokenizer(folder, capsys, monkeypatch):
    def generate(model, params, tokens, **options):
        assert options["max_new_tokens"] == 2
        return jnp.asarray(tokens[:, :2])

    transformers = types.SimpleNamespace(AutoTokenizer=Words)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setattr(jla.hub, "generate", generate)
    run(folder, "--tokenizer", "--prompt", "is a rose", "--new-tokens", "2")
    assert capsys.readouterr().out.endswith("is a rose|is a\n")
    run(folder, "--prompt", "ab", "--new-tokens", "2")
    printed = capsys.readouterr().out
    assert "without --tokenizer the text's bytes are its tokens" in printed
    assert printed.endswith("ab|ab\n")


@pytest.mark.parametrize("own", [True, False])
def test_what_is_tuned_has_the_tokenizer(own, folder, tmp_path, monkeypatch):
    """The folder's own is copied with its checkpoint."""
    transformers = types.SimpleNamespace(AutoTokenizer=Words)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setattr(jla.hub, "load", lambda *arguments, **options: {})
    monkeypatch.setattr(from_checkpoint, "fine_tune", lambda *arguments: ({}, None))
    monkeypatch.setattr(jla.hub, "save", lambda out, *arguments, **options: None)
    text, out = tmp_path / "text.txt", tmp_path / "tuned"
    text.write_text("a rose is a rose")
    given = [] if own else [str(tmp_path)]
    run(folder, "--tokenizer", *given, "--text", str(text), "--out", str(out), "--length", "4")
    assert [path.name for path in out.glob("*.json")] == ([] if own else ["words.json"])


MISTAKES = [
    ("--tokens: the tokens must be 0 to 299, the model's vocabulary", ["--tokens", "1,300"]),
    ("--mesh data=64 needs 64", ["--text", TEXT, "--out", "x", "--mesh", "data=64"]),
    ("--batch 3 must be a multiple of data=8", ["--text", TEXT, "--out", "x", "--batch", "3"]),
    ("windows of --length 99999 need 100000", ["--text", TEXT, "--out", "x", "--length", "99999"]),
    ("cannot read the text missing", ["--text", "missing", "--out", "x"]),
    ("--tokenizer needs the package transformers", ["--prompt", "a", "--tokenizer"]),
]


@pytest.mark.parametrize(("words", "arguments"), MISTAKES)
def test_mistakes_are_named_in_one_line(words, arguments, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_fails(capsys, 1, words, from_checkpoint.main, folder, *arguments)


def test_other_mistakes(folder, tmp_path, capsys):
    main = from_checkpoint.main
    assert_fails(capsys, 1, "must be a folder with a config.json", main, tmp_path)
    words = "must be a new or an empty folder"
    assert_fails(capsys, 1, words, main, folder, "--text", TEXT, "--out", folder)
    assert_fails(capsys, 2, "--text and --out go together", main, folder, "--text", TEXT)
    assert_fails(capsys, 2, "--mesh: must be like data=2,model=1", main, folder, "--mesh", "x=1")
    assert_fails(capsys, 2, "--tokens: must be integers", main, folder, "--tokens", "a")
