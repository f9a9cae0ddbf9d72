"""Runs docs/tutorial.ipynb and writes what it prints and draws into it: `make notebook`.

The site shows the notebook as it lies in the repository, by `markdown`.
"""

import ast
import base64
import contextlib
import io
import json
import pathlib
import sys

NOTEBOOK = pathlib.Path(__file__).parents[1] / "tutorial.ipynb"


def run(notebook):
    """Runs the cells of code in one namespace, and returns it; their outputs are replaced."""
    import matplotlib

    matplotlib.use("agg")
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs_of("".join(cell["source"]), names)
    return names


def outputs_of(code, names):
    """What a cell prints and draws, as a notebook has it."""
    from matplotlib import pyplot

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.parse(code), str(NOTEBOOK), "exec"), names)
    outputs = []
    if text := printed.getvalue():
        outputs.append(dict(output_type="stream", name="stdout", text=text.splitlines(True)))
    for number in pyplot.get_fignums():
        image = io.BytesIO()
        pyplot.figure(number).savefig(image, format="png", dpi=110, metadata={"Software": None})
        data = {"image/png": base64.b64encode(image.getvalue()).decode()}
        outputs.append(dict(output_type="display_data", data=data, metadata={}))
    pyplot.close("all")
    return outputs


def markdown(notebook):
    """The notebook as a page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                parts.append(f"![](data:image/png;base64,{output['data']['image/png']})")
    return "\n\n".join(parts) + "\n"


def read():
    return json.loads(NOTEBOOK.read_text())


def main():
    notebook = read()
    run(notebook)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
