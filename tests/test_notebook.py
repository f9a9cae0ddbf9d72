"""docs/tutorial.ipynb: it is whole, its page can be made, and it runs."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs" / "site"))

import notebook  # isort: skip


def code_cells(of):
    return [cell for cell in of["cells"] if cell["cell_type"] == "code"]


def test_it_was_run_and_its_page_has_what_it_printed():
    """`make notebook` writes the outputs."""
    whole = notebook.read()
    page = notebook.markdown(whole)
    printing = [cell for cell in code_cells(whole) if "print(" in "".join(cell["source"])]
    assert printing and all(cell["outputs"] for cell in printing)
    for cell in code_cells(whole):
        compile("".join(cell["source"]), "tutorial.ipynb", "exec")
        for output in cell["outputs"]:
            assert "".join(output.get("text", "")).rstrip() in page


@pytest.mark.optax
@pytest.mark.slow  # trains two models: three minutes
def test_it_runs():
    """Both learn, MesaNet faster; guessing one of the values would be right for an eighth."""
    whole = notebook.read()
    names = notebook.run(whole)
    for name, least in dict(KDA=0.25, MesaNet=0.8).items():
        assert names["accuracy"](names["models"][name], names["trained"][name], 6) > least
    assert sum(names["right"]) >= 6
