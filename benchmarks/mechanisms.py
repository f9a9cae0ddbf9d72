"""What is timed: one entry of MECHANISMS for each mechanism, and nothing else to write."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

import cases.gsa
import cases.kda
import cases.log_linear
import cases.mesa
import cases.path
import jla
from benchmarks import fla
from jla import _fused  # not public: what the layers of jla call

f32, bf16 = jnp.float32, jnp.bfloat16
CG_STEPS = 30  # of MesaNet


@dataclass(frozen=True)
class Shape:
    """One case: its group (a word of --what), its sizes, and what is measured at it.

    D is the dimension of keys and values, M the number of slots, HQ that of query heads (H if
    None), HK that of key heads and S that of cached tokens, of a mechanism that has them. R are the
    rows of the pool that a step's B rows are in; None for no pool. In the group "context" T are the
    tokens of each device; for the measure "layer", those of all.
    """

    name: str
    group: str
    B: int
    T: int
    H: int = 16
    D: int = 128
    M: int | None = None
    HQ: int | None = None
    HK: int = 1
    S: int | None = None
    R: int | None = None
    packed: bool = False
    measures: tuple = ("forward", "backward")

    @property
    def sizes(self):
        """The letters of the mechanisms' axes, for `cases`. A step's arguments have no T."""
        time = {} if self.group in ("step", "step_slots") else dict(T=self.T)
        heads = dict(H=self.H, HV=self.H, HQ=self.HQ or self.H, HK=self.HK)
        return time | heads | dict(B=self.B, K=self.D, V=self.D, M=self.M, S=self.S)


@dataclass(frozen=True)
class Mechanism:
    """A mechanism's entry.

    Attributes:
      function: the public function; the first thing it returns is `o`.
      raw: `raw(key, sizes)` makes what the layer's projections give, a dict of arrays.
      prepare: turns such a dict into the public function's arguments, also a dict.
      shapes: the lists of cases, by the words of --shapes.
      targets: the goal for (shape, measure, column), on one H200, for the "pallas" implementation.
      step, state: `step(arguments, state, implementation, slots=None) -> (o, state)` and
        `state(key, sizes)`.
      fla, fla_step: make fla's `(forward, inputs)` for a shape; None if it has no such function.
      unbatched: the arguments of the public function that have no batch axis.
      quadratic: whether the work of a sequence grows with the square of its tokens.
      whole: what a layer calls instead, with what `raw` makes, where kernels do a part of what
        `prepare` does: `whole(raw, segment_ids=..., implementation=...)`; None if there is no such.
      forced: the function with nothing stopping early, for the measures whose names start with it;
        None if nothing does.
    """

    function: Callable
    raw: Callable
    prepare: Callable
    shapes: dict
    targets: dict
    step: Callable
    state: Callable
    fla: Callable | None = None
    fla_step: Callable | None = None
    unbatched: tuple = ()
    quadratic: bool = False
    forced: Callable | None = None
    whole: Callable | None = None


def segment_borders(key, B, T, documents=8):
    """Segment ids int32 [B, T] with random borders, about `documents` segments a row."""
    return jnp.cumsum(jax.random.bernoulli(key, documents / T, (B, T)), axis=1, dtype=jnp.int32)


def _l2norm(x):
    """x with last axes of length 1, computed in float32, as the layers make them."""
    x32 = x.astype(f32)
    squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(squares + 1e-6)).astype(x.dtype)


def _normals(keys, mechanism, names, sizes):
    """Normal numbers in bfloat16 for arguments of a mechanism, a key for each."""
    shapes = {name: cases.shape_of(mechanism.AXES[name], sizes) for name in names.split()}
    return {name: jax.random.normal(next(keys), shape, bf16) for name, shape in shapes.items()}


def _kda_raw(key, sizes):
    keys = iter(jax.random.split(key, 7))
    raw = _normals(keys, cases.kda, "q k v g beta", sizes)
    raw["A_log"] = jnp.log(jax.random.uniform(next(keys), raw["g"].shape[-2:-1], f32, 1.0, 16.0))
    raw["dt_bias"] = jax.random.normal(next(keys), raw["g"].shape[-2:], f32) - 4.0
    return raw


def _kda_prepare(raw):
    return dict(
        q=_l2norm(raw["q"]),
        k=_l2norm(raw["k"]),
        v=raw["v"],
        g=jla.kda_gate(raw["g"], raw["A_log"], raw["dt_bias"]),
        beta=jax.nn.sigmoid(raw["beta"].astype(f32)),
    )


def _kda_whole(raw, **options):
    """The function with its l2 norms and gates, as kernels of layers take them."""
    beta = jax.nn.sigmoid(raw["beta"].astype(f32))
    arguments = {("f" if name == "g" else name): x for name, x in raw.items()} | dict(beta=beta)
    return _fused.kda_from_projection(**arguments, normalize=True, **options)


def _kda_step(arguments, state, implementation, **slots):
    return jla.kda_step(**arguments, state=state, implementation=implementation, **slots)


def _kda_state(key, sizes):
    return cases.kda.state(sizes, cases.jax_normal(key))


def _gsa_raw(key, sizes):
    raw = _normals(iter(jax.random.split(key, 4)), cases.gsa, "q k v g", sizes)
    raw["f"] = raw.pop("g")  # of the gates' shape
    return raw


def _gsa_prepare(raw):
    g = jax.nn.log_sigmoid(raw["f"].astype(f32)) / 8
    return dict(q=raw["q"], k=raw["k"], v=raw["v"], s=-jnp.expm1(g).astype(bf16), g=g)


def _gsa_step(arguments, state, implementation, **slots):
    options = dict(scale=1.0, implementation=implementation)
    return jla.gsa_step(**arguments, state=state, **options, **slots)


def _gsa_state(key, sizes):
    return cases.gsa.state(sizes, cases.jax_normal(key))


# A step of log-linear attention is one at position 4095, with twelve levels in use and a state
# after it that has a level more; or with six of the twelve, as the average position has.
_POSITION, _AVERAGE_POSITION = 4095, 0b101010101010


def _log_linear_levels(sizes):
    T = sizes.get("T")
    return sizes | dict(L=14 if T is None else (T - 1).bit_length() + 1)


def _log_linear_raw(key, sizes):
    """Gates and level scales are given, as fla's function takes them; v has its step size in it."""
    sizes = _log_linear_levels(sizes)
    keys = iter(jax.random.split(key, 6))
    gates = cases.shape_of(cases.log_linear.AXES["g"], sizes)
    dt = jax.nn.softplus(jax.random.normal(next(keys), gates, f32) - 4)
    rate = jnp.exp(jax.random.uniform(next(keys), gates[-1:], f32))
    raw = _normals(keys, cases.log_linear, "q k", sizes)
    v = jax.random.normal(next(keys), cases.shape_of(cases.log_linear.AXES["v"], sizes), f32)
    raw |= dict(v=(dt[..., None] * v).astype(bf16), g=-rate * dt)
    return raw | _normals(keys, cases.log_linear, "level_scales", sizes)


