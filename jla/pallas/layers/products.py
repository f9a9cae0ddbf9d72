"""What a token of few batch rows is multiplied with, as Pallas kernels: all matrices in one.

A CTA has 32 columns of a matrix, and 64 batch rows or fewer; the matrix' rows and x pass through a
ring in SMEM, all of which is on its way at once. Where columns are few, several CTAs have a part of
the matrix' rows each, and their sums are added by whoever reads them.

A short convolution of a product is elementwise in its channels: the CTA that has them also has
their last inputs, and writes them back moved on by one token.

A matrix is read once, where it lies; XLA would copy several of one x into one, and pad what it
splits. Floors at 4.3 TB/s, of a block of width 1024 with an MLP of 2720: q, k, v and gates 7 MB,
0.0016 ms; gate and up 11.1 MB, 0.0026 ms; down 5.6 MB, 0.0013 ms; a launch is about 0.002 ms more.
Predicted at 64 rows: 0.0045, 0.006, 0.004 ms.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic, scratch, token
from jla.pallas.common.mosaic import PER_COLUMN, f32, per_column
from jla.pallas.common.scratch import barrier_for, fetch

SDS = jax.ShapeDtypeStruct
ROWS, COLUMNS, DEPTH = 64, 32, 128  # of tiles: batch rows, a matrix' columns and rows
STAGES = {1: 8, 2: 6}  # tiles on their way, by the number of matrices that a CTA has
PROCESSORS = 132  # as many CTAs should run at least
MOST_TAPS = 8
NARROW = 256  # columns of a matrix that is padded, if TMA needs it

# wgmma wants both operands with the same swizzle, and the matrix' tile has 64 bytes a row.
TRANSFORMS = (plgpu.TilingTransform((mosaic.TILE_ROWS, COLUMNS)), plgpu.SwizzleTransform(64))


def unsupported(name, x, *arrays):
    """Why the kernels of the function `name` cannot serve these arguments, or None."""
    if reason := token.unsupported_here(*jax.tree.leaves((x, arrays))):
        return reason
    if name != "products_of_few":
        return _unsupported(x, *arrays)
    kernels, taps, _ = arrays
    lengths = [w.shape[0] for w in taps if w is not None]
    if any(not 2 <= W <= MOST_TAPS or W != lengths[0] for W in lengths):
        return f"there are {lengths} taps, and the kernels take one number, 2 to {MOST_TAPS}"
    if any(rows.shape[0] != x[0].shape[0] or rows.dtype != x[0].dtype for rows in x):
        return "the inputs have several dtypes or numbers of rows, and the kernels take one"
    if any(rows.shape[1] != x[0].shape[1] for rows in x):
        return "the inputs have several widths, and the kernels take one"
    return _unsupported(x[0], *kernels)


def _unsupported(x, *kernels):
    B, D = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, and the kernels take bfloat16 and float16"
    if B > ROWS or (B > mosaic.TILE_ROWS and B % mosaic.TILE_ROWS):
        return f"there are {B} rows, and the kernels take up to 8, and multiples of 8 up to {ROWS}"
    if D % COLUMNS:
        return f"rows have {D} features, and the kernels take multiples of {COLUMNS}"
    for kernel in kernels:
        N = kernel.shape[1]
        if kernel.dtype != x.dtype:
            return f"a matrix is {kernel.dtype}, and x is {x.dtype}: the kernels take one dtype"
        if N % COLUMNS and N > NARROW:
            return (
                f"a matrix has {N} columns, and the kernels take up to {NARROW} or multiples of 32"
            )
    return None


@jax.jit
def product_of_few(x, kernel):
    """x W, [B, N] in x's dtype. See `jla._token.product_of_few`."""
    blocks, steps = pl.cdiv(kernel.shape[1], COLUMNS), pl.cdiv(kernel.shape[0], DEPTH)
    parts = max(1, min(PROCESSORS // blocks, steps))

    def kernel_call(x, kernel):
        matrix = x, (_whole(kernel),), None, None
        (y,), _ = _run([matrix], [parts == 1], parts=None if parts == 1 else parts)
        return (y[..., : kernel.shape[1]],)

    def formula(x, kernel):
        y = _product(x, kernel)
        if parts == 1:
            return (y.astype(x.dtype),)
        return (jnp.broadcast_to(y[None] / parts, (parts, *y.shape)),)

    (y,) = token.by_formula(kernel_call, formula, x, kernel)
    if parts > 1:  # one by one, so that XLA adds them where it reads them
        y = functools.reduce(jnp.add, [y[i] for i in range(parts)])
    return y.astype(x.dtype)


@jax.jit
def swiglu_of_few(x, gate, up):
    """silu(x W_gate) * (x W_up), [B, N] in x's dtype. See `jla._token.swiglu_of_few`."""

    def kernel(x, gate, up):
        (y,), _ = _run([(x, (_whole(gate), _whole(up)), None, None)], [True])
        return (y[:, : gate.shape[1]],)

    def formula(x, gate, up):
        y = jax.nn.silu(_product(x, gate)) * _product(x, up)
        return (y.astype(x.dtype),)

    return token.by_formula(kernel, formula, x, gate, up)[0]


def products_of_few(xs, kernels, taps, pasts, *, rounded, silu_twice):
    """See `jla._token.products_of_few`. What is one array among the xs is read as one."""
    different = [x for i, x in enumerate(xs) if all(x is not y for y in xs[:i])]
    of = tuple(next(i for i, y in enumerate(different) if y is x) for x in xs)
    options = dict(of=of, rounded=tuple(rounded), silu_twice=silu_twice)
    return _products(different, kernels, taps, pasts, **options)


@functools.partial(jax.jit, static_argnames=("of", "rounded", "silu_twice"))
def _products(xs, kernels, taps, pasts, *, of, rounded, silu_twice):
    """`products_of_few`, `of` which of the xs each matrix is."""
    arrays, tree = jax.tree.flatten((xs, kernels, taps, pasts))

    def matrices(arrays):
        xs, *rest = tree.unflatten(arrays)
        return zip([xs[i] for i in of], *rest, strict=True)

    widths = [kernel.shape[1] for kernel in kernels]

    def kernel(*arrays):
        padded = [(x, (_whole(w),), _whole(t), _whole(p)) for x, w, t, p in matrices(arrays)]
        y, new = _run(padded, rounded, silu_twice=silu_twice)
        convolved = [N for N, w in zip(widths, taps, strict=True) if w is not None]
        results = zip((*y, *new), (*widths, *convolved), strict=True)
        return tuple(x[..., :N] for x, N in results)

    def formula(*arrays):
        out, new = [], []
        for (x, w, taps, past), is_rounded in zip(matrices(arrays), rounded, strict=True):
            y = _product(x, w)
            if taps is not None:
                new.append(jnp.concatenate([past[:, 1:], y.astype(past.dtype)[:, None]], axis=1))
                window = jnp.concatenate([past.astype(f32), y[:, None]], axis=1)
                y = jnp.sum(taps[None] * window, axis=1)
                for _ in range(1 + silu_twice):
                    y = jax.nn.silu(y)
            out.append(y.astype(x.dtype) if is_rounded else y)
        return *out, *new

    results = token.by_formula(kernel, formula, *arrays)
    out, new = results[: len(of)], iter(results[len(of) :])
    return list(out), [None if past is None else next(new) for past in pasts]


def _whole(array):
    """The array with columns of zeros beside its own where they are not as many as TMA can take, or
    a tile has."""
    if array is None:
        return None
    N = array.shape[-1]
    multiple = 8 if N < COLUMNS else COLUMNS
    if N % multiple == 0:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -N % multiple)])


