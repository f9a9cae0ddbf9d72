"""Times of Triton's kernels beside the others', for docs/triton.md."""

from benchmarks.model_tables import NAMES, header, origin, paragraph, sources
from benchmarks.readme_tables import TRITON

COLUMNS = TRITON | {"pallas": '`"pallas"`', "xla": '`"xla"`', "fla": "fla"}
# What a row is: its mechanism, its shape, and what stands before its measures' names.
ROWS = {
    **{name: (name, "main", "") for name in ("kda", "gsa", "mesa")},
    "mesa, all iterations": ("mesa", "main", "forced_"),
    **{name: (name, "main", "") for name in ("log_linear", "path", "path_fox")},
}
IN_FLOAT32 = "kda", "float32", "bare_"
COMPILED_AS = "triton as sm_80", "triton as sm_89"


def measured(found):
    """Forward / forward + backward, and how that compares, for docs/triton.md."""
    used = set()
    lines = header(["", *COLUMNS.values()])
    for name, row in ROWS.items():
        lines.append(_line(_named(name), found, row, _compared(name), used))
    whose = [who if who in ("triton", "xla") else None for who in COLUMNS]
    lines.append(_line("`kda` in float32", found, IN_FLOAT32, whose, used))
    times = {_named(name): _times_xla(found, row) for name, row in ROWS.items()}
    faster = [f"{name} {ratios}" for name, ratios in times.items() if ratios]
    missing = [_named(name) for name in ROWS if not _ms(found, *ROWS[name], "backward", "xla")]
    missing = [name for name in missing if "iterations" not in name]  # XLA's can stop early alone
    about = f"""Forward + backward, so many times as fast as `"xla"` as compiled for 8.0 and 8.9:
        {", ".join(faster)}. The target is 3."""
    if missing:
        about += f""" `"xla"` was not timed on an H200 for {", ".join(missing)}: whether they reach
        it is not known."""
    steps = header(["a step, ms", '`"triton"`', '`"pallas"`', '`"xla"`', "fla"])
    for name in ("kda", "gsa", "mesa", "log_linear", "path"):
        cells = []
        for who in ("triton", "pallas", "xla", "fla"):
            measure = "step" if who == "fla" else "step16_bare"
            cells.append(_shown(_ms(found, name, "step", "", measure, who, used), "{:.3f}"))
        steps.append(f"| {_named(name)} | " + " | ".join(cells) + " |")
    files = [line.replace("(results/", "(../benchmarks/results/") for line in sources(used)]
    return "\n".join([*lines, "", paragraph(about), "", *steps, "", *files])


def _line(title, found, row, whose, used):
    cells = []
    for who in whose:
        ms = [_ms(found, *row, what, who, used) for what in ("forward", "backward")]
        cells.append("\u00a0/\u00a0".join(_shown(t) for t in ms) if any(ms) else "")
    return f"| {title} | " + " | ".join(cells) + " |"


def _compared(name):
    """Whose time a row shows. fla always makes all of MesaNet's iterations."""
    return [None if (name, who) == ("mesa", "fla") else who for who in COLUMNS]


def _ms(found, mechanism, shape, how, what, who, used=None):
    """Milliseconds, or None; whose file is added to `used`."""
    if (mechanism, how, who) == ("mesa", "forced_", "fla"):
        how = ""
    row, meta, file = found.get((mechanism, shape, how + what, who), ({}, None, None))
    if used is not None and row.get("ms") is not None:
        used.add(origin(file, meta))
    return row.get("ms")


def _shown(ms, form="{:.2f}"):
    return "" if ms is None else form.format(ms)


def _times_xla(found, row):
    xla = _ms(found, *row, "backward", "xla")
    ours = [_ms(found, *row, "backward", who) for who in COMPILED_AS]
    return " and ".join(f"{xla / t:.1f}" for t in ours) if xla and all(ours) else ""


def _named(name):
    name, _, how = name.partition(", ")
    return f"`{NAMES[name]}`" + (f", {how}" if how else "")
