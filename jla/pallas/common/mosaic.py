"""Everything that knows Pallas Mosaic GPU's quirks: layouts, tiles, products, the interpreter.

Kernels are written in terms of these helpers, so that a quirk is worked around in one place.
docs/mosaic_gpu.md lists what was found.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.interpreter import interpreted, interpreting

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16

# A wgmma accumulator's layout, and the layouts of a vector along its rows or along its columns.
WGMMA_LAYOUT = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
WGMMA_TRANSPOSED_LAYOUT = plgpu.Layout.WGMMA_TRANSPOSED

# The layout in SMEM that wgmma and TMA need for 16-bit tiles: 8x64 tiles, 128-byte swizzle.
# Past an array's end TMA loads zeros and stores nothing, but the array itself must consist of whole
# tiles.
TILE_ROWS = 8
TRANSFORMS = (plgpu.TilingTransform((TILE_ROWS, 64)), plgpu.SwizzleTransform(128))
TRANSFORMS_F32 = (plgpu.TilingTransform((TILE_ROWS, 32)), plgpu.SwizzleTransform(128))

# The scopes in which the interpreter reads a product's operands; tests/hardware.py knows them by
# them. Of the left one each warp reads its rows, of the right one all.
OPERAND = "operand_of_a_product"
LEFT, RIGHT = f"left_{OPERAND}", f"right_{OPERAND}"


@contextlib.contextmanager
def interpret(*, detect_races=True):
    """Runs the Pallas kernels on the CPU under Mosaic's GPU interpreter, looking for races.

    Meant for tests: about a second for two heads of four chunks. JAX traces a function anew inside
    this context, so a jitted function may be used inside and outside.

    Example:
      q = k = v = jnp.ones((1, 1, 16))
      g, beta, state = -v, v[..., 0], jnp.zeros((1, 1, 16, 16))
      with jla.pallas.interpret():
          o, state = jla.kda_step(q, k, v, g, beta, state, implementation="pallas")
    """
    # As many as the copies a CTA makes between two uses of an SMEM tile: copies of one number take
    # each other's clock, and a wait for the one would pass for a wait for the other.
    params = plgpu.InterpretGPUParams(detect_races=detect_races, num_tma_threads_per_device=256)
    with interpreted(params), plgpu.force_gpu_interpret_mode(params):
        yield


def tile(rows, columns, *leading, dtype=bf16):
    """A 16-bit SMEM tile that TMA and wgmma can use."""
    return plgpu.SMEM((*leading, rows, columns), dtype, transforms=TRANSFORMS)


def row_numbers(rows):
    """0, 1, ... as uint32 in layout PER_ROW, opaque to the compiler.

    Opaque because a mask that LLVM can fold to a constant gives wrong results as wgmma's register
    operand (observed on an H200; the interpreter gives the correct result).
    """
    return lax.optimization_barrier(plgpu.broadcasted_iota(jnp.uint32, (rows,), 0, layout=PER_ROW))


def in_interval(start, length, columns):
    """[i, j]: whether start[i] <= j < start[i] + length[i], for uint32 vectors of layout PER_ROW.

    Masks are made of intervals because a thread holds two rows and sixteen columns of a 64x64
    tile: what depends on the row alone costs next to nothing, and a wrapping subtraction and one
    comparison remain for each element.
    """
    column = lax.optimization_barrier(
        plgpu.broadcasted_iota(jnp.uint32, (columns,), 0, layout=PER_COLUMN)
    )
    distance = per_column(column, start.shape[0]) - per_row(start, columns)
    return distance < per_row(length, columns)


# A 16-bit float whose last place is one, with room for a token's number above and below it.
_ONES = {f16: 0x6400 + 128, bf16: 0x4300 + 32}


def interval_operand(start, end, columns, dtype):
    """[i, j]: 1.0 where start[i] <= j < end[i], else 0.0, as an operand of `product` or a factor.

    Of int32 vectors of layout PER_ROW, 0 to 64; `start` or `end` may be None for no bound. All of
    it is arithmetic on pairs of 16-bit floats, two or three instructions for each, where a mask
    takes five for each element and conversions (`in_interval`).
    """

    def exact(x):
        return lax.bitcast_convert_type((x + _ONES[dtype]).astype(jnp.uint16), dtype)

    column = lax.optimization_barrier(
        exact(plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=PER_COLUMN))
    )
    bound = start if end is None else end
    column = per_column(column, bound.shape[0])
    inside = None if start is None else column - per_row(exact(start - 1), columns)
    if end is not None:
        below = per_row(exact(end), columns) - column
        inside = below if inside is None else jnp.minimum(inside, below)
    return jnp.minimum(jnp.maximum(inside, jnp.zeros_like(inside)), jnp.ones_like(inside))


def product(*pairs, init=None, meanwhile=None):
    """The float32 sum of `a @ b` over the pairs, plus `init`, in registers (layout WGMMA_LAYOUT).

    `a` is a 16-bit SMEM ref or a 16-bit value in registers, `b` a 16-bit SMEM ref; either ref may
    be a `.T`. `meanwhile` is called while the tensor cores work, before the result is awaited.
    Under the interpreter, which cannot run wgmma with registers, it is a plain product.
    """
    if interpreting():

        def value(x, scope):
            with jax.named_scope(scope):
                return (x if isinstance(x, jax.Array) else x[...]).astype(f32)

        operands = ((value(a, LEFT), value(b, RIGHT)) for a, b in pairs)
        total = sum(jnp.dot(a, b, precision=lax.Precision.HIGHEST) for a, b in operands)
        if meanwhile is not None:
            meanwhile()
        return total if init is None else total + init

    def body(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        if meanwhile is not None:
            meanwhile()
        if init is None:
            return acc[...]

    if init is not None:
        return pl.run_state(body)(plgpu.ACC.init(init))
    shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])
    return pl.run_scoped(body, plgpu.ACC(shape, f32))


def product_beside(pair, work, init=None):
    """`product(pair, init=init)` and work(), which is done while the tensor cores work.

    What work() returns, an array in registers, is there before the product is awaited.
    """
    if interpreting():
        total = product(pair, init=init)
        return total, work()

    def body(acc):
        if init is not None:
            acc[...] = init
        plgpu.wgmma(acc, *pair)
        done = work()
        # Keeps the compiler from doing the work after the wait.
        return lax.optimization_barrier((acc[...], done))

    shape = (pair[0].shape[0], pair[1].shape[1])
    return pl.run_scoped(body, plgpu.ACC(shape, f32))


def products(pairs, init=None):
    """[init_i + the sum of a @ b over pairs_i], all started together and awaited once; without
    `init` the sums alone."""
    if interpreting():
        init = [None] * len(pairs) if init is None else init
        return [product(*x, init=y) for x, y in zip(pairs, init, strict=True)]

    def body(accs):
        for acc, operands in zip(accs, pairs, strict=True):
            for a, b in operands:
                plgpu.wgmma(acc, a, b)

    if init is not None:
        return pl.run_state(body)([plgpu.ACC.init(x) for x in init])

    def from_zeros(*accs):
        body(accs)
        return [acc[...] for acc in accs]

    shapes = ((x[0][0].shape[0], x[0][1].shape[1]) for x in pairs)
    return pl.run_scoped(from_zeros, *(plgpu.ACC(shape, f32) for shape in shapes))


def beside(tiles):
    """Tiles of 64 columns as one."""
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)


def accumulate(count, operands, done, shapes):
    """The float32 sums of a @ b over `count` steps, one for each pair of a step, in registers.

    Args:
      operands: operands(n) awaits step n's tiles and returns its pairs of SMEM refs.
      done: done(n) is called when step n's products have been read; not for the last step.
      shapes: of the sums.
    """
    if interpreting():

        def turn(n, sums):
            sums = products([[pair] for pair in operands(n)], sums)
            pl.when(n > 0)(lambda: done(n - 1))
            return sums

        return lax.fori_loop(0, count, turn, [jnp.zeros(shape, f32) for shape in shapes])

    def body(*accs):
        def turn(n, _):
            for acc, pair in zip(accs, operands(n), strict=True):
                plgpu.wgmma(acc, *pair)
            plgpu.wgmma_wait(len(accs))  # those of the step before are done
            pl.when(n > 0)(lambda: done(n - 1))

        lax.fori_loop(0, count, turn, None)
        plgpu.wgmma_wait(0)
        return [acc[...] for acc in accs]

    return pl.run_scoped(body, *[plgpu.ACC(shape, f32) for shape in shapes])


def release():
    """Ends a pipeline's step whose last reads are a product's.

    The interpreter reads a product's operands as values, and calls it a race when TMA overwrites
    such a tile with no fence between. wgmma has no need of one.
    """
    if interpreting():
        plgpu.commit_smem()


def hand_back(barrier):
    """Says that this warpgroup has read a tile, which may now be overwritten by TMA."""
    release()
    plgpu.barrier_arrive(barrier)


def drain(used, stages, first, count):
    """Waits for the tiles of a ring that are not awaited yet: the last of `first` to `count` - 1.

    A GPU needs no such wait at a loader's end, and is not made to: it cost PaTH 3%. The interpreter
    of JAX 0.11 needs it: whoever waits on a barrier once must see all of its completions.
    """
    if not interpreting():
        return

    def wait(n, _):
        plgpu.barrier_wait(used.at[lax.rem(n, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(count - stages, first), count, wait, None)


def split(x):
    """A float32 value as the sum of two bf16 values: 16 of its 24 bits.

    The first is cut off rather than rounded: a mask makes it, where a rounding would have to be
    undone element by element.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    high = lax.bitcast_convert_type(lax.bitwise_and(bits, jnp.uint32(0xFFFF0000)), f32)
    return high.astype(bf16), (x - high).astype(bf16)


