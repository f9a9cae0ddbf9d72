"""Recall against the size of the state: examples/recall.py's task, with heads of several sizes.

    python -m benchmarks.recall_sizes --out benchmarks/results/recall_sizes.json
    python -m benchmarks.recall_sizes --models kda --key-dims 64 --limit 200 --out F.json

Each model has --heads heads of each of --key-dims features in every block; its width stays, so that
little else changes. The first of --seeds is trained with all of --lr, the others with the rate that
was the best for it. A row is one training; `accuracy` is that of the last twentieth of the steps,
in the order of `pairs`. `state_bytes` is what decoding keeps of a sequence of --length tokens.

The trainings of a model and a size run side by side in one program, first those of all rates, then
those of all other seeds: the models are small, and alone would leave most of a GPU idle.

What --out, or a file after --add, has already is not repeated. Several processes, each with its own
--out and one --share for all, take one model and size after another. After --limit none is begun.
"""

import argparse
import functools
import itertools
import math
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks import quality_models, side_by_side
from jla.models import Config, LanguageModel, Layer, SwiGLU, empty_cache, kept

# Of the examples, whose folder side_by_side has added to the path.
import recall  # isort: skip
from train_lm import make_optimizer  # isort: skip

KEYS = ("model", "key_dim", "lr", "seed", "steps", "pairs", "length", "width", "depth", "heads")
PARTS = 20  # of the steps; the accuracy is the last one's


def main(argv=None):
    options = parse(argv)
    # In float32 also on a GPU, as the example.
    with jax.default_matmul_precision("highest" if options.dtype == "float32" else None):
        return run(options, argv)


def run(options, argv):
    start = time.monotonic()
    report = side_by_side.Report(options.out, KEYS, "recall_sizes", argv, options.add)
    shares = side_by_side.Shares(options.share)
    for model in options.models:
        for key_dim in options.key_dims:
            program = functools.cache(functools.partial(Program, model, key_dim, options))
            for rows in trainings(model, key_dim, options, report):
                rows = [row for row in rows if report.find(row) is None]
                if not rows:
                    continue
                if options.limit is not None and time.monotonic() - start > options.limit:
                    print(f"past --limit: {model}, heads of {key_dim}", flush=True)
                    return 1 if report.failed else 0
                if shares.has_or_takes(model, key_dim):
                    report.measure_all(rows, train(rows, program, options))
                    for row in rows:
                        show(row, time.monotonic() - start)
    return 1 if report.failed else 0


def trainings(model, key_dim, options, report):
    """Yields rows that are trained side by side: of the first seed all rates, then of the others
    the rate that was the best for the first; none of these if one of the first is not there."""
    same = dict(model=model, key_dim=key_dim) | {name: getattr(options, name) for name in KEYS[4:]}
    first, *others = options.seeds
    rows = [same | dict(lr=lr, seed=first) for lr in options.lr]
    yield rows
    found = [report.find(row) for row in rows]
    if others and None not in found:
        best = max(found, key=lambda row: sum(row["accuracy"]))["lr"]
        yield [same | dict(lr=best, seed=seed) for seed in others]


def parse(argv):
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.recall_sizes", description=__doc__.splitlines()[0]
    )
    add = made.add_argument
    names = ",".join(side_by_side.MIXERS)
    add("--models", default=names, help="by commas, as kda or gsa:scale=4 (default: %(default)s)")
    add("--key-dims", default="32,64,128", help="features of a head (default: %(default)s)")
    add("--lr", default="3e-3,1e-2", help="peak learning rates (default: %(default)s)")
    add("--seeds", default="0,1,2", help="by commas (default: %(default)s)")
    add("--pairs", default="16,32,64,128,256,512", help="in a sequence (default: %(default)s)")
    add("--length", type=int, default=2048, help="tokens in a sequence (default: %(default)s)")
    add("--vocabulary", type=int, default=2048, help="half of them keys (default: %(default)s)")
    add("--width", type=int, default=128)
    add("--depth", type=int, default=2)
    add("--heads", type=int, default=2)
    add("--batch", type=int, default=24, help="sequences in a step (default: %(default)s)")
    add("--steps", type=int, default=3000, help="(default: %(default)s)")
    side_by_side.add_run(add, "start no training after so many seconds", "training")
    side_by_side.add_pieces(add)
    options = made.parse_args(argv)
    options.models = options.models.split(",")
    for name, kind in dict(key_dims=int, lr=float, seeds=int, pairs=int).items():
        setattr(options, name, [kind(x) for x in getattr(options, name).split(",")])
    for model in options.models:
        try:
            mixers, _ = quality_models.parsed(model)
            if len(mixers) > 1:
                raise ValueError(f"{model} has blocks of several kinds")
        except ValueError as error:
            made.error(f"--models: {error}")
    most = max(options.pairs)
    if 4 * most > options.length or 2 * most > options.vocabulary or options.vocabulary % 2:
        made.error(
            f"--length {options.length} must be at least 4 * {most}, the most --pairs, and "
            f"--vocabulary {options.vocabulary} even and at least 2 * {most}"
        )
    if options.batch % len(options.pairs):
        made.error(
            f"--batch {options.batch} must be a multiple of {len(options.pairs)}, of --pairs"
        )
    if options.steps < PARTS:
        made.error(f"--steps {options.steps} must be at least {PARTS}")
    if options.implementation is None:
        options.implementation = "pallas" if jax.default_backend() == "gpu" else "xla"
    return options


