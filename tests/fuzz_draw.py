"""What the fuzzer draws: calls of the mechanisms, and the numbers in them."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from mechanisms import MECHANISMS

import cases.log_linear
import cases.path
from cases import numpy_normal

TABLE = {mechanism.name: mechanism for mechanism in MECHANISMS}


@dataclasses.dataclass(frozen=True)
class Scope:
    """How large the calls are.

    longest: the most tokens.
    dims: head dimensions drawn often; others up to the largest of them are drawn too.
    heads, batch: the most of each (heads of the smaller count, and in a group).
      most: elements of the largest array that a judge may keep.
    """

    longest: int
    dims: tuple[int, ...]
    heads: int
    batch: int
    most: int


SCOPES = {
    "tiny": Scope(130, (16, 32), 2, 1, 2**20),  # for interpreted kernels
    "small": Scope(600, (16, 32, 64, 128, 256), 3, 3, 2**23),  # for a CPU
    "full": Scope(2000, (16, 32, 64, 64, 128, 128, 256), 4, 4, 2**27),  # for a GPU
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """All of a call that a program is compiled for.

    sizes: the shape letters; L is the number of levels and S the cache's capacity.
    check: "gradients", "split" or "steps".
    at: the tokens before the split, or before the first step.
    without: the arguments that are not given: the state, or gates.
    segments: the dtype of segment_ids, or None.
    narrow: the arguments that may be float32 or q's dtype and are in q's.
    options: more keyword arguments.
    """

    mechanism: str
    implementation: str
    dtype: str
    sizes: dict
    check: str = "gradients"
    at: int = 0
    without: tuple[str, ...] = ()
    segments: str | None = None
    narrow: tuple[str, ...] = ()
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Content:
    """The numbers of a call: a seed, one of the table's `stress` or None, names out of `EDITS`."""

    seed: int
    stress: str | None = None
    edits: tuple[str, ...] = ()


# Drawing.


def generator(*words):
    return np.random.default_rng([zlib.crc32(str(word).encode()) for word in words])


def chance(rng, probability):
    return bool(rng.random() < probability)


def one_of(rng, choices):
    choices = list(choices)
    return choices[rng.integers(len(choices))]


