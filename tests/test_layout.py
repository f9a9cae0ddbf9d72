"""The table of STYLE: which part of jla may import which. CONTRIBUTING.md shows it."""

import ast
import pathlib

import pytest

JLA = pathlib.Path(__file__).parent.parent / "jla"
MECHANISMS = ("kda", "gsa", "log_linear", "mesa_net", "path_attention")

# A part of jla to what it may import of jla, besides itself. The longest name that fits counts.
MAY_IMPORT = {
    "_core": (),
    "reference": ("_core",),
    "xla": ("_core", "reference"),
    "pallas": ("_core", "pallas.common"),
    "pallas.common": ("_core",),
    "pallas.layers": ("_core", "pallas.common"),
    **{f"pallas.{name}": ("_core", "reference", "pallas.common") for name in MECHANISMS},
    # The implementations are imported by name, when they are first asked for.
    "_dispatch": ("_core", "pallas"),
    **{name: ("_core", "_dispatch") for name in MECHANISMS},
    "_fused": ("_core", "_dispatch", *MECHANISMS),
    "linen": ("_core", "_fused", *MECHANISMS),
    "": ("_core", "linen", "pallas", *MECHANISMS),
}


def part(module):
    """The part of jla that a module belongs to: a key of `MAY_IMPORT`."""
    inside = module.removeprefix("jla").removeprefix(".")
    names = [name for name in MAY_IMPORT if f"{inside}.".startswith(f"{name}.") or not name]
    return max(names, key=len)


def imported(path):
    """The modules of jla that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("jla"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jla":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                below = JLA.parent / name.replace(".", "/")
                is_module = below.is_dir() or below.with_suffix(".py").exists()
                yield name if is_module else node.module


FILES = sorted(JLA.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(JLA)))
def test_imports_follow_the_table(path):
    ours = part(".".join(path.relative_to(JLA.parent).with_suffix("").parts))
    allowed = {ours, *MAY_IMPORT[ours]}
    wrong = [module for module in imported(path) if part(module) not in allowed]
    assert not wrong, f"{ours or 'jla'} may not import {wrong}; it may import {sorted(allowed)}"
