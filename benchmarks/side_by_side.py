"""What the comparisons of whole models share: the example's model, options, rows of JSON."""

import argparse
import dataclasses
import json
import pathlib
import sys
import traceback

import jax

from benchmarks.run import IMPLEMENTATIONS, describe

# The models, the training step and the sampling are the examples'. These are programs that import
# one another by bare names, as `python examples/train_lm.py` finds them, and so are no package.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import model as example
from model import MIXERS
from train_lm import initial_params

HYBRID = ("kda", "kda", "kda", "path")  # block by block, then from the front again


def parser(program, description):
    """The options that both comparisons have; by default about 120 million parameters."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description)
    add = made.add_argument
    add("--mixers", default=",".join(MIXERS), help="names, by commas (default: %(default)s)")
    add("--width", type=int, default=1024)
    add("--depth", type=int, default=9)
    add("--heads", type=int, default=8)
    add_run(add, "start no case after so many seconds", "case")
    return made


def add_run(add, limit, case):
    """Adds the options of how models run and where results go; `limit` says what --limit does."""
    add("--implementation", choices=IMPLEMENTATIONS, help="default: a GPU's kernels")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
    add("--limit", type=float, metavar="SECONDS", help=limit)
    add("--out", help=f"write JSON to this file, after every {case}; its other rows stay")


def add_pieces(add):
    """Adds the options of programs whose work is done in pieces."""
    add("--add", nargs="*", default=(), metavar="FILE", help="results to copy into --out first")
    help = "processes with the same folder, empty at first, do no work twice"
    add("--share", metavar="DIR", help=help)


class Shares:
    """What processes have taken of their common work: files in the folder of --share. Without one
    all is this process's."""

    def __init__(self, folder):
        self.folder, self.mine = folder and pathlib.Path(folder), set()
        if folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def take(self, *work):
        """Whether it was free; then it is this process's. `work` names it."""
        if self.taken(work):
            return False
        try:
            if self.folder:
                (self.folder / self._name(work)).touch(exist_ok=False)
        except FileExistsError:
            return False
        self.mine.add(self._name(work))
        return True

    def has_or_takes(self, *work):
        """Whether it is this process's, now at the latest."""
        return self._name(work) in self.mine or self.take(*work)

    def taken(self, work):
        name = self._name(work)
        return name in self.mine or bool(self.folder and (self.folder / name).exists())

    def _name(self, work):
        return "_".join(map(str, work)).replace("/", "_")


def parse(made, argv, more=()):
    """The options; `more` are other names that --mixers may have, as "hybrid"."""
    options = made.parse_args(argv)
    options.mixers, known = options.mixers.split(","), (*MIXERS, *more)
    if unknown := [name for name in options.mixers if name not in known]:
        made.error(f"--mixers: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    if options.width % options.heads:
        made.error(f"--width {options.width} must be a multiple of --heads {options.heads}")
    return options


def make_model(mixer, options, **more):
    """The example's model; on a GPU the kernels are asked for by name. "hybrid" has the blocks of
    HYBRID in turn."""
    implementation = options.implementation
    if implementation is None:
        implementation = "pallas" if jax.default_backend() == "gpu" else "xla"
    sizes = options.width, options.depth, options.heads
    more |= dict(dtype=options.dtype, implementation=implementation)
    if mixer != "hybrid":
        return example.make_model(mixer, *sizes, **more)
    models = {name: example.make_model(name, *sizes, **more) for name in HYBRID}
    of = [models[HYBRID[i % len(HYBRID)]].config.layers[i] for i in range(options.depth)]
    one = models[HYBRID[0]]
    config = dataclasses.replace(one.config, layers=tuple(of))
    return one.clone(config=config, stacked=False, unroll=False)


def make_params(model):
    """Random parameters. They do not depend on the implementation, and this one builds quickly."""
    return initial_params(jax.random.key(0), model=model.clone(implementation="reference"))


def size(tree):
    """The number of elements in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


INTERRUPTED = "interrupted"


def is_whole(row):
    return row.keys().isdisjoint(("error", "unfinished"))


class Report:
    """The rows of a JSON file. A new row replaces the one with the same `keys`, if there is one.

    Rows come from several runs (other mixers, other numbers of GPUs), so each has its own `meta`:
    the GPU, JAX's version, the date and the command.
    """

    def __init__(self, path, keys, program, argv, add=()):
        """add: files whose rows are added to those of `path`."""
        self.path, self.keys = path, keys
        self.meta = describe(argv, f"benchmarks.{program}")
        self.failed = False
        self.rows = []
        there = [path] if path and pathlib.Path(path).exists() else []
        for one in [*add, *there]:
            for row in json.loads(pathlib.Path(one).read_text())["results"]:
                self._put(row)
        if add:
            self._write()
        print(" | ".join(f"{key} {value}" for key, value in self.meta.items()), flush=True)

    def measure(self, row, parts):
        """Adds dicts that the generator `parts` yields, or the error it raises, to the row; keeps
        it after each. Until the end it is `unfinished`, and stays so if a part says why."""
        self.measure_all([row], ([part] for part in parts))
        return row

    def measure_all(self, rows, parts):
        """As `measure`, of several rows at once; `parts` yields a dict for each."""
        for row in rows:
            row["unfinished"] = INTERRUPTED
        try:
            for part in parts:
                for row, found in zip(rows, part, strict=True):
                    row |= found
                    self.keep(row)
            for row in rows:
                if row["unfinished"] == INTERRUPTED:
                    del row["unfinished"]
                    self.keep(row)
        except Exception as error:  # reported, and the exit code is 1
            message = f"{type(error).__name__}: {error}"
            self.failed = True
            for row in rows:
                del row["unfinished"]
                row |= dict(error=message, traceback=traceback.format_exc())
                words = [row.get(key, "") for key in self.keys]
                print(*words, "FAILED", message[:2000], flush=True)
                self.keep(row)

    def keep(self, row):
        self._put(row | dict(meta=self.meta))
        self._write()

    def find(self, row):
        """The row with the same keys, unless it has an error or is unfinished; None without one."""
        return next((x for x in self.rows if self._same(x, row) and is_whole(x)), None)

    def _same(self, one, other):
        return all(one.get(key) == other.get(key) for key in self.keys)

    def _put(self, row):
        if "unfinished" in row and self.find(row):
            return
        self.rows = [old for old in self.rows if not self._same(old, row)] + [row]

    def _write(self):
        if self.path:
            pathlib.Path(self.path).write_text(json.dumps(dict(results=self.rows), indent=1))
