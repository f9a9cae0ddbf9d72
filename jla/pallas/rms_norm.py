"""RMSNorm, with a gate behind it or a residual stream beside it, as Pallas kernels.

A row's elements are contiguous, and so are the rows of a batch row: a CTA walks along several
tiles of them, with a ring of SLOTS tiles in SMEM. A warp has a row (more of short ones) and
its sums; a result takes the place of what it was made of, and goes out while the next tile is
worked on.

Nothing but the inputs is kept for the backward pass.

B=16 T=4096 in bfloat16: 67.1 million elements, 134 MB a pass, as rows of 1024 (a block's norm) or
of 128 (8 heads). Floors at 4.3 TB/s; instructions as ptxas makes them, for a warp's 128 elements,
of rows of 1024 (128). At 1.75 GHz and two and a half a clock there is time for 34 of them an array:
nothing but memory should matter, and the predictions are 85% of its speed.

========================  ==========================  ========  ============  ============  ========
kernel                    reads, writes               floor ms  instructions  predicted ms  measured
========================  ==========================  ========  ============  ============  ========
`_forward`                x, y                        0.062     30 (43)       0.075         0.080
`_forward`, gate          x, gate, y                  0.094     (81)          0.11          0.108
`_forward`, gate, bias    the same                    0.094     (86)          0.11
`_forward`, SiLU of x     x, y                        0.062     55            0.08
`_forward`, update        x, update, x, y             0.125     INSTR         0.15
`_backward`               x, dy, dx, 4 MB sums        0.095     77 (86)       0.115         0.116
`_backward`, residual     x, dy, dres, dx, 4 MB sums  0.126     87            0.15          0.152
`_backward`, gate         x, gate, dy, dx, dgate      0.156     (146)         0.185         0.187
`_backward`, gate, bias   and 4 MB sums               0.157     (155)         0.19
`_backward`, SiLU of x    x, dy, dx, 4 MB sums        0.095     136           0.14
========================  ==========================  ========  ============  ============  ========

By itself, XLA's formula takes 0.074 to 0.085, 0.122, 0.192, 0.239 and 0.309.

Registers: 61 to 120 forward, 149 to 168 backward; up to 238 for rows of 2048. No spills.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas import mosaic
from jla.pallas.mosaic import f32, per_column, per_row
from jla.pallas.shardwise import for_each_row, shardwise

SDS = jax.ShapeDtypeStruct
WIDEST = 2048
# Elements of a tile, all arrays together, at most; tiles in SMEM. So three CTAs share a
# multiprocessor.
TILE, SLOTS = 12288, 3
# Tiles of a CTA. Each CTA of the backward pass writes a row of float32 sums: the more tiles it has,
# the fewer of these there are.
FORWARD, BACKWARD = 8, 16
AT_ONCE = 1024  # elements a warp works on at once, all arrays together, if a row has not more

# A row has one or two axes, N D. Batch rows and heads have scales of their own, so that a shard
# knows nothing of the others; all are the same. A gate has a bias that batch rows share.
_X, _SCALE = "B T H N D", "B N H D"
_OPERANDS = _X, _SCALE, _X, _SCALE  # x, scale, gate, bias; so are their gradients


def unsupported(name, x, scale, other=None, gate_bias=None):
    """Why the kernels cannot serve these arguments (`other`: a gate or an update), or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, and the kernels take bfloat16 and float16"
    if other is not None and other.dtype != x.dtype:
        return f"x is {x.dtype}, and what goes with it {other.dtype}"
    size, leading = math.prod(scale.shape), x.ndim - scale.ndim
    if (size != 64 and size % 128) or size > WIDEST:
        taken = f"64 and multiples of 128 up to {WIDEST}"
        return f"rows have {size} elements, and the kernels take {taken}"
    if scale.ndim > 2 or not 2 <= leading <= 3:
        return f"x has {leading} axes before the rows' {scale.ndim}"
    if x.shape[1] == 1:
        return "x has one token, whose norm XLA makes together with what stands around it"
    if gate_bias is not None and gate_bias.shape != x.shape[2:]:
        return f"the gate's bias is {gate_bias.shape}, and a token {x.shape[2:]}"
    return None


