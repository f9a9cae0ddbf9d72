"""The benchmark of a large checkpoint runs at toy sizes on a CPU."""

import json

import jax
import numpy as np
import pytest

import jla.hub
from benchmarks import checkpoints

pytestmark = pytest.mark.optax  # of the examples' modules, which the benchmarks import

TINY = "--layers 1 --width 32 --heads 2 --key-heads 1 --hidden 48 --vocabulary 300 --prompt 8"
TINY = [*TINY.split(), "--tokens", "2", "--implementation", "reference"]


def test_a_checkpoint_is_written_and_measured(tmp_path):
    out, folder = tmp_path / "checkpoints.json", tmp_path / "checkpoint"
    options = [*TINY, "--folder", str(folder), "--out", str(out)]
    assert checkpoints.main([*options, "--cases", "load,decode,prefill"]) == 0
    load, decode, prefill = json.loads(out.read_text())["results"]
    assert load["bytes"] > 2 * load["parameters"]
    # Beside the process's own coming and going, so small a checkpoint takes nothing.
    assert -0.01 < load["host_peak_gb"] < 1
    # All but the embedding.
    assert decode["weights_gb"] == 2 * (load["parameters"] - 300 * 32) / 1e9
    assert decode["tokens_per_s"] == pytest.approx(1e3 / decode["step_ms"])
    assert prefill["prefill_tokens_per_s"] == pytest.approx(8e3 / prefill["prefill_ms"])
    # There is nothing left to write, and a case that does not begin is no failure.
    assert checkpoints.main([*options, "--limit", "0"]) == 0

    config = jla.hub.read_config(folder)
    shapes = checkpoints.tensors(config)
    assert sum(map(np.prod, shapes.values())) == load["parameters"]
    params = jla.hub.load(folder, jla.hub.model(config))
    values = np.asarray(params["block_0"]["mlp"]["gate"]["kernel"], np.float32)
    assert 1 / 64 <= abs(values).min() and abs(values).max() < 2 / 64
    assert abs(values.mean()) < 2e-3


SMALL = "--model kimi --devices 2 --layers 2 --width 32 --heads 2 --key-heads 2 --hidden 36"
SMALL = [*SMALL.split(), "--vocabulary", "64", "--prompt", "8", "--tokens", "2"]


def test_kimi_linear_is_split_over_devices(tmp_path):
    options = checkpoints.parse([*SMALL, "--folder", str(tmp_path)])
    checkpoints.write(tmp_path, checkpoints.make_config(options))
    shared = {}
    list(checkpoints.load(options, tmp_path, shared))
    down = shared["params"]["block_1"]["mlp"]["down"]
    assert [x.data.shape for x in down.addressable_shards] == [(256, 2, 32)] * 2
    model = checkpoints.model_of(options, tmp_path)
    unused = 2 * (64 * 32 + 248 * 3 * 32 * 4)  # the embedding, and all experts but eight
    whole = sum(x.nbytes for x in jax.tree.leaves(shared["params"]))
    assert checkpoints.bytes_of_a_token(model, shared["params"]) == whole - unused


@pytest.mark.slow  # compiles a model's gradient for two devices
def test_kimi_linear_samples_and_trains_on_two_devices(tmp_path):
    config = checkpoints.make_config(checkpoints.parse(["--folder", "", "--model", "kimi"]))
    assert 12.0e9 < sum(map(np.prod, checkpoints.tensors(config).values())) < 12.1e9

    out = tmp_path / "checkpoints.json"
    options = [*SMALL, "--folder", str(tmp_path / "kimi"), "--out", str(out)]
    assert checkpoints.main([*options, "--cases", "load,decode,tune"]) == 0
    *_, tune = json.loads(out.read_text())["results"]
    assert tune["devices"] == 2 and abs(tune["loss"] - np.log(64)) < 1
