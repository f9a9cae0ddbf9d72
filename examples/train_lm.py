"""Trains a byte-level language model on text, then samples from it.

    python examples/train_lm.py                          # Python's own documentation, about 2 min
    python examples/train_lm.py --text book.txt --steps 5000 --width 512 --depth 8 --dtype bfloat16

Writes under --out: metrics.jsonl, loss.png and checkpoints. The same command with --resume goes on
from the last checkpoint to the numbers that an uninterrupted run would have had. Ctrl-C saves a
checkpoint before it ends the program. With --resume and more --steps a finished run is continued:

    python examples/train_lm.py --resume --steps 480

--mesh data=2,seq=2,model=1 uses several devices, and --coordinator several processes (docs/scale.md
says how to start them); a run can be resumed on other ones.

What is not given then is as the checkpoint has it, but for --text. Another --lr, --weight-decay,
--batch or --steps is used from there on, with the learning rate that a run of so many steps has at
each of them.
"""

import argparse
import contextlib
import functools
import json
import math
import pathlib
import sys
import time

import needs  # noqa: F401
import checkpoint
import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
from command_line import (
    IMPLEMENTATIONS,
    InputError,
    Parser,
    errors_in_one_line,
    locked,
    number,
    stop_requests,
    writing,
)
from generate import decode, sample
from model import MIXERS, make_model
from plot import plot_losses
from records import MODEL_SETTINGS, SETTINGS, Metrics, check_settings, describe
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from text import batch_at, load_text, ngram_baselines, split_text, windows

