"""Multi-query associative recall: how many pairs does a mixer remember? (Zoology, arXiv 2312.04927)

    python examples/recall.py                            # on a CPU, six mixers in about 13 minutes
    python examples/recall.py --setting full             # on an H200
    python examples/recall.py --mixers kda,path --out runs/some.json

A sequence begins with pairs of a key and its value. Then each key comes once more, as a query,
between tokens that mean nothing, and the model has to predict the query's value. Each mixer is
trained from one seed on the same sequences, which have all the numbers of pairs in equal parts. No
sequence is drawn twice, so a step's accuracy is one on unseen sequences; reported is the mean of
the last twentieth of the steps, where the learning rate has nearly ended. What learning rate a
mixer needs differs: each is trained with all of --lr, and the best is reported.

Writes --out, a JSON file, and a plot beside it, after every mixer. What the file holds of other
mixers is kept, if it was made with the same settings on the same kind of device.
"""

import argparse
import datetime
import functools
import json
import math
import pathlib
import shlex
import sys
import time
from typing import NamedTuple

import needs  # noqa: F401
import jax
import jax.numpy as jnp
import optax
from command_line import IMPLEMENTATIONS, InputError, Parser, errors_in_one_line, number, writing
from jax import lax
from model import MIXERS, make_model
from plot import plot_recall
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from train_lm import initial_params, make_optimizer

SETTINGS = {
    "small": dict(
        width=64,
        depth=2,
        heads=2,
        length=64,
        pairs=[2, 4, 8, 16],
        vocabulary=64,
        batch=32,
        steps=800,
        lr=[4e-3, 1e-2],
        weight_decay=0.1,
        dtype="float32",
        implementation=None,
    ),
    # The kernels take bfloat16. They are asked for by name: where there are none it is an error.
    "full": dict(
        width=128,
        depth=2,
        heads=2,
        length=512,
        pairs=[4, 8, 16, 32, 64, 128],
        vocabulary=2048,
        batch=96,
        steps=4000,
        lr=[1e-3, 3e-3, 1e-2],
        weight_decay=0.1,
        dtype="bfloat16",
        implementation="pallas",
    ),
}

# The language model's first embeddings are small, and the blocks' sums drown them. Here the last
# block has to see which key asks: made larger, their standard deviation is 0.5.
EMBEDDING_SCALE = 25.0
POWER = 0.01  # of the queries' positions
NO_TARGET = -1  # where nothing is asked


class Task(NamedTuple):
    """The numbers of pairs, the tokens in a sequence and in the vocabulary."""

    pairs: tuple
    length: int
    vocabulary: int


def draw(key, weights, number):
    """Draws indices without replacement, by log-probabilities (Gumbel top-k, arXiv 1903.06059)."""
    return lax.top_k(weights + jax.random.gumbel(key, weights.shape), number)[1]


def make_sequence(key, pairs, task):
    """Draws one sequence with this many pairs, at most `max(task.pairs)`.

    The first half of the vocabulary is keys, the second values. A sequence's keys are distinct, and
    so are its values. It begins with key, value, key, value, ... Behind them every second position
    is a place for a query; the queries' are drawn without replacement, the i-th place (from 1) with
    a probability proportional to `i**(POWER - 1)`. The rest is filler: any token but the sequence's
    keys. (In Zoology it can be these too, and then seems to ask twice.)

    Returns:
      tokens: int32 [T].
      targets: int32 [T], a query's value at the query, NO_TARGET elsewhere.
    """
    most, half = max(task.pairs), task.vocabulary // 2
    for_keys, for_values, for_filler, for_places = jax.random.split(key, 4)
    order = draw(for_keys, jnp.zeros(half), half)
    keys, others = order[:most], order[most:]
    values = half + draw(for_values, jnp.zeros(half), most)
    filler = jnp.concatenate([others, half + jnp.arange(half)])
    tokens = filler[jax.random.randint(for_filler, (task.length,), 0, len(filler))]
    place = jnp.arange(task.length // 2)
    weights = (POWER - 1) * jnp.log1p(place)
    there = place < (task.length - 2 * pairs) // 2
    places = draw(for_places, jnp.where(there, weights, -jnp.inf), most)

    # The shapes are those of the most pairs; what is too many is put beyond the end, and dropped.
    i = jnp.arange(most)
    first = jnp.where(i < pairs, 2 * i, task.length)
    query = jnp.where(i < pairs, 2 * pairs + 2 * places, task.length)
    tokens = tokens.at[first].set(keys, mode="drop").at[first + 1].set(values, mode="drop")
    tokens = tokens.at[query].set(keys, mode="drop")
    targets = jnp.full(task.length, NO_TARGET).at[query].set(values, mode="drop")
    return tokens, targets


def make_batch(key, batch, task):
    """Draws sequences, [batch, T], whose numbers of pairs take turns in the order of task.pairs."""
    pairs = jnp.resize(jnp.asarray(task.pairs), batch)
    make = functools.partial(make_sequence, task=task)
    return jax.vmap(make)(jax.random.split(key, batch), pairs)


def score(model, params, tokens, targets):
    """Returns each sequence's mean cross-entropy and accuracy, [B] each, at its queries."""
    logits = model.apply({"params": params}, tokens)
    asked = targets != NO_TARGET
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(asked, targets, 0))
    right = jnp.argmax(logits, axis=-1) == targets
    return nats.mean(axis=1, where=asked), right.mean(axis=1, where=asked)


