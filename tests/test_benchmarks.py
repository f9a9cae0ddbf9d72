"""The benchmark harness runs on a CPU, reports failures as failures, and notices wrong results."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import (
    context,
    instructions,
    layer_kernels,
    measure,
    mechanisms,
    meshes,
    run,
    tables,
)
from jla.pallas.mesa_net import solve

ROOT = pathlib.Path(__file__).parents[1]


SMALL = ["--shapes", "small", "--seconds", "0.002"]


def run_harness(tmp_path, *options):
    """Runs it with the small shapes; returns the process and what it wrote."""
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.run", *SMALL]
    process = subprocess.run(
        [*command, "--out", out, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert out.exists(), process.stderr
    return process, json.loads(out.read_text())


@pytest.mark.parametrize(
    "mechanism",
    ["kda"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("log_linear", "gsa", "mesa", "path_fox")
    ],
)
def test_a_run_measures_and_reports(tmp_path, mechanism, capsys):
    # The reference compiles in a moment; the kernels refuse a CPU, and that is a failed case.
    out = tmp_path / "results.json"
    options = ["--mechanism", mechanism, "--implementations", "pallas,reference"]
    options += ["--what", "forward,backward,main,step", "--out", str(out)]
    with jax.numpy_rank_promotion("allow"):  # as in the benchmark's own process
        assert run.main([*SMALL, *options]) == 1
    report = json.loads(out.read_text())
    rows = {(row["implementation"], row["measure"]): row for row in report["results"]}
    for what in ("forward", "backward", "step", "step16", "step16_bare"):
        refused, row = rows.pop(("pallas", what)), rows.pop(("reference", what))
        assert "NotImplementedError" in refused["error"] and "ms" not in refused
        assert "error" not in row
        assert row["ms"] > 0 and row["first_call_s"] > 0 and row["memory_gib"] > 0
    assert not rows
    assert "FAILED" in capsys.readouterr().out
    assert {"card", "compute_capability", "driver", "jax", "date", "command"} <= set(report["meta"])


def test_time_is_split_over_devices(monkeypatch):
    """Each device has as many tokens as one had alone. Traced; the next test runs all."""
    (shape,) = (s for s in mechanisms.MECHANISMS["gsa"].shapes["small"] if s.group == "context")
    outputs, places = [], []

    def compiling(forward, sets, backward, place=None):
        places.append(place)
        outputs.append(jax.eval_shape(forward, *sets[0]).shape)
        numbers = dict(ms=float(len(outputs)), memory_gib=0.0)
        return lambda: lambda seconds: numbers

    monkeypatch.setattr(context, "compiling", compiling)
    with jax.numpy_rank_promotion("allow"):
        row = context.measure("gsa", shape, "forward", "reference", 0.0)
    devices = jax.device_count()
    assert outputs == [(1, 32, 2, 16), (1, 32 * devices, 2, 16)]
    assert row["mesh"] == {"seq": devices} and row["efficiency"] == 0.5
    # The cotangent lies as the outputs do: it would be moved at every call.
    assert places[0] is None and places[1].spec == context.TOKENS


@pytest.mark.slow  # three programs, on four devices
def test_a_run_over_devices_measures_and_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    options = "--mechanism kda --implementations xla --what context".split()
    process, report = run_harness(tmp_path, *options)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = {row["measure"]: row for row in report["results"]}
    assert list(rows) == ["forward", "backward", "layer"]
    exchanged = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 1}
    assert rows["forward"]["collectives"] == {"all-gather": 1}
    assert rows["backward"]["collectives"] == exchanged
    # The layer's three convolutions read their left neighbours' tokens.
    assert rows["layer"]["collectives"]["collective-permute"] >= 3
    for row in rows.values():
        assert row["devices"] == 4 and row["ms"] > 0
        assert row["tokens_per_device"] == (64 if row["measure"] == "layer" else 32)
    for what in ("forward", "backward"):
        assert rows[what]["efficiency"] == rows[what]["alone_ms"] / rows[what]["ms"]


def test_collectives_in_loops_count_for_each_turn():
    mesh = jax.make_mesh((2,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:2])

    def total(x):
        def turn(x, _):
            return x + jax.lax.psum(x, "seq"), None

        return jax.lax.all_gather(jax.lax.scan(turn, x, length=3)[0], "seq")

    over = jax.shard_map(total, mesh=mesh, in_specs=P("seq"), out_specs=P("seq"))
    found = meshes.exchanged(jax.jit(over).lower(jnp.ones(10)).compile().as_text())
    assert found == {"all-reduce": [3, 3 * 5 * 4], "all-gather": [1, 2 * 5 * 4]}


def test_a_kernels_line_counts_what_the_assembler_made():
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ ;
.L_x_1:
        /*0020*/               @P1 BRA `(.L_x_1) ;
    """
    said = """info    : (C7514) Potential Performance Loss
info    : Compiling entry function 'prepare_mosaic_gpu_kernel' for 'sm_90a'
    24 bytes stack frame, 28 bytes spill stores, 32 bytes spill loads
info    : Used 255 registers, used 16 barriers"""
    words = instructions.line(sass, said).split()
    assert words[0] == "prepare"
    assert " ".join(words[1:]) == (
        "3 instructions 1 products 255 registers 28 + 32 bytes spilled (C7514)"
    )