class Program:
    """A model, its optimizer, and the training of `steps` steps as a function: of several models at
    once, whose parameters, keys and learning rates have an axis of models in front."""

    def __init__(self, name, key_dim, options):
        mixers, settings = quality_models.parsed(name)
        sizes = dict(num_heads=options.heads, key_dim=key_dim)
        mixer = quality_models.template(mixers[0], settings, sizes, options.length)
        # Inside as wide as the example's.
        layer = Layer(mixer, SwiGLU(hidden=32 * round(options.width * 8 / 3 / 32)))
        config = Config(
            options.vocabulary, options.width, layers=(layer,) * options.depth, norm_epsilon=1e-6
        )
        fields = dict(dtype=options.dtype, implementation=options.implementation)
        self.name = name
        self.model = LanguageModel(config, stacked=True, remat=kept, **fields)
        self.optimizer, _ = make_optimizer(options.steps, 1.0, weight_decay=0.1)
        task = recall.Task(tuple(options.pairs), options.length, options.vocabulary)
        static = dict(model=self.model, optimizer=self.optimizer, task=task, batch=options.batch)
        steps = jax.vmap(
            functools.partial(recall.train_steps, **static), in_axes=(0, 0, 0, None, None)
        )
        self.run = jax.jit(steps, donate_argnums=0)

    def state(self, seeds):
        """The states before the first step, and what each draws its sequences with."""
        states = []
        for seed in seeds:
            params, moments = recall.initialise(self.name, self.model, self.optimizer, seed)
            states.append((quality_models.filled(self.name, params), moments))
        keys = [
            jax.random.fold_in(jax.random.key(seed), 1) for seed in seeds
        ]  # not the parameters'
        return jax.tree.map(lambda *x: jnp.stack(x), *states), jnp.stack(keys)


def train(rows, program, options):
    """Yields the numbers of all rows: of the model, of compiling, of their training."""
    program = program()
    state, keys = program.state([row["seed"] for row in rows])
    lr = jnp.array([row["lr"] for row in rows], jnp.float32)
    cache = jax.eval_shape(lambda: empty_cache(program.model, 1, options.length))
    known = dict(
        implementation=program.model.implementation,
        parameters=side_by_side.size(state[0]) // len(rows),
        state_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
        **dict(vocabulary=options.vocabulary, batch=options.batch, dtype=options.dtype),
        side_by_side=len(rows),
    )
    yield [known] * len(rows)
    began = time.perf_counter()
    state, *_ = jax.block_until_ready(program.run(state, keys, lr, 0, 0))
    ready = time.perf_counter()
    stops = [options.steps * i // PARTS for i in range(PARTS + 1)]
    losses, accuracies = [], []
    for first, last in itertools.pairwise(stops):
        state, loss, accuracy = program.run(state, keys, lr, first, last)
        losses.append(loss.tolist())
        accuracies.append(accuracy.tolist())
        if not any(map(math.isfinite, losses[-1])):
            break
    seconds = time.perf_counter() - ready
    speed = stops[len(losses)] * options.batch * options.length / seconds
    known = dict(compile_s=ready - began, tokens_per_s=len(rows) * speed)
    yield [
        known | outcome(*of, stops)
        for of in zip(*map(transposed, (losses, accuracies)), strict=True)
    ]


def transposed(x):
    return list(map(list, zip(*x, strict=True)))


def outcome(losses, accuracies, stops):
    """What one model learned: its losses and accuracies by the parts that end at `stops`."""
    for first, loss, accuracy in zip(stops, losses, accuracies, strict=False):
        if not math.isfinite(loss):
            return dict(diverged_after=first, accuracy=[0.0] * len(accuracy))
    means = [sum(accuracy) / len(accuracy) for accuracy in accuracies]
    curve = list(map(list, zip(stops[1:], losses, means, strict=True)))
    return dict(accuracy=accuracies[-1], curve=curve)


def show(row, seconds):
    print(f"[{seconds:6.1f} s] {row['model']}, heads of {row['key_dim']}, lr {row['lr']:g}", end="")
    print(f", seed {row['seed']}", end="")
    if "diverged_after" in row:
        print(f", diverged after {row['diverged_after']} steps", end="")
    elif "accuracy" in row:
        print(f", state {row['state_bytes'] / 2**10:,.0f} KiB:", end="")
        shares = zip(row["pairs"], row["accuracy"], strict=True)
        print("", *(f"{n} pairs {x:.3f}" for n, x in shares), end="")
        print(
            f"; {row['tokens_per_s']:,.0f} tokens/s, compiled in {row['compile_s']:.1f} s", end=""
        )
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
