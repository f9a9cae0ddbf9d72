"""Loads a checkpoint of fla's models or of Kimi Linear; generates from it, or fine-tunes it.

    python examples/from_checkpoint.py DIR                          # says what it is
    python examples/from_checkpoint.py DIR --tokens 1,17,4
    python examples/from_checkpoint.py DIR --tokenizer --prompt 'The capital of France is'
    python examples/from_checkpoint.py DIR --tokenizer --text book.txt --steps 200 --out tuned

Fine-tuning runs on all devices, or on those of --mesh: `data` splits the batch, and with it what is
kept of the parameters; `model` splits heads, and what is inside of MLPs. The result under --out is
a checkpoint of the same form, in the dtype of the first. Ctrl-C ends training early, and saves.
"""

import argparse
import collections
import functools
import math
import os
import pathlib
import sys
import time

import needs  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_lm
from command_line import (
    IMPLEMENTATIONS,
    InputError,
    Parser,
    errors_in_one_line,
    errors_of_jla,
    locked,
    number,
    stop_requests,
    writing,
)
from devices import make_mesh, mesh_sizes, shardings_of, shown
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from text import batch_at, load_text

import jla.hub
from jla.models import kept

BYTES = 256
AXES = ("data", "model")
SOURCE = object()  # --tokenizer without a folder


def token_ids(string):
    """An argparse type: "1,17,4" as a list."""
    try:
        return [int(token) for token in string.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers, by commas, got {string!r}") from None


def parse(arguments):
    parser = Parser(
        prog="from_checkpoint.py",
        description="Generate from a checkpoint of fla or Kimi Linear, or fine-tune it.",
    )
    whole = number(int, 1)
    add = parser.add_argument
    add("checkpoint", metavar="DIR", help="with config.json and safetensors files")
    add("--implementation", choices=IMPLEMENTATIONS, help="default: the fastest")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation; default: the files'")
    add(
        "--tokenizer",
        nargs="?",
        const=SOURCE,
        metavar="FOLDER",
        help="turn text into tokens with transformers; default: DIR's own tokenizer",
    )
    add("--seed", type=number(int, 0), default=0)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--tokens", type=token_ids, metavar="IDS", help="continue 1,17,4")
    prompt.add_argument("--prompt", metavar="TEXT", help="continue text")
    add("--new-tokens", type=whole, default=50, help="how many are generated")
    add("--temperature", type=number(float, 0), default=0.0, help="0 takes the likeliest token")
    add("--text", nargs="+", metavar="FILE", help="fine-tune on these")
    add("--out", metavar="DIR", help="where the fine-tuned checkpoint goes")
    add("--steps", type=whole, default=100)
    add("--batch", type=whole, default=8, help="windows in a step")
    add("--length", type=whole, default=512, help="tokens in a window")
    add("--lr", type=number(float, 0, exclusive=True), default=1e-5, help="peak learning rate")
    add("--weight-decay", type=number(float, 0), default=0.1)
    add("--mesh", type=mesh_sizes(AXES), help="default: all devices are data=")
    options = parser.parse_args(arguments)
    if (options.text is None) != (options.out is None):
        parser.error("--text and --out go together: what to train on, and where the result goes")
    if options.prompt == "":
        parser.error("argument --prompt: must not be empty")
    return options


class Coding:
    """Text as tokens and back: a tokenizer's, or its bytes."""

    def __init__(self, options, vocabulary, console):
        self.vocabulary, self.tokenizer = vocabulary, None
        self.own = own = options.tokenizer is SOURCE
        if options.tokenizer is not None:
            self.tokenizer = load_tokenizer(options.checkpoint if own else options.tokenizer)
        elif options.prompt is not None or options.text is not None:
            if vocabulary < BYTES:
                raise InputError(
                    f"the model has {vocabulary} tokens, fewer than there are bytes, so text needs "
                    "--tokenizer; --tokens takes tokens as they are"
                )
            console.print(
                "without --tokenizer the text's bytes are its tokens, which mean something else to "
                "a model that was trained with a tokenizer"
            )

    def encode(self, text):
        if self.tokenizer is None:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return self.checked(self.tokenizer.encode(text), "the tokenizer's")

    def checked(self, tokens, whose):
        """Tokens as an array, if the model has them all."""
        tokens = np.asarray(tokens, np.int64)
        if not len(tokens) or tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise InputError(
                f"{whose} tokens must be 0 to {self.vocabulary - 1}, the model's vocabulary, got "
                f"{f'{tokens.min()} to {tokens.max()}' if len(tokens) else 'none'}"
            )
        return tokens.astype(np.int32)

    def decode(self, tokens):
        if self.tokenizer is None:
            shown = [token if token < BYTES else ord("?") for token in tokens.tolist()]
            return bytes(shown).decode(errors="replace")
        return self.tokenizer.decode(tokens.tolist())


def load_tokenizer(folder):
    """transformers' tokenizer of a folder; nothing is downloaded, and no code of the folder run."""
    # It would warn that PyTorch is not there and that it does not know the model.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise InputError(
            "--tokenizer needs the package transformers, which is not installed; install it, or "
            "leave --tokenizer out and give --tokens"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"transformers finds no tokenizer in {folder}, and --tokenizer FOLDER takes another's: "
            f"{error}"
        ) from None


