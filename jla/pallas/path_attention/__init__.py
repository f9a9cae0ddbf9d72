"""PaTH attention as Pallas kernels; docs/kernels/path_attention.md explains their design.

`tree` makes queries and keys between which plain products are PaTH's logits, level by level of a
binary tree; `forward`, `query_gradients` and `key_gradients` are flash attention over them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jla._core.axes import PATH, letters
from jla._core.derivatives import reverse_only
from jla._core.dyadic import gradient_unit, level_sums
from jla._core.path_cache import carried_on
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise
from jla.pallas.common.chunks import LOG2E, TILE_WIDTH
from jla.pallas.common.mosaic import TILE_ROWS
from jla.pallas.path_attention import lazy_step, leaf
from jla.pallas.path_attention.dyadic import LEAF
from jla.pallas.path_attention.forward import forward
from jla.pallas.path_attention.key_gradients import key_gradients
from jla.pallas.path_attention.lazy_step import path_token
from jla.pallas.path_attention.leaf_gradients import leaf_gradients
from jla.pallas.path_attention.query_gradients import query_gradients
from jla.pallas.path_attention.step import path_step
from jla.pallas.path_attention.step import unsupported as _unsupported_step
from jla.pallas.path_attention.transform_gradients import transform_gradients
from jla.pallas.path_attention.tree import grown, leaf_sums, sixteen_bits

__all__ = ["path_attention", "path_step", "path_token", "unsupported"]

bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32

WIDEST = 128  # K or V; the registers of one warpgroup hold no wider row
BUSY = 2048  # leaves of query heads, each a CTA or two, that a GPU's multiprocessors share evenly

_INPUTS = letters(PATH, "q k v w beta g")
_OUTPUT = PATH["o"]
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
_KEPT = {"path_output": _OUTPUT, "path_logsumexp": "B HQ TP", "path_inverse": "B H N C D"}


def unsupported(name, q, k, v, *rest, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None."""
    if name == "path_step":
        return _unsupported_step(q, v)
    if name == "path_token":
        return lazy_step.unsupported_token(q, k, v, rest[-1])
    if q.dtype == f32:
        return "q, k and v are float32, and the kernels take bfloat16 and float16"
    K, V = q.shape[-1], v.shape[-1]
    if max(K, V) > WIDEST:
        return f"K = {K} and V = {V}, and the kernels take at most {WIDEST}"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "logsumexps"))
@reverse_only("jla.path_attention")
def path_attention(q, k, v, w, beta, g, cache, segment_ids, *, scale, logsumexps=False):
    """Pads to whole tiles and runs the kernels. See `jla.path_attention`; with `logsumexps` returns
    o in float32 and the logits' log-sum-exp, [B, T, HQ].

    Products take float16 operands (bfloat16 with the values) and add in float32. What has to do
    with a cache is float32, and around the kernels.
    """
    given = q, k, v, w, beta, g, cache, segment_ids
    T, V, dtype, given_scale = q.shape[1], v.shape[-1], v.dtype, scale
    if g is not None:
        g = scale * LOG2E * g
    if segment_ids is not None:
        # To start a new segment, set its first token's decay to 0.
        starts = segment_starts(segment_ids)[:, :, None]
        g = jnp.where(starts, -jnp.inf, jnp.zeros(q.shape[:3], f32) if g is None else g)
    if scale < 0:
        q, scale = -q, -scale
    q, k, v, w = (_pad(x) for x in (q, k, v.astype(bf16), w))
    beta = _pad(beta.astype(f32), features=False)
    g = None if g is None else _pad(g, features=False)
    o, logsumexp = _attention(q, k, v, w, beta, g, scale)
    o = o[:, :T, :, :V]
    if logsumexps:
        return o.astype(f32), jnp.swapaxes(logsumexp[:, :, :T], 1, 2) / LOG2E
    if cache is not None:
        logsumexp = jnp.swapaxes(logsumexp[:, :, :T], 1, 2) / LOG2E
        o, cache = carried_on(o, logsumexp, *given, scale=given_scale)
    return o.astype(dtype), cache


