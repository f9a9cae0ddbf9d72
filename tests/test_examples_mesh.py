"""The training example on a mesh, resumed on others, in two processes, and what it refuses."""

import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import equations
from programs import assert_fails

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import devices  # noqa: E402
import train_lm  # noqa: E402

pytestmark = [pytest.mark.optax, pytest.mark.usefixtures("begun_by_numpy")]

TINY = [
    *"--width 32 --depth 2 --heads 2 --length 16 --batch 4 --steps 4 --save-every 2".split(),
    *"--evaluate-every 4 --sample-length 4 --implementation xla --text".split(),
    str(ROOT / "LICENSE"),
]
COLUMNS = ("loss", "gradient_norm", "held_out_bits_per_byte")


@pytest.fixture
def four(monkeypatch):
    """JAX sees four devices, and runs end with their last step."""
    there = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda *_: there)
    monkeypatch.setattr(train_lm, "report", lambda *_: None)


def numbers(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in COLUMNS if name in line] for line in lines]


def assert_equal_numbers(out, other):
    for one, two in zip(numbers(out), numbers(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4)


@pytest.mark.slow  # three steps and three evaluations to compile: 60 CPU s
def test_a_run_is_resumed_on_other_meshes(four, tmp_path, capsys):
    """Saved on data=4, restored on data=2,seq=2 and on one device: the numbers go on the same."""
    out = tmp_path / "data"
    train_lm.main([*TINY, "--out", str(out), "--mesh", "data=4"])
    for name, mesh in (("time", ["--mesh", "data=2,seq=2"]), ("one", [])):
        copy = shutil.copytree(out, tmp_path / name)
        shutil.rmtree(copy / "checkpoints" / "4")
        train_lm.main([*TINY, "--out", str(copy), "--resume", *mesh])
        assert_equal_numbers(copy, out)
    printed = capsys.readouterr().out
    assert "mesh data=4,seq=1,model=1" in printed and printed.count("resumed from step 2") == 2


def spread(mesh, model, batch, length, **settings):
    """The Spread of a model's shapes on a mesh, and its step's compiled text."""
    optimizer, _ = train_lm.make_optimizer(4, 0.1, 0.1)
    shapes = jax.eval_shape(lambda: train_lm.initialise(model, optimizer, 0))
    made = devices.Spread(mesh, model, optimizer, shapes, train_lm.nats, train_lm.advance)
    return made, shapes


def test_parameters_and_moments_are_split():
    mesh = devices.make_mesh(dict(data=2, model=2), jax.devices())
    model = train_lm.make_model("kda", 32, 2, 2, implementation="xla")
    made, shapes = spread(mesh, model, 2, 8)
    # All kernels but those of convolutions and the second ones of gates, once and twice.
    for part, count in (("params", 11), ("moments", 22)):
        leaves = jax.tree.leaves(made.shardings[part])
        assert len([x for x in leaves if "data" in x.spec]) == count
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(made.shardings), strict=True)
    kept = sum(math.prod(sharding.shard_shape(x.shape)) for x, sharding in pairs)
    whole = sum(x.size for x in jax.tree.leaves(shapes))
    assert kept < 0.35 * whole


def test_gradients_of_16_bits_are_summed_in_float32():
    """Those of parameters that all devices have, and of parameters gathered from them."""
    mesh = devices.make_mesh(dict(data=2), jax.devices())
    model = train_lm.make_model("attention", 32, 2, 2, dtype=jnp.bfloat16)
    made, shapes = spread(mesh, model, 2, 8)
    tokens = jax.ShapeDtypeStruct((2, 8), np.int32)

    def gradient(params, inputs, targets):
        return jax.grad(lambda p: made.nats(p, inputs, targets).mean())(params)

    jaxpr = jax.make_jaxpr(gradient)(shapes["params"], tokens, tokens).jaxpr
    sums = [x for x in equations(jaxpr) if x.primitive.name in ("psum_invariant", "reduce_scatter")]
    names = {x.primitive.name for x in sums}
    dtypes = {v.aval.dtype for x in sums for v in x.invars}
    assert names == {"psum_invariant", "reduce_scatter"} and dtypes == {np.dtype(np.float32)}