# How far logits decoded token by token may be from the parallel forward's, relative to the largest.
DECODE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@functools.cache  # jit tells functions by identity: equal settings share one compiled step
def make_optimizer(steps, peak_rate, weight_decay):
    """`with_rate` and the learning rate of each step: warm-up (a tenth of the steps, at most 1000),
    then cosine decay."""
    warmup = min(1000, max(1, steps // 10))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, peak_rate, warmup, max(steps, warmup + 1), end_value=0.05 * peak_rate
    )
    return with_rate(rate, weight_decay), rate


def with_rate(rate, weight_decay):
    """AdamW with clipping to 1."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=decays),
    )


def decays(params):
    """Marks the parameters that weight decay applies to: matrices, embeddings, convolutions.

    Not norms' scales, biases, nor A_log, dt_bias, lambda_params, D and L, whose zero means nothing.
    """
    undecayed = ("scale", "bias", "A_log", "dt_bias", "lambda_params", "D", "L")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in undecayed, params)


def cross_entropy(model, params, tokens):
    """Returns the nats of every byte but the first, [B, T], of windows int32 [B, T + 1]."""
    logits = model.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def nats(model, params, inputs, targets):
    """Returns those of targets int32 [B, T], each the byte behind its input."""
    logits = model.apply({"params": params}, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def advance(state, loss_of, optimizer):
    """One step down a loss of the parameters; returns as `train_step`."""
    params, moments = state["params"], state["moments"]
    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, moments = optimizer.update(gradient, moments, params)
    state = {"params": optax.apply_updates(params, updates), "moments": moments}
    return state, loss, optax.tree.norm(gradient)


# The old state is donated: parameters and moments are updated in place.
@functools.partial(jax.jit, static_argnames=("model", "optimizer"), donate_argnames="state")
def train_step(state, tokens, *, model, optimizer):
    """One step on a batch of windows; returns the new state, the loss and the gradient's norm."""
    return advance(state, lambda p: cross_entropy(model, p, tokens).mean(), optimizer)


@functools.partial(jax.jit, static_argnames="model")
def forward(params, tokens, *, model):
    """Returns the logits [B, T, 256] of windows int32 [B, T], all positions at once."""
    return model.apply({"params": params}, tokens)


def evaluate(model, params, text, *, batch, length, spread=None):
    """Returns the bits per byte of a text cut into windows; each begins with an empty context."""
    tokens = windows(text, length)
    padding = np.zeros((-len(tokens) % batch, length + 1), np.int32)
    scores = []
    for group in np.concatenate([tokens, padding]).reshape(-1, batch, length + 1):
        if spread is not None:
            scores.append(spread.scores(params, group))
            continue
        logits = forward(params, group[:, :-1], model=model)
        scores.append(optax.softmax_cross_entropy_with_integer_labels(logits, group[:, 1:]))
    return float(np.concatenate(scores)[: len(tokens)].mean() / math.log(2))


def check_decoding(model, params, prompt, tokens, logits, *, length):
    """Compares the logits that `sample` drew from with the parallel forward's.

    Args:
      prompt, tokens, logits: what `sample` took and returned.
      length: positions to run the forward over; what lies beyond is not compared.

    Returns:
      The largest difference, relative to the largest logit.

    Raises:
      RuntimeError: it is above DECODE_TOLERANCE.
    """
    whole = np.concatenate([prompt, tokens], axis=1)[:, :length]
    whole = np.pad(whole, ((0, 0), (0, length - whole.shape[1])))
    parallel = forward(params, whole, model=model)[:, prompt.shape[1] - 1 :]
    compared = min(parallel.shape[1], logits.shape[1])
    parallel, logits = parallel[:, :compared], logits[:, :compared]
    distance = float(jnp.abs(logits - parallel).max() / jnp.abs(parallel).max())
    dtype = jnp.dtype(model.dtype).name
    tolerance = DECODE_TOLERANCE[dtype]
    if not distance <= tolerance:
        raise RuntimeError(
            f"decoding and the parallel forward disagree: their logits differ by {distance:.1e} of "
            f"the largest logit, the tolerance for {dtype} is {tolerance:.0e}"
        )
    return distance


def parse(arguments):
    parser = Parser(
        prog="train_lm.py", description="Train a byte-level language model, then sample from it."
    )
    whole = number(int, 1)
    add = parser.add_argument
    add("--text", nargs="+", metavar="FILE", help="default: the documentation of Python itself")
    add("--mixer", choices=sorted(MIXERS), default="kda")
    add("--implementation", choices=IMPLEMENTATIONS, help="default: the fastest")
    add("--width", type=whole, default=128)
    add("--depth", type=whole, default=3)
    add("--heads", type=whole, default=2)
    add("--dtype", choices=sorted(DECODE_TOLERANCE), default="float32", help="of the computation")
    add("--steps", type=whole, default=240, help="of the whole run")
    add("--batch", type=whole, default=4, help="windows in a step")
    add("--length", type=whole, default=256, help="bytes in a window")
    add("--lr", type=number(float, 0, exclusive=True), default=4e-3, help="peak learning rate")
    add("--weight-decay", type=number(float, 0), default=0.1)
    add("--seed", type=number(int, 0), default=0)
    add("--out", default="runs/lm", metavar="DIR")
    add("--save-every", type=whole, default=100, metavar="STEPS")
    add("--evaluate-every", type=whole, default=100, metavar="STEPS")
    add("--sample-length", type=whole, default=400, metavar="BYTES")
    add("--mesh", type=devices.mesh_sizes(), help="several devices, as data=2,seq=2,model=1")
    processes.add_options(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        type=whole,
        const=LAST,
        metavar="STEP",
        help="go on from the last checkpoint, or from that of a step: later ones are deleted; what "
        "is not given is as it was, but for the text",
    )
    start.add_argument("--overwrite", action="store_true", help="delete an earlier run in --out")
    options = parser.parse_args(arguments)
    # What is in the namespace before, argparse leaves as it is, unless the arguments have it.
    names = dict.fromkeys(vars(options))
    given = vars(parser.parse_args(arguments, argparse.Namespace(**names)))
    options.given = {name for name in names if given[name] is not None}
    if conflict := find_conflict(options):
        parser.error(conflict)
    return options


def find_conflict(options):
    """Says which options do not go together; None if all do."""
    if options.width % options.heads:
        return f"--width {options.width} must be a multiple of --heads {options.heads}"
    if options.implementation and options.mixer == "attention":
        return "--implementation chooses among jla's; --mixer attention is not one of them"
    return processes.find_conflict(options)


LAST = 0  # --resume without a step


def adopt(options, saved):
    """Sets the options that were not given to those that a checkpoint was made with."""
    for name, value in (saved["model"] | saved["training"]).items():
        if name in SETTINGS + MODEL_SETTINGS and name not in options.given:
            setattr(options, name, value)
    if conflict := find_conflict(options):
        raise InputError(conflict)


@functools.partial(jax.jit, static_argnames="model")
def initial_params(key, *, model):
    return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def initialise(model, optimizer, seed):
    """Returns the state before the first step."""
    try:
        params = initial_params(jax.random.key(seed), model=model)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"cannot build this model: {error}") from error
    return {"params": params, "moments": optimizer.init(params)}


class Stopped(Exception):
    """The user has stopped the run: the step that is saved, and the signal's number."""


def steps_shown(console):
    """The progress of training; its task has a `report`."""
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[report]}"),
        TimeRemainingColumn(),
        console=console,
    )


