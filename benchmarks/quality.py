"""Trains language models of equal size on one text, each token once, and compares what they learn.

    python -m benchmarks.corpus --out /tmp/corpus
    python -m benchmarks.quality --corpus /tmp/corpus --models kda,hybrid --out F.json

The training step and its optimizer are those of examples/train_lm.py. The text is cut into windows
of --length tokens, each is in one batch, and a seed decides their order and the first parameters.
Held-out text is read in windows of once, twice and four times that length: the same text each time,
and each window begins with an empty context.

Losses are in bits for each byte of text. A run that --out, or a file after --add, has already is
not repeated. To use several GPUs, start a process with CUDA_VISIBLE_DEVICES and its own --out for
each, and one --share for all: a process takes the models that no other has begun, then what is left
of the others'. With --vocabulary the first programs are compiled while benchmarks.corpus still
writes the text. --limit starts no run that would end later, and gives up one that turns out to.
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
from benchmarks.quality_training import Batches, Training, cut

# Of the examples, whose folder side_by_side has added to the path.
from train_lm import cross_entropy, make_optimizer, train_step, with_rate  # isort: skip

RUN = ("model", "lr", "seed")
KEYS = (*RUN, "steps", "length", "batch", "parameters_wanted", "train_sha256")
BINS = 16  # of positions in the longest windows
GROUP = 10  # steps enqueued together and awaited once


def main(argv=None):
    options = parse(argv)
    start = time.monotonic()
    options.ends = math.inf if options.limit is None else start + options.limit
    report = side_by_side.Report(options.out, KEYS, "quality", argv, options.add)
    if options.corpus is None:
        return 0
    shares, first = side_by_side.Shares(options.share), None
    with Programs(options) as programs:
        if options.vocabulary:
            first = next(in_turn(missing(report, options), shares), None)
            programs.begin(first)
        corpus = load(options)
        programs.knows(corpus)
        cases = missing(report, options, corpus)
        print(f"{sum(map(len, cases.values()))} runs of {options.steps} steps", flush=True)
        for model, following in pairs(in_turn(cases, shares, first)):
            programs.begin(model)
            programs.begin(following)
            for row in cases[model]:
                run = [row[key] for key in RUN]
                if shares.taken(run):
                    continue
                if late(row, report, options):
                    print("not started, past --limit:", *run, flush=True)
                elif shares.take(*run):
                    report.measure(row, train(row, programs, corpus, options))
                    show(row, time.monotonic() - start)
    return 1 if report.failed else 0


def missing(report, options, corpus=None):
    """The rows of the runs that the report does not have, by model. Without the corpus, its text
    and the number of steps are taken to be those of the report."""
    keys, known = RUN, {}
    if corpus is not None:
        keys = KEYS
        known = dict(steps=options.steps, train_sha256=corpus.facts["train"]["sha256"])
    known |= dict(length=options.length, batch=options.batch, parameters_wanted=options.parameters)
    there = [row for row in report.rows if side_by_side.is_whole(row)]
    there = {tuple(row[key] for key in keys) for row in there}
    cases = {}
    for model in options.models:
        runs = [(model, lr, seed) for seed in options.seeds for lr in options.lr]
        rows = [dict(zip(RUN, run, strict=True)) | known for run in runs]
        rows = [row for row in rows if tuple(row[key] for key in keys) not in there]
        if rows:
            cases[model] = rows
    return cases


def in_turn(cases, shares, begun=None):
    """Yields the models of which a run may be left: those that no other process has begun, `begun`
    first, then the others, the last to be begun first. They are taken when they are asked for."""
    others = []
    for model in sorted(cases, key=lambda model: model != begun):
        if model == begun or shares.take("model", model):
            yield model
        else:
            others.append(model)
    for model in others[::-1]:
        if not all(map(shares.taken, ([row[key] for key in RUN] for row in cases[model]))):
            yield model


def pairs(models):
    """Each model and the one after it, or None."""
    model = next(models, None)
    while model is not None:
        following = next(models, None)
        yield model, following
        model = following


def late(row, report, options):
    """Whether a run would end after --limit: it takes as long as one of its model, or as the
    longest that is known."""
    took = {}
    for other in report.rows:
        if "evaluation_s" in other and other["steps"] == row["steps"]:
            seconds = other["train_s"] + other["evaluation_s"]
            took[other["model"]] = max(seconds, took.get(other["model"], 0.0))
    expected = took.get(row["model"], max(took.values(), default=0.0))
    return time.monotonic() + expected > options.ends


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
    help = "of the text, if its programs may be compiled before it is there; default: ask the text"
    add("--vocabulary", type=int, help=help)
    side_by_side.add_run(add, "start no run that would end later", "run")
    side_by_side.add_pieces(add)
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
    """The corpus; waits for it with --vocabulary; sets --steps if it was not given.

    Raises:
      SystemExit: the text is too short, has another vocabulary, or is not there.
    """
    done = pathlib.Path(options.corpus) / "corpus.json"  # written last
    while options.vocabulary and not done.exists() and time.monotonic() < options.ends:
        time.sleep(0.1)
    if not done.exists():
        raise SystemExit(f"benchmarks.quality: there is no {done}; benchmarks.corpus writes it")
    corpus = Corpus(options.corpus)
    if options.vocabulary not in (None, len(corpus.lengths)):
        raise SystemExit(
            f"benchmarks.quality: --vocabulary {options.vocabulary} is not that of "
            f"{options.corpus}, which has {len(corpus.lengths)} tokens"
        )
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
    compiled step serves all rates, and any number of steps."""
    scale = optax.GradientTransformation(
        lambda params: jnp.ones(()),
        lambda updates, rate, params=None: (jax.tree.map(lambda x: rate * x, updates), rate),
    )
    return optax.chain(optimizer, scale)