def _log_linear(**arguments):
    """Without the state: where T is a power of two, the levels that serve T do not hold it."""
    return jla.log_linear_attention(**arguments)[0], None


def _log_linear_step(arguments, state, implementation, **slots):
    """Always at the same position, so that as many levels are in use; what a step leaves there of
    the sums of log decays is that of one token more."""
    options = dict(implementation=implementation) | slots
    o, after = jla.log_linear_step(**arguments, state=state, **options)
    return o, after._replace(position=state.position)


def _log_linear_state(key, sizes):
    """Lazy, as the layer's cache is. S stands for the position."""
    position = np.full(sizes["B"], sizes["S"] or _POSITION)
    sizes = _log_linear_levels(sizes)
    state = cases.log_linear.state(sizes, cases.jax_normal(key), position)
    return jax.tree.map(jnp.asarray, state).lazy()


def _mesa_raw(key, sizes):
    """Gates, betas and ridges are given, as fla's function takes them."""
    keys = iter(jax.random.split(key, 6))
    raw = _normals(keys, cases.mesa, "q k v", sizes)
    gates, ridges = (cases.shape_of(cases.mesa.AXES[name], sizes) for name in ("g", "lamb"))
    raw["g"] = jax.nn.log_sigmoid(jax.random.normal(next(keys), gates, f32) + 4)
    raw["beta"] = jax.random.uniform(next(keys), gates, f32)
    raw["lamb"] = jax.random.uniform(next(keys), ridges, f32, 0.25, 1.25)
    return raw


