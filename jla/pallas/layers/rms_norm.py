"""RMSNorm, with a gate behind it or a residual stream beside it, as Pallas kernels.

Nothing but the inputs is kept for the backward pass; `rows.py` says how CTAs walk along arrays.

Floor at B=16 T=4096 in bfloat16, 67.1 million elements, at 4.3 TB/s: 134 MB, 0.031 ms, for each
array that is read or written: x, y, and a gate, an update, a residual and their gradients where
there are such.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jla._core.derivatives import reverse_only
from jla._core.shardwise import defvjp, for_each_row, shardwise
from jla.pallas.common import mosaic, scratch
from jla.pallas.common.mosaic import f32, per_row
from jla.pallas.layers.rows import (
    BACKWARD,
    FORWARD,
    ROWS,
    SCALE,
    RowPlan,
    activate,
    as_rows,
    for_batch_rows,
    from_rows,
    inverse_root,
    missing_axes,
    unsupported_rows,
)

SDS = jax.ShapeDtypeStruct

# A gate has a bias that batch rows share.
_OPERANDS = ROWS, SCALE, ROWS, SCALE  # x, scale, gate, bias; so are their gradients


def unsupported(
    name, x, scale, other=None, gate_bias=None, *, activation=None, input_activation=None
):
    """Why the kernels cannot serve these arguments (`other`: a gate or an update), or None."""
    for function in (activation, input_activation):
        if function not in (None, "sigmoid", "silu"):
            return f"an activation is {function}, and the kernels have sigmoid and silu"
    if name == "rms_norm_branch" and input_activation is not None:
        return "there is an input_activation, and the kernel of the residual stream has none"
    reason = unsupported_rows(x, scale, *([] if other is None else [other]))
    if reason is None and gate_bias is not None and gate_bias.shape != x.shape[2:]:
        return f"the gate's bias is {gate_bias.shape}, and a token {x.shape[2:]}"
    return reason


@functools.partial(jax.jit, static_argnames=("epsilon", "activation", "input_activation"))
@reverse_only("jla.linen.RMSNorm")
def rms_norm(
    x, scale, gate=None, gate_bias=None, *, epsilon, activation="sigmoid", input_activation=None
):
    """`x * rsqrt(mean(x**2) + epsilon) * scale`, times `activation(gate + gate_bias)` if gated.

    Args:
      x: [B, T, D] or [B, T, H, D], 16 bits; a row is what the scale has the shape of.
      scale: [D], or [H, D] for rows of a whole token. gate: as x.
      gate_bias: as a token of the gate, [D] or [H, D]; None for none.
      activation: the gate's, "sigmoid" or "silu".
      input_activation: one of these, which is applied to x first; or None.

    Returns:
      x's shape and dtype. All arithmetic is float32, and is rounded once.
    """
    rows = as_rows(x, scale)
    gates = () if gate is None else (as_rows(gate, scale),)
    if gate_bias is not None:
        gates = *gates, _biases(gate_bias, x, scale, rows)
    y = _norm(rows, for_batch_rows(scale, rows), gates, epsilon, activation, input_activation)
    return from_rows(x, scale, y)


@functools.partial(jax.jit, static_argnames=("epsilon", "input_activation"))
@reverse_only("jla.linen.RMSNorm.branch")
def rms_norm_branch(x, scale, update=None, *, epsilon, input_activation=None):
    """`rms_norm` of a residual stream, and the stream: the gradients of both become one array.

    The stream is x, or x + update, rounded before it is normalised. `input_activation` is None, see
    `unsupported`.
    """
    rows = as_rows(x, scale)
    update = None if update is None else as_rows(update, scale)
    y, rows = _branch(rows, for_batch_rows(scale, rows), update, epsilon)
    return from_rows(x, scale, y), from_rows(x, scale, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(x, scale, gates, epsilon, activation, input_activation):
    """`gates`: nothing, a gate, or a gate and its bias."""
    options = dict(epsilon=epsilon, activation=activation, input_activation=input_activation)
    run = functools.partial(_forward, **options)
    return shardwise(run, _OPERANDS[: 2 + len(gates)], (ROWS,))(x, scale, *gates)[0]


def _norm_forward(x, scale, gates, *options):
    # `_norm`, not the kernel: a checkpoint policy that keeps kernels' results (as that of
    # jla.models.kept does) sees a custom_vjp, and so y is made again rather than kept.
    return _norm(x, scale, gates, *options), (x, scale, gates)


def _norm_backward(epsilon, activation, input_activation, inputs, dy):
    x, scale, gates = inputs
    options = dict(epsilon=epsilon, activation=activation, input_activation=input_activation)
    run = functools.partial(_backward, **options)
    axes = _OPERANDS[2 : 2 + len(gates)]
    differentiate = shardwise(run, (ROWS, SCALE, ROWS, *axes), (ROWS, SCALE, *axes))
    dx, dscale, *dgates = differentiate(x, scale, dy, *gates)
    return dx, dscale, tuple(dgates)


defvjp(_norm, _norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _branch(x, scale, update, epsilon):
    if update is None:
        return _norm(x, scale, (), epsilon, None, None), x
    run = functools.partial(_forward, epsilon=epsilon, adds=True)
    return shardwise(run, (ROWS, SCALE, ROWS), (ROWS, ROWS))(x, scale, update)


def _branch_forward(x, scale, update, epsilon):
    y, stream = _branch.__wrapped__(x, scale, update, epsilon)
    # With this kept neither x nor the update is.
    stream = checkpoint_name(stream, "residual_stream")
    return (y, stream), (stream, scale, update is not None)


def _branch_backward(epsilon, residuals, cotangents):
    stream, scale, adds = residuals
    run = functools.partial(_branch_backward_kernel, epsilon=epsilon)
    axes = ROWS, SCALE, ROWS, ROWS
    dx, dscale = shardwise(run, axes, axes[:2])(stream, scale, *cotangents)
    return dx, dscale, dx if adds else None


def _branch_backward_kernel(x, scale, dy, residual, *, epsilon):
    return _backward(x, scale, dy, residual=residual, epsilon=epsilon)


defvjp(_branch, _branch_forward, _branch_backward)


def _forward(x, scale, *others, epsilon, activation=None, input_activation=None, adds=False):
    """y, in x's shape and dtype, as a tuple; with `adds` also x + update.

    `others`: nothing, a gate, or a gate and its bias; with `adds` the update.
    """
    arrays, biases = (x, *others[:1]), others[1:]
    plan = RowPlan(x, len(arrays), FORWARD)
    options = dict(epsilon=epsilon, activation=activation, input_activation=input_activation)
    out = scratch.kernel(
        functools.partial(_forward_body, plan=plan, adds=adds, **options),
        inputs=dict(
            arrays=list(map(plan.tiled, arrays)),
            scale=plan.tiled_scale(scale),
            biases=list(map(plan.tiled_bias, biases)),
        ),
        outputs=dict(outputs=[SDS(plan.shape, x.dtype)] * (1 + adds)),
        reductions_cross_warps=False,
        **plan.launch(),
    )
    return tuple(a.reshape(x.shape) for a in reversed(out.outputs))


def _forward_body(refs, *, plan, adds, epsilon, activation, input_activation):
    scale = plan.columns(refs.scale, _longest(input_activation))
    gate = plan.gates(*refs.biases)
    gated = len(refs.arrays) == 2 and not adds
    dtype = refs.outputs[0].dtype

    def operand(tile, rows, c):
        """What is normalised. The thread that writes here was the last to read here."""
        x = plan.load(tile.at[0, rows, c])
        if not adds:
            return activate(x, input_activation)[0]
        x = (x + plan.load(tile.at[1, rows, c])).astype(dtype)
        mosaic.store(tile.at[0, rows, c], x)
        return x.astype(f32)

    def step(tile, first, carry):
        for rows in plan.groups():
            xs = [operand(tile, rows, c) for c in range(plan.chunks)]
            (mean_square,) = plan.means([x * x] for x in xs)
            inverse = per_row(inverse_root(mean_square, epsilon), plan.width)
            for c, x in enumerate(xs):
                y = x * inverse * scale(c)
                if gated:
                    y = y * activate(gate(tile, first, rows, c), activation)[0]
                mosaic.store(tile.at[int(adds), rows, c], y.astype(dtype))
        return carry

    plan.walk(step, jnp.int32(0), refs.arrays, refs.outputs, refs)


def _backward(x, scale, dy, *gates, residual=None, epsilon, activation=None, input_activation=None):
    """dx, the scale's gradient for each batch row, [B, N, H, D] float32, and the gates' if any.

    With r = 1 / sqrt(mean(x**2) + epsilon), a = activation(gate + bias) and e = dy a scale, the
    gradient of x r:

        1.  dx = r (e - x r mean(e x r)) + dresidual
        2.  dgate = dy a' scale x r;  dbias = sum of dgate, dscale = sum of dy a x r over rows

    With an activation of the input this x is what it made, and its slope stands before dx.

    Each CTA writes its share of the sums, and XLA adds them up: no atomics, the same bits every
    time. Behind the last row x and dy are zero, and so are their shares. Where a group of rows does
    not have every head equally often, or rows are long, XLA sums dgate instead.
    """
    gates, biases = gates[:1], gates[1:]
    # The first of them are, tile by tile, replaced by their gradients.
    arrays = [x, *gates, dy] if residual is None else [x, dy, residual]
    plan = RowPlan(x, len(arrays), BACKWARD)
    bias_sums = bool(biases) and plan.chunks == 1 and plan.group % plan.heads == 0
    options = dict(epsilon=epsilon, activation=activation, input_activation=input_activation)

    def shares(rows):
        return SDS((plan.batch, plan.blocks, rows, plan.width), f32)

    out = scratch.kernel(
        functools.partial(_backward_body, plan=plan, adds=residual is not None, **options),
        inputs=dict(
            arrays=list(map(plan.tiled, arrays)),
            scale=plan.tiled_scale(scale),
            biases=list(map(plan.tiled_bias, biases)),
        ),
        outputs=dict(
            gradients=[SDS(plan.shape, x.dtype) for _ in (x, *gates)],
            dscale=shares(plan.chunks),
            dbias=shares(plan.group) if bias_sums else None,
        ),
        **plan.launch(),
    )
    dbias = out.dbias.sum(axis=1) if bias_sums else None
    dscale = out.dscale.sum(axis=1)
    dx, *dgates = (a.reshape(x.shape) for a in out.gradients)
    dscale = plan.untiled_scale(dscale, x)
    if biases:
        B, _, H, N, D = x.shape
        if bias_sums:
            dbias = dbias.reshape(B, -1, H, N, D).sum(axis=1)
        else:
            dbias = dgates[0].sum(axis=1, dtype=f32)
        dgates.append(dbias.swapaxes(1, 2))
    return dx, dscale, *dgates


def _backward_body(refs, *, plan, adds, epsilon, activation, input_activation):
    gated = len(refs.gradients) == 2
    DY, RESIDUAL = 1 + gated, 2
    scale = plan.columns(refs.scale, _longest(input_activation))
    gate = plan.gates(*refs.biases)
    chunks = range(plan.chunks)

    def gradients(tile, first, rows, sums):
        """Writes these rows' gradients where x and the gate lay; adds to the vectors'."""

        def operands(c):
            """x and its slope, dy a and, for dgate, dy a' of the rows' c-th elements."""
            x, dy = (plan.load(tile.at[i, rows, c]) for i in (0, DY))
            x = activate(x, input_activation)
            if not gated:
                return *x, dy, None
            value, slope = activate(gate(tile, first, rows, c), activation)
            return *x, dy * value, dy * slope

        kept = [operands(c) for c in chunks]
        mean_square, along = plan.means(
            (x * x, x * (dy * scale(c))) for c, (x, _, dy, _) in enumerate(kept)
        )
        inverse = inverse_root(mean_square, epsilon)
        along = per_row(along * inverse, plan.width)
        inverse = per_row(inverse, plan.width)
        added = []
        for c in chunks:
            # What a long row's registers cannot hold is read, and its gates made, once more.
            x, slope, dy, dy_slope = kept[c] if plan.fits else operands(c)
            normed = x * inverse
            added.append(sums[c] + dy * normed)
            # 1. dx.
            dx = inverse * (dy * scale(c) - normed * along)
            if input_activation is not None:
                dx = dx * slope
            if adds:
                dx = dx + plan.load(tile.at[RESIDUAL, rows, c])
            # The thread that writes here was the last to read here.
            mosaic.store(tile.at[0, rows, c], dx.astype(refs.gradients[0].dtype))
            # 2. dgate.
            if gated:
                dgate = dy_slope * scale(c) * normed
                mosaic.store(tile.at[1, rows, c], dgate.astype(refs.gradients[1].dtype))
                if refs.dbias is not None:
                    added.append(sums[-1] + dgate)
        return added

    def step(tile, first, sums):
        for rows in plan.groups():
            sums = gradients(tile, first, rows, sums)
        return sums

    sums = [plan.zeros()] * (plan.chunks + (refs.dbias is not None))
    sums = plan.walk(step, sums, refs.arrays, refs.gradients, refs)
    b, n = lax.axis_index("b"), lax.axis_index("n")
    for c in chunks:
        mosaic.store(refs.dscale.at[b, n, c], sums[c].sum(axis=0))
    if refs.dbias is not None:
        mosaic.store(refs.dbias.at[b, n], sums[-1])


def _longest(input_activation):
    """The longest rows whose scale stays in registers.

    All of a very long row's, beside its sums, are more than registers hold, and all of a long one's
    beside what an activation needs: 171 registers, not 88.
    """
    return 1024 if input_activation is None else 512


def _biases(bias, x, scale, rows):
    """The gate's bias for each batch row, [B, N, H, D]."""
    bias = jnp.expand_dims(bias.astype(f32), [axis - 2 for axis in missing_axes(x, scale)])
    return for_each_row(bias.swapaxes(0, 1), rows)