def test_targets_at_a_border_are_the_neighbours_first():
    mesh = devices.make_mesh(dict(seq=4), jax.devices())
    model = train_lm.make_model("attention", 32, 1, 2)
    made, _ = spread(mesh, model, 1, 8)
    inputs, targets = made.inputs_and_targets(np.arange(9, dtype=np.int32)[None])
    first = {shard.index[1].start: np.asarray(shard.data) for shard in inputs.addressable_shards}
    for shard in targets.addressable_shards:
        end = shard.index[1].stop
        assert shard.data[0, -1] == (first[end][0, 0] if end in first else 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--mesh data=3", "--mesh data=3 needs 3 devices, but there are 4"),
        ("--mesh data=4 --batch 6", "--batch 6 must be a multiple of the 4 devices of data"),
        ("--mesh seq=4 --length 18", "--length 18 must be a multiple of the 4 devices of seq"),
        ("--mesh model=4", "--heads 2 must be a multiple of the 4 devices of model"),
        (
            "--mesh data=4 --width 34",
            "cannot train this model on the mesh: parameter blocks/mixer/b_proj/kernel has "
            "embed = 34, which must be a multiple of the 4 devices of data",
        ),
        ("--mesh seq=4 --length 8", "cannot train this model on the mesh at least 3 tokens got 2"),
    ],
)
def test_meshes_that_cannot_be_are_named(arguments, words, four, tmp_path, capsys):
    arguments = [x for x in arguments.split()]
    if "attention" in arguments:
        tiny = [x for x in TINY if x not in ("--implementation", "xla")]
    else:
        tiny = TINY
    assert_fails(capsys, 1, words, train_lm.main, *tiny, "--out", tmp_path, *arguments)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--mesh data=2,rows=2", "--mesh must be like data=2,seq=1,model=1"),
        ("--mesh data=0", "--mesh must be like data=2,seq=1,model=1"),
        ("--processes 2", "--processes go with --coordinator"),
        ("--coordinator a:1 --processes 2", "needs --processes and --process"),
        ("--coordinator a:1 --processes 2 --process 2", "--process 2 must be 0 to 1"),
    ],
)
def test_bad_options_are_named(arguments, words, capsys):
    assert_fails(capsys, 2, words, train_lm.main, *arguments.split())


ON_CPU = dict(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2")


def start(out, *more, process, port, settings):
    """One of two processes."""
    command = [sys.executable, str(ROOT / "examples" / "train_lm.py"), *TINY, "--out", str(out)]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process)]
    environment = os.environ | settings | dict(PYTHONPATH=str(ROOT))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *more], env=environment, cwd=ROOT, **pipes)


def two_processes(out, *more, during=None, settings=(ON_CPU, ON_CPU)):
    """Runs two processes, which have two devices each unless their environments say otherwise."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = [start(out, *more, process=i, port=port, settings=x) for i, x in enumerate(settings)]
    try:
        if during is not None:
            during(run)
        texts = [process.communicate(timeout=240) for process in run]
    finally:
        for process in run:
            process.kill()
    return [process.returncode for process in run], texts


@pytest.mark.slow  # two processes that import JAX and compile: 20 s each
def test_two_processes_are_one(tmp_path, four):
    """Also: files are written once, messages printed once, and one process resumes their run."""
    out, alone = tmp_path / "two", tmp_path / "alone"
    codes, texts = two_processes(out, "--mesh", "data=2,seq=2")
    assert codes == [0, 0], texts
    assert "held out" in texts[0][0]
    printed = texts[1][0].splitlines()  # gloo's own messages cannot be switched off
    assert all(line.startswith("[Gloo]") for line in printed)
    train_lm.main([*TINY, "--out", str(alone)])
    assert_equal_numbers(out, alone)
    shutil.rmtree(out / "checkpoints" / "4")
    train_lm.main([*TINY, "--out", str(out), "--resume"])
    assert_equal_numbers(out, alone)


@pytest.mark.gpu
@pytest.mark.parametrize("mesh", ["data=2", "seq=2"])
def test_two_processes_of_one_gpu_each_are_one(mesh, tmp_path):
    """NCCL between processes, around the kernels."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    sizes = "--implementation pallas --dtype bfloat16 --width 128 --length 128 --mesh".split()
    own = [
        dict(CUDA_VISIBLE_DEVICES=str(i), XLA_PYTHON_CLIENT_MEM_FRACTION="0.2") for i in range(2)
    ]
    codes, texts = two_processes(tmp_path / "two", *sizes, mesh, settings=own)
    assert codes == [0, 0], texts
    train_lm.main([*TINY, *sizes, mesh, "--out", str(tmp_path / "one")])
    assert_equal_numbers(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow  # as above
def test_a_signal_to_one_process_ends_both(tmp_path):
    def interrupt(run):
        lines = tmp_path / "metrics.jsonl"
        for _ in range(1200):
            begun = lines.exists() and lines.read_text()
            if begun or any(process.poll() is not None for process in run):
                break
            time.sleep(0.1)
        run[1].send_signal(signal.SIGINT)

    codes, texts = two_processes(tmp_path, "--steps", "100000", during=interrupt)
    assert codes == [130, 130], texts
    assert "which is saved" in texts[0][1] and "saved" not in texts[1][1]


@pytest.mark.slow  # as above
def test_a_mistake_in_one_process_ends_both(tmp_path):
    codes, texts = two_processes(tmp_path, "--mesh", "data=3")
    assert codes == [1, 1], texts
    assert "--mesh data=3 needs 3 devices, but there are 4" in texts[0][1]
    assert "error" not in texts[1][1]
