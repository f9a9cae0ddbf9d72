"""RMSNorm behind a skip connection and a gate, as Mamba-2 has them, as Pallas kernels.

Nothing but the inputs is kept for the backward pass; `rows.py` says how CTAs walk along arrays.

B=16 T=4096 H=8 D=128 in bfloat16: 67.1 million elements, 134 MB a pass. Floors at 4.3 TB/s;
instructions as ptxas makes them, for a warp's 128 elements. At 1.75 GHz and two and a half a clock
there is time for 34 of them an array. But `_backward` has tiles of 32 KB, of which SMEM has room
for two CTAs' three: its eight warps would have to run 1.64 instructions a clock for 85% of memory's
speed, 0.26 ms, and are taken to run 1.5.

===========  ===================================  ========  ============  ============  ========
kernel       reads, writes                        floor ms  instructions  predicted ms  measured
===========  ===================================  ========  ============  ============  ========
`_forward`   x, skip, gate, y                     0.125     87            0.15
`_backward`  these, dy, 3 gradients, 8 MB sums    0.220     188           0.285
===========  ===================================  ========  ============  ============  ========

In a model's training step XLA takes 1.25 for the formula forward, once more, and backward.

Registers: 75 to 130 forward, 230 for rows of 2048; 131 to 237 backward, 255 for rows of 2048. No
spills.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from jla.pallas import mosaic
from jla.pallas.mosaic import f32, per_row, sigmoid
from jla.pallas.rows import (
    BACKWARD,
    FORWARD,
    ROWS,
    SCALE,
    Plan,
    activate,
    as_rows,
    for_batch_rows,
    from_rows,
    inverse_root,
    silu,
    unsupported_rows,
)
from jla.pallas.shardwise import shardwise

SDS = jax.ShapeDtypeStruct

# The longest rows of whose vectors both sums fit in registers; and, forward and backward, the
# longest whose vectors do as well. Others are read from the L1 cache, for every row of a warp.
BOTH_SUMS, IN_REGISTERS = 1024, 512

_INPUTS = ROWS, ROWS, ROWS, SCALE, SCALE  # x, skip input, gate, skip weight, scale


def unsupported(name, x, skip_input, skip_weight, gate, scale):
    """Why the kernels cannot serve these arguments, or None."""
    return unsupported_rows(x, scale, skip_input, gate)


@functools.partial(jax.jit, static_argnames="epsilon")
def gated_norm(x, skip_input, skip_weight, gate, scale, *, epsilon):
    """`rms_norm((x + skip_weight * skip_input) * silu(gate))`, over all heads of a token.

    Args:
      x, skip_input, gate: [B, T, H, D], 16 bits.
      skip_weight: [H]. scale: [H, D].

    Returns:
      x's shape and dtype. All arithmetic is float32, and is rounded once.
    """
    arrays = [as_rows(a, scale) for a in (x, skip_input, gate)]
    weight = jnp.broadcast_to(skip_weight[:, None], scale.shape)
    vectors = [for_batch_rows(vector, arrays[0]) for vector in (weight, scale)]
    return from_rows(x, scale, _norm(*arrays, *vectors, epsilon))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _norm(x, skip_input, gate, weight, scale, epsilon):
    run = functools.partial(_forward, epsilon=epsilon)
    return shardwise(run, _INPUTS, (ROWS,))(x, skip_input, gate, weight, scale)[0]


def _norm_forward(*inputs_and_epsilon):
    # `_norm`, not the kernel, for what a checkpoint policy sees: as in rms_norm.py.
    return _norm(*inputs_and_epsilon), inputs_and_epsilon[:-1]


def _norm_backward(epsilon, inputs, dy):
    run = functools.partial(_backward, epsilon=epsilon)
    return shardwise(run, (*_INPUTS, ROWS), _INPUTS)(*inputs, dy)


_norm.defvjp(_norm_forward, _norm_backward)


def _forward(x, skip_input, gate, weight, scale, *, epsilon):
    """y, in x's shape and dtype, as a tuple."""
    arrays = x, skip_input, gate
    plan = Plan(x, len(arrays), FORWARD)
    chunks = range(plan.chunks)

    def body(*refs):
        *inputs, weight_ref, scale_ref, y_ref, tiles, loaded = refs
        weight, scale = (plan.columns(ref, IN_REGISTERS) for ref in (weight_ref, scale_ref))

        def gated(tile, rows, c):
            x, skip_input, gate = (plan.load(tile.at[i, rows, c]) for i in range(3))
            return (x + weight(c) * skip_input) * activate(gate, "silu")[0]

        def step(tile, first, carry):
            for rows in plan.groups():
                xs = [gated(tile, rows, c) for c in chunks]
                (mean_square,) = plan.means([x * x] for x in xs)
                inverse = per_row(inverse_root(mean_square, epsilon), plan.width)
                for c, x in enumerate(xs):
                    # The thread that writes here was the last to read here.
                    mosaic.store(tile.at[0, rows, c], (x * inverse * scale(c)).astype(y_ref.dtype))
            return carry

        plan.walk(step, jnp.int32(0), inputs, [y_ref], tiles, loaded)

    (y,) = mosaic.kernel(
        body,
        automatic_barriers=False,
        reductions_cross_warps=False,
        out_type=[SDS(plan.shape, x.dtype)],
        **plan.launch(),
    )(*map(plan.tiled, arrays), *map(plan.tiled_scale, (weight, scale)))
    return (y.reshape(x.shape),)