def _pad(x, *, features=True):
    """Tokens of zeros change nothing for those before them; features of zeros stay zero."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % TILE_ROWS)
    if features:
        widths[-1] = (0, -x.shape[-1] % TILE_WIDTH)
    return jnp.pad(x, widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, w, beta, g, scale):
    """PaTH attention on whole tiles; v bf16, scale not negative, g scaled and in base 2.

    Returns the outputs and the logits' log-sum-exp in base 2, [B, HQ, 128 P].
    """
    return _attention_forward(q, k, v, w, beta, g, scale)[0]


def _attention_forward(q, k, v, w, beta, g, scale):
    inputs = _given(q, k, v, w, beta, g)
    run = functools.partial(_forward, scale=scale)
    # The kernels round a float32 w; what they have rounded is kept for the backward pass.
    of_w = dict(path_w=_INPUTS[3], path_w_ratio="B H TP") if w.dtype == f32 else {}
    names = _KEPT | of_w
    kept = shardwise(run, _INPUTS[: len(inputs)], tuple(names.values()))(*inputs)
    kept, ratio = tuple(map(checkpoint_name, kept, names)), None
    if of_w:
        *kept, w, ratio = kept
        ratio = jnp.swapaxes(ratio[:, :, : w.shape[1]], 1, 2)
        inputs = _given(q, k, v, w, beta * ratio, g)
    return tuple(kept[:2]), (inputs, ratio, tuple(kept))


def _attention_backward(scale, residuals, cotangents):
    inputs, ratio, kept = residuals
    axes = _INPUTS[: len(inputs)]
    dtype = inputs[3].dtype if ratio is None else f32  # of the w given
    run = functools.partial(_backward, scale=scale)
    out_axes = tuple(_KEPT.values())
    all_axes = *axes, *out_axes, *out_axes[:2]
    gradients = shardwise(run, all_axes, axes)(*inputs, *kept, *cotangents)
    dq, dk, dv, dw, dbeta, *dg = gradients
    if ratio is not None:
        dbeta = dbeta * ratio
    return dq, dk, dv, dw.astype(dtype), dbeta, *(dg or [None])


defvjp(_attention, _attention_forward, _attention_backward)


def _given(*arrays):
    return tuple(x for x in arrays if x is not None)


def _forward(q, k, v, w, beta, g=None, *, scale):
    scale *= LOG2E
    q, k, w, beta = sixteen_bits(q, k, w, beta)
    inverse, w, ratio = leaf.inverses(w, beta)
    if ratio is not None:
        beta = beta * ratio
    queries, keys, own, gates, _ = grown(q, k, w, beta, g, inverse, scale=scale)
    outputs = *forward(queries, keys, v, own, gates, scale=scale), inverse
    return outputs if ratio is None else (*outputs, w, ratio)


def _backward(q, k, v, w, beta, *rest, scale):
    """All gradients, for some rows of the batch at a time.

    Versions of queries and keys and their gradients are ten times what the inputs take. They are
    there for one part's rows at once, of which there are as many as keep a GPU busy.
    """
    # The versions are made again: XLA would else find those of the forward pass to be the same, and
    # keep them until here, a gigabyte for each layer of a model.
    q, k, v, w, beta, *rest = lax.optimization_barrier((q, k, v, w, beta, *rest))
    *g, o, lse, inverse, do, dlse = rest
    delta = jnp.moveaxis(jnp.sum(do.astype(f32) * o.astype(f32), -1), 1, 2)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, -delta.shape[2] % LEAF))) - LOG2E * dlse
    arrays = q, k, v, w, beta, *g, lse, inverse, do, delta, gradient_unit(v, do, dlse)
    B, T, HQ, _ = q.shape
    rows = next(n for n in range(1, B + 1) if B % n == 0 and (n == B or n * HQ * T >= BUSY * LEAF))
    run = functools.partial(_backward_of_rows, scale=scale)
    if rows == B:
        return run(*arrays)

    def split(x):
        return x.reshape(B // rows, rows, *x.shape[1:])

    def step(i, gradients):
        part = [lax.dynamic_index_in_dim(split(x), i, keepdims=False) for x in arrays]
        new = zip(gradients, run(*part), strict=True)
        return [lax.dynamic_update_index_in_dim(all, part, i, 0) for all, part in new]

    # XLA's GPU compiler lets the kernels read and write the arrays' parts where they lie.
    like = [(q, q), (k, q), (v, v), (w, q), (beta, beta), *((x, x) for x in g)]
    gradients = [split(lax.empty(x.shape, y.dtype)) for x, y in like]
    gradients = lax.fori_loop(0, B // rows, step, gradients)
    return tuple(x.reshape(B, *x.shape[2:]) for x in gradients)


def _backward_of_rows(q, k, v, w, beta, *rest, scale):
    *g, lse, inverse, do, delta, unit = rest
    g, H = g[0] if g else None, k.shape[2]
    in_base_2 = scale * LOG2E
    inputs = sixteen_bits(q, k, w, beta)
    queries, keys, own, gates, transforms = grown(*inputs, g, inverse, scale=in_base_2)
    arguments = queries, keys, v, own, gates, do, lse, delta, unit, transforms
    *dkeys, dv, by_key = key_gradients(*arguments, scale=in_base_2)
    *dqueries, down, largest, by_query = query_gradients(*arguments, dkeys[1], scale=in_base_2)
    leaves = lse.shape[2] // LEAF
    dtransforms = transform_gradients(queries, dqueries, keys, dkeys, transforms, leaves)
    given = dqueries, dkeys, (down, largest), dtransforms, scale / unit
    dq, dk, dw, dbeta = leaf_gradients(*inputs, inverse, *given, dtype=q.dtype)
    gradients = dq, dk, dv, dw, dbeta
    if g is None:
        return gradients
    _, back = jax.vjp(lambda g: (*level_sums(g, LEAF), leaf_sums(g)[0]), g)
    (dg,) = back((by_query.sum(-1), by_key, _of_tokens(down).reshape(largest.shape)))
    unit = jnp.repeat(LOG2E * unit, dg.shape[2] // H, 1)
    return *gradients, dg / unit[:, None]


def _of_tokens(down):
    """[B, HQ, P, 2, 64]: the sums for each query less those for each key.

    Of the gradients of the leaves' own logits, [B, HQ, P, 3, 64, 64], see `leaf.leaves`.
    """
    down = down.astype(f32)
    rows, columns = (jnp.moveaxis(down.sum(axis), 3, 0) for axis in (-1, -2))
    first = rows[0] - columns[0] - columns[1]
    second = rows[1] + rows[2] - columns[2]
    return jnp.stack([first, second], 3)
