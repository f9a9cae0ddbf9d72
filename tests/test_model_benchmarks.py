"""The comparisons of whole models run at toy sizes on a CPU; their tables say what they found."""

import json

import jax
import numpy as np
import pytest

from benchmarks import (
    device_profile,
    generation,
    language_model,
    model_tables,
    serving,
    side_by_side,
)

pytestmark = [pytest.mark.optax, pytest.mark.usefixtures("begun_by_numpy")]

TINY = ["--implementation", "reference", "--width", "32", "--depth", "1", "--heads", "2"]


def read(path):
    return json.loads(path.read_text())["results"]


def test_training_is_measured(tmp_path):
    out = tmp_path / "language_model.json"
    options = [*TINY, "--length", "16", "--batch", "1", "--steps", "10", "--text", __file__]
    options += ["--out", str(out)]
    assert language_model.main(["--mixers", "attention", *options]) == 0
    # As GSA's, which takes as long again to compile; test_examples_recall.py trains it.
    out.write_text(out.read_text().replace('"attention"', '"gsa"'))
    # What is there stays; the second run is one of the example on a mesh.
    over = [*options, "--mesh", "data=2", "--dtype", "float32"]  # XLA's CPU has no such 16-bit sums
    assert language_model.main(["--mixers", "attention", *over]) == 0
    assert language_model.main(["--mixers", "attention,gsa", "--limit", "0", *options]) == 0
    rows = read(out)
    assert [(row["mixer"], row["gpus"]) for row in rows] == [("gsa", 1), ("attention", 2)]
    assert rows[0]["collectives"] == {} and rows[1]["mesh"] == {"data": 2}
    assert {"all-gather", "all-reduce"} <= set(rows[1]["collectives"])
    for row in rows:
        assert len(row["losses"]) == 10 and row["tokens"] == 160 * row["gpus"]
        assert row["tokens_per_s"] == pytest.approx(16e3 * row["gpus"] / row["step_ms"])
        peak = row["utilisation"] * language_model.PEAK * row["gpus"]
        assert peak == pytest.approx(row["tokens_per_s"] * row["operations_per_token"])
        assert row["memory_gib"] > row["donated_gib"] > 0
        assert row["profile"] is None
        assert {"card", "jax", "date", "command"} <= set(row["meta"])
    text = model_tables.language_models(tmp_path)
    assert "| `gsa` |" in text and "softmax attention" not in text  # which is no data parallelism
    assert f"| {rows[0]['tokens_per_s']:,.0f} |" in text and "--steps 10" in text


def test_generation_is_measured(tmp_path):
    out = tmp_path / "generation.json"
    options = [*TINY, "--prompt", "16", "--tokens", "2", "--batches", "3", "--out", str(out)]
    assert generation.main(["--mixers", "attention", *options]) == 0
    prompt, three = read(out)
    assert [row["batch"] for row in (prompt, three)] == [0, 3]
    assert prompt["prefill_tokens_per_s"] == pytest.approx(16e3 / prompt["prefill_ms"])
    assert three["tokens_per_s"] == pytest.approx(3e3 / three["step_ms"])
    # Keys and values of 16 tokens in bfloat16, and two places; two states [2, 16, 16] in float32
    # and the last three inputs of three convolutions in bfloat16.
    assert prompt["state_bytes"] == 16 * 2 * 32 * 2 + 2 * 4
    gsa = next(generation.read("gsa", generation.parse(options), {}))
    assert gsa["state_bytes"] == 2 * 2 * 16 * 16 * 4 + 3 * 3 * 32 * 2
    four = generation.parse([*options, "--depth", "4", "--mixers", "hybrid"])
    kinds = [type(x.mixer).__name__ for x in side_by_side.make_model("hybrid", four).config.layers]
    assert kinds == ["KimiDeltaAttention"] * 3 + ["PaTHAttention"]
    text = model_tables.generation(tmp_path)
    assert "| softmax attention |" in text and "| sampling, batch 3, tokens/s |" in text


