"""Times the mechanisms on this machine; prints a table and writes JSON."""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import asdict

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import context, fla
from benchmarks.measure import attention, measure
from benchmarks.mechanisms import MECHANISMS

GROUPS = ("main", "step", "step_slots", "long", "ragged", "packed", "sweep", "slots", "grouped")
GROUPS += ("context",)
MEASURES = ("forward", "backward", "bare", "forced", "errors", "layer")
IMPLEMENTATIONS = ("reference", "xla", "pallas", "triton")  # all of jla's
FORCED = ("pallas", "triton")  # those that can be kept from stopping early
WITH_SLOTS = 1.05  # the most that a step on a pool takes, in steps without
COLUMNS = dict(ms="{:.4g}", spread="{:.1%}", per_token_of_main="{:.2f}", efficiency="{:.1%}")
COLUMNS |= dict(memory_gib="{:.3f}", memory_peak_gib="{:.3f}", first_call_s="{:.1f}")


def main(argv=None):
    options = parse(argv)
    with compiling(options.compiled_as):
        return run(argv, options)


@contextlib.contextmanager
def compiling(capability):
    """Triton's kernels are compiled as for another GPU, as "sm_80", if one is named."""
    if not capability:
        yield
        return
    from jla.triton import launch  # Triton is an extra

    with launch.compiling_for(int(capability.removeprefix("sm_"))):
        yield


def run(argv, options):
    if options.peer:
        # Leaves fla's allocator its share of the GPU; read when the backend starts.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    start = time.monotonic()
    report = dict(meta=describe(argv), results=[], not_started=[])
    print(" | ".join(f"{key} {value}" for key, value in report["meta"].items()), flush=True)
    for name, shape, what, implementation in cases(options):
        label = implementation
        if implementation == "triton" and options.compiled_as:
            label += f" as {options.compiled_as}"
        row = dict(mechanism=name, shape=shape.name, measure=what, implementation=label)
        if options.limit is not None and time.monotonic() - start > options.limit:
            report["not_started"].append(row)
        else:
            row |= {k: v for k, v in asdict(shape).items() if k not in ("name", "measures")}
            row |= dict(dtype="bfloat16") | run_case(name, shape, what, implementation, options)
            report["results"].append(row)
            compare(row, report["results"])
            print(f"[{time.monotonic() - start:6.1f} s]", *filter(None, cells(row)), flush=True)
        if options.out:
            with open(options.out, "w") as file:
                json.dump(report, file, indent=1)
    show(report)
    return 1 if any("error" in row for row in report["results"]) else 0


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    what = f"measures ({', '.join(MEASURES)}) and groups of shapes ({', '.join(GROUPS)}), by "
    what += "commas; all where none of a kind is named, but context and step_slots"
    parser.add_argument("--mechanism", default=",".join(MECHANISMS), help="names, by commas")
    parser.add_argument("--what", default="", help=what)
    parser.add_argument("--shapes", choices=("small", "full"), default="full")
    parser.add_argument("--implementations", default="pallas,xla", help="names, by commas")
    as_help = "compile Triton's kernels as for an A100 or an RTX 40, and run them on this GPU"
    choices = ("sm_80", "sm_89")
    parser.add_argument("--as", dest="compiled_as", choices=choices, help=as_help)
    parser.add_argument("--peer", action="store_true", help="also fla and cuDNN's attention")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a timed repeat")
    parser.add_argument("--limit", type=float, help="start no case after so many seconds")
    parser.add_argument("--out", help="write JSON to this file, after every case")
    options = parser.parse_args(argv)
    known = dict(mechanism=MECHANISMS, what=MEASURES + GROUPS, implementations=IMPLEMENTATIONS)
    for option, words in known.items():
        given = [word for word in getattr(options, option).split(",") if word]
        if unknown := [word for word in given if word not in words]:
            parser.error(f"--{option}: unknown {', '.join(unknown)}; known: {', '.join(words)}")
        setattr(options, option, given)
    return options


