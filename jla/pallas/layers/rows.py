"""How the norms' kernels walk along rows, and the element-wise formulas that they share.

A row's elements are contiguous, and so are the rows of a batch row: a CTA walks along several
tiles of them, with a ring of SLOTS tiles in SMEM. A warp has a row (or several short ones) and
its sums. A result overwrites its operand, and is stored while the next tile is computed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jla._core.shardwise import for_each_row
from jla.pallas.common import mosaic
from jla.pallas.common.mosaic import f32, per_column, sigmoid
from jla.pallas.common.scratch import barrier_for, fetch

WIDEST = 2048
# Elements of a tile, all arrays together, at most; tiles in SMEM. So three CTAs share a
# multiprocessor.
TILE_ELEMENTS, SLOTS = 12288, 3
# Tiles of a CTA. Each CTA of the backward pass writes a row of float32 sums: the more tiles it has,
# the fewer of these there are.
FORWARD, BACKWARD = 8, 16
AT_ONCE = 1024  # elements a warp works on at once, all arrays together, if a row has not more

# A row has one or two axes, N D. Batch rows and heads have scales of their own, so that a shard
# knows nothing of the others; all are the same.
ROWS, SCALE = "B T H N D", "B N H D"


def unsupported_rows(x, scale, *others):
    """Why rows as long as the scale cannot be served, or what goes with x cannot; or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, and the kernels take bfloat16 and float16"
    for other in others:
        if other.dtype != x.dtype:
            return f"x is {x.dtype}, and what goes with it {other.dtype}"
    size, leading = math.prod(scale.shape), x.ndim - scale.ndim
    if (size != 64 and size % 128) or size > WIDEST:
        taken = f"64 and multiples of 128 up to {WIDEST}"
        return f"rows have {size} elements, and the kernels take {taken}"
    if scale.ndim > 2 or not 2 <= leading <= 3:
        return f"x has {leading} axes before the rows' {scale.ndim}"
    if x.shape[1] == 1:
        return "x has one token, whose norm XLA makes together with what stands around it"
    return None


class RowPlan:
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
        self.rows = self.group * _power(TILE_ELEMENTS // (arrays * self.group * self.size))
        self.blocks = pl.cdiv(self.total, self.rows * steps)
        self.shape = B, self.total, self.chunks, self.width

    def tiled(self, x):
        return x.reshape(self.shape)

    def tiled_scale(self, scale):
        """The first head's scale; all heads have the same."""
        return scale[:, :, 0].reshape(self.batch, self.chunks, self.width)

    def untiled_scale(self, sums, x):
        """Undoes `tiled_scale` for a gradient. All of it is put in the first head: it is summed
        over the heads later, because they share the scale."""
        B, _, H, N, D = x.shape
        return jnp.pad(sums.reshape(B, N, 1, D), ((0, 0), (0, 0), (0, H - 1), (0, 0)))

    def tiled_bias(self, bias):
        """Head after head, as often as a group of rows that begins with any head needs it."""
        H = self.heads
        bias = bias.swapaxes(1, 2).reshape(self.batch, H, self.chunks, self.width)
        return bias[:, jnp.arange(H - 1 + self.group, dtype=jnp.int32) % H]

    def launch(self):
        """The kernel's scratch and grid."""
        tiles = self.arrays, SLOTS, self.rows, self.chunks, self.width
        return dict(
            scratch=dict(
                tiles=plgpu.SMEM(tiles, self.dtype),
                loaded=barrier_for(dict(arrays=self.arrays), SLOTS),
            ),
            automatic_barriers=False,
            grid=(self.batch, self.blocks),
            grid_names=("b", "n"),
        )

    def groups(self):
        return [pl.ds(start, self.group) for start in range(0, self.rows, self.group)]

    def load(self, ref):
        return mosaic.load(ref, self.layout, optimized=False)

    def columns(self, ref, longest):
        """A function of the chunk: its part of a vector like the scale, for all rows of a group.

        Of rows of up to `longest` elements the vector stays in registers.
        """
        b, by_element = lax.axis_index("b"), self.layout.reduce(0)

        def columns(c):
            vector = mosaic.load(ref.at[b, c], by_element, optimized=False)
            return per_column(vector, self.group)

        if self.size > longest:
            return columns
        return [columns(c) for c in range(self.chunks)].__getitem__

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

    def walk(self, step, carry, inputs, outputs, refs):
        """Calls step(tiles of the inputs, their first row's number, carry) for each of the CTA's;
        stores what it has made.

        The outputs' tiles are where those of the first inputs were. `refs`: those of `launch`.
        """
        tiles, loaded = refs.tiles, refs.loaded
        b, first = lax.axis_index("b"), lax.axis_index("n") * self.steps
        count = jnp.minimum(self.steps, pl.cdiv(self.total, self.rows) - first)

        def load(i, slot):
            rows = pl.ds((first + i) * self.rows, self.rows)
            copies = [(ref.at[b, rows], tiles.at[k, slot]) for k, ref in enumerate(inputs)]
            fetch(dict(arrays=copies), loaded.at[slot])

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


def inverse_root(mean_square, epsilon):
    # Behind the last row all is zero, and has to remain so where epsilon is zero, too.
    return lax.rsqrt(mean_square + max(epsilon, 1e-37))


def _power(n):
    """The largest power of two up to n, and one at least."""
    return 1 << max(0, n.bit_length() - 1)


def activate(x, activation):
    """The activation's value and its slope; with None x, and no slope."""
    if activation is None:
        return x, None
    value = sigmoid(x)
    if activation == "sigmoid":
        return value, value * (1.0 - value)
    return silu(x, value)


def silu(x, sigmoid_of_x):
    """SiLU's value and its slope."""
    value = x * sigmoid_of_x
    return value, sigmoid_of_x + value * (1.0 - sigmoid_of_x)


def missing_axes(x, scale):
    """Which axes of [B, T, H, N, D] x lacks, whose rows have the N D elements of the scale."""
    return (*range(x.ndim - scale.ndim, 3), *([3] if scale.ndim == 1 else []))


def as_rows(x, scale):
    """x as [B, T, H, N, D], with no row split between devices."""
    sharding = jax.typeof(x).sharding
    if any(sharding.spec[-scale.ndim :]):
        # Outside of the custom_vjp, because a gradient must have its array's type.
        x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*sharding.spec[: -scale.ndim])))
    return jnp.expand_dims(x, missing_axes(x, scale))


def from_rows(x, scale, rows):
    """Undoes `as_rows`."""
    return jnp.squeeze(rows, missing_axes(x, scale))


def for_batch_rows(scale, rows):
    """The scale for each batch row and head, [B, N, H, D]."""
    _, _, H, N, D = rows.shape
    scale = scale.astype(f32).reshape(N, 1, D)
    return for_each_row(jnp.broadcast_to(scale, (N, H, D)), rows)