def _backward(x, skip_input, gate, weight, scale, dy, *, epsilon):
    """The inputs' gradients; those of weight and scale for each batch row, [B, N, H, D] float32.

    With s = x + weight skip_input, a = silu(gate), p = s a, r = 1 / sqrt(mean(p**2) + epsilon) and
    the gradient of p, dp = dy r scale - p r**3 mean(dy scale p):

        dx = dp a;  dskip_input = weight dx;  dgate = dp s a'
        dweight = sum of dx skip_input, dscale = sum of dy r p over rows

    Each CTA writes its share of the sums, and XLA adds them up: no atomics, the same bits every
    time. Behind the last row all is zero, and so are its shares. Where rows are long, XLA sums
    dweight instead, of the rounded dx.
    """
    arrays = x, skip_input, gate, dy  # The first three are, tile by tile, replaced by theirs.
    plan = Plan(x, len(arrays), BACKWARD)
    chunks = range(plan.chunks)
    vectors = 2 if plan.size <= BOTH_SUMS else 1  # the scale, and the skip's weight

    def body(*refs):
        *refs, tiles, loaded = refs
        inputs, (weight_ref, scale_ref, *refs) = refs[:4], refs[4:]
        outputs, shares = refs[:3], refs[3:]
        weight, scale = (plan.columns(ref, IN_REGISTERS) for ref in (weight_ref, scale_ref))

        def gradients(tile, rows, sums):
            """Writes these rows' gradients; adds to those of the vectors, chunk by chunk."""

            def operands(c):
                """s, the skip input, the gate and dy of the rows' c-th elements."""
                x, skip_input, gate, dy = (plan.load(tile.at[i, rows, c]) for i in range(4))
                return x + weight(c) * skip_input, skip_input, gate, dy

            # Registers hold these, and no more: all else is read and made once more.
            sigmoids = []

            def for_means(c):
                s, _, gate, dy = operands(c)
                sigmoids.append(sigmoid(gate))
                p = s * silu(gate, sigmoids[c])[0]
                return p * p, p * (dy * scale(c))

            mean_square, along = plan.means(for_means(c) for c in chunks)
            inverse = inverse_root(mean_square, epsilon)
            along = per_row(along * inverse * inverse * inverse, plan.width)
            inverse = per_row(inverse, plan.width)
            added = []
            for c in chunks:
                s, skip_input, gate, dy = operands(c)
                value, slope = silu(gate, sigmoids[c])
                p, dy = s * value, dy * inverse
                dp = dy * scale(c) - p * along
                dx = dp * value
                products = (dy * p, dx * skip_input)[:vectors]
                added.append(tuple(map(operator.add, sums[c], products)))
                # The thread that writes here was the last to read here.
                for i, gradient in enumerate((dx, weight(c) * dx, dp * s * slope)):
                    mosaic.store(tile.at[i, rows, c], gradient.astype(outputs[i].dtype))
            return added

        def step(tile, first, sums):
            for rows in plan.groups():
                sums = gradients(tile, rows, sums)
            return sums

        sums = [(plan.zeros(),) * vectors] * plan.chunks
        sums = plan.walk(step, sums, inputs, outputs, tiles, loaded)
        b, n = lax.axis_index("b"), lax.axis_index("n")
        for c in chunks:
            for share, of_chunk in zip(shares, sums[c], strict=True):
                mosaic.store(share.at[b, n, c], of_chunk.sum(axis=0))

    share = SDS((plan.batch, plan.blocks, plan.chunks, plan.width), f32)
    out = mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=[SDS(plan.shape, x.dtype)] * 3 + [share] * vectors,
        **plan.launch(),
    )(*map(plan.tiled, arrays), *map(plan.tiled_scale, (weight, scale)))
    gradients = [a.reshape(x.shape) for a in out[:3]]
    dscale, *dweight = (plan.untiled_scale(a.sum(axis=1), x) for a in out[3:])
    if not dweight:
        products = gradients[0].astype(f32) * skip_input.astype(f32)
        dweight = [products.sum(axis=1).swapaxes(1, 2)]
    return *gradients, *dweight, dscale
