"""Checkpoints in and out: the same bytes, strictly, onto devices, and little of it on the host."""

import json
import shutil
import sys
import tracemalloc

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import NAMES, folder, loaded, tensors
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import jla.hub
from jla import models
from jla.hub import _configs, _loading, _saving, files, mapping

SMALL = {"model_type": "gsa", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48} | {
    "num_heads": 2,
    "num_slots": 16,
    "num_hidden_layers": 2,
    "use_short_conv": True,
}
EXPERTS = {
    "model_type": "kimi_linear",
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["sparse", "sparse"],
    **dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, linear_num_heads=1),
    **dict(linear_head_dim=16, num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=8),
    **dict(qk_rope_head_dim=4, v_head_dim=8, moe_intermediate_size=8, num_experts=4),
    **dict(num_experts_per_token=2),
}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def made(path, config, dtype="float32"):
    """A checkpoint of this config at this path, of numbers that are all different."""
    model = jla.hub.model(config, param_dtype=dtype)
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    count = iter(range(10**6))

    def numbers(leaf):
        return np.random.default_rng(next(count)).random(leaf.shape, np.float32).astype(leaf.dtype)

    params = jax.tree.map(numbers, init["params"])
    jla.hub.save(path, model, params, config)
    return model, params


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
    """Every tensor's bytes, the config, and what else is in the folder; here in several files."""
    model, params = loaded(name)
    config = checkpoints.config(name)
    jla.hub.save(tmp_path / "new", model, params, config, max_shard_bytes=3e5, source=folder(name))
    ours, theirs = tensors(tmp_path / "new"), tensors(folder(name))
    assert set(ours) == set(theirs)
    assert [key for key in ours if not same(ours[key], theirs[key])] == []
    assert jla.hub.read_config(tmp_path / "new") == config
    there = {path.name for path in folder(name).iterdir() if "safetensors" not in path.name}
    assert there - {"golden.npz"} <= {path.name for path in (tmp_path / "new").iterdir()}
    again = jla.hub.load(tmp_path / "new", model)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))


def test_both_forms_of_kimi_linear(tmp_path):
    """The same model; only the hub's form writes dense layers' names without the experts'."""
    config = json.loads((folder("kimi_linear") / "config_hub.json").read_text())
    model, params = loaded("kimi_linear")
    assert jla.hub.model(config).config == model.config
    jla.hub.save(tmp_path, model, params, config)
    ours, theirs = tensors(tmp_path), tensors(folder("kimi_linear"))
    renamed = {key.replace("0.mlp.", "0.block_sparse_moe."): x for key, x in ours.items()}
    assert set(renamed) == set(theirs) != set(ours)
    assert all(same(renamed[key], theirs[key]) for key in theirs)
    again = jla.hub.load(tmp_path, model)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))


