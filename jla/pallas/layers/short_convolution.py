"""The layers' short causal convolution, with one SiLU or two and an l2 norm, as Pallas kernels.

A thread has four channels of a head and walks along a stream of tokens, with the last W - 1 of them
in registers. A warpgroup walks along four streams of 128 channels (or 256) that follow one another;
TMA loads each of them with the tokens around it that it needs. Threads share no data, so no
synchronisation is needed.

Nothing but the inputs is kept for the backward pass, which makes the rest again on its way. Behind
token t it knows the gradients that token t - (W - 1) is still missing.

Floor at B=16 T=4096 H=6 D=128, bfloat16, W=4, at 4.3 TB/s: forward 0.20 GB, 0.047 ms; backward 0.31
GB, 0.073 ms.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.derivatives import reverse_only
from jla._core.shardwise import defvjp, for_each_row, shardwise
from jla.pallas.common import mosaic, scratch
from jla.pallas.common.mosaic import f32, per_column, per_row
from jla.pallas.common.scratch import barrier_for, fetch

SDS = jax.ShapeDtypeStruct
EPSILON = 1e-6  # of the norm, as `jla.linen` has it
WIDEST, MOST_TAPS = 256, 8
# How many tokens a thread walks along. The more, the less is read and made twice; the fewer, the
# more CTAs share a multiprocessor. The best of 16, 24, 32, 48 and of 12, 16, 20, 24, 30, 44.
FORWARD, BACKWARD = 16, 20
UNROLLED = 4  # tokens of a turn of the loop

_X, _TAPS = "B T H D", "B W H D"


def unsupported(name, x, taps, bias=None, past=None, segments=None):
    """Why the kernels cannot serve these arguments, or None."""
    if past is not None:
        return "there are tokens before x, from a cache, which the kernels do not read"
    if segments is not None:
        return "there are segments, which the kernels do not know"
    W, D = taps.shape[0], x.shape[-1]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, and the kernels take bfloat16 and float16"
    if D % 8 or D > WIDEST:
        return f"heads have {D} channels, and the kernels take multiples of 8 up to {WIDEST}"
    if not 2 <= W <= MOST_TAPS:
        return f"there are {W} taps, and the kernels take 2 to {MOST_TAPS}"
    return None


@functools.partial(jax.jit, static_argnames=("normalize", "silu_twice"))
@reverse_only("the layers' short convolution")
def short_convolution(x, taps, bias=None, past=None, segments=None, *, normalize, silu_twice=False):
    """`silu(sum_i taps[i] * x_{t - (W - 1 - i)} + bias)`; with `normalize` that over its l2 norm.

    Args:
      x: [B, T, H, D], 16 bits. taps: [W, H, D]. bias: [H, D] or None.
      normalize: whether the heads' vectors are divided by `sqrt(sum(y**2) + 1e-6)`.
      silu_twice: whether there is a second SiLU upon the first, before the norm.
      past, segments: None, see `unsupported`.

    Returns:
      [B, T, H, D] in x's dtype. All arithmetic is float32, and is rounded once.
    """
    # Each row of the batch has its own taps, so that a shard knows nothing of the others.
    rows = for_each_row(taps.astype(f32), x)
    if bias is not None:
        rows = jnp.concatenate([rows, for_each_row(bias.astype(f32)[None], x)], axis=1)
    return _convolution(x, rows, normalize, silu_twice, bias is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution(x, taps, normalize, silu_twice, biased):
    run = functools.partial(_forward, normalize=normalize, silu_twice=silu_twice, biased=biased)
    return shardwise(run, (_X, _TAPS), (_X,))(x, taps)[0]


def _convolution_forward(x, taps, normalize, silu_twice, biased):
    # `_convolution`, not the kernel: a checkpoint policy that keeps kernels' results (as that of
    # jla.models.kept does) sees a custom_vjp, and so y is made again rather than kept.
    return _convolution(x, taps, normalize, silu_twice, biased), (x, taps)


def _convolution_backward(normalize, silu_twice, biased, inputs, dy):
    run = functools.partial(_backward, normalize=normalize, silu_twice=silu_twice, biased=biased)
    return shardwise(run, (_X, _TAPS, _X), (_X, _TAPS))(*inputs, dy)


defvjp(_convolution, _convolution_forward, _convolution_backward)


def _forward(x, taps, *, normalize, silu_twice, biased):
    """y, [B, T, H, D] in x's dtype, as a tuple; taps [B, W, H, D] float32, or, if `biased`, [B,
    W + 1, H, D] with the bias as the last."""
    (B, T, H, D), W = x.shape, taps.shape[1] - biased
    channels, streams = _tile(D)
    out = scratch.kernel(
        functools.partial(_forward_body, T=T, normalize=normalize, silu_twice=silu_twice),
        inputs=dict(x=x, taps=_pad(taps, channels)),
        outputs=dict(y=_like(x, channels)),
        scratch=dict(
            tokens=plgpu.SMEM((streams, FORWARD + W - 1, channels), x.dtype),
            loaded=barrier_for(dict(x=streams)),
        ),
        automatic_barriers=False,
        reductions_cross_warps=False,
        grid=(B, pl.cdiv(T, streams * FORWARD), H),
        grid_names=("b", "n", "h"),
    )
    return (out.y[:, :, :H],)


def _forward_body(refs, *, T, normalize, silu_twice):
    tokens = refs.tokens
    streams, length, channels = tokens.shape
    past = length - FORWARD
    layout = mosaic.rows_by_warp()
    _load_with_past(refs, past, FORWARD, 0)
    taps = _spread_taps(refs.taps, layout, streams)
    plgpu.barrier_wait(refs.loaded)

    def step(t, window):
        window = [*window, mosaic.load(tokens.at[:, t + past], layout, optimized=False)]
        _, _, y = _silus(_weighted(taps, window), silu_twice)[-1]
        if normalize:
            y = y * per_row(_inverse_norm(y), channels)
        # The thread that writes here was the last to read here.
        mosaic.store(tokens.at[:, t + past], y.astype(tokens.dtype))
        return window[1:]

    _walk(step, 0, FORWARD, _window(tokens, layout, past))
    plgpu.commit_smem()
    _store(tokens, past, FORWARD, refs.y, T)


def _backward(x, taps, dy, *, normalize, silu_twice, biased):
    """dx, and the gradient of the taps, and of the bias behind them if `biased`, for each row of
    the batch, as `_forward` has them.

    With c the convolution plus the bias, s = sigmoid(c), y = s c and r = 1 / sqrt(sum(y**2) +
    epsilon):

        1.  without the norm  dc = dy s (1 + c (1 - s)) = dy (s + y (1 - s))
            with it           dc = (r dy - r**3 y sum(y dy)) (s + y (1 - s))
        2.  dx_t = sum_i taps[i] dc_{t + (W - 1 - i)}
            dtaps[i] = sum_t dc_t x_{t - (W - 1 - i)};   dbias = sum_t dc_t

    A second SiLU's slope stands before the first's, and y is then what comes out of the second.

    A stream makes dc of its own tokens and of the W - 1 behind them; their share of dtaps is
    counted where they are at home. Each CTA writes its sums, and XLA adds them up: no atomics, the
    same bits every time. Past the last token dy is zero, and so is dc.
    """
    (B, T, H, D), rows = x.shape, taps.shape[1]
    past = rows - biased - 1
    channels, streams = _tile(D)
    blocks = pl.cdiv(T, streams * BACKWARD)
    out = scratch.kernel(
        functools.partial(_backward_body, T=T, normalize=normalize, silu_twice=silu_twice),
        inputs=dict(x=x, taps=_pad(taps, channels), dy=dy),
        outputs=dict(dx=_like(x, channels), dtaps=SDS((B, blocks, rows, H, channels), f32)),
        scratch=dict(
            tokens=plgpu.SMEM((streams, BACKWARD + 2 * past, channels), x.dtype),
            gradients=plgpu.SMEM((streams, BACKWARD + past, channels), x.dtype),
            loaded=barrier_for(dict(x=streams, dy=streams)),
        ),
        automatic_barriers=False,
        grid=(B, blocks, H),
        grid_names=("b", "n", "h"),
    )
    return out.dx[:, :, :H], out.dtaps.sum(axis=1)[..., :D]


def _backward_body(refs, *, T, normalize, silu_twice):
    tokens, length = refs.tokens, BACKWARD
    past = refs.gradients.shape[1] - length
    W = past + 1  # taps; what else there is, is the bias
    streams, _, channels = tokens.shape
    layout = mosaic.rows_by_warp()
    load = functools.partial(mosaic.load, layout=layout, optimized=False)
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    _load_with_past(refs, past, length, past)
    for s in range(streams):
        rows = pl.ds((n * streams + s) * length, length + past)
        source = refs.dy.at[b, rows, h, _whole(channels)]
        fetch(dict(dy=(source, refs.gradients.at[s])), refs.loaded, partial=True)
    taps = _spread_taps(refs.taps, layout, streams)
    plgpu.barrier_wait(refs.loaded)

    def step(t, carry, *, own=True, finish=True):
        """Token t's share of the gradients. `own`: those of the taps are this stream's to count;
        `finish`: token t - past, which has its last share now, belongs to the stream."""
        window, pending, sums = carry
        window = [*window, load(tokens.at[:, t + past])]
        # 1. dc.
        silus = _silus(_weighted(taps, window), silu_twice)
        _, _, y = silus[-1]
        gradient = load(refs.gradients.at[:, t])
        if normalize:
            inverse = _inverse_norm(y)
            along = (gradient * y).sum(axis=1) * (inverse * inverse * inverse)
            gradient = gradient * per_row(inverse, channels) - y * per_row(along, channels)
        for gate, complement, y in reversed(silus):
            gradient = gradient * (gate + y * complement)
        # 2. dtaps and dx.
        if own:
            of_bias = [s + gradient for s in sums[W:]]
            sums = [s + gradient * x for s, x in zip(sums[:W], window, strict=True)] + of_bias
        shares = [tap * gradient for tap in taps[:W]]
        pending = [p + s for p, s in zip([*pending, 0.0], shares, strict=True)]
        if finish:
            # Token t - past of the stream lies in row t, which this thread has read.
            mosaic.store(tokens.at[:, t], pending[0].astype(tokens.dtype))
        return window[1:], pending[1:], sums

    zeros = plgpu.layout_cast(jnp.zeros((streams, channels), f32), layout)
    carry = _window(tokens, layout, past), [zeros] * past, [zeros] * len(taps)
    for t in range(past):
        carry = step(t, carry, finish=False)
    carry = _walk(step, past, length, carry)
    sums = carry[2]
    for t in range(length, length + past):
        carry = step(t, carry, own=False)
    plgpu.commit_smem()
    _store(tokens, past, length, refs.dx, T, wait=False)
    for w in range(len(taps)):
        mosaic.store(refs.dtaps.at[b, n, w, h], sums[w].sum(axis=0))
    plgpu.wait_smem_to_gmem(0)


def _tile(D):
    """A CTA's channels, D of them or more, and in how many streams its tokens run: one a warp."""
    return next(c for c in (128, WIDEST) if c >= D), 4