def files_dtype(config):
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def shapes_of(model):
    """The shapes of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def described(model, shapes):
    """What the model is, in lines."""
    layers = collections.Counter(
        f"{type(layer.mixer).__name__} and {type(layer.mlp).__name__}"
        for layer in model.config.layers
    )
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    yield f"width {model.config.width}, vocabulary {model.config.vocabulary}"
    yield "layers: " + ", ".join(f"{count} of {name}" for name, count in layers.items())
    head = "the head is the embedding" if model.config.tied else "a head of its own"
    yield f"{sum(sizes):,} parameters in {jnp.dtype(model.param_dtype).name}; {head}"


def chosen_mesh(sizes, batch):
    """The mesh that was asked for, of the first devices; by default all devices are "data"."""
    devices = jax.devices()
    sizes = sizes or {"data": len(devices)}
    if (count := math.prod(sizes.values())) > len(devices):
        raise InputError(f"--mesh {shown(sizes)} needs {count} devices of {len(devices)}")
    if batch % (data := sizes.get("data", 1)):
        raise InputError(f"--batch {batch} must be a multiple of data={data} of the mesh (--mesh)")
    return make_mesh(sizes, devices)


@functools.cache  # see train_lm.make_optimizer
def make_optimizer(steps, peak_rate, weight_decay):
    """train_lm.py's, for all but the correction biases of experts, which no gradient reaches."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kept" if path[-1].key == "correction_bias" else "trained", params
        )

    trained, _ = train_lm.make_optimizer(steps, peak_rate, weight_decay)
    return optax.partition({"trained": trained, "kept": optax.set_to_zero()}, labels)


