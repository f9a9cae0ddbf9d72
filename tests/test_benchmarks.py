"""The benchmark harness runs on a CPU, reports failures as failures, and notices wrong results."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run_harness(tmp_path, *options):
    """Runs it with the small shapes; returns the process and what it wrote."""
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.run", "--shapes", "small", "--seconds", "0.002"]
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
def test_a_run_measures_and_reports(tmp_path, mechanism):
    # The reference compiles in a moment; the kernels refuse a CPU, and that is a failed case.
    plot = tmp_path / "plot.png"
    process, report = run_harness(
        tmp_path,
        *("--mechanism", mechanism, "--implementations", "pallas,reference"),
        *("--what", "forward,backward,main,step"),
        *("--plot", plot),
    )
    assert process.returncode == 1, process.stderr
    rows = {(row["implementation"], row["measure"]): row for row in report["results"]}
    for measure in ("forward", "backward", "step", "step16", "step16_bare"):
        refused, row = rows.pop(("pallas", measure)), rows.pop(("reference", measure))
        assert "NotImplementedError" in refused["error"] and "ms" not in refused
        assert "error" not in row
        assert row["ms"] > 0 and row["first_call_s"] > 0 and row["memory_gib"] > 0
    assert not rows
    assert "FAILED" in process.stdout
    assert {"card", "compute_capability", "driver", "jax", "date", "command"} <= set(report["meta"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_case_starts_past_the_limit(tmp_path):
    process, report = run_harness(tmp_path, "--what", "main", "--limit", "0")
    assert process.returncode == 0
    assert report["results"] == [] and report["not_started"]
    assert "not started" in process.stdout


@pytest.mark.parametrize("wrong", [None, "value", "gradient"])
def test_errors_are_noticed(monkeypatch, wrong):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import measure, mechanisms

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


def test_readme_has_the_results(monkeypatch):
    """`make tables` was run after the last change of benchmarks/results."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import tables

    readme = (tables.ROOT / "README.md").read_text()
    assert tables.filled(readme) == readme
    assert "| `kda` |" in readme