def _product(x, kernel):
    return jnp.dot(x, kernel, preferred_element_type=f32)


class _Group(NamedTuple):
    """The CTAs of a matrix, from `first` on; which x it multiplies, and which convolution it has
    (or None): places in the lists of refs; whether its result is rounded."""

    first: int
    blocks: int
    x: int
    conv: int | None
    rounded: bool

    def on(self, block, act):
        """act(columns) if the block is one of these."""
        own = block - self.first
        columns = pl.ds(own * COLUMNS, COLUMNS)
        pl.when((own >= 0) & (own < self.blocks))(lambda: act(columns))


def _run(matrices, rounded, *, silu_twice=False, parts=None):
    """The kernel call; `matrices`: (x, kernels, taps, past)."""
    (B, D), dtype = matrices[0][0].shape, matrices[0][0].dtype
    xs, groups, first = [], [], 0
    convolved = [m for m in matrices if m[2] is not None]
    convs = iter(range(len(convolved)))
    for (x, kernels, taps, _), is_rounded in zip(matrices, rounded, strict=True):
        number = next((i for i, y in enumerate(xs) if y is x), len(xs))
        xs += [x] if number == len(xs) else []
        blocks = pl.cdiv(kernels[0].shape[1], COLUMNS)
        groups.append(
            _Group(first, blocks, number, None if taps is None else next(convs), is_rounded)
        )
        first += blocks
    several = len(matrices[0][1])
    W = convolved[0][2].shape[0] if convolved else 2
    tile = functools.partial(plgpu.SMEM, dtype=dtype, transforms=TRANSFORMS)
    exact = mosaic.TRANSFORMS_F32
    stages = min(STAGES[several], pl.cdiv(pl.cdiv(D, DEPTH), parts or 1))
    flat = [past.reshape(B, -1) for *_, past in convolved]
    outs = [kernels[0].shape[1] for _, kernels, *_ in matrices]
    out = scratch.kernel(
        functools.partial(_body, groups=groups, W=W, silu_twice=silu_twice, parts=parts),
        inputs=dict(
            x=xs,
            kernels=[kernels for _, kernels, *_ in matrices],
            taps=[taps.astype(f32) for _, _, taps, _ in convolved],
            past=flat,
        ),
        outputs=dict(
            y=[
                SDS((*([parts] if parts else []), B, N), dtype if is_rounded else f32)
                for N, is_rounded in zip(outs, rounded, strict=True)
            ],
            new_past=[SDS(x.shape, x.dtype) for x in flat],
        ),
        scratch=dict(
            rows=tile((stages, ROWS, DEPTH)),
            tiles=[tile((stages, DEPTH, COLUMNS)) for _ in range(several)],
            loaded=barrier_for(["x", *matrices[0][1]], stages),
            window=tile((W, ROWS, COLUMNS)) if convolved else None,
            tap_tile=plgpu.SMEM((W, COLUMNS), f32) if convolved else None,
            window_loaded=barrier_for(dict(taps=1, past=W - 1)) if convolved else None,
            result=tile((ROWS, COLUMNS)) if any(rounded) else None,
            exact=None if all(rounded) else plgpu.SMEM((ROWS, COLUMNS), f32, transforms=exact),
        ),
        in_place=dict(past="new_past"),
        grid=(first, parts or 1),
        grid_names=("block", "part"),
    )
    old = [past for *_, past in convolved]
    return out.y, [new.reshape(past.shape) for new, past in zip(out.new_past, old, strict=True)]