def _mesa_prepare(raw):
    return raw | dict(q=_l2norm(raw["q"]), k=_l2norm(raw["k"]))


def _mesa_step(arguments, state, implementation, **slots):
    return jla.mesa_step(**arguments, state=state, implementation=implementation, **slots)


def _mesa_state(key, sizes):
    return cases.mesa.state(sizes, cases.jax_normal(key))


def _mesa_forced(q, k, v, g, beta, lamb, *, implementation):
    """All iterations of the kernels' conjugate gradients, though no row needs them.

    Only a benchmark wants that, so `jla.mesa_net` has no setting for it, and this calls the
    kernels' wrappers. Other benchmarks use public names; tests/test_layout.py has the exceptions.
    """
    if implementation == "pallas":
        from jla.pallas.mesa_net import mesa_net
    elif implementation == "triton":
        from jla.triton.mesa_net import mesa_net
    else:
        raise ValueError(
            f"implementation={implementation!r} cannot make all iterations on demand; "
            'implementation="pallas" or "triton" can'
        )
    return mesa_net(q, k, v, g, beta, lamb, None, None, cg_steps=CG_STEPS, tolerance=0.0)


def _path_raw(key, sizes, gates=False):
    """Unit directions, strengths and gates are given, as fla's function takes them."""
    keys = iter(jax.random.split(key, 6))
    raw = _normals(keys, cases.path, "q k v", sizes)
    shapes = {name: cases.shape_of(cases.path.AXES[name], sizes) for name in ("w", "beta", "g")}
    raw["w"] = _l2norm(jax.random.normal(next(keys), shapes["w"], f32))
    raw["beta"] = jax.random.uniform(next(keys), shapes["beta"], f32, 0.0, 2.0)
    if gates:
        raw["g"] = jax.nn.log_sigmoid(jax.random.normal(next(keys), shapes["g"], f32) + 4)
    return raw


def _path_step(arguments, state, implementation, **slots):
    """The same place is written at every step, so that the cache stays as long as it is."""
    arguments = dict(g=None) | arguments
    options = dict(implementation=implementation) | slots
    o, cache = jla.path_step(**arguments, cache=state, **options)
    return o, cache._replace(length=state.length if slots else cache.length - 1)


