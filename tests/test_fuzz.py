"""The fuzzer finds a planted bug, its printed call shows it again, and its short run finds none."""

import functools
import re

import fuzz
import jax.numpy as jnp
import pytest
from fuzz_compare import programs


@pytest.fixture(autouse=True)
def fresh():
    """No program that was compiled with a planted bug stays."""
    programs.cache_clear()
    yield
    programs.cache_clear()


def plant(monkeypatch, names, run):
    for name in names:
        module, _, function = name.rpartition(".")
        monkeypatch.setattr(f"jla.{module}.{function}", run)


def simple(q, k, v, g, beta, state, ids, *, scale):
    """A stand-in for kda that compiles in no time."""
    H = k.shape[2]
    k, q = (jnp.repeat(x.astype(jnp.float32), v.shape[2] // H, axis=2) for x in (k, q))
    weights = beta.astype(jnp.float32) * jnp.sum(k * q * jnp.exp(g), axis=-1)
    new = jnp.einsum("bthk,bthv->bhkv", k, v.astype(jnp.float32))
    o = scale * weights[..., None] * v.astype(jnp.float32)
    return o.astype(v.dtype), new if state is None else state + new


def wrong(run, *args, **options):
    """At one token of one head."""
    o, state = run(*args, **options)
    return o.at[:, -1, 0].add(0.1), state


def first(start, condition):
    """The name of the first case whose shape fulfils the condition."""
    names = (f"{start}/0/{index}/0" for index in range(100))
    return next(name for name in names if condition(fuzz.parse(name)[0]))


@pytest.mark.parametrize(
    "check", ["split", *(pytest.param(c, marks=pytest.mark.slow) for c in ("gradients", "steps"))]
)
def test_a_planted_bug_is_found_and_its_call_shows_it(monkeypatch, capsys, check):
    def wanted(shape):
        return (shape.check, shape.dtype) == (check, "float32") and shape.sizes["T"] < 100

    case = first("kda/xla/small", wanted)
    plant(monkeypatch, ["reference.kda.kda"], simple)
    plant(monkeypatch, ["xla.kda.kda"], functools.partial(wrong, simple))
    assert fuzz.main(["--case", case]) == 1
    printed = capsys.readouterr().out
    assert f"python tests/fuzz.py --case {case}" in printed
    call = re.search(r"^(import sys.*?\n)(compare\(.*?^\))", printed, re.DOTALL | re.MULTILINE)
    names = {}
    exec(call[1], names)
    values, _, unexplained = eval(call[2], names)
    assert "values[0]" in unexplained and values["values[0]"] > 1e-3


@pytest.mark.slow
def test_bits_that_later_tokens_change_are_found(monkeypatch):
    def looks_ahead(*args, **options):
        o, state = simple(*args, **options)
        return o + 1e-6 * jnp.mean(o, axis=1, keepdims=True), state

    case = first("kda/xla/small", lambda shape: shape.check == "gradients" and shape.sizes["T"] > 3)
    plant(monkeypatch, ["reference.kda.kda", "xla.kda.kda"], looks_ahead)
    assert "after later tokens changed" in fuzz.run_case(case)["message"]


@pytest.mark.parametrize(
    "message, status",
    [('kda: "pallas" cannot. implementation="xla" can.', "refused"), ("no rule for 'x'", "failed")],
)
def test_only_what_jla_itself_refuses_is_no_failure(monkeypatch, message, status):
    def compare(shape, content):
        raise NotImplementedError(message)

    monkeypatch.setattr(fuzz, "compare", compare)
    record = fuzz.run_case("kda/pallas/full/0/1/2")
    assert record["status"] == status and message in record["message"]


def test_a_crash_and_a_hang_name_the_case():
    record = fuzz._lost("kda/xla/small/0/1/2", "hangs", 0)
    assert record["status"] == "failed" and record["row"][:2] == ["kda", "xla"]
    assert "Shape(mechanism='kda'" in record["call"]


def finds_nothing(capsys, *argv):
    code = fuzz.main(argv)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert re.search(r"\n[1-9]\d* cases, 0 failed", printed), printed


@pytest.mark.slow
def test_a_short_run_finds_nothing(capsys):
    finds_nothing(capsys, "--seconds", "40", "--processes", "2")


@pytest.mark.gpu
def test_a_short_run_of_the_kernels_finds_nothing(capsys):
    finds_nothing(capsys, "--seconds", "60")
