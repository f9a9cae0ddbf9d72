"""Trains a byte-level language model on text, then samples from it.

    python examples/train_lm.py                          # Python's own documentation, about 2 min
    python examples/train_lm.py --text book.txt --steps 5000 --width 512 --depth 8 --dtype bfloat16

Writes under --out: metrics.jsonl, loss.png and checkpoints. The same command with --resume goes on
from the last checkpoint to the numbers that an uninterrupted run would have had.
"""

import functools
import json
import math
import pathlib
import shutil
import time
import zlib

import checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import InputError, Parser, errors_in_one_line, number
from generate import decode, sample
from model import MIXERS, LanguageModel
from plot import plot_losses
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from text import batch_at, load_text, ngram_baselines, split_text, windows

# How far logits decoded token by token may be from the parallel forward's, relative to the largest.
DECODE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@functools.cache  # jit tells functions by identity: equal settings share one compiled step
def make_optimizer(steps, peak_rate, weight_decay):
    """AdamW with warm-up (a tenth of the steps, at most 1000), cosine decay and clipping to 1."""
    warmup = min(1000, max(1, steps // 10))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, peak_rate, warmup, max(steps, warmup + 1), end_value=0.05 * peak_rate
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=decays),
    )
    return optimizer, rate


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


# The old state is donated: parameters and moments are updated in place.
@functools.partial(jax.jit, static_argnames=("model", "optimizer"), donate_argnames="state")
def train_step(state, tokens, *, model, optimizer):
    """One step on a batch of windows; returns the new state, the loss and the gradient's norm."""
    params, moments = state["params"], state["moments"]
    loss, gradient = jax.value_and_grad(lambda p: cross_entropy(model, p, tokens).mean())(params)
    updates, moments = optimizer.update(gradient, moments, params)
    state = {"params": optax.apply_updates(params, updates), "moments": moments}
    return state, loss, optax.tree.norm(gradient)


@functools.partial(jax.jit, static_argnames="model")
def forward(params, tokens, *, model):
    """Returns the logits [B, T, 256] of windows int32 [B, T], all positions at once."""
    return model.apply({"params": params}, tokens)


def evaluate(model, params, text, *, batch, length):
    """Returns the bits per byte of a text cut into windows; each begins with an empty context."""
    tokens = windows(text, length)
    padding = np.zeros((-len(tokens) % batch, length + 1), np.int32)
    nats = []
    for group in np.concatenate([tokens, padding]).reshape(-1, batch, length + 1):
        logits = forward(params, group[:, :-1], model=model)
        nats.append(optax.softmax_cross_entropy_with_integer_labels(logits, group[:, 1:]))
    return float(np.concatenate(nats)[: len(tokens)].mean() / math.log(2))


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
    tolerance = DECODE_TOLERANCE[model.dtype]
    if not distance <= tolerance:
        raise RuntimeError(
            f"decoding and the parallel forward disagree: their logits differ by {distance:.1e} of "
            f"the largest logit, the tolerance for {model.dtype} is {tolerance:.0e}"
        )
    return distance


class Metrics:
    """The lines of metrics.jsonl, one JSON object each."""

    def __init__(self, path, first_step):
        """Keeps the lines of steps up to `first_step`: a resumed run repeats what came after."""
        self.path = path
        lines = path.read_text().splitlines() if first_step and path.exists() else []
        self.lines = [line for line in map(json.loads, lines) if line["step"] <= first_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, **line):
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def parse(arguments):
    parser = Parser(
        prog="train_lm.py", description="Train a byte-level language model, then sample from it."
    )
    whole = number(int, 1)
    add = parser.add_argument
    add("--text", nargs="+", metavar="FILE", help="default: the documentation of Python itself")
    add("--mixer", choices=sorted(MIXERS), default="kda")
    add("--implementation", choices=("reference", "xla", "pallas"), help="default: the fastest")
    add("--width", type=whole, default=128)
    add("--depth", type=whole, default=3)
    add("--heads", type=whole, default=2)
    add("--dtype", choices=sorted(DECODE_TOLERANCE), default="float32", help="of the computation")
    add("--steps", type=whole, default=240)
    add("--batch", type=whole, default=4, help="windows in a step")
    add("--length", type=whole, default=256, help="bytes in a window")
    add("--lr", type=number(float, 0, exclusive=True), default=4e-3, help="peak learning rate")
    add("--weight-decay", type=number(float, 0), default=0.1)
    add("--seed", type=number(int, 0), default=0)
    add("--out", default="runs/lm", metavar="DIR", help="default: %(default)s")
    add("--save-every", type=whole, default=100, metavar="STEPS")
    add("--evaluate-every", type=whole, default=100, metavar="STEPS")
    add("--sample-length", type=whole, default=400, metavar="BYTES")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    start.add_argument("--overwrite", action="store_true", help="delete an earlier run in --out")
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"--width {options.width} must be a multiple of --heads {options.heads}")
    if options.implementation and options.mixer == "attention":
        parser.error("--implementation chooses among jla's; --mixer attention is not one of them")
    return options


# What changes the numbers of a run: a checkpoint is resumed with the same, or not at all.
SETTINGS = ("steps", "batch", "length", "lr", "weight_decay", "seed")
MODEL_SETTINGS = ("mixer", "width", "depth", "heads", "dtype")