@functools.partial(jax.jit, static_argnames=("epsilon", "activation", "input_activation"))
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
    rows = _rows(x, scale)
    gates = () if gate is None else (_rows(gate, scale),)
    if gate_bias is not None:
        gates = *gates, _biases(gate_bias, x, scale, rows)
    y = _norm(rows, _scales(scale, rows), gates, epsilon, activation, input_activation)
    return _as(x, scale, y)


@functools.partial(jax.jit, static_argnames="epsilon")
def rms_norm_branch(x, scale, update=None, *, epsilon):
    """`rms_norm` of a residual stream, and the stream: the gradients of both become one array.

    The stream is x, or x + update, rounded before it is normalised.
    """
    rows = _rows(x, scale)
    update = None if update is None else _rows(update, scale)
    y, rows = _branch(rows, _scales(scale, rows), update, epsilon)
    return _as(x, scale, y), _as(x, scale, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(x, scale, gates, epsilon, activation, input_activation):
    """`gates`: nothing, a gate, or a gate and its bias."""
    options = dict(epsilon=epsilon, activation=activation, input_activation=input_activation)
    run = functools.partial(_forward, **options)
    return shardwise(run, _OPERANDS[: 2 + len(gates)], (_X,))(x, scale, *gates)[0]


def _norm_forward(x, scale, gates, *options):
    # `_norm`, not the kernel: a checkpoint policy that keeps kernels' results (as that of
    # examples/model.py does) sees a custom_vjp, and so y is made again rather than kept.
    return _norm(x, scale, gates, *options), (x, scale, gates)


def _norm_backward(epsilon, activation, input_activation, inputs, dy):
    x, scale, gates = inputs
    options = dict(epsilon=epsilon, activation=activation, input_activation=input_activation)
    run = functools.partial(_backward, **options)
    axes = _OPERANDS[2 : 2 + len(gates)]
    differentiate = shardwise(run, (_X, _SCALE, _X, *axes), (_X, _SCALE, *axes))
    dx, dscale, *dgates = differentiate(x, scale, dy, *gates)
    return dx, dscale, tuple(dgates)


_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _branch(x, scale, update, epsilon):
    if update is None:
        return _norm(x, scale, (), epsilon, None, None), x
    run = functools.partial(_forward, epsilon=epsilon, adds=True)
    return shardwise(run, (_X, _SCALE, _X), (_X, _X))(x, scale, update)


def _branch_forward(x, scale, update, epsilon):
    y, stream = _branch.__wrapped__(x, scale, update, epsilon)
    # With this kept neither x nor the update is.
    stream = checkpoint_name(stream, "residual_stream")
    return (y, stream), (stream, scale, update is not None)


def _branch_backward(epsilon, residuals, cotangents):
    stream, scale, adds = residuals
    run = functools.partial(_branch_backward_kernel, epsilon=epsilon)
    axes = _X, _SCALE, _X, _X
    dx, dscale = shardwise(run, axes, axes[:2])(stream, scale, *cotangents)
    return dx, dscale, dx if adds else None


def _branch_backward_kernel(x, scale, dy, residual, *, epsilon):
    return _backward(x, scale, dy, residual=residual, epsilon=epsilon)


_branch.defvjp(_branch_forward, _branch_backward)


def _forward(x, scale, *others, epsilon, activation=None, input_activation=None, adds=False):
    """y, in x's shape and dtype, as a tuple; with `adds` also x + update.

    `others`: nothing, a gate, or a gate and its bias; with `adds` the update.
    """
    arrays, biases = (x, *others[:1]), others[1:]
    plan = _Plan(x, len(arrays), FORWARD)
    gated = len(arrays) == 2 and not adds

    def body(*refs):
        *refs, tiles, loaded = refs
        inputs, (scale_ref, *refs) = refs[: len(arrays)], refs[len(arrays) :]
        bias_refs, outputs = refs[: len(biases)], refs[len(biases) :]
        scale, gate = plan.scales(scale_ref, input_activation), plan.gates(*bias_refs)

        def operand(tile, rows, c):
            """What is normalised. The thread that writes here was the last to read here."""
            x = plan.load(tile.at[0, rows, c])
            if not adds:
                return _activate(x, input_activation)[0]
            x = (x + plan.load(tile.at[1, rows, c])).astype(outputs[0].dtype)
            mosaic.store(tile.at[0, rows, c], x)
            return x.astype(f32)

        def step(tile, first, carry):
            for rows in plan.groups():
                xs = [operand(tile, rows, c) for c in range(plan.chunks)]
                (mean_square,) = plan.means([x * x] for x in xs)
                inverse = per_row(_inverse(mean_square, epsilon), plan.width)
                for c, x in enumerate(xs):
                    y = x * inverse * scale(c)
                    if gated:
                        y = y * _activate(gate(tile, first, rows, c), activation)[0]
                    mosaic.store(tile.at[int(adds), rows, c], y.astype(outputs[0].dtype))
            return carry

        plan.walk(step, jnp.int32(0), inputs, outputs, tiles, loaded)

    out = mosaic.kernel(
        body,
        automatic_barriers=False,
        reductions_cross_warps=False,
        out_type=[SDS(plan.shape, x.dtype)] * (1 + adds),
        **plan.launch(),
    )(*map(plan.tiled, arrays), plan.tiled_scale(scale), *map(plan.tiled_bias, biases))
    return tuple(a.reshape(x.shape) for a in reversed(out))


def _backward(x, scale, dy, *gates, residual=None, epsilon, activation=None, input_activation=None):
    """dx, the scale's gradient for each batch row, [B, N, H, D] float32, and the gates' if any.

    With r = 1 / sqrt(mean(x**2) + epsilon), a = activation(gate + bias) and e = dy a scale, the
    gradient of x r:

        dx = r (e - x r mean(e x r)) + dresidual
        dgate = dy a' scale x r;  dbias = sum of dgate, dscale = sum of dy a x r over rows

    With an activation of the input this x is what it made, and its slope stands before dx.

    Each CTA writes its share of the sums, and XLA adds them up: no atomics, the same bits every
    time. Behind the last row x and dy are zero, and so are their shares. Where a group of rows does
    not have every head equally often, or rows are long, XLA sums dgate instead.
    """
    gates, biases = gates[:1], gates[1:]
    # The first of them are, tile by tile, replaced by their gradients.
    arrays = [x, *gates, dy] if residual is None else [x, dy, residual]
    DY = 1 + len(gates)
    plan = _Plan(x, len(arrays), BACKWARD)
    chunks = range(plan.chunks)
    bias_sums = bool(biases) and plan.chunks == 1 and plan.group % plan.heads == 0

    def body(*refs):
        *refs, tiles, loaded = refs
        inputs, (scale_ref, *refs) = refs[: len(arrays)], refs[len(arrays) :]
        bias_refs, refs = refs[: len(biases)], refs[len(biases) :]
        outputs, (dscale_ref, *dbias_refs) = refs[: 1 + len(gates)], refs[1 + len(gates) :]
        scale, gate = plan.scales(scale_ref, input_activation), plan.gates(*bias_refs)

        def gradients(tile, first, rows, sums):
            """Writes these rows' gradients where x and the gate lay; adds to the vectors'."""

            def operands(c):
                """x and its slope, dy a and, for dgate, dy a' of the rows' c-th elements."""
                x, dy = (plan.load(tile.at[i, rows, c]) for i in (0, DY))
                x = _activate(x, input_activation)
                if not gates:
                    return *x, dy, None
                value, slope = _activate(gate(tile, first, rows, c), activation)
                return *x, dy * value, dy * slope

            kept = [operands(c) for c in chunks]
            mean_square, along = plan.means(
                (x * x, x * (dy * scale(c))) for c, (x, _, dy, _) in enumerate(kept)
            )
            inverse = _inverse(mean_square, epsilon)
            along = per_row(along * inverse, plan.width)
            inverse = per_row(inverse, plan.width)
            added = []
            for c in chunks:
                # What a long row's registers cannot hold is read, and its gates made, once more.
                x, slope, dy, dy_slope = kept[c] if plan.fits else operands(c)
                normed = x * inverse
                added.append(sums[c] + dy * normed)
                dx = inverse * (dy * scale(c) - normed * along)
                if input_activation is not None:
                    dx = dx * slope
                if residual is not None:
                    dx = dx + plan.load(tile.at[2, rows, c])
                # The thread that writes here was the last to read here.
                mosaic.store(tile.at[0, rows, c], dx.astype(outputs[0].dtype))
                if gates:
                    dgate = dy_slope * scale(c) * normed
                    mosaic.store(tile.at[1, rows, c], dgate.astype(outputs[1].dtype))
                    if bias_sums:
                        added.append(sums[-1] + dgate)
            return added

        def step(tile, first, sums):
            for rows in plan.groups():
                sums = gradients(tile, first, rows, sums)
            return sums

        sums = [plan.zeros()] * (plan.chunks + bias_sums)
        sums = plan.walk(step, sums, inputs, outputs, tiles, loaded)
        b, n = lax.axis_index("b"), lax.axis_index("n")
        for c in chunks:
            mosaic.store(dscale_ref.at[b, n, c], sums[c].sum(axis=0))
        for dbias_ref in dbias_refs:
            mosaic.store(dbias_ref.at[b, n], sums[-1])

    like = SDS(plan.shape, x.dtype)
    shares = [plan.chunks, plan.group][: 1 + bias_sums]
    out = mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=[
            *(like for _ in (x, *gates)),
            *(SDS((plan.batch, plan.blocks, n, plan.width), f32) for n in shares),
        ],
        **plan.launch(),
    )(*map(plan.tiled, arrays), plan.tiled_scale(scale), *map(plan.tiled_bias, biases))
    out, sums = out[: 1 + len(gates)], [a.sum(axis=1) for a in out[1 + len(gates) :]]
    dx, *dgates = (a.reshape(x.shape) for a in out)
    B, _, H, N, D = x.shape
    # All in the first head: what the heads share is summed over them anyhow.
    dscale = jnp.pad(sums[0].reshape(B, N, 1, D), ((0, 0), (0, 0), (0, H - 1), (0, 0)))
    if biases:
        if bias_sums:
            dbias = sums[1].reshape(B, -1, H, N, D).sum(axis=1)
        else:
            dbias = dgates[0].sum(axis=1, dtype=f32)
        dgates.append(dbias.swapaxes(1, 2))
    return dx, dscale, *dgates


