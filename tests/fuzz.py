"""Random calls of every mechanism, each implementation against another in float32.

    python tests/fuzz.py --seconds 60 --seed 0 --processes 8

draws shapes, and several contents for each shape, because a new shape compiles and new contents do
not. A call is judged by "xla" in float32 at the highest precision ("xla" in float32 itself by
"reference"), with the tolerances of the contract's tables, which also make the arguments. What is
compared: values and gradients of all arguments and states ("gradients"), two runs joined by the
state ("split"), and a run continued by single steps ("steps"). For one content of each shape, equal
calls must also return equal bits, and later tokens must not change earlier outputs. Of the layers
("kda_layer", ...): masks, segments and decoding, against the float64 definitions of their tests.

Each failing case is printed with a name, which `--case NAME` runs again, and as a Python call that
can be pasted and edited. A case depends on its name alone.

A call counts as
  refused    where jla raises NotImplementedError and says which implementation serves instead;
  sensitive  where the judge itself moves by as much when its arguments are rounded to the dtype
             under test, so that no implementation could do better; or where a gradient cancels to
             next to nothing, and the error is small beside the other gradients;
  failed     where it is beyond its tolerance otherwise, raises, or hangs.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
import traceback

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "contract"), str(HERE / "linen"), str(HERE.parent)]

if __name__ == "__main__":
    # The processes share a device, and importing the layers' tables already starts one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402

if __name__ == "__main__":
    # With fewer, interpreted kernels can starve one another.
    jax.config.update("jax_num_cpu_devices", 8)

import fuzz_layers  # noqa: E402
import triton_interpreter  # noqa: E402
from fuzz_compare import beyond, compare, programs, same_bits, tolerances_of  # noqa: E402
from fuzz_draw import TABLE, Content, Shape, draw_content, draw_shape  # noqa: E402

from jla._core.checks import IMPLEMENTATIONS  # noqa: E402
from jla._dispatch import BACKENDS  # noqa: E402

__all__ = ["Content", "Shape", "compare", "same_bits"]

# Contents for each shape: compiling takes most of the time, and so many more cost little.
CONTENTS = 6
# Seconds after the end in which a process may finish its case; then it counts as hung.
GRACE = 200


# Cases.


def parse(name):
    """The shape and the content of a case's name."""
    *words, content = name.split("/")
    if words[0] in fuzz_layers.NAMES:
        mechanism, implementation, _, seed, index = words
        shape = fuzz_layers.draw_layer(mechanism, implementation, seed, index)
        return shape, fuzz_layers.draw_layer_content(*words, content)
    shape = draw_shape(*words)
    return shape, draw_content(shape, *words, content)


def call_of(shape, content, function="compare"):
    """Python that runs a case; the shape and the content in it can be edited."""
    return (
        f"import sys; sys.path.insert(0, 'tests')\n"
        f"from fuzz import Content, Shape, compare, same_bits\n"
        f"{function}(\n    {shape},\n    {content},\n)"
    )


def run_case(name):
    """Runs a case; its record, a dict."""
    shape, content = parse(name)
    record = dict(
        case=name,
        row=[shape.mechanism, shape.implementation, shape.dtype],
        tolerances=tolerances_of(shape),
        status="passed",
        call=call_of(shape, content),
        message="",
    )
    try:
        values, gradients, unexplained = compare(shape, content)
        worst = [max([0.0, *found.values()]) for found in (values, gradients)]
        different = []
        if name.endswith("/0") and shape.check == "gradients":
            different = same_bits(shape, content)
    except NotImplementedError as refusal:
        if 'implementation="' not in str(refusal):
            return record | dict(status="failed", message=traceback.format_exc(limit=-3))
        return record | dict(status="refused", message=str(refusal))
    except Exception:
        return record | dict(status="failed", message=traceback.format_exc(limit=-3))
    found = (values | gradients).items()
    record |= dict(worst=worst, message=", ".join(f"{leaf} {error:.1e}" for leaf, error in found))
    if different:
        message = "other bits: " + ", ".join(different)
        call = call_of(shape, content, "same_bits")
        return record | dict(status="failed", message=message, call=call)
    if unexplained:
        message = f"beyond: {', '.join(unexplained)}\nof {record['message']}"
        return record | dict(status="failed", message=message)
    over = any(map(beyond, (values, gradients), record["tolerances"]))
    return record | dict(status="sensitive" if over else "passed")


def work(options, part, parts):
    """Runs cases until the time is over: their names before, their records after.

    Yields:
      ("begin", name) or ("end", record).
    """
    on_gpu = jax.default_backend() == "gpu"
    if __name__ == "__main__" and not on_gpu:
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is the longer part
        if triton_interpreter.INTERPRETED:
            triton_interpreter.repair()
            triton_interpreter.hasten()
    chosen = options.implementations or (["pallas", "xla"] if on_gpu else ["xla", "reference"])
    rows = [
        (name, implementation)
        for implementation in chosen
        for name in options.mechanisms
        if name in fuzz_layers.NAMES
        or implementation in [i.name for i in TABLE[name].implementations]
    ]
    end = time.monotonic() + options.seconds
    for index in itertools.count(part, parts):
        mechanism, implementation = rows[index % len(rows)]
        scope = "full" if on_gpu else "tiny" if implementation in BACKENDS else "small"
        for content in range(options.contents):
            if time.monotonic() > end:
                return
            name = f"{mechanism}/{implementation}/{scope}/{options.seed}/{index}/{content}"
            yield "begin", name
            record = run_case(name)
            yield "end", record
            if record["status"] == "refused":
                break
            if "CUDA_ERROR" in record["message"]:
                return  # nothing runs in this process any more
        programs.cache_clear()
        jax.clear_caches()


