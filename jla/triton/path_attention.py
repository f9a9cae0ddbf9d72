"""PaTH attention as Triton kernels; docs/triton.md has their list.

The leaves of the tree have 64 tokens. `path_inverses`, `path_leaf_keys` and `path_leaf_queries`
make what a leaf is by itself and its first versions, `path_joined` and `path_chains` the rest of
the tree; `path_forward` is flash attention over it. The backward pass makes the tree again, then
goes back in the same order.
"""

import functools

import jax
import jax.numpy as jnp
import triton
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jla._core import dyadic
from jla._core.axes import PATH, letters
from jla._core.derivatives import reverse_only
from jla._core.path_cache import carried_on
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise
from jla.triton import configs, launch
from jla.triton.kernels import path_backward, path_forward, path_leaf_gradients, path_leaves
from jla.triton.kernels.path_tree import LEAF
from jla.triton.path_step import path_step

__all__ = ["path_attention", "path_step", "unsupported"]

SDS = jax.ShapeDtypeStruct
f16, f32 = jnp.float16, jnp.float32

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
SIZE = LEAF.value
NEVER = -1e30  # the gate of a segment's first token: finite, and its exponential is 0

_INPUTS = letters(PATH, "q k v w beta g")
_OUTPUT = PATH["o"]
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
_KEPT = {"path_output": _OUTPUT, "path_logsumexp": "B HQ TP", "path_inverse": "B H N C D"}


def unsupported(name, *arrays, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None: they serve
    all that the public function takes."""
    return None


@functools.partial(jax.jit, static_argnames=("scale", "logsumexps"))
@reverse_only("jla.path_attention")
def path_attention(q, k, v, w, beta, g, cache, segment_ids, *, scale, logsumexps=False):
    """Pads to pairs of leaves and powers of two, and runs the kernels. See `jla.path_attention`;
    with `logsumexps` returns o in float32 and the logits' log-sum-exp, [B, T, HQ].

    Of 16-bit inputs, products of queries and keys take float16 operands and add in float32; of
    float32 inputs all products are three TF32 products. What has to do with a cache is float32, and
    around the kernels.
    """
    given = q, k, v, w, beta, g, cache, segment_ids
    T, V, given_scale = q.shape[1], v.shape[-1], scale
    if g is not None:
        g = jnp.maximum(scale * LOG2E * g, NEVER)
    if segment_ids is not None:
        starts = segment_starts(segment_ids)[:, :, None]
        g = jnp.where(starts, NEVER, jnp.zeros(q.shape[:3], f32) if g is None else g)
    q, k, v, w = (_padded(x) for x in (q, k, v, w))
    beta = _padded(beta.astype(f32), features=False)
    g = None if g is None else _padded(g, features=False)
    o, logsumexp = _attention(q, k, v, w, beta, g, scale)
    o = o[:, :T, :, :V]
    if logsumexps:
        return o.astype(f32), jnp.swapaxes(logsumexp[:, :, :T], 1, 2) / LOG2E
    if cache is not None:
        logsumexp = jnp.swapaxes(logsumexp[:, :, :T], 1, 2) / LOG2E
        o, cache = carried_on(o, logsumexp, *given, scale=given_scale)
    return o.astype(v.dtype), cache


def _padded(x, *, features=True):
    """Tokens of zeros change nothing for those before them; features of zeros stay zero."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % (2 * SIZE))
    if features:
        widths[-1] = (0, triton.next_power_of_2(x.shape[-1]) - x.shape[-1])
    return jnp.pad(x, widths) if any(n for _, n in widths) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, w, beta, g, scale):
    """PaTH attention on pairs of leaves, g scaled and in base 2.

    Returns the outputs and the logits' log-sum-exp in base 2, [B, HQ, T].
    """
    return _attention_forward(q, k, v, w, beta, g, scale)[0]


def _attention_forward(q, k, v, w, beta, g, scale):
    ratio = None
    if q.dtype != f32:
        w, ratio = dyadic.rounded(w)
    if ratio is not None:
        beta = beta * ratio
    inputs = tuple(x for x in (q, k, v, w, beta, g) if x is not None)
    run = functools.partial(_forward, scale=scale)
    kept = shardwise(run, _INPUTS[: len(inputs)], tuple(_KEPT.values()))(*inputs)
    kept = tuple(map(checkpoint_name, kept, _KEPT))
    return kept[:2], (inputs, ratio, kept)


def _attention_backward(scale, residuals, cotangents):
    inputs, ratio, kept = residuals
    axes = _INPUTS[: len(inputs)]
    run = functools.partial(_backward, scale=scale)
    out_axes = tuple(_KEPT.values())
    gradients = shardwise(run, (*axes, *out_axes, *out_axes[:2]), axes)(*inputs, *kept, *cotangents)
    dq, dk, dv, dw, dbeta, *dg = gradients
    if ratio is None:
        dw = dw.astype(inputs[3].dtype)
    else:
        dbeta = dbeta * ratio
    return dq, dk, dv, dw, dbeta, *(dg or [None])