def first_state(model, params, optimizer, mesh):
    """The state before training, and the function of state and batch that is one step."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def sharding(x):
        return x.sharding if isinstance(x.sharding, NamedSharding) else everywhere

    state = {"params": params, "moments": optimizer.init(params)}
    shardings = jax.tree.map(sharding, state)
    # The new state lies as the old one: else XLA chooses, and the second step is compiled anew.
    step = jax.jit(
        functools.partial(train_lm.train_step, model=model, optimizer=optimizer),
        donate_argnums=0,
        out_shardings=(shardings, None, None),
    )
    return jax.device_put(state, shardings), step


def fine_tune(model, params, tokens, mesh, options, console):
    """Returns the parameters after `options.steps` steps, or fewer if the user stops them; and the
    signal that did."""
    optimizer = make_optimizer(options.steps, options.lr, options.weight_decay)
    state, train_step = first_state(model, params, optimizer, mesh)
    windows = dict(seed=options.seed, batch=options.batch, length=options.length)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    losses, began = [], time.perf_counter()
    with stop_requests() as signals, train_lm.steps_shown(console) as progress:
        task = progress.add_task("", total=options.steps, report="compiling ...")
        for step in range(1, options.steps + 1):
            batch = jax.device_put(batch_at(tokens, step, **windows), rows)
            state, loss, _ = train_step(state, batch)
            losses.append(loss)
            last = step == options.steps or bool(signals)
            # Reading a loss waits for the device, so it is done for several steps at once.
            if step == 1 or step % 10 == 0 or last:
                first, loss = float(losses[0]), float(loss)
                if not math.isfinite(loss):
                    raise InputError(f"the loss of step {step} is {loss}; try a lower --lr")
                speed = (step - 1) * options.batch * options.length
                speed /= time.perf_counter() - began
                report = f"{loss:.3f} nats a token, {speed:,.0f} tokens/s"
                progress.update(task, completed=step, report=report)
            if step == 1:  # whose time is the compiler's
                began = time.perf_counter()
            if last:
                break
    console.print(f"{step} steps: {first:.3f} nats a token in the first, {loss:.3f} in the last")
    return state["params"], signals[0] if signals else None


def train_and_save(config, model, coding, options, console):
    """Fine-tunes a checkpoint and writes the result; returns the model, its parameters, and the
    signal that ended training early."""
    out = pathlib.Path(options.out)
    try:
        text = load_text(options.text)
    except ValueError as error:
        raise InputError(error) from None
    tokens = coding.encode(text.tobytes().decode(errors="replace"))
    if len(tokens) <= options.length:
        raise InputError(
            f"the text has {len(tokens)} tokens; windows of --length {options.length} need "
            f"{options.length + 1}"
        )
    mesh = chosen_mesh(options.mesh, options.batch)
    # Equal layers are compiled once; a GPU is faster without the copies of a loop's stacks.
    layers = model.config.layers
    equal = all(layer == layers[0] for layer in layers)
    unroll = jax.default_backend() == "gpu"
    model = model.clone(stacked=equal, unroll=equal and unroll, remat=kept)
    shardings = shardings_of(shapes_of(model), mesh)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise InputError(f"--out {out} must be a new or an empty folder")
    with locked(out):
        params = jla.hub.load(options.checkpoint, model, sharding=shardings)
        console.print(f"{len(tokens):,} tokens to train on; mesh {shown(mesh.shape)}")
        params, stopped = fine_tune(model, params, tokens, mesh, options, console)
        dtype = files_dtype(config)
        with writing(out):
            jla.hub.save(out, model, params, config, dtype=dtype, source=options.checkpoint)
            if coding.tokenizer is not None and not coding.own:
                coding.tokenizer.save_pretrained(out)
    console.print(f"saved in {dtype} under {out}")
    return model, params, stopped


def continue_prompt(model, params, coding, options, console):
    """Prints what follows the prompt."""
    if options.tokens is not None:
        prompt = coding.checked(options.tokens, "--tokens: the")
    else:
        prompt = coding.encode(options.prompt)
    new = jla.hub.generate(
        model,
        params,
        prompt[None],
        max_new_tokens=options.new_tokens,
        temperature=options.temperature,
        key=jax.random.key(options.seed),
    )
    new = np.asarray(new[0])
    if options.tokens is not None:
        console.print(",".join(map(str, new.tolist())))
    if coding.tokenizer is not None or options.prompt is not None:
        console.print((options.prompt or "") + "|" + coding.decode(new))


def run(options):
    """Does what was asked for; returns the signal that ended training early, or None."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    config = jla.hub.read_config(options.checkpoint)
    dtype = options.dtype or files_dtype(config)
    model = jla.hub.model(
        config,
        dtype=dtype,
        param_dtype="float32" if options.text else dtype,
        implementation=options.implementation,
    )
    console.print(f"{config['model_type']} model on {jax.devices()[0].device_kind}")
    for line in described(model, shapes_of(model)):
        console.print(f"  {line}")
    coding, stopped = Coding(options, model.config.vocabulary, console), None
    generating = options.tokens is not None or options.prompt is not None
    if options.text:
        model, params, stopped = train_and_save(config, model, coding, options, console)
    elif generating:
        params = jla.hub.load(options.checkpoint, model)
    if generating and not stopped:
        continue_prompt(model, params, coding, options, console)
    return stopped


def main(arguments=None):
    options = parse(arguments)
    with errors_in_one_line("from_checkpoint.py"), errors_of_jla():
        stopped = run(options)
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
