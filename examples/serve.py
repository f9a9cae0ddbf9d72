"""Serves many requests at once with a language model: continuous batching over a pool of caches.

    python examples/serve.py --synthetic 64 --rate 20                # a small untrained model
    python examples/serve.py --run runs/demo --prompts prompts.txt   # a run of train_lm.py
    python examples/serve.py --checkpoint DIR --tokenizer --prompts requests.jsonl --json out.json

Requests come from files (each line a prompt, or in *.jsonl an object with "prompt" or "tokens" and
settings of its own), or from a random arrival process. A request gets a slot of the pool when one
is free. Its prompt is read in chunks, beside the other requests' decoding, and the slot goes to the
next request when it ends. Two programs do all of it, whatever the requests. Each request's tokens
are those that jla.models.generate gives it alone with the same seed. Ctrl-C reports what there is,
and ends.
"""

import argparse
import collections
import json
import pathlib
import sys
import time
import types

import needs  # noqa: F401
import checkpoint
import from_checkpoint
import jax
import jax.numpy as jnp
import latency
import numpy as np
import workload
from command_line import (
    IMPLEMENTATIONS,
    InputError,
    Parser,
    errors_in_one_line,
    errors_of_jla,
    number,
    stop_requests,
    writing,
)
from engine import Engine, packs
from model import MIXERS, make_model
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from scheduler import Scheduler
from train_lm import initial_params

import jla.hub

SYNTHETIC = 32  # requests, where neither files nor a number are given
NAP = 0.05  # seconds; how long Ctrl-C may have to wait for a server that has nothing to do


def length_range(string):
    """An argparse type: "100:4000", or "100" for one length."""
    least, _, most = string.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"must be like 100:4000, at least 1, got {string!r}")
    return found


def parse(arguments):
    parser = Parser(prog="serve.py", description="Serve many requests at once.")
    whole = number(int, 1)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", metavar="DIR", help="a model that train_lm.py trained")
    source.add_argument("--checkpoint", metavar="DIR", help="a checkpoint of fla or Kimi Linear")
    add("--step", type=number(int, 0), help="of --run; default: the latest checkpoint's")
    add(
        "--tokenizer",
        nargs="?",
        const=from_checkpoint.SOURCE,
        metavar="FOLDER",
        help="of --checkpoint: turn text into tokens with transformers",
    )
    add("--mixer", choices=sorted(MIXERS), default="kda", help="of an untrained model, as are:")
    add("--width", type=whole, default=128)
    add("--depth", type=whole, default=3)
    add("--heads", type=whole, default=2)
    add("--dtype", choices=("float32", "bfloat16"), help="default: the model's, or float32")
    add("--implementation", choices=IMPLEMENTATIONS, help="default: the fastest")
    requests = parser.add_mutually_exclusive_group()
    requests.add_argument("--prompts", nargs="+", metavar="FILE", help="requests, a line each")
    requests.add_argument("--synthetic", type=whole, metavar="N", help="so many random requests")
    add("--rate", type=number(float, 0, exclusive=True), help="requests a second; default: at once")
    add("--prompt-length", type=length_range, default=(16, 256), metavar="MIN:MAX", help="random")
    add("--new-tokens", type=whole, default=64, help="the most of each request")
    add("--temperature", type=number(float, 0), default=0.0, help="0 takes the likeliest token")
    add("--top-k", type=whole, help="draw from the likeliest k")
    add("--top-p", type=number(float, 0, exclusive=True), help="or those of this share")
    add("--stop", type=int, nargs="+", metavar="TOKEN", help="default: the checkpoint's, or none")
    add("--seed", type=number(int, 0), default=0, help="of the first request, and of all random")
    add("--slots", type=whole, default=16, help="requests that run at once")
    add("--capacity", type=whole, default=2048, help="tokens in a slot, prompt and new ones")
    add("--rows", type=whole, default=4, help="prompts that a prefill reads")
    add("--chunk", type=number(int, 2), default=256, help="tokens that it has room for of each")
    add(
        "--prefill",
        choices=("packed", "rows"),
        help="prompts one behind the other, or in a row each; default: packed if the model can",
    )
    add("--decode-steps", type=whole, default=1, help="tokens that a decoding call draws")
    add("--json", metavar="FILE", help="write the numbers and the tokens here")
    options = parser.parse_args(arguments)
    if conflict := find_conflict(options):
        parser.error(conflict)
    return options


def find_conflict(options):
    """Says which options do not go together; None if all do."""
    if options.step is not None and options.run is None:
        return "--step is of --run"
    if options.tokenizer is not None and options.checkpoint is None:
        return "--tokenizer is of --checkpoint"
    if options.width % options.heads:
        return f"--width {options.width} must be a multiple of --heads {options.heads}"
    if options.seed >= workload.SEEDS:
        return f"--seed must be below {workload.SEEDS}, got {options.seed}"
    return None