defvjp(_attention, _attention_forward, _attention_backward)


# Blocks of features are at most all features.
_LIMITS = {"BK": "K", "BV": "V", "BH": "K"}


class _Tree:
    """The sizes of a call, and its kernels that make the tree."""

    def __init__(self, q, k, v, g, scale):
        (self.B, self.T, self.HQ, self.K), self.H, self.V = q.shape, k.shape[2], v.shape[-1]
        self.P = self.T // SIZE
        self.levels = dyadic.number(self.P)
        self.R, self.S = (sum(f(self.P)) for f in (dyadic.query_counts, dyadic.key_counts))
        self.N = sum(dyadic.block_counts(self.P))
        self.sixteen = q.dtype != f32
        self.dtype = f16 if self.sixteen else f32
        self.scale = scale * LOG2E
        self.gates = g is not None

    def call(self, name, module, *arrays, programs, outputs, in_place=None, **constants):
        """Runs the kernel `name` of a module, in the blocks of its config.

        Args:
          programs: how many, from the constants. constants: those that are not the tree's own.
        """
        kernel = getattr(module, name)
        own = dict(HQ=self.HQ, H=self.H, K=self.K, V=self.V, SCALE=self.scale, GATES=self.gates)
        own |= dict(PRECISION="tf32" if self.sixteen else "tf32x3")
        constants |= {n: x for n, x in own.items() if n in kernel.arg_names}
        widest = max(constants[n] for n in "KV" if n in constants)
        kind = ("_256" if widest > 128 else "") + ("" if self.sixteen else "_float32")
        config = configs.config(name + kind, launch.target())
        for block, size in config.blocks.items():
            constants[block] = min(size, own[_LIMITS[block]]) if block in _LIMITS else size
        return launch.call(
            kernel, *arrays, grid=(programs(constants),), outputs=outputs, config=config,
            constants=constants, in_place=in_place,
        )  # fmt: skip

    def key_leaves(self, _):
        return self.B * self.H * self.P

    def query_leaves(self, _):
        return self.B * self.HQ * self.P

    def rows(self, heads, count, *more, dtype=None):
        return SDS((self.B, heads, count, SIZE, *more), dtype or self.dtype)


def _inverses(tree, w, beta):
    return tree.call(
        "path_inverses", path_leaves, w, beta, tree.P,
        programs=tree.key_leaves, outputs=[tree.rows(tree.H, tree.P, SIZE)],
    )[0]  # fmt: skip


