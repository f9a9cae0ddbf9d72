"""Trains flash-linear-attention's own models (PyTorch, Triton) as benchmarks.language_model does
ours: tokens a second, memory.

    python -m benchmarks.peer_models --out benchmarks/results/peer_models.json

The models are fla's, of the same width, depth, heads and MLPs, with its fused norms, MLPs and
losses; the optimizer is PyTorch's fused AdamW, after clipping. Parameters and moments are bfloat16,
which takes less time and memory than the float32 that jla's models have; `--precision autocast`
keeps them float32. Tokens are random: speed does not depend on them (but for MesaNet's solver).

The first call tunes Triton's kernels for minutes, and keeps what was fastest on the disk; several
threads compile what is to be timed. With --tune-only processes, one for each model, do that at
once, and those with the same --share time one after another on each GPU. Then one measures alone.
"""

import argparse
import contextlib
import fcntl
import gc
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks import side_by_side

KEYS = ("mixer", "precision", "length", "batch", "gpus")
GROUP = 5  # steps enqueued together and awaited once
COMPILERS = 12  # threads


def main(argv=None):
    # JAX only says which GPU it is, and must leave the memory to PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = parse(argv)
    start = time.monotonic()
    report = side_by_side.Report(options.out, KEYS, "peer_models", argv, options.add)
    shares = side_by_side.Shares(options.share)
    for precision in options.precision:
        for mixer in options.mixers:
            if options.limit is not None and time.monotonic() - start > options.limit:
                print(f"not started, past --limit: {mixer}", flush=True)
                continue
            row = dict(mixer=mixer, precision=precision)
            row |= dict(length=options.length, batch=options.batch)
            if report.find(row) is not None or not shares.take(mixer, precision):
                continue
            show(report.measure(row, train(mixer, precision, options)), time.monotonic() - start)
    return 1 if report.failed else 0


