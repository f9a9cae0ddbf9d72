"""The layers' norms and short convolution: the definitions, in plain jax.numpy and float32."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jla._core.parts import l2norm
from jla._core.states import with_rank

f32 = jnp.float32

ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "silu": jax.nn.silu}


def rms_norm(
    x,
    scale,
    gate=None,
    gate_bias=None,
    *,
    epsilon,
    activation="sigmoid",
    input_activation=None,
    over=(),
):
    """See `jla._fused.rms_norm`."""
    # Not `nn.RMSNorm` and a product, because that does not run with a bfloat16 scale under strict
    # dtype promotion.
    x32 = x.astype(f32)
    if input_activation is not None:
        x32 = _function(input_activation)(x32)
    normed = _normed(x32, scale, epsilon, axes=scale.ndim, over=over)
    if gate is not None:
        gate = gate.astype(f32)
        if gate_bias is not None:
            gate = gate + with_rank(gate_bias.astype(f32), gate.ndim)
        normed = normed * _function(activation)(gate)
    return normed.astype(x.dtype)


def rms_norm_branch(x, scale, update=None, *, epsilon, input_activation=None):
    """See `jla._fused.rms_norm_branch`."""
    if update is not None:
        x = checkpoint_name(x + update, "residual_stream")
    return rms_norm(x, scale, epsilon=epsilon, input_activation=input_activation), x


def gated_norm(x, gate, scale, real=None, *, epsilon, groups=1, norm_before_gate=False, over=()):
    """See `jla._fused.gated_norm`."""
    if real is not None:
        x = jnp.where(real[..., None, None], x, 0)
    x, factor = x.astype(f32), jax.nn.silu(gate.astype(f32))
    y = x if norm_before_gate else x * factor
    if groups == 1:
        y = _normed(y, scale, epsilon, axes=2, over=over)
    else:
        y, scale = (a.reshape(*a.shape[:-2], groups, -1, a.shape[-1]) for a in (y, scale))
        y = _normed(y, scale, epsilon, axes=2).reshape(x.shape)
    return (y * factor if norm_before_gate else y).astype(gate.dtype)


def _normed(x, scale, epsilon, *, axes, over=()):
    """x over the root of its mean square over the last axes, and over manual axes of the mesh,
    times the scale; float32."""
    mean_square = jnp.mean(x * x, axis=tuple(range(-axes, 0)), keepdims=True)
    if over:
        mean_square = lax.pmean(mean_square, over)
    scale = with_rank(scale.astype(f32), x.ndim)
    return x * lax.rsqrt(mean_square + epsilon) * scale


def short_convolution(x, taps, bias=None, past=None, segments=None, *, normalize, silu_twice=False):
    """See `jla._fused.short_convolution`."""
    T, W = x.shape[1], taps.shape[0]
    # The first W - 1 entries of `window` are the tokens before this call.
    if past is None:
        window = jnp.pad(x, ((0, 0), (W - 1, 0), (0, 0), (0, 0)))
    else:
        window = jnp.concatenate([past, x], axis=1)
    if segments is not None:
        window_segments = jnp.pad(segments, ((0, 0), (W - 1, 0)))
    y = jnp.zeros(x.shape, f32)
    for i in range(W):
        tokens = window[:, i : i + T].astype(f32)
        if segments is not None:
            same = window_segments[:, i : i + T] == segments
            tokens = jnp.where(same[..., None, None], tokens, 0.0)
        y = y + taps[i].astype(f32)[None, None] * tokens
    if bias is not None:
        y = y + with_rank(bias.astype(f32), y.ndim)
    y = jax.nn.silu(y)
    y = (jax.nn.silu(y) if silu_twice else y).astype(x.dtype)
    return l2norm(y) if normalize else y


def product_of_few(x, kernel):
    """See `jla._token.product_of_few`."""
    return lax.dot_general(x, kernel, (((1,), (0,)), ((), ())))


def swiglu_of_few(x, gate, up):
    """See `jla._token.swiglu_of_few`."""
    return jax.nn.silu(product_of_few(x, gate)) * product_of_few(x, up)


def products_of_few(xs, kernels, taps, pasts, *, rounded, silu_twice):
    """See `jla._token.products_of_few`."""
    out, new = [], []
    for x, kernel, weights, past, is_rounded in zip(xs, kernels, taps, pasts, rounded, strict=True):
        y = lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=f32)
        if weights is not None:
            window = y[:, None, None], weights[:, None], None, past[:, :, None].astype(f32)
            convolved = short_convolution(*window, normalize=False, silu_twice=silu_twice)
            past = jnp.concatenate([past[:, 1:], y.astype(past.dtype)[:, None]], axis=1)
            y = convolved[:, 0, 0]
        out.append(y.astype(x.dtype) if is_rounded else y)
        new.append(past)
    return out, new


def _function(activation):
    return ACTIVATIONS.get(activation, activation)
