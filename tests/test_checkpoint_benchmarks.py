"""The benchmark of a large checkpoint runs at toy sizes on a CPU."""

import json

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