def test_a_transposed_array_is_written_by_its_elements(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    entry = files.Written(array.dtype, array.shape, lambda: [array])
    files.write(tmp_path, {"x": entry}, 1e9)
    np.testing.assert_array_equal(tensors(tmp_path)["x"], array)
    with files.Folder(tmp_path) as read:
        found = read.read(files.Part("x", 0, 6)).reshape(3, 2)
    np.testing.assert_array_equal(found, array)


STACKED_IN_PIECES = pytest.param(
    SMALL, True, marks=pytest.mark.slow(reason="programs for each device; as of the experts")
)


@pytest.mark.parametrize(
    "config, in_pieces",
    [STACKED_IN_PIECES, (EXPERTS, True), (SMALL, False), (EXPERTS, False)],
    ids=["gsa-in_pieces", "experts-in_pieces", "gsa", "experts"],
)
def test_sharded_and_stacked(config, in_pieces, tmp_path, monkeypatch):
    """Every device has its part, whichever axes are split: blocks, experts, inputs or heads; with
    arrays arranged on the devices, as large ones are, or on the host."""
    if in_pieces:
        monkeypatch.setattr(_loading, "SMALL_BYTES", 255)
        monkeypatch.setattr(_saving, "SMALL_BYTES", 255)
        monkeypatch.setattr(files, "AHEAD_BYTES", 1000)
    # Each device compiles how it arranges an array.
    devices = np.array(jax.devices()[:2] if in_pieces else jax.devices()[:4]).reshape(2, -1)
    model, params = made(tmp_path / "a", config)
    if config is SMALL:
        model, params = model.clone(stacked=True), models.stack(params)
    mesh = Mesh(devices, ("x", "y"))

    def sharding(path, shape):
        """The axes x and y of the mesh upon the first axis that they divide, and the last."""
        even = [i for i, size in enumerate(shape) if size % 2 == 0]
        spec = dict.fromkeys(range(len(shape)))
        if even and path != "final_norm/scale":
            spec[even[0]] = "x"
            spec[even[-1]] = "y" if even[-1] != even[0] else ("x",)
        return NamedSharding(mesh, PartitionSpec(*spec.values()))

    there = jla.hub.load(tmp_path / "a", model, sharding=sharding)
    for path, x in flat(there).items():
        assert x.sharding == sharding(path, x.shape), path
        np.testing.assert_array_equal(x, flat(params)[path], err_msg=path)
    if not in_pieces:
        # From a tree of shardings, to a model in another dtype.
        tree = jax.tree.map(lambda x: x.sharding, there)
        half = jla.hub.load(tmp_path / "a", model.clone(param_dtype=jnp.bfloat16), sharding=tree)
        for path, x in flat(half).items():
            assert x.dtype in (jnp.bfloat16, jnp.float32)
            np.testing.assert_array_equal(x, np.asarray(flat(params)[path], x.dtype), path)
    jla.hub.save(tmp_path / "b", model, there, config, max_shard_bytes=5e3)
    ours, theirs = tensors(tmp_path / "b"), tensors(tmp_path / "a")
    assert set(ours) == set(theirs) and all(same(ours[key], theirs[key]) for key in ours)


def test_the_host_holds_one_tensor_and_its_shard(tmp_path, monkeypatch):
    """Loading a file of 28 MiB, of which no tensor has more than 1 MiB, takes less than 8 MiB."""
    config = SMALL | dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=7)
    model = jla.hub.model(config).clone(stacked=True)
    shapes = mapping.whole_shapes(mapping.of_model(model, _configs.family(config)))
    checkpoints.write_config(tmp_path, config)
    checkpoints.write_holes(tmp_path / "model.safetensors", shapes)
    monkeypatch.setattr(_loading, "SMALL_BYTES", 2**16)
    monkeypatch.setattr(files, "AHEAD_BYTES", 2**20)
    assert (tmp_path / "model.safetensors").stat().st_size > 28 * 2**20
    tracemalloc.start()  # NumPy's arrays are in it, and XLA's buffers are not
    try:
        jax.block_until_ready(jla.hub.load(tmp_path, model))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    path = tmp_path_factory.mktemp("gsa") / "gsa"
    return path, made(path, SMALL)[0]


@pytest.fixture
def gsa(once, tmp_path):
    """A small checkpoint's folder, its model and its tensors."""
    path, model = once
    shutil.copytree(path, tmp_path / "gsa")
    return tmp_path / "gsa", model, tensors(tmp_path / "gsa")


def rewritten(path, state):
    (path / "model.safetensors").unlink()
    save_file(state, path / "model.safetensors")


def test_all_names_that_do_not_fit_are_in_one_error(gsa):
    path, model, state = gsa
    first, second, third, fourth = list(state)[:4]
    del state[first], state[second]
    state[third] = np.zeros((3, 5), np.float32)
    state[fourth] = state[fourth].astype(np.int64)
    state |= {"a.weight": np.zeros(1, np.float32), "b.weight": np.zeros(1, np.float16)}
    rewritten(path, state)
    with pytest.raises(ValueError, match=r"^jla\.hub\.load: .*does not fit the model") as error:
        jla.hub.load(path, model)
    said = str(error.value)
    assert f"Tensors missing (2): {first}; {second}." in said
    assert "Tensors unexpected (2): a.weight; b.weight." in said
    assert f"Tensors of another shape (1): {third} [3, 5], where the model has [" in said
    assert f"Tensors of a dtype other than BF16, F16, F32 (1): {fourth} I64" in said


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    config = SMALL | {"tie_word_embeddings": True}
    model, params = made(tmp_path, config)
    state = tensors(tmp_path)
    assert "lm_head.weight" not in state and model.config.tied
    state["lm_head.weight"] = state["model.embeddings.weight"]
    rewritten(tmp_path, state)
    again = jla.hub.load(tmp_path, model)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    rewritten(tmp_path, state)
    with pytest.raises(ValueError, match=r"Tensors unexpected \(1\): lm_head.weight"):
        jla.hub.load(tmp_path, model)