# The bounds are traced, so that no number of steps is a new program: a call of none compiles it.
@functools.partial(
    jax.jit, static_argnames=("model", "optimizer", "task", "batch"), donate_argnames="state"
)
def train_steps(state, key, lr, first, last, *, model, optimizer, task, batch):
    """Runs the steps first, ..., last - 1 in one call, and makes their data there too.

    Args:
      state: from `initialise`.
      key: what the sequences are drawn with.
      lr: what the optimizer's updates, made for a peak learning rate of 1, are multiplied with.

    Returns:
      The state, and means over the steps of what the parameters before each step gave on its batch:
      the loss, and the accuracy for each of task.pairs, [len(task.pairs)].
    """

    def step(i, carry):
        params, moments, losses, accuracies = carry
        tokens, targets = make_batch(jax.random.fold_in(key, i), batch, task)

        def loss(params):
            nats, right = score(model, params, tokens, targets)
            return nats.mean(), right.reshape(-1, len(task.pairs)).mean(axis=0)

        (nats, right), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        updates = jax.tree.map(lambda x: lr * x, updates)
        return optax.apply_updates(params, updates), moments, losses + nats, accuracies + right

    sums = jnp.zeros(()), jnp.zeros(len(task.pairs))
    *state, loss, accuracy = lax.fori_loop(first, last, step, (*state, *sums))
    return tuple(state), loss / (last - first), accuracy / (last - first)


def initialise(mixer, model, optimizer, seed):
    """Returns the state before the first step."""
    key = jax.random.key(seed)
    try:
        # Traces alone: what the wanted implementation does not support is said before any work.
        jax.eval_shape(model.init, key, jnp.zeros((1, 2), jnp.int32))
        params = initial_params(key, model=model.clone(implementation="reference"))
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"cannot build the {mixer} model: {error}") from error
    params["embed"]["embedding"] *= EMBEDDING_SCALE
    return params, optimizer.init(params)


def train(mixer, options, console):
    """Trains one mixer with each learning rate; returns the best's rows of the results and curve.

    The best has the highest accuracy, all numbers of pairs alike; one whose loss is not finite is
    none.
    """
    task = Task(tuple(options.pairs), options.length, options.vocabulary)
    names = ("width", "depth", "heads", "dtype", "implementation", "vocabulary")
    model = make_model(
        mixer, longest=options.length, **{name: getattr(options, name) for name in names}
    )
    optimizer, _ = make_optimizer(options.steps, 1.0, options.weight_decay)
    key = jax.random.fold_in(jax.random.key(options.seed), 1)  # not the one of the parameters
    run = functools.partial(
        train_steps, key=key, model=model, optimizer=optimizer, task=task, batch=options.batch
    )

    found = []
    for lr in options.lr:
        state = initialise(mixer, model, optimizer, options.seed)
        try:
            rows, curve = train_with(lr, state, run, mixer, options, console)
        except FloatingPointError as error:
            console.print(f"{mixer}: {error}")
            continue
        found.append((sum(row["accuracy"] for row in rows), rows, curve))
    if not found:
        raise InputError(f"{mixer}: no loss stayed finite; try a lower --lr")
    _, rows, curve = max(found, key=lambda result: result[0])
    # One program serves all learning rates, and the first waited for it.
    return [row | dict(compile_seconds=found[0][1][0]["compile_seconds"]) for row in rows], curve


