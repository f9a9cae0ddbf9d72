"""What is published: metadata, the sdist's and the wheel's files, extras, citation and workflow."""

import ast
import pathlib
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest
import yaml

from jla._core.checks import IMPLEMENTATIONS

ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

# What an sdist of setuptools has in any case, beside the package itself.
AUTOMATIC = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
# What only a checkout needs.
NOT_IN_SDIST = {".gitignore", ".pre-commit-config.yaml", ".python-version"}

IMPORTS = ast.Import, ast.ImportFrom

in_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with the files in git")


def in_sdist(path):
    """Whether the sdist has this file, by MANIFEST.in."""
    lines = (line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines())
    lines = [line for line in lines if line and line[0] != "#"]
    assert {command for command, *_ in lines} == {"include", "graft", "global-exclude"}
    included = {name for command, *names in lines if command == "include" for name in names}
    grafted = {name for command, *names in lines if command == "graft" for name in names}
    return path in included | AUTOMATIC or path.split("/")[0] in grafted | {"jla"}


def tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@in_git
def test_the_sdist_has_every_file():
    without = {path for path in tracked() if not in_sdist(path)}
    assert without == NOT_IN_SDIST, "name what is new in MANIFEST.in, or in NOT_IN_SDIST"


def test_metadata_is_complete():
    wanted = "name version description readme requires-python license authors keywords classifiers"
    assert all(PROJECT[key] for key in [*wanted.split(), "dependencies", "urls"])
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(PROJECT["urls"])
    home = PROJECT["urls"]["Homepage"]
    assert all(url.startswith(home) for url in PROJECT["urls"].values())
    assert PYPROJECT["tool"]["setuptools"]["package-data"]["jla"] == ["py.typed"]
    assert (ROOT / "jla" / "py.typed").exists()


def pythons():
    """The Pythons that the classifiers name, as 3.12."""
    names = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert f">={names[0]}" == PROJECT["requires-python"]
    return names


def test_the_workflow_runs_ci_on_every_python():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == pythons()
    assert any(step.get("run") == ".ci/run" for step in job["steps"])
    assert job["timeout-minutes"] <= 60


def test_the_bug_form_offers_every_implementation():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    (field,) = (field for field in form["body"] if field["id"] == "implementation")
    assert set(IMPLEMENTATIONS) <= set(field["attributes"]["options"])


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    assert citation["authors"] == PROJECT["authors"]


# As in jla[cuda], '.[cuda]' and jla-0.2.0-py3-none-any.whl[cuda].
EXTRAS = r"""(?:\bjla|['"]\.|\.whl)\[([a-z][\w, -]*)\]"""


def test_extras_that_texts_name_are_there():
    folders = [ROOT / name for name in ("jla", "docs", "examples", "benchmarks")]
    texts = [path for kind in ("*.md", "*.py") for folder in folders for path in folder.rglob(kind)]
    named = {}
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *texts]:
        for extras in re.findall(EXTRAS, path.read_text()):
            named |= {extra.strip(): str(path.relative_to(ROOT)) for extra in extras.split(",")}
    assert {"cuda", "examples"} <= set(named)
    known = PROJECT["optional-dependencies"]
    assert {extra: path for extra, path in named.items() if extra not in known} == {}


def test_a_missing_package_of_the_examples_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = r"not installed: matplotlib\. .*pip install -e '\.\[examples\]'"
    with pytest.raises(ModuleNotFoundError, match=said):
        runpy.run_path(ROOT / "examples" / "needs.py")


@pytest.mark.parametrize("program", ["generate", "recall", "train_lm"])
def test_examples_look_for_their_packages_first(program):
    tree = ast.parse((ROOT / "examples" / f"{program}.py").read_text())
    imports = [ast.unparse(x).split()[1] for x in tree.body if isinstance(x, IMPORTS)]
    assert next(x for x in imports if x.split(".")[0] not in sys.stdlib_module_names) == "needs"


@in_git
@pytest.mark.slow
def test_what_is_built_is_whole(tmp_path):
    """Builds both from the committed files; runs the sdist's tests that look for files."""
    source, dist, tools = (tmp_path / name for name in ("source", "dist", "tools"))
    venv.create(tools, with_pip=True)

    def call(*command, cwd):
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    source.mkdir()
    call("git", "archive", "-o", tmp_path / "source.tar", "HEAD", cwd=ROOT)
    with tarfile.open(tmp_path / "source.tar") as archive:
        archive.extractall(source, filter="data")
    call(tools / "bin/pip", "install", "--quiet", "build", "twine", cwd=tmp_path)
    call(tools / "bin/python", "-m", "build", "--outdir", dist, cwd=source)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    call(tools / "bin/twine", "check", "--strict", sdist, wheel, cwd=dist)

    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {str(p.relative_to(source)) for p in (source / "jla").rglob("*") if p.is_file()}
    assert inside == there

    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("jla-*")
    tests = [f"tests/test_{name}.py" for name in ("docs", "layout", "package")]
    call(sys.executable, "-m", "pytest", "-q", *tests, cwd=unpacked)