def _like(x, channels):
    """x's shape and type; with one more head, never written, where several heads fill a tile.

    Mosaic cuts a store off at the array's end only: past a head's last channel it would overwrite
    the next head.
    """
    B, T, H, D = x.shape
    return SDS((B, T, H + 1 if D < channels == H * D else H, D), x.dtype)


def _pad(taps, channels):
    """Zeros for channels that no head has; of x and dy TMA makes them."""
    return jnp.pad(taps, ((0, 0), (0, 0), (0, 0), (0, channels - taps.shape[-1])))


def _whole(channels):
    """All channels of a head, and those that it lacks: TMA loads zeros there and stores nothing."""
    # A start that JAX does not know: it refuses a slice that it knows to be out of bounds.
    return pl.ds(lax.axis_index("h") * 0, channels)


def _load_with_past(refs, past, length, more):
    """Loads each stream's tokens, `past` before them and `more` after them."""
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    streams, _, channels = refs.tokens.shape

    def load(s, before):
        rows = pl.ds((n * streams + s) * length - before, before + length + more)
        source = refs.x.at[b, rows, h, _whole(channels)]
        target = refs.tokens.at[s, pl.ds(past - before, before + length + more)]
        fetch(dict(x=(source, target)), refs.loaded, partial=True)

    # Before the first token there is nothing to load, see `_window`.
    pl.when(n == 0)(lambda: load(0, 0))
    pl.when(n > 0)(lambda: load(0, past))
    for s in range(1, streams):
        load(s, past)


