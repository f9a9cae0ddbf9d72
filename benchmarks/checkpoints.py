"""Times a checkpoint of 7 billion parameters: loading it, sampling from it, reading a prompt.

    python -m benchmarks.checkpoints --folder /tmp/gsa-7b --out benchmarks/results/checkpoints.json

It has the shapes of fla's GSA-7B, and random bits for values, which change no speed. `--folder`
gets the files unless it has them, 14.6 GB in bfloat16, and keeps them.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import resource
import statistics
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import jla.hub
from benchmarks.device_profile import profile
from benchmarks.run import IMPLEMENTATIONS
from benchmarks.side_by_side import Report, size
from jla.models.generate import decoder, decoder_params, draw, empty_cache, feed

KEYS = ("case", "layers")
CASES = ("load", "decode", "prefill", "decode_xla", "load_again")
CALLS = 5  # of sampling and of reading: the first warms up
BANDWIDTH = 4.3e12  # bytes a second that an H200 reads from its memory
FILES = 6
BLOCK = 2**22  # elements that are drawn and written at once


def main(argv=None):
    options = parse(argv)
    # All of the weights are there twice for a moment, if they are loaded again.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    start = time.monotonic()
    report = Report(options.out, KEYS, "checkpoints", argv)
    folder = pathlib.Path(options.folder)
    if not (folder / "config.json").exists():
        write(folder, make_config(options))
        print(f"[{time.monotonic() - start:6.1f} s] wrote {folder}", flush=True)
    shared = {}
    for case in options.cases:
        if options.limit is not None and time.monotonic() - start > options.limit:
            print(f"not started, past --limit: {case}", flush=True)
            continue
        row = dict(case=case, layers=options.layers)
        row = report.measure(row, RUN[case](options, folder, shared))
        show(row, time.monotonic() - start)
    return 1 if report.failed else 0


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--folder", required=True, help="where the checkpoint is, or will be")
    add("--layers", type=int, default=32)
    add("--width", type=int, default=4096)
    add("--heads", type=int, default=32)
    add("--key-heads", type=int, default=8)
    add("--hidden", type=int, default=14336)
    add("--vocabulary", type=int, default=32000)
    add("--prompt", type=int, default=8192, help="tokens that are read")
    add("--tokens", type=int, default=64, help="sampled in one call")
    add("--implementation", choices=IMPLEMENTATIONS, help="default: the fastest")
    add("--cases", default=",".join(CASES), help="by commas (default: %(default)s)")
    add("--limit", type=float, help="start no case after so many seconds")
    add("--out", help="write JSON to this file, after every case; its other rows stay")
    options = parser.parse_args(argv)
    options.cases = options.cases.split(",")
    if unknown := [case for case in options.cases if case not in CASES]:
        parser.error(f"--cases: unknown {', '.join(unknown)}; known: {', '.join(CASES)}")
    return options


def make_config(options):
    """As fla writes it."""
    return dict(
        architectures=["GSAForCausalLM"],
        model_type="gsa",
        dtype="bfloat16",
        hidden_size=options.width,
        intermediate_size=options.hidden,
        num_hidden_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.key_heads,
        num_slots=64,
        norm_eps=1e-5,
        vocab_size=options.vocabulary,
        tie_word_embeddings=False,
    )


def tensors(config):
    """fla's names of a GSA model's tensors, and their shapes [out, in]."""
    D, I, V = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    HK = D // config["num_heads"] * config["num_kv_heads"]
    slots = config["num_slots"] * config["num_kv_heads"]
    attn = dict(q_proj=(D, D), k_proj=(HK, D), v_proj=(HK, D), f_proj=(slots, D))
    attn |= dict(g_norm=(D,), o_proj=(D, D))
    mlp = dict(gate_proj=(I, D), up_proj=(I, D), down_proj=(D, I))
    found = {"model.embeddings.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found[f"{layer}.attn_norm.weight"] = (D,)
        found |= {f"{layer}.attn.{name}.weight": shape for name, shape in attn.items()}
        found[f"{layer}.mlp_norm.weight"] = (D,)
        found |= {f"{layer}.mlp.{name}.weight": shape for name, shape in mlp.items()}
    return found | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def write(folder, config):
    """Writes the checkpoint in several files and their index, and drops them from memory."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensors(config)
    whole, done = sum(map(np.prod, shapes.values())), 0
    names = {}  # by file
    for name, shape in shapes.items():
        names.setdefault(min(FILES - 1, int(FILES * done / whole)), []).append(name)
        done += np.prod(shape)
    files = {
        f"model-{i + 1:05}-of-{FILES:05}.safetensors": {name: shapes[name] for name in there}
        for i, there in names.items()
    }
    with concurrent.futures.ThreadPoolExecutor(FILES) as pool:
        list(pool.map(lambda file: write_file(folder / file, files[file]), files))
    index = {name: file for file, there in files.items() for name in there}
    total = dict(total_size=2 * int(whole))
    text = json.dumps(dict(metadata=total, weight_map=index))
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config))  # last: a part is not taken for all