def test_serving_is_measured(tmp_path, monkeypatch):
    """By an engine that draws nothing but ones: the programs are compiled in the server's tests."""

    class Engine:
        state_bytes, compile_s = 3 * 2**20, 1.5

        def __init__(self, model, params, *, slots, capacity, rows, chunk, steps, packed):
            self.slots, self.rows, self.steps = slots, rows, steps
            assert packed == (type(model.config.layers[0].mixer).__name__ != "Attention")
            assert capacity == 9 + 4 and model.config.width == 32

        def memory_bytes(self):
            return 2**30

        def prefill(self, pieces):
            return np.ones(self.rows, np.int32)

        def decode(self, counts):
            return np.ones((self.steps, self.slots), np.int32)

    monkeypatch.setattr(serving.serve, "Engine", Engine)
    monkeypatch.setattr(serving.serve, "initial_params", lambda key, model: {"w": np.ones(7)})
    out = tmp_path / "serving.json"
    options = [*TINY, "--requests", "5", "--prompt-length", "2:9", "--new-tokens", "4"]
    options += ["--slots", "2", "--chunk", "4", "--out", str(out)]
    assert serving.main(["--mixers", "kda,attention", *options]) == 0
    kda, attention = read(out)
    assert kda["implementation"] == "reference" and attention["implementation"] is None
    for row in (kda, attention):
        assert row["requests"] == row["length"] == 5 and row["new_tokens"] == 20
        assert row["slot_mib"] == 3 and row["memory_gib"] == 1 and row["parameters"] == 7
        assert row["new_tokens_per_s"] == pytest.approx(20 / row["seconds"])
        assert {"card", "jax", "date", "command"} <= set(row["meta"]) and "results" not in row
    text = model_tables.serving(tmp_path)
    assert "5 requests" in text and "4 new tokens each" in " ".join(text.split())
    assert "| `kda` | packed |" in text and "| softmax attention | rows |" in text
    assert "| 1.0 | 3.0 |" in text


def test_without_files_there_are_no_tables(tmp_path):
    one, other = model_tables.language_models, model_tables.generation
    for written in (one, other, model_tables.serving, model_tables.recall):
        assert written(tmp_path) == ""


def test_a_failed_case_is_reported(tmp_path):
    out = tmp_path / "language_model.json"
    options = ["--width", "32", "--depth", "1", "--heads", "2", "--text", __file__]
    options += ["--length", "16", "--batch", "1", "--steps", "10", "--out", str(out)]
    assert language_model.main(["--mixers", "gsa", "--implementation", "pallas", *options]) == 1
    (row,) = read(out)
    assert "NotImplementedError" in row["error"] and "tokens_per_s" not in row
    assert row["parameters"] > 0  # what was known before


def test_operations_by_hand():
    options = side_by_side.parser("", "").parse_args(TINY[2:])
    model = side_by_side.make_model("attention", options)
    params = jax.eval_shape(lambda: side_by_side.make_params(model))
    products = 256 * 32 + 4 * 32 * 32 + 3 * 32 * 96  # embedding, attention, SwiGLU
    pairs = 2 * 50 * (16 + 16)  # two heads, a hundred tokens
    operations = language_model.model_operations("attention", model, params, 50)
    assert operations == 3 * (2 * products + pairs)


def test_a_trace_is_summed_up_by_kind():
    def named(what, name, pid, **thread):
        return dict(ph="M", name=what, pid=pid, args=dict(name=name), **thread)

    events = [named("process_name", "/host:CPU", 9), named("thread_name", "python", 9, tid=1)]
    for pid in (1, 2):
        events += [
            named("process_name", f"/device:GPU:{pid - 1}", pid),
            named("thread_name", "Stream #7(Compute)", pid, tid=7),
            named("thread_name", "XLA Ops", pid, tid=8),
            dict(ph="X", name="nvjet_hsh_128x256", pid=pid, tid=7, dur=4000),
            dict(ph="X", name="forward_mosaic_gpu_kernel", pid=pid, tid=7, dur=2500),
            dict(ph="X", name="forward_mosaic_gpu_kernel", pid=pid, tid=7, dur=2500),
            dict(ph="X", name="loop_add_fusion_3", pid=pid, tid=7, dur=1000),
            dict(ph="X", name="custom-call.3", pid=pid, tid=8, dur=5000),
        ]
    events.append(dict(ph="X", name="dispatch", pid=9, tid=1, dur=70))
    found = device_profile.kernels(events)
    totals = device_profile.summary(found)
    assert totals["busy_ms"] == pytest.approx(10)
    shares = dict(kernels=0.5, attention=0, products=0.4, communication=0, rest=0.1)
    assert totals["share"] == pytest.approx(shares)
    assert totals["rest"] == [["loop_add_fusion_3", 1.0, 1.0]]
    assert totals["others"][0] == ["forward_mosaic_gpu_kernel", 5.0, 2.0]
    hlo = """%loop_add_fusion.3 = bf16[8] fusion(%a), metadata={op_name="jit(train_step)/\
transpose(jvp(LanguageModel))/blocks/mlp/up/mul" source_line=3}"""
    found["odd"] = (0.5, 1)
    assert device_profile.passes(found, hlo) == [["backward: mlp/up/mul", 1, 1], ["odd", 0.5, 1]]
    with pytest.raises(ValueError, match="no GPU"):
        device_profile.kernels(events[:2])