def parse(argv):
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.peer_models", description=__doc__.splitlines()[0]
    )
    add = made.add_argument
    add("--mixers", default=",".join(CONFIGS), help="by commas (default: %(default)s)")
    add("--precision", default="bfloat16", help="by commas, of bfloat16 and autocast")
    add("--width", type=int, default=1024)
    add("--depth", type=int, default=9)
    add("--heads", type=int, default=8)
    add("--length", type=int, default=4096, help="tokens in a window")
    add("--batch", type=int, default=16, help="windows in a step")
    add("--steps", type=int, default=40)
    add("--limit", type=float, help="start no case after so many seconds")
    add("--tune-only", action="store_true", help="end each case with its first step")
    side_by_side.add_pieces(add)
    add("--out", help="write JSON to this file, after every case; its other rows stay")
    options = made.parse_args(argv)
    options.mixers, options.precision = options.mixers.split(","), options.precision.split(",")
    for name, known in dict(mixers=CONFIGS, precision=("bfloat16", "autocast")).items():
        if unknown := set(getattr(options, name)) - set(known):
            made.error(f"--{name}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return options


def shared(options):
    """What the configs of all models have. MLPs are as wide as those of examples/model.py."""
    return dict(
        hidden_size=options.width,
        num_hidden_layers=options.depth,
        vocab_size=256,
        tie_word_embeddings=True,
        use_cache=False,
    )


def with_mlp(options):
    hidden = 32 * round(options.width * 8 / 3 / 32)
    heads = dict(num_heads=options.heads, max_position_embeddings=options.length)
    return shared(options) | dict(intermediate_size=hidden) | heads


def kda(options):
    from fla.models import KDAConfig, KDAForCausalLM

    head_dim = options.width // options.heads
    return KDAForCausalLM, KDAConfig(head_dim=head_dim, **with_mlp(options))


def gsa(options):
    """With as many slots as a head has features, and convolutions, as the example's."""
    from fla.models import GSAConfig, GSAForCausalLM

    slots = options.width // options.heads
    more = dict(num_slots=slots, use_short_conv=True)
    return GSAForCausalLM, GSAConfig(**more, **with_mlp(options))


def mesa(options):
    from fla.models import MesaNetConfig, MesaNetForCausalLM

    head_dim = options.width // options.heads
    return MesaNetForCausalLM, MesaNetConfig(head_dim=head_dim, **with_mlp(options))


def path(options):
    from fla.models import PaTHAttentionConfig, PaTHAttentionForCausalLM

    settings = with_mlp(options)
    del settings["max_position_embeddings"]
    return PaTHAttentionForCausalLM, PaTHAttentionConfig(**settings)


def log_linear(options):
    """Its MLPs have the width that fla gives them: 2816 beside 2720 for a width of 1024."""
    from fla.models import LogLinearMamba2Config, LogLinearMamba2ForCausalLM

    head_dim = options.width // options.heads
    sizes = dict(expand=1, head_dim=head_dim, state_size=head_dim)
    return LogLinearMamba2ForCausalLM, LogLinearMamba2Config(**sizes, **shared(options))


CONFIGS = dict(kda=kda, gsa=gsa, mesa=mesa, path=path, log_linear=log_linear)


def train(mixer, precision, options):
    """Yields the row's numbers: of the model, of its first step, of `options.steps` steps."""
    import fla
    import torch

    tune_side_by_side(options.share)
    gc.collect()  # of the model before
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    kind, config = CONFIGS[mixer](options)
    with torch.device("cuda"):
        model = kind(config)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    model.train()
    parameters = list(model.parameters())
    yield dict(
        package=f"fla {fla.__version__}",
        **dict(parameters=sum(x.numel() for x in parameters), width=options.width),
        **dict(depth=options.depth, heads=options.heads, steps=options.steps),
        versions=dict(torch=torch.__version__),
    )
    options_of = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    optimizer = torch.optim.AdamW(parameters, **options_of)
    tokens = torch.randint(256, (8, options.batch, options.length), device="cuda")
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast")

    def step(x):
        with autocast:
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def group(number):
        began = time.perf_counter()
        losses = [step(tokens[i % len(tokens)]) for i in range(number)]
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began) / number, [float(x) for x in losses]

    first, _ = group(1)
    yield dict(first_call_s=first / 1e3)
    if options.tune_only:
        yield dict(unfinished="only tuned")
        return
    torch.cuda.reset_peak_memory_stats()
    groups = [group(GROUP) for _ in range(options.steps // GROUP)]
    step_ms = statistics.median(ms for ms, _ in groups[1:] or groups)
    yield dict(
        step_ms=step_ms,
        step_ms_slowest=max(ms for ms, _ in groups[1:] or groups),
        tokens_per_s=1e3 * options.batch * options.length / step_ms,
        memory_gib=torch.cuda.max_memory_allocated() / 2**30,
        losses=[loss for _, losses in groups for loss in losses],
    )


def tune_side_by_side(folder):
    """Has Triton compile all configurations of a kernel by several threads before it times them,
    and time them while no other process of this folder does so on the same GPU."""
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    if getattr(Autotuner, "compiles_side_by_side", False):
        return
    Autotuner.compiles_side_by_side = True
    prune, bench = Autotuner.prune_configs, Autotuner._bench

    def prune_configs(self, kwargs):
        configs = prune(self, kwargs)
        with ThreadPoolExecutor(COMPILERS) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                self.fn.run(**{**self.nargs, **kwargs, **config.all_kwargs(), "warmup": True})
        return configs

    def timed(self, *args, **kwargs):
        with turn(folder):
            return bench(self, *args, **kwargs)

    Autotuner.prune_configs, Autotuner._bench = prune_configs, timed


@contextlib.contextmanager
def turn(folder):
    """Waits until no other process of this folder has its turn on the same GPU."""
    if folder is None:
        yield
        return
    name = f"gpu_{os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
    with open(os.path.join(folder, name), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file ends it


def show(row, seconds):
    print(f"[{seconds:6.1f} s] {row['mixer']}, {row['precision']}", end="")
    if "first_call_s" in row and "step_ms" not in row:
        print(f", first call {row['first_call_s']:.1f} s", end="")
    if "step_ms" in row:
        print(f", {row['parameters'] / 1e6:.1f} M parameters", end="")
        print(f", first call {row['first_call_s']:.1f} s", end="")
        print(f", step {row['step_ms']:.1f} ms (slowest {row['step_ms_slowest']:.1f})", end="")
        print(f", {row['tokens_per_s']:,.0f} tokens/s, {row['memory_gib']:.1f} GiB", end="")
        print(f", loss {row['losses'][-1]:.3f}", end="")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