class _Plan:
    """How rows are cut: in `chunks` of `width` elements, as many as a warp's lanes hold at once.

    A row of 64 takes half of a warp, and a warp has two rows. `group`: a warpgroup's rows at once;
    `rows`: those of a tile; `blocks`: the CTAs of a batch row.
    """

    def __init__(self, x, arrays, steps):
        B, T, H, N, D = x.shape
        self.arrays, self.dtype, self.steps = arrays, x.dtype, steps
        self.batch, self.heads, self.total, self.size = B, H, T * H, N * D
        self.width = min(self.size, 128)
        self.chunks = self.size // self.width
        self.layout = mosaic.rows_by_warp(self.width)
        # Powers of two, as most numbers of rows are multiples of one: the last tile is whole then.
        self.fits = arrays * self.size <= AT_ONCE
        # Of eight rows or more at once Mosaic makes a swizzled tile, and loses its way in one whose
        # rows have several chunks.
        more = _power(AT_ONCE // (arrays * 128)) if self.chunks == 1 else 1
        self.group = 4 * (128 // self.width) * more
        self.rows = self.group * _power(TILE // (arrays * self.group * self.size))
        self.blocks = pl.cdiv(self.total, self.rows * steps)
        self.shape = B, self.total, self.chunks, self.width

    def tiled(self, x):
        return x.reshape(self.shape)

    def tiled_scale(self, scale):
        """That of the first head, for all have the same."""
        return scale[:, :, 0].reshape(self.batch, self.chunks, self.width)

    def tiled_bias(self, bias):
        """Head after head, as often as a group of rows that begins with any head needs it."""
        H = self.heads
        bias = bias.swapaxes(1, 2).reshape(self.batch, H, self.chunks, self.width)
        return bias[:, jnp.arange(H - 1 + self.group) % H]

    def launch(self):
        tiles = self.arrays, SLOTS, self.rows, self.chunks, self.width
        return dict(
            scratch_types=[
                plgpu.SMEM(tiles, self.dtype),
                plgpu.Barrier(num_arrivals=self.arrays, num_barriers=SLOTS),
            ],
            grid=(self.batch, self.blocks),
            grid_names=("b", "n"),
        )

    def groups(self):
        return [pl.ds(start, self.group) for start in range(0, self.rows, self.group)]

    def load(self, ref):
        return mosaic.load(ref, self.layout, optimized=False)

    def scales(self, scale_ref, input_activation):
        """A function of the chunk: its scale, for all rows of a group."""
        b, by_element = lax.axis_index("b"), self.layout.reduce(0)

        def scale(c):
            vector = mosaic.load(scale_ref.at[b, c], by_element, optimized=False)
            return per_column(vector, self.group)

        # All of a very long row's, beside its sums, are more than registers hold, and all of a long
        # one's beside what an activation needs: 171 registers, not 88.
        if self.size > (1024 if input_activation is None else 512):
            return scale
        return [scale(c) for c in range(self.chunks)].__getitem__

    def gates(self, bias_ref=None):
        """A function of a tile, its first row's number, a group of its rows and a chunk: their
        gates, with the bias if there is one."""
        b, H = lax.axis_index("b"), self.heads

        def gate(tile, first, rows, c):
            gate = self.load(tile.at[1, rows, c])
            if bias_ref is None:
                return gate
            # From the L1 cache: registers cannot hold what all the heads have, and SMEM is full.
            # A number that is known now, if every tile begins with the first head.
            head = rows.start % H if self.rows % H == 0 else lax.rem(first + rows.start, H)
            return gate + self.load(bias_ref.at[b, pl.ds(head, self.group), c])

        return gate

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros((self.group, self.width), f32), self.layout)

    def means(self, chunks):
        """The rows' means of several things, from those of each chunk."""
        sums = functools.reduce(lambda a, b: [x + y for x, y in zip(a, b, strict=True)], chunks)
        return [x.sum(axis=1) * (1 / self.size) for x in sums]

    def walk(self, step, carry, inputs, outputs, tiles, loaded):
        """Calls step(tiles of the inputs, their first row's number, carry) for each of the CTA's;
        stores what it has made.

        The outputs' tiles are where those of the first inputs were.
        """
        b, first = lax.axis_index("b"), lax.axis_index("n") * self.steps
        count = jnp.minimum(self.steps, pl.cdiv(self.total, self.rows) - first)

        def load(i, slot):
            rows = pl.ds((first + i) * self.rows, self.rows)
            for number, ref in enumerate(inputs):
                plgpu.copy_gmem_to_smem(ref.at[b, rows], tiles.at[number, slot], loaded.at[slot])

        def store(i, slot):
            start = (first + i) * self.rows

            def copy(row, rows):
                for number, ref in enumerate(outputs):
                    plgpu.copy_smem_to_gmem(
                        tiles.at[number, slot, pl.ds(row, rows)],
                        ref.at[b, pl.ds(start + row, rows)],
                    )

            mosaic.cut_off(copy, self.rows, self.total - start)

        def on_tiles(i, slot, carry):
            return step(tiles.at[:, slot], (first + i) * self.rows, carry)

        return mosaic.walk(on_tiles, carry, count, load, store, loaded, SLOTS)


def _inverse(mean_square, epsilon):
    # Behind the last row all is zero, and has to remain so where epsilon is zero, too.
    return lax.rsqrt(mean_square + max(epsilon, 1e-37))


def _power(n):
    """The largest power of two up to n, and one at least."""
    return 1 << max(0, n.bit_length() - 1)


def _activate(x, activation):
    """The activation's value and its slope; with None x, and no slope."""
    if activation is None:
        return x, None
    # A division takes eight operations, this reciprocal of a square root one.
    root = lax.rsqrt(1.0 + jnp.exp2(x * -1.4426950408889634))
    sigmoid = root * root
    if activation == "sigmoid":
        return sigmoid, sigmoid * (1.0 - sigmoid)
    value = x * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid)


def _missing(x, scale):
    """Which axes of [B, T, H, N, D] x lacks, whose rows have the N D elements of the scale."""
    return (*range(x.ndim - scale.ndim, 3), *([3] if scale.ndim == 1 else []))


def _rows(x, scale):
    return jnp.expand_dims(x, _missing(x, scale))


def _as(x, scale, rows):
    """Undoes `_rows`."""
    return jnp.squeeze(rows, _missing(x, scale))


def _scales(scale, rows):
    """The scale for each batch row and head, [B, N, H, D]."""
    _, _, H, N, D = rows.shape
    scale = scale.astype(f32).reshape(N, 1, D)
    return for_each_row(jnp.broadcast_to(scale, (N, H, D)), rows)


def _biases(bias, x, scale, rows):
    """The gate's bias for each batch row, [B, N, H, D]."""
    bias = jnp.expand_dims(bias.astype(f32), [axis - 2 for axis in _missing(x, scale)])
    return for_each_row(bias.swapaxes(0, 1), rows)
