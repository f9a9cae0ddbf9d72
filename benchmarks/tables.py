"""Writes the tables of READMEs and docs from benchmarks/results: `make tables`."""

import json
import pathlib

from benchmarks import model_tables, quality_tables, readme_tables, site_tables, triton_tables
from benchmarks.model_tables import NAMES, header, origin, sources

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = (
    ("forward", ("main", "forward", "ms"), "{:.2f}"),
    ("forward + backward", ("main", "backward", "ms"), "{:.2f}"),
    ("step", ("step", "step16_bare", "ms"), "{:.3f}"),
    ("memory GiB", ("main", "backward", "memory_gib"), "{:.2f}"),
    ("first call s", ("main", "backward", "first_call_s"), "{:.1f}"),
)
PEERS = ("fla", "jax-linear-attention", "FlashKDA")


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
            if measure == "step16_bare" and implementation in PEERS:
                measure = "step"  # one call for each token
            row, meta, file = found.get((name, shape, measure, implementation), ({}, None, None))
            if row.get(column) is not None:
                used.add(origin(file, meta))
            yield form.format(row[column]) if row.get(column) is not None else ""

    lines = header(["", *(title for title, *_ in COLUMNS)])
    labels = {"pallas": "", "triton": ', `"triton"`'}
    labels |= {f"triton as {x}": f', `"triton"` as {x}' for x in ("sm_80", "sm_89")}
    labels |= {"xla": ', `"xla"`'} | {peer: f", {peer}" for peer in PEERS}
    for name, title in NAMES.items():
        for implementation, suffix in labels.items():
            values = list(cells(name, implementation))
            if any(values):
                lines.append(f"| `{title}`{suffix} | " + " | ".join(values) + " |")
    forced = [("main", f"forced_{what}", "ms") for what in ("forward", "backward")]
    for implementation in ("pallas", "triton"):
        values = list(cells("mesa", implementation, forced))
        if any(values):
            title = f"`mesa_net`, all 30 iterations{labels[implementation]}"
            lines.append(f"| {title} | " + " | ".join(values) + " | | | |")
    values = list(cells("kda", "cudnn attention"))
    if any(values):
        values[-1] = ""  # it was compiled for another mechanism's comparison
        lines.append("| causal softmax attention of cuDNN | " + " | ".join(values) + " |")
    return "\n".join([*lines, "", *sources(used)])


# What stands between two comments of a page, each written from the folder of results.
SECTIONS = {
    "README.md": {
        "picture": readme_tables.speed_picture,
        "choice": readme_tables.choice,
        "speeds": lambda folder: readme_tables.speeds(newest(folder)),
        "behind": lambda folder: readme_tables.behind(newest(folder), folder),
    },
    "benchmarks/README.md": {
        "times": lambda folder: times(newest(folder)),
        "language models": model_tables.language_models,
        "generation": model_tables.generation,
        "serving": model_tables.serving,
        "recall": model_tables.recall,
        "recall sizes": quality_tables.recall_sizes,
        "quality": quality_tables.quality,
        "reach": quality_tables.reach,
        "peer models": quality_tables.peer_models,
    },
    "docs/index.md": {
        "picture": site_tables.picture,
    },
    "docs/choosing.md": {
        "choice": site_tables.choice,
        "recall": site_tables.recall,
        "costs": site_tables.costs,
    },
    "docs/gpus.md": {
        "speeds": lambda folder: site_tables.speeds(newest(folder)),
    },
    "docs/behind.md": {
        "behind": lambda folder: site_tables.behind(newest(folder), folder),
    },
    "docs/triton.md": {
        "measured": lambda folder: triton_tables.measured(newest(folder)),
    },
}


def filled(page, text):
    """The text of a page with its sections written anew; README's links come last."""
    for name, write in SECTIONS[page].items():
        text = between(text, name, write(RESULTS))
    if page == "README.md":
        text = between(text, "links", readme_tables.links(text))
    return text


def between(text, name, section):
    """The text with a section between its two comments."""
    start, end = f"<!-- {name}: written by make tables -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{section}{'\n' if section else ''}{end}{after}"


def main():
    for name in SECTIONS:
        page = ROOT / name
        page.write_text(filled(name, page.read_text()))


if __name__ == "__main__":
    main()