def test_no_case_starts_past_the_limit(tmp_path):
    process, report = run_harness(tmp_path, "--what", "main", "--limit", "0")
    assert process.returncode == 0
    assert report["results"] == [] and report["not_started"]
    assert "not started" in process.stdout


@pytest.mark.parametrize("wrong", [None, "value", "gradient"])
def test_errors_are_noticed(monkeypatch, wrong):
    entry = mechanisms.MECHANISMS["kda"]
    (shape,) = (s for s in entry.shapes["small"] if s.group == "main")

    def function(v, implementation, **arguments):
        if implementation != "reference" and wrong == "gradient":
            v = v + (v - jax.lax.stop_gradient(v))  # v's value, twice its gradient
        o, state = entry.function(v=v, implementation="reference", **arguments)
        if implementation != "reference" and wrong == "value":
            o = (1.1 * o).astype(o.dtype)
        return o, state

    monkeypatch.setitem(measure.MECHANISMS, "kda", dataclasses.replace(entry, function=function))
    found = measure.errors("kda", shape, "xla")
    if wrong is None:
        assert "error" not in found
    else:
        assert found["error"].split(" is over")[0] == dict(value="o", gradient="dv")[wrong]


@pytest.mark.parametrize("name", mechanisms.MECHANISMS)
def test_inputs_fit_the_functions(name):
    """Traced: a run and a step take what is made for them; the state keeps its shape."""
    entry = mechanisms.MECHANISMS[name]
    shapes = {shape.group: shape.sizes for shape in entry.shapes["small"]}

    def made(group):
        return entry.prepare(entry.raw(jax.random.key(0), shapes[group]))

    def forward():
        return entry.function(**made("main"), implementation="reference")[0]

    def step():
        state = entry.state(jax.random.key(1), shapes["step"])
        return state, entry.step(made("step"), state, "reference")[1]

    with jax.numpy_rank_promotion("allow"):  # as in the benchmark's own process
        assert jax.eval_shape(forward).shape == (2, 64, 2, 16)
        before, after = jax.eval_shape(step)
    assert before == after


def trace_forced(implementation):
    """Traces the gradients of the function in which every row makes all iterations."""
    entry = mechanisms.MECHANISMS["mesa"]
    sizes = dict(B=1, T=64, H=1, K=64, V=64)
    arguments = jax.eval_shape(lambda: entry.prepare(entry.raw(jax.random.key(0), sizes)))

    def gradients(arguments):
        forced = functools.partial(entry.forced, implementation=implementation)
        o, pull = jax.vjp(lambda x: forced(**x)[0], arguments)
        return pull(o)[0]

    assert jax.eval_shape(gradients, arguments) == arguments


def test_forced_makes_all_iterations(monkeypatch):
    """No row stops early in what is timed as such; all other kernels stop as they do for users."""
    tolerances = set()
    for name in ("outputs", "output_gradients"):
        function = getattr(solve, name)

        def recorded(*args, tolerance, function=function, **options):
            tolerances.add((function.__name__, tolerance))
            return function(*args, tolerance=tolerance, **options)

        monkeypatch.setattr(solve, name, recorded)
    trace_forced("pallas")
    assert tolerances == {("outputs", 0.0), ("output_gradients", 0.0)}
    with pytest.raises(ValueError, match='"pallas" or "triton" can'):
        trace_forced("xla")


def test_forced_makes_all_iterations_in_triton(monkeypatch):
    pytest.importorskip("triton.compiler", reason="triton is not installed")
    from jla.triton import launch

    tolerances = set()

    def call(kernel, *arrays, outputs, constants, **settings):
        if "TOLERANCE" in constants:
            tolerances.add((kernel.__name__, constants["TOLERANCE"]))
        return [jax.numpy.zeros(x.shape, x.dtype) for x in outputs]

    monkeypatch.setattr(launch, "call", call)
    monkeypatch.setattr(launch, "target", lambda: 80)
    trace_forced("triton")
    assert tolerances == {("solve_kernel", 0.0)}


@pytest.mark.parametrize("case", layer_kernels.CASES)
def test_layers_operations_take_their_arrays(case):
    operation, arrays, settings = layer_kernels.CASES[case]
    call = functools.partial(operation, **settings, implementation="xla")
    made = jax.tree.leaves(jax.eval_shape(call, *arrays))
    assert {x.shape for x in made} == {arrays[0].shape}


@pytest.mark.parametrize("page", tables.SECTIONS)
def test_tables_are_up_to_date(page):
    """`make tables` was run after the last change of benchmarks/results."""
    text = (tables.ROOT / page).read_text()
    assert tables.filled(page, text) == text
    assert "KDA" in text or "| `kda` |" in text
