"""Who may import what: the parts of jla, and the programs around it. CONTRIBUTING.md shows it."""

import ast
import pathlib

import pytest

from jla._core.checks import IMPLEMENTATIONS

JLA = pathlib.Path(__file__).parent.parent / "jla"
# Each has a definition; that of the layers' operations is none of them.
MECHANISMS = {path.stem for path in (JLA / "reference").glob("*.py")} - {"__init__", "layers"}

# A part of jla to what it may import of jla, besides itself. The longest name that fits counts.
MAY_IMPORT = {
    "_core": (),
    "reference": ("_core",),
    "xla": ("_core", "reference"),
    "pallas": ("_core", "pallas.common"),
    "pallas.common": ("_core",),
    "pallas.layers": ("_core", "pallas.common"),
    **{f"pallas.{name}": ("_core", "reference", "pallas.common") for name in MECHANISMS},
    "triton": ("_core", "reference", "triton.kernels"),
    # Without JAX, so that Triton compiles and interprets them by themselves.
    "triton.kernels": (),
    # Of `_core` the checks and the types, and where segments start: attention is a layer like those
    # of `linen`, whose padding, caches and projections it shares.
    "models": ("_core", "linen", "_token", *sorted(MECHANISMS)),
    "hub": ("_core", "linen", "models"),
    # The implementations are imported by name, when they are first asked for.
    "_dispatch": ("_core", "pallas", "triton"),
    **{name: ("_core", "_dispatch") for name in MECHANISMS},
    "_fused": ("_core", "_dispatch", *MECHANISMS),
    "_token": ("_core", "_dispatch"),
    "linen": ("_core", "_fused", "_token", *MECHANISMS),
    "sharded": ("_core", *MECHANISMS),
    "": ("_core", "hub", "linen", "models", "pallas", "sharded", *MECHANISMS),
}

# What programs, and the arguments that tests share with them, may import of jla.
ROOMS = ("jla", "jla.hub", "jla.linen", "jla.models", "jla.models.generate", "jla.pallas")
PUBLIC = {*ROOMS, *(f"jla.{name}" for name in MECHANISMS)}
# And what else one may; beside the import stands why.
EXCEPTIONS = {
    "benchmarks/checkpoints.py": {"jla.hub._configs", "jla.hub.mapping"},
    "benchmarks/layer_kernels.py": {"jla._fused"},
    "benchmarks/mechanisms.py": {"jla._fused", "jla.pallas.mesa_net", "jla.triton.mesa_net"},
    "benchmarks/run.py": {"jla.triton.launch"},
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


ROOT = JLA.parent
FOLDERS = ("benchmarks", "cases", "examples")
PROGRAMS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_import_public_names(path):
    more = EXCEPTIONS.get(str(path.relative_to(ROOT)), set())
    assert set(imported(path)) - PUBLIC == more


def test_triton_kernels_have_no_jax_in_them():
    for path in (JLA / "triton" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                assert not {"jax", "jax_triton"} & {name.split(".")[0] for name in names if name}


@pytest.mark.parametrize("path", ["benchmarks/run.py", "examples/command_line.py"])
def test_command_lines_offer_every_implementation(path):
    """The list is not public: each of the two has it once."""
    lines = ast.parse((ROOT / path).read_text()).body
    (offered,) = (
        ast.literal_eval(line.value)
        for line in lines
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "IMPLEMENTATIONS"
    )
    assert offered == IMPLEMENTATIONS
