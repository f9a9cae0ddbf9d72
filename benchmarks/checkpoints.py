"""Times a large checkpoint: loading it, sampling from it, reading a prompt, fine-tuning it.

    python -m benchmarks.checkpoints --folder /tmp/gsa-7b --out benchmarks/results/checkpoints.json
    python -m benchmarks.checkpoints --model kimi --folder /tmp/kimi --cases load,decode,tune

It has the shapes of fla's GSA-7B, or of a quarter of Kimi Linear's layers, and random bits for
values, which change no speed. `--folder` gets the files unless it has them, and keeps them:
14.6 GB in bfloat16, and 24.0.
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
from jax.sharding import NamedSharding, PartitionSpec

import jla.hub
from benchmarks.device_profile import profile
from benchmarks.run import IMPLEMENTATIONS
from benchmarks.side_by_side import Report, size  # which finds the examples' modules

# The files are written by no jla.hub.save, which would need all parameters at once.
from jla.hub._configs import family
from jla.hub.mapping import of_model, whole_shapes
from jla.models import Experts, kept
from jla.models.generate import decoder, decoder_params, draw, empty_cache, feed

from devices import make_mesh, shardings_of  # isort: skip
from from_checkpoint import first_state, make_optimizer, shapes_of  # isort: skip

KEYS = ("model", "devices", "case", "layers")
CASES = ("load", "decode", "prefill", "decode_xla", "load_again", "tune")
SIZES = dict(
    gsa=dict(layers=32, width=4096, heads=32, key_heads=8, hidden=14336, vocabulary=32000),
    kimi=dict(layers=7, width=2304, heads=32, key_heads=32, hidden=9216, vocabulary=163840),
)
CALLS = 5  # of sampling, of reading and of training: the first warms up
TRAINED = 2048  # tokens in a step, if prompts are as long
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
        row = dict(model=options.model, devices=options.devices, case=case, layers=options.layers)
        row = report.measure(row, RUN[case](options, folder, shared))
        show(row, time.monotonic() - start)
    return 1 if report.failed else 0


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--folder", required=True, help="where the checkpoint is, or will be")
    add("--model", choices=SIZES, default="gsa")
    add("--devices", type=int, default=1, help="heads and MLPs are split over the first so many")
    for name in SIZES["gsa"]:
        add(f"--{name.replace('_', '-')}", type=int, help="default: the model's")
    add("--prompt", type=int, default=8192, help="tokens that are read")
    add("--tokens", type=int, default=64, help="sampled in one call")
    add("--implementation", choices=IMPLEMENTATIONS, help="default: the fastest")
    add("--cases", default=",".join(CASES), help="by commas (default: %(default)s)")
    add("--limit", type=float, help="start no case after so many seconds")
    add("--out", help="write JSON to this file, after every case; its other rows stay")
    options = parser.parse_args(argv)
    for name, size_ in SIZES[options.model].items():
        if getattr(options, name) is None:
            setattr(options, name, size_)
    options.cases = options.cases.split(",")
    if unknown := [case for case in options.cases if case not in CASES]:
        parser.error(f"--cases: unknown {', '.join(unknown)}; known: {', '.join(CASES)}")
    return options


def make_config(options):
    """As fla writes it, or Kimi Linear's release. What is not here is 48B's by default."""
    shared = dict(
        dtype="bfloat16",
        hidden_size=options.width,
        intermediate_size=options.hidden,
        num_hidden_layers=options.layers,
        vocab_size=options.vocabulary,
        tie_word_embeddings=False,
    )
    if options.model == "gsa":
        return shared | dict(
            architectures=["GSAForCausalLM"],
            model_type="gsa",
            num_heads=options.heads,
            num_kv_heads=options.key_heads,
            num_slots=64,
            norm_eps=1e-5,
        )
    layers = range(1, options.layers + 1)
    linear = dict(
        num_heads=options.heads,
        head_dim=128,
        short_conv_kernel_size=4,
        kda_layers=[i for i in layers if i % 4],
        full_attn_layers=[i for i in layers if i % 4 == 0],
    )
    return shared | dict(
        architectures=["KimiLinearForCausalLM"],
        model_type="kimi_linear",
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_heads,
        linear_attn_config=linear,
        mla_use_nope=True,
        first_k_dense_replace=1,
        num_experts=256,
        num_experts_per_token=8,
        moe_intermediate_size=options.hidden // 9,
        rms_norm_eps=1e-5,
    )


def tensors(config):
    """The names of the tensors in the original's files, and their shapes."""
    return whole_shapes(of_model(jla.hub.model(config), family(config)))


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
    config = jla.hub.read_config(folder)
    return jla.hub.model(config, implementation=implementation).clone(**more)