def write_file(path, shapes):
    """Writes one safetensors file of bfloat16 tensors: ones for norms, else +-(1 to 2) / 64."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        stop = start + 2 * int(np.prod(shape))
        header[name] = dict(dtype="BF16", shape=shape, data_offsets=[start, stop])
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.Generator(np.random.SFC64(zlib.crc32(path.name.encode())))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            rest = int(np.prod(shape))
            while rest:
                part = min(rest, BLOCK)
                bits = draw.integers(0, 2**64, -(-part // 4), np.uint64).view(np.uint16)[:part]
                if len(shape) == 1:
                    bits[:] = 0x3F80
                else:
                    bits &= 0x807F  # sign and fraction, behind the exponent of 1/64
                    bits |= 0x3C80
                file.write(bits.data)
                rest -= part
        drop(file)


def drop(file):
    """What is in memory of a file is written to the disk and dropped; the next read is cold."""
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def model_of(options, folder, **more):
    implementation = more.pop("implementation", options.implementation)
    return jla.hub.model(jla.hub.read_config(folder), implementation=implementation, **more)


def load(options, folder, shared):
    """Yields the numbers of loading onto the first device, of which `shared` gets the parameters.

    `cold` is the part that came from the disk, None if that is not known. The peak of the host's
    memory is the process's, less what it had at the start: not below the loading's own.
    """
    shared.pop("params", None)
    model = model_of(options, folder)
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            drop(file)
    bytes_ = sum(path.stat().st_size for path in files)
    resident, read = resident_bytes(), disk_bytes()
    began = time.perf_counter()
    params = jax.block_until_ready(jla.hub.load(folder, model))
    seconds = time.perf_counter() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    shared["params"] = params
    yield dict(
        parameters=size(params),
        bytes=bytes_,
        load_s=seconds,
        gb_per_s=bytes_ / seconds / 1e9,
        cold=None if read is None else (disk_bytes() - read) / bytes_,
        host_peak_gb=peak / 1e9,
    )


def resident_bytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def disk_bytes():
    """What this process has had read from disks; None where the system does not tell."""
    counts = pathlib.Path("/proc/self/io")
    if not counts.exists():
        return None
    lines = counts.read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def decode(options, folder, shared, implementation=None):
    """Yields the numbers of sampling `options.tokens` tokens at a time, one sequence alone.

    The floor is the time in which the weights are read once, at `BANDWIDTH`; of the embedding one
    row is.
    """
    model = model_of(options, folder, implementation=implementation or options.implementation)
    decoding, n = decoder(model), options.tokens
    params = decoder_params(model, shared["params"])
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed"]["embedding"].nbytes
    floor_ms = 1e3 * weights / BANDWIDTH
    cache = empty_cache(decoding, 1, options.prompt)
    logits = jnp.zeros((1, model.config.vocabulary))

    def several(params, logits, cache):
        tokens, drawn_from, cache = draw(decoding, params, logits, cache, None, 0.0, n)
        return tokens, drawn_from[:, -1], cache

    began = time.perf_counter()
    run = jax.jit(several, donate_argnums=(1, 2)).lower(params, logits, cache).compile()
    first_call_s = time.perf_counter() - began
    plan = run.memory_analysis()
    ms = []
    for _ in range(CALLS):
        began = time.perf_counter()
        _, logits, cache = jax.block_until_ready(run(params, logits, cache))
        ms.append(1e3 * (time.perf_counter() - began) / n)
    check(logits)
    step_ms = statistics.median(ms[1:])
    yield dict(
        implementation=model.implementation,
        weights_gb=weights / 1e9,
        floor_ms=floor_ms,
        step_ms=step_ms,
        step_ms_slowest=max(ms[1:]),
        tokens_per_s=1e3 / step_ms,
        of_floor=floor_ms / step_ms,
        first_call_s=first_call_s,
        temporary_gib=plan.temp_size_in_bytes / 2**30,
    )
    yield dict(profile=profile(lambda: run(params, logits, cache)))


def prefill(options, folder, shared):
    """Yields the numbers of reading `options.prompt` tokens, to the last one's logits."""
    model = model_of(options, folder)
    decoding = decoder(model)
    params = decoder_params(model, shared["params"])
    cache = empty_cache(decoding, 1, options.prompt)
    prompt = jax.random.randint(jax.random.key(1), (1, options.prompt), 0, model.config.vocabulary)
    began = time.perf_counter()
    run = jax.jit(functools.partial(feed, decoding)).lower(params, prompt, cache).compile()
    first_call_s = time.perf_counter() - began
    plan = run.memory_analysis()
    ms = []
    for _ in range(CALLS):
        began = time.perf_counter()
        logits, _ = jax.block_until_ready(run(params, prompt, cache))
        ms.append(1e3 * (time.perf_counter() - began))
    check(logits)
    prefill_ms = statistics.median(ms[1:])
    yield dict(
        implementation=model.implementation,
        prompt=options.prompt,
        prefill_ms=prefill_ms,
        prefill_tokens_per_s=1e3 * options.prompt / prefill_ms,
        first_call_s=first_call_s,
        temporary_gib=plan.temp_size_in_bytes / 2**30,
    )
    yield dict(profile=profile(lambda: run(params, prompt, cache)))


def check(logits):
    if not jnp.isfinite(logits).all():
        raise RuntimeError("the logits are not finite")


RUN = dict(
    load=load,
    load_again=load,
    decode=decode,
    prefill=prefill,
    decode_xla=functools.partial(decode, implementation="xla"),
)


def show(row, seconds):
    numbers = {
        name: f"{x:.4g}" if isinstance(x, float) else x
        for name, x in row.items()
        if name not in ("meta", "profile", "traceback")
    }
    print(f"[{seconds:6.1f} s]", ", ".join(f"{name} {x}" for name, x in numbers.items()))
    if row.get("profile"):
        print(f"  device busy {row['profile']['busy_ms']:.2f} ms {row['profile']['share']}")
        for part in ("others", "rest"):
            for name, ms, count in row["profile"][part]:
                print(f"    {ms:8.3f} ms {count:6.0f} {name[:90]}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