# Processes.


def spawned(options, argv):
    """As `work`, of several processes at once."""
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / options.processes:.3f}",
    }
    messages = queue.Queue()
    running = {}
    for part in range(options.processes):
        process = subprocess.Popen(
            [sys.executable, __file__, *argv, "--part", str(part)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running[part] = process
        threading.Thread(target=_listen, args=(part, process, messages), daemon=True).start()
    end, at_work = time.monotonic() + options.seconds + GRACE, {}
    while running:
        try:
            part, kind, what = messages.get(timeout=max(0.1, end - time.monotonic()))
        except queue.Empty:
            for part, process in running.items():
                process.kill()
                yield "end", _lost(at_work.get(part), "hangs", part)
            return
        if kind == "begin":
            at_work[part] = what
        elif kind == "end":
            at_work.pop(part, None)
        else:
            code = running.pop(part).wait()
            if code:
                message = f"the process ends with code {code}: {what}"
                yield "end", _lost(at_work.get(part), message, part)
            continue
        yield kind, what


def _listen(part, process, messages):
    errors = collections.deque(maxlen=30)
    reader = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
    reader.start()
    for line in process.stdout:
        if line.startswith("fuzz "):
            messages.put((part, *json.loads(line[5:])))
    reader.join()
    messages.put((part, "over", "".join(errors)))


def _lost(name, message, part):
    """The record of a case whose process never finished it."""
    if name is None:
        row, call = ["?", "?", "?"], ""
    else:
        shape, content = parse(name)
        row, call = [shape.mechanism, shape.implementation, shape.dtype], call_of(shape, content)
    name = name or f"process {part}, before a case"
    return dict(case=name, row=row, status="failed", call=call, message=message)


# The command.


def show(record, all_of_it=False):
    if record["status"] == "sensitive":
        print(f"sensitive {record['case']}: {record['message']}", flush=True)
    if record["status"] == "failed" or all_of_it:
        print(f"\n{record['status'].upper()} {record['case']}\n{record['message']}")
        print(f"python tests/fuzz.py --case {record['case']}\n{record['call']}\n", flush=True)


def table(records):
    """Prints one line for each mechanism, implementation and dtype."""
    rows = collections.defaultdict(list)
    for record in records:
        rows[tuple(record["row"])].append(record)
    print(
        f"{'mechanism':<11} {'implementation':<14} {'dtype':<8} {'cases':>6} {'refused':>7} "
        f"{'sensitive':>9} {'failed':>6}   worst values    worst gradients   (of the passed)"
    )
    for row, records in sorted(rows.items()):
        count = collections.Counter(record["status"] for record in records)
        passed = [record for record in records if record["status"] == "passed"]
        worst = ["", ""]
        if passed:
            worst = [
                f"{max(r['worst'][i] for r in passed):.1e} of {passed[0]['tolerances'][i]:.0e}"
                for i in range(2)
            ]
        print(
            f"{row[0]:<11} {row[1]:<14} {row[2]:<8} {len(records):>6} {count['refused']:>7} "
            f"{count['sensitive']:>9} {count['failed']:>6}   {worst[0]:<15} {worst[1]:<15}"
        )


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def names(known):
        def parse(text):
            unknown = sorted(set(text.split(",")) - set(known))
            if unknown:
                raise argparse.ArgumentTypeError(
                    f"{', '.join(unknown)}: choose among {', '.join(known)}"
                )
            return text.split(",")

        return parse

    parser.add_argument("--seconds", type=float, default=60, help="how long to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="at once, on one device")
    parser.add_argument("--contents", type=int, default=CONTENTS, help="calls of each shape")
    known = [*TABLE, *fuzz_layers.NAMES]
    parser.add_argument("--mechanisms", type=names(known), default=known)
    parser.add_argument(
        "--implementations",
        type=names(IMPLEMENTATIONS),
        help="pallas,xla on a GPU and xla,reference elsewhere, where pallas is interpreted",
    )
    parser.add_argument("--case", help="run one case, by its name")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv):
    """Returns the exit code: 1 if anything failed."""
    options = parse_arguments(argv)
    if options.part is not None:
        for message in work(options, options.part, options.processes):
            print("fuzz " + json.dumps(message), flush=True)
        return 0
    if options.case:
        record = run_case(options.case)
        show(record, all_of_it=True)
        return int(record["status"] == "failed")
    records = []
    source = work(options, 0, 1) if options.processes == 1 else spawned(options, argv)
    for kind, what in source:
        if kind == "end":
            records.append(what)
            show(what)
    table(records)
    failed = sum(record["status"] == "failed" for record in records)
    print(f"{len(records)} cases, {failed} failed, seed {options.seed}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
