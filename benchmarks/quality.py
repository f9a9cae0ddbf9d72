"""Trains language models of equal size on one text, each token once, and compares what they learn.

    python -m benchmarks.corpus --out /tmp/corpus
    python -m benchmarks.quality --corpus /tmp/corpus --models kda,hybrid --out F.json

The training step and its optimizer are those of examples/train_lm.py. The text is cut into windows
of --length tokens, each is in one batch, and a seed decides their order and the first parameters.
Held-out text is read in windows of once, twice and four times that length: the same text each time,
and each window begins with an empty context.

Losses are in bits for each byte of text. A run that --out, or a file after --add, has already is
not repeated; --limit ends no run, but starts none that would end later. To use several GPUs, start
a process with CUDA_VISIBLE_DEVICES and its own --out for each; the next call's --add collects them.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import quality_models, side_by_side

# Of the examples, whose folder side_by_side has added to the path.
from train_lm import cross_entropy, make_optimizer, train_step  # isort: skip

KEYS = ("model", "lr", "seed", "steps", "length", "batch", "parameters_wanted", "train_sha256")
BINS = 16  # of positions in the longest windows
GROUP = 10  # steps enqueued together and awaited once


def main(argv=None):
    options = parse(argv)
    start = time.monotonic()
    report = side_by_side.Report(options.out, KEYS, "quality", argv, options.add)
    if options.corpus is None:
        return 0
    corpus = load(options)
    cases = [
        (model, dict(seed=seed, lr=lr))
        for model in options.models
        for seed in options.seeds
        for lr in options.lr
    ]
    common = dict(steps=options.steps, length=options.length, batch=options.batch)
    common |= dict(
        parameters_wanted=options.parameters, train_sha256=corpus.facts["train"]["sha256"]
    )
    cases = [(model, dict(model=model) | case | common) for model, case in cases]
    cases = [(model, case) for model, case in cases if report.find(case) is None]
    print(f"{len(cases)} runs of {options.steps} steps", flush=True)
    with Programs(list(dict.fromkeys(model for model, _ in cases)), corpus, options) as programs:
        for model, row in cases:
            left = math.inf if options.limit is None else start + options.limit - time.monotonic()
            if left < 1.2 * programs.expected_s:
                print(f"not started, past --limit: {model}, lr {row['lr']:g}", flush=True)
                continue
            report.measure(row, train(row, programs, corpus, options))
            # Without the compiler, which later runs do not wait for.
            took = row.get("train_s", 0.0) + row.get("evaluation_s", 0.0)
            programs.expected_s = max(programs.expected_s, took)
            show(row, time.monotonic() - start)
    return 1 if report.failed else 0


def parse(argv):
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.splitlines()[0]
    )
    add = made.add_argument
    help = (
        "written by benchmarks.corpus; without it nothing is trained, and --out gets --add's rows"
    )
    add("--corpus", metavar="DIR", help=help)
    names = ",".join(quality_models.MODELS)
    add("--models", default=names, help="by commas, as kda or gsa:scale=4 (default: %(default)s)")
    add("--lr", default="1e-3,3e-3", help="peak learning rates (default: %(default)s)")
    add("--seeds", default="0", help="by commas (default: %(default)s)")
    add("--longer", default="1,2,4", help="of --length, in evaluation (default: %(default)s)")
    add("--steps", type=int, help="default: those that read the text once")
    add("--length", type=int, default=4096, help="tokens in a window (default: %(default)s)")
    add("--batch", type=int, default=8, help="windows in a step (default: %(default)s)")
    add("--width", type=int, default=1024)
    add("--depth", type=int, default=8)
    add("--heads", type=int, default=8)
    add("--parameters", type=float, default=113e6, help="of each model (default: %(default)g)")
    add("--evaluations", type=int, default=10, help="in a run (default: %(default)s)")
    add("--scan", action="store_true", help="blocks in a scan: compiled once, a little slower")
    side_by_side.add_run(add, "start no run that would end later", "run")
    add("--add", nargs="*", default=(), metavar="FILE", help="results to copy into --out first")
    options = made.parse_args(argv)
    options.models = options.models.split(",")
    options.lr = [float(lr) for lr in options.lr.split(",")]
    options.longer = sorted({1, *map(int, options.longer.split(","))})
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    for model in options.models:
        try:
            quality_models.parsed(model)
        except ValueError as error:
            made.error(f"--models: {error}")
    if options.width % options.heads:
        made.error(f"--width {options.width} must be a multiple of --heads {options.heads}")
    if options.corpus is None and not (options.add and options.out):
        made.error("--corpus is missing; without it there must be --add and --out")
    return options


class Corpus:
    """What benchmarks.corpus has written: `train` and `held_out`, uint16 [N], `lengths`, the bytes
    of each token of the vocabulary, and `facts`."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.train, self.held_out = (np.load(folder / f"{x}.npy") for x in ("train", "held_out"))
        self.lengths = np.load(folder / "bytes.npy")
        self.facts = json.loads((folder / "corpus.json").read_text())