def train(
    model, optimizer, rate, state, first_step, options, data, metrics, save, console, spread=None
):
    """Runs the steps after `first_step`, on the mesh of `spread` if there is one; returns the final
    state.

    Raises:
      Stopped: SIGINT or SIGTERM came. The step that was running is finished and saved.
    """
    text, held_out = data
    windowed = dict(batch=options.batch, length=options.length)
    pending, began = [], time.perf_counter()
    with stop_requests() as signals, steps_shown(console) as progress:
        task = progress.add_task(
            "", total=options.steps, completed=first_step, report="compiling ..."
        )
        for step in range(first_step + 1, options.steps + 1):
            tokens = batch_at(text, step, seed=options.seed, **windowed)
            if spread is None:
                state, loss, norm = train_step(state, tokens, model=model, optimizer=optimizer)
            else:
                state, loss, norm = spread.train_step(state, tokens)
            pending.append((step, loss, norm))
            evaluating = step % options.evaluate_every == 0 or step == options.steps
            saving = step % options.save_every == 0 or step == options.steps
            # Reading a loss waits for the device, so it is done for several steps at once.
            reading = step == first_step + 1 or step % 10 == 0 or evaluating or saving
            # A signal that comes later is for the next step.
            stopping = processes.stop_signal(signals, asking=reading)
            if stopping:
                reading = saving = True
            if reading:
                losses = jax.device_get(pending)
                elapsed = time.perf_counter() - began
                speed = len(pending) * options.batch * options.length / elapsed
                for past, loss, norm in losses:
                    if not math.isfinite(loss):
                        processes.fail(f"the loss of step {past} is {loss}; try a lower --lr")
                    metrics.write(
                        step=past,
                        loss=float(loss),
                        gradient_norm=float(norm),
                        learning_rate=float(rate(past - 1)),
                        # The first step's time is the compiler's.
                        tokens_per_second=None if past == first_step + 1 else round(speed),
                    )
                pending = []
                report = f"{losses[-1][1] / math.log(2):.3f} bits/byte, {speed:,.0f} tokens/s"
                progress.update(task, completed=step, report=report)
            if evaluating:
                bits = evaluate(model, state["params"], held_out, spread=spread, **windowed)
                metrics.write(step=step, held_out_bits_per_byte=bits)
                console.print(f"step {step}: held-out text {bits:.3f} bits/byte; training {report}")
            # Last, so that the metrics of a step that is saved are complete.
            if saving:
                save(step, state)
            if stopping:
                raise Stopped(step, stopping)
            if not pending:
                began = time.perf_counter()
    return state


def run(options):
    out = pathlib.Path(options.out)
    with contextlib.ExitStack() as stack:
        with processes.agreed():
            if processes.is_first():
                if options.resume is None:
                    with writing(out):
                        out.mkdir(parents=True, exist_ok=True)
                elif not out.is_dir():
                    raise InputError(f"--resume: there is no folder {out}")
                stack.enter_context(locked(out))
        with processes.agreed():
            if not out.is_dir():
                raise InputError(f"there is no folder {out}; all processes need the same files")
            first_step, saved = open_run(options, out)
        # In float32 also on a GPU, whose default products are coarser; bfloat16 is there for speed.
        precision = "highest" if options.dtype == "float32" else None
        with jax.default_matmul_precision(precision):
            run_from(first_step, saved, options, out)


def run_from(first_step, saved, options, out):
    """Trains and reports, in a folder that is this process's alone. Nothing in it is deleted before
    all that can be wrong with the options has been looked at."""
    quiet = not processes.is_first()
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)
    with processes.agreed():
        mesh = devices.chosen_mesh(options)
        try:
            text = load_text(options.text)
            data = split_text(text, options.length)
        except ValueError as error:
            raise InputError(error) from None
        settings = describe(options, text)
        changed = check_settings(saved, settings, first_step) if first_step else []
    processes.check_same(json.dumps(settings | dict(mesh=options.mesh)))

    # On a GPU, copies to and from a loop's stacks would take a tenth of the time.
    unroll = jax.default_backend() == "gpu"
    model = make_model(**settings["model"], implementation=options.implementation, unroll=unroll)
    optimizer, rate = make_optimizer(options.steps, options.lr, options.weight_decay)
    spread = None
    if mesh is None:
        state = initialise(model, optimizer, options.seed)
    else:
        spread, state = spread_over(mesh, model, optimizer, options, settings["model"])
    size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    on = "" if mesh is None else f", mesh {devices.shown(mesh.shape)}"
    console.print(
        f"{options.mixer} model, {size:,} parameters, on {jax.devices()[0].device_kind}{on}; "
        f"{len(data[0]):,} bytes to train on, {len(data[1]):,} held out"
    )
    if first_step:
        reader = checkpoint.open_manager(out, read_only=True)
        state = checkpoint.load_state(reader, first_step, state)
        console.print(f"resumed from step {first_step}")
        if changed:
            console.print(f"from here on with other settings: {', '.join(changed)}")

    with processes.agreed():
        metrics = Metrics(out / "metrics.jsonl", first_step)
        if processes.is_first():
            checkpoint.delete_after(out, first_step)
    manager = checkpoint.open_manager(out)

    def save(step, state):
        checkpoint.save(manager, step, state, settings)

    parts = options, data, metrics
    state = train(model, optimizer, rate, state, first_step, *parts, save, console, spread)
    report(model, state["params"], *parts, console, spread)


