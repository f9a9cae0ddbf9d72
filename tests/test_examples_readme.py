"""README: its program runs as it is printed, its links lead somewhere, its numbers are true."""

import inspect
import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated

import jla.pallas
import jla.triton
from benchmarks.readme_tables import FILES, PICTURES, REPOSITORY
from jla.linen import GatedSlotAttention, LogLinearMamba2

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def prose():
    """What somebody wrote: not what `make tables` did, no code, no addresses."""
    generated = r"<!-- (.+?): written by make tables -->.*?<!-- end of \1 -->"
    text = re.sub(generated, "", README, flags=re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|https?:\S+|^\d+\. ", "", text, flags=re.M)


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_program_is_short_and_runs_with_the_wheel_alone():
    (program,) = PROGRAMS
    assert len([line for line in program.splitlines() if line]) <= 15
    imported = re.findall(r"^(?:import|from) (\w+)", program, flags=re.M)
    assert set(imported) <= {"jla", "jax", "flax"}


def test_the_program_runs():
    """NumPy evaluates it: XLA would compile each of its operations."""

    def run():
        names = {}
        exec(compile(PROGRAMS[0], "README.md", "exec"), names)
        return names["y"], names["new"], names["gradients"]

    made = evaluated(jax.jit(run))()
    assert made[0].shape == (2, 1, 256)
    for leaf in jax.tree.leaves(made):
        assert np.isfinite(leaf).all()


def test_links_and_pictures_are_whole_addresses():
    """A package index shows README too, and has none of the repository's files."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    defined = dict(re.findall(r"^\[(.+?)\]: (\S+)$", README, flags=re.M))
    assert defined == {path: FILES + path for path in defined}
    assert [path for path in defined if not (ROOT / path).is_file()] == []
    used = set(re.findall(r"\[([\w./-]+\.\w+)\]", text))
    assert used == set(defined)
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if link[:8] != "https://"] == []
    pictures = [path.split(PICTURES) for path in re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    assert pictures and [before for before, _ in pictures if before] == []
    assert [name for _, name in pictures if not (ROOT / "docs/pictures" / name).is_file()] == []


def test_one_address_of_the_repository():
    """REPOSITORY, in benchmarks/readme_tables.py, is the one place for it, and pyproject's."""
    named = re.findall(r"https://github\.com/[\w-]+/[\w-]+", README)
    assert set(named) == {REPOSITORY}
    assert [url for url in PROJECT.get("urls", {}).values() if not url.startswith(REPOSITORY)] == []


def test_numbers_in_prose_are_facts_that_are_checked():
    """What was measured stands in what `make tables` writes; the rest is here, one by one."""
    oldest, below = re.search(r"jax>=([\d.]+),<([\d.]+)", PROJECT["dependencies"][0]).groups()
    checked = {PROJECT["requires-python"].removeprefix(">="), oldest, below}
    (cuda,) = re.findall(r"cuda(\d+)", PROJECT["optional-dependencies"]["cuda"][0])
    checked |= {cuda, "580"}  # the driver: JAX's installation page, for CUDA 13 on Linux
    assert cuda == "13"
    unsupported = inspect.getsource(jla.pallas.unsupported_device)
    checked |= {"9.0"} & set(re.findall(r'compute_capability != "([\d.]+)"', unsupported))
    checked |= {f"{jla.triton.OLDEST / 10}"}
    assert "outside 16 to 256" in jla.kda.__doc__
    checked |= {"16", "256"}
    checked |= {"2.0"}  # of the license
    assert PROJECT["license"] == "Apache-2.0"
    numbers = set(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*", prose()))
    assert numbers == checked


def test_what_readme_says_of_options_is_so():
    assert GatedSlotAttention.conv_size is None
    assert "2**(num_levels-1)" in LogLinearMamba2.__doc__
    with pytest.raises(ValueError, match="num_levels"):
        LogLinearMamba2(num_heads=1, num_levels=3).init(jax.random.key(0), jnp.ones((1, 5, 16)))