def load(options):
    """The corpus; sets --steps if it was not given.

    Raises:
      SystemExit: the text is too short.
    """
    corpus = Corpus(options.corpus)
    most = (len(corpus.train) - 1) // options.length // options.batch
    if options.steps is None:
        options.steps = most
    longest = options.length * options.longer[-1]
    if not GROUP <= options.steps <= most or len(corpus.held_out) <= longest:
        raise SystemExit(
            f"benchmarks.quality: {options.corpus} has text for {most} steps of {options.batch} "
            f"windows, and {len(corpus.held_out)} held-out tokens; --steps must be {GROUP} to "
            f"{most}, and more than {longest} tokens held out"
        )
    print(f"{len(corpus.train):,} tokens of {corpus.facts['train']['bytes']:,} bytes", flush=True)
    return corpus


def adjustable(optimizer):
    """An optimizer made for a learning rate of 1, with the rate as its state's last entry: one
    compiled step serves all rates."""
    scale = optax.GradientTransformation(
        lambda params: jnp.ones(()),
        lambda updates, rate, params=None: (jax.tree.map(lambda x: rate * x, updates), rate),
    )
    return optax.chain(optimizer, scale)


class Programs:
    """The compiled programs of each model: the training step, and `scores` by the windows' length.

    Those of the next model are compiled while one trains. `expected_s` is what the longest run took
    without compiling.
    """

    def __init__(self, models, corpus, options):
        self.names, self.corpus, self.options = models, corpus, options
        self.pool, self.asked = ThreadPoolExecutor(3), {}
        # Mosaic keeps in a global which threads run what it lowers: two at a time would be wrong.
        self.lowering = threading.Lock()
        self.expected_s = 0.0
        optimizer, _ = make_optimizer(options.steps, 1.0, weight_decay=0.1)
        self.optimizer = adjustable(optimizer)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)

    def get(self, name):
        """The model and its programs, as futures; asks for the next model's too."""
        place = self.names.index(name)
        for one in self.names[place : place + 2]:
            if one not in self.asked:
                self.asked[one] = self._ask(one)
        return self.asked[name]

    def _ask(self, name):
        options = self.options
        implementation = options.implementation
        if implementation is None:
            implementation = "pallas" if jax.default_backend() == "gpu" else "xla"
        sizes = {x: getattr(options, x) for x in ("width", "depth", "heads", "parameters", "dtype")}
        longest = options.length * options.longer[-1]
        vocabulary = len(self.corpus.lengths)

        # In a thread of its own that others wait for: making a model traces it, too.
        model = self.pool.submit(
            quality_models.make_model,
            name,
            **sizes,
            vocabulary=vocabulary,
            longest=longest,
            implementation=implementation,
        )
        found = dict(model=model)
        for one in (self._step, self._initial):
            found[one.__name__[1:]] = self.pool.submit(one, name, model)
        for length in (options.length * times for times in options.longer):
            found[length] = self.pool.submit(self._scores, name, model, length)
        return found

    def _step(self, name, model):
        """The training step, its seconds of tracing and compiling, and its memory in GiB."""
        model = model.result()
        if self.options.scan:
            model = model.clone(unroll=False)
        began = time.perf_counter()
        state = jax.eval_shape(functools.partial(self._begin, name, model), 0, 1.0)
        tokens = jax.ShapeDtypeStruct((self.options.batch, self.options.length + 1), jnp.int32)
        with self.lowering:
            lowered = train_step.lower(state, tokens, model=model, optimizer=self.optimizer)
        run = lowered.compile()
        plan = run.memory_analysis()
        held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        memory = (held + plan.temp_size_in_bytes) / 2**30
        return run, time.perf_counter() - began, memory

    def _scores(self, name, model, length):
        """A function of parameters and windows: the nats of each token but the first."""
        # By a scan, if the blocks are stacked: it runs seldom, and compiles sooner.
        model = model.result().clone(unroll=False)
        params = jax.eval_shape(functools.partial(quality_models.make_params, name, model), 0)
        tokens = jax.ShapeDtypeStruct((self.rows(length), length + 1), jnp.int32)
        with self.lowering:
            lowered = jax.jit(functools.partial(cross_entropy, model)).lower(params, tokens)
        return lowered.compile()

    def rows(self, length):
        """The windows that are scored at once: as many tokens as in a step."""
        return max(1, self.options.batch * self.options.length // length)

    def _initial(self, name, model):
        """A function of a seed and a learning rate: the state before the first step."""
        begin = jax.jit(functools.partial(self._begin, name, model.result()))
        with self.lowering:
            lowered = begin.lower(0, 1.0)
        return lowered.compile()

    def _begin(self, name, model, seed, rate):
        params = quality_models.make_params(name, model, seed)
        optimizer, _ = self.optimizer.init(params)
        return dict(params=params, moments=(optimizer, jnp.float32(rate)))


def train(row, programs, corpus, options):
    """Yields the row's numbers: of the model, of compiling, of training, of held-out text."""
    found = programs.get(row["model"])
    model = found["model"].result()
    hidden = model.config.layers[0].mlp.hidden
    yield dict(
        implementation=model.implementation,
        **dict(width=options.width, depth=options.depth, heads=options.heads, hidden=hidden),
        vocabulary=len(corpus.lengths),
        **dict(dtype=options.dtype, scan=options.scan, corpus=corpus.facts),
    )
    run, compile_s, memory_gib = found["step"].result()
    state = found["initial"].result()(row["seed"], row["lr"])
    parameters = side_by_side.size(state["params"])
    yield dict(parameters=parameters, compile_s=compile_s, memory_gib=memory_gib)
    batches = Batches(corpus.train, row["seed"], options.batch, options.length)
    bytes_each = corpus.facts["train"]["bytes"] / corpus.facts["train"]["tokens"]
    to_bits = 1 / (math.log(2) * bytes_each)
    losses, ms, curve, train_s = [], [], [], 0.0
    at = {options.steps * (i + 1) // options.evaluations for i in range(options.evaluations)}
    for first in range(0, options.steps, GROUP):
        last = min(first + GROUP, options.steps)
        tokens = [batches[step] for step in range(first, last)]
        began, group = time.perf_counter(), []
        for x in tokens:
            state, loss, _ = run(state, x)
            group.append(loss)
        group = [float(loss) for loss in group]
        train_s += time.perf_counter() - began
        ms.append(1e3 * (time.perf_counter() - began) / (last - first))
        losses.append(to_bits * statistics.mean(group))
        if not math.isfinite(losses[-1]):
            yield dict(diverged_after=first, losses=losses[:-1])
            return
        if any(first < step <= last for step in at):
            nats = score(state["params"], found, programs, corpus, options.length, CURVE_SHARE)
            curve.append(dict(step=last, held_out_bits_per_byte=bits(*nats)))
    del tokens
    step_ms = statistics.median(ms)
    yield dict(
        train_s=train_s,
        step_ms=step_ms,
        step_ms_slowest=max(ms[1:] or ms),
        tokens_per_s=1e3 * options.batch * options.length / step_ms,
        tokens=options.steps * options.batch * options.length,
        losses_every=GROUP,
        losses=losses,
        curve=curve,
    )
    began = time.perf_counter()
    held_out = evaluate(state["params"], found, programs, corpus, options)
    yield held_out | dict(evaluation_s=time.perf_counter() - began)


class Batches:
    """The batches of one reading, int32 [batch, length + 1]: windows of a text in random order."""

    def __init__(self, text, seed, batch, length):
        self.text, self.batch, self.length = text, batch, length
        self.order = np.random.default_rng(seed).permutation((len(text) - 1) // length)

    def __getitem__(self, step):
        chosen = self.order[step * self.batch : (step + 1) * self.batch]
        return cut(self.text, chosen, self.length)


def cut(text, windows, length):
    """The windows of these numbers, int32 [N, length + 1]; each one's last token is the next's
    first."""
    return text[windows[:, None] * length + np.arange(length + 1)].astype(np.int32)


CURVE_SHARE = 4  # a curve's points are of a part of the held-out text, one window of so many


def score(params, found, programs, corpus, length, share=1):
    """The nats of held-out tokens and the bytes that they stand for, both [N, length]."""
    longest = programs.options.length * programs.options.longer[-1]
    whole = (len(corpus.held_out) - 1) // longest * (longest // length)
    windows, rows = np.arange(0, whole, share), programs.rows(length)
    tokens = cut(corpus.held_out, windows, length)
    padded = np.concatenate([tokens, np.zeros((-len(tokens) % rows, length + 1), np.int32)])
    run = found[length].result()
    nats = [run(params, padded[i : i + rows]) for i in range(0, len(padded), rows)]
    return np.concatenate(jax.device_get(nats))[: len(tokens)], corpus.lengths[tokens[:, 1:]]


def bits(nats, lengths):
    """Bits for each byte."""
    return float(nats.sum(dtype=np.float64) / math.log(2) / lengths.sum())


def evaluate(params, found, programs, corpus, options):
    """The losses of the held-out text: by the windows' length, and by place in the longest."""
    by_length = {}
    for times in options.longer:
        nats, lengths = score(params, found, programs, corpus, options.length * times)
        by_length[str(times)] = bits(nats, lengths)
    places = [
        slice(i, i + nats.shape[1] // BINS) for i in range(0, nats.shape[1], nats.shape[1] // BINS)
    ]
    return dict(
        held_out_bits_per_byte=by_length["1"],
        held_out_by_length=by_length,
        held_out_by_place=[bits(nats[:, place], lengths[:, place]) for place in places],
    )


def show(row, seconds):
    print(f"[{seconds:6.1f} s] {row['model']}, lr {row['lr']:g}, seed {row['seed']}", end="")
    if "memory_gib" in row:
        print(f", {row['parameters'] / 1e6:.1f} M parameters", end="")
        print(f", compiled in {row['compile_s']:.1f} s, {row['memory_gib']:.1f} GiB", end="")
    if "diverged_after" in row:
        print(f", diverged after {row['diverged_after']} steps", end="")
    if "step_ms" in row:
        print(f"\n  step {row['step_ms']:.1f} ms (slowest {row['step_ms_slowest']:.1f})", end="")
        print(f", {row['tokens_per_s']:,.0f} tokens/s; bits/byte in training, by steps:", end="")
        shown = row["losses"][:: max(1, len(row["losses"]) // 12)]
        print("", *(f"{x:.3f}" for x in shown), end="")
    if "held_out_by_length" in row:
        found = row["held_out_by_length"].items()
        print("\n  held out,", ", ".join(f"{n} x length: {x:.4f}" for n, x in found), end="")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