def draw_length(rng, longest):
    """1 to `longest`, mostly at a multiple of a chunk's or a tile's size, or beside one."""
    if chance(rng, 0.2):
        return int(rng.integers(1, 1 + one_of(rng, (8, longest))))
    unit = one_of(rng, [n for n in (16, 64, 128, 256) if n < longest])
    multiple = unit * int(rng.integers(1, 1 + one_of(rng, (2, longest // unit))))
    return min(longest, max(1, multiple + int(rng.integers(-1, 2))))


def draw_dim(rng, scope):
    if chance(rng, 0.8):
        return one_of(rng, scope.dims)
    multiple = one_of(rng, (1, 8))
    return multiple * int(rng.integers(-(-16 // multiple), scope.dims[-1] // multiple + 1))


def draw_sizes(rng, mechanism, scope, by_token):
    letters = {x for axes in jax.tree.leaves(dict(mechanism.axes)) for x in axes.split()}
    few, many = mechanism.heads
    heads, group = (int(rng.integers(1, scope.heads + 1)) for _ in range(2))
    if few == many:
        group = 1
    sizes = dict(B=int(rng.integers(1, scope.batch + 1)), T=draw_length(rng, scope.longest))
    sizes |= {letter: draw_dim(rng, scope) for letter in "KVM" if letter in letters}
    while True:
        B, T, K, V = (sizes[x] for x in "BTKV")
        state = K * max(K, V, sizes.get("M", 0))
        if by_token:  # the definition keeps its state at every token, PaTH's all keys
            kept = {"path": K * T, "log_linear": state * 12}.get(mechanism.name, state)
        else:
            kept = max(8 * (K + V), state // 8)
        if T == 1 or B * T * heads * group * kept <= scope.most:
            break
        if B > 1:
            sizes["B"] = 1
        elif heads > 1:
            heads = 1
        elif group > 1:
            group = 1
        else:
            sizes["T"] = (T + 1) // 2
    return sizes | {many: heads * group} | {few: heads}


def draw_shape(name, implementation, scope, seed, index):
    """The shape with this number."""
    mechanism, scope_of = TABLE[name], SCOPES[scope]
    rng = generator("shape", name, implementation, scope, seed, index)
    dtypes = mechanism.form(implementation).dtypes
    dtype = dtypes[0] if chance(rng, 0.6) else one_of(rng, dtypes)
    by_token = implementation == "reference" or (implementation, dtype) == ("xla", "float32")
    sizes = draw_sizes(rng, mechanism, scope_of, by_token)
    T, state = sizes["T"], mechanism.state[0]
    without = [state] if chance(rng, 0.4) else []
    if name in ("gsa", "path") and chance(rng, 0.3):
        without.append("g")
    check = one_of(rng, ("gradients", "gradients", "gradients", "split", "steps"))
    if T == 1 or (name == "gsa" and "g" in without):
        check = "gradients"
    if name == "gsa" and "g" in without:
        without = [state, "g"]  # ABC takes no state
    if check != "gradients" and name == "path":
        without = [n for n in without if n != state]  # it returns a cache only if given one
    at = int(rng.integers(1, T)) if check == "split" else max(1, T - int(rng.integers(1, 20)))
    if name == "path" and state not in without:
        sizes["S"] = T + one_of(rng, (0, 1, 12, 64, 100))
    if name == "log_linear":
        sizes["L"] = (T - 1).bit_length() + 1 + one_of(rng, (0, 0, 1, 2, 5))
    options = {}
    if name in ("kda", "gsa", "path") and chance(rng, 0.3):
        options["scale"] = one_of(rng, (1, 0.5, 0.05))
    if name == "mesa" and not (T <= 64 and chance(rng, 0.5)):
        options["cg_steps"] = one_of(
            rng, (60, 120, 200)
        )  # the default's 30 leave long runs unsolved
    narrow = [n for n in ("beta", "s", "level_scales", "w") if n in mechanism.axes]
    if "w" in narrow and T > 64:
        narrow.remove("w")  # rows that a rounding makes longer than 1 make keys grow without end
    return Shape(
        name,
        implementation,
        dtype,
        sizes,
        check,
        at if check != "gradients" else 0,
        tuple(without),
        one_of(rng, ("int32", "int32", "int8", "uint8")) if chance(rng, 0.4) else None,
        tuple(n for n in narrow if dtype != "float32" and chance(rng, 0.3)),
        options,
    )


def draw_content(shape, *words):
    rng = generator("content", *words)
    mechanism = TABLE[shape.mechanism]
    beyond = {x for i in mechanism.implementations for x in i.beyond if shape.dtype != "float32"}
    if shape.mechanism == "mesa" and "cg_steps" not in shape.options:
        beyond.add("equal keys, weak ridge")
    stress = [name for name in mechanism.stress if name not in beyond]
    edits = [name for name in EDITS if chance(rng, 0.12)]
    if shape.implementation == "pallas" and "repeated keys" in edits:
        # docs/kernels/kda.md: with these betas, equal keys are more than 16-bit operands can hold.
        edits = [name for name in edits if name not in ("beta to 2", "beta 0 or 2")]
    return Content(
        int(rng.integers(2**31)),
        one_of(rng, stress) if chance(rng, 0.3) and not shape.without else None,
        tuple(edits),
    )


# What the arguments hold.


def somewhere(rng, x, probability):
    """A mask of x's shape: whole tokens, heads of tokens, or single elements."""
    axes = int(rng.integers(2, x.ndim + 1))
    mask = rng.random(x.shape[:axes]) < probability
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (x.ndim - axes)), x.shape)


def gates(change):
    """An edit of the gates, where there are any."""
    return lambda args, rng: {"g": change(args["g"], rng)} if "g" in args else {}


def betas(values):
    def change(args, rng):
        return {"beta": values(rng, args["beta"].shape)} if "beta" in args else {}

    return change


def repeat_keys(args, rng):
    """Keys, and PaTH's directions, that are the token's before, here and there."""
    edits = {}
    for name in [n for n in ("k", "w") if n in args]:
        x = args[name].copy()
        for t in range(1, x.shape[1]):
            if chance(rng, 0.3):
                x[:, t] = x[:, t - 1]
        edits[name] = x
    return edits


def blank_tokens(args, rng):
    """Tokens that are nothing: zeros in q, k, v and s, here and there."""
    mask = rng.random(args["q"].shape[:2]) < one_of(rng, (0.02, 0.3))
    names = [n for n in ("q", "k", "v", "s") if n in args]
    return {n: np.where(mask[:, :, None, None], 0, args[n]) for n in names}


EDITS = {
    "no gates": gates(lambda g, rng: 0 * g),
    "weak gates": gates(lambda g, rng: 1e-3 * g),
    "tiny gates": gates(lambda g, rng: 1e-9 * g),
    "strong gates": gates(lambda g, rng: 20 * g),
    "gates of 0": gates(lambda g, rng: np.where(somewhere(rng, g, 0.5), 0, g)),
    "gates of -30": gates(lambda g, rng: np.where(somewhere(rng, g, 0.1), -30, g)),
    "gates of -1e4": gates(lambda g, rng: np.where(somewhere(rng, g, 0.02), -1e4, g)),
    "beta to 2": betas(lambda rng, shape: rng.uniform(0, 2, shape)),
    "beta 0 or 1": betas(lambda rng, shape: rng.integers(0, 2, shape)),
    "beta 0 or 2": betas(lambda rng, shape: 2 * rng.integers(0, 2, shape)),
    "repeated keys": repeat_keys,
    "blank tokens": blank_tokens,
    "values of many sizes": lambda args, rng: {
        "v": args["v"] * np.exp(rng.uniform(-2, 2, args["v"].shape[:3]))[..., None]
    },
    "an empty state": lambda args, rng: {
        n: jax.tree.map(np.zeros_like, args[n]) for n in ("initial_state", "cache") if n in args
    },
}


def draw_ids(rng, B, T, dtype, same):
    """Segments as long as one of a few random lengths; none begins at token `same` or, with a check
    by steps, after it."""
    ids = np.zeros((B, T), np.int64)
    for row in ids:
        if chance(rng, 0.8):
            longest = one_of(rng, (1, 3, 20, 70, 300, T))
            borders = np.cumsum(rng.integers(1, longest + 1, T))
            if chance(rng, 0.3):
                borders = [draw_length(rng, T) for _ in range(3)] if T > 16 else borders
            row[:] = np.searchsorted(np.unique(borders), np.arange(T), side="right")
    for t in same:
        ids[:, t:] += (ids[:, t - 1] - ids[:, t])[:, None]
    return (ids % 100).astype(dtype)


def place_state(rng, shape, state):
    """The state at other positions than the table's: any that the capacity and T admit."""
    sizes, normal = shape.sizes, numpy_normal(rng)
    B, T = sizes["B"], sizes["T"]
    if shape.mechanism == "log_linear":
        position = rng.integers(0, max(1, 2 ** (sizes["L"] - 1) - T), B)
        return cases.log_linear.state(sizes, normal, position)
    if shape.mechanism == "path":

        def decays(*shape):
            return -np.cumsum(rng.exponential(size=shape), 1)[:, ::-1].astype(np.float32)

        length = rng.integers(0, sizes["S"] - T + 1, B)
        dtype, decays = state.value.dtype, None if state.decay is None else decays
        return cases.path.cache(sizes, normal, dtype, length, decays)
    return state


def build(shape, content):
    """The arguments of a call, and its segment_ids or None."""
    mechanism, rng = TABLE[shape.mechanism], generator("numbers", content.seed)
    args = mechanism.make(shape.sizes, numpy_normal(rng), jnp.dtype(shape.dtype))
    if content.stress:
        args = mechanism.stress[content.stress](args)
    dtypes = {n: x.dtype for n, x in args.items() if isinstance(x, np.ndarray)}
    state = mechanism.state[0]
    if "L" in shape.sizes:
        levels = np.arange(shape.sizes["L"]) % args["level_scales"].shape[-1]
        args["level_scales"] = args["level_scales"][..., levels]
    for name in shape.without:
        del args[name]
    if "g" in shape.without and state in args:
        args[state] = args[state]._replace(decay=None)
    if state in args:
        args[state] = place_state(rng, shape, args[state])
    for edit in content.edits:
        args |= EDITS[edit](args, rng)
    dtypes |= dict.fromkeys(shape.narrow, jnp.dtype(shape.dtype))
    args = {n: x.astype(dtypes[n]) if n in dtypes else x for n, x in args.items()}
    ids = None
    if shape.segments:
        T = shape.sizes["T"]
        same = dict(gradients=(), split=(shape.at,), steps=range(shape.at, T))[shape.check]
        ids = draw_ids(rng, shape.sizes["B"], T, shape.segments, same)
    return jax.tree.map(jnp.asarray, (args, ids))