def _grown(tree, q, k, w, beta, g, inverse):
    """All versions of queries and keys, the leaves' own probabilities and largest logits, their X
    and W', and all blocks' transforms."""
    B, HQ, H, P, K = tree.B, tree.HQ, tree.H, tree.P, tree.K
    inner, writes, keys, transforms = tree.call(
        "path_leaf_keys", path_leaves, k, w, beta, inverse, P, tree.S, tree.N,
        programs=tree.key_leaves,
        outputs=[
            tree.rows(H, P, SIZE), tree.rows(H, P, K), tree.rows(H, tree.S, K),
            SDS((B, H, tree.N, K, K), tree.dtype),
        ],
    )  # fmt: skip
    queries, own, highest = tree.call(
        "path_leaf_queries", path_leaves, q, k, w, q if g is None else g, inner, writes, P, tree.R,
        programs=tree.query_leaves,
        outputs=[tree.rows(HQ, tree.R, K), tree.rows(HQ, P, SIZE), SDS((B, HQ, P * SIZE), f32)],
    )  # fmt: skip
    for level in range(1, len(dyadic.block_counts(P))):
        (transforms,) = tree.call(
            "path_joined", path_leaves, transforms, level + 2, P, tree.N,
            programs=lambda x, n=level: B * H * (P >> n) * (K // x["BK"]) ** 2,
            outputs=[transforms], in_place={0: 0},
        )  # fmt: skip
    if tree.levels > 1:
        (queries,) = tree.call(
            "path_chains", path_leaves, queries, transforms, tree.levels, P, tree.R, tree.N,
            programs=tree.query_leaves, outputs=[queries], in_place={0: 0}, HEADS=HQ, KEYS=False,
        )  # fmt: skip
        (keys,) = tree.call(
            "path_chains", path_leaves, keys, transforms, tree.levels, P, tree.S, tree.N,
            programs=tree.key_leaves, outputs=[keys], in_place={0: 0}, HEADS=H, KEYS=True,
        )  # fmt: skip
    return queries, keys, own, highest, inner, writes, transforms


def _gates(g, like):
    """The gates from and to the levels' middles; without gates what no kernel reads."""
    return (like, like) if g is None else dyadic.level_sums(g, SIZE)


def _forward(q, k, v, w, beta, g=None, *, scale):
    tree = _Tree(q, k, v, g, scale)
    inverse = _inverses(tree, w, beta)
    queries, keys, own, highest, *_ = _grown(tree, q, k, w, beta, g, inverse)
    o, lse = tree.call(
        "path_forward", path_forward, queries, keys, v, own, highest, *_gates(g, highest),
        tree.levels, tree.P, tree.R, tree.S,
        programs=lambda x: tree.B * tree.HQ * tree.T // x["BLOCK"],
        outputs=[SDS((*q.shape[:3], tree.V), v.dtype), highest],
    )  # fmt: skip
    return o, lse, inverse


def _backward(q, k, v, w, beta, *rest, scale):
    """All gradients; dw is float32."""
    # The tree is made again: XLA would else find that of the forward pass to be the same, and keep
    # it until here, a gigabyte for each layer of a model.
    q, k, v, w, beta, *rest = lax.optimization_barrier((q, k, v, w, beta, *rest))
    *g, o, lse, inverse, do, dlse = rest
    delta = jnp.moveaxis(jnp.sum(do.astype(f32) * o.astype(f32), -1), 1, 2) - LOG2E * dlse
    unit = dyadic.gradient_unit(v, do, dlse) if q.dtype != f32 else jnp.ones(k.shape[::2], f32)
    group = q.shape[2] // k.shape[2]
    delta = delta * jnp.repeat(unit, group, 1)[:, :, None]
    g = g[0] if g else None
    tree = _Tree(q, k, v, g, scale)
    queries, keys, own, highest, inner, writes, transforms = _grown(tree, q, k, w, beta, g, inverse)
    B, HQ, H, P, K = tree.B, tree.HQ, tree.H, tree.P, tree.K
    R, S, N = tree.R, tree.S, tree.N
    gates, sizes = _gates(g, highest), (tree.levels, P, R, S, N)
    none = SDS((1,), f32)
    softmax = lse, delta, unit

    def of_rows(heads, count):
        return SDS((B, heads, count * SIZE), f32)

    dkeys, key_factors, dv, by_key = tree.call(
        "path_key_gradients", path_backward, queries, keys, v, do, *softmax, transforms, own,
        highest, *gates, *sizes,
        programs=lambda x: B * H * tree.T // x["BLOCK"],
        outputs=[keys, of_rows(H, S), v, none if g is None else of_rows(HQ, S)],
    )  # fmt: skip
    dqueries, query_factors, by_query = tree.call(
        "path_query_gradients", path_backward, queries, keys, v, do, *softmax, transforms,
        *gates, *sizes,
        programs=lambda x: B * HQ * tree.T // x["BLOCK"],
        outputs=[queries, of_rows(HQ, R), none if g is None else of_rows(HQ, R)],
    )  # fmt: skip
    dtransforms = unit
    counts = dyadic.block_counts(P)
    if tree.levels > 1:
        for level in reversed(range(len(counts))):
            (dtransforms,) = tree.call(
                "path_transform_gradients", path_backward, queries, dqueries, query_factors, keys,
                dkeys, key_factors, transforms, dtransforms, level + 2, P, R, S, N,
                programs=lambda x, n=level: B * H * counts[n] * (K // x["BK"]) ** 2,
                outputs=[SDS((B, H, counts[level], K, K), f32)], PARENTS=level + 1 < len(counts),
            )  # fmt: skip
    square = tree.rows(HQ, P, SIZE, dtype=f32)
    passed, down, e, dq, own_sums = tree.call(
        "path_leaf_query_gradients", path_leaf_gradients, q, k, w, v, do, own, highest, *softmax,
        inner, writes, dqueries, query_factors, P, R,
        programs=tree.query_leaves, outputs=[square, square, square, q, none if g is None else g],
    )  # fmt: skip
    square = tree.rows(H, P, SIZE, dtype=f32)
    dinner, dm, part = tree.call(
        "path_leaf_transform_gradients", path_leaf_gradients, q, w, beta, inverse, inner, writes,
        passed, down, e, dqueries, query_factors, dkeys, key_factors, dtransforms, P, R, S,
        programs=tree.key_leaves, outputs=[square, square, tree.rows(H, P, K, dtype=f32)],
        TRANSFORMS=tree.levels > 1,
    )  # fmt: skip
    dk, dw, dbeta = tree.call(
        "path_leaf_key_gradients", path_leaf_gradients, q, k, w, beta, inverse, down, dinner, dm,
        part, dkeys, key_factors, unit, P, S,
        programs=tree.key_leaves, outputs=[k, SDS(w.shape, f32), beta],
    )  # fmt: skip
    gradients = dq, dk, dv, dw, dbeta
    if g is None:
        return gradients
    _, back = jax.vjp(lambda g: dyadic.level_sums(g, SIZE), g)
    (dg,) = back((by_query, by_key))
    return *gradients, (dg + own_sums) * (LN2 / jnp.repeat(unit, group, 1))[:, None]