def rates(lr, steps):
    """The learning rates of all steps, float32 [steps]."""
    _, rate = make_optimizer(steps, 1.0, weight_decay=0.1)
    return lr * np.asarray(rate(np.arange(steps)), np.float32)


class Programs:
    """The compiled programs of each model: the training step, and `scores` by the windows' length.
    Those of the next model are compiled while one trains."""

    def __init__(self, options):
        self.options, self.vocabulary = options, options.vocabulary
        self.pool, self.asked = ThreadPoolExecutor(3), {}
        # Mosaic keeps in a global which threads run what it lowers: two at a time would be wrong.
        self.lowering = threading.Lock()
        self.optimizer = adjustable(with_rate(1.0, weight_decay=0.1))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)

    def knows(self, corpus):
        """Says what the text is; before, its vocabulary must have been given."""
        self.vocabulary = len(corpus.lengths)

    def begin(self, name):
        """Has a model and its programs made, if there is one."""
        if name is not None and name not in self.asked:
            self.asked[name] = self._ask(name)

    def get(self, name):
        """The model and its programs, as futures."""
        return self.asked[name]

    def _ask(self, name):
        options = self.options
        implementation = options.implementation
        if implementation is None:
            implementation = "pallas" if jax.default_backend() == "gpu" else "xla"
        sizes = {x: getattr(options, x) for x in ("width", "depth", "heads", "parameters", "dtype")}
        longest = options.length * options.longer[-1]
        # In a thread of its own that others wait for: making a model traces it, too.
        model = self.pool.submit(
            quality_models.make_model,
            name,
            **sizes,
            vocabulary=self.vocabulary,
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
    training = Training(run, state, rates(row["lr"], options.steps))
    bytes_each = corpus.facts["train"]["bytes"] / corpus.facts["train"]["tokens"]
    to_bits = 1 / (math.log(2) * bytes_each)
    curve = []
    at = {options.steps * (i + 1) // options.evaluations for i in range(options.evaluations)}
    at.add(options.steps)
    for first in range(0, options.steps, GROUP):
        last = min(first + GROUP, options.steps)
        training.enqueue([batches[step] for step in range(first, last)])
        evaluating = any(first < step <= last for step in at)
        if evaluating:
            training.finish()
        losses = [to_bits * loss for loss in training.losses]
        if losses and not math.isfinite(losses[-1]):
            yield dict(diverged_after=GROUP * (len(losses) - 1), losses=losses[:-1])
            return
        if time.monotonic() + training.left() > options.ends:
            yield dict(unfinished="past --limit")
            return
        if evaluating:
            nats = score(training.params, found, programs, corpus, options.length, CURVE_SHARE)
            curve.append(dict(step=last, held_out_bits_per_byte=bits(*nats)))
    step_ms = statistics.median(training.ms)
    yield dict(
        train_s=training.seconds,
        step_ms=step_ms,
        step_ms_slowest=max(training.ms[1:] or training.ms),
        tokens_per_s=1e3 * options.batch * options.length / step_ms,
        tokens=options.steps * options.batch * options.length,
        losses_every=GROUP,
        losses=losses,
        curve=curve,
    )
    began = time.perf_counter()
    held_out = evaluate(training.params, found, programs, corpus, options)
    yield held_out | dict(evaluation_s=time.perf_counter() - began)


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
    if "unfinished" in row:
        print(f", unfinished: {row['unfinished']}", end="")
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