def load(options):
    """The model that was asked for, its parameters, and the tokens that end its texts."""
    implementation = dict(implementation=options.implementation)
    dtype = {} if options.dtype is None else dict(dtype=options.dtype)
    if options.checkpoint:
        config = jla.hub.read_config(options.checkpoint)
        dtype = options.dtype or from_checkpoint.files_dtype(config)
        model = jla.hub.model(config, dtype=dtype, param_dtype=dtype, **implementation)
        ends = config.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return model, jla.hub.load(options.checkpoint, model), ends
    if options.run:
        step = checkpoint.find_step(options.run, options.step, flag="--step")
        manager = checkpoint.open_manager(options.run, read_only=True)
        settings = checkpoint.load_settings(manager, step)["model"] | dtype
        model = make_model(**settings, **implementation)
        return model, checkpoint.load_params(manager, step, model), []
    sizes = options.width, options.depth, options.heads
    model = make_model(options.mixer, *sizes, longest=options.capacity, **dtype, **implementation)
    # Parameters do not depend on the implementation, and this one's compile quickly.
    key = jax.random.key(options.seed)
    return model, initial_params(key, model=model.clone(implementation="reference")), []


def requests_of(options, encode, vocabulary, ends):
    """The requests that were asked for, in their order; those of files may be refused."""
    settings = {name: getattr(options, name) for name in workload.SETTINGS}
    settings["stop"] = tuple(ends if options.stop is None else options.stop)
    if options.prompts:
        return workload.read(options.prompts, encode, settings)
    return workload.synthetic(
        options.synthetic or SYNTHETIC,
        rate=options.rate,
        lengths=options.prompt_length,
        vocabulary=vocabulary,
        settings=settings,
    )


def admitted(found, vocabulary, capacity):
    """Splits them into requests and `workload.Refused`."""
    good, refused = [], []
    for request in found:
        if not isinstance(request, workload.Refused):
            reason = workload.reason_to_refuse(request, vocabulary, capacity)
            if reason is None:
                good.append(request)
                continue
            request = workload.Refused(request.name, reason)
        refused.append(request)
    return good, refused


def serve(engine, scheduler, requests, *, signals=(), show=lambda ended, seconds: None):
    """Serves requests to their end, or until there is one of `signals`.

    A call is started before the tokens of the former are read, so that the device never waits for
    this function. While there is nothing to do it sleeps until the next request arrives.

    Returns:
      What became of each request, in their order, the seconds that it took, and how many calls of
      each program there were.
    """
    arriving = collections.deque(sorted(requests, key=lambda request: request.arrival))
    became, in_flight, calls = {}, collections.deque(), collections.Counter()
    start = time.perf_counter()

    def now():
        return time.perf_counter() - start

    def deliver(pieces, first, plan, later):
        """Reads what two calls have drawn, waiting for it."""
        if pieces:
            first = np.asarray(first)
            for i, piece in enumerate(pieces):
                if piece.ends:
                    scheduler.deliver(piece.running, first[i : i + 1].tolist(), now())
        if plan:
            later = np.asarray(later)
            moment = now()
            for slot, (running, count) in plan.items():
                scheduler.deliver(running, later[:count, slot].tolist(), moment)

    while not signals:
        while arriving and arriving[0].arrival <= now():
            request = arriving.popleft()
            became[request] = scheduler.submit(request)
        pieces = scheduler.plan_prefill(now())
        first = engine.prefill(pieces) if pieces else None
        plan = scheduler.plan_decode()
        later = None
        if plan:
            later = engine.decode({slot: count for slot, (_, count) in plan.items()})
        calls.update(prefill=bool(pieces), decode=bool(plan))
        if pieces or plan:
            in_flight.append((pieces, first, plan, later))
        if in_flight and (len(in_flight) > 1 or not (pieces or plan)):
            deliver(*in_flight.popleft())
            show(len(became) - scheduler.unfinished, now())
        elif not in_flight:
            if not arriving:
                break
            time.sleep(max(0.0, min(arriving[0].arrival - now(), NAP)))
    while in_flight:
        deliver(*in_flight.popleft())
    seconds = now()
    for request in arriving:
        became[request] = scheduler.submit(request)
    scheduler.cut_off()
    return [became[request] for request in requests], seconds, calls


