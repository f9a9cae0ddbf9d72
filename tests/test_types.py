"""What a type checker says of calls, as the users of jla would see it."""

import ast
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest

import jla
import jla.linen
import jla.models
from jla._core import axes

ROOT = pathlib.Path(__file__).parent.parent
CALLS = ROOT / "tests" / "wrong_calls.py"


def test_wrong_calls_are_errors_and_results_have_types():
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run([*command, str(CALLS)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout, done.stderr
    said = set()
    for diagnostic in json.loads(done.stdout)["generalDiagnostics"]:
        line, message = diagnostic["range"]["start"]["line"] + 1, diagnostic["message"]
        revealed = re.search(r'^Type of ".*" is "(.*)"$', message)
        said.add((line, f"type: {revealed[1]}" if revealed else f"error: {diagnostic['rule']}"))
    lines = enumerate(CALLS.read_text().splitlines(), 1)
    expected = {(n, line.split("  # ")[1]) for n, line in lines if "  # " in line}
    assert said == expected


TABLES = {
    jla.kda: axes.KDA,
    jla.gsa: axes.GSA,
    jla.log_linear_attention: axes.LOG_LINEAR,
    jla.mesa_net: axes.MESA_NET,
    jla.path_attention: axes.PATH,
}
STEPS = {
    jla.kda_step: axes.KDA,
    jla.gsa_step: axes.GSA,
    jla.log_linear_step: axes.LOG_LINEAR,
    jla.mesa_step: axes.MESA_NET,
    jla.path_step: axes.PATH,
}


@pytest.mark.parametrize("function", [*TABLES, *STEPS], ids=lambda f: f.__name__)
def test_docstrings_have_the_axes_of_the_tables(function):
    table = TABLES.get(function) or axes.of_step(STEPS[function])
    doc = inspect.getdoc(function)
    args, returns = doc.split("\nArgs:\n")[1].split("\nRaises:\n")[0].split("\nReturns:\n")
    entries = dict(re.findall(r"^  (\w+): (.*(?:\n    .*)*)", args, re.MULTILINE)) | {"o": returns}
    assert set(inspect.signature(function).parameters) == set(entries) - {"o"}
    for name, letters in table.items():
        argument = name.split(".")[0]
        if argument != "cache":  # the class has its axes
            assert f"[{', '.join(letters.split())}]" in entries[argument], name


def test_a_caches_docstring_has_the_axes_of_the_table():
    doc = inspect.getdoc(jla.PathCache)
    for name in jla.PathCache._fields:
        assert f"{name}: [{', '.join(axes.PATH[f'cache.{name}'].split())}]" in doc


# Mathematics that implementations share and rules of JAX's own, bare as the implementations are.
BARE = (
    *("blockwise", "derivatives", "dyadic", "exchange", "interpreter", "level_weights", "parts"),
    *("movement", "path_cache", "path_ring", "path_step", "steps"),
)


def test_all_functions_outside_of_implementations_are_annotated():
    folders = [ROOT / "jla", ROOT / "jla" / "_core", ROOT / "jla" / "hub"]
    jla_files = [path for folder in folders for path in folder.glob("*.py")]
    for path in jla_files:
        if path.stem not in BARE:
            top = ast.parse(path.read_text()).body
            methods = [x for c in top if isinstance(c, ast.ClassDef) for x in c.body]
            for function in (x for x in (*top, *methods) if isinstance(x, ast.FunctionDef)):
                given = [*function.args.args, *function.args.kwonlyargs]
                bare = [x.arg for x in given if not x.annotation and x.arg not in ("self", "cls")]
                assert function.returns and not bare, f"{path.name}: {function.name}"


@pytest.mark.parametrize("name", [*jla.linen.__all__, "Attention", "LanguageModel", "SwiGLU"])
def test_layers_calls_are_annotated(name):
    layer = getattr(jla.linen, name, None) or getattr(jla.models, name)
    methods = [layer.__call__] if inspect.isclass(layer) else [layer]
    for method in (*methods, *([layer.branch] if hasattr(layer, "branch") else [])):
        signature = inspect.signature(method)
        given = [x for x in signature.parameters.values() if x.name != "self"]
        assert signature.return_annotation is not inspect.Signature.empty, name
        assert not [x.name for x in given if x.annotation is inspect.Parameter.empty], name
    assert "pallas" in str(layer.__annotations__.get("implementation", "pallas"))
