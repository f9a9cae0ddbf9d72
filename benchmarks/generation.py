"""Times reading a long prompt and then sampling, with every mixer side by side.

The functions are those of jla.models.generate; all sampled tokens of a call are one jitted scan.
The prompt is read once, as a batch of one; for larger batches its cache is repeated.
"""

import dataclasses
import functools
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks import side_by_side
from benchmarks.device_profile import profile
from jla.linen import PaTHAttention
from jla.models.generate import READING, decoder, decoder_params, draw, empty_cache, feed

KEYS = ("mixer", "batch")
CALLS = 5  # of sampling: the first warms up, the last is profiled


def main(argv=None):
    options = parse(argv)
    # Caches of many sequences fill most of the GPU; read when the backend starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    start = time.monotonic()
    report = side_by_side.Report(options.out, KEYS, "generation", argv)
    for mixer in options.mixers:
        if options.limit is not None and time.monotonic() - start > options.limit:
            print(f"not started, past --limit: {mixer}", flush=True)
            continue
        prepared, name = {}, mixer
        if options.lazy_keys and mixer in ("path", "hybrid"):
            name = f"{mixer} lazy {options.lazy_keys}"
        row = report.measure(dict(mixer=name, batch=0), read(mixer, options, prepared))
        show(row, time.monotonic() - start)
        for batch in options.batches if prepared else ():
            row = dict(mixer=name, batch=batch)
            report.measure(row, sample(batch, options, **prepared))
            show(row, time.monotonic() - start)
    return 1 if report.failed else 0


def parse(argv):
    made = side_by_side.parser("generation", __doc__.splitlines()[0])
    made.add_argument("--prompt", type=int, default=16384, help="tokens that are read")
    made.add_argument("--tokens", type=int, default=64, help="sampled in one call")
    made.add_argument("--batches", default="1,64", help="of sampling (default: %(default)s)")
    made.add_argument(
        "--lazy-keys",
        choices=("float32", "bfloat16"),
        help="PaTH's cache is lazy, with keys of this dtype (`PaTHAttention.lazy_keys`)",
    )
    options = side_by_side.parse(made, argv, more=["hybrid"])
    options.batches = [int(batch) for batch in options.batches.split(",")]
    return options


def read(mixer, options, prepared):
    """Yields the prompt's numbers (the rows of batch 0); `prepared` gets what `sample` takes.

    The parameters are random, as training leaves the speed as it is (but for MesaNet's solver,
    which takes as many iterations as its states need).
    """
    capacity = options.prompt + CALLS * options.tokens
    model = with_lazy_keys(
        side_by_side.make_model(mixer, options, longest=capacity + 1), options.lazy_keys
    )
    params = jax.jit(functools.partial(decoder_params, model))(side_by_side.make_params(model))
    just_the_prompt = jax.eval_shape(lambda: empty_cache(model, 1, options.prompt))
    yield dict(
        implementation=None if mixer == "attention" else model.implementation,
        **dict(parameters=side_by_side.size(params), width=options.width, depth=options.depth),
        **dict(heads=options.heads, prompt=options.prompt),
        state_bytes=sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(just_the_prompt)
        ),
    )
    prompt = jax.random.randint(jax.random.key(1), (1, options.prompt), 0, 256)

    # The cache is made inside, as `generate` does: XLA then knows that it is empty. Of an argument
    # PaTH's layers ask whether it is, and the host waits for the answer.
    def read_prompt(params, prompt):
        return feed(decoder(model), params, prompt, empty_cache(model, 1, capacity))

    began = time.perf_counter()
    run = jax.jit(read_prompt, compiler_options=READING).lower(params, prompt).compile()
    first_call_s = time.perf_counter() - began
    ms = []
    for _ in range(CALLS):
        began = time.perf_counter()
        logits, filled = jax.block_until_ready(run(params, prompt))
        ms.append(1e3 * (time.perf_counter() - began))
    check(logits)
    prepared |= dict(model=model, params=params, logits=logits, cache=filled)
    prefill_ms = statistics.median(ms[1:])
    speed = 1e3 * options.prompt / prefill_ms
    yield dict(prefill_ms=prefill_ms, prefill_tokens_per_s=speed, first_call_s=first_call_s)
    yield dict(profile=profile(lambda: run(params, prompt)))