class Display:
    """The progress of serving; call it with the number of requests that ended, and the seconds."""

    EVERY = 0.1  # seconds

    def __init__(self, scheduler, total, console):
        self.scheduler, self.shown = scheduler, -self.EVERY
        self.progress = Progress(
            TextColumn("{task.completed}/{task.total} requests"),
            BarColumn(),
            TextColumn("{task.fields[report]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("", total=total, report="")

    def __call__(self, ended, seconds):
        if seconds < self.shown + self.EVERY:
            return
        self.shown, scheduler = seconds, self.scheduler
        report = (
            f"{len(scheduler.reading)} reading, {len(scheduler.drawing)} drawing, "
            f"{len(scheduler.waiting)} waiting, {scheduler.delivered / seconds:,.0f} new tokens/s"
        )
        self.progress.update(self.task, completed=ended, report=report)


def as_json(running):
    """A request and what became of it."""
    request = running.request
    return dict(
        name=request.name,
        prompt_tokens=len(request.prompt),
        end=running.end,
        tokens=running.tokens,
        arrival_s=request.arrival,
        queue_s=None if running.admitted is None else running.admitted - request.arrival,
        first_token_s=running.times[0] - request.arrival if running.times else None,
    )


def print_texts(console, became, decode):
    """Prints each prompt and, behind a bar, its continuation."""
    for running in became:
        request = running.request
        ended = "" if running.end == "length" else f" ({running.end})"
        prompt, new = (decode(np.array(x, np.int32)) for x in (request.prompt, running.tokens))
        console.print(f"{request.name}{ended}: {prompt}|{new}")


def coding_of(options, vocabulary, console):
    """Text as tokens and back: two functions."""
    wanted = types.SimpleNamespace(
        tokenizer=options.tokenizer, checkpoint=options.checkpoint, prompt=None, text=None
    )
    coding = from_checkpoint.Coding(wanted, vocabulary, console)
    if coding.tokenizer is not None:
        return coding.tokenizer.encode, coding.decode
    if options.checkpoint and options.prompts:
        console.print("without --tokenizer the tokens of a text are its bytes")
    return str.encode, coding.decode


def packs_prompts(options, model):
    """Whether prompts are packed; raises InputError if they are to be and cannot."""
    if options.prefill == "packed" and not packs(model):
        raise InputError(
            "--prefill packed: the model has layers that keep every token (softmax attention, "
            "PaTH), which read a prompt a row; use --prefill rows"
        )
    return packs(model) if options.prefill is None else options.prefill == "packed"


def run(options):
    """Does what was asked for; returns the signal that ended it early, or None."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if options.json and not pathlib.Path(options.json).absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: there is no such folder")
    model, params, ends = load(options)
    vocabulary = model.config.vocabulary
    encode, decode = coding_of(options, vocabulary, console)
    found = requests_of(options, encode, vocabulary, ends)
    requests, refused = admitted(found, vocabulary, options.capacity)
    for request in refused:
        console.print(f"{request.name} refused: {request.reason}")

    sizes = dict(slots=options.slots, rows=options.rows, chunk=options.chunk)
    sizes |= dict(steps=options.decode_steps, packed=packs_prompts(options, model))
    # As in training: float32 also on a GPU, whose default products are coarser.
    precise = jnp.dtype(model.dtype) == jnp.float32
    with jax.default_matmul_precision("highest" if precise else None):
        engine = Engine(model, params, capacity=options.capacity, **sizes)
    facts = dict(
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        vocabulary=vocabulary,
        slots=options.slots,
        capacity=options.capacity,
        prefill="packed" if sizes["packed"] else "rows",
        slot_mib=engine.state_bytes / 2**20,
        memory_gib=engine.memory_bytes() / 2**30,
        compile_s=engine.compile_s,
    )
    console.print(
        f"{facts['parameters']:,} parameters on {facts['device']}; {options.slots} slots of "
        f"{facts['slot_mib']:.2f} MiB for {options.capacity} tokens, {facts['memory_gib']:.2f} GiB "
        f"in all; two programs compiled in {facts['compile_s']:.1f} s"
    )
    del params
    scheduler = Scheduler(**sizes)
    display = Display(scheduler, len(requests), console)
    with stop_requests() as signals, display.progress:
        became, seconds, calls = serve(engine, scheduler, requests, signals=signals, show=display)
        display.shown = -display.EVERY
        display(sum(running.end in ("length", "stop") for running in became), seconds)
    if options.prompts:
        print_texts(console, became, decode)
    numbers = latency.summary(became, seconds, refused=len(refused))
    for line in latency.lines(numbers):
        console.print(line)
    if options.json:
        report = facts | numbers | dict(calls=calls, dropped_tokens=scheduler.dropped)
        own = options.tokenizer is from_checkpoint.SOURCE
        tokenizer = options.checkpoint if own else options.tokenizer
        report["options"] = vars(options) | dict(tokenizer=tokenizer)
        report["results"] = [as_json(running) for running in became]
        report["results"] += [dict(name=one.name, refused=one.reason) for one in refused]
        with writing(options.json):
            pathlib.Path(options.json).write_text(json.dumps(report))
    return signals[0] if signals else None


def main(arguments=None):
    options = parse(arguments)
    with errors_in_one_line("serve.py"), errors_of_jla():
        stopped = run(options)
    if stopped:
        print("serve.py: stopped; what was running is cut off", file=sys.stderr)
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
