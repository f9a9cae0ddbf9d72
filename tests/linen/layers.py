"""The layers under test, and how to run them.

A layer joins through one `Layer` in `LAYERS`; tests of all layers name none. A case is named
"layer-case", for example "kda-plain". Arrays are NumPy's where they can be: XLA compiles every
operation on its own arrays outside of `jit` for every shape.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from layer_gsa import GSA
from layer_kda import KDA
from layer_log_linear import LOG_LINEAR
from layer_mesa import MESA
from layer_path import PATH
from layers_table import CAPACITY, D

import jla

LAYERS = {entry.name: entry for entry in (KDA, GSA, LOG_LINEAR, MESA, PATH)}
CASES = [f"{name}-{case}" for name, entry in LAYERS.items() for case in entry.cases]
PLAIN, RICH = ([f"{name}-{case}" for name in LAYERS] for case in ("plain", "rich"))
each_layer = pytest.mark.parametrize("name", LAYERS)


def _each(cases, quick):
    """All of these cases, those that are not among the `quick` ones marked slow."""
    marks = {case: [] if case in quick else [pytest.mark.slow] for case in cases}
    return pytest.mark.parametrize("case", [pytest.param(c, marks=m) for c, m in marks.items()])


each_case, each_plain, each_rich = (_each(cases, cases) for cases in (CASES, PLAIN, RICH))
# Where one layer, or one case of each, shows what there is to see, the others are slow.
first_plain, rich_first = _each(PLAIN, PLAIN[:1]), _each(CASES, RICH)


def each(field):
    """The cases that a field of the table lists, all quick."""
    cases = [f"{name}-{case}" for name, entry in LAYERS.items() for case in getattr(entry, field)]
    return _each(cases, cases)


def each_rich_of(test):
    """The rich cases, those slow that the table says are slow for this test."""
    return _each(RICH, [case for case in RICH if test not in entry(case).slow])


def entry(case):
    return LAYERS[case.split("-")[0]]


def implementations(case, *names):
    """Those of the names that the case's mechanism has."""
    return [name for name in names if name != "pallas" or entry(case).kernels]


def options(case):
    return entry(case).cases[case.split("-")[1]]


def layer(case, **more):
    """The layer on "reference", the definition, which also compiles fastest."""
    defaults = dict(implementation="reference", precision="highest")
    return entry(case).module(**defaults | options(case) | more)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def init_shapes(case, B, T=3):
    """What init makes, as shapes: most tests need no initial values, which take long to compile."""
    module = layer(case, decode=True)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((B, T, D)))


@functools.cache
def parameters(case):
    """Random parameters of a case."""
    leaves, tree = jax.tree.flatten_with_path(init_shapes(case, 1)["params"])
    values = [
        entry(case).centre.get(path[-1].key, 0.0) + 0.2 * normal(10 + i, *leaf.shape)
        for i, (path, leaf) in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, values)


def close(actual, expected, tolerance=1e-4):
    """Relative Frobenius error."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected)
    assert error <= tolerance * np.linalg.norm(expected), error / np.linalg.norm(expected)


def trees_close(actual, expected, tolerance=1e-4):
    jax.tree.map(lambda a, b: close(a, b, tolerance), actual, expected)


def run(jitted, *args):
    """What the jitted function returns, as NumPy arrays if no transformation is under way.

    Then NumPy evaluates it: XLA compiles for each case and shape, for seconds, what runs once.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
        return jitted(*args)
    return jax.device_get(evaluated(jitted)(*args))


def forward(case, params, x, mask=None, segment_ids=None):
    return run(_forward(case), params, x, mask, segment_ids)


@functools.cache
def _forward(case):
    return jax.jit(
        lambda params, x, mask, segment_ids: layer(case).apply(
            {"params": params}, x, mask=mask, segment_ids=segment_ids
        )
    )


def advance(case, params, cache, x, mask=None, segment_ids=None, implementation="reference"):
    """One decoding call: the output and the advanced cache. XLA compiles MesaNet's "xla" alone:
    what it makes of the other mechanisms' the contract's tests show."""
    jitted = _advance(case, implementation)
    if implementation == "xla" and case.startswith("mesa"):
        return jax.device_get(jitted(params, cache, x, mask, segment_ids))
    return run(jitted, params, cache, x, mask, segment_ids)


def advance_without_jit(
    case, params, cache, x, mask=None, segment_ids=None, implementation="reference"
):
    module = layer(case, decode=True, implementation=implementation)
    y, variables = module.apply(
        {"params": params, "cache": cache},
        x,
        mask=mask,
        segment_ids=segment_ids,
        mutable=["cache"],
    )
    return y, variables["cache"]


@functools.cache
def _advance(case, implementation):
    return jax.jit(
        lambda params, cache, x, mask, segment_ids: advance_without_jit(
            case, params, cache, x, mask, segment_ids, implementation
        )
    )


def empty_cache(case, B):
    zeros = functools.partial(jax.tree.map, lambda leaf: np.zeros(leaf.shape, leaf.dtype))
    return zeros(init_shapes(case, B, CAPACITY)["cache"])


def numpy_layer(case, x, params=None):
    """The layer of one sequence x [T, D], in float64: the output and the cache without its batch
    axis."""
    params = parameters(case) if params is None else params
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    return entry(case).definition(options(case), params, np.asarray(x, np.float64))


def row_of(tree, row):
    """A row of a cache; the levels of log-linear attention settled, as their definition is."""
    if "log_decays" in tree:
        given = {name: jnp.asarray(tree[name]) for name in jla.LazyLogLinearState._fields}
        levels = jla.LazyLogLinearState(**given).settled().levels
        rest = {name: x for name, x in tree.items() if name != "log_decays"}
        tree = rest | {"levels": np.asarray(levels)}
    return jax.tree.map(lambda a: a[row], tree)


def padding(pattern, lengths, T):
    """A mask [rows, T] with `lengths` real tokens in its rows."""
    mask = np.zeros((len(lengths), T), bool)
    for row, n in enumerate(lengths):
        if pattern == "left":
            mask[row, T - n :] = True
        elif pattern == "right":
            mask[row, :n] = True
        else:
            mask[row, np.random.default_rng(row).permutation(T)[:n]] = True
    return mask


SEGMENTS = ((4, 1, 6, 2), (1, 3, 3, 6))  # lengths, by row
IDS = np.array([[7] * 4 + [2] + [7] * 6 + [0] * 2, [1] + [0] * 3 + [5] * 3 + [0] * 6], np.int32)