def mesh_of(options):
    return make_mesh(dict(model=options.devices), jax.devices())


def on_all(options):
    """The sharding of what each device has whole; None for a single device."""
    return None if options.devices == 1 else NamedSharding(mesh_of(options), PartitionSpec())


def load(options, folder, shared):
    """Yields the numbers of loading onto the devices; `shared` gets the parameters.

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
    over = options.devices > 1
    sharding = shardings_of(shapes_of(model), mesh_of(options)) if over else None
    began = time.perf_counter()
    params = jax.block_until_ready(jla.hub.load(folder, model, sharding=sharding))
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

    The floor is the time in which the weights are read once, each device's at `BANDWIDTH`.
    """
    model = model_of(options, folder, implementation=implementation or options.implementation)
    decoding, n = decoder(model), options.tokens
    params = decoder_params(model, shared["params"])
    weights = bytes_of_a_token(model, params)
    floor_ms = 1e3 * weights / BANDWIDTH / options.devices
    logits = jnp.zeros((1, model.config.vocabulary))
    everywhere = on_all(options)
    logits, cache = jax.device_put((logits, empty_cache(decoding, 1, options.prompt)), everywhere)

    def several(params, logits, cache):
        tokens, drawn_from, cache = draw(decoding, params, logits, cache, None, 0.0, n)
        return tokens, drawn_from[:, -1], cache

    began = time.perf_counter()
    run = jax.jit(several, donate_argnums=(1, 2), out_shardings=everywhere)
    run = run.lower(params, logits, cache).compile()
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


def bytes_of_a_token(model, params):
    """Those of the weights that one token reads: one row of the embedding, which is not counted,
    and the experts that it chooses."""
    read = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed"]["embedding"].nbytes
    for i, layer in enumerate(model.config.layers):
        if isinstance(layer.mlp, Experts):
            mlp = params[f"block_{i}"]["mlp"]
            one = sum(mlp[name].nbytes for name in ("gate", "up", "down")) // layer.mlp.num_experts
            read -= (layer.mlp.num_experts - layer.mlp.experts_per_token) * one
    return read


def prefill(options, folder, shared):
    """Yields the numbers of reading `options.prompt` tokens, to the last one's logits."""
    model = model_of(options, folder)
    decoding = decoder(model)
    params = decoder_params(model, shared["params"])
    cache = empty_cache(decoding, 1, options.prompt)
    prompt = jax.random.randint(jax.random.key(1), (1, options.prompt), 0, model.config.vocabulary)
    cache, prompt = jax.device_put((cache, prompt), on_all(options))
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


def tune(options, folder, shared):
    """Yields the numbers of AdamW's steps, as examples/from_checkpoint.py makes them, but with
    parameters and moments in bfloat16. The parameters are gone afterwards."""
    model, mesh = model_of(options, folder, remat=kept), mesh_of(options)
    optimizer = make_optimizer(CALLS, 1e-5, 0.1)
    state, step = first_state(model, shared.pop("params"), optimizer, mesh)
    shape = 1, min(TRAINED, options.prompt) + 1
    batch = jax.random.randint(jax.random.key(2), shape, 0, model.config.vocabulary)
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    began = time.perf_counter()
    run = step.lower(state, batch).compile()
    first_call_s = time.perf_counter() - began
    plan = run.memory_analysis()
    ms = []
    for _ in range(CALLS):
        began = time.perf_counter()
        state, loss, _ = jax.block_until_ready(run(state, batch))
        ms.append(1e3 * (time.perf_counter() - began))
    check(loss)
    yield dict(
        implementation=model.implementation,
        trained=shape[1] - 1,
        loss=float(loss),
        train_ms=statistics.median(ms[1:]),
        first_call_s=first_call_s,
        state_gib=plan.argument_size_in_bytes / 2**30,
        temporary_gib=plan.temp_size_in_bytes / 2**30,
    )


def check(logits):
    if not jnp.isfinite(logits).all():
        raise RuntimeError("the logits, or the loss, are not finite")


RUN = dict(
    load=load,
    load_again=load,
    decode=decode,
    prefill=prefill,
    tune=tune,
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
