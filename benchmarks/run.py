"""Times the mechanisms on this machine; prints a table, writes JSON and a plot."""

import argparse
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
import jaxlib
from rich.console import Console
from rich.table import Table

from benchmarks import fla
from benchmarks.measure import attention, measure
from benchmarks.mechanisms import MECHANISMS
from benchmarks.plot import plot

GROUPS = ("main", "step", "long", "ragged", "packed", "sweep")
MEASURES = ("forward", "backward", "bare", "errors")
PEERS = ("cudnn attention", "fla")


def main(argv=None):
    options = parse(argv)
    if options.peer:
        # Leaves fla's allocator its share of the card; read when the backend starts.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    start = time.monotonic()
    meta = describe()
    print(" | ".join(f"{key} {value}" for key, value in meta.items()), flush=True)
    results, not_started = [], []
    for name, shape, what, implementation in cases(options):
        label = f"{name} {shape.name} {what} {implementation}"
        if options.limit is not None and time.monotonic() - start > options.limit:
            not_started.append(label)
            continue
        row = dict(mechanism=name, implementation=implementation, measure=what, dtype="bfloat16")
        row |= dict(shape=shape.name) | {k: asdict(shape)[k] for k in SHAPE_KEYS}
        row |= run_case(name, shape, what, implementation, options.seconds)
        results.append(row)
        compare(row, results)
        print(f"[{time.monotonic() - start:6.1f} s] {label}: {numbers(row)}", flush=True)
        write(options.out, meta, results, not_started)
    show(results)
    if not_started:
        print(f"not started within {options.limit:g} s: {', '.join(not_started)}")
        write(options.out, meta, results, not_started)
    if options.plot and not plot(results, meta, options.plot):
        print("nothing to plot: no forward or backward time was measured")
    return 1 if any("error" in row for row in results) else 0


SHAPE_KEYS = ("group", "B", "T", "H", "D", "packed")


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--mechanism", default=",".join(MECHANISMS), help="names, by commas")
    parser.add_argument(
        "--what",
        default="",
        help=f"measures ({', '.join(MEASURES)}) and groups of shapes ({', '.join(GROUPS)}), by "
        "commas; all where none of a kind is named",
    )
    parser.add_argument("--shapes", choices=("small", "full"), default="full")
    parser.add_argument("--implementations", default="pallas,xla", help="names, by commas")
    parser.add_argument("--peer", action="store_true", help="also fla and cuDNN's attention")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of one timed repeat")
    parser.add_argument("--limit", type=float, help="start no case after so many seconds")
    parser.add_argument("--out", help="write JSON to this file, after every case")
    parser.add_argument("--plot", help="write a plot of time against T to this PNG file")
    options = parser.parse_args(argv)
    for option, known in dict(
        mechanism=tuple(MECHANISMS),
        what=MEASURES + GROUPS,
        implementations=("reference", "xla", "pallas"),
    ).items():
        words = [word for word in getattr(options, option).split(",") if word]
        if unknown := [word for word in words if word not in known]:
            parser.error(f"--{option}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
        setattr(options, option, words)
    return options


def cases(options):
    """The chosen (mechanism, shape, measure, implementation); the peers, slow to start, last."""
    groups = [w for w in options.what if w in GROUPS]
    measures = [w for w in options.what if w in MEASURES]

    def chosen(shape, what):
        if groups and shape.group not in groups:
            return False
        if shape.group == "step":
            return "step" in groups or not measures
        return not measures or what in measures or what.split("_")[0] in measures

    chosen_cases = [
        (name, shape, what)
        for name in options.mechanism
        for shape in MECHANISMS[name].shapes[options.shapes]
        for what in shape.measures
        if chosen(shape, what)
    ]
    for name, shape, what in chosen_cases:
        for implementation in options.implementations:
            yield name, shape, what, implementation
    if not options.peer:
        return
    available = dict(zip(PEERS, (jax.default_backend() == "gpu", fla.importable()), strict=True))
    if not available["fla"]:
        print("fla: not importable", flush=True)
    if not available["cudnn attention"]:
        print("cudnn attention: needs a GPU", flush=True)
    for peer in PEERS:
        for name, shape, what in chosen_cases:
            timed = not shape.packed and what in ("forward", "backward")
            if peer == "fla":
                made = MECHANISMS[name].fla_step if what == "step" else MECHANISMS[name].fla
                timed = (timed or what == "step") and made is not None
            if available[peer] and timed:
                yield name, shape, what, peer


def run_case(name, shape, what, implementation, seconds):
    """One case's numbers, or the message of what it raised."""
    try:
        if implementation == "fla":
            mechanism = MECHANISMS[name]
            make = mechanism.fla_step if what == "step" else mechanism.fla
            return fla.measure(make, shape, what == "backward")
        if implementation == "cudnn attention":
            return attention(name, shape, what, seconds)
        return measure(name, shape, what, implementation, seconds)
    except Exception as error:  # reported, and the exit code is 1
        return dict(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


def compare(row, results):
    """Adds the targets, and the time per token as a multiple of main's."""
    if row["implementation"] == "pallas":
        targets = MECHANISMS[row["mechanism"]].targets.items()
        key = (row["shape"], row["measure"])
        row["targets"] = {column: goal for (*case, column), goal in targets if tuple(case) == key}
    same = ("mechanism", "implementation", "measure")
    for main_row in results:
        if main_row["shape"] == "main" and all(main_row[k] == row[k] for k in same):
            if "ms" in main_row and "ms" in row:
                share = main_row["ms"] / (main_row["B"] * main_row["T"])
                row["per_token_of_main"] = row["ms"] / (row["B"] * row["T"]) / share


def numbers(row):
    """A case's numbers on one line."""
    parts = []
    if "ms" in row:
        parts.append(f"{row['ms']:.4g} ms")
        if "spread" in row:
            parts[-1] += f" (spread {row['spread']:.1%})"
    if "per_token_of_main" in row and row["shape"] != "main":
        parts.append(f"{row['per_token_of_main']:.2f} x main's time a token")
    if "memory_gib" in row:
        parts.append(f"{row['memory_gib']:.3f} GiB")
        parts.append(f"first call {row['first_call_s']:.1f} s")
    if "errors" in row:
        parts.append(" ".join(f"{k} {v:.1e}" for k, v in row["errors"].items()))
        parts.append("same bits twice" if row["same_bits"] else "other bits twice")
    if "error" in row:
        parts.append(f"FAILED {' '.join(row['error'].split())[:300]}")
    for column, goal in row.get("targets", {}).items():
        if column in row:
            parts.append(f"{column} target {goal:g} {'met' if row[column] <= goal else 'MISSED'}")
    return ", ".join(parts)


def show(results):
    """Prints the table."""
    table = Table()
    for column in ("shape", "B T H D", "measure", "implementation", "numbers"):
        table.add_column(column, no_wrap=column != "numbers")
    for row in results:
        sizes = " ".join(str(row[k]) for k in "BTHD")
        shape = f"{row['mechanism']} {row['shape']}"
        table.add_row(shape, sizes, row["measure"], row["implementation"], numbers(row))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def describe():
    """The machine, the versions and the command."""
    device = jax.devices()[0]
    driver = None
    if device.platform == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return dict(
        card=device.device_kind,
        compute_capability=getattr(device, "compute_capability", None),
        driver=driver,
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
    )


def write(path, meta, results, not_started):
    if path:
        with open(path, "w") as file:
            json.dump(dict(meta=meta, results=results, not_started=not_started), file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
