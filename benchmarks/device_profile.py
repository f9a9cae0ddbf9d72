"""Where a GPU's time goes: the kernels of a `jax.profiler` trace, by name and by kind."""

import collections
import gzip
import json
import pathlib
import re
import tempfile

import jax

# The first that matches a kernel's name counts.
KINDS = {
    "kernels": "mosaic_gpu",  # jla's
    "attention": "cudnn|sdpa|fmha|flash",
    "products": "gemm|nvjet|cutlass|cublas|xmma|splitk",
    "communication": "nccl",
}
# Of an operation's name, the parts that say nothing of what is computed.
AROUND = (
    r"(jit|transpose|jvp|vmap|checkpoint|remat\w*|while|body|scan|closed_call|blocks)\b.*|block_\d+"
)


def profile(call, hlo=None):
    """Runs `call()` under the profiler; returns `summary` of it, None where there is no GPU.

    hlo: the compiled program's text, from which the passes of no kind get names.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call())
        if jax.default_backend() != "gpu":
            return None
        (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        found = kernels(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])
        return summary(found) | ({} if hlo is None else dict(passes=passes(found, hlo)))


def kernels(events):
    """Milliseconds and number of runs of every kernel and copy, for one GPU (the mean of those that
    did anything).

    Args:
      events: the trace's, in Chrome's format.

    Returns:
      {name: (ms, count)}.
    """
    names = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event.get("ph") == "M" and event["name"] in names:
            thread = (event.get("tid"),) if event["name"] == "thread_name" else ()
            names[event["name"]][event["pid"], *thread] = event["args"]["name"]
    gpus = {pid for (pid,), name in names["process_name"].items() if "GPU" in name.upper()}
    if not gpus:
        raise ValueError(f"the trace has no GPU; it has {sorted(names['process_name'].values())}")
    # The other lines of a GPU repeat the kernels under the names of operations and modules.
    streams = {key for key, name in names["thread_name"].items() if name.startswith("Stream")}
    lines = {key: name for key, name in names["thread_name"].items() if key[0] in gpus}
    gpus = {pid for pid, _ in lines}  # a GPU that did nothing has none
    if not gpus or not gpus <= {pid for pid, _ in streams}:
        found = sorted(lines.values())
        raise ValueError(f"a GPU of the trace has no line 'Stream ...'; the lines are {found}")
    ms, count = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and event["pid"] in gpus:
            if (event["pid"], event["tid"]) in streams:
                ms[event["name"]] += event["dur"] / 1e3 / len(gpus)
                count[event["name"]] += 1 / len(gpus)
    return {name: (ms[name], count[name]) for name in ms}


def kind(name):
    """A name of KINDS, or "rest"."""
    return next((k for k, words in KINDS.items() if re.search(words, name, re.I)), "rest")


def passes(found, hlo):
    """The kernels of no kind, by what they compute: the operation that a fusion ends in, and the
    module that it belongs to.

    Args:
      found: as `kernels` returns it.
      hlo: a compiled program's text; its fusions' names, with underscores, are their kernels'.

    Returns:
      [operation, ms, count], the longest first.
    """
    named = re.findall(r'%?([\w.-]+) = [^\n]*metadata={[^}]*op_name="([^"]*)"', hlo)
    names = {re.sub(r"[.-]", "_", instruction): short(op_name) for instruction, op_name in named}
    ms, count = collections.Counter(), collections.Counter()
    for name, (took, times) in found.items():
        if kind(name) == "rest":
            operation = names.get(name, name)
            ms[operation] += took
            count[operation] += times
    return [[name, ms[name], count[name]] for name, _ in ms.most_common()]


def short(op_name):
    """An operation's name without what jit, loops and flax's blocks put around it; of what is in a
    backward pass, that it is."""
    parts = [part for part in op_name.split("/") if part]
    backward = any(part.startswith("transpose(") for part in parts)
    kept = [part for part in parts if not re.fullmatch(AROUND, part)] or parts[-1:]
    return ("backward: " if backward else "") + "/".join(kept[-3:])


def summary(found, most=12):
    """Totals of `kernels`' result.

    Returns:
      busy_ms, the sum over all kernels; share, of every kind; rest, the longest kernels of no kind,
      and others, those of the kinds, as [name, ms, count].
    """
    busy = sum(ms for ms, _ in found.values())
    share = dict.fromkeys([*KINDS, "rest"], 0.0)
    for name, (ms, _) in found.items():
        share[kind(name)] += ms / busy
    longest = sorted(found.items(), key=lambda item: -item[1][0])
    rows = [[name, ms, count] for name, (ms, count) in longest]
    rest = [row for row in rows if kind(row[0]) == "rest"][:most]
    others = [row for row in rows if kind(row[0]) != "rest"][:most]
    return dict(busy_ms=busy, share=share, rest=rest, others=others)