def spread_over(mesh, model, optimizer, options, settings):
    """The step and the scores on a mesh, and the state before the first step, spread over it."""
    shapes = jax.eval_shape(lambda: initialise(model, optimizer, options.seed))
    time = "seq" if mesh.shape["seq"] > 1 else None
    implementation, unroll = model.implementation, model.unroll
    local = make_model(**settings, implementation=implementation, unroll=unroll, axis_name=time)
    # Before anything is deleted: what parameters and the mechanism do not allow on such a mesh.
    windows = np.zeros((options.batch, options.length + 1), np.int32)
    try:
        spread = devices.Spread(mesh, local, optimizer, shapes, nats, advance)
        jax.eval_shape(spread.step, shapes, *spread.inputs_and_targets(windows))
    except (InputError, ValueError, NotImplementedError) as error:
        processes.fail(f"cannot train this model on the mesh: {error}", error)
    start = jax.jit(lambda: initialise(model, optimizer, options.seed))
    return spread, devices.place(start(), spread.shardings)


def open_run(options, out):
    """Returns the step to go on from and its settings, which `options` adopts; 0, None if new."""
    if options.resume is None:
        if checkpoint.holds_checkpoint(out) and not options.overwrite:
            raise InputError(
                f"{out} already holds a run; --resume continues it, --overwrite replaces it"
            )
        return 0, None
    step = None if options.resume == LAST else options.resume
    step = checkpoint.find_step(out, step, flag="--resume")
    saved = checkpoint.load_settings(checkpoint.open_manager(out, read_only=True), step)
    adopt(options, saved)
    return step, saved


def report(model, params, options, data, metrics, console, spread=None):
    """Compares with the byte models, draws the curve and samples; prints all of it."""
    text, held_out = data
    out = pathlib.Path(options.out)
    # All are scored on the same bytes: those that the model's windows cover.
    scored = held_out[: (len(held_out) - 1) // options.length * options.length + 1]
    windowed = dict(batch=options.batch, length=options.length)
    bits = evaluate(model, params, held_out, spread=spread, **windowed)
    if spread is not None:
        params = devices.on_one_device(params)
    if not processes.is_first():
        return
    baselines = ngram_baselines(text, scored)
    plot_losses(metrics.lines, baselines, out / "loss.png")

    # One prompt for each row: the beginnings of held-out windows.
    prompt_length = min(64, options.length // 2)
    rows = np.arange(options.batch) * options.length % (len(held_out) - prompt_length)
    prompt = held_out[rows[:, None] + np.arange(prompt_length)].astype(np.int32)
    key = jax.random.key(options.seed)
    tokens, logits = sample(model, params, prompt, key, 0.7, length=options.sample_length)
    distance = check_decoding(model, params, prompt, tokens, logits, length=options.length)

    console.print("\nHeld-out text, bits per byte:")
    for name, value in {**baselines, options.mixer: bits}.items():
        console.print(f"  {name:<10} {value:.3f}")
    console.print(f"\nloss curve   {out / 'loss.png'}")
    console.print(f"metrics      {out / 'metrics.jsonl'}")
    console.print(f"checkpoints  {out / 'checkpoints'}")
    console.print(
        f"\nDecoding token by token differs from the parallel forward by {distance:.1e} of the "
        f"largest logit (tolerance {DECODE_TOLERANCE[options.dtype]:.0e})."
    )
    console.print("\nA sample; the prompt, from the held-out text, ends at the bar:")
    console.print(decode(prompt[0]) + "|" + decode(tokens[0]))


def main(arguments=None):
    options = parse(arguments)
    with errors_in_one_line("train_lm.py"):
        try:
            processes.start(options)
            run(options)
        except Stopped as stopped:
            step, number = stopped.args
            if not processes.is_first():
                sys.exit(128 + number)
            instead = " in place of --overwrite" if options.overwrite else ""
            print(
                f"train_lm.py: stopped after step {step}, which is saved; the same command with "
                f"--resume{instead} goes on",
                file=sys.stderr,
            )
            sys.exit(128 + number)


if __name__ == "__main__":
    main()