def _path_state(key, sizes, gates=False, key_dtype=f32):
    """A lazy cache of S tokens; of 31 more, if all the keys of S would be settled. A pool is
    not lazy."""
    keys, is_pool = jax.random.split(key), "R" in sizes
    tokens = sizes["S"] if sizes["S"] % 64 else sizes["S"] + 31
    length, sizes = np.full(sizes["B"], tokens), dict(sizes) | dict(S=tokens // 64 * 64 + 64)

    def decays(*shape):
        return -jax.random.uniform(keys[1], shape, f32)

    normal = cases.jax_normal(keys[0])
    cache = cases.path.cache(sizes, normal, bf16, length, decays if gates else None)
    cache = jax.tree.map(jnp.asarray, cache)
    return cache if is_pool else cache.lazy(key_dtype)


# The sweep has main's number of tokens; main and long belong to its curve.
_ALL = ("forward", "backward", "bare_forward", "bare_backward", "errors")
_TIMES = ("forward", "backward")
_STEPS = ("step", "step16", "step16_bare")
# The step's rows somewhere in a pool of eight times as many.
_SLOTTED = ("step16", "step16_bare")
_FULL = (
    Shape("main", "main", 8, 4096, measures=_ALL),
    Shape("step", "step", 128, 1, measures=_STEPS),
    Shape("step slots", "step_slots", 128, 1, R=1024, measures=_SLOTTED),
    Shape("long 32768", "long", 1, 32768),
    Shape("long 131072", "long", 1, 131072),
    Shape("context", "context", 1, 131072),
    Shape("ragged", "ragged", 32, 1000, measures=(*_TIMES, "errors")),
    Shape("packed", "packed", 8, 4096, packed=True, measures=(*_TIMES, "errors")),
    *(Shape(f"sweep {T}", "sweep", 32768 // T, T) for T in (512, 1024, 2048, 8192, 16384)),
)
_SMALL = (
    Shape("main", "main", 2, 64, 2, 16, measures=_ALL),
    Shape("step", "step", 2, 1, 2, 16, measures=_STEPS),
    Shape("step slots", "step_slots", 2, 1, 2, 16, R=5, measures=_SLOTTED),
    Shape("long", "long", 1, 256, 2, 16),
    Shape("context", "context", 1, 32, 2, 16),
    Shape("ragged", "ragged", 2, 50, 2, 16, measures=(*_TIMES, "errors")),
    Shape("packed", "packed", 2, 64, 2, 16, packed=True, measures=(*_TIMES, "errors")),
    Shape("sweep", "sweep", 1, 128, 2, 16),
)
# One sequence over all devices, through a layer.
_MILLION = Shape("one sequence", "context", 1, 2**20, measures=("layer",))


def _with_forced(shapes):
    """Main also with all iterations."""
    measures = (*_ALL, "forced_forward", "forced_backward")
    return tuple(replace(s, measures=measures) if s.name == "main" else s for s in shapes)


def _with_slots(shapes, M):
    return tuple(replace(shape, M=M) for shape in shapes)


# Other numbers of slots and head dimensions, at main's B, T and H.
_SLOTS = tuple(
    Shape(f"slots {M} dim {D}", "slots", 8, 4096, D=D, M=M, measures=(*_TIMES, "errors"))
    for M, D in ((16, 128), (32, 128), (128, 128), (64, 64), (64, 256))
)

# As many key heads as heads, and the dimensions of Mamba-2.
_KEY_HEADS = (
    Shape("key heads 16", "grouped", 8, 4096, HK=16, measures=(*_TIMES, "errors")),
    Shape("dim 64", "grouped", 8, 4096, D=64, measures=(*_TIMES, "errors")),
)

# Steps at another position.
_AVERAGE = (Shape("step average", "step", 128, 1, S=_AVERAGE_POSITION, measures=_STEPS),)


def _with_cache(shapes, S, **more):
    """Steps from S cached tokens; `more` by group."""

    def changed(shape):
        if shape.group not in ("step", "step_slots"):
            return shape
        return replace(shape, S=S, **more.get(shape.group, {}))

    return tuple(map(changed, shapes))


# Grouped query heads; steps from 8192 cached tokens, lazily, and the one in 64 that moves all keys
# on; steps of a pool, whose 256 rows have 26 GB.
_PATH = (
    *_with_cache(_FULL, 8192, step=dict(B=64), step_slots=dict(B=64, R=256)),
    Shape("step 64th", "step", 64, 1, S=8191, measures=("step",)),
    Shape("grouped", "grouped", 8, 4096, 8, HQ=32, measures=(*_TIMES, "errors")),
)
_PATH_SMALL = _with_cache(_SMALL, 20)

MECHANISMS = {
    "kda": Mechanism(
        function=jla.kda,
        raw=_kda_raw,
        prepare=_kda_prepare,
        whole=_kda_whole,
        shapes=dict(full=(*_FULL, _MILLION), small=(*_SMALL, replace(_MILLION, T=256, H=2, D=16))),
        targets={
            ("main", "forward", "ms"): 0.9,
            ("main", "backward", "ms"): 4.5,
            ("main", "backward", "memory_gib"): 4.02,
            ("main", "backward", "first_call_s"): 20.0,
            ("step", "step16", "ms"): 0.075,
        },
        step=_kda_step,
        state=_kda_state,
        fla=fla.kda,
        fla_step=fla.kda_step,
    ),
    "gsa": Mechanism(
        function=functools.partial(jla.gsa, scale=1.0),
        raw=_gsa_raw,
        prepare=_gsa_prepare,
        shapes=dict(full=_with_slots(_FULL, 64) + _SLOTS, small=_with_slots(_SMALL, 16)),
        targets={
            ("main", "forward", "ms"): 0.8,
            ("main", "backward", "ms"): 4.0,
            ("main", "backward", "memory_gib"): 2.69,
            ("main", "backward", "first_call_s"): 20.0,
            ("step", "step16", "ms"): 0.072,
        },
        step=_gsa_step,
        state=_gsa_state,
        fla=fla.gsa,
        fla_step=fla.gsa_step,
    ),
    "log_linear": Mechanism(
        function=_log_linear,
        raw=_log_linear_raw,
        prepare=dict,
        shapes=dict(full=_FULL + _KEY_HEADS + _AVERAGE, small=_SMALL),
        targets={
            ("main", "forward", "ms"): 1.0,
            ("main", "backward", "ms"): 4.5,
            # fla's 1.54, and the states of the blocks of 256 tokens.
            ("main", "backward", "memory_gib"): 1.6,
            ("main", "backward", "first_call_s"): 20.0,
            # 1.15 times reading twelve levels and writing one, at 4.29 TB/s.
            ("step", "step16", "ms"): 0.47,
            ("step average", "step16", "ms"): 0.30,
        },
        step=_log_linear_step,
        state=_log_linear_state,
        fla=fla.log_linear,
    ),
    "mesa": Mechanism(
        function=functools.partial(jla.mesa_net, cg_steps=CG_STEPS),
        raw=_mesa_raw,
        prepare=_mesa_prepare,
        shapes=dict(full=_with_forced(_FULL), small=_SMALL),
        targets={
            ("main", "forced_forward", "ms"): 3.0,
            ("main", "forced_backward", "ms"): 9.0,
            ("main", "backward", "memory_gib"): 2.52,
            ("main", "backward", "first_call_s"): 20.0,
            ("step", "step16", "ms"): 0.2,
        },
        step=_mesa_step,
        state=_mesa_state,
        fla=fla.mesa,
        fla_step=fla.mesa_step,
        unbatched=("lamb",),
        forced=_mesa_forced,
    ),
    "path": Mechanism(
        function=jla.path_attention,
        raw=_path_raw,
        prepare=dict,
        shapes=dict(full=_PATH, small=_PATH_SMALL),
        targets={
            ("main", "forward", "ms"): 1.8,
            ("main", "backward", "ms"): 8.0,
            ("main", "backward", "memory_gib"): 2.0,
            ("main", "backward", "first_call_s"): 20.0,
            # 1.13 times reading the keys and the values, at 4.3 TB/s.
            ("step", "step16", "ms"): 1.7,
        },
        step=_path_step,
        state=_path_state,
        fla=fla.path,
        quadratic=True,
    ),
    "path_fox": Mechanism(
        function=jla.path_attention,
        raw=functools.partial(_path_raw, gates=True),
        prepare=dict,
        shapes=dict(full=_PATH, small=_PATH_SMALL),
        targets={
            ("main", "forward", "ms"): 1.98,
            ("main", "backward", "ms"): 8.8,
            ("main", "backward", "memory_gib"): 2.0,
            ("main", "backward", "first_call_s"): 20.0,
            ("step", "step16", "ms"): 1.7,
        },
        step=_path_step,
        state=functools.partial(_path_state, gates=True),
        fla=fla.path_fox,
        quadratic=True,
    ),
}
