"""The README's programs run as they are printed, and its links lead somewhere."""

import pathlib
import re

import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.optax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_readme_has_both_programs():
    assert ["KimiDeltaAttention" in program for program in PROGRAMS] == [False, True]


@pytest.mark.parametrize("index", range(len(PROGRAMS)), ids=["function", "layer"])
def test_the_readme_program_runs(index):
    names = {}
    exec(compile(PROGRAMS[index], f"README.md, program {index}", "exec"), names)
    result = names["value"] if "value" in names else names["o_next"]
    assert jnp.isfinite(result).all()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https:)([^)]+)\)", README))))
def test_the_readme_links_to_files(path):
    assert (ROOT / path).is_file()