def test_files_that_are_not_whole(gsa):
    path, model, _ = gsa
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        jla.hub.load(path, model)
    index = {"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which has both among"):
        jla.hub.load(path, model)
    file.rename(path / "1.safetensors")
    with pytest.raises(ValueError, match=r"names files that are not there: 2\.safetensors"):
        jla.hub.load(path, model)
    (path / "1.safetensors").write_bytes(whole)
    (path / "2.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"only the index names x, only the file has lm_head"):
        jla.hub.load(path, model)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="which has neither among"):
        jla.hub.load(path, model)
    with pytest.raises(ValueError, match=r"path must be a folder with a config\.json, got"):
        jla.hub.load(path / "none", model)


def test_shardings_that_do_not_fit(gsa):
    path, model, _ = gsa
    by_three = NamedSharding(Mesh(np.array(jax.devices()[:3]), ("x",)), PartitionSpec("x"))
    with pytest.raises(ValueError, match="sharding does not fit the parameters") as error:
        jla.hub.load(path, model, sharding=lambda path, _: by_three if "embed" in path else None)
    assert "embed/embedding [64, 32] has NamedSharding(" in str(error.value)
    assert "head/kernel has None, which is no jax.sharding.Sharding" in str(error.value)
    tree = {"embed": {"embedding": by_three}, "head": {"bias": by_three}}
    with pytest.raises(ValueError, match=r"final_norm/scale is missing.*head/bias is no parameter"):
        jla.hub.load(path, model, sharding=tree)


def test_what_cannot_be_saved(gsa, tmp_path):
    path, model, _ = gsa
    params = jla.hub.load(path, model)
    with pytest.raises(ValueError, match="must be a folder without a checkpoint"):
        jla.hub.save(path, model, params, SMALL)
    wrong = flat(params)
    del wrong["final_norm/scale"]
    wrong |= {"head/bias": np.zeros(1), "embed/embedding": np.zeros((2, 3), np.float32)}
    wrong |= {"head/kernel": np.zeros((32, 64))}
    with pytest.raises(ValueError, match="params do not fit the model") as error:
        jla.hub.save(tmp_path / "new", model, traverse_util.unflatten_dict(wrong, sep="/"), SMALL)
    said = str(error.value)
    assert (
        "final_norm/scale is missing; head/bias is not in the model; embed/embedding is [2," in said
    )
    assert "head/kernel is float64; bfloat16, float16 and float32 are written" in said
    with pytest.raises(ValueError, match=r"config does not describe the model: .*f_proj"):
        jla.hub.save(tmp_path / "new", model, params, SMALL | {"num_slots": 32})
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or float32, got int8"):
        jla.hub.save(tmp_path / "new", model, params, SMALL, dtype=jnp.int8)
    assert not (tmp_path / "new").exists()


def test_dtypes_of_files(tmp_path):
    """What is always float32 here stays it; the config tells the files' dtype."""
    name = "kimi_linear"
    model, params = loaded(name)
    jla.hub.save(tmp_path, model, params, checkpoints.config(name), dtype=jnp.bfloat16)
    assert jla.hub.read_config(tmp_path)["dtype"] == "bfloat16"
    theirs = tensors(folder(name))
    kept = ("A_log", "dt_bias", "gate.weight", "gate.e_score_correction_bias")
    for key, x in tensors(tmp_path).items():
        assert x.dtype == (np.float32 if key.endswith(kept) else ml_dtypes.bfloat16), key
        assert same(x, theirs[key].astype(x.dtype)), key
    half = jla.hub.model(jla.hub.read_config(tmp_path))
    assert half.dtype == half.param_dtype == jnp.bfloat16
    again = flat(jla.hub.load(tmp_path, half))
    assert again["block_0/mixer/A_log"].dtype == jnp.float32
    assert again["block_0/mixer/q_proj/kernel"].dtype == jnp.bfloat16


def test_without_the_package(gsa, monkeypatch):
    path, model, _ = gsa
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jla\[hub\]'"):
        jla.hub.load(path, model)