def _window(tokens, layout, past):
    """What the streams' first tokens see of the tokens before: zeros before token 0."""
    streams, _, channels = tokens.shape
    stream = plgpu.broadcasted_iota(jnp.int32, (streams,), 0, layout=layout.reduce(1))
    stream = per_row(stream + lax.axis_index("n") * streams, channels)
    return [
        jnp.where(stream == 0, 0.0, mosaic.load(tokens.at[:, t], layout, optimized=False))
        for t in range(past)
    ]


def _spread_taps(taps_ref, layout, streams):
    """Each tap of this CTA's head, for all streams."""
    b, h = lax.axis_index("b"), lax.axis_index("h")
    by_channel = layout.reduce(0)
    taps = (
        mosaic.load(taps_ref.at[b, w, h], by_channel, optimized=False)
        for w in range(taps_ref.shape[1])
    )
    return [per_column(tap, streams) for tap in taps]


def _walk(step, start, stop, carry):
    """Calls step(t, carry) for start <= t < stop; most of it in a loop."""
    turns = (stop - start) // UNROLLED

    def turn(i, carry):
        for t in range(UNROLLED):
            carry = step(start + i * UNROLLED + t, carry)
        return carry

    carry = lax.fori_loop(0, turns, turn, carry)
    for t in range(start + turns * UNROLLED, stop):
        carry = step(t, carry)
    return carry


