"""Writes the README's tables from the files in benchmarks/results/: `make tables`."""

import json
import pathlib

from benchmarks import model_tables
from benchmarks.model_tables import NAMES, header, sources

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = (
    ("forward", ("main", "forward", "ms"), "{:.2f}"),
    ("forward + backward", ("main", "backward", "ms"), "{:.2f}"),
    ("step", ("step", "step16_bare", "ms"), "{:.3f}"),
    ("memory GiB", ("main", "backward", "memory_gib"), "{:.2f}"),
    ("first call s", ("main", "backward", "first_call_s"), "{:.1f}"),
)


def newest(folder=RESULTS):
    """The newest number of each (mechanism, shape, measure, implementation), with its file's meta.

    Returns {key: (row, meta, file name)}; rows that failed count for nothing.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        for row in report.get("results", ()) if isinstance(report, dict) else ():
            if "mechanism" not in row or "error" in row:
                continue
            key = tuple(row[k] for k in ("mechanism", "shape", "measure", "implementation"))
            if key not in found or found[key][1]["date"] < report["meta"]["date"]:
                found[key] = row, report["meta"], path.name
    return found


def times(found):
    """A line for each mechanism and implementation, then the sources."""
    used = set()

    def cells(name, implementation, columns=tuple(column for _, column, _ in COLUMNS)):
        forms = [form for _, _, form in COLUMNS]
        for (shape, measure, column), form in zip(columns, forms, strict=False):
            row, meta, file = found.get((name, shape, measure, implementation), ({}, None, None))
            if meta is not None:
                used.add((file, meta["card"], meta["jax"], meta["date"][:10], meta["command"]))
            yield form.format(row[column]) if row.get(column) is not None else ""

    lines = header(title for title, *_ in COLUMNS)
    labels = {"pallas": "", "xla": ', `"xla"`', "fla": ", fla 0.6.0"}
    for name, title in NAMES.items():
        for implementation, suffix in labels.items():
            values = list(cells(name, implementation))
            if any(values):
                lines.append(f"| `{title}`{suffix} | " + " | ".join(values) + " |")
    forced = [("main", f"forced_{what}", "ms") for what in ("forward", "backward")]
    values = list(cells("mesa", "pallas", forced))
    if any(values):
        lines.append("| `mesa_net`, all 30 iterations | " + " | ".join(values) + " | | | |")
    values = list(cells("kda", "cudnn attention"))
    if any(values):
        values[-1] = ""  # it was compiled for another mechanism's comparison
        lines.append("| causal softmax attention of cuDNN | " + " | ".join(values) + " |")
    return "\n".join([*lines, "", *sources(used)])


SECTIONS = {
    "times": lambda: times(newest()),
    "language models": lambda: model_tables.language_models(RESULTS),
    "generation": lambda: model_tables.generation(RESULTS),
    "recall": lambda: model_tables.recall(RESULTS),
}


def filled(readme):
    """The README with each section written anew between its two comments."""
    for name, written in SECTIONS.items():
        start, end = f"<!-- {name}: written by make tables -->", f"<!-- end of {name} -->"
        before, rest = readme.split(start)
        _, after = rest.split(end)
        text = written()
        readme = f"{before}{start}\n{text}{'\n' if text else ''}{end}{after}"
    return readme


def main():
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


if __name__ == "__main__":
    main()