def _body(refs, *, groups, W, silu_twice, parts):
    block, part = lax.axis_index("block"), lax.axis_index("part")
    steps, stages = pl.cdiv(refs.x[0].shape[1], DEPTH), refs.rows.shape[0]
    each = pl.cdiv(steps, parts or 1)
    first = part * each
    count = jnp.minimum(each, steps - first)

    def start(n):
        slot = lax.rem(n, stages)
        depth = pl.ds((first + n) * DEPTH, DEPTH)

        def load(group, kernels, columns):
            x = refs.x[group.x]
            loads = dict(x=(x.at[_rows(block, x), depth], refs.rows.at[slot, _rows(0, x)]))
            pairs = zip(kernels, refs.tiles, strict=True)
            loads["kernels"] = [(w.at[depth, columns], tile.at[slot]) for w, tile in pairs]
            fetch(loads, refs.loaded.at[slot])

        for group, kernels in zip(groups, refs.kernels, strict=True):
            group.on(block, functools.partial(load, group, kernels))

    lax.fori_loop(0, jnp.minimum(stages, count), lambda n, _: start(n), None)
    has_window = _load_windows(refs, groups, block, W)

    def operands(n):
        slot = lax.rem(n, stages)
        plgpu.barrier_wait(refs.loaded.at[slot])
        return [(refs.rows.at[slot], tile.at[slot]) for tile in refs.tiles]

    def done(n):
        mosaic.release()
        pl.when(n + stages < count)(lambda: start(n + stages))

    shapes = [(ROWS, COLUMNS)] * len(refs.tiles)
    y, *more = mosaic.accumulate(count, operands, done, shapes)
    if more:
        y = y * mosaic.sigmoid(y) * more[0]
    if has_window is None:
        _put(refs, y)
    else:
        pl.when(~has_window)(lambda: _put(refs, y))
        pl.when(has_window)(lambda: _convolve(refs, y, W, silu_twice))
    plgpu.commit_smem()
    for group, out in zip(groups, refs.y, strict=True):
        group.on(block, functools.partial(_store, refs, group, out, part, parts, W))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # they are written before the grid ends


