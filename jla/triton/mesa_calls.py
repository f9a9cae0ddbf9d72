"""MesaNet: the calls of its kernels, and the pieces that a sequence is cut into."""

import jax
import jax.numpy as jnp
import triton

from jla.triton import configs, launch, pieces
from jla.triton.kernels import mesa_gradients, mesa_read, mesa_solve, mesa_states

SDS = jax.ShapeDtypeStruct
bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32

CHUNK = 64
# The most keys' features with which S, in float16, stays in shared memory.
WIDEST = 128


def first_pass(left, x, y, g, weight, other, start=None, *, reverse=False):
    """What the tokens do to the states: how these decay, [B, H], and what becomes of `start`, zeros
    if it is None. Then what each of the pieces makes of zeros, [B, H, P, ...], and how the states
    decay over it, [B, H, P]. The arguments are those of `states`.
    """
    (B, _, H, K), V, N = left.shape, y.shape[-1], g.shape[-1] // CHUNK
    columns = _columns(_config("mesa_states", _operand(left)), K, V)
    P = pieces.number(B * H * (triton.cdiv(K, columns) + triton.cdiv(V, columns)), N)
    zeros = jnp.zeros((B, H, P, K, K), f32), jnp.zeros((B, H, P, K, V), f32)
    arrays, spans = (left, x, y, g, weight, other), pieces.spans(B, P, N)
    *_, kk, kv = states(*arrays, *zeros, spans, reverse=reverse, keep=False)
    made = kk, kv, jnp.exp(pieces.sums(g.reshape(B, H, N, CHUNK).sum(3), P))
    if start is None:
        start = tuple(x[:, :, 0] for x in zeros)
    *_, last = in_pieces(made, start, g, reverse=reverse)
    return jnp.prod(made[2], axis=2), *last, *made