def cases(options):
    """Yields (mechanism, shape, measure, implementation); the peers, slow to start, last."""
    groups = [word for word in options.what if word in GROUPS]
    measures = [word for word in options.what if word in MEASURES]

    def chosen(shape, what):
        if shape.group == "step":
            return "step" in groups or not options.what
        if shape.group == "step_slots":
            return "step_slots" in groups
        named = not measures or what in measures or what.split("_")[0] in measures
        if shape.group == "context":
            return named and "context" in groups
        return named and (not groups or shape.group in groups)

    table = [
        (name, shape, what)
        for name in options.mechanism
        for shape in MECHANISMS[name].shapes[options.shapes]
        for what in shape.measures
        if chosen(shape, what)
    ]
    for case in table:
        for implementation in options.implementations:
            if implementation in FORCED or not case[2].startswith("forced_"):
                yield *case, implementation
    if not options.peer:
        return
    others = [c for c in table if not c[1].packed and c[1].group != "context"]
    timed = [c for c in others if c[2] in ("forward", "backward")]
    if jax.default_backend() == "gpu":
        yield from ((*case, "cudnn attention") for case in timed)
    else:
        print("cudnn attention: needs a GPU", flush=True)
    if fla.importable():
        with_step = timed + [c for c in table if c[2] == "step"]
        yield from ((*c, "fla") for c in with_step if fla_maker(c[0], c[2]) is not None)
    else:
        print("fla: not importable", flush=True)


def fla_maker(name, what):
    return MECHANISMS[name].fla_step if what == "step" else MECHANISMS[name].fla


def run_case(name, shape, what, implementation, options):
    """One case's numbers, or the message of what it raised."""
    try:
        if implementation == "fla":
            return fla.measure(fla_maker(name, what), shape, what == "backward")
        if shape.group == "context":
            return context.measure(name, shape, what, implementation, options.seconds)
        if implementation == "cudnn attention":
            return attention(name, shape, what, options.seconds)
        return measure(name, shape, what, implementation, options.seconds)
    except Exception as error:  # reported, and the exit code is 1
        return dict(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


def compare(row, results):
    """Adds the targets, and the time of a token as a multiple of main's."""
    if row["implementation"] == "pallas":
        goals = MECHANISMS[row["mechanism"]].targets.items()
        case = (row["shape"], row["measure"])
        row["targets"] = {column: goal for (*of, column), goal in goals if tuple(of) == case}
    for other in results:
        same = all(other[k] == row[k] for k in ("mechanism", "implementation", "measure"))
        if same and other["shape"] == "main" and "ms" in other and "ms" in row:
            ratio = row["ms"] / (row["B"] * row["T"]) * (other["B"] * other["T"]) / other["ms"]
            row["per_token_of_main"] = ratio
        is_step = other["shape"] == "step" and row.get("R") is not None
        if same and is_step and "ms" in other and "ms" in row:
            row["per_step"] = row["ms"] / other["ms"]


def cells(row):
    """A row's texts: what was measured, the columns, notes."""
    sizes = " ".join(f"{k}={row[k]}" for k in "BTHDM" if row[k] is not None)
    notes = [f"{name} {error:.1e}" for name, error in row.get("errors", {}).items()]
    notes += [f"{name} {count}" for name, count in row.get("collectives", {}).items()]
    notes += [f"{row['devices']} devices"] if "devices" in row else []
    if "per_step" in row:
        wanted = "met" if row["per_step"] <= WITH_SLOTS else "MISSED"
        notes.append(f"{row['per_step']:.3f} of the step without slots <= {WITH_SLOTS} {wanted}")
    if "error" in row:
        notes.append(f"FAILED {' '.join(row['error'].split())[:300]}")
    for column, goal in row.get("targets", {}).items():
        if column in row:
            notes.append(f"{column} <= {goal:g} {'met' if row[column] <= goal else 'MISSED'}")
    numbers = (form.format(row[k]) if row.get(k) is not None else "" for k, form in COLUMNS.items())
    case = f"{row['mechanism']} {row['shape']}"
    return case, sizes, row["measure"], row["implementation"], *numbers, ", ".join(notes)


def show(report):
    table = Table("case", "sizes", "measure", "implementation", *COLUMNS, "notes")
    for row in report["results"]:
        table.add_row(*cells(row))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 180
    console.print(table)
    for row in report["not_started"]:
        print("not started, past --limit:", *row.values())


def describe(argv, program="benchmarks.run"):
    """The machine, the versions and the command."""
    device = jax.devices()[0]
    driver = None
    if device.platform == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    arguments = sys.argv[1:] if argv is None else argv
    return dict(
        card=device.device_kind,
        compute_capability=getattr(device, "compute_capability", None),
        driver=driver,
        jax=jax.__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", program, *arguments]),
    )


if __name__ == "__main__":
    sys.exit(main())