def describe(options, text):
    """Returns the settings that a checkpoint keeps."""
    values = vars(options)
    return {
        "model": {name: values[name] for name in MODEL_SETTINGS},
        "training": {name: values[name] for name in SETTINGS} | {"text_crc32": zlib.crc32(text)},
    }


def check_settings(saved, wanted, step):
    """Raises InputError if a checkpoint was made with other settings than those wanted."""
    differences = [
        f"{'the text' if name == 'text_crc32' else '--' + name.replace('_', '-')} "
        f"({saved[part].get(name)}, now {value})"
        for part in wanted
        for name, value in wanted[part].items()
        if saved[part].get(name) != value
    ]
    if differences:
        raise InputError(
            f"the checkpoint of step {step} was made with other settings: {', '.join(differences)}"
        )


def prepare_output(options):
    """Makes --out; returns the step of the checkpoint to resume from, 0 for a new run."""
    out = pathlib.Path(options.out)
    try:
        if options.overwrite:
            # Only what this program has written.
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        elif not options.resume and (out / "checkpoints").exists():
            raise InputError(
                f"{out} already holds a run; --resume continues it, --overwrite replaces it"
            )
        first_step = checkpoint.find_step(out) if options.resume else 0
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out {out}: {error.strerror}") from None
    return first_step


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


def train(model, optimizer, rate, state, first_step, options, data, metrics, save, console):
    """Runs the steps after `first_step`; returns the final state."""
    text, held_out = data
    windowed = dict(batch=options.batch, length=options.length)
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[report]}"),
        TimeRemainingColumn(),
    )
    pending, began = [], time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            "", total=options.steps, completed=first_step, report="compiling ..."
        )
        for step in range(first_step + 1, options.steps + 1):
            tokens = batch_at(text, step, seed=options.seed, **windowed)
            state, loss, norm = train_step(state, tokens, model=model, optimizer=optimizer)
            pending.append((step, loss, norm))
            evaluating = step % options.evaluate_every == 0 or step == options.steps
            saving = step % options.save_every == 0 or step == options.steps

            # Reading a loss waits for the device, so it is done for several steps at once.
            if step == first_step + 1 or step % 10 == 0 or evaluating or saving:
                losses = jax.device_get(pending)
                elapsed = time.perf_counter() - began
                speed = len(pending) * options.batch * options.length / elapsed
                for past, loss, norm in losses:
                    if not math.isfinite(loss):
                        raise InputError(f"the loss of step {past} is {loss}; try a lower --lr")
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
            if saving:
                save(step, state)
            if evaluating:
                bits = evaluate(model, state["params"], held_out, **windowed)
                metrics.write(step=step, held_out_bits_per_byte=bits)
                console.print(f"step {step}: held-out text {bits:.3f} bits/byte; training {report}")
            if not pending:
                began = time.perf_counter()
    return state


def run(options):
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        text = load_text(options.text)
        data = split_text(text, options.length)
    except ValueError as error:
        raise InputError(error) from None
    settings = describe(options, text)
    first_step = prepare_output(options)
    out = pathlib.Path(options.out)
    manager = checkpoint.open_manager(out)
    if first_step:
        check_settings(checkpoint.load_settings(manager, first_step), settings, first_step)

    # On a GPU, copies to and from a loop's stacks would take a tenth of the time.
    unroll = jax.default_backend() == "gpu"
    model = LanguageModel(**settings["model"], implementation=options.implementation, unroll=unroll)
    optimizer, rate = make_optimizer(options.steps, options.lr, options.weight_decay)
    state = initialise(model, optimizer, options.seed)
    size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    console.print(
        f"{options.mixer} model, {size:,} parameters, on {jax.devices()[0].device_kind}; "
        f"{len(data[0]):,} bytes to train on, {len(data[1]):,} held out"
    )
    if first_step:
        state = checkpoint.load_state(manager, first_step, state)
        console.print(f"resumed from step {first_step}")

    metrics = Metrics(out / "metrics.jsonl", first_step)

    def save(step, state):
        checkpoint.save(manager, step, state, settings)

    state = train(model, optimizer, rate, state, first_step, options, data, metrics, save, console)
    report(model, state["params"], options, data, metrics, console)


def report(model, params, options, data, metrics, console):
    """Compares with the byte models, draws the curve and samples; prints all of it."""
    text, held_out = data
    out = pathlib.Path(options.out)
    # All are scored on the same bytes: those that the model's windows cover.
    scored = held_out[: (len(held_out) - 1) // options.length * options.length + 1]
    baselines = ngram_baselines(text, scored)
    bits = evaluate(model, params, held_out, batch=options.batch, length=options.length)
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
        f"largest logit (tolerance {DECODE_TOLERANCE[model.dtype]:.0e})."
    )
    console.print("\nA sample; the prompt, from the held-out text, ends at the bar:")
    console.print(decode(prompt[0]) + "|" + decode(tokens[0]))


def main(arguments=None):
    options = parse(arguments)
    # In float32 also on a GPU, whose default products are coarser; bfloat16 is there for speed.
    precision = "highest" if options.dtype == "float32" else None
    with errors_in_one_line("train_lm.py"), jax.default_matmul_precision(precision):
        run(options)


if __name__ == "__main__":
    main()