def in_pieces(made, start, g, *, reverse=False):
    """The states that the pieces start from, [B, H, P, ...], the pieces' spans, and the last
    states, [B, H, ...]: see `first_pass`."""
    *ends, decay = made
    factor, options = decay[..., None, None], dict(reverse=reverse)
    (kk, kk_last), (kv, kv_last) = (
        pieces.joined(factor, end, x, **options) for end, x in zip(ends, start, strict=True)
    )
    spans = pieces.spans(g.shape[0], decay.shape[2], g.shape[-1] // CHUNK)
    return (kk, kv), spans, (kk_last, kv_last)


def _wide(size):
    """The block that holds a whole axis of features."""
    return max(16, triton.next_power_of_2(size))


def largest(k):
    """The square of each token's largest element of k, [B, H, TP]; zeros beyond the last."""
    largest = jnp.square(jnp.abs(k).max(-1).astype(f32))
    return jnp.pad(jnp.swapaxes(largest, 1, 2), ((0, 0), (0, 0), (0, -k.shape[1] % CHUNK)))


def states(
    left, x, y, g, weight, other, x_start, y_start, spans=None, *, reverse=False, keep=True
):  # fmt: skip
    """`states_kernel`'s outputs: both states before each chunk, the first one's scale second, and
    both after the last; with `reverse` after each chunk, and before the first. With spans of pieces
    the last two are those of each. Without `keep` they alone are written.
    """
    P = 0 if spans is None else spans.shape[1]
    spans = x_start if spans is None else spans  # not read
    (B, T, H, K), V = left.shape, y.shape[-1]
    N = g.shape[-1] // CHUNK
    dtype = _operand(left)
    config = _config("mesa_states", dtype)
    columns = _columns(config, K, V)
    programs = B * H * (triton.cdiv(K, columns) + triton.cdiv(V, columns))
    return launch.call(
        mesa_states.states_kernel,
        *(left, x, y, g, weight, other, x_start, y_start, spans, T, H, N),
        grid=(programs, P) if P else (programs,),
        outputs=[
            SDS((B, H, N, K, K) if keep else (1,), dtype if reverse or dtype == f32 else f16),
            SDS((B, H, N), f32),
            SDS((B, H, N, K, V) if keep else (1,), dtype),
            SDS(x_start.shape, f32),
            SDS(y_start.shape, f32),
        ],
        config=config,
        constants=_common(dtype)
        | dict(K=K, V=V, P=P, BK=_wide(K), BC=columns, KEEP=keep, REVERSE=reverse),
    )


def _columns(config, K, V):
    """How many columns of a state a program of `states_kernel` has: of twice as many rows half as
    many, so that what it holds in registers stays the same."""
    return min(config.blocks["BC"] * 128 // max(_wide(K), 128), _wide(max(K, V)))


def solve(b, scale, k, g, beta, s, s_scale, *, steps, tolerance):
    """The solutions x of all A_t x_t = b_t, or of b_t times `scale` if it is not None; and what
    they are divided by."""
    B, T, H, K = k.shape
    N, rows = g.shape[-1] // CHUNK, _wide(K)
    dtype = f32 if k.dtype == f32 else bf16
    whole = dtype != f32 and rows <= WIDEST
    config = _config("mesa_solve" if whole else "mesa_solve_wide", dtype)
    tokens = config.blocks["ROWS"]
    work = (1,)
    if not whole:
        # Of half as many features twice as many rows: registers stay the same.
        tokens = tokens * 256 // max(rows, 128)
        work = (B, H, N, CHUNK, rows + CHUNK)
    constants = dict(
        K=K, BK=rows, ROWS=tokens, WHOLE=whole, SCALED=scale is not None, TOLERANCE=tolerance
    )
    x, x_scale, _ = launch.call(
        mesa_solve.solve_kernel,
        *(b, s_scale if scale is None else scale, k, g, beta, s, s_scale, T, H, N, steps),
        grid=(B * H * N * (CHUNK // tokens),),
        outputs=[SDS(k.shape, k.dtype), SDS(g.shape, f32), SDS(work, k.dtype)],
        config=config,
        constants=_common(dtype) | constants,
    )
    return x, x_scale


def read(x, x_scale, k, v, g, beta, s, out):
    """What tokens read with x, of `out`'s shape and dtype; turned around if x_scale is None. See
    `read_kernel`."""
    (B, T, H, D), E = x.shape, v.shape[-1]
    N = g.shape[-1] // CHUNK
    dtype = s.dtype
    config = _config("mesa_read", dtype)
    columns, part = min(config.blocks["BC"], _wide(E)), min(config.blocks["BI"], _wide(D))
    constants = dict(D=D, E=E, BC=columns, BI=part, TURNED=x_scale is None)
    (o,) = launch.call(
        mesa_read.read_kernel,
        *(x, g if x_scale is None else x_scale, k, v, g, beta, s, T, H, N),
        grid=(B * H * N * triton.cdiv(E, columns),),
        outputs=[out],
        config=config,
        constants=_common(dtype) | constants,
    )
    return o


def gradients(
    k, v, do, x, x_scale, y, y_scale, g, beta, scale, kk, kk_scale, kv, dkk, dkv, dtype
):  # fmt: skip
    """`gradients_kernel`'s outputs; dk and dv of this dtype."""
    (B, T, H, K), V, TP = k.shape, v.shape[-1], g.shape[-1]
    N = TP // CHUNK
    config = _config("mesa_gradients", dkk.dtype)
    columns = min(config.blocks["BC"], _wide(max(K, V)))
    part = min(config.blocks["BI"], _wide(K), _wide(V))
    of_keys = triton.cdiv(K, columns)
    blocks = of_keys + triton.cdiv(V, columns)
    vector = SDS((B, H, TP), f32)
    sizes = dict(K=K, V=V, BC=columns, BI=part)
    return launch.call(
        mesa_gradients.gradients_kernel,
        *(k, v, do, x, x_scale, y, y_scale, g, beta, scale),
        *(kk, kk_scale, kv, dkk, dkv, T, H, N),
        grid=(B * H * N * blocks,),
        outputs=[
            *(SDS(k.shape, dtype), SDS(v.shape, dtype)),
            *(vector, SDS((B, H, of_keys, TP), f32), vector, vector),
            *(SDS((B, H, blocks, TP), f32), SDS((B, H, N, blocks), f32), SDS((B, H, N, K), f32)),
        ],
        config=config,
        constants=_common(dkk.dtype) | sizes,
    )


def _operand(k):
    """The dtype of what products take in the states, whose second is stored in it."""
    return f32 if k.dtype == f32 else bf16


def _config(name, dtype):
    return configs.config(name + ("_float32" if dtype == f32 else ""), launch.target())


def _common(dtype):
    """Constants of every kernel."""
    return dict(C=CHUNK, PRECISION="tf32x3" if dtype == f32 else "tf32")