def with_lazy_keys(model, dtype):
    """The model with keys of this dtype in PaTH's lazy caches; None leaves it as it is."""
    if dtype is None:
        return model

    def lazy(layer):
        if not isinstance(layer.mixer, PaTHAttention):
            return layer
        mixer = layer.mixer.clone(lazy_keys=jnp.dtype(dtype))
        return dataclasses.replace(layer, mixer=mixer)

    layers = tuple(map(lazy, model.config.layers))
    return model.clone(config=dataclasses.replace(model.config, layers=layers))


def sample(batch, options, model, params, logits, cache):
    """Yields the numbers of sampling `options.tokens` tokens at a time for `batch` sequences."""
    n = options.tokens

    @jax.jit
    def repeated(tree):
        return jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0) if x.ndim else x, tree)

    logits, cache = repeated((logits, cache))

    def several(params, logits, cache, key):
        tokens, drawn_from, cache = draw(decoder(model), params, logits, cache, key, 1.0, n)
        # The next call begins with the logits before the last token, not behind it: that changes
        # what is said, but not how long it takes.
        return tokens, drawn_from[:, -1], cache

    keys = jax.random.split(jax.random.key(2), CALLS)
    began = time.perf_counter()
    lowered = jax.jit(several, donate_argnums=(1, 2)).lower(params, logits, cache, keys[0])
    run = lowered.compile()
    first_call_s = time.perf_counter() - began
    plan = run.memory_analysis()
    ms = []
    for key in keys[:-1]:
        began = time.perf_counter()
        _, logits, cache = jax.block_until_ready(run(params, logits, cache, key))
        ms.append(1e3 * (time.perf_counter() - began) / n)
    check(logits)
    step_ms = statistics.median(ms[1:])
    yield dict(
        tokens_per_call=n,
        step_ms=step_ms,
        step_ms_slowest=max(ms[1:]),
        tokens_per_s=1e3 * batch / step_ms,
        first_call_s=first_call_s,
        temporary_gib=plan.temp_size_in_bytes / 2**30,
    )
    yield dict(profile=profile(lambda: run(params, logits, cache, keys[-1])))


def check(logits):
    if not jnp.isfinite(logits).all():
        raise RuntimeError("the logits are not finite")


def show(row, seconds):
    print(f"[{seconds:6.1f} s] {row['mixer']}", end="")
    if "state_bytes" in row:
        print(f", state {row['state_bytes'] / 2**20:.2f} MiB a sequence", end="")
    if "prefill_ms" in row:
        print(f", prompt of {row['prompt']} in {row['prefill_ms']:.1f} ms", end="")
        print(f" ({row['prefill_tokens_per_s']:,.0f} tokens/s)", end="")
    if "step_ms" in row:
        print(f", batch {row['batch']}: {row['step_ms']:.3f} ms a token", end="")
        print(
            f" (slowest {row['step_ms_slowest']:.3f}), {row['tokens_per_s']:,.0f} tokens/s", end=""
        )
        print(f", {row['temporary_gib']:.1f} GiB of temporaries", end="")
    if "first_call_s" in row:
        print(f", compiled in {row['first_call_s']:.1f} s", end="")
    if row.get("profile"):
        print(f"\n  device busy {row['profile']['busy_ms']:.2f} ms", end="")
        for part in ("others", "rest"):
            for name, ms, count in row["profile"][part][:6]:
                print(f"\n    {ms:8.3f} ms {count:6.0f} {name[:90]}", end="")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