def _weighted(taps, window):
    """The convolution; a bias, if there is one, is the last of the taps."""
    W = len(window)
    products = (tap * x for tap, x in zip(taps[:W], window, strict=True))
    return functools.reduce(jnp.add, itertools.chain(products, taps[W:]))


def _silus(x, silu_twice):
    """For each SiLU in turn, with x its input: sigmoid(x), 1 - sigmoid(x) and silu(x)."""
    silus = []
    for _ in range(1 + silu_twice):
        gate = mosaic.sigmoid(x)
        silus.append((gate, 1.0 - gate, x * gate))
        x = silus[-1][2]
    return silus


def _inverse_norm(y):
    return lax.rsqrt((y * y).sum(axis=1) + EPSILON)


def _store(tokens, past, length, out_ref, T, *, wait=True):
    """Stores what lies where the streams' tokens lay, up to the last token, T."""
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    streams, _, channels = tokens.shape
    for s in range(streams):
        start = (n * streams + s) * length

        def copy(row, rows, s=s, start=start):
            plgpu.copy_smem_to_gmem(
                tokens.at[s, pl.ds(past + row, rows)],
                out_ref.at[b, pl.ds(start + row, rows), h, _whole(channels)],
            )

        if out_ref.shape[2:] == (1, channels):  # tokens lie side by side, see `mosaic.cut_off`
            mosaic.cut_off(copy, length, T - start)
        else:  # TMA drops what is past the last one
            copy(0, length)
    if wait:
        plgpu.wait_smem_to_gmem(0)