def load(ref, layout=WGMMA_LAYOUT, *, optimized=True):
    """Loads a ref as float32 in the given layout."""
    return plgpu.load(ref, layout=layout, optimized=optimized).astype(f32)


def load_transposed(ref):
    """Loads a float32 [columns, rows] ref as a [rows, columns] tile."""
    return plgpu.layout_cast(load(ref.T, WGMMA_TRANSPOSED_LAYOUT, optimized=False), WGMMA_LAYOUT)


def store_transposed(ref, tile):
    """Stores a float32 [rows, columns] tile to a [columns, rows] ref."""
    transposed = ref.T
    transposed[...] = plgpu.layout_cast(tile, WGMMA_TRANSPOSED_LAYOUT)


def columns_by_warp(width):
    """A [rows, width] layout over one warpgroup: a quarter of the columns a warp, all rows in it.

    Sums over rows are then shuffles inside the warp: no SMEM, no barrier. A thread's vectors have
    16 bytes (8 where width is 16), a row of a warp's quarter `width` bytes: 64 at width 64, two
    whole sectors.
    """
    quarter = width // 4
    vector = 4 if width >= 32 else 2
    rows = 32 * vector // quarter
    tiling = plgpu.Tiling(((rows, width), (rows, quarter), (vector,)))
    # (..., warp, row, vector in the row, element). JAX refuses forms that are not canonical.
    layout = TiledLayout(tiling, (-4,), (-3, -2), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def rows_by_warp(width=128, vector=4):
    """A layout of [4, 128 n] over one warpgroup, a row a warp; or several of less than 128.

    A thread's vectors have four elements, or two: then 64 take the place of 128. Sums along rows
    are shuffles inside a warp.
    """
    rows = 32 * vector // width
    tiling = plgpu.Tiling(((4 * rows, width), (rows, width), (vector,)))
    # (..., warp, 1, row in the warp, vector in the row, element)
    layout = TiledLayout(tiling, (-5,), (-3, -2), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def sigmoid(x):
    """1 / (1 + exp(-x)), by the approximate exp2."""
    # A division takes eight operations, this reciprocal of a square root one.
    root = lax.rsqrt(1.0 + jnp.exp2(x * -1.4426950408889634))
    return root * root


def zeros(shape, layout, dtype=f32):
    """Zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, dtype), layout)


def store(ref, value):
    """Stores to GMEM; JAX 0.12 asks for a word before it stores less than whole cache lines."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def walk(step, carry, count, load, store, loaded, slots):
    """Calls step(i, slot, carry) for `count` tiles one by one, with a ring of `slots` in SMEM.

    `load(i, slot)` starts the copies of tile i, at which the barriers `loaded[slot]` count;
    `store(i, slot)` those of what its step has made, wherever that is: it is not overwritten before
    the step of tile i + 2.
    """

    def turn(i, carry):
        slot = lax.rem(i, slots)
        plgpu.barrier_wait(loaded.at[slot])
        carry = step(i, slot, carry)
        plgpu.commit_smem()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store(i, slot)
        # The tile before is on its way out, and all warps are done with it.
        following = i - 1 + slots
        more = (i > 0) & (following < count)
        pl.when(more)(lambda: load(following, lax.rem(following, slots)))
        return carry

    for i in range(slots):
        pl.when(i < count)(functools.partial(load, i, i))
    carry = lax.fori_loop(0, count, turn, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def cut_off(copy, rows, left):
    """Copies a tile's rows from SMEM, or `left` of them if these are fewer, by copy(row, rows).

    Row by row then: a copy of contiguous rows is cut off where the array ends, not where a batch
    row does.
    """
    pl.when(left >= rows)(lambda: copy(0, rows))

    @pl.when(left < rows)
    def _():
        lax.fori_loop(0, left, lambda row, _: copy(row, 1), None)


def per_row(vector, columns):
    """Broadcasts a vector of layout PER_ROW along the columns of a tile."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def per_column(vector, rows):
    """Broadcasts a vector of layout PER_COLUMN along the rows of a tile."""
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])


def kernel(
    body, *, automatic_barriers=True, reductions_cross_warps=True, in_place=None, **arguments
):
    """`plgpu.kernel`, with approximate exp2.

    `automatic_barriers`: whether Mosaic puts two barriers of the warpgroup around each store to
    SMEM, so that no warp overwrites what another still reads. Without, the body has to.
    `reductions_cross_warps`: whether 2 KB of SMEM are set aside for it. Those along rows do not.
    `in_place`: {operand: output}, by number, of those that may lie in the same memory. The body
    must read the one, write all of the other, and rely on nothing: XLA makes of slices of stacked
    layers and a custom call one operation that has no aliases (and so `plgpu.kernel`, given a ref,
    reads what was never written).
    """

    # Under `jax_enable_x64` a body's literals would have 64 bits, and its indices still 32.
    @functools.wraps(body)
    def body_32(*refs):
        with jax.enable_x64(False):
            body(*refs)

    scratch = {} if reductions_cross_warps else {"reduction_scratch_bytes": 0}
    parameters = plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=not automatic_barriers, **scratch
    )
    if in_place is None:
        return plgpu.kernel(body_32, compiler_params=parameters, **arguments)
    # Not public: what `plgpu.kernel` does, which takes no aliases.
    from jax._src import config
    from jax._src.pallas import mpmd

    out_type, scratch_types = arguments.pop("out_type"), arguments.pop("scratch_types", ())
    thread_axes = (arguments["thread_name"],) if "thread_name" in arguments else ()

    def with_scratch(*refs):
        pl.run_scoped(
            functools.partial(body_32, *refs), *scratch_types, collective_axes=thread_axes
        )

    with_scratch.__name__ = body.__name__

    def run(*operands):
        with config._check_vma(False):
            return mpmd._mpmd_map(
                [(plgpu.Mesh(**arguments), with_scratch)],
                out_type,
                input_output_aliases=in_place,
                compiler_params=parameters,
                interpret=interpreting(),
            )(*operands)

    return run


def where(predicate, x):
    """x if the scalar predicate holds, else zeros; Mosaic broadcasts no predicate by itself."""
    return jnp.where(jnp.broadcast_to(predicate, x.shape), x, jnp.zeros_like(x))