def train_with(lr, state, run, mixer, options, console):
    """Trains from this state with one learning rate; returns the rows of the results and the curve.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
    # The last part, which gives the result, is of its own; the others are there to be reported.
    end = options.steps - max(1, options.steps // 20)
    stops = [*range(0, end, max(1, options.steps // 40)), end, options.steps]
    curve = []
    columns = (
        TextColumn(f"{mixer:<10} lr {lr:g} step {{task.completed}}/{{task.total}}"),
        BarColumn(),
        TextColumn("{task.fields[report]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=options.steps, report="compiling ...")
        began = time.perf_counter()
        state, *_ = jax.block_until_ready(run(state, lr=lr, first=0, last=0))
        ready = time.perf_counter()
        for first, last in zip([0, *stops], stops, strict=False):
            if first == last:
                continue
            state, loss, accuracy = run(state, lr=lr, first=first, last=last)
            loss, accuracy = float(loss), accuracy.tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"with --lr {lr:g} the loss of steps {first} to {last} is {loss}"
                )
            speed = last * options.batch * options.length / (time.perf_counter() - ready)
            curve.append(dict(step=last, loss=loss, accuracy=accuracy))
            report = f"loss {loss:.3f}, accuracy {sum(accuracy) / len(accuracy):.3f}"
            progress.update(bar, completed=last, report=f"{report}, {speed:,.0f} tokens/s")

    rows = [
        dict(
            mixer=mixer,
            pairs=pairs,
            accuracy=share,
            queries=(last - first) * options.batch // len(options.pairs) * pairs,
            steps=options.steps,
            lr=lr,
            tokens_per_second=round(speed),
            compile_seconds=round(ready - began, 1),
            parameters=size,
            implementation=None if mixer == "attention" else options.implementation,
        )
        for pairs, share in zip(options.pairs, accuracy, strict=True)
    ]
    return rows, curve


def by_commas(convert):
    """Returns an argparse type: several, by commas, each once and converted by this type."""

    def convert_all(string):
        return list(dict.fromkeys(convert(part) for part in string.split(",")))

    return convert_all


def as_argument(value):
    """Returns a setting as one would give it to its option."""
    if value is None:
        return "the fastest"
    return ",".join(map(str, value)) if isinstance(value, list) else value


def mixer_name(string):
    if string not in MIXERS:
        raise argparse.ArgumentTypeError(f"unknown {string!r}; known: {', '.join(MIXERS)}")
    return string


def parse(arguments):
    parser = Parser(
        prog="recall.py", description="How many key-value pairs does each mixer remember?"
    )
    whole, above = number(int, 1), number(float, 0, exclusive=True)

    def add(option, help="", **settings):
        name = option[2:].replace("-", "_")
        defaults = [
            f"{setting}: {as_argument(values[name])}"
            for setting, values in SETTINGS.items()
            if name in values
        ]
        help = " ".join([help] * bool(help) + [f"({'; '.join(defaults)})"] * bool(defaults))
        parser.add_argument(option, help=help, **settings)

    add("--setting", choices=SETTINGS, default="small", help="what the others are if not given")
    add("--mixers", type=by_commas(mixer_name), default=",".join(MIXERS), metavar="NAME,NAME")
    add("--seed", type=number(int, 0), default=0)
    add("--out", metavar="FILE", help="default: runs/recall_SETTING.json")
    add("--pairs", type=by_commas(whole), metavar="N,N", help="numbers of pairs in a sequence")
    add("--length", type=whole, help="tokens in a sequence")
    add("--vocabulary", type=whole, help="tokens there are, half of them keys")
    add("--width", type=whole)
    add("--depth", type=whole)
    add("--heads", type=whole)
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    add("--implementation", choices=IMPLEMENTATIONS, help="of jla's mixers")
    add("--batch", type=whole, help="sequences in a step")
    add("--steps", type=whole)
    add(
        "--lr",
        type=by_commas(above),
        metavar="LR,LR",
        help="peak learning rates, to take the best of",
    )
    add("--weight-decay", type=number(float, 0))
    options = parser.parse_args(arguments)
    for name, value in SETTINGS[options.setting].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.pairs = sorted(options.pairs)
    options.out = pathlib.Path(options.out or f"runs/recall_{options.setting}.json")

    most, counts = options.pairs[-1], len(options.pairs)
    if options.width % options.heads:
        parser.error(f"--width {options.width} must be a multiple of --heads {options.heads}")
    if 4 * most > options.length:
        parser.error(f"--length {options.length} must be at least 4 * {most}, the most --pairs")
    if options.vocabulary % 2 or options.vocabulary < 2 * most:
        parser.error(
            f"--vocabulary {options.vocabulary} must be even, and at least 2 * {most}, the most "
            "--pairs"
        )
    if options.batch % counts:
        parser.error(
            f"--batch {options.batch} must be a multiple of {counts}, the numbers in --pairs"
        )
    if options.out.suffix != ".json":
        parser.error(f"--out {options.out} must end in .json; the plot beside it ends in .png")
    return options


# What changes the numbers, and so must be the same for all mixers in a file.
NUMBERS = (
    *("seed", "pairs", "length", "vocabulary", "width", "depth", "heads", "dtype"),
    *("batch", "steps", "lr", "weight_decay"),
)


def load(options, meta):
    """Returns the report to add to: what --out holds of other mixers, or a new one."""
    settings = {name: getattr(options, name) for name in NUMBERS}
    new = dict(meta=meta, settings=settings, results=[], curves={})
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(options.out.read_text())
        kept = [row for row in old["results"] if row["mixer"] not in options.mixers]
        curves = {row["mixer"]: old["curves"][row["mixer"]] for row in kept}
        made_with = old["settings"] | {name: old["meta"][name] for name in ("card", "jax")}
        command = old["meta"]["command"]
    except FileNotFoundError:
        return new
    except OSError as error:
        raise InputError(f"cannot use --out {options.out}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{options.out} holds no results of this program") from None
    if not kept:
        return new
    wanted = settings | {name: meta[name] for name in ("card", "jax")}
    differences = [
        f"{name} ({made_with.get(name)}, now {value})"
        for name, value in wanted.items()
        if made_with.get(name) != value
    ]
    if differences:
        raise InputError(
            f"{options.out} was made with other settings: {', '.join(differences)}; name another "
            "--out, or delete the file"
        )
    return new | dict(
        meta=meta | dict(command=f"{command} && {meta['command']}"), results=kept, curves=curves
    )


def write(report, path):
    meta, settings = report["meta"], report["settings"]
    about = (
        f"{meta['card']}, JAX {meta['jax']}, {meta['date'][:10]}: width {settings['width']}, depth "
        f"{settings['depth']}, {settings['length']} tokens, {settings['steps']} steps of "
        f"{settings['batch']} sequences"
    )
    # Beside, then in its place: on a full disk the earlier results stay as they are.
    beside = path.with_name(f"{path.name}.new")
    with writing(path):
        try:
            beside.write_text(json.dumps(report, indent=1) + "\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        plot_recall(report["results"], about, path.with_suffix(".png"))


def table(report):
    """The accuracies as a table, a line for each mixer."""
    counts = report["settings"]["pairs"]
    lines = Table("mixer", *(f"{count} pairs" for count in counts), "tokens/s", "compiling")
    rows = report["results"]
    for i in range(0, len(rows), len(counts)):
        row, shares = rows[i], [f"{row['accuracy']:.3f}" for row in rows[i : i + len(counts)]]
        speed = f"{row['tokens_per_second']:,}"
        lines.add_row(row["mixer"], *shares, speed, f"{row['compile_seconds']} s")
    return lines


def run(options, arguments):
    console = Console(highlight=False, markup=False)
    meta = dict(
        card=jax.devices()[0].device_kind,
        jax=jax.__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "examples/recall.py", *arguments]),
    )
    report = load(options, meta)
    for i, mixer in enumerate(options.mixers):
        try:
            rows, report["curves"][mixer] = train(mixer, options, console)
        except KeyboardInterrupt:
            rest = ",".join(options.mixers[i:])
            how = f"the same command with --mixers {rest} adds the rest"
            raise KeyboardInterrupt(how) from None
        report["results"] += rows
        write(report, options.out)
    console.print(table(report))
    console.print(f"results  {options.out}\nplot     {options.out.with_suffix('.png')}")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    # In float32 also on a GPU, whose default products are coarser; bfloat16 is there for speed.
    precision = "highest" if options.dtype == "float32" else None
    with errors_in_one_line("recall.py"), jax.default_matmul_precision(precision):
        run(options, arguments)


if __name__ == "__main__":
    main()