def _rows(block, x):
    """The batch rows of x in whole tiles. The other rows of a CTA's tiles are nothing, and of no
    effect; JAX refuses to pass an array's end knowingly, so the block's number is in it."""
    return pl.ds(block * 0, -(-x.shape[0] // mosaic.TILE_ROWS) * mosaic.TILE_ROWS)


def _put(refs, y):
    """The result in SMEM, rounded and as it is, as far as it is wanted."""
    for ref in (refs.result, refs.exact):
        if ref is not None:
            ref[...] = y.astype(ref.dtype)


def _load_windows(refs, groups, block, W):
    """Starts to load a convolution's taps and last inputs; whether the block has one, or None."""
    if not refs.taps:
        return None
    has_window = False

    def load(conv, columns):
        taps, past = refs.taps[conv], refs.past[conv]
        N = taps.shape[1]
        inputs = [
            (
                past.at[_rows(block, past), pl.ds(i * N + columns.start, COLUMNS)],
                refs.window.at[i, _rows(0, past)],
            )
            for i in range(W - 1)
        ]
        loads = dict(taps=(taps.at[:, columns], refs.tap_tile), past=inputs)
        fetch(loads, refs.window_loaded)

    for group in groups:
        if group.conv is not None:
            group.on(block, functools.partial(load, group.conv))
            own = block - group.first
            has_window |= (own >= 0) & (own < group.blocks)
    return has_window


def _convolve(refs, y, W, silu_twice):
    """The convolution of the products y; its window then holds these, too."""
    plgpu.barrier_wait(refs.window_loaded)
    refs.window.at[W - 1][...] = y.astype(refs.window.dtype)

    def tap(i):
        return per_column(mosaic.load(refs.tap_tile.at[i], PER_COLUMN), ROWS)

    total = tap(W - 1) * y
    for i in range(W - 1):
        total = total + tap(i) * mosaic.load(refs.window.at[i])
    for _ in range(1 + silu_twice):
        total = total * mosaic.sigmoid(total)
    _put(refs, total)


def _store(refs, group, out, part, parts, W, columns):
    y = out if parts is None else out.at[part]
    source, target = (_rows(start, refs.x[0]) for start in (0, columns.start))
    result = refs.result if group.rounded else refs.exact
    plgpu.copy_smem_to_gmem(result.at[source], y.at[target, columns])
    if group.conv is None:
        return
    new, N = refs.new_past[group.conv], out.shape[1]
    for i in range(W - 1):
        place = target, pl.ds(i * N + columns.start, COLUMNS)
        plgpu.copy_smem_to_gmem(refs.window.at[i + 1, source], new.at[place])
